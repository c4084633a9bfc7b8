"""Notices functions that are made anew for each call, and so compile anew each time.

`jax.jit` knows a function by identity: two lambdas of the same text, or two optimizers made by the
same line, are two programs. So a tap, which may be one, becomes an argument of programs here.
"""

import warnings
from types import CodeType
from typing import Any

import jax
from jaxtyping import Array, Int

from gpt2_jax.modules import Tap, no_tap, placed, repeated, wants
from gpt2_jax.pytrees import classes_of, dataclass, static

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


# Taps as arguments of compiled programs.

_TAPS = Watch(
    "`tap` is a new function at each call, and each compiles its own programs: define it once, or"
    " use `make_tap`, whose arrays may change without compiling."
)


@dataclass
class TapArgument:
    """A tap as a compiled program takes it: other arrays in it compile nothing."""

    pytree: Any  # None, or a pytree that is called as a tap
    classes: tuple[Any, ...] = static()  # of its nodes: flax's are taken for each other

    @property
    def tap(self) -> Tap:
        """The tap."""
        return no_tap if self.pytree is None else self.pytree


@dataclass
class PlainTap:
    """A function, or an object of a class that JAX does not know, as a pytree without leaves."""

    function: Any = static()  # equal to itself alone

    def __call__(self, site: str, x: Array) -> Array:
        return self.function(site, x)

    # What it knows beside is passed on: without `wants` it would seem to want every site.

    def wants(self, site: str) -> bool:
        """Returns whether the function wants a site."""
        return wants(self.function, site)

    def placed(self, positions: Int[Array, "#B T"]) -> Tap:
        """Returns the function's tap of a pass over tokens at these positions."""
        return placed(self.function, positions)

    def repeated(self, n: int) -> "PlainTap":
        """Returns the function's tap of a batch with each row `n` times."""
        return PlainTap(repeated(self.function, n))


def tap_argument(tap: Tap | None) -> TapArgument:
    """Returns a tap, or none, as an argument of a compiled program: see `as_pytree`."""
    tree = None if tap is no_tap else as_pytree(tap)
    return TapArgument(tree, classes_of(tree))


def as_pytree(tap: Tap | None) -> Any:
    """Returns the tap as a pytree, None as it is.

    A plain function becomes one without leaves, a `PlainTap`: it compiles once for each object.

    Raises:
      ValueError: it cannot be called.
    """
    if tap is None:
        return None
    if not callable(tap):
        kind = type(tap).__name__
        raise ValueError(f"`tap` must be callable, such as `make_tap` returns, got {kind}.")
    # A function is its own only leaf, and no array; a tap that is a pytree has arrays, or none.
    if not jax.tree_util.all_leaves([tap]):
        return tap
    _TAPS.see(tap)
    return PlainTap(tap)
