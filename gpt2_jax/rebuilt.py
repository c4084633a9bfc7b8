"""Notices functions that are made anew for each call, and so compile anew each time.

`jax.jit` knows a function by identity: two lambdas of the same text, or two optimizers made by the
same line, are two programs.
"""

import warnings
from types import CodeType
from typing import Any

PATIENCE = 8  # so many new ones in a row are no accident


class Watch:
    """Looks at one argument from call to call, and warns once."""

    def __init__(self, advice: str):
        self.advice = advice
        self.last: Any = None
        self.n_new = 0  # in a row
        self.has_warned = False

    def see(self, function: Any) -> None:
        """Takes the argument of another call; warns where it was another object each time."""
        # Of the same source: different functions in turn are what they seem.
        is_new = function is not self.last and _code(function) == _code(self.last)
        self.n_new = self.n_new + 1 if is_new else 0
        # Held, not remembered by its id: what is freed leaves its id to the next.
        self.last = function
        if self.n_new >= PATIENCE and not self.has_warned:
            self.has_warned = True
            warnings.warn(self.advice, stacklevel=4)


def _code(function: Any) -> CodeType | None:
    """Returns the code of a function, or of an optimizer's `update`."""
    return getattr(getattr(function, "update", function), "__code__", None)
