"""What a library raises over a damaged file, as one error that names the file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gpt2_jax.files import CheckpointError


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turns what reading a damaged file raises in the body into a `CheckpointError`.

    Raises:
      CheckpointError: the body raised something, other than the disk's or the system's errors.
    """
    try:
        yield
    # It says already which file it is, and what is wrong with it.
    except CheckpointError:
        raise
    # Any: zip's, h5's, GGUF's and numpy's readers raise what the damage makes of them.
    except Exception as error:
        # With a number it is the system's own; h5py raises some of damaged files, without one.
        if isinstance(error, OSError) and error.errno:
            raise
        got = f"got one that is damaged: {type(error).__name__}, {error}"
        raise CheckpointError(f"{file}: expected a whole file of its kind, {got}.") from error
