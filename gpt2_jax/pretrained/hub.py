"""Where a checkpoint lives: the demo in the package, a folder, the hub.

Knows the names of files, and nothing of what they hold.
"""

import re
from pathlib import Path
from typing import NamedTuple

from gpt2_jax import tokenizer_files
from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained.foreign import flax_msgpack, keras_h5
from gpt2_jax.pretrained.formats import SAFETENSORS, TORCH

DEMO = Path(__file__).parents[1] / "assets" / "demo"

# The names that HF's own documentation uses -> where these models moved on the hub.
HUB_IDS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
# In the order in which they are wanted.
WEIGHT_FILES = (SAFETENSORS, TORCH, flax_msgpack.FILE, keras_h5.FILE)
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # `name`, or `owner/name`

# What goes with the weights when a model is copied. Generation's defaults count among them.
TOKENIZER_FILES = (*tokenizer_files.FILES, "generation_config.json")


class Source(NamedTuple):
    """A model on the hub, and how it may be fetched."""

    repo: str  # "owner/name"
    revision: str | None  # branch, tag or commit; `None` is the main branch
    cache_dir: str | Path | None  # where downloads are kept; `None` is the hub's own cache
    local_files_only: bool  # never touch the network


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Returns the local folder of "demo" or a hub id, downloaded unless cached, or a path itself.

    A folder or file that exists wins over a hub id of the same name.

    Args:
      name_or_path: "demo", a folder or file, or a hub id. A `Path` is never taken for a hub id.
      revision: branch, tag or commit on the hub.
      cache_dir: where downloads are kept; by default the hub's own cache.
      local_files_only: never touch the network.

    Raises:
      CheckpointError: there is no such folder or hub model.
      ConnectionError: the hub could not be reached and nothing is cached.
    """
    name = str(name_or_path)
    path = Path(name_or_path).expanduser()
    if name == "demo":
        return DEMO
    if name and path.exists():  # "" would be the current folder
        return path
    if isinstance(name_or_path, Path) or not HUB_ID.fullmatch(name):
        expected = 'a folder, a hub id such as "gpt2", a file of weights, or "demo"'
        raise CheckpointError(f"There is no folder {path}. Expected {expected}.")
    repo = HUB_IDS.get(name, name)
    return _download(Source(repo, revision, cache_dir, local_files_only))


def _download(source: Source) -> Path:
    """Returns the folder of a model on the hub: weights in one format, config and tokenizer."""
    from huggingface_hub import errors

    refusals = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    )
    try:
        # One after the other: several would multiply the download.
        for weight_file in WEIGHT_FILES:
            folder = _snapshot(source, weight_file)
            if any(any(folder.glob(pattern)) for pattern in _patterns(weight_file)):
                break
        return folder
    except refusals as error:
        reason = str(error).strip().splitlines()[0]  # links and advice follow
        raise CheckpointError(
            f'There is no folder "{source.repo}", and the hub refused this model: {reason}'
        ) from error
    except Exception as error:  # among them those of the hub's HTTP client, which has changed once
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's: full, not writable
        raise ConnectionError(
            f'There is no folder "{source.repo}", the hub could not be reached, and this model is '
            'not in its cache. Give a folder, or "demo", which comes with the package and needs no '
            f"network. ({type(error).__name__})"
        ) from error


def _patterns(weight_file: str) -> list[str]:
    """Returns the names of a weight file, whole and in shards."""
    stem, ending = weight_file.split(".")
    return [weight_file, f"{stem}-*.{ending}"]


def _snapshot(source: Source, weight_file: str) -> Path:
    """Returns the folder of a model's files, with its weights in the format of `weight_file`."""
    from huggingface_hub import snapshot_download  # a second to import, and seldom needed

    # Never all of a repository: many hold the same weights for TensorFlow, ONNX and Rust as well.
    patterns = ["config.json", *TOKENIZER_FILES]
    # Small files, without which a model of another vocabulary would look like one of GPT-2's.
    patterns += tokenizer_files.OTHER_KINDS
    patterns += [*_patterns(weight_file), f"{weight_file}.index.json"]
    folder = snapshot_download(
        source.repo,
        allow_patterns=patterns,
        revision=source.revision,
        cache_dir=source.cache_dir,
        local_files_only=source.local_files_only,
    )
    return Path(folder)
