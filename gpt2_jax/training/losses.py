"""The loss of a language model: what a step learns from, checked, and how unlikely it was.

Knows the model; nothing of gradients, optimizers or files. It equals HF's, and so PyTorch's.

Axes are those of `modules.py`; here `T` counts one id more than the model reads, as the last one is
only predicted.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray, Shaped

from gpt2_jax.config import GPT2Config
from gpt2_jax.inputs import Layout, check_ids
from gpt2_jax.kernels import summed_cross_entropy
from gpt2_jax.model import apply, gathered, head_matrix, hidden_states, unembed
from gpt2_jax.modules import Params, Tap, checked_remat, no_tap, wants, wide_dtype
from gpt2_jax.sharding import automatic

# Numbers in the logits of a batch, 64 MiB in float32, beyond which its loss is computed by chunks.
# For GPT-2 124M on CPU, 4 texts of 256 tokens, loss and gradients took as long by four chunks as by
# two, and 1.04 times as long by seven.
LARGEST_LOGITS = 2**24

Metrics = dict[str, Array]  # scalars by name


class TextBatch(NamedTuple):
    """What a step learns from, checked."""

    ids: Int[Array, "B T"]
    weights: Float[Array, "B T"]  # how much the prediction of each id counts; the first, never
    layout: Layout
    inputs_embeds: Float[Array, "B T D"] | None  # what the model reads in the place of `ids`


@automatic
def next_token_loss(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    *,
    config: GPT2Config,
    weights: Num[ArrayLike, "B T"] | None = None,
    positions: Int[ArrayLike, "#B T"] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    inputs_embeds: Float[ArrayLike, "B T D"] | None = None,
    tap: Tap = no_tap,
    dropout_key: PRNGKeyArray | None = None,
    remat: str | bool = "none",
) -> tuple[Float[Array, ""], Metrics]:
    """Returns the mean negative log-likelihood of each token after those before it, and metrics.

    The loss of HF's `GPT2LMHeadModel(ids, labels=ids)`, in nats; its `-100` labels are weights of 0
    here. It does not compile itself: `jax.jit` and `jax.grad` are the caller's.

    Args:
      params: the parameters.
      ids: token ids, of which the model reads the first `T - 1` columns and predicts the last
        `T - 1`; so `T` is 2 to `n_positions + 1`.
      config: the model's configuration.
      weights: how much the prediction of each id counts, not negative. The first column is never
        predicted and is ignored. Padding on the right has weight 0.
      positions, mask: see `apply`; with a place for each of `ids`, the last included. A mask says
        what is seen, not what counts.
      segment_ids: several texts to a row: see `apply`. The first token of each is not predicted,
        whatever its weight.
      inputs_embeds: what the model reads in the place of `ids`, which it predicts all the same.
      tap: see `apply`; of the first `T - 1` columns.
      dropout_key: turns dropout on.
      remat: what the backward pass recomputes: see `apply`.

    Returns:
      The loss, float32 (float64 in a float64 model), 0 where all weights are 0; and a dict of
      `loss` and `weight`, the sum of the weights: without them, the number of predictions.

    Raises:
      ValueError: as `apply`; or `ids` has less than 2 columns, or `weights` another shape.

    Examples:
      >>> loss_and_grad = jax.jit(jax.value_and_grad(gpt2_jax.next_token_loss, has_aux=True))
      >>> (loss, metrics), grads = loss_and_grad(params, ids, config=config)
      >>> bool(abs(loss - np.log(config.vocab_size)) < 0.5), float(metrics["weight"])  # untrained
      (True, 3.0)
      >>> jax.tree.structure(grads) == jax.tree.structure(params)
      True
    """
    layout = Layout(positions, mask, segment_ids)
    batch = make_batch(ids, weights, layout, inputs_embeds, config)
    weight = predicted_weight(batch)
    loss = share_of_loss(
        params,
        batch,
        dropout_key,
        whole_weight=weight,
        config=config,
        remat=checked_remat(remat),
        tap=tap,
    )
    return loss, {"loss": loss, "weight": weight}


def share_of_loss(
    params: Params,
    part: TextBatch,
    dropout_key: PRNGKeyArray | None,
    *,
    whole_weight: Float[Array, ""],
    config: GPT2Config,
    remat: str,
    tap: Tap = no_tap,
) -> Float[Array, ""]:
    """Returns what a part of a batch adds to the loss of the whole.

    The divisor is the weight of the whole batch: where parts weigh differently, the mean of their
    means is another number.
    """
    read = part.ids[:, :-1]
    predicted = part.ids[:, 1:]
    embeds = None if part.inputs_embeds is None else part.inputs_embeds[:, :-1]
    layout = part.layout.without_last()
    # Who wants the logits themselves gets those of all tokens.
    gives_logits = wants(tap, "logits")
    run = apply if gives_logits else hidden_states
    out = run(
        params,
        read if embeds is None else None,
        config=config,
        positions=layout.positions,
        mask=layout.mask,
        segment_ids=layout.segment_ids,
        inputs_embeds=embeds,
        tap=tap,
        dropout_key=dropout_key,
        remat=remat,
    )
    weights = part.weights[:, 1:]
    if gives_logits:
        total = _summed_losses_of(out, predicted, weights)
    else:
        total = _summed_losses(params, out, predicted, weights, config=config)
    # Where nothing counts, `total` is 0 and so is the loss; 0 / 0 would make every parameter NaN.
    divisor = jnp.where(whole_weight == 0, 1, whole_weight)
    return total / divisor


def _summed_losses_of(
    logits: Float[Array, "B T V"], predicted: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the weighted sum of the losses that logits make."""
    # Logits are float32 even of a model that computes in bfloat16, and so is all that follows.
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, predicted)
    return (losses * weights).sum()


def _summed_losses(
    params: Params,
    hidden: Float[Array, "B T D"],
    predicted: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    config: GPT2Config,
) -> Float[Array, ""]:
    """Returns the weighted sum of the losses, in float32 (float64 in a float64 model)."""
    n_chunks = -(-predicted.size * config.vocab_size // LARGEST_LOGITS)
    if n_chunks == 1:
        return _summed_losses_of(unembed(params, hidden, config=config), predicted, weights)
    table = gathered(head_matrix(params, config=config).astype(config.dtype))
    chunk = -(-predicted.shape[1] // n_chunks)
    return summed_cross_entropy(
        hidden.astype(config.dtype), table, predicted, weights, chunk, config.precision
    )


def predicted_weight(batch: TextBatch) -> Float[Array, ""]:
    """Returns the sum of the weights that count: nothing predicts the first column."""
    return batch.weights[:, 1:].sum()


# What it is made of.


def make_batch(
    ids: Int[ArrayLike, "B T"],
    weights: Num[ArrayLike, "B T"] | None,
    layout: Layout,
    inputs_embeds: Float[ArrayLike, "B T D"] | None,
    config: GPT2Config,
) -> TextBatch:
    """Returns what a step learns from as arrays that fit each other.

    Raises:
      ValueError: they do not.
    """
    # One more than the model reads: the last id is only predicted.
    ids = check_ids(ids, config, longest=config.n_positions + 1)
    if ids.shape[1] < 2:
        raise ValueError(
            "`ids` must have at least 2 columns: one to read and one to predict, got 1."
        )
    # The dtype of the logits, whatever the weights came in: a mask of integers, say.
    dtype = wide_dtype(config)
    if weights is None:
        weights = jnp.ones(ids.shape, dtype)
    _check_shape("weights", weights, ids)
    weights = jnp.asarray(weights, dtype)
    if inputs_embeds is not None:
        inputs_embeds = jnp.asarray(inputs_embeds)
    if layout.segment_ids is not None:
        _check_shape("segment_ids", layout.segment_ids, ids)
        segment_ids = jnp.asarray(layout.segment_ids)
        layout = layout._replace(segment_ids=segment_ids)
        # Nothing before it says what a text begins with.
        is_first = segment_ids[:, 1:] != segment_ids[:, :-1]
        # Multiplied, not set: where a token counts, the weight that it was given stays.
        weights = weights.at[:, 1:].multiply(~is_first)
    return TextBatch(ids, weights, layout, inputs_embeds)


def _check_shape(name: str, given: ArrayLike, ids: Int[Array, "B T"]) -> None:
    if jnp.shape(given) != ids.shape:
        expected = list(ids.shape)
        got = list(jnp.shape(given))
        raise ValueError(f"`{name}` must have the shape of `ids`, {expected}, got {got}.")
