"""One door to what belongs together: a model's config, params and tokenizer.

Knows which tokenizer goes with a checkpoint; names, formats and places are its neighbours'.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from jax.typing import DTypeLike

from gpt2_jax.config import PRESETS, GPT2Config
from gpt2_jax.files import read_json_object
from gpt2_jax.modules import Params
from gpt2_jax.pretrained import weights
from gpt2_jax.pretrained.formats import WEIGHT_FILE
from gpt2_jax.pretrained.hub import HUB_IDS, resolve
from gpt2_jax.tokenizer import Tokenizer, TokenizerKindError, check_kind, files_in

GPT2_NAMES = {*PRESETS, *HUB_IDS.values()}  # models that share GPT-2's tokenizer
ADVICE = (
    "Name the tokenizer that the model was trained with, as in `--model_name gpt2` on the command "
    'line or `tokenizer_name="gpt2"`.'
)


class Pretrained(NamedTuple):
    """A model with the tokenizer of its ids."""

    config: GPT2Config
    params: Params
    tokenizer: Tokenizer


def load_pretrained(
    name_or_path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    tokenizer_name: str | Path | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Pretrained:
    """Returns a checkpoint's config, params and tokenizer: what `load` and `load_tokenizer` return.

    Args:
      name_or_path: "demo" (comes with the package), a folder in HF's layout, or a hub id such as
        "gpt2".
      dtype: dtype of the params; by default the file's own. The config's `dtype` follows it.
      tokenizer_name: whose tokenizer to take instead of the checkpoint's own: see `load_tokenizer`.
      revision: branch, tag or commit of the model on the hub.
      cache_dir: where downloads are kept; by default the hub's own cache.
      local_files_only: never touch the network.

    Raises:
      CheckpointError: a `ValueError`; what was found is not a sound GPT-2 checkpoint.
      FileNotFoundError: there is no tokenizer.
      ValueError: the tokenizer is damaged or of another kind.
      ConnectionError: the hub could not be reached and nothing is cached.
    """
    dtype = weights.checked_dtype(dtype)  # before a download of gigabytes, not after it
    folder = resolve(
        name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    # The vocabulary is parsed in the thread and the weights are read in this one, not the other way
    # round: `with jax.enable_x64(True):` and the like hold for the thread that says it.
    with ThreadPoolExecutor(1) as pool:
        parsing = pool.submit(
            load_tokenizer,
            folder,
            tokenizer_name,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config, params = weights.load(folder, dtype=dtype)
        return Pretrained(config, params, parsing.result())


def load_tokenizer(
    folder: str | Path,
    name: str | Path | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
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

    Raises:
      CheckpointError: a `ValueError`; there is no such folder or hub model.
      FileNotFoundError: there is no tokenizer, or half of one.
      ValueError: the tokenizer is of another kind (`TokenizerKindError`), or a file is damaged.
      ConnectionError: the hub could not be reached and nothing is cached.
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
        # One who names a tokenizer wants that one and no other.
        return _own_or_gpt2s(found) if name is None else _own(found)
    except (FileNotFoundError, TokenizerKindError) as error:
        raise type(error)(f"{error} {ADVICE}") from error


def _own(folder: Path) -> Tokenizer:
    """Returns the tokenizer in a folder; of one that is not there, says of which kind it is."""
    try:
        return Tokenizer.load(folder)
    except FileNotFoundError:
        check_kind(folder)
        raise


def _own_or_gpt2s(folder: Path) -> Tokenizer:
    """Returns the tokenizer in a checkpoint's folder, or GPT-2's where there is no trace of one."""
    try:
        return _own(folder)
    except FileNotFoundError:
        # Half a tokenizer, its vocabulary lost on the way, may have been any.
        if files_in(folder) or not _holds_gpt2(folder):
            raise
        return Tokenizer.gpt2()


def _holds_gpt2(folder: Path) -> bool:
    """Returns whether a GPT-2 lies in a folder, by its config or else by its weights' names."""
    config = folder / "config.json"
    # The earliest files name no `model_type`; whether the rest is sound is for `load` to say.
    if config.is_file():
        return read_json_object(config).get("model_type", "gpt2") == "gpt2"
    return any(WEIGHT_FILE.fullmatch(file.name) for file in folder.iterdir())
