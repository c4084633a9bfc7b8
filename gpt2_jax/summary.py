"""What is in a tree of arrays, in a few lines: names, shapes, dtypes, sizes. Knows no model."""

import html
import math
import re
from typing import Any, NamedTuple

import jax

# A layer's number in a name: of twelve layers that are alike, a table shows one.
LAYER = re.compile(r"(?<![^.])h\.\d+(?![^.])")
COLUMNS = ("name", "times", "shape", "dtype", "numbers", "bytes")


class SummaryRow(NamedTuple):
    """Leaves that are alike but for their layer."""

    name: str  # "h.*.attn.c_attn.kernel"
    times: int  # how many leaves
    shape: tuple[int, ...]  # of each
    dtype: str
    numbers: int  # in all of them
    bytes: int


class Summary(NamedTuple):
    """What `summarize` found; it prints as a table, in a notebook too.

    Examples:
      >>> found = gpt2_jax.summarize(params["h"]["0"]["ln_1"])
      >>> found.numbers, found.bytes
      (32, 128)
    """

    rows: tuple[SummaryRow, ...]

    @property
    def numbers(self) -> int:
        """How many numbers the tree holds."""
        return sum(row.numbers for row in self.rows)

    @property
    def bytes(self) -> int:
        """How many bytes they take."""
        return sum(row.bytes for row in self.rows)

    def __repr__(self) -> str:
        lines = [COLUMNS, *self._lines()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        out = []
        for line in lines:
            cells = []
            for position, (cell, width) in enumerate(zip(line, widths, strict=True)):
                # Numbers end below each other, words begin so.
                is_number = COLUMNS[position] in ("times", "numbers", "bytes")
                cells.append(cell.rjust(width) if is_number else cell.ljust(width))
            out.append("  ".join(cells).rstrip())
        return "\n".join(out)

    def _repr_html_(self) -> str:
        def row_of(cells: tuple[str, ...], tag: str) -> str:
            inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{inner}</tr>"

        lines = "".join(row_of(line, "td") for line in self._lines())
        return f"<table>{row_of(COLUMNS, 'th')}{lines}</table>"

    def _lines(self) -> list[tuple[str, ...]]:
        """Returns the table's cells as text, the total last."""
        lines = []
        for row in self.rows:
            shape = str(list(row.shape))
            lines.append(
                (row.name, f"{row.times}", shape, row.dtype, f"{row.numbers:,}", f"{row.bytes:,}")
            )
        times = sum(row.times for row in self.rows)
        lines.append(("all", f"{times}", "", "", f"{self.numbers:,}", f"{self.bytes:,}"))
        return lines


def summarize(tree: Any) -> Summary:
    """Returns a table of a tree's arrays: params, adapters, an optimizer's state.

    Layers that are alike share a row, under the name `h.*`. Shapes are enough: of
    `jax.eval_shape(partial(init, config=config), key)` it tells what a model would take. Nothing is
    computed, and nothing moved.

    Raises:
      ValueError: a leaf is no array.

    Examples:
      >>> gpt2_jax.summarize({"wte": params["wte"]})
      name           times  shape       dtype    numbers    bytes
      wte.embedding      1  [4096, 16]  float32   65,536  262,144
      all                1                        65,536  262,144
    """
    rows: dict[tuple[Any, ...], SummaryRow] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(f"`tree` must hold arrays, got {type(leaf).__name__} at {name!r}.")
        name = LAYER.sub("h.*", name)
        shape = tuple(leaf.shape)
        numbers = math.prod(shape)
        size = numbers * leaf.dtype.itemsize
        # Layers of other shapes, as of another rank, have rows of their own.
        key = (name, shape, str(leaf.dtype))
        before = rows.get(key) or SummaryRow(name, 0, shape, str(leaf.dtype), 0, 0)
        rows[key] = before._replace(
            times=before.times + 1,
            numbers=before.numbers + numbers,
            bytes=before.bytes + size,
        )
    return Summary(tuple(rows.values()))


def spec_of(value: Any) -> str:
    """Returns a value's name in a line: an array's dtype and shape, "float32[2, 8]"."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, dict):
        inner = ", ".join(f"{name!r}: {spec_of(part)}" for name, part in value.items())
        return f"{{{inner}}}"
    return repr(value)


def spec_of_fields(named: Any) -> str:
    """Returns a NamedTuple's name with those of its fields: what fits a line, not its arrays."""
    fields = ", ".join(f"{name}={spec_of(getattr(named, name))}" for name in named._fields)
    return f"{type(named).__name__}({fields})"
