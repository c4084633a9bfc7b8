"""Ranges of numbers, and how a message calls them. Knows no option and no array library."""

import math
from typing import Any, NamedTuple

MOST = 2**31 - 1  # that JAX's int32 holds


class Range(NamedTuple):
    """The numbers from `low` to `high`, each bound included unless it is open.

    NaN and infinity are in none.
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def contains(self, values: Any) -> Any:
        """Returns whether a number, or each number of an array, is in the range."""
        # By comparisons alone, so that arrays of any library will do; NaN fails each of them.
        finite = (values > -math.inf) & (values < math.inf)
        above = values > self.low if self.low_open else values >= self.low
        below = values < self.high if self.high_open else values <= self.high
        return finite & above & below

    def __str__(self) -> str:
        """Returns what follows "must be": "in [0, 1)", "at least 1", "greater than 0", "finite"."""
        if self.low == -math.inf and self.high == math.inf:
            return "finite"
        if self.high in (math.inf, MOST):
            return f"{'greater than' if self.low_open else 'at least'} {self.low}"
        opening = "(" if self.low_open else "["
        closing = ")" if self.high_open else "]"
        return f"in {opening}{self.low}, {self.high}{closing}"

    def asked(self, value: Any) -> str:
        """Returns what follows "must be" where a value is not in the range."""
        # A bound that nobody comes near is named to those who did.
        return f"at most {MOST}" if self.high == MOST and value > MOST else str(self)


FINITE = Range()
POSITIVE = Range(low=0, low_open=True)
COUNT = Range(low=1, high=MOST)
COUNT_OR_0 = Range(low=0, high=MOST)
FRACTION = Range(low=0, high=1)  # a share, or a probability
INNER_FRACTION = Range(low=0, high=1, low_open=True, high_open=True)
POSITIVE_FRACTION = Range(low=0, high=1, low_open=True)
FRACTION_BELOW_1 = Range(low=0, high=1, high_open=True)
