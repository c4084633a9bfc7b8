"""A context and its continuation as ids: lm-evaluation-harness's rule, for its tasks and ours.

Knows texts and a function that encodes them; nothing of models or of the harness itself.
"""

from collections.abc import Callable

from gpt2_jax.evaluation.score import ScoreRequest, after

Encode = Callable[[str], list[int]]


def encode_pair(encode: Encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Returns the ids of a context and of what follows it (the harness's `_encode_pair`).

    Spaces between the two belong to the continuation.
    """
    # Encoded together, as a token may span the two: the space before a word is part of it.
    context_ids = encode(context.rstrip())
    whole = encode(context + continuation)
    return context_ids, whole[len(context_ids) :]


def pair_request(
    encode: Encode, context: str, continuation: str, *, prefix_id: Callable[[], int]
) -> ScoreRequest:
    """Returns the request that scores a continuation after its context.

    Without a context it follows the id that `prefix_id` gives, which no other pair asks for.
    """
    context_ids, ids = encode_pair(encode, context, continuation)
    return after(context_ids or [prefix_id()], ids)
