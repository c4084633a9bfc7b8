"""Signatures and fields of the reference as the source writes them.

JAX's and jaxtyping's annotations print as long unions of classes; in the source they are short:
`Int[Array, "B T"]`. What a field of a NamedTuple or dataclass is for, the source says in a comment
behind or above it.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

HIDDEN = {"self", "cls"}


def setup(app):
    app.connect("autodoc-process-signature", from_source)
    app.connect("autodoc-process-docstring", add_fields)
    app.connect("autodoc-process-docstring", end_code)
    app.connect("autodoc-skip-member", without_fields)
    return {"parallel_read_safe": True}


def from_source(app, what, name, obj, options, signature, return_annotation):
    """Returns a signature with the annotations of the source."""
    if inspect.isclass(obj):
        return class_signature(obj), None
    if inspect.isroutine(obj):
        return function_signature(obj)
    return None


def class_signature(cls: type) -> str:
    """Returns what a class is called with: its fields, or the arguments of its `__init__`."""
    if has_fields(cls):
        return "(" + ", ".join(field_code(field) for field in fields_of(cls)) + ")"
    if inspect.isfunction(cls.__init__):
        return function_signature(cls.__init__)[0]
    return ""


def function_signature(function: Any) -> tuple[str, str | None]:
    """Returns the arguments of a function, and what it returns."""
    parsed = parse(inspect.unwrap(function))
    arguments = parsed.args
    arguments.args = [argument for argument in arguments.args if argument.arg not in HIDDEN]
    returned = parsed.returns
    return f"({ast.unparse(arguments)})", ast.unparse(returned) if returned else None


def has_fields(cls: type) -> bool:
    """Returns whether a class is a NamedTuple or a dataclass."""
    return hasattr(cls, "_fields") or dataclasses.is_dataclass(cls)


def fields_of(cls: type) -> list[ast.AnnAssign]:
    """Returns the annotated names in a class' body that are fields, in their order."""
    body = parse(cls).body
    annotated = [node for node in body if isinstance(node, ast.AnnAssign)]
    return [node for node in annotated if "ClassVar" not in ast.unparse(node.annotation)]


def field_code(field: ast.AnnAssign) -> str:
    """Returns a field as an argument."""
    code = f"{ast.unparse(field.target)}: {ast.unparse(field.annotation)}"
    default = field.value
    if isinstance(default, ast.Call):
        # `static(default=1)`
        named = {keyword.arg: keyword.value for keyword in default.keywords}
        if "default_factory" in named:
            return f"{code} = {ast.unparse(named['default_factory'])}()"
        default = named.get("default", default if default.args else None)
    return f"{code} = {ast.unparse(default)}" if default is not None else code


def add_fields(app, what, name, obj, options, lines):
    """Puts a list of fields behind the docstring of a class whose source comments on them."""
    if not (inspect.isclass(obj) and has_fields(obj)):
        return
    source = textwrap.dedent(inspect.getsource(obj)).splitlines()
    listed = []
    for field in fields_of(obj):
        comment = comment_of(field, source)
        if comment:
            listed.append(f"* `{ast.unparse(field.target)}`: {comment}")
    if listed:
        lines.extend(["", *listed, ""])


def end_code(app, what, name, obj, options, lines):
    """Ends code where a letter follows it, as in a plural, which reStructuredText must be told."""
    lines[:] = [re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line) for line in lines]


def comment_of(field: ast.AnnAssign, source: list[str]) -> str:
    """Returns the comment behind a field, or in the lines above it."""
    last = source[field.end_lineno - 1]
    behind = last[field.end_col_offset :].partition("#")[2].strip()
    if behind:
        return behind
    above = []
    for line in reversed(source[: field.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().lstrip("#").strip())
    return " ".join(above)


def without_fields(app, what, name, obj, skip, options):
    """Leaves fields out of the members, which would say "Alias for field number 0"."""
    if type(obj).__name__ in ("_tuplegetter", "member_descriptor"):
        return True
    return None


def parse(obj: Any) -> Any:
    """Returns the syntax tree of a function or class."""
    return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
