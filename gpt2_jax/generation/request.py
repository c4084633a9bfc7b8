"""What a user asks for, checked before anything is traced, as the compiled programs take it.

`generate`, `stream`, `beam_search` and `speculate` take the same prompts, samplers and stop ids:
each reads them here.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key, UInt32

from gpt2_jax.cache import KVCache, bucket, device_memory, row_bytes
from gpt2_jax.config import GPT2Config, as_count, as_integer, ids_within
from gpt2_jax.generation.sampling import as_sampler
from gpt2_jax.generation.transforms import Room, init_state, is_stateful
from gpt2_jax.inputs import check_side, checked_ids, pad_rows
from gpt2_jax.model import apply, init
from gpt2_jax.modules import Tap, repeated
from gpt2_jax.pytrees import classes_of, dataclass, static
from gpt2_jax.rebuilt import as_pytree

# One key, or one for each row; typed, or the raw data of one.
Keys = Key[Array, "..."] | UInt32[Array, "... 2"]

OVERFLOWS = ("error", "stop", "slide")


@dataclass
class Rules:
    """How tokens are chosen, and when rows end. A pytree: what `advance` is compiled for."""

    keys: Key[Array, " R"] | None  # one for each row; None for samplers that do not draw
    sampler: Any
    stop_ids: Int[Array, " K"]
    pad_id: Int[Array, ""]
    tap: Any  # None, or a pytree that is called as a tap
    outputs: tuple[str, ...] = static(default=())  # sites, and "scores"
    classes: tuple[Any, ...] = static(init=False)  # of the nodes of `sampler` and `tap`

    def __post_init__(self) -> None:
        # Users' own samplers and taps may be of flax's classes, which JAX takes for each other.
        object.__setattr__(self, "classes", classes_of((self.sampler, self.tap)))


class Request(NamedTuple):
    """Checked prompts and rules.

    With `n` sequences to return for each of `B` prompts there are `R = n B` rows.
    """

    ids: Int[Array, "B P"]  # padded on the right
    lengths: Int[Array, " B"]
    rules: Rules
    memory: Any = None  # the state of the sampler's transform after the prompts, if it carries one


class Prompts(NamedTuple):
    """Checked prompts, on the host where they have values, traced where JAX traces."""

    ids: Int[np.ndarray, "B P"] | Int[Array, "B P"]  # padded on the right; `P` is a bucket
    lengths: Int[np.ndarray, " B"] | Int[Array, " B"]
    longest: int  # the length of the longest, at least 1; of traced ones, the most it can be
    shortest: int  # of traced ones, the least it can be


class Past(NamedTuple):
    """Texts of which a cache holds the beginnings. Arrays of the host, but for the cache."""

    cache: KVCache
    ids: Int[np.ndarray, "B U"]  # what it does not hold yet, padded on the right to a bucket
    lengths: Int[np.ndarray, " B"]
    at_slots: Int[np.ndarray, "B S"]  # every token at its slot, those of `ids` included

    @property
    def used(self) -> int:
        """How many slots are in use when all is read."""
        slots = np.broadcast_to(np.asarray(self.cache.slot), self.lengths.shape)
        # Rows that share their slot go on from behind the longest.
        if jnp.ndim(self.cache.slot) == 0:
            return int(slots.max(initial=0) + self.lengths.max(initial=0))
        return int((slots + self.lengths).max(initial=0))


class Endings(NamedTuple):
    """What ends a row, and what follows it."""

    stop_ids: tuple[int, ...]
    pad_id: int


def read_prompts(
    ids: Int[ArrayLike, "B P"],
    lengths: Int[ArrayLike, " B"] | None,
    padding_side: str,
    *,
    config: GPT2Config,
) -> Prompts:
    """Returns prompts, padded on the right to a bucket of columns.

    Where JAX traces, values are not checked, and what shapes the program is the width of `ids`.

    Raises:
      ValueError: see `generate`.
    """
    checked = checked_ids(ids, config)
    check_side(padding_side)
    n_rows, width = checked.shape
    real = _check_lengths(lengths, n_rows, width)
    if is_traced((checked, real)):
        return _traced_prompts(jnp.asarray(checked), jnp.asarray(real), padding_side, config=config)
    given = np.asarray(checked)
    if padding_side == "left":
        # Moved to the right side, a prompt's slots are its positions, and one mask serves all rows.
        shifted = [np.roll(row, length - width) for row, length in zip(given, real, strict=True)]
        # `np.stack` takes no empty list: a batch of no rows stays what it is.
        given = np.stack(shifted) if shifted else given
    longest = int(real.max(initial=1))
    # Few widths, so that few programs are compiled; a prompt that is too long is refused by its
    # reader.
    columns = max(longest, bucket(longest, config.n_positions))
    padded = np.zeros((n_rows, columns), np.int32)
    # What is padding in every row is dropped: the width of what was given compiles nothing.
    padded[:, :longest] = given[:, :longest]
    shortest = int(real.min(initial=longest))
    return Prompts(padded, real.astype(np.int32), longest, shortest)


def _traced_prompts(
    ids: Int[Array, "B P"], lengths: Int[Array, " B"], padding_side: str, *, config: GPT2Config
) -> Prompts:
    """Returns prompts of which the shape alone is known, padded as those on the host are."""
    width = ids.shape[1]
    if padding_side == "left":
        ids = on_the_right(ids, lengths)
    n_more = max(0, bucket(width, config.n_positions) - width)
    padded = jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, n_more)))
    return Prompts(padded, lengths.astype(jnp.int32), longest=width, shortest=1)


def read_past(prompts: Prompts, cache: KVCache, *, config: GPT2Config) -> Past:
    """Returns what of some texts a cache does not hold yet.

    Raises:
      ValueError: the cache is of another model or of other rows, or of a text nothing is left to
        read, whose last logits are not known then.
    """
    valid = np.asarray(cache.valid)
    n_rows = len(prompts.lengths)
    shape = [len(cache.layers), len(valid)]
    if shape != [config.n_layer, n_rows]:
        expected = f"{config.n_layer} layers and {n_rows} rows"
        raise ValueError(f"`cache` must have {expected}, got {shape[0]} and {shape[1]}.")
    known = valid.sum(axis=1)
    if (known != np.asarray(cache.lengths)).any():
        raise ValueError(
            "`cache` must hold the beginnings of `ids`: it was made with a mask, segments or"
            " positions, so that its slots do not tell which tokens they hold."
        )
    n_unread = prompts.lengths - known
    if (n_unread < 1).any():
        row = int(np.argmax(n_unread < 1))
        raise ValueError(
            "`ids` must hold the whole texts, at least one token longer than what is in the cache:"
            f" row {row} has {prompts.lengths[row]} tokens, the cache holds {known[row]}."
        )
    texts = [row[:length] for row, length in zip(prompts.ids, prompts.lengths, strict=True)]
    unread = [text[n_known:] for text, n_known in zip(texts, known, strict=True)]
    longest = int(n_unread.max(initial=1))
    ids, lengths = pad_rows(unread, bucket(longest, config.n_positions))
    starts = np.broadcast_to(np.asarray(cache.slot), n_rows)
    # All columns are written, padding too: a slot too few, and they would overwrite the last ones.
    slots = max(cache.slots, int(starts.max(initial=0)) + ids.shape[1])
    at_slots = np.zeros((n_rows, slots), np.int32)
    for row, text in enumerate(texts):
        # In a row the order of slots is that of the text, but there may be gaps.
        at_slots[row, np.flatnonzero(valid[row])] = text[: known[row]]
        at_slots[row, starts[row] : starts[row] + lengths[row]] = unread[row]
    return Past(cache, ids, lengths, at_slots)


def on_the_right(ids: Int[Array, "B P"], lengths: Int[Array, " B"]) -> Int[Array, "B P"]:
    """Returns rows that are padded on the left with their padding on the right."""
    return jax.vmap(jnp.roll)(ids, lengths - ids.shape[1])


def is_traced(tree: Any) -> bool:
    """Returns whether JAX traces any array of a pytree: inside `jax.jit`, `jax.vmap` and others."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def check_room(prompts: Prompts, max_new_tokens: int, overflow: str, *, config: GPT2Config) -> None:
    """Raises `ValueError` if prompts and new tokens exceed the context against `overflow`."""
    if overflow not in OVERFLOWS:
        raise ValueError(f'`overflow` must be "error", "stop" or "slide", got {overflow!r}.')
    longest = prompts.longest
    fits = {
        "error": longest + max_new_tokens <= config.n_positions,
        # A row that is full from the start would get no token at all.
        "stop": longest < config.n_positions,
        "slide": True,
    }
    if not fits[overflow]:
        together = longest + max_new_tokens
        raise ValueError(
            f"The longest prompt has {longest} tokens and `max_new_tokens` is {max_new_tokens},"
            f" together {together}, but the model has {config.n_positions} positions: shorten one,"
            " or choose an `overflow`."
        )


def check_memory(prompts: Prompts, n_each: Any, name: str, *, config: GPT2Config) -> None:
    """Raises `ValueError` where prompts become more rows each than any memory holds.

    `name` is the argument that says how many.
    """
    n_each = as_count(name, n_each)
    if is_traced(prompts):
        return
    n_rows = len(prompts.lengths) * n_each
    needed = n_rows * row_bytes(config, prompts.longest)
    there = device_memory()
    if needed > there:
        got = f"{n_rows:,} rows need at least {needed / 2**30:,.0f} GB of memory"
        raise ValueError(f"`{name}` is {n_each}: {got}, there are {there / 2**30:,.0f}.")


def read_endings(
    stop_ids: Sequence[int] | None, pad_id: int | None, *, config: GPT2Config
) -> Endings:
    """Returns what ends a row, by default the config's `eos_token_id`, and what follows it.

    Raises:
      ValueError: an id that was given is outside the vocabulary. Of the config's own, which may be
        there for want of another, such ids are left out.
    """
    stops = config.eos_token_ids
    if stop_ids is not None:
        stops = _checked_ids("stop_ids", stop_ids, config)
    if pad_id is None:
        own = ids_within((config.pad_token_id,), config.vocab_size)
        # As HF has it. What stands there is not read: `lengths` say what was made.
        return Endings(stops, (*own, *stops, 0)[0])
    (pad,) = _checked_ids("pad_id", (pad_id,), config)
    return Endings(stops, pad)


def _checked_ids(name: str, ids: Sequence[int], config: GPT2Config) -> tuple[int, ...]:
    """Returns ids as Python's `int`; raises `ValueError` for one outside the vocabulary."""
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise ValueError(f"`{name}` must be a sequence of ids, got {ids!r}.")
    checked = []
    for given in ids:
        token = as_integer(given)
        if token is None or not 0 <= token < config.vocab_size:
            expected = f"[0, {config.vocab_size}) (`vocab_size`)"
            raise ValueError(f"`{name}` must be in {expected}, got {given!r}.")
        checked.append(token)
    return tuple(checked)


def make_request(
    prompts: Prompts,
    endings: Endings,
    key: Keys | None,
    sampler: Any,
    *,
    num_return_sequences: int = 1,
    tap: Tap | None = None,
    outputs: tuple[str, ...] = (),
) -> Request:
    """Returns the arrays of a request.

    Raises:
      ValueError: a sampler that draws has no key, a greedy one is to return several sequences, a
        transform or something else stands in the sampler's place, or `key` is neither one key nor
        one for each row.
    """
    n_sequences = as_count("num_return_sequences", num_return_sequences)
    sampler = check_sampler(sampler, key)
    if n_sequences > 1 and not sampler.draws:
        raise ValueError(
            f"Greedy would write the same text {n_sequences} times: use a sampler that draws."
        )
    # Before the prompts are repeated, which is done on the device: a key for each text.
    n_rows = prompts.ids.shape[0] * n_sequences
    rules = Rules(
        keys=None if key is None else row_keys(key, n_rows),
        sampler=sampler,
        # An array, and so no part of the program: other stop ids, if as many, compile nothing.
        # By `device_put`, here and below, where `jnp.asarray` would load a program for each.
        stop_ids=jax.device_put(np.asarray(endings.stop_ids, np.int32)),
        pad_id=jax.device_put(np.int32(endings.pad_id)),
        tap=as_pytree(tap),
        outputs=outputs,
    )
    return Request(jax.device_put(prompts.ids), jax.device_put(prompts.lengths), rules)


def remember(request: Request, room: Room) -> Request:
    """Returns the request with the state of its sampler's transform, if that carries one."""
    if not is_stateful(request.rules.sampler.transform):
        return request
    return request._replace(memory=_memory(request, room))


@partial(jax.jit, static_argnames="room")
def _memory(request: Request, room: Room) -> Any:
    return init_state(request.rules.sampler.transform, request.ids, request.lengths, room)


def check_sampler(sampler: Any, key: Keys | None) -> Any:
    """Returns the sampler; raises `ValueError` if it draws and there is no key."""
    # First: what a user gave may be a function, which is taken to draw.
    sampler = as_sampler(sampler)
    if key is None and sampler.draws:
        name = type(sampler).__name__
        raise ValueError(f"`key` must be given for a sampler that draws, such as {name}.")
    return sampler


def transform_of(sampler: Any) -> Any:
    """Returns a sampler's transform; raises `ValueError` for a function, which has none."""
    if sampler.transform is None:
        raise ValueError(
            "Beam search and speculation need a sampler with a `transform`, such as"
            " `Categorical(transform)`: what a plain function does to the logits is unknown."
        )
    return sampler.transform


def check_stateless(sampler: Any, who: str) -> None:
    """Raises `ValueError` for a sampler whose transform carries a state, which `who` cannot."""
    if is_stateful(sampler.transform):
        raise ValueError(
            f"{who} cannot carry the state of a transform such as a constraint or a second model:"
            " use `generate`, `stream` or `beam_search`."
        )


def read_outputs(
    outputs: str | Sequence[str], sampler: Any, *, config: GPT2Config
) -> tuple[str, ...]:
    """Returns the names of what is kept of each token: sites, and "scores".

    Raises:
      ValueError: a pattern matches no site, or one whose shape grows with the text; or "scores" are
        asked of a function.
    """
    patterns = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    names: list[str] = []
    for pattern in patterns:
        if pattern in ("logits", "scores"):
            names.append(pattern)
            continue
        sites = _site_names(config)
        matched = [site for site in sites if fnmatchcase(site, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, ["scores", *sites], n=4, cutoff=0.5)
            raise ValueError(
                f'`outputs` must be "logits", "scores" or sites, got {pattern!r}. Near ones:'
                f" {', '.join(near) or 'none'}."
            )
        names += matched
    growing = [name for name in names if name.endswith((".attn.scores", ".attn.pattern"))]
    if growing:
        raise ValueError(
            f"`outputs` cannot keep {growing[0]}, which has a column for each token before: use"
            " `capture` on the whole text, which `join` makes."
        )
    if "scores" in names and as_sampler(sampler).transform is None:
        raise ValueError(
            '`outputs` cannot keep "scores" of a function, whose transform is unknown.'
        )
    return tuple(dict.fromkeys(names))


@cache
def _site_names(config: GPT2Config) -> tuple[str, ...]:
    """Returns the names of the sites that a tap sees, in their order."""
    # By a pass over shapes: who knows the sites is the model, and no table here.
    names = []

    def note(site, x):
        names.append(site)
        return x

    params = jax.eval_shape(partial(init, config=config), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    jax.eval_shape(partial(apply, config=config, tap=note), params, ids)
    return tuple(names)


def for_copies(rules: Rules, n: int) -> Rules:
    """Returns the rules for `n` rows in the place of each: a tap's values follow their rows."""
    if rules.tap is None or n == 1:
        return rules
    return dataclasses.replace(rules, tap=repeated(rules.tap, n))


def row_keys(key: Keys, n_rows: int) -> Key[Array, " R"]:
    """Returns one typed key for each row.

    From one key, folded with the row's number, or from `n_rows` of them, typed or raw uint32 data.
    """
    # `jax.random.PRNGKey` makes raw keys, which look like arrays of two numbers.
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    # Folded, not split: the number of rows is not in it, so that a row keeps its key in any batch.
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n_rows))
    if key.shape != (n_rows,):
        got = f"shape {list(key.shape)}"
        raise ValueError(f"`key` must be one key or {n_rows} keys, one per row; got {got}.")
    return key


def fold_rows(
    keys: Key[Array, " R"] | None, number: int | Int[Array, ""]
) -> Key[Array, " R"] | None:
    """Returns each row's key, folded with the number of a step; None stays None."""
    # By the step, not by splitting: a longer run begins with the shorter run's tokens.
    if keys is None:
        return None
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _check_lengths(lengths: Any, n_rows: Any, width: int) -> Any:
    """Returns how many ids of each row are real."""
    if lengths is None:
        # Of a symbolic number of rows there is no array on the host.
        return np.full(n_rows, width) if isinstance(n_rows, int) else jnp.full(n_rows, width)
    expected = f"`lengths` must be integers of shape [{n_rows}]"
    # In the place of `lengths`: what comes of leaving them out and going on with the key.
    if isinstance(lengths, jax.Array) and jnp.issubdtype(lengths.dtype, jax.dtypes.prng_key):
        raise ValueError(f"{expected}, got a key: pass it as `key=`.")
    lengths = lengths if isinstance(lengths, Tracer) else np.asarray(lengths)
    if lengths.shape != (n_rows,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{expected}, got {lengths.dtype} of shape {list(lengths.shape)}.")
    if isinstance(lengths, Tracer):
        return lengths
    if n_rows and not (lengths.min() >= 1 and lengths.max() <= width):
        outside = lengths.min() if lengths.min() < 1 else lengths.max()
        raise ValueError(f"`lengths` must be in 1 to {width}, the columns of `ids`; got {outside}.")
    return lengths
