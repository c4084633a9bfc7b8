import pytest

from gpt2_jax.files import decode_text, lines_of, listing, read_json_object, write_json


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
