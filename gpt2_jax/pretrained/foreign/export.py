"""Checkpoints for other tools: which format is written, told by the ending of a file's name."""

from collections.abc import Callable
from pathlib import Path

from gpt2_jax.config import GPT2Config
from gpt2_jax.modules import Params
from gpt2_jax.pretrained import weights
from gpt2_jax.pretrained.foreign import flax_msgpack, gguf_file, torch_file
from gpt2_jax.tokenizer import Tokenizer

GGUF = ".gguf"
FLAX = ".msgpack"
NANOGPT = (".pt", ".pth")
# By endings, unlike in reading: there is no content yet to tell a format by.
ENDINGS = (GGUF, FLAX, *NANOGPT)


def is_written(path: str | Path) -> bool:
    """Returns whether a path ends as a file of another tool's does."""
    return str(path).endswith(ENDINGS)


def write(
    file: Path, params: Params, config: GPT2Config, tokenizer: Callable[[], Tokenizer]
) -> None:
    """Writes params to one file in another tool's format: Flax's, GGUF, nanoGPT's.

    Args:
      file: where to; its ending says which format.
      params: the parameters.
      config: their config.
      tokenizer: returns the model's, which only GGUF holds.

    Raises:
      CheckpointError: the format cannot hold this model, or what writes it is not installed.
    """
    if file.suffix in NANOGPT:
        # The state as it is: nanoGPT's models may lack biases too, and need no zeros for them.
        torch_file.write(file, weights.to_hf(params), config)
    elif file.suffix == FLAX:
        flax_msgpack.write(file, weights.whole_state(params, config))
    else:
        state = weights.whole_state(params, config)
        # Loaded only here, as a model that is written in another format need not have one.
        gguf_file.write(file, state, config, tokenizer())
