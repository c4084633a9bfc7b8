"""Activations over a whole corpus, batch by batch: what probes and sparse autoencoders train on.

Knows arrays of ids, and no files: `np.memmap` makes one of a file of tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from gpt2_jax.config import GPT2Config
from gpt2_jax.inputs import check_ids
from gpt2_jax.interpretability.edits import AnyArray, Edit
from gpt2_jax.interpretability.sites import find_sites
from gpt2_jax.interpretability.taps import Acts, Recorder, make_tap
from gpt2_jax.model import Params, apply
from gpt2_jax.rebuilt import TapArgument, tap_argument


class Captured(NamedTuple):
    """The activations of a batch of windows.

    Examples:
      >>> gpt2_jax.Captured._fields
      ('ids', 'acts')
    """

    ids: Int[np.ndarray, "B T"]
    acts: Acts  # by their sites


def capture_stream(
    params: Params,
    corpus: Int[AnyArray, " _"],
    *,
    config: GPT2Config,
    sites: str | Sequence[str],
    length: int | None = None,
    batch_size: int = 8,
    edits: Mapping[str, Edit] | None = None,
) -> Iterator[Captured]:
    """Yields the activations of a long text, window by window, in its order.

    Compiles itself, once for all batches, and for all later calls of the same shapes and sites.
    One batch is in memory at a time, beside those that the caller keeps.

    Args:
      params: the parameters.
      corpus: token ids of any integer dtype, such as `np.memmap("train.bin", np.uint16, "r")`, of
        which a batch is read as it is needed. Behind the last whole window nothing is read.
      config: the model's configuration.
      sites: see `find_sites`.
      length: tokens to a window, `T`; `n_positions` by default. No window sees another.
      batch_size: windows to a batch, `B`; the last batch may have fewer.
      edits: see `capture`.

    Raises:
      ValueError: `corpus` is no array of integers of one axis or holds less than a window, or a
        site does not exist, or `length` is not in 1 to `n_positions`, or `batch_size` is less than
        1; or, when its batch comes, an id is outside the vocabulary.

    Examples:
      >>> corpus = np.arange(64, dtype=np.uint16)
      >>> batches = gpt2_jax.capture_stream(
      ...     params, corpus, config=config, sites="h.1.mlp.post", length=16, batch_size=2
      ... )
      >>> [batch.acts["h.1.mlp.post"].shape for batch in batches]
      [(2, 16, 64), (2, 16, 64)]
    """
    length = config.n_positions if length is None else length
    if not 1 <= length <= config.n_positions:
        expected = f"1 to {config.n_positions} (`n_positions`)"
        raise ValueError(f"`length` must be {expected}, got {length}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if np.ndim(corpus) != 1 or not np.issubdtype(corpus.dtype, np.integer):
        got = f"{corpus.dtype} of shape {list(corpus.shape)}"
        raise ValueError(f"`corpus` must be integers of shape [N], got {got}.")
    if len(corpus) < length:
        raise ValueError(f"`corpus` must hold a window of {length} ids, got {len(corpus)}.")
    names = find_sites(sites, config)
    argument = tap_argument(make_tap(edits or {}, config=config))
    run = partial(_capture, params, argument=argument, config=config, sites=names)
    # A function of its own: what is wrong is said at the call, not at the first batch.
    return _batches(run, corpus, config, length, batch_size)


def _batches(
    run: partial, corpus: Int[AnyArray, " _"], config: GPT2Config, length: int, batch_size: int
) -> Iterator[Captured]:
    per_batch = length * batch_size
    end = len(corpus) - len(corpus) % length
    for start in range(0, end, per_batch):
        part = np.asarray(corpus[start : min(start + per_batch, end)])
        windows = part.astype(np.int32).reshape(-1, length)
        check_ids(windows, config)
        # The last batch is filled up, so that it needs no program of its own.
        filled = np.zeros((batch_size, length), np.int32)
        filled[: len(windows)] = windows
        acts = run(filled)
        if len(windows) < batch_size:
            acts = {site: x[: len(windows)] for site, x in acts.items()}
        yield Captured(windows, acts)


# Its logits are left out of the program's results, and what no site asks for is not computed.
@partial(jax.jit, static_argnames="sites")
def _capture(
    params: Params,
    ids: Int[Array, "B T"],
    argument: TapArgument,
    *,
    config: GPT2Config,
    sites: tuple[str, ...],
) -> Acts:
    recorder = Recorder(sites, argument.tap)
    apply(params, ids, config=config, tap=recorder)
    return recorder.acts
