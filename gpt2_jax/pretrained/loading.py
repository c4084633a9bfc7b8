"""One door to what belongs together: a model's config, params and tokenizer."""

from pathlib import Path

from gpt2_jax.config import PRESETS
from gpt2_jax.pretrained.hub import resolve
from gpt2_jax.tokenizer import Tokenizer


def load_tokenizer(folder: str | Path, name: str | None = None) -> Tokenizer:
    """Returns the tokenizer that was asked for by `name`: a folder, a hub id or a size of GPT-2, which share one.

    Without a name it is the checkpoint's own, or GPT-2's where the folder holds none.

    Raises:
      FileNotFoundError: what was named has no tokenizer.
      ValueError: a file of it is damaged.
    """
    if name in PRESETS and not Path(name).is_dir():
        return Tokenizer.gpt2()
    if name is not None:
        return Tokenizer.load(resolve(name))
    try:
        return Tokenizer.load(folder)
    except FileNotFoundError:
        return Tokenizer.gpt2()
