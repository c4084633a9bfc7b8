"""Reading and changing activations: the sites of a forward pass, `capture` and `patch`.

A tap is a function `tap(site, x) -> x` that the forward pass calls at each of its sites; what it
returns takes the activation's place. A tap with a method `wants(site)` is called only where that is
true, and costs nothing elsewhere; one with `placed(positions)` is told where in their texts the
tokens of a pass stand, and one with `repeated(n)` that each row comes n times. This file knows no
method of research: those stand on it.

Axes are those of `modules.py`, and L, layers; `...` are the axes of a site that its name decides.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import Params, apply
from gpt2_jax.modules import Tap, placed, repeated, wants
from gpt2_jax.pytrees import dataclass, static
from gpt2_jax.sharding import automatic

AnyArray = Array | np.ndarray
# What becomes of an activation: a function of it, or a value that broadcasts to it.
Edit = Callable[[Array], Array] | ArrayLike
Acts = dict[str, Array]  # activations by their sites
# `[N]`, `[B, N]`, or one.
Positions = ArrayLike | Sequence[int] | Sequence[Sequence[int]]

# In the order of the forward pass: site -> its axes (S is T, or the cache's slots), and the name of
# TransformerLens' hook, whose values are the same but for what the comments say. `i` stands for
# each layer.
SITES: dict[str, tuple[str, str]] = {
    "wte.out": ("B T D", "hook_embed"),
    "wpe.out": ("B T D", "hook_pos_embed"),
    "embed": ("B T D", "blocks.0.hook_resid_pre"),
    "h.i.resid_pre": ("B T D", "blocks.i.hook_resid_pre"),
    # The stream as each head reads it, with `use_attn_in`: what is changed here reaches its
    # queries, keys and values, and nothing else.
    "h.i.attn.in": ("B T H D", "blocks.i.hook_attn_in"),
    # Likewise its queries, keys or values alone, with `use_split_qkv_input`.
    "h.i.attn.q_in": ("B T H D", "blocks.i.hook_q_input"),
    "h.i.attn.k_in": ("B T H D", "blocks.i.hook_k_input"),
    "h.i.attn.v_in": ("B T H D", "blocks.i.hook_v_input"),
    "h.i.ln_1.scale": ("B T 1", "blocks.i.ln1.hook_scale"),
    "h.i.ln_1.out": ("B T D", "blocks.i.ln1.hook_out"),
    "h.i.attn.q": ("B T H K", "blocks.i.attn.hook_q"),
    "h.i.attn.k": ("B T H K", "blocks.i.attn.hook_k"),
    "h.i.attn.v": ("B T H K", "blocks.i.attn.hook_v"),
    # Before the mask; the hook's are after it, with -inf.
    "h.i.attn.scores": ("B H T S", "blocks.i.attn.hook_attn_scores"),
    "h.i.attn.pattern": ("B H T S", "blocks.i.attn.hook_pattern"),
    "h.i.attn.z": ("B T H K", "blocks.i.attn.hook_z"),
    # Each head behind `c_proj`, without its bias.
    "h.i.attn.result": ("B T H D", "blocks.i.attn.hook_result"),
    "h.i.attn.out": ("B T D", "blocks.i.hook_attn_out"),
    "h.i.resid_mid": ("B T D", "blocks.i.hook_resid_mid"),
    # The stream as the MLP reads it, with `use_hook_mlp_in`.
    "h.i.mlp.in": ("B T D", "blocks.i.hook_mlp_in"),
    "h.i.ln_2.scale": ("B T 1", "blocks.i.ln2.hook_scale"),
    "h.i.ln_2.out": ("B T D", "blocks.i.ln2.hook_out"),
    "h.i.mlp.pre": ("B T F", "blocks.i.mlp.hook_pre"),
    "h.i.mlp.post": ("B T F", "blocks.i.mlp.hook_post"),
    "h.i.mlp.out": ("B T D", "blocks.i.hook_mlp_out"),
    "h.i.resid_post": ("B T D", "blocks.i.hook_resid_post"),
    "ln_f.scale": ("B T 1", "ln_final.hook_scale"),
    "ln_f.out": ("B T D", "ln_final.hook_out"),
    # TransformerLens has no such hook. In `generate`, those of the last token alone: [B, V].
    "logits": ("B T V", ""),
}


# Sites and their names.


def site_names(config: GPT2Config) -> tuple[str, ...]:
    """Returns the name of every site, in the order of the forward pass.

    Examples:
      >>> names = gpt2_jax.site_names(config)
      >>> names[:3], names[-1], len(names)
      (('wte.out', 'wpe.out', 'embed'), 'logits', 52)
    """
    in_table = list(SITES)
    of_each_layer = [name for name in in_table if name.startswith("h.")]
    first = in_table.index(of_each_layer[0])
    before = in_table[:first]
    after = in_table[first + len(of_each_layer) :]

    # The rows of the table that stand for a layer are repeated as a whole, layer by layer.
    of_layers = []
    for layer in range(config.n_layer):
        for name in of_each_layer:
            of_layers.append(name.replace("h.i", f"h.{layer}", 1))
    return (*before, *of_layers, *after)


def find_sites(patterns: str | Sequence[str], config: GPT2Config) -> tuple[str, ...]:
    """Returns the sites that any pattern matches: "h.3.attn.z", "h.*.attn.z", "h.[01].mlp.*".

    They come in the order of the forward pass, each once.

    Raises:
      ValueError: a pattern matches nothing; the message lists near names.

    Examples:
      >>> gpt2_jax.find_sites("h.*.attn.z", config)
      ('h.0.attn.z', 'h.1.attn.z')
      >>> gpt2_jax.find_sites("h.0.attn.zz", config)
      Traceback (most recent call last):
          ...
      ValueError: There is no site 'h.0.attn.zz' in 2 layers. Near ones: ...
    """
    if isinstance(patterns, str):
        # A string is a sequence too, of letters.
        patterns = (patterns,)
    names = site_names(config)
    matched = set()
    for pattern in patterns:
        # The case counts, whatever the file system's rule: "q" and "Q" are not the same letter.
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.5)
            listed = ", ".join(near) or "those of `site_names`"
            raise ValueError(
                f"There is no site {pattern!r} in {config.n_layer} layers. Near ones: {listed}."
            )
        matched.update(matches)
    return tuple(name for name in names if name in matched)


def find_site(pattern: str, config: GPT2Config) -> str:
    """Returns the one site that a pattern matches.

    Raises:
      ValueError: as `find_sites`, or it matches several.
    """
    site, *others = find_sites(pattern, config)
    if others:
        matches = ", ".join([site, *others])
        raise ValueError(f"Expected the name of one site, got {pattern!r}, which is {matches}.")
    return site


def site_axes(site: str, config: GPT2Config) -> tuple[str, ...]:
    """Returns the axes of a site's activation: those of "h.3.attn.z" are `("B", "T", "H", "K")`.

    Raises:
      ValueError: as `find_site`.
    """
    return _axes(find_site(site, config))


def _axes(site: str) -> tuple[str, ...]:
    """Returns the axes of a site that exists."""
    in_table = re.sub(r"^h\.\d+", "h.i", site)
    axes, _ = SITES[in_table]
    return tuple(axes.split())


# Reading and changing.


@dataclass
class Change:
    """An edit by arrays, as `replace` and `add` make it.

    A pytree whose arrays are leaves: a jitted caller compiles once for all values.
    """

    values: tuple[Any, ...]  # the arrays
    at: Any  # positions `[N]` or `[B, N]`, or None for all
    function: Any = static()  # `(*values, x) -> x`

    def __call__(self, x: Array) -> Array:
        if self.at is not None:
            raise ValueError(
                "An edit `at` positions must be told those of the tokens: it is one for `patch`,"
                " `capture` and `make_tap`, which see to that."
            )
        return self.function(*self.values, x)

    def of_tokens(self, x: Array, positions: Int[Array, "#B T"], axis: int) -> Array:
        """Returns the activation of tokens at some positions, which lie along an axis."""
        at = jnp.atleast_2d(jnp.asarray(self.at))  # [1 or B, N]
        n_rows = len(x)
        if len(at) not in (1, n_rows):
            raise ValueError(f"`at` must have 1 row, or {n_rows} as the batch, got {len(at)}.")
        is_at = positions[:, :, None] == at[:, None]  # [1 or B, T, N]
        # By tokens, with the other axes of the activation.
        shape = [1] * x.ndim
        shape[0] = len(is_at)
        shape[axis] = x.shape[axis]
        index = is_at.argmax(axis=-1).reshape(shape)
        is_any = is_at.any(axis=-1).reshape(shape)
        count = at.shape[1]
        values = [_of_tokens(value, index, axis - x.ndim, count) for value in self.values]
        return jnp.where(is_any, self.function(*values, x), x)

    def repeated(self, n: int, ranks: tuple[int, ...]) -> "Change":
        """Returns the edit of a batch with each row `n` times, of an activation of such a rank."""
        values = tuple(_repeated(value, n, ranks) for value in self.values)
        at = None if self.at is None else _repeated(self.at, n, (2,))
        return Change(values, at, self.function)


def _of_tokens(value: ArrayLike, index: Int[Array, "..."], axis: int, count: int) -> ArrayLike:
    """Returns of `count` entries along an axis, which counts from the end, each token's own."""
    shape = jnp.shape(value)
    # One for all, or none: it is broadcast.
    if len(shape) < -axis or shape[axis] == 1:
        return value
    if shape[axis] != count:
        expected = f"1 entry, or one for each of the {count} positions in `at`"
        raise ValueError(f"A value must have {expected}; got {shape[axis]} of {list(shape)}.")
    aligned = jnp.reshape(value, (1,) * (index.ndim - len(shape)) + shape)
    return jnp.take_along_axis(aligned, index, axis=axis)


def _repeated(value: Any, n: int, ranks: tuple[int, ...]) -> Any:
    """Returns an array with each row `n` times, if it has more than one and such a rank."""
    if jnp.ndim(value) not in ranks or len(value) == 1:
        return value
    return jnp.repeat(jnp.asarray(value), n, axis=0)


@dataclass
class Edits:
    """A tap that changes activations.

    A pytree: the arrays in it are leaves, so that other values compile nothing; the sites are its
    structure.

    Examples:
      >>> tap = gpt2_jax.make_tap({"h.*.mlp.out": gpt2_jax.add(1.0)}, config=config)
      >>> tap.wants("h.0.mlp.out"), tap.wants("h.0.attn.out")
      (True, False)
    """

    by_site: dict[str, Any]  # arrays, and callables that are pytrees
    positions: Any = None  # `[#B, T]`, of the tokens of a pass, once it is `placed`

    def __call__(self, site: str, x: Array) -> Array:
        if site not in self.by_site:
            return x
        edit: Any = self.by_site[site]
        if _has_positions(edit) and self.positions is not None:
            new: Any = self._at_positions(edit, site, x)
        elif callable(edit):
            new = edit(x)
        else:
            new = jnp.broadcast_to(edit, x.shape)
        # In the activation's dtype: a float32 donor must not widen the rest of a bfloat16 pass.
        new = jnp.asarray(new, x.dtype)
        # A function's result is not broadcast: a lost axis is a mistake more often than a wish.
        if new.shape != x.shape:
            raise ValueError(f"An edit of {site} must return the shape {x.shape}, got {new.shape}.")
        return new

    def wants(self, site: str) -> bool:
        """Returns whether the site is edited."""
        return site in self.by_site

    def placed(self, positions: Int[Array, "#B T"]) -> "Edits":
        """Returns the tap of a pass over tokens at these positions."""
        # Most edits ask for none: their taps stay what they are.
        if not any(map(_has_positions, self.by_site.values())):
            return self
        return Edits(self.by_site, positions)

    def repeated(self, n: int) -> "Edits":
        """Returns the tap of a batch with each row `n` times, one after the other.

        Values have rows where they have all axes of the activation, and more than 1 along the
        first.
        """
        by_site = {}
        for site, edit in self.by_site.items():
            ranks = (len(_axes(site)),)
            if site == "logits" and not _has_positions(edit):
                ranks = (2, 3)  # those of the last token have no T
            if isinstance(edit, Change):
                edit = edit.repeated(n, ranks)
            elif not callable(edit):
                edit = _repeated(edit, n, ranks)
            by_site[site] = edit
        return Edits(by_site, self.positions)

    def _at_positions(self, edit: Change, site: str, x: Array) -> Array:
        axes = _axes(site)
        # The logits of a decoding step, of one token, have no axis for it.
        lacks_tokens = x.ndim < len(axes)
        if lacks_tokens:
            x = x[:, None]
        new = edit.of_tokens(x, self.positions, axes.index("T"))
        return new[:, 0] if lacks_tokens else new


def _has_positions(edit: Any) -> TypeGuard[Change]:
    return isinstance(edit, Change) and edit.at is not None


def make_tap(edits: Mapping[str, Edit], *, config: GPT2Config) -> Edits:
    """Returns the tap that makes some edits, for `apply`, `generate` and `stream`.

    Args:
      edits: patterns of sites (see `find_sites`) and what becomes of the activations: an array that
        broadcasts to them, or a function of them. `replace` and `add` are such functions whose
        arrays are leaves of the tap, so that in `generate` other ones compile nothing;
        `jax.tree_util.Partial` makes others.
      config: the model's configuration.

    Raises:
      ValueError: a site does not exist, or has two edits, or one is at a position beyond the last.

    Examples:
      >>> edits = {"h.1.mlp.out": gpt2_jax.zero_ablation()}
      >>> tap = gpt2_jax.make_tap(edits, config=config)
      >>> edited = gpt2_jax.apply(params, ids, config=config, tap=tap)
      >>> bool((edited == gpt2_jax.patch(params, ids, config=config, edits=edits)).all())
      True
    """
    by_site: dict[str, Any] = {}
    for pattern, edit in edits.items():
        # A plain function is no pytree: as a `Partial` it becomes a part of the tap's structure.
        if callable(edit) and jax.tree_util.all_leaves([edit]):
            edit = Partial(edit)
        if _has_positions(edit):
            _check_context(edit.at, config)
        for site in find_sites(pattern, config):
            if site in by_site:
                raise ValueError(
                    f"Each site must have one edit, got a second one for {site}, by {pattern!r}."
                )
            by_site[site] = edit
    return Edits(by_site)


@dataclass
class ChainedTaps:
    """A tap that passes each activation through several, one after the other. A pytree.

    Examples:
      >>> double = gpt2_jax.make_tap({"embed": lambda x: 2 * x}, config=config)
      >>> tap = gpt2_jax.ChainedTaps((double, double))
      >>> tap("embed", jnp.ones(2)).tolist()
      [4.0, 4.0]
    """

    taps: tuple[Any, ...]

    def __call__(self, site: str, x: Array) -> Array:
        for tap in self.taps:
            x = tap(site, x)
        return x

    def wants(self, site: str) -> bool:
        """Returns whether any of them wants the site."""
        return any(wants(tap, site) for tap in self.taps)

    def placed(self, positions: Int[Array, "#B T"]) -> "ChainedTaps":
        """Returns the taps of a pass over tokens at these positions."""
        return ChainedTaps(tuple(placed(tap, positions) for tap in self.taps))

    def repeated(self, n: int) -> "ChainedTaps":
        """Returns the taps of a batch with each row `n` times."""
        return ChainedTaps(tuple(repeated(tap, n) for tap in self.taps))


class Recorder:
    """A tap that keeps what it sees at some sites, after another tap has changed it.

    Its dict grows while the model is traced: it serves one call, inside the caller's own function.
    """

    def __init__(self, sites: Iterable[str], tap: Tap, acts: Acts | None = None):
        self.sites = frozenset(sites)
        self.tap = tap
        self.acts: Acts = {} if acts is None else acts

    def __call__(self, site: str, x: Array) -> Array:
        # The edit first: what is kept is what the model goes on with.
        x = self.tap(site, x)
        if site in self.sites:
            self.acts[site] = x
        return x

    def wants(self, site: str) -> bool:
        """Returns whether the site is kept or edited."""
        return site in self.sites or wants(self.tap, site)

    # Others of their kind keep in the same dict.

    def placed(self, positions: Int[Array, "#B T"]) -> "Recorder":
        """Returns the tap of a pass over tokens at these positions."""
        return Recorder(self.sites, placed(self.tap, positions), self.acts)

    def repeated(self, n: int) -> "Recorder":
        """Returns the tap of a batch with each row `n` times."""
        return Recorder(self.sites, repeated(self.tap, n), self.acts)


@automatic
def capture(
    params: Params,
    ids: Int[ArrayLike, "B T"] | None,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    sites: str | Sequence[str],
    edits: Mapping[str, Edit] | None = None,
    padding_side: str = "right",
    positions: Int[ArrayLike, "#B T"] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    inputs_embeds: Float[ArrayLike, "B T D"] | None = None,
) -> tuple[Float[Array, "B T V"], Acts]:
    """Returns `apply`'s logits, and the activations of some sites by their names.

    Does not compile itself.

    Args:
      params, ids, lengths, config, padding_side, positions, mask, segment_ids, inputs_embeds: as
        for `apply`.
      sites: names or patterns of names: see `find_sites`, and `SITES` for what there is.
      edits: see `make_tap`. What is captured is what the model goes on with.

    Raises:
      ValueError: as `apply`, or a site does not exist, or an edit changes a shape.

    Examples:
      >>> logits, acts = gpt2_jax.capture(params, ids, config=config, sites="h.*.attn.pattern")
      >>> {site: x.shape for site, x in acts.items()}
      {'h.0.attn.pattern': (1, 2, 4, 4), 'h.1.attn.pattern': (1, 2, 4, 4)}
    """
    # Before the pass, so that a wrong name costs nothing.
    names = find_sites(sites, config)
    recorder = Recorder(names, make_tap(edits or {}, config=config))
    logits = apply(
        params,
        ids,
        lengths,
        config=config,
        padding_side=padding_side,
        positions=positions,
        mask=mask,
        segment_ids=segment_ids,
        inputs_embeds=inputs_embeds,
        tap=recorder,
    )
    return logits, recorder.acts


@automatic
def patch(
    params: Params,
    ids: Int[ArrayLike, "B T"] | None,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    edits: Mapping[str, Edit],
    padding_side: str = "right",
    positions: Int[ArrayLike, "#B T"] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    inputs_embeds: Float[ArrayLike, "B T D"] | None = None,
) -> Float[Array, "B T V"]:
    """Returns `apply`'s logits of a model whose activations are edited.

    `edits={"h.3.attn.out": lambda x: 0 * x}` takes out what the attention of layer 3 writes. Does
    not compile itself.

    Args:
      params, ids, lengths, config, padding_side, positions, mask, segment_ids, inputs_embeds: as
        for `apply`.
      edits: see `make_tap`.

    Raises:
      ValueError: as `capture`.

    Examples:
      >>> nothing = gpt2_jax.zero_ablation()
      >>> edits = {"h.*.attn.out": nothing, "h.*.mlp.out": nothing}
      >>> logits = gpt2_jax.patch(params, ids, config=config, edits=edits)  # of embeddings alone
      >>> _, acts = gpt2_jax.capture(params, ids, config=config, sites="embed")
      >>> of_embeddings = gpt2_jax.stream_logits(params, acts["embed"], config=config)
      >>> np.allclose(logits, of_embeddings, atol=1e-5)
      True
    """
    # Through `capture` and not `apply` with a tap, so that the two cannot differ.
    logits, _ = capture(
        params,
        ids,
        lengths,
        config=config,
        sites=(),
        edits=edits,
        padding_side=padding_side,
        positions=positions,
        mask=mask,
        segment_ids=segment_ids,
        inputs_embeds=inputs_embeds,
    )
    return logits


# Edits, and masks for them.


def replace(value: ArrayLike, where: ArrayLike = True, *, at: Positions | None = None) -> Edit:
    """Returns the edit that puts `value` in an activation's place where a mask is true.

    Args:
      value: what broadcasts to the activation.
      where: a mask that does.
      at: at which positions of the text, all by default: whole numbers from 0 on, `[N]`, or for
        each row its own, `[B, N]`, of which none comes twice. They are found wherever the token is
        read, in a prompt, on a cache or while decoding. For `scores` and `pattern` they are those
        of the queries. `value` and `where` may then have N entries along that axis: one for each.

    Raises:
      ValueError: `at` is none of these.

    Examples:
      >>> edit = gpt2_jax.replace(0.0, where=jnp.array([True, False]))
      >>> edit(jnp.array([3.0, 4.0])).tolist()
      [0.0, 4.0]
      >>> last = gpt2_jax.replace(0.0, at=[3])  # at position 3 of the text alone
      >>> logits = gpt2_jax.patch(params, ids, config=config, edits={"h.0.mlp.out": last})
      >>> np.allclose(logits[:, :3], gpt2_jax.apply(params, ids, config=config)[:, :3], atol=1e-5)
      True
    """
    return Change((value, where), _checked_at(at), _replace)


def add(vector: ArrayLike, strength: ArrayLike = 1.0, *, at: Positions | None = None) -> Edit:
    """Returns the edit that adds `strength * vector`, which broadcasts to the activation.

    With `at`, at these positions of the text: see `replace`.

    Raises:
      ValueError: as `replace`.

    Examples:
      >>> gpt2_jax.add(jnp.array([1.0, 2.0]), 10.0)(jnp.zeros(2)).tolist()
      [10.0, 20.0]
    """
    return Change((vector, strength), _checked_at(at), _add)


def _checked_at(at: Any) -> Any:
    """Returns positions as an array, None as it is."""
    if at is None:
        return None
    if not isinstance(at, jax.Array):
        at = np.asarray(at)
    if at.ndim > 2 or not jnp.issubdtype(at.dtype, jnp.integer):
        got = f"{at.dtype} of shape {list(at.shape)}"
        raise ValueError(f"`at` must be integers of shape [N] or [B, N], got {got}.")
    at = jnp.atleast_1d(at) if isinstance(at, jax.Array) else np.atleast_1d(at)
    if not isinstance(at, Tracer):
        _check_positions(at)
    return at


def _check_positions(at: AnyArray) -> None:
    """Raises `ValueError` for positions that no text has, or that come twice."""
    for row in np.atleast_2d(at):
        if (row < 0).any():
            raise ValueError(f"`at` must be positions, from 0 on, got {row.min()}.")
        if len(np.unique(row)) < len(row):
            raise ValueError(f"`at` must hold each position once, got {row.tolist()}.")


def _check_context(at: AnyArray, config: GPT2Config) -> None:
    """Raises `ValueError` for a position beyond a model's last."""
    if isinstance(at, Tracer) or not at.size:
        return
    if np.max(at) >= config.n_positions:
        expected = f"less than {config.n_positions} (`n_positions`)"
        raise ValueError(f"`at` must be {expected}, got {np.max(at)}.")


def _replace(value: ArrayLike, where: ArrayLike, x: Array) -> Array:
    value = jnp.asarray(value, x.dtype)
    # Broadcast by hand, for programs that forbid ranks to be promoted in silence.
    value = jnp.broadcast_to(value, x.shape)
    where = jnp.broadcast_to(where, x.shape)
    return jnp.where(where, value, x)


def _add(vector: ArrayLike, strength: ArrayLike, x: Array) -> Array:
    # Multiplied before the cast: in bfloat16 the strength would lose digits of its own.
    offset = jnp.asarray(vector * strength, x.dtype)
    return x + jnp.broadcast_to(offset, x.shape)


def axis_masks(site: str, over: str, length: int, *, config: GPT2Config) -> Bool[Array, "N ..."]:
    """Returns a mask for each index along some axes of an activation of texts of `length` tokens.

    For "h.0.attn.z", whose axes are B T H K, and `over="H"` these are `bool[H, 1, H, 1]`, the `n`th
    true at head `n`; `over="TH"` gives `bool[T * H, T, H, 1]`, and `over=""` one mask that is true
    everywhere.

    Raises:
      ValueError: the site does not exist, or `over` is not axes of it in their order, without B.

    Examples:
      >>> masks = gpt2_jax.axis_masks("h.0.attn.z", "H", 4, config=config)
      >>> masks.shape, masks[1, 0, :, 0].tolist()  # [N, T, H, K]
      ((2, 1, 2, 1), [False, True])
    """
    axes = site_axes(site, config)[1:]
    in_order = [axis for axis in axes if axis in over]
    if in_order != list(over):
        raise ValueError(
            f"`over` must be axes of {site} in their order, of {''.join(axes)!r}; got {over!r}."
        )
    sizes = {
        "T": length,
        "S": length,
        "H": config.n_head,
        "K": config.head_dim,
        "D": config.n_embd,
        "F": config.mlp_width,
        "V": config.vocab_size,
        "1": 1,
    }
    shape = [sizes[axis] if axis in over else 1 for axis in axes]
    # Row `n` of the identity, seen in the activation's shape, is true at the `n`th index alone.
    masks = jnp.eye(math.prod(shape), dtype=bool)
    return masks.reshape(-1, *shape)


# Activations, once they are there.


@automatic
def by_layer(acts: Mapping[str, ArrayLike], site: str) -> Shaped[Array, "L ..."]:
    """Returns the activations of a site, such as "attn.z", in every layer that was captured."""
    layers = {}
    for name, x in acts.items():
        match = re.fullmatch(rf"h\.(\d+)\.{site}", name)
        if match:
            layers[int(match[1])] = x
    # By number: as text, "10" comes before "2".
    return jnp.stack([layers[layer] for layer in sorted(layers)])


@automatic
def at_last_token(
    x: Float[Array, "B T ..."], lengths: Int[ArrayLike, " B"] | None = None
) -> Float[Array, "B ..."]:
    """Returns what stands at each row's last token: the last column, or that before its padding."""
    if lengths is None:
        return x[:, -1]
    rows = jnp.arange(len(x))
    last = jnp.asarray(lengths) - 1
    return x[rows, last]
