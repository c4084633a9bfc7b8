"""Files: what is read is what was written, and a target is the whole old or the whole new one."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from gpt2_jax import files
from gpt2_jax.files import (
    CheckpointError,
    decode_text,
    lines_of,
    listing,
    read_json_object,
    replacing,
    write_json,
)
from tests import faults
from tests.reference import ROOT


def test_an_object_is_read_as_it_was_written(tmp_path):
    values = {"a": [1, 2.5, None], "é": {"b": True}}
    write_json(tmp_path / "a.json", values)
    assert read_json_object(tmp_path / "a.json") == values


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "expected JSON, got Expecting value: line 1 column 1"),
        (b'{"a": ', "expected JSON, got Expecting value"),
        (b'{"a": "\xff"}', "expected JSON, got 'utf-8' codec can't decode byte 0xff"),
        (b"[]", "expected an object, got list"),
        (b"null", "expected an object, got NoneType"),
        (b'{"a": ' + 100_000 * b"[", "expected JSON, got one nested too deeply"),
    ],
)
def test_what_is_no_object_is_refused_and_the_file_named(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json_object(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_a_byte_order_mark_is_no_text_where_a_file_begins_with_it():
    assert decode_text(b"\xef\xbb\xbfa\xef\xbb\xbf", "a.txt") == "a\ufeff"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_utf_16_is_no_utf_8_though_english_in_it_would_decode(encoding):
    with pytest.raises(ValueError, match="a.txt: expected UTF-8, got zero bytes, as in UTF-16"):
        decode_text("a text".encode(encoding), "a.txt")


def test_lines_end_where_json_lines_do():
    text = "a\x0cb\u2028c\x85d\re\r\n\nf\n"
    assert lines_of(text) == ["a\x0cb\u2028c\x85d\re", "", "f", ""]


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "a.json")


def test_a_listing_is_short(tmp_path):
    assert listing(tmp_path) == "an empty folder"
    for number in range(30):
        (tmp_path / f"{number:02}").touch()
    assert listing(tmp_path).startswith("00, 01, ")
    assert listing(tmp_path).count(",") == 19
    assert listing(tmp_path).endswith("19 and 10 more")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "got an HTML page"),
        (b"<HTML>", "got an HTML page"),
        (b"PK\x03\x04", "got a zip archive"),
        (b"\x1f\x8b\x08", "got a gzip archive"),
    ],
)
def test_what_often_lies_in_a_files_place_is_called_by_its_name(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json_object(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # to open it would wait for a writer
    (tmp_path / "zeros").symlink_to("/dev/zero")  # to read it would never end
    (tmp_path / "folder").mkdir()
    for name, kind in {"fifo": "a FIFO", "zeros": "a device", "folder": "a folder"}.items():
        with pytest.raises(CheckpointError, match=f"{name}: expected a file, got {kind}"):
            read_json_object(tmp_path / name)


# Messages.


def test_messages_are_short_and_move_no_cursor():
    message = str(CheckpointError("bad \x1b[2J\r\x07\u202e" + "é" * 10_000 + "\nend"))
    assert message.startswith("bad \\x1b[2J\\r\\x07\\u202eé")
    assert message.endswith("é...")
    assert 3990 < len(message.encode()) <= 4000
    assert str(CheckpointError("two\nlines")) == "two\nlines"
    assert files.some(f"a\n{number}" for number in range(1000)).endswith("a\\n19 and 980 more")


# Paths.


@pytest.mark.parametrize("path", ["memory://x", "gs://bucket/x", "s3:/x", "file:///x", "hf://a/b"])
def test_an_address_is_no_folder(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="expected a path on this machine, got an address"):
        with replacing(path) as temporary:
            temporary.mkdir()
    assert not list(tmp_path.iterdir())


def test_an_unknown_home_and_a_null_byte_are_mistakes():
    with pytest.raises(CheckpointError, match="~no-such-user/x: expected a path, got an unknown"):
        files.local_path("~no-such-user/x")
    with pytest.raises(CheckpointError, match="got one with a null byte"):
        files.local_path("a\0b")


# Replacing.


@pytest.fixture
def folder(tmp_path):
    """The folder that `faults` replaces, alone in another."""
    faults.make(tmp_path / "place" / "model")
    return tmp_path / "place" / "model"


def test_a_folder_is_replaced_and_what_is_to_be_kept_is_the_same_file(folder):
    before = (folder / "notes.txt").stat().st_ino
    faults.replace(files, folder)
    assert faults.contents(folder) == faults.NEW
    assert (folder / "notes.txt").stat().st_ino == before
    assert os.listdir(folder.parent) == ["model"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("first, code", [(0, errno.ENOSPC), (1, errno.EACCES), (2, errno.EINTR)])
def test_after_an_error_at_any_call_the_target_is_whole(
    tmp_path, monkeypatch, exchange, first, code
):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", faults.no_exchange)
    n_failed = 0
    at = first  # every third call: each of them with one of the codes
    while True:
        folder = tmp_path / str(at) / "model"
        faults.make(folder)
        with faults.Faults(at, faults.failing(code)) as injected:
            try:
                faults.replace(files, folder)
            except OSError:
                n_failed += 1
        assert faults.found_wrong(files, folder) == "", f"call {at}"
        if injected.n_calls <= at:
            break
        at += 3
    assert n_failed > 7


@pytest.mark.parametrize("exchange", ["exchange", "none"])
def test_after_a_kill_at_any_call_the_target_is_whole(exchange):
    # Every third call here; all 68, and 76 without an exchange, when this was written.
    program = [sys.executable, ROOT / "tests" / "faults.py", ROOT / "gpt2_jax" / "files.py", "3"]
    done = subprocess.run([*program, exchange], capture_output=True, text=True, timeout=120)
    n_killed, *wrongs = done.stdout.splitlines()
    assert wrongs == []
    assert int(n_killed) > 15, done.stderr


def test_a_body_that_fails_leaves_everything_as_it_was(folder):
    with pytest.raises(KeyboardInterrupt), replacing(folder, overwrite=True) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("half")
        raise KeyboardInterrupt
    assert faults.contents(folder) == faults.OLD
    assert os.listdir(folder.parent) == ["model"]


def test_what_stands_at_the_names_of_others_is_no_obstacle(tmp_path):
    # As where the process's number is always 1, and the writer before was killed.
    left = tmp_path / ".model.gpt2_jax-left"
    (left / "new" / "model").mkdir(parents=True)
    mine = [".model.gpt2_jax-notes", ".model-of-mine"]
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    faults.replace(files, tmp_path / "model")
    assert not left.exists()
    assert sorted(os.listdir(tmp_path)) == sorted([*mine, "model"])
    assert all((tmp_path / name / "notes.txt").is_file() for name in mine)


def test_a_target_that_was_moved_away_is_put_back(tmp_path):
    # As a kill leaves it where folders cannot change places.
    left = tmp_path / ".model.gpt2_jax-left" / "old" / "model"
    faults.make(left)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "model", overwrite=True):
        raise KeyboardInterrupt
    assert faults.contents(tmp_path / "model") == faults.OLD
    assert os.listdir(tmp_path) == ["model"]


def test_a_writer_that_lives_keeps_its_workspace(tmp_path):
    with replacing(tmp_path / "file", overwrite=True) as first:
        first.write_text("first")
        with replacing(tmp_path / "file", overwrite=True) as second:
            second.write_text("second")
        assert (tmp_path / "file").read_text() == "second"
    assert (tmp_path / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["file"]


def test_of_two_writers_the_last_wins_whole(tmp_path):
    problems = []

    def write(name):
        for _ in range(30):
            try:
                with replacing(tmp_path / "model", overwrite=True) as temporary:
                    temporary.mkdir()
                    for part in ("a", "b", "c"):
                        (temporary / part).write_text(name)
            except Exception as error:
                problems.append(error)

    writers = [threading.Thread(target=write, args=(name,)) for name in "xyz"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert problems == []
    assert faults.contents(tmp_path / "model") in [dict.fromkeys("abc", name) for name in "xyz"]
    assert os.listdir(tmp_path) == ["model"]


def test_without_overwrite_the_second_writer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="exists already"):
        with replacing(tmp_path / "file") as first:
            first.write_text("first")
            (tmp_path / "file").write_text("came meanwhile")
    assert (tmp_path / "file").read_text() == "came meanwhile"


def test_files_and_folders_do_not_replace_each_other(folder):
    with pytest.raises(CheckpointError, match="Expected a file to replace, got the folder"):
        with replacing(folder, overwrite=True) as temporary:
            temporary.write_text("a file")
    assert faults.contents(folder) == faults.OLD
    file = folder / "notes.txt"
    with pytest.raises(CheckpointError, match="Expected a folder to replace, got the file"):
        with replacing(file, overwrite=True) as temporary:
            temporary.mkdir()
    with pytest.raises(CheckpointError, match="Expected a folder to replace, got the file"):
        with replacing(file, overwrite=True, keep=lambda name: True):
            pytest.fail("the body was run")
    assert faults.contents(folder) == faults.OLD


@pytest.mark.parametrize("kind", ["a link", "a FIFO", "a device"])
def test_what_is_neither_file_nor_folder_is_not_replaced(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "a link":
        target.symlink_to(tmp_path)
    elif kind == "a FIFO":
        os.mkfifo(target)
    else:
        target = files.Path("/dev/null")
    with pytest.raises(CheckpointError, match=f"{target}: expected a file.*got {kind}"):
        with replacing(target, overwrite=True):
            pytest.fail("the body was run")
    assert os.path.lexists(target)


def test_a_disk_that_fills_up_is_named_with_the_target(tmp_path):
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/file'"):
        with replacing(tmp_path / "file"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match=f"directory: '{tmp_path}/folder/a'"):
        with replacing(tmp_path / "folder") as temporary:
            with replacing(temporary) as inner:
                (inner / "a").read_text()


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    name = "é" * 127
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("text")
    assert os.listdir(tmp_path) == [name]


def test_a_pointer_is_no_text():
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    with pytest.raises(ValueError, match="a.txt: expected a text, got a Git LFS pointer"):
        decode_text(pointer, "a.txt")
    assert decode_text(b"The " + pointer, "a.txt").startswith("The version")
