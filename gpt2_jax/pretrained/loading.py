"""One door to what belongs together: a model's config, params and tokenizer.

Knows which tokenizer goes with a checkpoint; names, formats and places are its neighbours'.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh
from jax.typing import DTypeLike

from gpt2_jax.config import PRESETS, GPT2Config
from gpt2_jax.files import read_json_object
from gpt2_jax.modules import Params
from gpt2_jax.pretrained import reading, weights
from gpt2_jax.pretrained.foreign import find
from gpt2_jax.pretrained.formats import WEIGHT_FILE
from gpt2_jax.pretrained.hub import HUB_IDS, resolve
from gpt2_jax.sharding import Rules
from gpt2_jax.summary import summarize
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer_files import TokenizerKindError, files_in

GPT2_NAMES = {*PRESETS, *HUB_IDS.values()}  # models that share GPT-2's tokenizer
# Rows of its table: as they are, and padded to a multiple of 64 or 128, as nanoGPT's and llm.c's.
GPT2_SIZES = (50257, 50304)
ADVICE = (
    "Name the tokenizer that the model was trained with, as in `--model_name gpt2` on the command "
    'line or `tokenizer_name="gpt2"`.'
)


class Pretrained(NamedTuple):
    """A model with the tokenizer of its ids.

    Examples:
      >>> gpt2_jax.Pretrained._fields
      ('config', 'params', 'tokenizer')
    """

    config: GPT2Config
    params: Params
    tokenizer: Tokenizer

    def __repr__(self) -> str:
        # A notebook that ends a cell with a model must not print its weights.
        held = summarize(self.params)
        params = f"<{held.numbers:,} numbers, {held.bytes:,} bytes>"
        return f"Pretrained(config={self.config}, params={params}, tokenizer={self.tokenizer})"


def load_pretrained(
    name_or_path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    config: GPT2Config | None = None,
    heads: bool = False,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    tokenizer_name: str | Path | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    missing_bytes: str = "error",
    meanwhile: Callable[[Pretrained], object] | None = None,
) -> Pretrained:
    """Returns a checkpoint's config, params and tokenizer: what `load` and `load_tokenizer` return.

    Args:
      name_or_path: "demo" (comes with the package), a hub id such as "gpt2", or a folder or file in
        any of the formats that docs/checkpoints.md lists. The format is told by the content.
      dtype: dtype of the params: see `load`. The config's `dtype` follows it.
      config: to take instead of the checkpoint's own, or where it has none.
      heads: also loads the heads that stand beside the model: see `load`.
      mesh, rules: devices to spread the params over, and how: see `load`.
      tokenizer_name: whose tokenizer to take instead of the checkpoint's own: see `load_tokenizer`.
      revision: branch, tag or commit of the model on the hub.
      cache_dir: where downloads are kept; by default the hub's own cache.
      local_files_only: never touch the network.
      missing_bytes: see `load_tokenizer`.
      meanwhile: is called while the weights are read, in a thread of its own, with the model as it
        will be, whose params are `jax.ShapeDtypeStruct`s: programs can be lowered and compiled for
        it. What it raises is raised here. It is not called without `dtype`, as only the file knows
        it then, nor with `mesh` or `heads`.

    Raises:
      CheckpointError: a `ValueError`; what was found is not a sound GPT-2 checkpoint.
      FileNotFoundError: there is no tokenizer.
      ImportError: the tokenizer is of another kind than GPT-2's, and `tokenizers`, which reads it,
        is not installed.
      ValueError: the tokenizer is damaged, of a kind that cannot be read, or larger than the model.
      ConnectionError: the hub could not be reached and nothing is cached.

    Examples:
      >>> model = gpt2_jax.load_pretrained("demo")
      >>> model.config.n_layer, model.tokenizer.vocab_size
      (3, 4096)
      >>> config, params, tokenizer = model  # it unpacks, the config first

      A program that is compiled while the weights are read:

      >>> forward = jax.jit(gpt2_jax.apply)
      >>> def compile_it(model):
      ...     forward.lower(model.params, ids, config=model.config).compile()
      >>> model = gpt2_jax.load_pretrained("demo", meanwhile=compile_it)
      >>> forward(model.params, ids, config=model.config).shape
      (1, 4, 4096)
    """
    # Before a download of gigabytes, not after it.
    target = reading.checked_target(name_or_path, dtype, mesh, rules)
    folder = resolve(
        name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    name = f"{tokenizer_name or name_or_path}"
    # The vocabulary is parsed in the thread and the weights are read in this one, not the other way
    # round: `with jax.enable_x64(True):` and the like hold for the thread that says it.
    with ThreadPoolExecutor(1) as pool:
        parsing = pool.submit(
            load_tokenizer,
            folder,
            tokenizer_name,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            missing_bytes=missing_bytes,
        )
        called: list[Future] = []

        def call(function: Callable, shapes: Params, of_shapes: GPT2Config) -> None:
            tokenizer = parsing.result()
            # First: with ids that the model lacks, what is called would fail in its own way.
            check_fits(tokenizer, of_shapes, name)
            function(Pretrained(of_shapes, shapes, tokenizer))

        def known(shapes: Params, of_shapes: GPT2Config) -> None:
            if meanwhile is not None:
                called.append(pool.submit(call, meanwhile, shapes, of_shapes))

        config, params = weights.load_from(folder, config, target, heads=heads, known=known)
        # After the weights: where both fail, theirs is the error that is told.
        tokenizer = parsing.result()
        check_fits(tokenizer, config, name)
        for future in called:
            future.result()
    return Pretrained(config, params, tokenizer)


def check_fits(tokenizer: Tokenizer, config: GPT2Config, name: str) -> None:
    """Raises `ValueError` if a tokenizer has ids that a model has no row for.

    Fewer are fine: a model's table may be padded to a round number, and such ids decode to nothing.
    """
    if tokenizer.vocab_size > config.vocab_size:
        added = [token for token in tokenizer.added_tokens if token.id >= config.vocab_size]
        beyond = ", ".join(f"{token.content!r} ({token.id})" for token in added[:3])
        got = f"ids up to {tokenizer.vocab_size - 1} from that of {name}"
        if beyond:
            got += f"; added tokens among them are {beyond}"
        expected = f"a tokenizer of ids below {config.vocab_size}, the model's `vocab_size`"
        raise ValueError(f"Expected {expected}, got {got}. {ADVICE}")


def load_tokenizer(
    folder: str | Path,
    name: str | Path | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    missing_bytes: str = "error",
) -> Tokenizer:
    """Returns the tokenizer of a checkpoint, or the one that is asked for by `name`.

    GPT-2's sizes share the tokenizer that comes with the package, which is also that of a folder
    with a GPT-2 checkpoint and no file of any tokenizer. Nothing else falls back to it.

    Args:
      folder: whose tokenizer: "demo", a folder, a hub id, or a size of GPT-2.
      name: likewise; given, it is what counts, and `folder` is not looked at.
      revision: branch, tag or commit of `folder` on the hub.
      cache_dir: where downloads are kept; by default the hub's own cache.
      local_files_only: never touch the network.
      missing_bytes: what becomes of bytes that the vocabulary lacks, a space or a line end, say:
        "error" raises, "drop" passes over them, as HF does.

    Raises:
      CheckpointError: a `ValueError`; there is no such folder or hub model.
      FileNotFoundError: there is no tokenizer, or half of one.
      ImportError: the tokenizer is of another kind than GPT-2's, and `tokenizers`, which reads it,
        is not installed.
      ValueError: the tokenizer cannot be read (`TokenizerKindError`), or a file is damaged.
      ConnectionError: the hub could not be reached and nothing is cached.

    Examples:
      >>> gpt2_jax.load_tokenizer("demo").vocab_size, gpt2_jax.load_tokenizer("gpt2").vocab_size
      (4096, 50257)
    """
    wanted = folder if name is None else name
    # Before it is resolved: what the package holds needs neither a download nor a network.
    if wanted in GPT2_NAMES and not Path(wanted).is_dir():
        return Tokenizer.gpt2()
    found = resolve(
        wanted,
        revision=revision if name is None else None,  # that of the model, not of the one named
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        with_weights=False,
    )
    try:
        return _own(found, missing_bytes)
    except TokenizerKindError as error:
        raise TokenizerKindError(f"{error} {ADVICE}") from error
    except FileNotFoundError as error:
        # One who names a tokenizer wants that one and no other; and half a tokenizer, its
        # vocabulary lost on the way, may have been any.
        if name is None and not files_in(find.folder_of(found)) and _holds_gpt2(found):
            return Tokenizer.gpt2()
        raise FileNotFoundError(f"{error} {ADVICE}") from error


def _own(place: Path, missing_bytes: str) -> Tokenizer:
    """Returns the tokenizer in a folder, or in a file or beside it."""
    if find.has_tokenizer(place):
        return find.read_tokenizer(place)
    return Tokenizer.load(find.folder_of(place), missing_bytes=missing_bytes)


def _holds_gpt2(place: Path) -> bool:
    """Returns whether a GPT-2 lies there, by its config or else by its weights' names or sizes."""
    folder = find.folder_of(place)
    config = folder / "config.json"
    # The earliest files name no `model_type`; whether the rest is sound is for `load` to say.
    if config.is_file():
        return read_json_object(config).get("model_type", "gpt2") == "gpt2"
    # Weights without a config: `load` says so, which tells more than the lack of a tokenizer.
    if any(WEIGHT_FILE.fullmatch(file.name) for file in folder.iterdir()):
        return True
    # Other tools' files need not be of text at all: only the size of GPT-2's vocabulary tells.
    return find.n_tokens(place) in GPT2_SIZES
