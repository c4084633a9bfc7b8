"""Texts, stop texts and conversations, on the packaged model."""

import jax
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import (
    Continuation,
    Conversation,
    Tokenizer,
    complete,
    generate,
    sampler_from_options,
    stream_text,
)
from gpt2_jax.tokenizer_template import Template

PROMPTS = ["Once upon a time there was a king", "The wolf said"]


@pytest.fixture(scope="module")
def model():
    config, params = gpt2_jax.load("demo", dtype="float32")
    return params, Tokenizer.load(gpt2_jax.resolve("demo")), config


def test_texts_are_those_of_generate(model):
    params, tokenizer, config = model
    sampler = sampler_from_options({"temperature": 0.9}, do_sample=True)
    options = {
        "config": config,
        "max_new_tokens": 20,
        "sampler": sampler,
        "num_return_sequences": 2,
    }
    ids, lengths = gpt2_jax.encode_batch(tokenizer, PROMPTS)
    out = generate(params, ids, lengths, jax.random.key(1), **options)
    rows = complete(params, tokenizer, PROMPTS, jax.random.key(1), **options)
    assert [row.prompt for row in rows] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    for row, new, logprobs in zip(rows, np.asarray(out.ids), np.asarray(out.logprobs), strict=True):
        assert (
            row.ids == new.tolist()
            and row.text == tokenizer.decode(new)
            and row.finish_reason == "length"
        )
        np.testing.assert_allclose(row.logprobs, logprobs, atol=1e-5)
    grown = ["", "", "", ""]
    for rows in stream_text(params, tokenizer, PROMPTS, jax.random.key(1), **options):
        grown = [text + row.new for text, row in zip(grown, rows, strict=True)]
    assert grown == [row.text for row in rows]


def test_a_text_ends_before_its_first_stop_text_wherever_tokens_begin(model):
    params, tokenizer, config = model
    options = {"config": config, "max_new_tokens": 40}
    free = complete(params, tokenizer, PROMPTS, **options)[0]
    for start in range(5, 60, 7):
        stop = free.text[start : start + 5]  # begins and ends anywhere in a token
        row, other = complete(params, tokenizer, PROMPTS, stop=[stop, "no such text"], **options)
        assert row.text == free.text[: free.text.index(stop)] and row.finish_reason == "stop"
        assert stop in tokenizer.decode(row.ids) and stop not in tokenizer.decode(row.ids[:-1])
        assert other.text and stop not in other.text
    shown = ""
    for rows in stream_text(params, tokenizer, PROMPTS[:1], stop=stop, chunk=1, **options):
        shown += rows[0].new
        assert free.text.startswith(shown)
    assert shown == free.text[: free.text.index(stop)]


def test_ids_beyond_the_tokenizer_are_no_text(model):
    params, tokenizer, config = model
    ids, lengths = gpt2_jax.encode_batch(tokenizer, PROMPTS)
    out = generate(params, ids, lengths, config=config, max_new_tokens=8)
    # A tokenizer that lacks the token that the model writes third.
    lost = int(out.ids[0, 2])
    vocab = {token: id for token, id in tokenizer.vocab.items() if id != lost}
    merges = [pair for pair in tokenizer.merges if {*pair, "".join(pair)} <= vocab.keys()]
    smaller = Tokenizer(vocab, merges)
    contexts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    for prompt, context, new in zip(PROMPTS, contexts, np.asarray(out.ids), strict=True):
        row = Continuation(prompt, smaller, context=context)
        row.push(new.tolist(), [0.0] * 8)
        assert row.ids == new.tolist()
        assert row.text == tokenizer.decode([id for id in new if id != lost])


def test_a_prompt_has_what_the_tokenizer_adds_to_a_text(model):
    params, tokenizer, config = model
    framed = Tokenizer(
        tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, template=Template((0, 5))
    )
    bare = tokenizer.encode(PROMPTS[0])
    options = {"config": config, "max_new_tokens": 3}
    for add_special_tokens, ids in ((True, [0, 5, *bare]), (False, bare)):
        (row,) = complete(
            params, framed, PROMPTS[:1], add_special_tokens=add_special_tokens, **options
        )
        assert row.context == ids
        assert row.ids == generate(params, np.array([ids]), **options).ids[0].tolist()
    talk = Conversation(params, framed, config=config)
    (*_, row) = talk.reply(PROMPTS[0], max_new_tokens=1)
    assert talk.ids == [0, 5, *bare, *row.ids]
    bare_talk = Conversation(params, framed, config=config, add_special_tokens=False)
    list(bare_talk.reply(PROMPTS[0], max_new_tokens=1))
    assert bare_talk.ids[:-1] == bare
    list(talk.reply(PROMPTS[1], max_new_tokens=1))
    assert talk.ids[len(bare) + 3 : -1] == tokenizer.encode(PROMPTS[1])


def test_the_end_of_a_text_has_the_tokenizers_name_for_it(model):
    params, _, config = model
    named = Tokenizer({"a": 0, "</s>": 1}, [], roles={"eos_token": "</s>"})
    with pytest.raises(ValueError, match="take '</s>' with `allow_special`"):
        complete(params, named, [""], config=config, max_new_tokens=1)


def test_half_a_character_is_kept_back():
    tokenizer = Tokenizer.gpt2()
    ids = tokenizer.encode("né 🦩")
    row = Continuation("", tokenizer)
    for id in ids[:-1]:
        row.push([id], [0.0])
        assert "né ".startswith(row.text)
    row.finish()
    assert row.text == "né \ufffd"
    assert row.finish_reason == "length"


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        (["a", ""], {}, "The prompt '' is empty"),
        ("a", {}, "A sequence of texts is expected, got one text"),
        (["a"], {"stop": ["b", ""]}, "`stop` must not hold an empty text"),
        (["a"], {"max_new_tokens": 256}, "together 257, but the model has 256 positions"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_generated(model, prompts, options, message):
    params, tokenizer, config = model
    with pytest.raises(ValueError, match=message):
        stream_text(
            params, tokenizer, prompts, **({"config": config, "max_new_tokens": 3} | options)
        )


def test_a_conversation_is_one_text_that_is_read_once(model, monkeypatch):
    params, tokenizer, config = model
    config = config.replace(eos_token_id=None)  # its stories are short
    blocks = []
    read = gpt2_jax.generation.conversation.read

    def watched(*args, **options):
        blocks.append(int(args[3]))
        return read(*args, **options)

    monkeypatch.setattr(gpt2_jax.generation.conversation, "read", watched)
    talk = Conversation(params, tokenizer, config=config)
    ids = []
    for text in (PROMPTS[0], " The queen said", " And then" * 20):
        before = len(ids)
        *_, row = talk.reply(text, max_new_tokens=19)
        ids += tokenizer.encode(text)
        expected = generate(params, np.array([ids]), config=config, max_new_tokens=19)
        assert row.ids == expected.ids[0].tolist()
        np.testing.assert_allclose(row.logprobs, expected.logprobs[0], atol=1e-4)
        ids += row.ids
        assert talk.ids == ids and talk.read == len(ids) - 1
        assert min(blocks) >= before - 1  # the last token had been chosen, but not read
        blocks.clear()
    talk.reset()
    *_, row = talk.reply(PROMPTS[1], max_new_tokens=5)
    alone = complete(params, tokenizer, PROMPTS[1:], config=config, max_new_tokens=5)
    assert row.text == alone[0].text


def test_a_conversation_goes_on_past_the_context_from_its_last_half(model):
    params, tokenizer, config = model
    config = config.replace(eos_token_id=None)  # its stories are short
    talk = Conversation(params, tokenizer, config=config)
    *_, row = talk.reply(PROMPTS[0], max_new_tokens=300)
    start = tokenizer.encode(PROMPTS[0])
    expected = generate(
        params, np.array([start]), config=config, max_new_tokens=300, overflow="slide"
    )
    assert row.ids == expected.ids[0].tolist()


def test_a_turn_draws_with_its_own_key_and_ends_at_a_stop_text(model):
    params, tokenizer, config = model
    key, sampler = jax.random.key(3), sampler_from_options({"temperature": 1.1}, do_sample=True)
    talk = Conversation(params, tokenizer, key, config=config, sampler=sampler, stop=["e"])
    ids = []
    for turn, text in enumerate(PROMPTS):
        *_, row = talk.reply(text, max_new_tokens=30)
        ids += tokenizer.encode(text)
        turn_key = jax.random.fold_in(key, turn)[None]
        free = generate(
            params,
            np.array([ids]),
            None,
            turn_key,
            config=config,
            max_new_tokens=30,
            sampler=sampler,
        )
        assert row.finish_reason == "stop" and "e" not in row.text
        assert row.ids == free.ids[0, : len(row.ids)].tolist()
        ids += row.ids
        assert talk.ids == ids


def test_a_turn_that_is_broken_off_leaves_its_text_behind(model, monkeypatch):
    params, tokenizer, config = model
    talk = Conversation(params, tokenizer, config=config)
    growing = talk.reply(PROMPTS[0], max_new_tokens=30)
    next(growing)
    row = next(growing)

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gpt2_jax.generation.conversation, "advance", interrupt)
        next(growing)
    ids = tokenizer.encode(PROMPTS[0]) + row.ids
    assert talk.ids == ids and len(row.ids) == 9
    *_, row = talk.reply(" so", max_new_tokens=6)
    expected = generate(
        params, np.array([[*ids, *tokenizer.encode(" so")]]), config=config, max_new_tokens=6
    )
    assert row.ids == expected.ids[0].tolist()


def test_bad_turns_are_named(model):
    params, tokenizer, config = model
    with pytest.raises(ValueError, match="`key` must be given"):
        Conversation(params, tokenizer, config=config, sampler=gpt2_jax.Categorical())
    talk = Conversation(params, tokenizer, config=config)
    with pytest.raises(ValueError, match="There is no text to continue"):
        talk.reply("", max_new_tokens=3)
    with pytest.raises(ValueError, match="`max_new_tokens` must be a positive integer, got 0"):
        talk.reply("a", max_new_tokens=0)
