"""Another number of tokens: HF's `resize_token_embeddings` as a pure function."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gpt2_jax.config import GPT2Config, as_count
from gpt2_jax.modules import Params
from gpt2_jax.quantised import refuse_quantised

SPREAD = 1e-9  # of new rows, as a share of the old ones' covariance: HF's


def resize_vocab(
    params: Params, config: GPT2Config, size: int, key: PRNGKeyArray | None = None
) -> tuple[GPT2Config, Params]:
    """Returns the config and params of a model with `size` tokens. It does not compile itself.

    As in HF (`mean_resizing`), new rows of the table of embeddings are the mean of the old ones,
    and with a key drawn around it, with `SPREAD` times their covariance (J. Hewitt, 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html): so none is likelier than the average
    token. The rows of a separate head likewise. With fewer tokens the last rows are left out.

    Args:
      params: the parameters.
      config: their config.
      size: how many tokens there are to be.
      key: the source of the draws; without one, all new rows are the mean itself.

    Raises:
      ValueError: `size` is less than 1, or the params are quantised.

    Examples:
      >>> larger, resized = gpt2_jax.resize_vocab(params, config, 4100)
      >>> larger.vocab_size, resized["wte"]["embedding"].shape
      (4100, (4100, 16))
    """
    size = as_count("size", size)
    refuse_quantised(params, "Params with another number of tokens")
    resized = dict(params)
    for number, name in enumerate(("wte", "lm_head")):
        if name in params:
            # By one key, both tables would get the same mixtures of their rows.
            table_key = None if key is None else jax.random.fold_in(key, number)
            resized[name] = {"embedding": _resized(params[name]["embedding"], size, table_key)}
    return config.replace(vocab_size=size), resized


def _resized(
    table: Float[Array, "V D"], size: int, key: PRNGKeyArray | None
) -> Float[Array, "W D"]:
    n_old, width = table.shape
    if size <= n_old:
        return table[:size]
    # Wide: a mean of fifty thousand numbers of 16 bits would lose most of them.
    wide = jnp.asarray(table, jnp.promote_types(table.dtype, jnp.float32))
    mean = wide.mean(axis=0)
    new = jnp.broadcast_to(mean[None], (size - n_old, width))
    if key is not None:
        # A normal vector of that covariance, without its matrix: a random mixture of the old rows.
        centred = wide - mean[None]
        weights = jax.random.normal(key, (size - n_old, n_old), wide.dtype)
        new = new + (SPREAD / n_old) ** 0.5 * (weights @ centred)
    return jnp.concatenate([table, new.astype(table.dtype)])
