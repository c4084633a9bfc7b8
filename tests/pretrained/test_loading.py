"""A model and its tokenizer belong together: which tokenizer is taken, and when none is."""

import json
import shutil
import threading

import jax
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.config import PRESETS
from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained import hub, loading, weights
from gpt2_jax.pretrained.formats import SafetensorsFile
from gpt2_jax.tokenizer_files import FILES, TokenizerKindError

ADVICE = "Name the tokenizer that the model was trained with, as in `--model_name gpt2`"


@pytest.fixture
def checkpoint(tmp_path):
    """A GPT-2 without a tokenizer, but for its weights, which no test here reads."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = PRESETS["gpt2"].to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_json(file, values):
    file.write_text(json.dumps(values), encoding="utf-8")


def copy_demo_tokenizer(folder):
    for name in FILES:
        if (hub.DEMO / name).is_file():
            shutil.copy(hub.DEMO / name, folder / name)


# All three.


def test_load_pretrained_is_load_and_load_tokenizer():
    model = gpt2_jax.load_pretrained("demo")
    config, params = gpt2_jax.load("demo")
    assert model.config == config
    assert jax.tree.structure(model.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert model.tokenizer.vocab == gpt2_jax.load_tokenizer("demo").vocab


def test_load_pretrained_casts_and_takes_another_tokenizer(tmp_path):
    gpt2_jax.Tokenizer({"a": 0}, []).save(tmp_path)
    config, params, tokenizer = gpt2_jax.load_pretrained(
        "demo", dtype="float32", tokenizer_name=tmp_path
    )
    assert config.dtype == params["wte"]["embedding"].dtype.name == "float32"
    assert tokenizer.vocab == {"a": 0}


def test_a_tokenizer_larger_than_the_model_is_refused():
    message = (
        "ids below 4096, the model's `vocab_size`, got ids up to 50256 from that of gpt2; "
        rf"added tokens among them are '<\|endoftext\|>' \(50256\). {ADVICE}"
    )
    with pytest.raises(ValueError, match=message):
        gpt2_jax.load_pretrained("demo", tokenizer_name="gpt2")


def test_load_pretrained_keeps_to_the_callers_settings():
    with jax.enable_x64(False), pytest.raises(CheckpointError, match="would be float64"):
        gpt2_jax.load_pretrained("demo", dtype="float64")
    with jax.enable_x64(True):
        model = gpt2_jax.load_pretrained("demo", dtype="float64")
    assert model.params["wte"]["embedding"].dtype.name == "float64"


def test_a_wrong_dtype_is_refused_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(loading, "resolve", lambda *args, **options: pytest.fail("was fetched"))
    with pytest.raises(CheckpointError, match="`dtype` must be one of float32"):
        gpt2_jax.load_pretrained("some/model", dtype="int16")


def test_weights_are_read_while_the_vocabulary_is_parsed(monkeypatch):
    parsing = threading.Event()
    reading = threading.Event()

    def load_from(*args, **options):
        reading.set()
        assert parsing.wait(timeout=60)
        return PRESETS["gpt2"], {}

    def load_tokenizer(*args, **options):
        parsing.set()
        assert reading.wait(timeout=60)
        return gpt2_jax.Tokenizer.gpt2()

    monkeypatch.setattr(weights, "load_from", load_from)
    monkeypatch.setattr(loading, "load_tokenizer", load_tokenizer)
    gpt2_jax.load_pretrained("demo")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_model_is_known_while_its_weights_are_read(dtype, monkeypatch):
    known = threading.Event()
    seen = []

    def meanwhile(model):
        seen.append(model)
        known.set()

    def parts(file, name, read=SafetensorsFile.parts):
        assert known.wait(timeout=60)  # before the first of its weights
        return read(file, name)

    monkeypatch.setattr(SafetensorsFile, "parts", parts)
    loaded = gpt2_jax.load_pretrained("demo", dtype=dtype, meanwhile=meanwhile)
    (model,) = seen
    assert model.config == loaded.config
    assert model.params == jax.eval_shape(lambda: loaded.params)
    assert model.tokenizer is loaded.tokenizer


def test_what_fails_while_weights_are_read_is_told():
    def meanwhile(model):
        raise ValueError(f"not for {model.config.n_layer} layers")

    with pytest.raises(ValueError, match="not for 3 layers"):
        gpt2_jax.load_pretrained("demo", meanwhile=meanwhile)
    # That of the weights, or of a tokenizer that does not fit, explains more.
    with pytest.raises(ValueError, match="ids below 4096"):
        gpt2_jax.load_pretrained("demo", tokenizer_name="gpt2", meanwhile=meanwhile)


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="expected `config.json` in this folder"):
        gpt2_jax.load_pretrained(tmp_path)


# The tokenizer: whose.


def test_names_are_resolved_as_those_of_models(checkpoint):
    copy_demo_tokenizer(checkpoint)
    sizes = [gpt2_jax.load_tokenizer(name).vocab_size for name in ("demo", hub.DEMO, checkpoint)]
    assert sizes == [4096, 4096, 4096]


@pytest.mark.parametrize("name", [*PRESETS, "openai-community/gpt2-xl"])
def test_gpt2s_sizes_share_a_tokenizer_that_needs_no_download(name):
    assert gpt2_jax.load_tokenizer(name) is gpt2_jax.Tokenizer.gpt2()
    assert gpt2_jax.load_tokenizer("demo", name) is gpt2_jax.Tokenizer.gpt2()


def test_a_folder_wins_over_a_size_of_gpt2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    copy_demo_tokenizer(tmp_path / "gpt2")
    assert gpt2_jax.load_tokenizer("gpt2").vocab_size == 4096


def test_the_one_that_is_named_counts(tmp_path):
    assert gpt2_jax.load_tokenizer("demo", "gpt2").vocab_size == 50257
    assert gpt2_jax.load_tokenizer(tmp_path, "demo").vocab_size == 4096
    assert gpt2_jax.load_tokenizer("/no/such/folder", str(hub.DEMO)).vocab_size == 4096


def test_openais_names_are_read(checkpoint):
    shutil.copy(hub.DEMO / "vocab.json", checkpoint / "encoder.json")
    shutil.copy(hub.DEMO / "merges.txt", checkpoint / "vocab.bpe")
    read = gpt2_jax.load_tokenizer(checkpoint)
    demo = gpt2_jax.load_tokenizer("demo")
    assert (read.vocab, read.merges) == (demo.vocab, demo.merges)
    assert read.eot_id == demo.eot_id


# GPT-2's where there is none, and nowhere else.


def test_a_checkpoint_without_a_tokenizer_has_gpt2s(checkpoint):
    write_json(checkpoint / "generation_config.json", {"eos_token_id": 50256})
    assert gpt2_jax.load_tokenizer(checkpoint) is gpt2_jax.Tokenizer.gpt2()


def test_weights_alone_make_a_checkpoint(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert gpt2_jax.load_tokenizer(tmp_path) is gpt2_jax.Tokenizer.gpt2()


def test_a_folder_without_a_checkpoint_has_no_tokenizer(tmp_path):
    (tmp_path / "notes.txt").touch()
    message = f"expected vocab.json and merges.txt, or tokenizer.json, .*got notes.txt. {ADVICE}"
    with pytest.raises(FileNotFoundError, match=message):
        gpt2_jax.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "none/at/all", "./gpt2", ""])
def test_a_folder_that_does_not_exist_has_no_tokenizer(name):
    with pytest.raises(CheckpointError, match="There is no folder"):
        gpt2_jax.load_tokenizer(name)
    with pytest.raises(CheckpointError, match="There is no folder"):
        gpt2_jax.load_tokenizer("demo", name)


def test_a_model_of_another_architecture_has_none(checkpoint):
    write_json(checkpoint / "config.json", {"model_type": "llama"})
    with pytest.raises(FileNotFoundError, match="expected vocab.json and merges.txt"):
        gpt2_jax.load_tokenizer(checkpoint)


def test_one_that_is_named_is_not_replaced(checkpoint):
    with pytest.raises(FileNotFoundError, match=f"got config.json. {ADVICE}"):
        gpt2_jax.load_tokenizer("demo", str(checkpoint))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "vocab.bpe", "tokenizer_config.json"])
def test_half_a_tokenizer_is_not_replaced(checkpoint, name):
    write_json(checkpoint / name, {})
    with pytest.raises(FileNotFoundError, match=f"got config.json, {name}. {ADVICE}"):
        gpt2_jax.load_tokenizer(checkpoint)


@pytest.mark.parametrize(
    "name", ["vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "a.spm"]
)
def test_another_kinds_vocabulary_is_not_replaced(checkpoint, name):
    (checkpoint / name).touch()
    message = f"a byte-level BPE as GPT-2's, .* got the class unknown and {name}. .*{ADVICE}"
    with pytest.raises(TokenizerKindError, match=message):
        gpt2_jax.load_tokenizer(checkpoint)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_another_class_is_not_replaced(checkpoint, file):
    values = PRESETS["gpt2"].to_dict() | {"tokenizer_class": "BertTokenizerFast"}
    write_json(checkpoint / file, values)
    with pytest.raises(TokenizerKindError, match=f"got the class BertTokenizerFast.*{ADVICE}"):
        gpt2_jax.load_tokenizer(checkpoint)


def test_class_and_files_are_named_together(checkpoint):
    (checkpoint / "spiece.model").touch()
    write_json(checkpoint / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})
    message = "got the class T5Tokenizer and spiece.model, tokenizer_config.json"
    with pytest.raises(ValueError, match=message) as caught:
        gpt2_jax.load_tokenizer(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert gpt2_jax.load_tokenizer(checkpoint, "gpt2").vocab_size == 50257


def test_another_class_is_refused_though_its_files_have_our_names(checkpoint):
    copy_demo_tokenizer(checkpoint)
    write_json(checkpoint / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"})
    with pytest.raises(TokenizerKindError, match="got the class CLIPTokenizer"):
        gpt2_jax.load_tokenizer(checkpoint)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", None])
def test_classes_of_gpt2s_kind_are_read(checkpoint, name):
    copy_demo_tokenizer(checkpoint)
    (checkpoint / "vocab.txt").touch()  # does not speak against what lies beside it
    write_json(checkpoint / "tokenizer_config.json", {"tokenizer_class": name})
    assert gpt2_jax.load_tokenizer(checkpoint).vocab_size == 4096


def test_a_damaged_file_is_named_and_not_replaced(checkpoint):
    (checkpoint / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected JSON, got"):
        gpt2_jax.load_tokenizer(checkpoint)
