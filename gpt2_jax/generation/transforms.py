"""What reshapes next-token logits: what a transform is, what it sees, and several as one.

Knows nothing of models. A transform maps `(logits, history)` to logits, with -inf for the tokens
that it removes; one that carries a state of its own from token to token is `Stateful`. All are
pytrees: their numbers are leaves, so that new values recompile nothing, and each may be a scalar or
hold one value per row, `[B]`. None compiles itself. Those of HF are in `cuts` and in `rules`.

Axes: B rows, V vocabulary, S slots of the history.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Shaped

from gpt2_jax.generation.ranges import Range
from gpt2_jax.pytrees import dataclass

Logits = Float[Array, "B V"]
Ids = Int[Array, " B"]

# Fields that hold numbers are `Any`: JAX rebuilds pytrees with whatever it needs as leaves, tracers
# and placeholders among them.
PerRow = Any  # a number, or an array of one number per row, `[B]`


class History(NamedTuple):
    """The tokens before the one being chosen, for rules that look back. Padding is none of them.

    Examples:
      >>> history = gpt2_jax.History(
      ...     ids=jnp.array([[5, 0, 7, 7]]),
      ...     valid=jnp.array([[True, False, True, True]]),  # the second slot is a gap
      ...     step=jnp.array(2),
      ... )
      >>> history.length.tolist(), history.packed().tolist()
      ([3], [[5, 7, 7, -1]])
      >>> history.counts(8, generated=True)[0, 5:].tolist()  # 5 is the prompt
      [0, 0, 2]
    """

    ids: Int[Array, "B S"]  # the prompt and what was generated, with gaps
    valid: Bool[Array, "B S"]  # which of them are real
    step: Int[Array, ""] | Int[Array, " B"]  # how many tokens were generated so far
    state: Any = None  # what a `Stateful` transform carries, of these tokens

    @property
    def length(self) -> Int[Array, " B"]:
        """How many tokens each row has, the prompt's included."""
        return self.valid.sum(axis=-1, dtype=jnp.int32)

    def packed(self) -> Int[Array, "B S"]:
        """Returns the ids without gaps: row `b` has its `length[b]` tokens first, then -1."""
        n_rows, n_slots = self.ids.shape
        rank = jnp.cumsum(self.valid, axis=-1) - 1
        # A gap goes beyond the last column, where it is dropped.
        column = jnp.where(self.valid, rank, n_slots)
        rows = jnp.arange(n_rows)[:, None]
        blank = jnp.full_like(self.ids, -1)
        return blank.at[rows, column].set(self.ids, mode="drop")

    def counts(self, vocab_size: int, *, generated: bool = False) -> Int[Array, "B V"]:
        """Returns how often each token has come; on request, among the generated ones alone."""
        counted = self.valid
        if generated:
            # By rank, not by slot: prompts differ in length, and gaps may stand anywhere.
            prompt_length = self.length - self.step
            counted &= jnp.cumsum(self.valid, axis=-1) > prompt_length[:, None]
        n_rows = len(self.ids)
        rows = jnp.arange(n_rows)[:, None]
        zeros = jnp.zeros((n_rows, vocab_size), jnp.int32)
        # A gap holds some id as well, and adds 0 to its count.
        return zeros.at[rows, self.ids].add(counted)


class Room(NamedTuple):
    """How long texts may become, for states that are as large as the text.

    Examples:
      >>> room = gpt2_jax.generation.transforms.Room(longest=4, max_new_tokens=3)
      >>> room.longest + room.max_new_tokens  # how long a text may become
      7
    """

    longest: int  # tokens of the longest prompt
    max_new_tokens: int


class Transform:
    """What reshapes logits. Any function `(logits, history) -> logits` may stand beside these.

    Examples:
      >>> class Negated(gpt2_jax.generation.transforms.Transform):
      ...     def __call__(self, logits, history=None):
      ...         return -logits
      >>> gpt2_jax.Greedy(Negated())(None, jnp.array([[0.0, 2.0, 1.0]])).tolist()
      [0]
    """

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        raise NotImplementedError

    def needs(self, history: History | None) -> History:
        """Returns the history, and raises `ValueError` where there is none."""
        if history is None:
            name = type(self).__name__
            raise ValueError(f"{name} looks back: `history` must be a `History`, got None.")
        return history


class Stateful(Transform):
    """A transform that carries a state from token to token, in the place of reading all again.

    `init` makes it of the prompts, `update` reads a token into it, and `history.state` is what they
    returned, when the transform is called. A state is a pytree; its leaves have a row for each row
    of the batch, which follows it through copies and beams, or `select` says how it does.

    Examples:
      >>> class Once(gpt2_jax.Stateful):
      ...     def init(self, ids, lengths, room):
      ...         return jnp.zeros((len(ids), 3), bool)  # which tokens were generated
      ...     def update(self, state, tokens):
      ...         return state | jax.nn.one_hot(tokens, 3, dtype=bool)
      ...     def __call__(self, logits, history):
      ...         return jnp.where(self.state_in(history), -jnp.inf, logits)
      >>> state = Once().init(jnp.zeros((1, 2), int), jnp.array([2]), room=None)
      >>> state = Once().update(state, jnp.array([1]))
      >>> Once()(jnp.zeros((1, 3)), history._replace(state=state)).tolist()
      [[0.0, -inf, 0.0]]
    """

    def init(self, ids: Int[Array, "B P"], lengths: Ids, room: Room) -> Any:
        """Returns the state after some prompts, padded on the right."""
        raise NotImplementedError

    def update(self, state: Any, tokens: Ids) -> Any:
        """Returns the state after one more token of each row; of rows that have ended, any."""
        raise NotImplementedError

    def select(self, state: Any, rows: Int[Array, " R"]) -> Any:
        """Returns the state of some rows, of which one may come more than once."""
        return jax.tree.map(lambda x: x[rows], state)

    def state_in(self, history: History | None) -> Any:
        """Returns the state, and raises `ValueError` where there is none."""
        state = None if history is None else history.state
        if state is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} carries a state: `history.state` must be what its `init` or `update`"
                " returned, got None."
            )
        return state


def is_stateful(transform: Any) -> bool:
    """Returns whether a transform carries a state: whether it has `init` and `update`."""
    if isinstance(transform, Chain):
        return any(is_stateful(part) for part in transform.transforms)
    return hasattr(transform, "init") and hasattr(transform, "update")


def init_state(transform: Any, ids: Int[Array, "B P"], lengths: Ids, room: Room) -> Any:
    """Returns a transform's state after some prompts; None, which costs nothing, if it has none."""
    return transform.init(ids, lengths, room) if is_stateful(transform) else None


def update_state(transform: Any, state: Any, tokens: Ids) -> Any:
    """Returns a transform's state, if it has one, after one more token of each row."""
    return transform.update(state, tokens) if is_stateful(transform) else None


def select_state(transform: Any, state: Any, rows: Int[Array, " R"]) -> Any:
    """Returns a transform's state, if it has one, of some rows."""
    return transform.select(state, rows) if is_stateful(transform) else None


# Transforms of transforms.


@dataclass
class Renormalize(Transform):
    """Makes log-probabilities of what transforms have left.

    This matters to the scores of beams; a draw is the same.

    Examples:
      >>> made = gpt2_jax.generation.transforms.Renormalize()(jnp.array([[3.0, 3.0]]))
      >>> jnp.exp(made).round(3).tolist()
      [[0.5, 0.5]]
    """

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        del history
        return jax.nn.log_softmax(logits, axis=-1)


@dataclass
class Chain(Transform):
    """Applies transforms in order; `sampler_from_options` has HF's order.

    Raises:
      ValueError: one of them cannot be called, or is a `Stateful` of a class that is no pytree.

    Examples:
      >>> chain = gpt2_jax.Chain((gpt2_jax.Temperature(2.0), gpt2_jax.TopK(1)))
      >>> chain(jnp.array([[0.0, 4.0, 2.0]])).tolist()
      [[-inf, 2.0, -inf]]
    """

    transforms: tuple[Any, ...] = ()  # of transforms

    def __post_init__(self):
        transforms = tuple(as_transform(part) for part in self.transforms)
        object.__setattr__(self, "transforms", transforms)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        states = None if history is None else history.state
        for number, transform in enumerate(self.transforms):
            seen = history
            # Each sees its own; without any, all see the history as it came.
            if history is not None and states is not None:
                seen = history._replace(state=states[number])
            logits = transform(logits, seen)
        return logits

    def init(self, ids: Int[Array, "B P"], lengths: Ids, room: Room) -> tuple[Any, ...]:
        """Returns the state of each transform, None for those that carry none."""
        return tuple(init_state(part, ids, lengths, room) for part in self.transforms)

    def update(self, state: tuple[Any, ...], tokens: Ids) -> tuple[Any, ...]:
        """Returns the states after one more token of each row."""
        pairs = zip(self.transforms, state, strict=True)
        return tuple(update_state(part, of_part, tokens) for part, of_part in pairs)

    def select(self, state: tuple[Any, ...], rows: Int[Array, " R"]) -> tuple[Any, ...]:
        """Returns the states of some rows."""
        pairs = zip(self.transforms, state, strict=True)
        return tuple(select_state(part, of_part, rows) for part, of_part in pairs)


def as_transform(transform: Any) -> Any:
    """Returns what a user gave as a transform in the form of one, which JAX can carry.

    A plain function, or an object of a class that is no pytree, becomes a part of the program: it
    must be hashable, and compiles once for each object.

    Raises:
      ValueError: it cannot be called, is a class instead of an object, has no hash, or is a
        `Stateful` of a class that is no pytree.
    """
    if isinstance(transform, type) or not callable(transform):
        expected = "a transform or a function `(logits, history) -> logits`"
        raise ValueError(f"`transform` must be {expected}, got {transform!r}.")
    if not jax.tree_util.all_leaves([transform]):
        return transform
    name = type(transform).__name__
    if isinstance(transform, Stateful):
        # As a function alone it would lose its state.
        raise ValueError(f"{name} is no pytree: make it one, by `flax.struct.dataclass` above it.")
    return compiled_in("transform", transform)


def compiled_in(argument: str, function: Any) -> Partial:
    """Returns a function as a pytree without leaves. Raises `ValueError` if it has no hash."""
    try:
        hash(function)
    except TypeError:
        name = type(function).__name__
        raise ValueError(f"`{argument}` must be hashable or a pytree, {name} is neither.") from None
    return Partial(function)


# What transforms share.


def check_range(name: str, number: PerRow, expected: Range) -> None:
    """Raises `ValueError` where a number, or one of an array, is out of range.

    Traced numbers have no value to check.
    """
    concrete = isinstance(number, int | float | np.ndarray | np.generic | jax.Array)
    if not concrete or isinstance(number, Tracer):
        return
    if not np.all(expected.contains(np.asarray(number))):
        raise ValueError(f"`{name}` must be {expected.asked(np.max(number))}, got {number}.")


def check_count(name: str, number: Any) -> None:
    """Raises `ValueError` unless it is a positive integer."""
    if not isinstance(number, int | np.integer) or number < 1:
        raise ValueError(f"{name} must be a positive integer, got {number!r}.")


def as_column(number: PerRow, logits: Logits) -> Shaped[Array, ""] | Shaped[Array, "B 1"]:
    """Returns a scalar as it is, and values `[B]` as `[B, 1]`: either fits `logits[B, V]`.

    Raises:
      ValueError: the values are not one for each row; broadcast, they might fit another axis.
    """
    number = jnp.asarray(number)
    # Not `[1, 1]`: a division by that rounds otherwise.
    if number.ndim == 0:
        return number
    if logits.ndim != 2 or number.shape != logits.shape[:1]:
        shapes = f"numbers {list(number.shape)} and logits {list(logits.shape)}"
        raise ValueError(f"A transform takes one number, or `[B]` for logits [B, V]; got {shapes}.")
    return number[:, None]
