"""Token files: how ids lie in them, which files they are, and what goes with them."""

import io
import mmap
import os
import pickle

import numpy as np
import pytest

from gpt2_jax.training.token_files import DataError, find_token_files, read_meta, token_file


def test_nanogpts_files_are_read_as_they_are(tmp_path):
    ids = np.arange(50_000, 50_257)
    ids.astype(np.uint16).tofile(tmp_path / "train.bin")
    tokens = token_file(tmp_path / "train.bin").map()
    np.testing.assert_array_equal(tokens, ids)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_a_file_that_became_shorter_is_named(tmp_path):
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "train.bin")
    file = token_file(tmp_path / "train.bin")
    np.arange(8, dtype=np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match="train.bin: expected 9 uint16 ids, as there were, but"):
        file.map()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "expected JSON, got "),
        ("[]", "expected an object, got list"),
        ('{"dtype": "int8"}', 'expected the `dtype` "uint16" or "uint32", got \'int8\''),
    ],
)
def test_a_damaged_meta_json_is_named(tmp_path, text, message):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(DataError, match=f"meta.json: {message}"):
        read_meta(tmp_path)


def test_a_folder_without_meta_says_nothing(tmp_path):
    assert read_meta(tmp_path) == {}


def write_pickle(folder, content):
    """Writes a `meta.pkl`."""
    with (folder / "meta.pkl").open("wb") as opened:
        pickle.dump(content, opened)


def test_nanogpts_pickle_is_read(tmp_path):
    itos = {1: "b", 0: "a"}  # the ids count, not their order in the file
    write_pickle(tmp_path, {"vocab_size": 2, "itos": itos, "stoi": {"a": 0, "b": 1}})
    assert read_meta(tmp_path) == {"vocab_size": 2, "itos": ["a", "b"]}


class Runs:
    """What a pickle can hold: a function and what to call it with."""

    def __reduce__(self):
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_nothing(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({"vocab_size": 2, "itos": Runs()}, protocol)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(DataError, match="meta.pkl: expected a pickle of plain data, but it names"):
        read_meta(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # elsewhere it does run
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "expected a positive `vocab_size`, as nanoGPT writes it, got None"),
        ({"vocab_size": "65"}, "as nanoGPT writes it, got '65'"),
        ({"vocab_size": 2, "itos": {0: "a"}}, "a text for each id below 2"),
        ({"vocab_size": 1, "itos": {0: 7}}, "a text for each id below 1"),
    ],
)
def test_another_pickle_is_named(tmp_path, content, message):
    write_pickle(tmp_path, content)
    with pytest.raises(DataError, match=f"meta.pkl: .*{message}"):
        read_meta(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(b"no pickle at all")
    with pytest.raises(DataError, match="meta.pkl: expected a pickle of plain data, but invalid"):
        read_meta(tmp_path)


def llm_c_file(file, magic, version, ids):
    """Writes tokens as `write_datafile` of llm.c's `dev/data/data_common.py` does."""
    header = np.zeros(256, np.int32)
    header[0] = magic
    header[1] = version
    header[2] = len(ids)
    file.write_bytes(header.tobytes() + ids.tobytes())
    return file


@pytest.mark.parametrize(
    "magic, version, dtype", [(20240520, 1, np.uint16), (20240801, 7, np.uint32)]
)
def test_llm_cs_files_are_read(tmp_path, magic, version, dtype):
    ids = np.array([50256, 1, 2], dtype)
    file = llm_c_file(tmp_path / "train.bin", magic, version, ids)
    tokens = token_file(file).map()
    assert tokens.dtype == dtype
    np.testing.assert_array_equal(tokens, ids)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_numpys_files_are_read(tmp_path, dtype):
    np.save(tmp_path / "train.npy", np.array([5, 0, 3], dtype))
    tokens = token_file(tmp_path / "train.npy").map()
    assert isinstance(tokens.base.obj, mmap.mmap)
    np.testing.assert_array_equal(tokens, [5, 0, 3])


def written(array):
    """An array as numpy writes it."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped(**arrays):
    """Arrays as numpy zips them."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.bin", written(np.arange(4)), "expected token ids, got numpy's format: call it .npy"),
        ("a.bin", zipped(ids=np.arange(4)), "got a zip, such as PyTorch and numpy write"),
        ("a.bin", np.array([20240326, 3], np.int32).tobytes(), "got a model of llm.c's"),
        ("a.bin", np.array([20240520, 2, 0], np.int32).tobytes(), "expected llm.c's version 1"),
        ("a.npy", b"\1\0\2\0", "expected numpy's format, but "),
        ("a.npy", written(np.ones((2, 2), int)), r"one row of integers, got int64 of shape \[2, 2"),
        ("a.npy", written(np.ones(2)), r"one row of integers, got float64 of shape \[2\]"),
        ("a.npy", zipped(ids=np.arange(4)), "one row of integers, got npz"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: .*{message}"):
        token_file(tmp_path / name)


def test_a_header_that_counts_other_ids_is_named(tmp_path):
    file = llm_c_file(tmp_path / "a.bin", 20240520, 1, np.arange(4, dtype=np.uint16))
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"a header that counts the ids, got \(1, 4\) with 6 bytes"):
        token_file(file)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no such file"),
        (b"", "at least one, got 0 bytes"),
        (b"\1\0\2", "whole number of uint16 ids, at least one, got 3 bytes"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "val.bin").write_bytes(content)
    with pytest.raises(DataError, match=f"val.bin: .*{message}"):
        token_file(tmp_path / "val.bin")


@pytest.mark.parametrize(
    "meta, message",
    [
        ("[1]", "expected an object, got list"),
        ('{"vocab_size": "many"}', "expected a count as `vocab_size`, got 'many'"),
        ('{"vocab_size": true}', "expected a count as `vocab_size`, got True"),
        ('{"val": [1]}', r"expected an object as `val`, got \[1\]"),
        ('{"val": {"tokens": 3}}', "expected `val.bytes` beside `val.tokens`"),
        ('{"val": {"tokens": 3, "bytes": null}}', "expected a count as `val.bytes`, got None"),
        ('{"dtype": {}}', 'expected the `dtype` "uint16" or "uint32", got {}'),
    ],
)
def test_a_meta_json_of_another_program_is_named(tmp_path, meta, message):
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(DataError, match=f"meta.json: {message}"):
        read_meta(tmp_path)


def names_of(folder, part="train"):
    """The token files of a part."""
    return [path.name for path in find_token_files(folder, part)]


def touch(folder, *names):
    """Empty files."""
    for name in names:
        (folder / name).touch()


def test_many_files_come_in_the_order_of_their_numbers(tmp_path):
    touch(tmp_path, *(f"train_{number}.bin" for number in range(11)), "val_00000.bin")
    assert names_of(tmp_path) == [f"train_{number}.bin" for number in range(11)]
    assert names_of(tmp_path, "val") == ["val_00000.bin"]


def test_llm_cs_names_begin_at_1_for_training_and_at_0_for_validation(tmp_path):
    touch(
        tmp_path, "fineweb_train_000002.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"
    )
    assert names_of(tmp_path) == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert names_of(tmp_path, "val") == ["fineweb_val_000000.bin"]


def test_a_plain_name_is_what_is_meant_and_a_single_file_may_have_any_number(tmp_path):
    touch(tmp_path, "fineweb_train_000007.npy")
    assert names_of(tmp_path) == ["fineweb_train_000007.npy"]
    touch(tmp_path, "other_train_000001.npy", "train.npy")
    assert names_of(tmp_path) == ["train.npy"]
    touch(tmp_path, "train.bin")
    assert names_of(tmp_path) == ["train.bin"]
    assert names_of(tmp_path, "val") == []


@pytest.mark.parametrize(
    "names, message",
    [
        (["train_0.bin", "train_2.bin"], "2 files with .*, got train_2.bin in place of 1"),
        (["train_2.bin", "train_3.bin"], "from 0 or 1 on, got train_2.bin in place of 1"),
        (["a_train_1.bin", "a_train_01.bin"], "for each number, got a_train_01.bin, a_train_1.bin"),
        (
            ["a_train_1.bin", "b_train_2.bin"],
            r"one name for train, got a_train\*.bin, b_train\*.bin",
        ),
        (
            ["a_train_1.bin", "a_train_2.npy"],
            r"one name for train, got a_train\*.bin, a_train\*.npy",
        ),
        (["a_train.bin", "a_train_1.bin"], "got a_train.bin in place of 1"),
        (["train.bin", "train_00000.bin"], "`train.bin` or files with numbers, got both"),
    ],
)
def test_what_may_be_part_of_the_files_or_not_is_named(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        find_token_files(tmp_path, "train")
