"""Where a checkpoint lives and what its files hold: the hub, folders, safetensors, PyTorch's; writing all or nothing.

Knows files and arrays; nothing of GPT-2's names and shapes. PyTorch is imported only to read a `pytorch_model.bin`.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_safetensors

from gpt2_jax.config import DTYPES

DEMO = Path(__file__).parent / "assets" / "demo"
HUB_IDS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES += ("special_tokens_map.json", "added_tokens.json", "generation_config.json")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or not what was asked for; the message says which, and what to do."""


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Returns the local folder of "demo", of a path, or of a hub id, which is downloaded unless it is cached.

    Raises:
      CheckpointError: there is no such folder or hub model.
      ConnectionError: the hub could not be reached and nothing is cached.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name == "demo":
        return DEMO
    if name and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"Expected a folder in HF's layout or a hub id, got the file {path}.")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or isinstance(name_or_path, Path):
        raise CheckpointError(f'There is no folder {path}. Expected a folder, a hub id such as "gpt2", or "demo".')
    options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    return _download(HUB_IDS.get(name, name), options)


@contextlib.contextmanager
def replacing(target: str | Path, *, overwrite: bool = False, keep_others: bool = False) -> Iterator[Path]:
    """Yields a fresh path beside `target`, which takes the place of `target` if the body succeeds, else vanishes.

    With `keep_others` a folder that is overwritten keeps those of its files that are neither weights nor rewritten.
    """
    target = Path(target).expanduser().resolve()
    in_use = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if in_use and not overwrite:
        raise CheckpointError(f"{target} exists already: expected a new or empty place, or `overwrite`.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{os.getpid()}-new-{target.name}")
    old = target.with_name(f".{os.getpid()}-old-{target.name}")
    try:
        yield temporary
        if temporary.is_dir() and in_use:
            if target.is_file():
                raise CheckpointError(f"Expected a folder to replace, got the file {target}.")
            target.rename(old)
            temporary.rename(target)
            for file in old.iterdir():
                if keep_others and not WEIGHT_FILE.fullmatch(file.name) and not (target / file.name).exists():
                    file.rename(target / file.name)
            shutil.rmtree(old)
        else:
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


class SafetensorsFile:
    """Shapes and tensors of one file, which is opened anew for each: the pages of an open map would pile up."""

    def __init__(self, file: Path):
        self.file = file
        with self._open() as opened:
            self.metadata = opened.metadata() or {}
            self.shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}

    def read(self, name: str) -> np.ndarray:
        with self._open() as opened:
            try:
                return opened.get_tensor(name)
            except AttributeError:  # numpy has no such dtype
                dtype = opened.get_slice(name).get_dtype()
                raise CheckpointError(f"{name}: expected one of {', '.join(DTYPES)}, got {dtype}.") from None

    @contextlib.contextmanager
    def _open(self):
        try:
            with safe_open(self.file, framework="np") as opened:
                yield opened
        except (SafetensorError, FileNotFoundError) as error:
            raise CheckpointError(f"{self.file}: expected a whole safetensors file, got {error}.") from error


class TorchFile:
    """Shapes and tensors of one file of `torch.save`, of which nothing is executed (`weights_only=True`)."""

    def __init__(self, file: Path):
        self.file = file
        self.state, self.mapped = self._open(), 0
        try:
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        except AttributeError:
            raise CheckpointError(f"{file}: expected names and tensors, got something else.") from None

    def read(self, name: str) -> np.ndarray:
        if not self.zipped:
            return to_numpy(self.state.pop(name))
        array = np.array(to_numpy(self.state[name]))
        self.mapped += array.nbytes
        if self.mapped > 2**26:  # now and then a new map; a new one for each tensor would take too long
            self.state, self.mapped = self._open(), 0
        return array

    def _open(self) -> dict[str, Any]:
        try:
            import torch
        except ImportError:
            raise CheckpointError(
                f"{self.file}: reading it needs PyTorch, which is not installed. Install `torch`, or save the "
                f"checkpoint as {SAFETENSORS}."
            ) from None
        options = {"weights_only": True, "map_location": "cpu"}
        try:
            with self.file.open("rb") as opened:
                self.zipped = opened.read(4) == b"PK\x03\x04"  # the format before PyTorch 1.6 cannot be mapped
            return torch.load(self.file, mmap=self.zipped, **options)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.file}: expected a file of tensors alone, got one that is damaged or holds other objects. "
                "Those could run any code, so nothing of it was executed."
            ) from error
        except Exception as error:  # zip's and torch's own, by the kind of damage
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{self.file}: expected a file of tensors alone, got: {reason}") from error


def open_folder(folder: Path) -> tuple[dict[str, tuple], Callable[[str], np.ndarray]]:
    """Returns the shapes of a folder's tensors, and the function that reads one."""
    for name, kind in ((SAFETENSORS, SafetensorsFile), (TORCH, TorchFile)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [kind(folder / name)]
            break
        if index.is_file():
            files = [kind(file) for file in _indexed(index)]
            break
    else:
        expected = f"{SAFETENSORS} or {TORCH}, whole or in shards"
        raise CheckpointError(f"{folder}: expected {expected}, got {listing(folder)}.")
    home = {tensor: file for file in files for tensor in file.shapes}
    return {tensor: home[tensor].shapes[tensor] for tensor in home}, lambda tensor: home[tensor].read(tensor)


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: expected a `weight_map` from names to files, got {error!r}.") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{index}: expected {len(files)} weight files, {', '.join(missing)} not found.")
    return files


def to_numpy(array: Any) -> np.ndarray:
    """Returns the array on the host; PyTorch's bfloat16, which numpy lacks, goes by its bits."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    array = array.detach().cpu()
    if str(array.dtype) == "torch.bfloat16":
        import torch

        return array.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return array.numpy()


def save_file(file: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    file.touch()  # safetensors would leave a file that only its owner may read
    mode = file.stat().st_mode
    save_safetensors({name: np.asarray(array, order="C") for name, array in arrays.items()}, file, metadata)
    file.chmod(mode)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def listing(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.iterdir())[:20]) or "an empty folder"


def _download(repo: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import errors, snapshot_download

    def fetch(name: str) -> Path:
        stem, ending = name.split(".")
        patterns = ["config.json", *TOKENIZER_FILES, name, f"{stem}-*.{ending}", f"{name}.index.json"]
        return Path(snapshot_download(repo, allow_patterns=patterns, **options))

    try:
        folder = fetch(SAFETENSORS)
        if not any(folder.glob("model*.safetensors")):
            folder = fetch(TORCH)
        return folder
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f'There is no folder "{repo}", and the hub refused this model: {reason}') from error
    except Exception as error:  # among them those of the hub's HTTP client
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's: full, not writable
        raise ConnectionError(
            f'There is no folder "{repo}", the hub could not be reached, and this model is not in its cache. '
            f'Give a folder, or "demo", which comes with the package and needs no network. ({type(error).__name__})'
        ) from error
