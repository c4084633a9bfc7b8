"""What is looked at while a run goes on: the loss on texts that it does not train on, and samples.

Knows models and data; nothing of the run's folder, nor of where results are logged.
"""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.cuts import Temperature, TopK
from gpt2_jax.generation.generate import generate
from gpt2_jax.generation.sampling import Categorical
from gpt2_jax.generation.transforms import Chain
from gpt2_jax.modules import Params
from gpt2_jax.training.data import Ids, Place, windows
from gpt2_jax.training.devices import gathered, on_mesh
from gpt2_jax.training.log import Evaluation
from gpt2_jax.training.losses import next_token_loss
from gpt2_jax.training.plan import Plan, Position, apart
from gpt2_jax.training.recipes import Recipe

# Of the samples at each evaluation: nanoGPT's `sample.py`.
SAMPLE_TEMPERATURE = 0.8
SAMPLE_TOP_K = 200


def is_evaluated(plan: Plan, step: int) -> bool:
    """Returns whether the validation set is read after a step: at intervals, and at the end."""
    if plan.corpus.val is None:
        return False
    return step % plan.recipe.eval_every == 0 or step == plan.recipe.steps


def evaluate(plan: Plan, position: Position, step: int, say: Callable[[str], None]) -> Evaluation:
    """Returns the loss on the validation set after a step, and a text of the model's own."""
    assert plan.corpus.val is not None, "`is_evaluated` said so"
    params = position.state.params
    val_loss = validation_loss(
        params, plan.corpus.val, config=plan.config, recipe=plan.recipe, mesh=plan.mesh
    )
    return Evaluation(
        step=step,
        val_loss=val_loss,
        bytes_per_token=plan.corpus.bytes_per_token,
        sample=_sample_or_note(plan, position, step, say),
    )


def validation_loss(
    params: Params,
    tokens: Ids,
    *,
    config: GPT2Config,
    recipe: Recipe,
    mesh: Mesh | None = None,
) -> float:
    """Returns the mean loss over a whole token files in nats per token, without dropout.

    Each token but the first of a file is scored once, after at most a window of others. On a
    mesh the rows are spread over it, and every process has the same result.
    """
    # No more rows at a time than in training, so that no more memory is needed.
    n_rows = recipe.batch_size // recipe.micro_batches
    length = recipe.window_length(config)
    # Means are weighed again, as the last windows are shorter, and summed in Python's float64, as
    # files are long.
    total = 0.0
    count = 0.0
    for batch in windows(tokens, batch_size=n_rows, length=length):
        ids = on_mesh(partial(_rows_of, batch.ids), batch.ids.shape, mesh)
        weights = on_mesh(partial(_rows_of, batch.weights), batch.weights.shape, mesh)
        loss, weight = _mean_and_weight(params, ids, weights, config=config)
        total += float(loss) * float(weight)
        count += float(weight)
    return total / count


@jax.jit
def _mean_and_weight(
    params: Params,
    ids: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    config: GPT2Config,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the mean loss of some windows, and over how many predictions it is one."""
    loss, metrics = next_token_loss(params, ids, config=config, weights=weights)
    return loss, metrics["weight"]


def _rows_of(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    return array[start:stop]


# Samples.


def _sample_or_note(
    plan: Plan, position: Position, step: int, say: Callable[[str], None]
) -> str | None:
    """Returns a text of the model's own; where there is none to be had, says why."""
    if _n_sampled(plan) == 0:
        return None
    params = gathered(position.state.params, plan.mesh)
    if params is None:  # in all processes but the first
        return None
    try:
        return _sample_text(plan, apart(params), position.key)
    # Whatever it was, memory for a cache of keys and values included: people look at samples, and
    # no step of a run of days depends on one.
    except Exception as error:
        say(f"No sample after step {step}: {error}")
        return None


def _n_sampled(plan: Plan) -> int:
    """Returns how many tokens a sample has; 0 where there is nothing to read it with."""
    if plan.corpus.tokenizer is None or plan.corpus.val is None:
        return 0
    return min(plan.recipe.sample_tokens, plan.config.n_positions - 1)  # one for the prompt


def _sample_text(plan: Plan, params: Params, key: PRNGKeyArray) -> str:
    """Returns a text that the model makes up.

    It goes on from the end of a text or, in a vocabulary without one, from a token of the data.
    """
    tokenizer = plan.corpus.tokenizer
    assert tokenizer is not None and plan.corpus.val is not None, "`_n_sampled` said so"
    first_id = tokenizer.eot_id
    if first_id is None:
        first_id = plan.corpus.val.read(Place(0, 0, 1))[0]
    # A vocabulary of characters has fewer tokens than 200.
    top_k = TopK(min(SAMPLE_TOP_K, plan.config.vocab_size))
    sampled = generate(
        params,
        np.array([[first_id]]),
        None,
        key,  # the same each time: samples differ by what was learnt between them
        config=plan.config,
        max_new_tokens=_n_sampled(plan),
        sampler=Categorical(Chain((Temperature(SAMPLE_TEMPERATURE), top_k))),
    )
    length = int(sampled.lengths[0])
    return tokenizer.decode(sampled.ids[0, :length])
