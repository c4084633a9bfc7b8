"""A corpus in a folder: what is opened, what it is compared with, and what is known of it after."""

import hashlib
import json
import pickle

import numpy as np
import pytest

from gpt2_jax import Tokenizer
from gpt2_jax.files import CheckpointError
from gpt2_jax.training import corpus, data, manifest
from gpt2_jax.training.corpus import index, open_corpus, verify
from gpt2_jax.training.data import Batches, Place
from gpt2_jax.training.prepare import prepare
from gpt2_jax.training.token_files import DataError
from tests.reference import DATA

PAGE = (DATA / "held-out.txt").read_text(encoding="utf-8")


def ids_of(tokens):
    """All ids, file by file."""
    rows = [tokens.read(Place(file, 0, int(size))) for file, size in enumerate(tokens.sizes)]
    return np.concatenate(rows).tolist()


def prepared(folder):
    """What `prepare` says of a page of characters, which it writes to `out`."""
    (folder / "a.txt").write_text(PAGE, encoding="utf-8")
    return prepare([folder / "a.txt"], folder / "out", tokenizer="char")


def numbered(folder, *parts, part="train", dtype=np.uint16):
    """Token files with numbers, and a `meta.json` for ids below 100."""
    folder.mkdir(exist_ok=True)
    for number, ids in enumerate(parts):
        np.array(ids, dtype).tofile(folder / f"{part}_{number:05}.bin")
    (folder / "meta.json").write_text(
        json.dumps({"vocab_size": 100, "dtype": np.dtype(dtype).name})
    )
    return folder


def test_a_tokenizer_larger_than_the_datas_vocabulary_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(PAGE, encoding="utf-8")
    prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="char")
    Tokenizer.gpt2().save(tmp_path / "out")
    with pytest.raises(DataError, match=r"the data's `vocab_size`, got ids up to 50256"):
        open_corpus(tmp_path / "out")


def test_what_was_prepared_is_opened(tmp_path):
    meta = prepared(tmp_path)
    opened = open_corpus(tmp_path / "out")
    assert ids_of(opened.train) == np.fromfile(tmp_path / "out" / "train.bin", np.uint16).tolist()
    assert ids_of(opened.val) == np.fromfile(tmp_path / "out" / "val.bin", np.uint16).tolist()
    assert opened.vocab_size == meta["vocab_size"]
    assert opened.bytes_per_token == meta["val"]["bytes"] / meta["val"]["tokens"]
    assert opened.tokenizer.vocab == Tokenizer.load(tmp_path / "out").vocab


def test_nanogpts_folder_for_gpt2_is_opened_with_gpt2s_tokenizer(tmp_path):
    np.array([50256, 1], np.uint16).tofile(tmp_path / "train.bin")
    opened = open_corpus(tmp_path)
    assert opened.vocab_size == 50257
    assert opened.tokenizer is Tokenizer.gpt2()
    assert (opened.val, opened.bytes_per_token) == (None, None)


def test_a_folder_that_says_little_has_no_tokenizer(tmp_path):
    (tmp_path / "meta.json").write_text('{"vocab_size": 65}')
    np.array([64, 1], np.uint16).tofile(tmp_path / "train.bin")
    assert open_corpus(tmp_path).tokenizer is None
    np.array([64], np.uint16).tofile(tmp_path / "val.bin")
    with pytest.raises(DataError, match="val.bin: expected at least 2 ids, to predict one, got 1"):
        open_corpus(tmp_path)


def test_nanogpts_characters_are_the_tokenizer(tmp_path):
    text = "to be, or nöt"
    # As `data/shakespeare_char/prepare.py` has them, but for the order.
    chars = sorted(set(text), reverse=True)
    itos = dict(enumerate(chars))
    ids = [chars.index(char) for char in text]
    np.array(ids, np.uint16).tofile(tmp_path / "train.bin")
    meta = {"vocab_size": len(chars), "itos": itos, "stoi": {char: i for i, char in itos.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    opened = open_corpus(tmp_path)
    assert opened.tokenizer.encode(text) == ids
    assert opened.tokenizer.decode(ids_of(opened.train)) == text
    # With ids for the bytes of "ö" behind those of the characters.
    assert opened.vocab_size == opened.tokenizer.vocab_size == len(chars) + 2
    words = meta | {"itos": {i: char * 2 for i, char in itos.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(words))
    opened = open_corpus(tmp_path)
    assert (opened.tokenizer, opened.vocab_size) == (None, len(chars))


def test_token_files_are_found_under_others_names(tmp_path):
    np.save(tmp_path / "edufineweb_train_000001.npy", np.array([1, 2, 3], np.uint16))
    np.save(tmp_path / "edufineweb_val_000000.npy", np.array([4, 5], np.uint16))
    opened = open_corpus(tmp_path)
    assert (ids_of(opened.train), ids_of(opened.val)) == ([1, 2, 3], [4, 5])
    np.save(tmp_path / "edufineweb_train_000002.npy", np.array([6], np.uint16))
    assert open_corpus(tmp_path).train.sizes.tolist() == [3, 1]
    np.array([7], np.uint16).tofile(tmp_path / "train.bin")
    assert ids_of(open_corpus(tmp_path).train) == [7]


def test_meta_json_says_how_wide_the_ids_are(tmp_path):
    np.array([1, 70_000], np.uint32).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.json").write_text(json.dumps({"dtype": "uint32", "vocab_size": 70_001}))
    assert ids_of(open_corpus(tmp_path).train) == [1, 70_000]


def test_bad_ids_of_small_files_are_found_wherever_the_check_divides_them(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "IDS_PER_READ", 4)
    np.array([0, 1, 2, 3, 4, 5, 9, 6, 8], np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 10}))
    assert len(open_corpus(tmp_path).train) == 9
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 8}))
    with pytest.raises(DataError, match=r"train.bin: .*\[0, 8\) \(`vocab_size`\), got 9 at 6"):
        open_corpus(tmp_path)
    np.save(tmp_path / "val.npy", np.array([1, -2]))
    np.array([0, 1], np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"val.npy: expected ids in \[0, 8\) .*, got -2 at 1"):
        open_corpus(tmp_path)


def test_a_file_of_int32_is_found_by_its_number_of_ids_and_not_by_its_zeros(tmp_path):
    np.array([7, 8, 9], np.int32).tofile(tmp_path / "train.bin")
    # Nobody can tell: these may be six ids, of which every second is 0.
    assert ids_of(open_corpus(tmp_path).train) == [7, 0, 8, 0, 9, 0]
    (tmp_path / "meta.json").write_text(json.dumps({"train": {"tokens": 3}}))
    with pytest.raises(
        DataError, match="train.bin: expected 3 uint16 ids, as meta.json says, got 6"
    ):
        open_corpus(tmp_path)


def test_a_run_on_one_file_remembers_what_it_always_did_with_a_manifest_and_without(tmp_path):
    prepared(tmp_path)
    out = tmp_path / "out"
    expected = {
        part: {
            "bytes": (out / f"{part}.bin").stat().st_size,
            "sha256": hashlib.sha256((out / f"{part}.bin").read_bytes()).hexdigest(),
        }
        for part in ("train", "val")
    }
    assert open_corpus(out).identity == expected
    (out / "manifest.json").unlink()
    assert open_corpus(out).identity == expected
    index(out)
    assert open_corpus(out).identity == expected


def test_of_large_files_without_a_manifest_a_sample_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "WHOLE_BYTES", 20)
    monkeypatch.setattr(manifest, "SAMPLE_BLOCK", 2)
    ids = np.array([1, 2, 3, 99, 5, 6, 7, 8, 9, 10, 11], np.uint16)  # sampled: 1, 6 and 11

    def identity():
        ids.tofile(tmp_path / "train.bin")
        return open_corpus(tmp_path).identity

    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 12}))
    before = identity()
    assert list(before["train"]) == ["bytes", "sample"]
    for place in (0, 5, 10):
        ids[place] += 1
        assert identity() != before
        ids[place] -= 1
    ids[8] += 1
    assert identity() == before
    # Indexed, it is what a run remembered that was begun before there were samples.
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 100}))
    index(tmp_path)
    sha256 = hashlib.sha256(ids.tobytes()).hexdigest()
    assert identity() == {"train": {"bytes": 22, "sha256": sha256}}
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 12}))
    # The id that is none is found when it is read.
    batches = Batches(open_corpus(tmp_path).train, batch_size=4, length=2, seed=0)
    with pytest.raises(DataError, match=r"train.bin: expected ids in \[0, 12\) .*, got 99 at 3"):
        batches(0)


def test_a_file_that_is_too_long_to_keep_its_order_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DRAWN_IDS", 30)
    rows = {}
    for count in (30, 31):
        np.arange(count, dtype=np.uint16).tofile(tmp_path / "train.bin")
        opened = open_corpus(tmp_path)
        assert ("order" in opened.identity) == (count == 31)
        batches = Batches(opened.train, batch_size=9, length=3, seed=0)
        assert batches.windows_per_epoch == 9
        rows[count] = batches(0)[:, 0]
        # Whichever order it is, windows are there once.
        assert np.diff(np.sort(rows[count])).tolist() == [3] * 8
    assert np.argsort(rows[30]).tolist() != np.argsort(rows[31]).tolist()


def test_many_files_have_one_identity_that_every_file_and_their_order_change(tmp_path):
    def identity(*parts):
        return open_corpus(numbered(tmp_path, *parts)).identity

    before = identity([1, 2], [3, 4], [5, 6, 7])
    assert before["train"]["files"] == 3
    assert before["train"]["bytes"] == 14
    assert before["order"] == {"name": "feistel-8"}
    others = [identity([1, 2], [3, 5], [5, 6, 7]), identity([3, 4], [1, 2], [5, 6, 7])]
    assert before not in others
    index(tmp_path)
    assert open_corpus(tmp_path).identity == others[1]


def test_with_a_manifest_no_file_is_read_through(tmp_path, monkeypatch):
    folder = numbered(tmp_path, [1, 2, 3], [4, 5])
    assert index(folder) == {"files": 2, "tokens": 5, "bytes": 10}
    written = json.loads((folder / "manifest.json").read_text())["train"]
    assert [file["tokens"] for file in written] == [3, 2]
    assert [file["max_id"] for file in written] == [3, 5]

    def scan(*args):
        raise AssertionError("a file was read")

    monkeypatch.setattr(corpus, "scan", scan)
    assert ids_of(open_corpus(folder).train) == [1, 2, 3, 4, 5]
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 5}))
    with pytest.raises(DataError, match=r"00001.bin: .*\[0, 5\) .*, got 5 by manifest.json"):
        open_corpus(folder)


def changed(ids, dtype=np.uint16):
    """Something that writes other ids to a file."""
    return lambda file: np.array(ids, dtype).tofile(file)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            changed([4, 5, 6]),
            "train_00001.bin: .*manifest.json says, bytes 4, got 6; tokens 2, got 3",
        ),
        (
            changed([4, 6]),
            "train_00001.bin: .*manifest.json says, .*sample [0-9a-f]+, got [0-9a-f]+.$",
        ),
        (lambda file: file.unlink(), "train_00001.bin: there is no such file"),
        (lambda file: file.write_bytes(b""), "train_00001.bin: .*, got 0 bytes"),
        (
            lambda file: file.with_name("train_00002.bin").write_bytes(b"12"),
            "expected the files of manifest.json, got train_00002.bin too: .*--index",
        ),
    ],
)
def test_files_that_are_not_what_the_manifest_says_are_named(tmp_path, change, message):
    folder = numbered(tmp_path, [1, 2, 3], [4, 5])
    index(folder)
    change(folder / "train_00001.bin")
    with pytest.raises(DataError, match=message):
        open_corpus(folder)
    with pytest.raises(DataError, match=message):
        verify(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"version": 2}', "expected the `version` 1, got 2"),
        ('{"version": 1, "train": {}}', r"expected lists of files, got \{\}"),
        ('{"version": 1, "train": [{"name": "a"}], "val": []}', r"expected \('name', 'bytes'"),
        ("{", "expected JSON"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, content, message):
    folder = numbered(tmp_path, [1, 2])
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=f"manifest.json: {message}"):
        open_corpus(folder)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("name", "../train_00000.bin", "names within the folder, got '../train_00000.bin'"),
        ("name", "/etc/passwd", "names within the folder, got '/etc/passwd'"),
        ("name", "./train_00000.bin", "names within the folder, got './train_00000.bin'"),
        ("tokens", True, "expected counts and texts, got"),
        ("sha256", None, "expected counts and texts, got"),
    ],
)
def test_a_manifest_names_files_of_its_folder_alone(tmp_path, field, value, message):
    folder = numbered(tmp_path, [1, 2])
    index(folder)
    content = json.loads((folder / "manifest.json").read_text())
    content["train"][0][field] = value
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        open_corpus(folder)


def test_files_of_two_dtypes_are_named(tmp_path):
    np.save(tmp_path / "a_train_1.npy", np.array([1], np.uint16))
    np.save(tmp_path / "a_train_2.npy", np.array([1], np.int64))
    with pytest.raises(DataError, match="a_train_2.npy: .*uint16 as in a_train_1.npy, got int64"):
        open_corpus(tmp_path)


def test_many_files_have_together_what_meta_json_says(tmp_path):
    folder = numbered(tmp_path, [1, 2], [3])
    meta = {"vocab_size": 100, "train": {"tokens": 4}}
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="2 files of train: expected 4 .*meta.json says, got 3"):
        open_corpus(folder)


def test_verify_names_all_that_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "SAMPLE_BLOCK", 2)
    folder = numbered(tmp_path, range(50), range(40), range(30))
    index(folder)
    assert verify(folder) == {"files": 3, "tokens": 120, "bytes": 240}
    for name, place in (("train_00000.bin", 3), ("train_00002.bin", 7)):
        ids = np.fromfile(folder / name, np.uint16)
        ids[place] = 98
        ids.tofile(folder / name)
    open_corpus(folder)  # which looks at a sample
    with pytest.raises(DataError) as error:
        verify(folder)
    first, second = str(error.value).splitlines()  # and the file between them is in order
    assert "train_00000.bin: expected, as manifest.json says, max_id 49, got 98; sha256 " in first
    assert "train_00002.bin: expected, as manifest.json says, max_id 29, got 98; sha256 " in second


def test_verify_goes_on_behind_a_file_that_is_gone(tmp_path):
    folder = numbered(tmp_path, [1, 2], [3, 4], [5, 6])
    index(folder)
    (folder / "train_00002.bin").unlink()
    changed([1, 3])(folder / "train_00000.bin")
    with pytest.raises(DataError) as error:
        verify(folder)
    first, second = str(error.value).splitlines()
    assert "train_00002.bin: there is no such file" in first
    assert "train_00000.bin: expected, as manifest.json says, max_id 2, got 3" in second


def test_verify_without_a_manifest_looks_at_the_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "WHOLE_BYTES", 1)
    folder = numbered(tmp_path, [1, 2, 3], [4, 100])
    assert len(open_corpus(folder).train) == 5
    with pytest.raises(DataError, match=r"00001.bin: expected ids in \[0, 100\) .*got 100 at 1"):
        verify(folder)
    with pytest.raises(DataError, match=r"00001.bin: expected ids in \[0, 100\) .*got 100 at 1"):
        index(folder)
    assert not (folder / "manifest.json").exists()


def test_files_that_came_after_the_manifest_are_named_under_others_names_too(tmp_path):
    for number in (1, 2):
        np.save(tmp_path / f"fineweb_train_{number:06}.npy", np.array([number, 5], np.uint16))
        if number == 1:
            index(tmp_path)
    with pytest.raises(DataError, match="the files of manifest.json, got fineweb_train_000002.npy"):
        open_corpus(tmp_path)
    index(tmp_path, overwrite=True)
    assert ids_of(open_corpus(tmp_path).train) == [1, 5, 2, 5]


def test_a_manifest_is_replaced_only_if_told(tmp_path):
    folder = numbered(tmp_path, [1, 2])
    (folder / "manifest.json").write_text("damaged")
    index(folder, overwrite=True)
    numbered(tmp_path, [1, 2], [3, 4])
    with pytest.raises(CheckpointError, match="manifest.json exists already"):
        index(folder)
    assert index(folder, overwrite=True)["files"] == 2
    assert ids_of(open_corpus(folder).train) == [1, 2, 3, 4]
