import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax import Tokenizer

DATA = Path(__file__).parent / "data" / "tokenizer"
CASES = [
    json.loads(line)
    for file in ("vectors.jsonl", "stress.jsonl")
    for line in (DATA / file).read_text(encoding="utf-8").split("\n")
    if line
]


def test_other_peoples_vectors_are_met():
    tokenizer = Tokenizer.gpt2()
    for case in CASES:
        allowed = "all" if case.get("allow_special") else ()
        assert tokenizer.encode(case["text"], allowed) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]


@given(st.text())
def test_decoding_undoes_encoding(text):
    assert Tokenizer.gpt2().decode(Tokenizer.gpt2().encode(text)) == text


def test_special_tokens_are_text_unless_allowed():
    tokenizer = Tokenizer.gpt2()
    assert tokenizer.encode("a<|endoftext|>", "all") == [64, 50256]
    assert tokenizer.encode("a<|endoftext|>", ["<|endoftext|>"]) == [64, 50256]
    assert 50256 not in tokenizer.encode("a<|endoftext|>")
    with pytest.raises(ValueError, match="<pad>"):
        tokenizer.encode("a", ["<pad>"])


@given(st.text())
def test_a_stream_never_shows_half_a_character(text):
    tokenizer = Tokenizer.gpt2()
    decoder = tokenizer.stream_decoder()
    shown = [decoder.push([token]) for token in tokenizer.encode(text)]
    assert "".join(shown) + decoder.flush() == text and "\ufffd" not in "".join(shown).replace(text, "")
