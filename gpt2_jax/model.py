"""GPT-2's forward pass as pure functions over params.

Nothing but `init` compiles itself: wrap what you call in `jax.jit`. A `GPT2Config` is static by
itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from gpt2_jax import cache as kv_cache
from gpt2_jax import quantised
from gpt2_jax.cache import KVCache, LayerCache
from gpt2_jax.config import GPT2Config
from gpt2_jax.inputs import (
    Layout,
    Tokens,
    check_ids,
    check_side,
    check_stream,
    last_token,
    left_padded,
    read_layout,
    read_tokens,
)
from gpt2_jax.modules import (
    GPT2,
    Blocks,
    Params,
    Pass,
    Tap,
    checked_remat,
    no_tap,
    placed,
    prefixed,
    wide_dtype,
)
from gpt2_jax.products import table_product
from gpt2_jax.quantised import Quantised
from gpt2_jax.sharding import (
    BATCH_AXES,
    TENSOR,
    Rules,
    automatic,
    constrain,
    n_parts,
    shardings,
)
from gpt2_jax.stack import is_stacked

_STACK = (
    "The layers of `params` are a stack, which serves whole texts alone: neither taps nor caches,"
    " nor `scale_attn_by_inverse_layer_idx`. `unstack_layers` gives the layers back."
)


def init(
    key: PRNGKeyArray,
    config: GPT2Config,
    *,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Params:
    """Returns fresh params, initialised as GPT-2 was (HF's `_init_weights`). Compiles itself.

    Weights are N(0, `initializer_range`), those of the projections into the residual stream divided
    by `sqrt(2 * n_layer)`; biases are zero and LayerNorms the identity. Leaves are float32, or
    float64 when `config.dtype` is.

    Args:
      key: the key of all draws.
      config: the model's configuration.
      mesh: devices to spread the params over. Each makes its own part, of the same numbers.
      rules: where params lie on the mesh: see `sharding.shardings`.

    Raises:
      ValueError: the params do not divide by the mesh's devices, or `rules` come without a mesh.

    Examples:
      >>> fresh = gpt2_jax.init(jax.random.key(0), config)
      >>> sorted(fresh), fresh["h"]["1"]["mlp"]["c_fc"]["kernel"].shape
      (['h', 'ln_f', 'wpe', 'wte'], (16, 64))
    """
    if mesh is None:
        if rules is not None:
            raise ValueError("`rules` say where params lie on a mesh: give `mesh`, too.")
        return _init(key, config)
    places = shardings(jax.eval_shape(_init, key, config), mesh, rules)
    return jax.jit(_init, out_shardings=places)(key, config)


# As one program: linen's `init` runs the forward pass too, and XLA drops what nobody uses.
@jax.jit
def _init(key: PRNGKeyArray, config: GPT2Config) -> Params:
    """Returns fresh params."""
    # Split for a tied model too: of one key, both kinds get the same body.
    body_key, head_key = jax.random.split(key)
    # One token will do, as the shape of no parameter depends on the text.
    ids = jnp.zeros((1, 1), jnp.int32)
    mask = jnp.ones((1, 1, 1, 1), bool)
    variables: Any = GPT2(config).init(body_key, ids, Pass(positions=ids, mask=mask))
    params = variables["params"]
    if not config.tie_word_embeddings:
        shape = (config.vocab_size, config.n_embd)
        noise = jax.random.normal(head_key, shape, wide_dtype(config))
        # HF draws an untied head like any other matrix.
        params["lm_head"] = {"embedding": config.initializer_range * noise}
    return params


@automatic
def apply(
    params: Params,
    ids: Int[ArrayLike, "B T"] | None,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    padding_side: str = "right",
    positions: Int[ArrayLike, "#B T"] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    inputs_embeds: Float[ArrayLike, "B T D"] | None = None,
    tap: Tap = no_tap,
    dropout_key: PRNGKeyArray | None = None,
    remat: str | bool = "none",
) -> Float[Array, "B T V"]:
    """Returns next-token logits of every position, in float32 (float64 in a float64 model).

    Does not compile itself.

    Args:
      params: the parameters, as `init` or `load` return them.
      ids: token ids. Padding may hold any id of the vocabulary.
      lengths: how many ids of each row are real. Needed only for left-padded rows: padding on the
        right comes after everything that a real token sees. Logits at padding are meaningless.
      config: the model's configuration.
      padding_side: "right" or "left", where the padding is.
      positions: each token's position, `[B, T]` or `[1, T]`, in the place of 0, 1, 2, ... (HF's
        `position_ids`). They change no mask: several texts to a row are `segment_ids`.
      mask: booleans, or 0 and 1. `[B, T]`: the tokens that others may see, each still seeing none
        after itself (HF's `attention_mask`; it moves no position). `[B, 1, T, T]`, also with 1 row
        or H heads: which keys each query sees, in the place of the causal rule.
      segment_ids: several texts to a row: each run of equal numbers is one. A token sees those of
        its text alone, and positions begin anew with each.
      inputs_embeds: what the table of embeddings would give, in the place of `ids`, which must be
        None then.
      tap: called as `tap(site, activation)` at every site; what it returns takes the activation's
        place. See `gpt2_jax.interpretability.sites` for the sites, and `taps` beside it for the
        methods that a tap may have, and for `capture` and `patch`, which are easier.
      dropout_key: turns dropout on.
      remat: what a backward pass recomputes of each layer instead of keeping it: "none"; "dots",
        all but what dense layers give; or "full", all. True is "full".

    Raises:
      ValueError: `ids` is not an integer array `[B, T]`, is longer than `n_positions`, or (where
        its values can be seen, outside `jit`) holds an id outside the vocabulary. Inside `jit` such
        an id gives NaN. Or rows are left-padded and `lengths` are missing, or what says where
        tokens lie has another shape or kind or contradicts the rest.

    Examples:
      >>> logits = gpt2_jax.apply(params, ids, config=config)
      >>> logits.shape
      (1, 4, 4096)
      >>> shorter = gpt2_jax.apply(params, ids[:, :3], config=config)  # no token sees a later one
      >>> np.allclose(logits[:, :3], shorter, atol=1e-5)
      True
    """
    tokens = read_tokens(ids, inputs_embeds, config=config, longest=config.n_positions)
    layout = Layout(positions, mask, segment_ids)
    shared = _read_rows(tokens, lengths, padding_side, layout, config)
    hidden, _ = forward(
        params, tokens, shared, config=config, tap=tap, dropout_key=dropout_key, remat=remat
    )
    # Tapped here, not in the modules, whose last site is the final LayerNorm's.
    tap = placed(tap, shared.positions)
    return tap("logits", unembed(params, hidden, config=config))


@automatic
def hidden_states(
    params: Params,
    ids: Int[ArrayLike, "B T"] | None,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    padding_side: str = "right",
    positions: Int[ArrayLike, "#B T"] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    inputs_embeds: Float[ArrayLike, "B T D"] | None = None,
    tap: Tap = no_tap,
    dropout_key: PRNGKeyArray | None = None,
    remat: str | bool = "none",
) -> Float[Array, "rows T D"]:
    """Returns what `apply` would unembed, in `config.dtype`: its arguments, its errors.

    There are as many rows as in `ids`, unless a tap makes the batch grow. Does not compile itself.

    Examples:
      >>> hidden = gpt2_jax.model.hidden_states(params, ids, config=config)
      >>> hidden.shape
      (1, 4, 16)
    """
    tokens = read_tokens(ids, inputs_embeds, config=config, longest=config.n_positions)
    layout = Layout(positions, mask, segment_ids)
    shared = _read_rows(tokens, lengths, padding_side, layout, config)
    hidden, _ = forward(
        params, tokens, shared, config=config, tap=tap, dropout_key=dropout_key, remat=remat
    )
    return hidden


def _read_rows(
    tokens: Tokens,
    lengths: Int[ArrayLike, " B"] | None,
    padding_side: str,
    layout: Layout,
    config: GPT2Config,
) -> Pass:
    """Returns positions and mask of rows that are read from their start."""
    check_side(padding_side)
    # Padding on the right needs nothing: no real token sees what comes after it.
    if padding_side == "left":
        return left_padded(lengths, tokens.shape[1], layout)
    return read_layout(layout, tokens.shape[:2], config=config)


@automatic
def run_layers(
    params: Params,
    stream: Float[ArrayLike, "B T D"],
    *,
    config: GPT2Config,
    start: int = 0,
    stop: int | None = None,
    positions: Int[ArrayLike, "#B T"] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    tap: Tap = no_tap,
) -> Float[Array, "rows T D"]:
    """Returns the residual stream after layers `start` to `stop - 1`, from that before the first.

    It goes on from what `capture` found at `h.{start}.resid_pre`, or `embed`. With `stream_logits`
    behind the last layer it is the rest of `apply`. Does not compile itself.

    Args:
      params: the parameters; those of other layers are not read.
      stream: the residual stream of right-padded texts.
      config: the model's configuration.
      start: the first layer to run.
      stop: the layer to stop before; by default all layers are run.
      positions, mask, segment_ids: see `apply`. Positions are in the stream already: they say here
        where edits at positions belong.
      tap: see `apply`.

    Raises:
      ValueError: `stream` is not `[B, T, D]`, there are no such layers, or as `apply`.

    Examples:
      >>> _, acts = gpt2_jax.capture(params, ids, config=config, sites="h.1.*")
      >>> stream = gpt2_jax.run_layers(params, acts["h.1.resid_pre"], config=config, start=1)
      >>> np.allclose(stream, acts["h.1.resid_post"], atol=1e-5)
      True
    """
    if is_stacked(params):
        raise ValueError(_STACK)
    stream = check_stream("stream", stream, config, longest=config.n_positions)
    end = config.n_layer if stop is None else stop
    if not 0 <= start <= end <= config.n_layer:
        expected = f"0 <= `start` <= `stop` <= {config.n_layer} (`n_layer`)"
        raise ValueError(f"Layers must be {expected}, got {start} and {end}.")
    layout = Layout(positions, mask, segment_ids)
    shared = read_layout(layout, stream.shape[:2], config=config)
    tap = prefixed(placed(tap, shared.positions), "h")
    layers = range(start, end)
    # Linen refuses params that no module takes.
    taken = {str(layer): params["h"][str(layer)] for layer in layers}
    blocks = Blocks(config, layers)
    out: Any = blocks.apply(
        {"params": taken}, stream.astype(config.dtype), shared, tap, key=None, remat="none"
    )
    return out[0]


@automatic
def prefill(
    params: Params,
    ids: Int[ArrayLike, "B P"] | None,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    cache_len: int | None = None,
    positions: Int[ArrayLike, "#B P"] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    segment_ids: Int[ArrayLike, "B P"] | None = None,
    inputs_embeds: Float[ArrayLike, "B P D"] | None = None,
    tap: Tap = no_tap,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads right-padded prompts; returns the logits after each row's last token, and the cache.

    Does not compile itself.

    Args:
      params: the parameters.
      ids: token ids, padded on the right with any id of the vocabulary.
      lengths: how many ids of each row are real, at least 1; all of them by default.
      config: the model's configuration.
      cache_len: `S`, slots to make room for, at least `P`; `n_positions` by default.
      positions, mask, segment_ids, inputs_embeds: see `apply`. Tokens that are read later see what
        the row's last token sees, and take the positions behind its own.
      tap: see `apply`.

    Raises:
      ValueError: as `apply`, or `cache_len` is less than `P`.

    Examples:
      >>> logits, cache = gpt2_jax.prefill(params, ids, config=config, cache_len=8)
      >>> np.allclose(logits, gpt2_jax.apply(params, ids, config=config)[:, -1], atol=1e-5)
      True
      >>> cache.slots, int(cache.slot), cache.lengths.tolist()
      (8, 4, [4])
    """
    if is_stacked(params):
        raise ValueError(_STACK)
    tokens = read_tokens(ids, inputs_embeds, config=config, longest=config.n_positions)
    n_rows, width = tokens.shape[:2]
    slots = config.n_positions if cache_len is None else cache_len
    if slots < width:
        raise ValueError(f"`cache_len` must be at least the {width} columns of `ids`, got {slots}.")
    if lengths is None:
        lengths = jnp.full(n_rows, width, jnp.int32)
    # Whatever came: lengths go into the cache, whose dtypes must not change within a loop.
    lengths = jnp.asarray(lengths, jnp.int32)
    layout = Layout(positions, mask, segment_ids)
    shared = read_layout(layout, (n_rows, width), config=config)
    hidden, layers = forward(params, tokens, shared, config=config, tap=tap)
    # The head is the largest product of all: it is computed for the last tokens alone.
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]  # [B, D]
    if tap is not no_tap:
        # Not without a tap: the gather would be a part of every program.
        tap = placed(tap, _last_positions(shared.positions, lengths))
    logits = tap("logits", unembed(params, last, config=config))
    cache = kv_cache.of_prompts(layers, lengths, slots)
    if not layout.is_plain:
        seen, position = last_token(shared, lengths)
        cache = kv_cache.see_only(cache, seen, position + 1)
    return logits, cache


@automatic
def extend(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    cache: KVCache,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    tap: Tap = no_tap,
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Reads `T` more tokens of each row onto a cache; returns the logits after each, and the cache.

    Does not compile itself.

    Args:
      params: the parameters.
      ids: token ids, padded on the right with any id of the vocabulary.
      cache: what was read before, with `T` free slots behind `cache.slot`: `lengthen` makes room.
      lengths: how many of the new ids of each row are real; all of them by default. Logits at
        padding are meaningless.
      config: the model's configuration.
      tap: see `apply`.

    Raises:
      ValueError: `ids` are not as `apply` takes them, or (where values can be seen, outside `jit`)
        the cache has too few slots left or a row too few positions. Inside `jit` that is the
        caller's to see to: a slot too many overwrites the last ones.

    Examples:
      >>> _, cache = gpt2_jax.prefill(params, ids[:, :1], config=config, cache_len=8)
      >>> logits, cache = gpt2_jax.extend(params, ids[:, 1:], cache, config=config)
      >>> np.allclose(logits, gpt2_jax.apply(params, ids, config=config)[:, 1:], atol=1e-5)
      True
      >>> cache.lengths.tolist()
      [4]
    """
    ids = check_ids(ids, config, longest=config.n_positions)
    count = ids.shape[1] if lengths is None else jnp.asarray(lengths, jnp.int32)
    kv_cache.check_room(cache, ids.shape[1], count, config=config)
    hidden, longer = read_on(params, ids, cache, count, config=config, tap=tap)
    if tap is not no_tap:
        tap = placed(tap, _next_positions(cache, ids.shape[1], config))
    return tap("logits", unembed(params, hidden, config=config)), longer


@automatic
def read_on(
    params: Params,
    ids: Int[Array, "B T"],
    cache: KVCache,
    count: int | Int[Array, " B"],
    *,
    config: GPT2Config,
    tap: Tap = no_tap,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Returns the hidden states of more tokens, of which `count` are real, and the longer cache."""
    n_tokens = ids.shape[1]
    shared = Pass(
        positions=_next_positions(cache, n_tokens, config),
        mask=kv_cache.visible(cache, n_tokens),
        past=cache.layers,
        slot=cache.slot,
    )
    hidden, layers = forward(params, ids, shared, config=config, tap=tap)
    return hidden, kv_cache.n_written(cache, layers, count)


def _next_positions(cache: KVCache, n_tokens: int, config: GPT2Config) -> Int[Array, "B T"]:
    """Returns the positions of the next tokens of each row."""
    positions = cache.lengths[:, None] + jnp.arange(n_tokens)[None]
    # What stands beyond the context is looked up all the same, and must not read NaN into the
    # cache.
    return jnp.minimum(positions, config.n_positions - 1)


def _last_positions(positions: Int[Array, "#B T"], lengths: Int[Array, " B"]) -> Int[Array, "B 1"]:
    """Returns the position of each row's last token."""
    of_rows = jnp.broadcast_to(positions, (len(lengths), positions.shape[1]))
    return jnp.take_along_axis(of_rows, lengths[:, None] - 1, axis=1)


@automatic
def decode_step(
    params: Params,
    tokens: Int[Array, " B"],
    cache: KVCache,
    *,
    config: GPT2Config,
    tap: Tap = no_tap,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads one more token of each row; returns the logits after it, and the cache that holds it.

    The cache must have a free slot, and each row a free position: that is the caller's to see to.
    Does not compile itself.

    Examples:
      >>> _, cache = gpt2_jax.prefill(params, ids[:, :3], config=config, cache_len=8)
      >>> logits, cache = gpt2_jax.decode_step(params, jnp.array(ids[:, 3]), cache, config=config)
      >>> np.allclose(logits, gpt2_jax.apply(params, ids, config=config)[:, -1], atol=1e-5)
      True
    """
    shared = Pass(
        # Not bounded as in `extend`: what has no position left is its caller's to see to.
        positions=cache.lengths[:, None],
        mask=kv_cache.visible(cache, 1),
        past=cache.layers,
        slot=cache.slot,
    )
    hidden, layers = forward(params, tokens[:, None], shared, config=config, tap=tap)
    tap = placed(tap, shared.positions)
    logits = tap("logits", unembed(params, hidden[:, 0], config=config))
    return logits, kv_cache.n_written(cache, layers, 1)


@automatic
def unembed(
    params: Params, hidden: Float[Array, "... D"], *, config: GPT2Config
) -> Float[Array, "... V"]:
    """Returns logits of final hidden states, in float32 or better, by the tied or separate head.

    Does not compile itself.

    Examples:
      >>> _, acts = gpt2_jax.capture(params, ids, config=config, sites="ln_f.out")
      >>> logits = gpt2_jax.unembed(params, acts["ln_f.out"], config=config)
      >>> np.allclose(logits, gpt2_jax.apply(params, ids, config=config), atol=1e-5)
      True
    """
    tokens = hidden.reshape(-1, hidden.shape[-1]).astype(config.dtype)  # flat, as in `Dense`
    head = params[head_name(config)]["embedding"]
    if isinstance(head, Quantised):
        logits = quantised.product(tokens, gathered(head), config.precision)
    else:
        logits = table_product(
            tokens,
            gathered(head.astype(config.dtype)),
            # Out of the product itself: rounded to 16 bits first, logits would tie that differ.
            dtype=wide_dtype(config),
            precision=config.precision,
        )
    logits = logits.reshape(*hidden.shape[:-1], logits.shape[-1])
    between = [None] * (logits.ndim - 2)
    return constrain(logits, BATCH_AXES, *between, TENSOR)


def head_matrix(params: Params, *, config: GPT2Config) -> Float[Array, "V D"]:
    """Returns the matrix of the head, tied or separate."""
    return quantised.rows_of(params[head_name(config)]["embedding"])


def head_name(config: GPT2Config) -> str:
    """Returns the name of the table that is the head."""
    # Tied, there is no second array: what both uses of the one learn adds up in its gradient.
    return "wte" if config.tie_word_embeddings else "lm_head"


def gathered(table: Any) -> Any:
    """Returns a table of embeddings with what is spread along `fsdp` on all of its devices."""
    if isinstance(table, Quantised):
        return Quantised(gathered(table.values), constrain(table.scale, TENSOR))
    # As the rules have it: by width where the vocabulary does not divide.
    by_token = n_parts(table, TENSOR, len(table)) > 1
    return constrain(table, TENSOR) if by_token else constrain(table, None, TENSOR)


@automatic
def token_logprobs_of(
    logits: Float[Array, "... V"], tokens: Int[Array, "..."]
) -> Float[Array, "..."]:
    """Returns the log-probability of each token under its logits, in nats and their dtype."""
    # Not by `log_softmax`, which would make as many numbers anew to take one of each row.
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def forward(
    params: Params,
    tokens: Tokens,
    shared: Pass,
    *,
    config: GPT2Config,
    tap: Tap = no_tap,
    dropout_key: PRNGKeyArray | None = None,
    remat: str | bool = "none",
) -> tuple[Float[Array, "rows T D"], tuple[LayerCache, ...]]:
    """Returns the final hidden states and each layer's keys and values: see `modules.GPT2`."""
    # Linen refuses params that no module takes; a separate head is `unembed`'s, and others that
    # were loaded with the model are their users'.
    body = {name: leaf for name, leaf in params.items() if name not in ("lm_head", "heads")}
    body["wte"] = {"embedding": gathered(body["wte"]["embedding"])}
    body["wpe"] = jax.tree.map(constrain, body["wpe"])
    if is_stacked(params):
        _check_stack_serves(shared, tap, config)
    model = GPT2(config)
    tap = placed(tap, shared.positions)
    # Linen's type says what any module might return.
    out: Any = model.apply(
        {"params": body},
        tokens,
        shared,
        tap=tap,
        dropout_key=dropout_key,
        remat=checked_remat(remat),
    )
    return out


def _check_stack_serves(shared: Pass, tap: Tap, config: GPT2Config) -> None:
    """Raises `ValueError` for what needs to know the layers of a stack apart."""
    by_layer = tap is not no_tap or shared.past is not None
    if by_layer or config.scale_attn_by_inverse_layer_idx:
        raise ValueError(_STACK)
