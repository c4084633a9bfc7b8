"""What there is to see in one text: a lens, attention patterns, a patching sweep, as numpy arrays ready to be drawn.

Knows ids and sites, no tokenizer, no files and no pictures: callers turn ids into words and arrays into figures.
Unlike the rest of this folder these functions compile what they run, and take one text at a time, `int[1, T]`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from gpt2_jax.config import GPT2Config
from gpt2_jax.interpretability.reading import patch_each, stream_logits
from gpt2_jax.interpretability.taps import axis_masks, capture, find_sites, site_axes
from gpt2_jax.model import Params, apply

Progress = Callable[[Iterable[Array]], Iterable[Array]]  # such as `tqdm`


class LensView(NamedTuple):
    """The likeliest next token by each of `N` streams, after each of `T` tokens."""

    sites: tuple[str, ...]  # of the streams, in the order of the forward pass
    best: Int[np.ndarray, "N T"]  # token ids
    probabilities: Float[np.ndarray, "N T"]  # theirs


class PatternsView(NamedTuple):
    """How much each token attends to each, by the heads of some layers."""

    sites: tuple[str, ...]  # in the order of the forward pass
    patterns: Float[np.ndarray, "N H T T"]  # rows attend to columns and sum to 1


class Contrast(NamedTuple):
    """Two next tokens, and the logit of the first less that of the second, after a text and after its donor."""

    answers: tuple[int, int]  # token ids: the donor's, and the text's
    unpatched: float
    donor: float


class SweepPlan(NamedTuple):
    """Where a patching sweep patches, besides every layer."""

    site: str = "resid_pre"  # a site's name within its layer
    over: str = "T"  # the axes to go over: see `axis_masks`
    batch_size: int = 8  # indices along these axes in one pass, which bounds the memory


class PatchingView(NamedTuple):
    """What patching a donor's activations into a text does to a contrast, in each layer at each index."""

    values: Float[np.ndarray, "L N"]  # the difference of the two logits
    changes: Float[np.ndarray, "L N"]  # by how much it exceeds the unpatched one


def view_lens(
    params: Params, ids: Int[ArrayLike, "1 T"], *, config: GPT2Config, sites: str | Sequence[str]
) -> LensView:
    """Returns what the streams at some sites say comes next: see `logit_lens`. Compiles itself.

    Raises:
      ValueError: as `capture`, or a site is not of the model's width.
    """
    names = find_sites(sites, config)
    _check_axes(names, ("B", "T", "D"), config)

    @jax.jit
    def read(params: Params, ids: Array) -> tuple[Array, Array]:
        _, acts = capture(params, ids, config=config, sites=names)
        best = []
        probabilities = []
        for name in names:
            logits = stream_logits(params, acts[name][0], config=config)
            by_token = jax.nn.softmax(logits)  # [T, V]
            best.append(by_token.argmax(axis=-1))
            probabilities.append(by_token.max(axis=-1))
        return jnp.stack(best), jnp.stack(probabilities)

    best, probabilities = jax.device_get(read(params, ids))
    return LensView(names, best, probabilities)


def view_patterns(
    params: Params, ids: Int[ArrayLike, "1 T"], *, config: GPT2Config, sites: str | Sequence[str]
) -> PatternsView:
    """Returns what the heads at some sites, such as "h.2.attn.pattern", attend to. Compiles itself.

    Raises:
      ValueError: as `capture`, or a site is not one of attention.
    """
    names = find_sites(sites, config)
    _check_axes(names, ("B", "H", "T", "S"), config)

    @jax.jit
    def read(params: Params, ids: Array) -> Array:
        _, acts = capture(params, ids, config=config, sites=names)
        return jnp.stack([acts[name][0] for name in names])

    return PatternsView(names, jax.device_get(read(params, ids)))


def contrast(
    params: Params,
    ids: Int[ArrayLike, "1 T"],
    donor_ids: Int[ArrayLike, "1 T"],
    answers: tuple[int, int] | None = None,
    *,
    config: GPT2Config,
) -> Contrast:
    """Returns two answers and the difference of their logits after a text and after its donor. Compiles itself.

    Without `answers` they are what the model predicts after the donor, and after the text; these may be the same.
    """
    run = jax.jit(apply)
    of_text = np.asarray(run(params, ids, config=config)[0, -1])  # [V]
    of_donor = np.asarray(run(params, donor_ids, config=config)[0, -1])
    if answers is None:
        answers = (int(of_donor.argmax()), int(of_text.argmax()))
    return Contrast(
        answers=answers,
        unpatched=float(_difference(of_text, answers)),
        donor=float(_difference(of_donor, answers)),
    )


def view_patching(
    params: Params,
    ids: Int[ArrayLike, "1 T"],
    donor_ids: Int[ArrayLike, "1 T"],
    contrasted: Contrast,
    *,
    config: GPT2Config,
    plan: SweepPlan,
    progress: Progress = iter,
) -> PatchingView:
    """Patches a donor's activations into a text, one index at a time, and returns what it does to a contrast.

    Compiles itself: one program for all batches of indices, and one more for a smaller last batch.

    Args:
      params, config: as for `apply`.
      ids, donor_ids: two texts of as many tokens.
      contrasted: what is measured: see `contrast`.
      plan: where to patch.
      progress: wraps the batches on their way, to show how far the sweep is.

    Raises:
      ValueError: as `patching_sweep`, or the texts differ in length.
    """
    n_tokens = np.shape(ids)[1]
    n_donated = np.shape(donor_ids)[1]
    if n_tokens != n_donated:
        raise ValueError(f"`donor_ids` must have the {n_tokens} tokens of `ids`, got {n_donated}.")
    if plan.batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {plan.batch_size}.")
    masks = axis_masks(f"h.0.{plan.site}", plan.over, n_tokens, config=config)  # [N, ...]
    donor_sites = find_sites(f"h.*.{plan.site}", config)

    @jax.jit
    def read_donor(params: Params, ids: Array) -> dict[str, Array]:
        return capture(params, ids, config=config, sites=donor_sites)[1]

    def metric(logits: Float[Array, "1 V"]) -> Float[Array, ""]:
        return _difference(logits[0], contrasted.answers)

    @jax.jit
    def sweep(params: Params, ids: Array, donors: dict[str, Array], masks: Array) -> Array:
        return patch_each(params, ids, donors, masks, metric, config=config, site=plan.site)

    donors = read_donor(params, donor_ids)
    starts = range(0, len(masks), plan.batch_size)
    batches = [masks[start : start + plan.batch_size] for start in starts]
    measured = [np.asarray(sweep(params, ids, donors, batch)) for batch in progress(batches)]
    values = np.concatenate(measured, axis=1)  # [L, N]
    return PatchingView(values, values - contrasted.unpatched)


def sweep_labels(over: str, tokens: Sequence[str], *, n_heads: int, count: int) -> list[str]:
    """Returns the names of the `count` indices that a sweep goes over, given the text's tokens."""
    heads = [f"head {head}" for head in range(n_heads)]
    if over == "T":
        return list(tokens)
    if over == "H":
        return heads
    if over == "TH":
        return [f"{token} {head}" for token in tokens for head in heads]
    if over == "":
        return ["all"]
    return [str(index) for index in range(count)]


def _difference(logits: Array, answers: tuple[int, int]) -> Array:
    return logits[answers[0]] - logits[answers[1]]


def _check_axes(sites: Sequence[str], expected: tuple[str, ...], config: GPT2Config) -> None:
    for site in sites:
        axes = site_axes(site, config)
        if axes != expected:
            wanted = " ".join(expected)
            raise ValueError(f"`sites` must have axes {wanted}, got {' '.join(axes)} at {site}.")
