"""Tokenizers of other kinds give HF's ids and texts, everywhere GPT-2's own does."""

import json
import pickle
import sys

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import gpt2_jax
from gpt2_jax.hf_tokenizer import HFTokenizer
from gpt2_jax.pretrained import weights
from gpt2_jax.training.corpus import open_corpus
from gpt2_jax.training.prepare import prepare
from gpt2_jax.training.texts import Reading, documents
from tests.reference import TINY, hf_model, ours

# Each letter is there several times, so that a trained vocabulary holds it.
CORPUS = [
    "the cat sat on the mat",
    "Ein Käfer, zwei Käfer",
    "漢字と仮名",
    "漢字 仮名と the end",
] * 3
TEXTS = (
    "the cat sat .",
    " on  the mat\n",
    "漢字と仮名",
    "Käfer the end",
    "the</s> mat",
    "q\U0001f600",
    "",
)
SPECIAL = ["<s>", "</s>", "<unk>"]


def unigram():
    """As SentencePiece makes it: spaces are letters of words."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def byte_fallback():
    """As Llama's: a letter that has no token is its bytes, each a token."""
    vocab = {token: id for id, token in enumerate(SPECIAL)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for token in ("▁", "t", "h", "e", "th", "the", "▁the", "漢"):
        vocab[token] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return made


def letters():
    """A byte-level BPE that cuts otherwise than GPT-2's, and cuts texts off."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.enable_truncation(2)
    made.enable_padding(length=9)
    return made


KINDS = {"unigram": unigram, "byte fallback": byte_fallback, "bpe of whole lines": letters}


def write_json(file, values):
    file.write_text(json.dumps(values), encoding="utf-8")


def write_bert(folder, **settings):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "on"]
    words += ["mat", ".", "漢", "字", "と", "Käfer", "kafer", "end", "s"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"} | settings)


@pytest.fixture(params=[*KINDS, "bert", "bert with case"])
def folder(request, tmp_path):
    """A folder with a tokenizer of another kind than GPT-2's, as it comes with a checkpoint."""
    made = tmp_path / "model"
    made.mkdir()
    write_json(made / "config.json", {"model_type": "gpt2"})
    if request.param == "bert":
        write_bert(made, clean_up_tokenization_spaces=True, pad_token="[PAD]")
    elif request.param == "bert with case":
        write_bert(made, do_lower_case=False, strip_accents=False, tokenize_chinese_chars=False)
    else:
        KINDS[request.param]().save(str(made / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
        settings["clean_up_tokenization_spaces"] = True  # which counts for some kinds alone
        names = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
        write_json(made / "tokenizer_config.json", settings | names)
    return made


def assert_as_hf(tokenizer, folder):
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        theirs = hf(text, return_offsets_mapping=True)
        ids = tokenizer.encode(text, "all")
        assert ids == theirs.input_ids, text
        assert tokenizer.encode_with_spans(text, "all").spans == theirs.offset_mapping
        assert tokenizer.decode(ids) == hf.decode(ids)
        bare = tokenizer.encode(text, "all", add_special_tokens=False)
        assert bare == hf(text, add_special_tokens=False).input_ids
        assert [*tokenizer.template.before, *bare, *tokenizer.template.after] == ids
    assert tokenizer.special_tokens == hf.added_tokens_encoder
    assert tokenizer.vocab_size == len(hf)


def test_ids_spans_and_texts_are_hfs(folder, tmp_path):
    tokenizer = gpt2_jax.load_tokenizer(folder)
    assert_as_hf(tokenizer, folder)
    assert_as_hf(pickle.loads(pickle.dumps(tokenizer)), folder)
    tokenizer.save(tmp_path / "saved")
    write_json(tmp_path / "saved" / "config.json", {"model_type": "gpt2"})
    again = gpt2_jax.Tokenizer.load(tmp_path / "saved")
    assert again.roles == tokenizer.roles
    assert_as_hf(again, folder)
    assert_as_hf(tokenizer, tmp_path / "saved")


def test_a_stream_is_the_text_that_hf_decodes_at_once(folder):
    tokenizer = gpt2_jax.load_tokenizer(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for n_known in (0, 1, 3):
            context = ids[:n_known]
            if tokenizer.decode(context).endswith("\ufffd"):
                continue  # half a character, which no prompt ends in
            decoder = tokenizer.stream_decoder(context)
            shown = "".join(decoder.push([id]) for id in ids[n_known:]) + decoder.flush()
            assert tokenizer.decode(context) + shown == tokenizer.decode(ids), (text, n_known)


def test_a_stream_shows_whole_characters(tmp_path):
    byte_fallback().save(str(tmp_path / "tokenizer.json"))
    tokenizer = gpt2_jax.Tokenizer.load(tmp_path)
    decoder = tokenizer.stream_decoder()
    lead, trail = (3 + byte for byte in "é".encode())  # the bytes follow three special tokens
    assert [decoder.push([lead]), decoder.push([trail])] == ["", "é"]
    decoder = tokenizer.stream_decoder()
    assert [decoder.push([lead]), decoder.flush()] == ["", "\ufffd"]


def test_special_tokens_are_text_unless_allowed(folder):
    tokenizer = gpt2_jax.load_tokenizer(folder)
    end = tokenizer.eot_token or "[SEP]"
    id = tokenizer.special_tokens[end]
    plain = tokenizer.encode(f"the {end}", add_special_tokens=False)
    # A Unigram has the pieces of its vocabulary, as HF's `split_special_tokens` leaves them.
    if type(tokenizer._engine.model) is not models.Unigram:
        assert id not in plain
    assert tokenizer.encode(f"the {end}", "all", add_special_tokens=False)[-1] == id
    with pytest.raises(ValueError, match="must be 'all' or nothing"):
        tokenizer.encode("the", [end])
    with pytest.raises(
        ValueError, match=f"of `disallowed_special`, got '.*{end[1:-1]}.*position 4"
    ):
        tokenizer.encode(f"the {end}", disallowed_special="all")


def test_ids_without_a_token_decode_to_nothing(folder):
    tokenizer = gpt2_jax.load_tokenizer(folder)
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode(np.array([*ids, 5000])) == tokenizer.decode(ids)
    with pytest.raises(ValueError, match="Ids must be 0 or greater, got -1"):
        tokenizer.decode([-1])


def test_what_the_library_cannot_encode_or_decode_is_named(tmp_path):
    made = tokenizers.Tokenizer(models.Unigram([("b", -1.0)]))  # without a token for the unknown
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = gpt2_jax.Tokenizer.load(tmp_path)
    assert tokenizer.encode("bb") == [0, 0]
    with pytest.raises(ValueError, match="that `tokenizers` encodes, got 'bab' and .*unk_id"):
        tokenizer.encode("bab")
    with pytest.raises(ValueError, match="`errors` must be 'replace' .*, got 'strict'"):
        tokenizer.decode([0], errors="strict")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model with a tokenizer of SentencePiece's kind."""
    made = tmp_path_factory.mktemp("checkpoint")
    made_tokenizer = unigram()
    model = hf_model(**TINY | {"vocab_size": made_tokenizer.get_vocab_size()})
    config, params = ours(model)
    weights.save(made / "model", params, config)
    made_tokenizer.save(str(made / "model" / "tokenizer.json"))
    return made / "model", model


def test_a_text_goes_on_as_hfs_does(checkpoint):
    folder, model = checkpoint
    config, params, tokenizer = gpt2_jax.load_pretrained(folder, dtype="float64")
    assert isinstance(tokenizer, HFTokenizer)
    # By the model's config, as no file of the tokenizer says it.
    assert (tokenizer.eot_token, tokenizer.eot_id) == ("<s>", 0)
    prompt = "the cat"
    ids = tokenizer.encode(prompt)
    n_new = 16
    model.generation_config.eos_token_id = None
    made = model.generate(
        torch.tensor([ids]), max_new_tokens=n_new, do_sample=False, pad_token_id=0
    )
    hf = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole = hf.decode(made[0].tolist(), skip_special_tokens=False)
    options = {"config": config, "max_new_tokens": n_new, "stop_ids": ()}
    (row,) = gpt2_jax.complete(params, tokenizer, [prompt], **options)
    # With the spaces that the continuation's tokens alone would not have.
    assert row.prompt + row.text == whole
    growing = gpt2_jax.stream_text(params, tokenizer, [prompt], chunk=2, **options)
    shown = [rows[0].new for rows in growing]
    assert "".join(shown) == row.text and len(shown) > 2
    stop = row.text[2:4]
    assert len(stop) == 2
    (stopped,) = gpt2_jax.complete(params, tokenizer, [prompt], stop=stop, **options)
    assert stopped.text == row.text[: row.text.index(stop)] and stopped.finish_reason == "stop"


@pytest.mark.parametrize("name", ["unigram", "byte fallback"])
def test_a_corpus_holds_hfs_ids_of_each_document(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    KINDS[name]().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>", "tokenizer_class": None})
    (tmp_path / "a.txt").write_text("the cat\n<|endoftext|>\nthe mat\n", encoding="utf-8")
    prepare([tmp_path / "a.txt"], tmp_path / "data", tokenizer=folder, val_fraction=0)
    hf = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    # `</s>` parts documents that the tokenizer does not part itself, by its `<s>`.
    end = [] if name == "byte fallback" else [1]
    texts = documents((tmp_path / "a.txt").read_text(), Reading())
    expected = [id for text in texts for id in hf.encode(text).ids + end]
    ids = np.fromfile(tmp_path / "data" / "train.bin", np.uint16)
    assert len(texts) == 2 and ids.tolist() == expected
    assert open_corpus(tmp_path / "data").tokenizer.vocab == hf.get_vocab(False)


def test_without_the_library_an_error_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.delitem(sys.modules, "gpt2_jax.hf_tokenizer", raising=False)
    with pytest.raises(ImportError, match=r'pip install "gpt2_jax\[tokenizers\]"'):
        gpt2_jax.load_tokenizer(folder)


def test_a_bert_without_its_vocabulary_is_refused(tmp_path):
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "BertTokenizerFast"})
    with pytest.raises(ValueError, match="got the class BertTokenizerFast and tokenizer_config"):
        gpt2_jax.load_tokenizer(tmp_path)
