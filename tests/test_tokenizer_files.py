"""What a folder's files say of a tokenizer is what `AutoTokenizer` makes of it."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import transformers

from gpt2_jax import Tokenizer, tokenizer_files
from gpt2_jax.files import read_json_object
from gpt2_jax.pretrained import hub
from gpt2_jax.tokenizer_files import TokenizerKindError

TEXTS = (
    "The end.<|endoftext|>The  beginning\n",
    "a<s> b</s> c[PAD]d [CLS]x",
    "a  <mask>  b<mask>.<mask>\u2003\n<mask>",
    "<|user|> hi <|user|>ho<|ax1|>\x1c<|user|>\x1c",
    "the cat, the cathedral, the_cat, cat. é漢\U0001f600",
    "",
)
PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def token(content, **flags):
    return PLAIN | {"content": content, "special": True} | flags


def decoder(*tokens):
    """An `added_tokens_decoder` of tokens behind the demo's."""
    return {"added_tokens_decoder": {str(4096 + i): each for i, each in enumerate(tokens)}}


# Files beside the demo's vocabulary and merges, each a place where HF finds a token.
FOLDERS = {
    "nothing": {},
    "decoder": {"tokenizer_config": decoder(token("<|user|>"))},
    "lstrip": {"tokenizer_config": decoder(token("<mask>", lstrip=True))},
    "rstrip": {"tokenizer_config": decoder(token("<mask>", rstrip=True))},
    "both": {"tokenizer_config": decoder(token("<mask>", lstrip=True, rstrip=True))},
    "single word": {"tokenizer_config": decoder(token("cat", single_word=True))},
    "not special": {"tokenizer_config": decoder(token("<|user|>", special=False))},
    # "the cat" overlaps "cat,", which is looked for first though it begins later.
    "normalized": {
        "tokenizer_config": decoder(
            token("the cat", normalized=True, special=False), token("cat,", special=False)
        )
    },
    "in the vocabulary": {"added_tokens": {"the": 4096, "<|endoftext|>": 0}},
    "added": {"added_tokens": {"<|user|>": 4096, "[PAD]": 4097}, "config": {"pad_token": "[PAD]"}},
    "map": {"special_tokens_map": {"pad_token": token("[PAD]", lstrip=True), "sep_token": "<s>"}},
    "list": {"special_tokens_map": {"additional_special_tokens": ["<|ax1|>", "<|user|>"]}},
    "list in the config": {"tokenizer_config": {"additional_special_tokens": ["<|ax1|>"]}},
    "list of today": {"tokenizer_config": {"extra_special_tokens": ["<|ax1|>"]}},
    "dict of today": {"tokenizer_config": {"extra_special_tokens": {"user_token": "<|user|>"}}},
    "another name": {"tokenizer_config": {"user_token": "<|user|>", "pad_token": "[PAD]"}},
    "named": {
        "tokenizer_config": {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>"},
    },
    "of older files": {
        "tokenizer_config": {
            "eos_token": PLAIN | {"__type": "AddedToken", "content": "</s>", "normalized": True},
            "add_eos_token": True,
        },
        "special_tokens_map": {"eos_token": PLAIN | {"content": "</s>", "rstrip": True}},
    },
    "bos": {"tokenizer_config": {"add_bos_token": True}},
    "eos": {"tokenizer_config": {"add_eos_token": True, "eos_token": "</s>"}},
    "prefix space": {"tokenizer_config": {"add_prefix_space": True}},
    "roberta": {"tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}},
    "deberta": {"tokenizer_config": {"tokenizer_class": "DebertaTokenizer"}},
}


@pytest.fixture
def folder(tmp_path):
    """The demo's vocabulary and merges, in a folder that `AutoTokenizer` takes for a GPT-2's."""
    made = tmp_path / "model"
    made.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(hub.DEMO / name, made / name)
    write(made, "config", {"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": 0})
    return made


def write(folder, name, values):
    (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")


def hf(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_as_hf(tokenizer, folder):
    """Ids, texts, and what ends a text."""
    theirs = hf(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text, "all")
        assert ids == theirs(text).input_ids, text
        assert tokenizer.decode(ids) == theirs.decode(ids)
        bare = tokenizer.encode(text, "all", add_special_tokens=False)
        assert bare == theirs(text, add_special_tokens=False).input_ids
    assert (tokenizer.eot_id, tokenizer.bot_id) == (theirs.eos_token_id, theirs.bos_token_id)
    assert {each.content: each.id for each in tokenizer.added_tokens} == theirs.added_tokens_encoder


def assert_saved_whole(tokenizer, tmp_path):
    """What is saved is read back equal, by us and by HF; so is what goes to another process."""
    saved = tmp_path / "saved"
    saved.mkdir()
    write(saved, "added_tokens", {"of another": 7})
    tokenizer.save(saved)
    again = Tokenizer.load(saved)
    for copy in (again, pickle.loads(pickle.dumps(tokenizer))):
        for name in ("vocab", "merges", "added_tokens", "template", "add_prefix_space"):
            assert getattr(copy, name) == getattr(tokenizer, name), name
    write(saved, "config", {"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": 0})
    assert_as_hf(tokenizer, saved)


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_tokens_are_found_wherever_hf_finds_them(folder, tmp_path, files):
    for name, values in files.items():
        known = read_json_object(folder / "config.json") if name == "config" else {}
        write(folder, name, known | values)
    tokenizer = Tokenizer.load(folder)
    assert_as_hf(tokenizer, folder)
    assert_saved_whole(tokenizer, tmp_path)


# Of the newer generation: all in `tokenizer.json`, which counts where there are both.


@pytest.fixture
def newer(folder):
    """The contents of a `tokenizer.json` that transformers writes of the demo's files."""
    hf(folder).save_pretrained(folder.parent / "newer")
    return read_json_object(folder.parent / "newer" / "tokenizer.json")


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "!", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]},
        "!": {"id": "!", "ids": [1], "tokens": ["!"]},
    },
}
ROBERTA = {"type": "RobertaProcessing", "sep": ["!", 1], "cls": ["<|endoftext|>", 0]}
ROBERTA |= {"trim_offsets": True, "add_prefix_space": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
BYTE_LEVEL |= {"use_regex": True}


@pytest.mark.parametrize("class_name", ["GPT2TokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens": [token("<mask>", id=4096, lstrip=True)]},
        {"added_tokens": [token("he", id=257, special=False, normalized=True)]},
        {"post_processor": TEMPLATE},
        {"post_processor": ROBERTA},
        {"post_processor": {"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}},
        {"pre_tokenizer": BYTE_LEVEL},
    ],
    ids=["lstrip", "found", "template", "roberta", "sequence", "prefix space"],
)
def test_tokenizer_json_beside_the_others_counts(folder, newer, tmp_path, class_name, change):
    write(folder, "tokenizer", newer | change)
    # An `add_bos_token` beside it says nothing, as with HF.
    names = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    settings = {"tokenizer_class": class_name, "add_bos_token": True}
    write(folder, "tokenizer_config", settings | names)
    tokenizer = Tokenizer.load(folder)
    assert type(tokenizer) is Tokenizer
    assert_as_hf(tokenizer, folder)
    assert_saved_whole(tokenizer, tmp_path)


def test_a_template_of_no_token_is_named(folder, newer):
    specials = {"!": {"id": "!", "ids": [9999], "tokens": ["!"]}}
    processor = TEMPLATE | {"special_tokens": TEMPLATE["special_tokens"] | specials}
    write(folder, "tokenizer", newer | {"post_processor": processor})
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: expected ids of tokens .* got \[9999\]"
    ):
        Tokenizer.load(folder)


def test_merges_of_another_form_are_named(folder, newer):
    for merges in ([["t", "h", "e"]], [[1, 2]], [["t", ["h"]]], [None], "th"):
        write(folder, "tokenizer", newer | {"model": newer["model"] | {"merges": merges}})
        with pytest.raises(ValueError, match=r"tokenizer\.json: expected a"):
            Tokenizer.load(folder)


def test_ids_that_a_file_gives_are_kept(folder):
    write(folder, "added_tokens", {"<pad>": 4500})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("a<pad>") == [65, 4500]
    assert tokenizer.vocab_size == 4501


def test_what_only_hf_assumes_is_no_token(tmp_path):
    Tokenizer({"a": 0, "b": 1}, []).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eot_token, tokenizer.added_tokens) == (2, None, ())
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).added_tokens == ()
    write(tmp_path, "tokenizer_config", {"pad_token": "[PAD]"})
    # Where it gives an id to it, the next one is HF's all the same.
    assert Tokenizer.load(tmp_path).encode("a[PAD]", "all") == hf_ids(tmp_path, "a[PAD]") == [0, 3]


def hf_ids(folder, text):
    write(folder, "config", {"model_type": "gpt2"})
    return hf(folder)(text).input_ids


def test_a_role_that_is_null_stays_so(folder, tmp_path):
    write(folder, "tokenizer_config", {"eos_token": None, "pad_token": None})
    Tokenizer.load(folder).save(tmp_path / "saved")
    write(tmp_path / "saved", "config", {"model_type": "gpt2"})
    for place in (folder, tmp_path / "saved"):
        assert "eos_token" not in Tokenizer.load(place).roles
        assert hf(place).eos_token is None
        assert hf(place).bos_token == "<|endoftext|>"


def test_the_end_of_a_text_is_the_models_where_no_file_names_it(tmp_path):
    Tokenizer({"a": 0, "b": 1, "</s>": 2}, []).save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    write(tmp_path, "config", {"model_type": "gpt2", "eos_token_id": [2, 1], "bos_token_id": 9})
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eot_token, tokenizer.eot_id, tokenizer.bot_id) == ("</s>", 2, 2)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("added_tokens", '{"<pad>": "1"}', "added_tokens.json: expected an integer"),
        ("added_tokens", '{"<pad>": 5}', "vocab.json, .*: Each token .* got 5 for '%' and '<pad>'"),
        ("added_tokens", "version https://git-lfs.github.com", "added_tokens.json: .*git lfs pull"),
        ("special_tokens_map", "[" * 99_999, "special_tokens_map.json: .*nested too deeply"),
        ("special_tokens_map", '{"pad_token": {}}', "special_tokens_map.json: .*'content'"),
        ("tokenizer_config", '{"added_tokens_decoder": {"x": {}}}', "tokenizer_config.json: .*'x'"),
        ("tokenizer_config", '{"added_tokens_decoder": [1]}', "tokenizer_config.json: expected"),
        ("tokenizer", '{"model": null}', "tokenizer.json: expected a model"),
        (
            "tokenizer",
            '{"model": {"type": "Unigram"}}',
            "tokenizer.json: expected what `tokenizers`",
        ),
    ],
)
def test_a_damaged_file_is_named(folder, name, text, message):
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "written, message",
    [(b"a b\n\xff", "expected UTF-8"), (b"version https://git-lfs.github.com", "git lfs pull")],
)
def test_merges_that_are_no_text_are_named(folder, written, message):
    (folder / "merges.txt").write_bytes(written)
    with pytest.raises(ValueError, match=rf"merges\.txt: .*{message}"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("name", ["BlenderbotTokenizer", "CLIPTokenizer"])
def test_a_class_that_cuts_otherwise_is_refused(folder, name):
    write(folder, "tokenizer_config", {"tokenizer_class": name})
    with pytest.raises(TokenizerKindError, match=f"the class {name} and merges.txt, "):
        Tokenizer.load(folder)


@pytest.mark.parametrize("wrong", [["a", 3], ["a", "b", "c"], "a b c"])
def test_of_many_merges_the_wrong_one_is_named(wrong):
    got = wrong if isinstance(wrong, str) else " ".join(map(str, wrong))
    with pytest.raises(ValueError, match=f"merges.txt: .* with a space between, got '{got}'"):
        tokenizer_files._as_pairs(["x y", ["x", "z"], wrong], Path("merges.txt"))
