"""Transforms that carry a state, and what stands on them: constraints and second models."""

import itertools
import json
import re
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gpt2_jax
from gpt2_jax import (
    Categorical,
    Chain,
    Greedy,
    History,
    Stateful,
    Tokenizer,
    TopK,
    beam_search,
    from_json_schema,
    from_regex,
    generate,
)
from gpt2_jax.generation.guided import Contrastive, Guidance, Reading
from gpt2_jax.pytrees import dataclass
from tests.reference import TINY, assert_near, hf_model, ours

NEW = 6
apply = jax.jit(gpt2_jax.apply)


@pytest.fixture(scope="module")
def models():
    model = hf_model(**(TINY | {"n_layer": 1}))
    return model, *ours(model)


@pytest.fixture(scope="module")
def demo():
    """One layer of it, which compiles sooner and writes worse."""
    config, params, tokenizer = gpt2_jax.load_pretrained("demo")
    return config.replace(n_layer=1), params | {"h": {"0": params["h"]["0"]}}, tokenizer


@pytest.fixture
def prompts(rng):
    return rng.integers(1, 61, (2, 6)), np.array([6, 4])


# The protocol.


@dataclass
class Sum(Stateful):
    """Carries the sum of all ids so far, and makes NaN of logits where the history has another."""

    scale: float = 1.0

    def init(self, ids, lengths, room):
        is_text = jnp.arange(ids.shape[1])[None] < lengths[:, None]
        return jnp.where(is_text, ids, 0).sum(axis=1)

    def update(self, state, tokens):
        return state + tokens

    def __call__(self, logits, history=None):
        carried = self.state_in(history)
        read_again = jnp.where(history.valid, history.ids, 0).sum(axis=1)
        agrees = carried == read_again
        return jnp.where(agrees[:, None], logits * self.scale, jnp.nan)


# Some carry a state, and some do not.
SUMS = Chain((TopK(50), Sum(0.7), Chain((Sum(0.9),))))


def test_a_state_follows_its_row_as_the_history_does(models, prompts):
    _, config, params = models
    options = {"config": config, "max_new_tokens": NEW, "num_return_sequences": 2}
    options |= {"sampler": Categorical(SUMS), "stop_ids": (3,)}
    key = jax.random.key(1)
    found = generate(params, *prompts, key, **options)
    assert np.isfinite(found.policy_logprobs).all() and found.policy_logprobs.any(axis=1).all()
    # Onto a cache as well, of which the state's prompts are whole all the same.
    _, past = gpt2_jax.prefill(params, prompts[0][:, :3], config=config)
    onto = generate(params, *prompts, key, cache=past, **(options | {"max_new_tokens": 1}))
    np.testing.assert_array_equal(onto.ids, found.ids[:, :1])
    np.testing.assert_allclose(onto.policy_logprobs, found.policy_logprobs[:, :1], atol=1e-6)


def test_a_state_follows_its_beam(models, prompts):
    _, config, params = models
    options = {"config": config, "max_new_tokens": NEW, "num_beams": 4, "num_return_sequences": 3}
    found = beam_search(params, *prompts, sampler=Greedy(SUMS), **options)
    assert np.isfinite(found.scores).all() and (found.lengths > 0).all()
    # Beams come from several of those before, or no state would have had to follow.
    assert len({tuple(row[:3]) for row in np.asarray(found.ids[0])}) > 1


def test_who_cannot_carry_a_state_says_so(models, prompts):
    _, config, params = models
    sampler = Greedy(SUMS)
    options = {"config": config, "sampler": sampler}
    with pytest.raises(ValueError, match="Speculation cannot carry the state of a transform"):
        gpt2_jax.speculate(params, *prompts, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match='`overflow="slide"`, .* cannot carry the state'):
        generate(params, *prompts, max_new_tokens=30, overflow="slide", **options)
    with pytest.raises(ValueError, match="A conversation cannot carry the state"):
        gpt2_jax.Conversation(params, Tokenizer.gpt2(), **options)
    with pytest.raises(ValueError, match="Sum carries a state: `history.state` must be what"):
        sampler(None, jnp.zeros((1, 61)))


# Constraints.


@cache
def library():
    """Skips where the extra is not installed."""
    return pytest.importorskip("outlines_core")


def texts_of(tokenizer, out):
    """The texts without their stop ids, of those that have ended."""
    ids = np.asarray(out.ids).reshape(-1, out.ids.shape[-1])
    lengths = np.asarray(out.lengths).ravel()
    rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    assert all(row[-1] == tokenizer.eot_id for row in rows)
    return [tokenizer.decode(row[:-1]) for row in rows]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["girl", "café"]},
        "old": {"type": "boolean"},
    },
    "required": ["name", "kind", "old"],
}


def test_all_texts_are_of_the_form(demo):
    library()
    config, params, tokenizer = demo
    ids = [tokenizer.encode("Once upon a time there was a")]
    regex = r" (girl|boy) (called|named) [A-Zé][a-zéü]{1,4}[.!]"
    name = from_regex(regex, tokenizer)
    # Drawn from flat distributions, in which all that may come does.
    flat = Categorical(Chain((from_json_schema(SCHEMA, tokenizer), gpt2_jax.Temperature(3.0))))
    options = {"config": config, "max_new_tokens": 60, "num_return_sequences": 12}
    drawn = generate(params, ids, None, jax.random.key(0), sampler=flat, **options)
    texts = texts_of(tokenizer, drawn)
    assert len(set(texts)) > 6 and all(map(is_of_schema, texts)), texts
    options = {"config": config, "max_new_tokens": 20, "sampler": Greedy(name)}
    beams = beam_search(params, ids, num_beams=3, num_return_sequences=3, **options)
    found = texts_of(tokenizer, beams)
    assert len(set(found)) == 3
    assert all(re.fullmatch(regex, text) for text in found), found


def is_of_schema(text):
    value = json.loads(text)
    return (
        list(value) == ["name", "kind", "old"]
        and len(value["name"]) <= 6
        and value["kind"] in ("girl", "café")
        and isinstance(value["old"], bool)
    )


BYTES = Tokenizer(
    {"a": 0, "b": 1, "c": 2, "ab": 3, "Ã": 4, "©": 5, "ca": 6},
    [("a", "b"), ("c", "a")],
    {"<|endoftext|>": 7},
)


@pytest.mark.parametrize("pattern", ["(ab|c)*", "a?[bc]{2}", "é+a", "abca|abb?"])
def test_exactly_the_tokens_that_can_lead_to_a_match_are_left(pattern):
    library()
    transform = from_regex(pattern, BYTES)
    vocabulary = [BYTES.decode_bytes([id]) for id in range(7)]
    size = 9  # more rows of a model's table than there are tokens
    whole = re.compile(pattern)
    # All texts that match, of up to six bytes.
    alphabet = ["a", "b", "c", "é"]
    lengths = range(7)
    strings = ("".join(s) for n in lengths for s in itertools.product(alphabet, repeat=n))
    matching = {s.encode() for s in strings if whole.fullmatch(s)}
    # Jitted: outside, its loop would compile at each call.
    update = jax.jit(transform.update)
    for ids in itertools.product(range(7), repeat=2):
        state = transform.init(jnp.zeros((1, 3), int), jnp.array([3]), None)
        text = b""
        for token in ids:
            history = History(None, None, None, state)
            left = np.isfinite(transform(jnp.zeros((1, size)), history))[0]
            expected = [any(m.startswith(text + word) for m in matching) for word in vocabulary]
            assert left.tolist() == [*expected, text in matching, False], (pattern, text)
            if not expected[token]:
                break
            text += vocabulary[token]
            state = update(state, jnp.array([token], jnp.int32))


def test_what_cannot_be_a_constraint_is_named(monkeypatch):
    library()
    with pytest.raises(ValueError, match=r"`pattern` must be a regular expression, got '\(a'"):
        from_regex("(a", BYTES)
    with pytest.raises(ValueError, match="No text of this vocabulary matches `pattern` 'd'"):
        from_regex("d", BYTES)
    with pytest.raises(ValueError, match="`schema` must be a JSON schema"):
        from_json_schema({"type": "colour"}, BYTES)
    without_end = Tokenizer({"a": 0}, [])
    with pytest.raises(ValueError, match="`stop_ids` must hold what ends a text"):
        from_regex("a", without_end)
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(ImportError, match=r'pip install "gpt2_jax\[constrained\]"'):
        from_regex("a", BYTES)


def allowed_after(prompt, ids):
    """Some ids that depend on the prompt and on the text."""
    return sorted({(int(ids[-1]) * step + prompt) % 61 for step in (1, 7, 11, 13, 17)})


@pytest.mark.parametrize("num_beams", [1, 3])
def test_allowed_prefixes_are_hfs(models, num_beams):
    model, config, params = models
    ids = np.random.default_rng(3).integers(1, 61, (2, 6))
    theirs = model.generate(
        torch.tensor(ids),
        attention_mask=torch.ones(ids.shape, dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=num_beams,
        eos_token_id=None,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda prompt, ids: allowed_after(prompt, ids.tolist()),
    )
    sampler = Greedy(gpt2_jax.PrefixAllowedTokens(allowed_after))
    options = {"config": config, "max_new_tokens": NEW, "stop_ids": (), "sampler": sampler}
    if num_beams == 1:
        made = generate(params, ids, **options).ids
    else:
        made = beam_search(params, ids, num_beams=num_beams, **options).ids[:, 0]
    np.testing.assert_array_equal(made, theirs[:, 6:])


# Second models.


@pytest.mark.parametrize("has_other", [False, True])
def test_guidance_is_hfs(models, has_other):
    model, config, params = models
    ids = np.random.default_rng(4).integers(1, 61, (2, 6))
    other = np.random.default_rng(5).integers(1, 61, (2, 3)) if has_other else None
    n_new = NEW if has_other else 1
    theirs = model.generate(
        torch.tensor(ids),
        attention_mask=torch.ones(ids.shape, dtype=torch.long),
        max_new_tokens=n_new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        guidance_scale=2.5,
        negative_prompt_ids=None if other is None else torch.tensor(other),
        output_scores=True,
        return_dict_in_generate=True,
    )
    out = generate(
        params,
        ids,
        config=config,
        max_new_tokens=n_new,
        stop_ids=(),
        sampler=Greedy(Guidance(params, config, 2.5, other)),
        outputs="scores",
    )
    np.testing.assert_array_equal(out.ids, theirs.sequences[:, 6:])
    assert_near(out.outputs["scores"], torch.stack(theirs.scores, dim=1), 1e-5)


def test_contrast_is_its_definition(models, prompts):
    _, config, params = models
    amateur = jax.tree.map(lambda x: 0.6 * x, params)
    transform = Contrastive(amateur, config, alpha=0.3, temperature=0.5)
    options = {"config": config, "max_new_tokens": NEW, "stop_ids": ()}
    key = jax.random.key(2)
    out = generate(
        params,
        *prompts,
        key,
        sampler=Categorical(transform),
        num_return_sequences=2,
        outputs=("logits", "scores"),
        **options,
    )
    whole, lengths = gpt2_jax.join(*prompts, out)
    small_logits = apply(amateur, whole, config=config)
    for row, length in enumerate(np.asarray(lengths) - NEW):
        expert = jax.nn.log_softmax(out.outputs["logits"][row])
        seen = small_logits[row, length - 1 : length - 1 + NEW]
        contrast = expert - jax.nn.log_softmax(seen / 0.5)
        plausible = np.exp(expert) >= 0.3 * np.exp(expert).max(axis=-1, keepdims=True)
        expected = np.where(plausible, contrast, -np.inf)
        np.testing.assert_allclose(out.outputs["scores"][row], expected, atol=1e-9)


def test_a_second_model_that_does_not_fit_is_named(models, prompts):
    _, config, params = models
    options = {"config": config, "max_new_tokens": NEW}
    short = Contrastive(params, config.replace(n_positions=8))
    with pytest.raises(ValueError, match="of Contrastive must have 12 positions .* it has 8"):
        generate(params, *prompts, sampler=Greedy(short), **options)
    with pytest.raises(ValueError, match=r"`ids` of Guidance must be of shape \[1, P\] or \[2, P"):
        generate(params, *prompts, sampler=Greedy(Guidance(params, config, 2.0, [3])), **options)
    other = Reading(jnp.zeros((1, 5)), None)
    with pytest.raises(ValueError, match="must have the model's 61 tokens, it has 5"):
        Guidance(params, config, 2.0)(jnp.zeros((1, 61)), History(None, None, None, other))


# Taps.


@dataclass
class PerRow:
    """A tap that adds to the stream of each row its own vector."""

    vectors: jax.Array

    def __call__(self, site, x):
        return x + self.vectors[:, None] if site == "h.0.resid_post" else x

    def wants(self, site):
        return site == "h.0.resid_post"

    def repeated(self, n):
        return PerRow(jnp.repeat(self.vectors, n, axis=0))


@dataclass
class ScaledMLP:
    """A tap that multiplies what the MLP writes."""

    factor: float

    def __call__(self, site, x):
        return self.factor * x if site == "h.0.mlp.out" else x


def test_searches_of_a_tapped_model_are_those_of_an_edited_one(models, prompts):
    _, config, params = models
    edited = jax.tree.map(lambda x: x, params)
    projection = edited["h"]["0"]["mlp"]["c_proj"]
    edited["h"]["0"]["mlp"]["c_proj"] = jax.tree.map(jnp.zeros_like, projection)
    options = {"config": config, "max_new_tokens": 9}

    def searches(params, factor):
        tap = ScaledMLP(factor)
        beams = beam_search(params, *prompts, tap=tap, num_beams=3, **options)
        speculated = gpt2_jax.speculate(params, *prompts, tap=tap, num_draft_tokens=3, **options)
        return beams.ids[:, 0], speculated.ids

    tapped = searches(params, 0.0)
    for found, expected in zip(tapped, searches(edited, 1.0), strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, plain in zip(tapped, searches(params, 1.0), strict=True):
        assert not np.array_equal(found, plain)
    assert (tapped[1] == generate(params, *prompts, tap=ScaledMLP(0.0), **options).ids).all()


def test_a_taps_vectors_follow_their_rows(models, rng):
    _, config, params = models
    ids = np.repeat(rng.integers(1, 61, (1, 18)), 2, axis=0)
    vectors = jnp.asarray(3 * rng.normal(size=(2, config.n_embd)))
    keys = jax.random.split(jax.random.key(3), 4)

    def drawn(vectors, keys):
        """Two texts of each prompt, past the 24 positions of the context."""
        options = {"config": config, "max_new_tokens": 9, "stop_ids": (), "overflow": "slide"}
        options |= {"sampler": Categorical(), "num_return_sequences": 2}
        return generate(params, ids, None, keys, tap=PerRow(vectors), **options).ids

    def searched(vectors):
        options = {"config": config, "max_new_tokens": 6, "num_beams": 3, "stop_ids": ()}
        return beam_search(params, ids, tap=PerRow(vectors), **options).ids

    # Of the same prompt twice, who changes the vectors' places changes those of the texts.
    both = drawn(vectors, keys)
    others = jnp.array([2, 3, 0, 1])
    np.testing.assert_array_equal(drawn(vectors[::-1], keys[others]), both[others])
    assert not np.array_equal(both, drawn(vectors[::-1], keys))
    found = searched(vectors)
    np.testing.assert_array_equal(searched(vectors[::-1]), found[::-1])
    assert not np.array_equal(found[0], found[1])
