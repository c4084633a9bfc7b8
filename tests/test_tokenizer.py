import json
import re
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax import Tokenizer, load_tokenizer, many_words, tokenizer
from gpt2_jax.added_tokens import AddedToken
from gpt2_jax.many_words import Group, Keys, Merges, Table, Words
from tests.reference import DATA

ASSETS = Path(tokenizer.__file__).parent / "assets" / "gpt2"


def cases(file):
    return [
        json.loads(line)
        for line in (DATA / "tokenizer" / file).read_text(encoding="utf-8").split("\n")
        if line
    ]


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.gpt2()


@pytest.fixture
def toy():
    """Letters, a merge of two merges, and a token that no merge makes."""
    vocab = {
        "l": 0,
        "o": 1,
        "w": 2,
        "e": 3,
        "r": 4,
        "Ġ": 5,
        "Ġl": 6,
        "Ġlo": 7,
        "Ġlow": 8,
        "er": 9,
        "lower": 10,
    }
    return Tokenizer(
        vocab, [("Ġ", "l"), ("Ġl", "o"), ("Ġlo", "w"), ("e", "r")], {"<|endoftext|>": 11}
    )


@pytest.mark.parametrize("file", ["vectors.jsonl", "stress.jsonl"])
def test_ids_are_those_on_which_other_implementations_agree(gpt2, file):
    for case in cases(file):
        ids = gpt2.encode(case["text"], "all" if case.get("allow_special") else ())
        assert ids == case["ids"]
        assert gpt2.decode(ids) == case["text"]


@given(st.text() | st.text("ab '\n\t\x1c\x85\xa0\u2028stvmrel1²Ⅷé漢\U0001f600\U0001d7d8"))
def test_any_text_has_hfs_ids_and_comes_back(text):
    assert Tokenizer.gpt2().encode(text) == HF.encode(text).ids
    assert Tokenizer.gpt2().decode(HF.encode(text).ids) == text


HF = tokenizers.ByteLevelBPETokenizer(str(ASSETS / "vocab.json"), str(ASSETS / "merges.txt"))


@given(st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"])))
def test_the_fast_pattern_cuts_as_the_whole_one_does(text):
    fast, whole = tokenizer.splitter("\xe9"), tokenizer.splitter("\U0001f600")
    assert isinstance(fast, re.Pattern) and isinstance(whole, regex.Pattern)
    assert fast.findall(text) == whole.findall(text)


@given(st.text(st.characters(max_codepoint=0x7F)))
def test_the_pattern_of_ascii_cuts_as_the_whole_one_does(text):
    assert tokenizer.splitter("plain") is not tokenizer.splitter("\xe9")
    whole = tokenizer.splitter("\U0001f600")
    assert tokenizer.splitter("plain").findall(text) == whole.findall(text)


# All that decides where a text may be cut, and a few letters.
SPACED = [
    " ",
    "\n",
    "\t",
    "\r",
    "\0",
    "\x1c",
    "\x85",
    "\xa0",
    "\u3000",
    "a",
    "the",
    "fifteen, letters",
    "'s",
    "1",
    "!",
    "\xe9",
]


TEXTS = st.lists(st.sampled_from(SPACED), max_size=12).map("".join)


@given(TEXTS)
def test_words_are_cut_where_pieces_are(text):
    gpt2 = Tokenizer.gpt2()
    pieces = regex.findall(tokenizer.PATTERN, text)
    assert gpt2.encode(text) == [id for piece in pieces for id in gpt2._merge(piece)]


@settings(max_examples=40)
@given(st.lists(TEXTS | st.text(), max_size=3), st.sampled_from([2, 8]), st.sampled_from([0, 99]))
def test_many_words_have_hfs_ids(texts, at_once, few):
    gpt2 = Tokenizer.gpt2()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "MANY_CHARACTERS", 0)
        patch.setattr(many_words, "FEW", few)
        patch.setattr(many_words, "REMEMBERED", 8)
        patch.setattr(many_words, "WORDS_AT_ONCE", at_once)
        words = Words(tokenizer.split, gpt2._merge, gpt2._merged, gpt2._byte_ids)
        words._merges = merges()
        patch.setattr(gpt2, "_many_words", words)
        for _ in range(2):  # words that are new, and the same words again
            assert gpt2.encode_batch(texts) == [HF.encode(text).ids for text in texts]


def test_a_batch_has_the_ids_of_its_texts(gpt2):
    plain = [case for case in cases("stress.jsonl") if not case.get("allow_special")]
    ids = gpt2.encode_batch([case["text"] for case in plain])
    assert ids == [case["ids"] for case in plain]
    marked = ["a<|endoftext|>" * 200, "", "<|endoftext|>"]
    assert gpt2.encode_batch(marked, "all") == [[64, 50256] * 200, [], [50256]]


def test_the_text_that_a_batch_cannot_have_is_named(gpt2, toy):
    with pytest.raises(ValueError, match=r"`texts\[1\]`: .* no token for byte 120"):
        toy.encode_batch(["low " * 1000, "x", "low"])
    with pytest.raises(ValueError, match=r"`texts\[2\]`: `text` must hold no special token"):
        gpt2.encode_batch(["a", "b", "<|endoftext|>"], disallowed_special="all")


def test_a_table_has_the_numbers_of_its_keys():
    low, high = np.random.default_rng(0).integers(0, 100, (2, 20_000)).astype(np.uint64)
    expected = dict(zip(zip(low.tolist(), high.tolist(), strict=True), range(20_000), strict=True))
    keys = Keys(*np.array(list(expected), np.uint64).T)
    numbers = np.array(list(expected.values()))
    table = Table()
    for first in range(0, len(numbers), 3000):  # it grows more than once
        part = slice(first, first + 3000)
        table.add(Keys(keys.low[part], keys.high[part]), numbers[part])
    assert np.array_equal(table.find(keys), numbers)
    others = Keys(keys.low, keys.high + np.uint64(100))
    assert (table.find(others) == many_words.UNKNOWN).all()


@given(st.text("ab ", max_size=64))
def test_short_and_long_pieces_are_merged_alike(text):
    gpt2 = Tokenizer.gpt2()
    spelled = gpt2._ids_of_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "SHORT", 64)
        assert gpt2._merge(text) == gpt2._merge_long([*spelled])
    ids = np.array([spelled] * 2, np.int64)
    groups = merges().merge({len(spelled): Group(np.arange(2), ids)}) if spelled else []
    found = [row for group in groups for row in group.ids.tolist()]
    assert found == [list(gpt2._merge(text))] * 2 * bool(spelled)


@cache
def merges():
    return Merges(Tokenizer.gpt2()._merged)


def test_every_character_is_of_one_class_in_both_patterns():
    plane = [chr(code) for code in range(0x10000) if not 0xD800 <= code <= 0xDFFF]
    for text in (
        "".join(f"{char}a" for char in plane),
        "".join(f" {char}1 \t{char}" for char in plane),
    ):
        assert tokenizer.splitter("\xe9").findall(text) == tokenizer.splitter("\U0001f600").findall(
            text
        )


def test_merges_follow_their_rank_from_left_to_right(toy):
    assert toy.encode(" lower") == [8, 9]
    assert toy.encode("lower") == [0, 1, 2, 9]  # no merge makes "lower"
    assert toy.decode([10, 5, 10]) == "lower lower"
    ones = Tokenizer({"1": 0, "11": 1, "1111": 2}, [("1", "1"), ("11", "11")])
    assert [ones.encode("1" * n) for n in (1, 2, 3, 5, 7)] == [[0], [1], [1, 0], [2, 0], [2, 1, 0]]


def test_special_tokens_are_text_unless_allowed(gpt2):
    text = "a<|endoftext|>"
    assert gpt2.encode(text, "all") == gpt2.encode(text, ["<|endoftext|>"]) == [64, 50256]
    assert gpt2.encode(text) == [64, 27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.decode([64, 50256]) == gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.eot_id == 50256 and gpt2.vocab_size == 50257


ADDED = [
    AddedToken("<m>", 50257, lstrip=True, rstrip=True),
    AddedToken("<m><n>", 50258, rstrip=True, normalized=True),
    AddedToken("a1é", 50259, single_word=True, special=False),
    AddedToken("b é", 50260, normalized=True, special=False),
]


def added_to_hf():
    """GPT-2's tokenizer with these tokens, by HF's library."""
    made = tokenizers.Tokenizer.from_str(HF.to_str())
    for token in ADDED:
        flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip")}
        flags |= {"normalized": token.normalized, "special": token.special}
        made.add_tokens([tokenizers.AddedToken(token.content, **flags)])
    return made


WITH_ADDED = Tokenizer(Tokenizer.gpt2().vocab, Tokenizer.gpt2().merges, ADDED)
HF_WITH_ADDED = added_to_hf()


PIECES = (
    "<m>",
    "<m><n>",
    "a1é",
    "b é",
    "b",
    "a",
    " ",
    "\n",
    "\x1c",
    "\u2003",
    "_",
    "é",
    "1",
    "\u0301",
)


@given(st.lists(st.sampled_from(PIECES)))
def test_added_tokens_are_found_as_by_hf(pieces):
    text = "".join(pieces)
    encoded = WITH_ADDED.encode_with_spans(text, "all")
    expected = HF_WITH_ADDED.encode(text)
    assert encoded.ids == expected.ids == WITH_ADDED.encode(text, "all")
    assert encoded.spans == expected.offsets


def test_disallowed_special_tokens_are_refused_as_by_tiktoken(gpt2):
    text = "a <|endoftext|>"
    for disallowed in ("all", {"<|endoftext|>"}):
        with pytest.raises(ValueError, match=r"got '<\|endoftext\|>' at position 2"):
            gpt2.encode(text, disallowed_special=disallowed)
        with pytest.raises(ValueError, match="at position 2"):
            gpt2.encode_with_spans(text, disallowed_special=disallowed)
    # "all" are those that are not allowed.
    assert gpt2.encode(text, "all", disallowed_special="all") == [64, 220, 50256]
    assert gpt2.encode_batch(["<|endofte"], disallowed_special="all") == [gpt2.encode("<|endofte")]
    with pytest.raises(ValueError, match=r"`disallowed_special` must be among .* got \['<pad>'\]"):
        gpt2.encode("a", disallowed_special=["<pad>"])


def test_surrogates_are_read_as_by_tiktoken(gpt2):
    # tiktoken's own tests, tests/test_misc.py: a pair is its character, a lone one U+FFFD.
    assert gpt2.encode("\ud83d\udc4d") == gpt2.encode("\U0001f44d") == [41840, 235]
    assert gpt2.encode("a\ud83d b") == gpt2.encode("a\ufffd b") == [64, 4210, 275]
    with pytest.raises(ValueError, match=r"in UTF-8, got '\\udcff' at position 2"):
        gpt2.encode_with_spans("ab\udcff")


@given(st.text() | st.text("ab '\n\t\x85\u2028stvm1²漢\U0001f600<|endoftext|>"))
def test_spans_are_hfs_offsets(text):
    encoded = Tokenizer.gpt2().encode_with_spans(text)
    expected = HF.encode(text)
    assert encoded.ids == expected.ids
    assert encoded.spans == expected.offsets


def test_spans_of_special_tokens_are_theirs(gpt2):
    text = "né<|endoftext|> 漢"
    ids, spans = gpt2.encode_with_spans(text, "all")
    assert ids == gpt2.encode(text, "all")
    # The space and the first byte of the character are one token.
    assert spans == [(0, 1), (1, 2), (2, 15), (15, 17), (16, 17), (16, 17)]


def test_bytes_without_a_token_are_dropped_as_by_hf(toy):
    dropping = Tokenizer(toy.vocab, toy.merges, missing_bytes="drop")
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(toy.vocab, toy.merges))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in (" low\nlower", "x", "", " x low", "lox w", "l漢ower", " \n lo"):
        encoded = dropping.encode_with_spans(text)
        assert dropping.encode(text) == encoded.ids == hf.encode(text).ids
        # HF's offsets count what was dropped as if it had not been there.
        for id, (start, end) in zip(*encoded, strict=True):
            assert dropping.decode([id]) == text[start:end]
    with pytest.raises(ValueError, match="`missing_bytes` must be 'error' or 'drop', got 'skip'"):
        Tokenizer(toy.vocab, toy.merges, missing_bytes="skip")


def test_ids_without_a_token_decode_to_nothing(gpt2, toy):
    # As HF's do: a model's table is often padded to 50,304 rows.
    for ids in ([31373, 50257, 995, 60000], np.array([31373, 50257, 995])):
        assert gpt2.decode(ids) == "hello world"
    decoder = gpt2.stream_decoder()
    assert [decoder.push([id]) for id in (50300, 31373)] == ["", "hello"]
    assert Tokenizer(toy.vocab, toy.merges, {"<far>": 99}).decode([50, 99, 0]) == "<far>l"


def test_the_longest_special_token_wins(toy):
    both = Tokenizer(toy.vocab, toy.merges, {"<l>": 20, "<l><l>": 21})
    assert both.encode("l<l><l><l>", "all") == [0, 21, 20]


@given(st.text(), st.integers(1, 3))
def test_a_stream_shows_whole_characters_and_in_the_end_everything(text, size):
    ids = Tokenizer.gpt2().encode(text)
    decoder = Tokenizer.gpt2().stream_decoder()
    shown = ""
    for start in range(0, len(ids), size):
        shown += decoder.push(ids[start : start + size])
        assert text.startswith(shown)
    assert shown + decoder.flush() == text


def test_a_stream_that_ends_within_a_character_says_so(gpt2):
    decoder = gpt2.stream_decoder()
    first, second = gpt2.encode("漢")[:2]
    assert decoder.push([first, second]) in ("", "漢")
    decoder = gpt2.stream_decoder()
    assert decoder.push([first]) == "" and decoder.flush() == "\ufffd"


def test_arrays_of_ids_are_decoded(gpt2):
    for ids in (np.array([31373, 995]), jnp.array([31373, 995]), (31373, np.int32(995))):
        assert gpt2.decode(ids) == "hello world"
    assert gpt2.decode_batch(np.array([[31373], [995]])) == ["hello", " world"]
    assert gpt2.encode_batch(["hello", " world"]) == [[31373], [995]]


class CountedId(int):
    """An id that counts how often an id is looked up, as a part of a pair."""

    n_hashed = 0

    def __hash__(self):
        CountedId.n_hashed += 1
        return int(self)


def test_a_long_piece_takes_no_quadratic_work():
    vocab = {"1" * 2**i: CountedId(i) for i in range(8)}
    ones = Tokenizer(vocab, [("1" * 2**i, "1" * 2**i) for i in range(7)])

    def work(n_ones):
        CountedId.n_hashed = 0
        assert ones.encode("1" * n_ones) == [7] * (n_ones // 128)
        return CountedId.n_hashed

    short = work(1024)
    assert short > 1024
    # Eight times the length: eight times the work, where a quadratic way would take sixty-four.
    assert work(8 * 1024) < 9 * short


def test_memory_is_bounded(toy, monkeypatch):
    monkeypatch.setattr(tokenizer, "REMEMBERED_TEXTS", 2)
    assert [toy.encode(text) for text in ("l", "o", "w", "w")] == [[0], [1], [2], [2]]
    assert len(toy._pieces) == 2


def test_long_pieces_are_not_remembered(toy):
    toy.encode("l" * 65)
    assert not toy._pieces
    toy.encode("l" * 64)
    assert len(toy._pieces) == 1


def test_saving_and_loading_is_the_identity(gpt2, toy, tmp_path):
    for number, saved in enumerate((gpt2, toy, load_tokenizer("demo"))):
        folder = tmp_path / str(number)
        saved.save(folder)
        again = Tokenizer.load(folder)
        assert again.vocab == saved.vocab
        assert again.merges == saved.merges
        assert again.special_tokens == saved.special_tokens
        assert not list(folder.glob(".*"))


def test_tokenizer_json_is_read(gpt2, tmp_path):
    HF.save(str(tmp_path / "tokenizer.json"))
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    values["added_tokens"] = [{"id": 50300, "content": "<pad>", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    read = Tokenizer.load(tmp_path)
    assert read.merges == gpt2.merges and read.vocab == gpt2.vocab
    assert read.special_tokens == {"<pad>": 50300, "<|endoftext|>": 50256}
    assert read.encode("a<pad>", "all") == [64, 50300]
    assert read.vocab_size == 50301


def test_merges_of_older_files_are_strings(gpt2, tmp_path):
    HF.save(str(tmp_path / "tokenizer.json"))
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    values["model"]["merges"] = [" ".join(pair) for pair in gpt2.merges]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    assert Tokenizer.load(tmp_path).merges == gpt2.merges


def test_missing_files_are_named(tmp_path):
    message = "expected vocab.json and merges.txt, or tokenizer.json"
    with pytest.raises(FileNotFoundError, match=f"{message}.*, got an empty folder"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{message}.*, got no such folder"):
        Tokenizer.load(tmp_path / "none")


@pytest.mark.parametrize(
    "vocab, merges, message",
    [
        ('{"a": 0, "b": ', "a b", r"vocab\.json: expected JSON"),
        ("[]", "a b", r"vocab\.json: expected an object, got list"),
        (
            '{"a": 0, "b": 1}',
            "a b",
            r"vocab\.json, .*merges\.txt: Both parts of a merge .* 1 are not: \[\('a', 'b'\)\]",
        ),
        ('{"a": 0}', "a b c", r"merges\.txt: .* two tokens with a space between, got 'a b c'"),
        ('{"a": 0, "b": 0}', "", r"vocab\.json.*an id of its own, got 0 for 'a' and 'b'"),
        ('{"a": null}', "", r"vocab\.json: expected an integer as the id of 'a', got None"),
        ("[" * 100_000, "", r"vocab\.json: .*nested too deeply"),
        ("version https://git-lfs.github.com/spec/v1\n", "", r"vocab\.json: .*run `git lfs pull`"),
    ],
)
def test_damaged_files_are_named(tmp_path, vocab, merges, message):
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("part", ["vocab", "merges"])
def test_a_tokenizer_json_that_lacks_a_part_is_named(tmp_path, part):
    HF.save(str(tmp_path / "tokenizer.json"))
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    del values["model"][part]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"tokenizer\.json: expected a model, .*'{part}'"):
        Tokenizer.load(tmp_path)


def test_ids_are_not_negative():
    with pytest.raises(ValueError, match="Ids must be 0 or greater, got -1"):
        Tokenizer({"a": -1}, [])


def test_what_cannot_be_encoded_or_decoded_is_named(gpt2, toy):
    with pytest.raises(
        ValueError, match="no token for byte 120 of 'lowx'; `missing_bytes=\"drop\"` passes"
    ):
        toy.encode("lowx x")
    with pytest.raises(ValueError, match="Ids must be 0 or greater, got -1"):
        gpt2.decode([-1])
    with pytest.raises(
        ValueError, match=r"must be among \['<\|endoftext\|>'\] or 'all', got \['<pad>'\]"
    ):
        gpt2.encode("a", ["<pad>"])
    with pytest.raises(ValueError, match="an id of its own"):
        Tokenizer({"a": 0, "b": 0}, [])
