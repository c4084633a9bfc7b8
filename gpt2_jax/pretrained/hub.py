"""Where a checkpoint lives: the demo in the package, a folder, the hub.

Knows the names of files, and nothing of what they hold.
"""

import contextlib
import errno
import fnmatch
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpt2_jax import tokenizer_files
from gpt2_jax.files import CheckpointError, kind_of, local_path
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

NOT_REACHED = "the hub could not be reached"
TIMEOUT = 10  # seconds for its first answer, as long as its own functions wait for the others
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)

# What goes with the weights when a model is copied. Generation's defaults count among them.
TOKENIZER_FILES = (*tokenizer_files.FILES, "generation_config.json")


class Source(NamedTuple):
    """A model on the hub, and how it may be fetched."""

    repo: str  # "owner/name"
    revision: str | None  # branch, tag or commit; `None` is the main branch
    cache_dir: str | Path | None  # where downloads are kept; `None` is the hub's own cache
    local_files_only: bool  # never touch the network
    with_weights: bool  # or a tokenizer alone


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    with_weights: bool = True,
) -> Path:
    """Returns the local folder of "demo" or a hub id, downloaded unless cached, or a path itself.

    A folder or file that exists wins over a hub id of the same name.

    Args:
      name_or_path: "demo", a folder or file, or a hub id. A `Path` is never taken for a hub id.
      revision: branch, tag or commit on the hub.
      cache_dir: where downloads are kept; by default the hub's own cache.
      local_files_only: never touch the network.
      with_weights: whether to download them, too, or a tokenizer alone.

    Raises:
      CheckpointError: there is no such folder or hub model.
      ConnectionError: the hub could not be reached and nothing is cached.

    Examples:
      >>> (gpt2_jax.resolve("demo") / "config.json").is_file()
      True
    """
    name = str(name_or_path)
    path = local_path(name_or_path)
    if name == "demo":
        return DEMO
    if name and path.exists():  # "" would be the current folder
        kind = kind_of(path.resolve())
        if kind is not None:
            expected = "a folder or a file of weights, or a hub id"
            raise CheckpointError(f"Expected {expected}, got {kind} {path}.")
        return path
    if isinstance(name_or_path, Path) or not HUB_ID.fullmatch(name):
        expected = 'a folder, a hub id such as "gpt2", a file of weights, or "demo"'
        raise CheckpointError(f"There is no folder {path}. Expected {expected}.")
    repo = HUB_IDS.get(name, name)
    return _download(Source(repo, revision, cache_dir, local_files_only, with_weights))


def _download(source: Source) -> Path:
    """Returns the folder of a model on the hub, or of the one in its cache.

    The cache serves whenever the network fails, in whatever way. A refusal of the hub's is none.

    Raises:
      CheckpointError: the hub refuses the model, or has none of that name.
      ConnectionError: the hub cannot be reached, and the cache has not the whole model.
      OSError: the disk is full, or cannot be written, and the cache has not the whole model.
    """
    try:
        if not source.local_files_only:
            return _fetch(source)
        reason = NOT_REACHED
        cause = None
    except Exception as error:  # among them those of the hub's HTTP client, which has changed once
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            there = _cached(source)  # in a cache of everyone's, say, that cannot be written
            if there is None:
                raise
            return there
        refusal = _refusal(error, source)
        if refusal is not None:
            raise CheckpointError(f'There is no folder "{source.repo}", and {refusal}.') from error
        reason = _failure(error)
        cause = error
    cached = _cached(source)
    if cached is not None:
        return cached
    raise ConnectionError(
        f'There is no folder "{source.repo}", {reason}, and this model is not in its cache. '
        'Give a folder, or "demo", which comes with the package and needs no network.'
    ) from cause


def _fetch(source: Source) -> Path:
    """Returns the folder of a model on the hub, of which what is needed is downloaded."""
    from huggingface_hub import HfApi, snapshot_download  # a second to import, and seldom needed

    # What there is comes first: of several forms of the weights, one is needed.
    info = HfApi().model_info(source.repo, revision=source.revision, timeout=TIMEOUT)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    folder = snapshot_download(
        source.repo,
        allow_patterns=needed_files(names, with_weights=source.with_weights),
        revision=source.revision,
        cache_dir=source.cache_dir,
    )
    return Path(folder)


def needed_files(names: Sequence[str], *, with_weights: bool = True) -> list[str]:
    """Returns the files of a repository that a model needs: config, tokenizer, weights.

    Many hold the same weights for TensorFlow, ONNX and Rust as well, in other precisions, or whole
    and in shards: they are needed once.
    """
    needed = []
    # Other kinds' vocabularies are small, and without them such a model would look like GPT-2.
    for pattern in ("config.json", *TOKENIZER_FILES, *tokenizer_files.OTHER_KINDS):
        needed += fnmatch.filter(names, pattern)
    if with_weights:
        needed += _needed_weights(names)
    return needed


def _needed_weights(names: Sequence[str]) -> list[str]:
    """Returns the files of the weights that `open_folder` would read."""
    for whole in WEIGHT_FILES:
        if whole in names:
            return [whole]
        index = f"{whole}.index.json"
        if index in names:
            stem, ending = whole.split(".")
            shard = re.compile(rf"{stem}-\d+-of-\d+\.{ending}")
            return [index, *filter(shard.fullmatch, names)]
    return []


def _cached(source: Source) -> Path | None:
    """Returns the folder of a model in the hub's cache, if all of it is there."""
    from huggingface_hub import constants

    # https://huggingface.co/docs/huggingface_hub/guides/manage-cache has this layout.
    cache = Path(source.cache_dir or constants.HF_HUB_CACHE)
    home = cache / f"models--{source.repo.replace('/', '--')}"
    revision = source.revision or "main"
    reference = home / "refs" / revision
    # The cache keeps references of branches and tags; of a commit there is none.
    commit = reference.read_text().strip() if reference.is_file() else revision
    folders = [home / "snapshots" / commit]
    if source.revision is None:
        # The one before, where the download of an update was broken off.
        others = (home / "snapshots").glob("*")
        folders += sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in folders:
        if folder.is_dir() and _is_whole(folder, source.with_weights):
            return folder
    return None


def _is_whole(folder: Path, with_weights: bool) -> bool:
    """Returns whether no download of a folder was broken off, as far as its files tell."""
    names = [file.name for file in folder.iterdir() if file.exists()]  # links, some to nowhere
    weight_files = _needed_weights(names)
    if not with_weights:
        return bool(names)
    if not weight_files or weight_files[0] in WEIGHT_FILES:
        return bool(weight_files)
    # An index may be there without its shards: how many belong to it, their own names tell.
    counts = [int(name.rpartition("-of-")[2].split(".")[0]) for name in weight_files[1:]]
    return bool(counts) and len(counts) == max(counts)


def _refusal(error: Exception, source: Source) -> str | None:
    """Returns what the hub means by refusing a model, or `None` where the network has failed."""
    from huggingface_hub import errors

    login = "log in with `hf auth login`"
    status = _status(error)
    if isinstance(error, errors.HFValidationError):
        return f"the hub has no models of such names: {str(error).splitlines()[0].rstrip('.')}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f'the hub has no revision "{source.revision}" of this model (404)'
    # Before the last test: to the hub's library, a gated model is one that was not found.
    if isinstance(error, errors.GatedRepoError) or status == 403:
        page = f"https://huggingface.co/{source.repo}"
        return f"the hub wants you to ask for this model first ({status}): at {page}, then {login}"
    # The hub's answer for a name that nobody has, too, so that private ones stay private.
    if status == 401:
        return f"the hub has no such model, or a private one (401): check the name, or {login}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return "the hub has no such model (404): check the name"
    return None


def _failure(error: Exception) -> str:
    """Returns what has failed between here and the hub."""
    status = _status(error)
    if status == 429:
        return "the hub has had too many requests from here (429: wait, or log in)"
    if status is not None and status >= 500:
        return f"the hub is out of order ({status}: try again later)"
    if status is not None and status >= 400:
        return f"the hub answered with an error ({status})"
    names = " ".join(type(each).__name__ for each in _chain(error))
    if "Timeout" in names:
        return "the hub did not answer in time"
    if "consistency check" in str(error).lower():
        return "the download was not what the hub had announced (try again)"
    # No JSON, or no such headers: a page that a network shows in place of any other.
    if isinstance(error, ValueError) or "FileMetadataError" in names:
        return "something else than the hub answered, such as a network's login page"
    return f"{NOT_REACHED} ({type(error).__name__})"


def _status(error: Exception) -> int | None:
    """Returns the HTTP status that an error is about."""
    for each in _chain(error):
        status = getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that it came from: the hub's hide those of its HTTP client."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def naming_download(folder: Path) -> Iterator[None]:
    """Lets errors about a downloaded file say how to have it downloaded again.

    Raises:
      CheckpointError: as in the body.
    """
    try:
        yield
    except CheckpointError as error:
        if folder.parent.name != "snapshots":  # as the hub's cache calls it
            raise
        for file in folder.iterdir():
            # The links in a snapshot lead to what was downloaded.
            if str(file) in str(error) and file.is_symlink():
                advice = f"It was downloaded: delete {file.resolve()} to have it downloaded anew."
                raise CheckpointError(f"{error} {advice}") from error
        raise
