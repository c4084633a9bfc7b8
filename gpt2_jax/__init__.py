"""GPT-2 in JAX: pure functions over an explicit params pytree.

The public names are those of `__init__.pyi`, which type checkers and editors read as well. A name's
module is imported when the name is first asked for: whoever continues a text does not wait for what
trains models, and a tokenizer is there without JAX.
"""

import sys

from gpt2_jax import lazy

__version__ = "0.2.0"

_HOMES = lazy.homes_in(__name__)

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__ = lazy.names_of(sys.modules[__name__], _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
