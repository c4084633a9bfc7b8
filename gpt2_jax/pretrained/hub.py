"""Where a checkpoint lives: the demo in the package, a folder, the hub. Knows nothing of what its files hold."""

import re
from pathlib import Path
from typing import Any

from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained.formats import SAFETENSORS, TORCH

DEMO = Path(__file__).parents[1] / "assets" / "demo"
HUB_IDS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES += ("special_tokens_map.json", "added_tokens.json", "generation_config.json")


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
        raise CheckpointError(
            f'There is no folder {path}. Expected a folder, a hub id such as "gpt2", or "demo".'
        )
    options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    return _download(HUB_IDS.get(name, name), options)


def _download(repo: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import errors, snapshot_download

    def fetch(name: str) -> Path:
        stem, ending = name.split(".")
        patterns = [
            "config.json",
            *TOKENIZER_FILES,
            name,
            f"{stem}-*.{ending}",
            f"{name}.index.json",
        ]
        return Path(snapshot_download(repo, allow_patterns=patterns, **options))

    try:
        folder = fetch(SAFETENSORS)
        if not any(folder.glob("model*.safetensors")):
            folder = fetch(TORCH)
        return folder
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f'There is no folder "{repo}", and the hub refused this model: {reason}'
        ) from error
    except Exception as error:  # among them those of the hub's HTTP client
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's: full, not writable
        raise ConnectionError(
            f'There is no folder "{repo}", the hub could not be reached, and this model is not in its cache. '
            f'Give a folder, or "demo", which comes with the package and needs no network. ({type(error).__name__})'
        ) from error
