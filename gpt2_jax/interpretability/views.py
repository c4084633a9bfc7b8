"""What there is to see in one text: probabilities, a lens, attention patterns, a patching sweep.

Knows ids and sites, no tokenizer, no files and no pictures: callers turn ids into words, and the
numpy arrays that come back into figures. Unlike the rest of this folder, but for `capture_stream`,
these functions compile what they run, and take one text at a time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from gpt2_jax.config import GPT2Config, as_count
from gpt2_jax.interpretability.edits import Edit
from gpt2_jax.interpretability.patching import patch_each
from gpt2_jax.interpretability.reading import stream_logits
from gpt2_jax.interpretability.sites import axis_masks, find_sites, site_axes
from gpt2_jax.interpretability.taps import Acts, Edits, capture, make_tap
from gpt2_jax.model import Params, apply

# Wraps batches of masks on their way, such as `tqdm`, to show how far a sweep is.
Progress = Callable[[Iterable[Array]], Iterable[Array]]


# Reading.


class LensView(NamedTuple):
    """The likeliest next token by each of N streams, after each of T tokens."""

    sites: tuple[str, ...]  # of the streams, in the order of the forward pass
    best: Int[np.ndarray, "N T"]  # token ids
    probabilities: Float[np.ndarray, "N T"]  # theirs


class PatternsView(NamedTuple):
    """How much each token attends to each, by the heads of N layers."""

    sites: tuple[str, ...]  # in the order of the forward pass
    patterns: Float[np.ndarray, "N H T T"]  # rows attend to columns


class TextView(NamedTuple):
    """What was expected in a text's places, and what the heads of N layers attend to."""

    probabilities: Float[np.ndarray, " T-1"]  # of each token but the first, after those before it
    best: Int[np.ndarray, "T C"]  # ids of the likeliest next tokens after each, likeliest first
    best_probabilities: Float[np.ndarray, "T C"]  # theirs
    sites: tuple[str, ...]  # of the patterns, in the order of the forward pass
    patterns: Float[np.ndarray, "N H T T"]  # rows attend to columns


def view_lens(
    params: Params,
    ids: Int[ArrayLike, "1 T"],
    *,
    config: GPT2Config,
    sites: str | Sequence[str],
    edits: Mapping[str, Edit] | None = None,
) -> LensView:
    """Returns what the streams at some sites say comes next: see `logit_lens`. Compiles itself.

    With `edits` the model is edited, as in `capture`.

    Raises:
      ValueError: as `capture`, or a site is not of the model's width.
    """
    names = find_sites(sites, config)
    _check_axes(names, "B T D", config)

    @jax.jit
    def read(params: Params, ids: Int[ArrayLike, "1 T"], edited: Edits) -> tuple[Array, Array]:
        _, acts = capture(params, ids, config=config, sites=names, edits=edited.by_site)
        best = []
        highest = []
        # Stream by stream: the logits of all at once would be N * T * V numbers.
        for name in names:
            stream = acts[name][0]  # [T, D]
            logits = stream_logits(params, stream, config=config)
            probabilities = jax.nn.softmax(logits)
            best.append(probabilities.argmax(axis=-1))
            highest.append(probabilities.max(axis=-1))
        return jnp.stack(best), jnp.stack(highest)

    edited = make_tap(edits or {}, config=config)
    best, highest = jax.device_get(read(params, ids, edited))
    return LensView(sites=names, best=best, probabilities=highest)


def view_patterns(
    params: Params,
    ids: Int[ArrayLike, "1 T"],
    *,
    config: GPT2Config,
    sites: str | Sequence[str],
    edits: Mapping[str, Edit] | None = None,
) -> PatternsView:
    """Returns what the heads at some sites, as "h.2.attn.pattern", attend to. Compiles itself.

    With `edits` the model is edited, as in `capture`.

    Raises:
      ValueError: as `capture`, or a site is not one of each query and key.
    """
    names = find_sites(sites, config)
    _check_axes(names, "B H T S", config)
    edited = make_tap(edits or {}, config=config)
    acts = _capture_compiled(params, ids, edited, config, names)
    patterns = [np.asarray(acts[name][0]) for name in names]
    return PatternsView(sites=names, patterns=np.stack(patterns))


def view_text(
    params: Params,
    ids: Int[ArrayLike, "1 T"],
    *,
    config: GPT2Config,
    sites: str | Sequence[str] = "h.*.attn.pattern",
    count: int = 5,
    edits: Mapping[str, Edit] | None = None,
) -> TextView:
    """Returns how likely a text's tokens are, what else was, and attention. Compiles itself.

    Args:
      params, ids, config: as for `apply`, of one text.
      sites: of the patterns; `()` for none.
      count: `C`, how many of the likeliest tokens to tell; all, if the vocabulary is smaller.
      edits: the model is edited, as in `capture`.

    Raises:
      ValueError: as `capture`, or a site is not one of each query and key, or `count` is less
        than 1.
    """
    count = min(as_count("count", count), config.vocab_size)
    names = find_sites(sites, config)
    _check_axes(names, "B H T S", config)

    # One pass for both: a pattern costs little beside the logits.
    @jax.jit
    def read(
        params: Params, ids: Int[ArrayLike, "1 T"], edited: Edits
    ) -> tuple[Array, Array, Array, Acts]:
        logits, acts = capture(params, ids, config=config, sites=names, edits=edited.by_site)
        probabilities = jax.nn.softmax(logits[0])  # [T, V]
        next_ids = jnp.asarray(ids)[0, 1:]
        of_text = jnp.take_along_axis(probabilities[:-1], next_ids[:, None], axis=1)[:, 0]
        best_probabilities, best = jax.lax.top_k(probabilities, count)
        return of_text, best, best_probabilities, acts

    edited = make_tap(edits or {}, config=config)
    of_text, best, best_probabilities, acts = jax.device_get(read(params, ids, edited))
    n_tokens = np.shape(ids)[1]
    patterns = np.zeros((len(names), config.n_head, n_tokens, n_tokens), np.float32)
    for index, name in enumerate(names):
        patterns[index] = acts[name][0]
    return TextView(of_text, best, best_probabilities, names, patterns)


# Patching.


class Contrast(NamedTuple):
    """Two next tokens, and by how much the logit of the first exceeds that of the second."""

    answers: tuple[int, int]  # token ids: the donor's, and the text's
    unpatched: float  # after the text
    donor: float  # after the donor


class SweepPlan(NamedTuple):
    """Where a patching sweep patches in every layer."""

    site: str = "resid_pre"  # a site's name within its layer
    over: str = "T"  # the axes to go over: see `axis_masks`
    batch_size: int = 8  # indices along these axes in one pass, which bounds the memory


class PatchingView(NamedTuple):
    """A contrast while a donor's activations are patched in, by layer and index."""

    values: Float[np.ndarray, "L N"]  # by how much the first logit exceeds the second
    changes: Float[np.ndarray, "L N"]  # the same, less what it is unpatched


def contrast(
    params: Params,
    ids: Int[ArrayLike, "1 T"],
    donor_ids: Int[ArrayLike, "1 T2"],
    answers: tuple[int, int] | None = None,
    *,
    config: GPT2Config,
    edits: Mapping[str, Edit] | None = None,
) -> Contrast:
    """Returns two answers and the difference of their logits after two texts. Compiles itself.

    Without `answers` they are what the model predicts after the donor, and after the text, which
    may be the same token: then there is nothing to tell apart. With `edits` the model is edited, as
    in `patch`.

    Raises:
      ValueError: as `patch`.
    """
    edited = make_tap(edits or {}, config=config)
    of_text = _next_logits(params, ids, edited, config)
    of_donor = _next_logits(params, donor_ids, edited, config)
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
    donor_ids: Int[ArrayLike, "1 T2"],
    contrasted: Contrast,
    *,
    config: GPT2Config,
    plan: SweepPlan,
    progress: Progress = iter,
    edits: Mapping[str, Edit] | None = None,
) -> PatchingView:
    """Patches a donor's activations into a text, one index at a time, and measures a contrast.

    Compiles itself: one program for full batches of indices, and one for a smaller last batch.

    Args:
      params, config: as for `apply`.
      ids, donor_ids: two texts of as many tokens.
      contrasted: what is measured: see `contrast`.
      plan: where to patch.
      progress: wraps the batches on their way.
      edits: what is changed in every run, the donor's too: see `patching_sweep`.

    Raises:
      ValueError: as `patching_sweep`, or the texts differ in length.
    """
    n_tokens = np.shape(ids)[1]
    _check_plan(plan, n_tokens, np.shape(donor_ids)[1])
    masks = axis_masks(f"h.0.{plan.site}", plan.over, n_tokens, config=config)  # [N, ...]
    donor_sites = find_sites(f"h.*.{plan.site}", config)
    edited = make_tap(edits or {}, config=config)
    donors = _capture_compiled(params, donor_ids, edited, config, donor_sites)

    def metric(logits: Float[Array, "1 V"]) -> Float[Array, ""]:
        return _difference(logits[0], contrasted.answers)

    # A loop of calls, where `patching_sweep` is one: so that there is progress to show.
    @jax.jit
    def measure(
        params: Params,
        ids: Int[ArrayLike, "1 T"],
        donors: Acts,
        masks: Bool[Array, "N ..."],
        edited: Edits,
    ) -> Float[Array, "L N"]:
        return patch_each(
            params,
            ids,
            donors,
            masks,
            metric,
            config=config,
            site=plan.site,
            edits=edited.by_site,
        )

    starts = range(0, len(masks), plan.batch_size)
    batches = [masks[start : start + plan.batch_size] for start in starts]
    # On the host, batch by batch: the device holds one at a time.
    measured = []
    for batch in progress(batches):
        measured.append(np.asarray(measure(params, ids, donors, batch, edited)))
    values = np.concatenate(measured, axis=1)
    return PatchingView(values=values, changes=values - contrasted.unpatched)


def _check_plan(plan: SweepPlan, n_tokens: int, n_donor_tokens: int) -> None:
    """Raises `ValueError` unless a donor's tokens fit a text's, and batches hold something."""
    if n_donor_tokens != n_tokens:
        expected = f"the {n_tokens} tokens of `ids`"
        raise ValueError(f"`donor_ids` must have {expected}, got {n_donor_tokens}.")
    if plan.batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {plan.batch_size}.")


def sweep_labels(over: str, tokens: Sequence[str], *, n_heads: int, count: int) -> list[str]:
    """Returns names for the `count` indices that a sweep goes over, given the text's tokens."""
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


# Common.


def _capture_compiled(
    params: Params,
    ids: Int[ArrayLike, "1 T"],
    edited: Edits,
    config: GPT2Config,
    sites: tuple[str, ...],
) -> Acts:
    # Its logits are left out of the program's results, and so are not computed.
    @jax.jit
    def run(params: Params, ids: Int[ArrayLike, "1 T"], edited: Edits) -> Acts:
        _, acts = capture(params, ids, config=config, sites=sites, edits=edited.by_site)
        return acts

    return run(params, ids, edited)


def _next_logits(
    params: Params, ids: Int[ArrayLike, "1 T"], edited: Edits, config: GPT2Config
) -> Float[Array, " V"]:
    """Returns the logits after a text's last token."""
    # A new `jit` of the same function finds the programs that an earlier one has compiled.
    logits = jax.jit(apply)(params, ids, config=config, tap=edited)
    return logits[0, -1]


def _difference(logits: Float[Array, " V"], answers: tuple[int, int]) -> Float[Array, ""]:
    first, second = answers
    return logits[first] - logits[second]


def _check_axes(sites: Sequence[str], expected: str, config: GPT2Config) -> None:
    """Raises `ValueError` unless the activations at all sites have these axes."""
    for site in sites:
        axes = " ".join(site_axes(site, config))
        if axes != expected:
            raise ValueError(f"`sites` must have the axes {expected}, got {axes} at {site}.")
