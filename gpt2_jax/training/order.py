"""A random order that is computed, not kept: of a billion windows as of ten. Knows numbers alone.

grain's `index_shuffle` does the same, but grain brings eight packages, one of them not for Windows,
and has it among what is experimental; the idea takes twenty lines.
"""

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 8  # four make a Feistel network a random permutation of large numbers; ours may be small
NAME = "feistel-8"  # what a run remembers: another order is another run


def permuted(
    indices: Int64[np.ndarray, " B"], *, count: int, keys: UInt64[np.ndarray, " R"]
) -> Int64[np.ndarray, " B"]:
    """Returns where a random permutation of `range(count)` has some indices.

    A Feistel network permutes the numbers of an even number of bits, the fewest that hold `count`;
    what comes out beyond `count` goes in again until it does not, which makes a permutation of
    those below (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
      indices: numbers in `[0, count)`.
      count: how many numbers are permuted.
      keys: of the rounds; they choose the permutation.
    """
    n_bits = (count - 1).bit_length()
    half_bits = np.uint64((n_bits + 1) // 2)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), bool)
    # Four times at most in the mean, as two bits more than needed are the most there are.
    while outside.any():
        values[outside] = _network(values[outside], half_bits, keys)
        outside = values >= count
    return values.astype(np.int64)


def _network(
    values: UInt64[np.ndarray, " B"], half_bits: np.uint64, keys: UInt64[np.ndarray, " R"]
) -> UInt64[np.ndarray, " B"]:
    """Returns a permutation of the numbers of twice `half_bits`."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left = values >> half_bits
    right = values & mask
    for key in keys:
        # Whatever is mixed in, it can be taken away again: `right` is still there.
        mixed = _mix(right + key) & mask
        mixed = left ^ mixed
        left = right
        right = mixed
    return (left << half_bits) | right


def _mix(values: UInt64[np.ndarray, " B"]) -> UInt64[np.ndarray, " B"]:
    """Returns values of which each bit depends on each: the end of SplitMix64 (Steele, 2014)."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
