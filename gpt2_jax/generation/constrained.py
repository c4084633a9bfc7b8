"""Texts of a given form: of a regular expression, of a JSON schema, of what a function allows.

`outlines-core` (the extra `constrained`) turns an expression into an automaton over bytes. From it
and the bytes of each token comes, for each of the automaton's states, the set of tokens with which
a text can still take the form. The sets lie on the device, a bit for each token, and a row carries
its state.

Axes: B rows, V vocabulary, S states, W words of 32 bits, C bytes of all tokens together.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from gpt2_jax.generation.transforms import History, Ids, Logits, Room, Stateful
from gpt2_jax.pytrees import dataclass, static
from gpt2_jax.tokenizer import Tokenizer

N_BYTES = 256
# The state that nothing leads out of, and the one before the first byte.
NOWHERE = 0
START = 1
# The byte that stands for the end of a text, and in none.
END = 0


@dataclass
class Constrained(Stateful):
    """Leaves the tokens with which a text can still take a form: `from_regex`, `from_json_schema`.

    A stop id is left where the form is complete, and alone where nothing can follow. The form is
    that of what is generated, without the prompt. A text that `max_new_tokens` cuts off has begun
    it. Other transforms of a `Chain` come behind, so that cuts count what is allowed.

    Examples:
      >>> isinstance(gpt2_jax.from_regex("yes|no", tokenizer), gpt2_jax.Constrained)
      True
    """

    # Arrays, and so leaves: another form of as many states compiles nothing.
    steps: Any  # int32[S, 256]: state and byte -> state
    allowed: Any  # uint32[S, W]: state -> a bit for each token
    spelling: Any  # uint8[C]
    starts: Any  # int32[V + 1]: where the bytes of each token begin; stop ids have none

    def init(self, ids: Int[Array, "B P"], lengths: Ids, room: Room) -> Ids:
        """Returns the state of texts that have not begun, `int32[B]`."""
        del lengths, room
        return jnp.full(ids.shape[0], START, jnp.int32)

    def update(self, state: Ids, tokens: Ids) -> Ids:
        """Returns the automaton's state after the bytes of a token."""
        steps = jnp.asarray(self.steps)
        spelling = jnp.asarray(self.spelling)
        starts = jnp.asarray(self.starts)
        first = starts[tokens]
        length = starts[tokens + 1] - first

        def step(carry):
            n_read, state = carry
            # Behind the last byte of all, JAX reads that one again, and `where` drops it.
            byte = spelling[first + n_read].astype(jnp.int32)
            return n_read + 1, jnp.where(n_read < length, steps[state, byte], state)

        # As many steps as the longest of these tokens has bytes, few of the vocabulary's longest.
        longest = length.max(initial=0)
        _, state = jax.lax.while_loop(lambda carry: carry[0] < longest, step, (0, state))
        return state

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        state = self.state_in(history)
        words = jnp.asarray(self.allowed)[state]  # [B, W]
        n_rows, vocab_size = logits.shape
        shifts = jnp.arange(32, dtype=jnp.uint32)[None, None]
        bits = (words[:, :, None] >> shifts) & 1
        bits = bits.reshape(n_rows, -1)[:, :vocab_size]
        # A model's table may have more rows than there are tokens: none of those may come.
        n_more = vocab_size - bits.shape[1]
        is_allowed = jnp.pad(bits, ((0, 0), (0, n_more))) > 0
        return jnp.where(is_allowed, logits, -jnp.inf)


def from_regex(
    pattern: str, tokenizer: Tokenizer, *, stop_ids: Sequence[int] | None = None
) -> Constrained:
    """Returns the transform that makes every text match a regular expression as a whole.

    `Categorical(from_regex(r"[0-9]{4}", tokenizer))` draws a year. Runs on the host, once for a
    pattern: milliseconds, or seconds where many states allow most of a large vocabulary. Needs the
    extra `constrained`.

    Args:
      pattern: in the syntax of Rust's `regex`, which has no look-around and no back-references, and
        without `$`, as it matches to the end anyway. It matches characters, of which a token may
        hold a part; none of them is NUL.
      tokenizer: of the model, of GPT-2's kind.
      stop_ids: what ends a text, the tokenizer's `eot_id` by default; those of `generate`.

    Raises:
      ImportError: `outlines-core` is not installed.
      ValueError: the pattern is none; no text of this vocabulary matches it; the tokenizer is not
        of GPT-2's kind, or there is no stop id.

    Examples:
      >>> form = gpt2_jax.from_regex(r"[0-9]{2}", tokenizer)
      >>> out = gpt2_jax.generate(
      ...     params, ids, config=config, max_new_tokens=3, sampler=gpt2_jax.Greedy(form)
      ... )
      >>> text = tokenizer.decode(out.ids[0, : out.lengths[0] - 1])
      >>> len(text), text.isdigit()
      (2, True)
    """
    # Those of other kinds give a token other bytes in another context.
    if type(tokenizer).decode_bytes is not Tokenizer.decode_bytes:
        kind = type(tokenizer).__name__
        raise ValueError(
            f"`tokenizer` must be of GPT-2's kind, whose tokens are bytes, got {kind}."
        )
    if stop_ids is None:
        stop_ids = () if tokenizer.eot_id is None else (tokenizer.eot_id,)
    if not stop_ids:
        raise ValueError("`stop_ids` must hold what ends a text: the tokenizer has no such token.")
    automaton = _automaton(pattern)
    words = _spelled(tokenizer, stop_ids)
    reached = _reached(automaton, words)
    productive = _productive(automaton, reached)
    if not productive[START]:
        raise ValueError(f"No text of this vocabulary matches `pattern` {pattern!r}.")
    allowed = productive[reached]
    allowed[:, list(stop_ids)] = automaton.accepts[:, None]
    # Where nothing is left, in the state of rows that have ended, all the same something is.
    allowed[NOWHERE, list(stop_ids)] = True
    n_missing = -allowed.shape[1] % 32
    bits = np.packbits(np.pad(allowed, ((0, 0), (0, n_missing))), axis=1, bitorder="little")
    return Constrained(
        steps=jnp.asarray(automaton.steps),
        allowed=jnp.asarray(bits.view("<u4").astype(np.uint32)),
        spelling=jnp.asarray(words.spelling),
        starts=jnp.asarray(words.starts),
    )


def from_json_schema(
    schema: str | Mapping[str, Any], tokenizer: Tokenizer, *, stop_ids: Sequence[int] | None = None
) -> Constrained:
    """Returns the transform that makes every text JSON of a schema.

    As `from_regex`, whose arguments it takes. What of JSON schema is known, and what a value looks
    like (the properties in their order, at most one space between parts), is `outlines-core`'s.
    A string or a list without a greatest length may go on for as long as the model likes.

    Args:
      schema: a JSON schema, as a mapping or as text.
      tokenizer, stop_ids: as for `from_regex`.

    Raises:
      ImportError, ValueError: as `from_regex`, or the schema is none that is known.

    Examples:
      >>> form = gpt2_jax.from_json_schema({"type": "boolean"}, tokenizer)
      >>> out = gpt2_jax.generate(
      ...     params, ids, config=config, max_new_tokens=8, sampler=gpt2_jax.Greedy(form)
      ... )
      >>> tokenizer.decode(out.ids[0, : out.lengths[0] - 1]) in ("true", "false")
      True
    """
    text = schema if isinstance(schema, str) else json.dumps(schema)
    library = _outlines_core()
    try:
        pattern = library.json_schema.build_regex_from_schema(text)
    except Exception as error:  # the library raises several kinds
        raise ValueError(f"`schema` must be a JSON schema: {error}.") from error
    return from_regex(pattern, tokenizer, stop_ids=stop_ids)


@dataclass
class PrefixAllowedTokens(Stateful):
    """Leaves the ids that a function allows after a text: HF's `prefix_allowed_tokens_fn`.

    The function is called as `function(prompt, ids)`, with the number of the prompt in its batch
    and the text so far, an array without padding, and returns ids. It runs on the host once for
    each row and token, by `jax.pure_callback`, which waits for the device each time and cannot be
    exported: `from_regex` needs no host. One function object compiles once.

    Examples:
      >>> rule = gpt2_jax.PrefixAllowedTokens(lambda prompt, ids: [5, 6])
      >>> out = gpt2_jax.generate(
      ...     params, ids, config=config, max_new_tokens=3, sampler=gpt2_jax.Greedy(rule)
      ... )
      >>> set(out.ids[0].tolist()) <= {5, 6}
      True
    """

    function: Callable[[int, Int[np.ndarray, " T"]], Sequence[int]] = static()

    def init(self, ids: Int[Array, "B P"], lengths: Ids, room: Room) -> Ids:
        """Returns the number of each row's prompt."""
        del lengths, room
        return jnp.arange(ids.shape[0], dtype=jnp.int32)

    def update(self, state: Ids, tokens: Ids) -> Ids:
        """Returns the state: a row's prompt stays."""
        del tokens
        return state

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        prompts = self.state_in(history)
        history = self.needs(history)
        allowed = jax.pure_callback(
            partial(_ask, self.function, logits.shape[1]),
            jax.ShapeDtypeStruct(logits.shape, bool),
            prompts,
            history.packed(),
            history.length,
            vmap_method="sequential",
        )
        return jnp.where(allowed, logits, -jnp.inf)


def _ask(
    function: Callable[..., Sequence[int]], vocab_size: int, prompts: Any, texts: Any, lengths: Any
) -> Bool[np.ndarray, "B V"]:
    """Returns which tokens a function allows after each text."""
    rows = zip(np.asarray(prompts), np.asarray(texts), np.asarray(lengths), strict=True)
    allowed = np.zeros((len(lengths), vocab_size), bool)
    for row, (prompt, text, length) in zip(allowed, rows, strict=True):
        ids = np.asarray(function(int(prompt), text[:length]), int)
        if not ids.size or ids.min() < 0 or ids.max() >= vocab_size:
            expected = f"at least one id in [0, {vocab_size}) (`vocab_size`)"
            raise ValueError(f"`function` must return {expected}, got {ids.tolist()}.")
        row[ids] = True
    return allowed


# From a pattern to tables, on the host.


class _Automaton(NamedTuple):
    """A deterministic automaton over bytes."""

    steps: Int[np.ndarray, "S 256"]
    accepts: Bool[np.ndarray, " S"]


class _Words(NamedTuple):
    """The bytes of each token, one after the other."""

    spelling: UInt8[np.ndarray, " C"]
    starts: Int[np.ndarray, " V1"]  # and the end of the last


def _outlines_core() -> Any:
    try:
        import outlines_core
    except ImportError as error:
        raise ImportError(
            'Constraints need `outlines-core`: pip install "gpt2_jax[constrained]".'
        ) from error
    return outlines_core


def _automaton(pattern: str) -> _Automaton:
    """Returns the automaton of a regular expression."""
    index = _index(pattern, f"(?:{pattern})\\x00")
    transitions = index.get_transitions()
    finals = index.get_final_states()
    first = index.get_initial_state()
    numbers = {first: START}
    waiting = [first]
    edges = []
    # What can be reached by the bytes of a text, in the order in which it is.
    for state in waiting:
        for byte, target in transitions.get(state, {}).items():
            if byte in (END, N_BYTES):
                continue
            if target not in numbers:
                numbers[target] = START + len(numbers)
                waiting.append(target)
            edges.append((numbers[state], byte, numbers[target]))
    steps = np.full((START + len(numbers), N_BYTES), NOWHERE, np.int32)
    for state, byte, target in edges:
        steps[state, byte] = target
    accepts = np.zeros(len(steps), bool)
    for state, number in numbers.items():
        accepts[number] = transitions.get(state, {}).get(END) in finals
    return _Automaton(steps, accepts)


def _index(pattern: str, ended: str) -> Any:
    """Returns the library's index of a pattern with an end, over a vocabulary of single bytes.

    It is the automaton itself. The end is there as the library loses transitions behind a state
    that accepts (0.2.14: in `a(bc)?` the `b`, alone): so none accepts before it.
    """
    library = _outlines_core()
    words = {bytes([byte]): [byte] for byte in range(N_BYTES)}
    vocabulary = library.Vocabulary(N_BYTES, words)
    try:
        # First as it was given, so that a mistake is the user's own, and no bracket closes ours.
        library.Index(pattern, vocabulary)
        return library.Index(ended, vocabulary)
    except Exception as error:  # the library raises several kinds
        expected = f"`pattern` must be a regular expression, got {pattern!r}"
        raise ValueError(f"{expected}: {error}.") from error


def _spelled(tokenizer: Tokenizer, stop_ids: Sequence[int]) -> _Words:
    """Returns the bytes of each token; none of those that are no part of a text."""
    silent = {*stop_ids, *tokenizer.special_tokens.values()}
    n_tokens = max(tokenizer.vocab_size, max(stop_ids) + 1)
    words = [b"" if id in silent else tokenizer.decode_bytes([id]) for id in range(n_tokens)]
    starts = np.zeros(n_tokens + 1, np.int32)
    starts[1:] = np.cumsum([len(word) for word in words])
    return _Words(np.frombuffer(b"".join(words), np.uint8), starts)


def _reached(automaton: _Automaton, words: _Words) -> Int[np.ndarray, "S V"]:
    """Returns the state that each token leads to from each; NOWHERE by those without bytes."""
    n_tokens = len(words.starts) - 1
    lengths = np.diff(words.starts)
    reached = np.zeros((len(automaton.steps), n_tokens), np.int32)
    for state in range(START, len(reached)):
        row = reached[state]
        row[lengths > 0] = state
        reading = np.flatnonzero(row)
        n_read = 0
        # All tokens at once, byte by byte; most of them lead nowhere by their first.
        while reading.size:
            byte = words.spelling[words.starts[reading] + n_read]
            row[reading] = automaton.steps[row[reading], byte]
            n_read += 1
            reading = reading[(row[reading] != NOWHERE) & (lengths[reading] > n_read)]
    return reached


def _productive(automaton: _Automaton, reached: Int[np.ndarray, "S V"]) -> Bool[np.ndarray, " S"]:
    """Returns from which states tokens lead to a complete text.

    Where a vocabulary lacks bytes, the automaton may have others.
    """
    productive = automaton.accepts.copy()
    sources: dict[int, list[int]] = {}
    for state, row in enumerate(reached):
        is_target = np.zeros(len(reached), bool)
        is_target[row] = True
        for target in np.flatnonzero(is_target).tolist():
            sources.setdefault(target, []).append(state)
    # Backwards from the ends.
    waiting = np.flatnonzero(productive).tolist()
    while waiting:
        for source in sources.get(waiting.pop(), ()):
            if not productive[source]:
                productive[source] = True
                waiting.append(source)
    productive[NOWHERE] = False
    return productive
