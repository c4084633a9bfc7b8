"""The data sets' published formats, on small files made by hand."""

import gzip
import json
import sys
import types
import zipfile

import pytest

from gpt2_jax.evaluation import readers
from gpt2_jax.evaluation.readers import ClozeQuestion, LastWord, TaskError

HELLASWAG = {"ctx": "a b", "endings": ["c", "d"], "label": 1}


@pytest.fixture
def file(tmp_path):
    """A path to write to."""
    return tmp_path / "data"


def write(file, content):
    """Writes bytes; returns the file."""
    file.write_bytes(content)
    return file


def write_rows(file, rows):
    """Writes a JSON object on each line; returns the file."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return write(file, text.encode())


# Lines.


@pytest.mark.parametrize("content", [b"one\r\ntwo\n", b"\xef\xbb\xbfone\ntwo\n"])
def test_a_text_that_went_through_windows_is_the_published_one(file, content):
    assert readers.read_text(write(file, content)) == "one\ntwo\n"


def test_a_return_that_stands_alone_is_text(file):
    assert readers.read_text(write(file, b"one\rtwo\n")) == "one\rtwo\n"


def test_sets_that_went_through_windows_are_read_alike(file):
    row = {"ctx_a": "He said.", "ctx_b": "then", "activity_label": "Talk"}
    contents = {
        "lambada": b'{"text": "one two"}\n{"text": "three four"}\n',
        "hellaswag": json.dumps(HELLASWAG | row).encode() + b"\n",
        "wikitext": b" \n = Title = \n \n A text . \n",
        "cbt": b"1 Once .\n2 The XXXXX\tfox\t\tcat|fox\n",
    }
    for name, content in contents.items():
        read = getattr(readers, f"read_{name}")
        published = list(read(write(file, content)))
        through_windows = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")
        assert list(read(write(file, through_windows))) == published


def test_lines_are_numbered_as_in_an_editor(file):
    lines = list(readers.read_lines(write(file, b"one\r\n\n  \ntwo")))
    assert [(line.number, line.text) for line in lines] == [(1, "one"), (4, "two")]


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_a_line_separator_inside_a_json_text_is_text(file, separator):
    write(file, f'{{"text": "one two{separator}three four"}}\n'.encode())
    (question,) = readers.read_lambada(file)
    assert question == LastWord(f"one two{separator}three", "four")


def test_a_form_feed_inside_a_line_is_text(file):
    (line,) = readers.read_lines(write(file, b"one\x0ctwo\n"))
    assert line.text == "one\x0ctwo"


def test_a_wrong_field_is_named_with_its_line(file):
    write(file, b'{"text": "a b"}\n\n{"text": 7}')
    with pytest.raises(TaskError, match="data, line 3: expected `text` to be str, got 7"):
        list(readers.read_lambada(file))


# Questions.


def test_lambadas_last_word_stands_behind_the_last_space(file):
    write_rows(file, [{"text": "He went home ."}, {"text": "one  two"}])
    assert list(readers.read_lambada(file)) == [LastWord("He went home", "."), ("one ", "two")]


def test_hellaswags_label_may_be_a_text(file):
    write_rows(file, [HELLASWAG, HELLASWAG | {"label": "0"}])
    assert [question.label for question in readers.read_hellaswag(file)] == [1, 0]


@pytest.mark.parametrize("label", [2, -1, "", "one", True])
def test_hellaswags_label_must_name_an_ending(file, label):
    write_rows(file, [HELLASWAG, HELLASWAG | {"label": label}])
    with pytest.raises(TaskError, match=rf"line 2: expected a label in \[0, 2\), got {label!r}"):
        list(readers.read_hellaswag(file))


def test_a_label_that_is_missing_is_named_with_its_line(file):
    write_rows(file, [HELLASWAG, {"ctx": "a b", "endings": ["c"]}])
    with pytest.raises(TaskError, match="line 2: expected a field `label`, got"):
        list(readers.read_hellaswag(file))


def test_hellaswags_endings_must_be_texts(file):
    write_rows(file, [HELLASWAG | {"endings": ["c", 4]}])
    with pytest.raises(TaskError, match="expected `endings` to be texts"):
        list(readers.read_hellaswag(file))


def test_the_harness_form_of_hellaswag_needs_its_fields(file):
    parts = {"activity_label": "Telling [tales]", "ctx_a": "He said.", "ctx_b": "then Ann"}
    write_rows(file, [HELLASWAG, HELLASWAG | parts])
    contexts = [question.harness_context for question in readers.read_hellaswag(file)]
    assert contexts == [None, "Telling : He said. Then ann"]


def test_cbts_questions_have_the_story_before_them(file):
    write(
        file, b"1 Once .\n2 Then .\n3 The XXXXX ran .\tfox\t\tcat|fox\n\n1 So .\n2 XXXXX\ta\t\ta|b"
    )
    assert list(readers.read_cbt(file)) == [
        ClozeQuestion("Once . Then .", "The ", " ran .", ["cat", "fox"], 1),
        ClozeQuestion("So .", "", "", ["a", "b"], 0),
    ]


def test_cbt_reads_other_ends_of_line(file):
    write(file, b"1 Once .\r\n2 The XXXXX\tfox\t\tcat|fox\r\n")
    (question,) = readers.read_cbt(file)
    assert question.candidates == ["cat", "fox"]


@pytest.mark.parametrize(
    "read, content, message",
    [
        ("read_text", b" \n", "data: expected a text, got an empty one"),
        ("read_text", b"ab\xff", "data: expected UTF-8, but invalid start byte at byte 2"),
        ("read_text", b"a\0b\0", "data: expected UTF-8, got zero bytes, as in UTF-16"),
        ("read_lambada", b"[" * 200_000, "line 1: expected a JSON object"),
        ("read_lambada", b"plain text", "line 1: expected a JSON object, got 'plain text'"),
        ("read_lambada", b"[1, 2]", "line 1: expected a JSON object"),
        ("read_lambada", b'{"txt": "a b"}', r"line 1: expected a field `text`, got \['txt'\]"),
        ("read_lambada", b'{"text": "one"}', "line 1: expected several words, got 'one'"),
        ("read_hellaswag", b'{"endings": ["b"], "label": 0}', "line 1: expected a field `ctx`"),
        ("read_wikitext", b"no headings here", "expected WikiText with headings"),
        ("read_cbt", b"no number", "line 1: expected a numbered line"),
        ("read_cbt", b"21 no gap\tking\t\tking|queen", "expected XXXXX and an answer"),
        ("read_cbt", b"21 XXXXX\tking", "expected a sentence, an answer and candidates"),
    ],
)
def test_a_wrong_format_is_named(file, read, content, message):
    write(file, content)
    with pytest.raises(TaskError, match=message):
        list(getattr(readers, read)(file))


# enwik8 and text8.


def test_a_tail_may_begin_inside_a_character(file):
    write(file, "ab\N{EURO SIGN}cd\r\n".encode())
    assert readers.read_enwik8(file, 5) == "\N{REPLACEMENT CHARACTER}cd\r\n"
    assert readers.read_enwik8(file, 100) == "ab\N{EURO SIGN}cd\r\n"


def zipped(file, **members):
    """Writes a zip; returns the file."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def test_the_zip_that_is_published_is_read(file):
    zipped(file, enwik8=b"<mediawiki> a text", other=b"no")
    assert readers.read_enwik8(file, 6) == "a text"
    assert readers.read_text8(zipped(file, text8=b" a text"), 5) == " text"


def test_a_damaged_zip_is_named(file):
    content = bytearray(zipped(file, enwik8=b"a text " * 100).read_bytes())
    content[45] ^= 255
    with pytest.raises(TaskError, match="data: expected a sound zip, but "):
        readers.read_enwik8(write(file, bytes(content)), 10)


@pytest.mark.parametrize(
    "content, message",
    [
        (gzip.compress(b"<mediawiki>"), "got a gzip"),
        ("a text".encode("utf-16"), "got UTF-16"),
        ("a text".encode("utf-16-le"), "got a zero byte at 1"),
    ],
)
def test_what_is_no_published_file_is_named(file, content, message):
    write(file, content)
    for name in ("enwik8", "text8"):
        with pytest.raises(TaskError, match=f"data: expected {name} as .* or as a zip, {message}"):
            getattr(readers, f"read_{name}")(file, 100)


def test_a_zip_of_something_else_is_named(file):
    zipped(file, text8=b"letters", more=b"")
    with pytest.raises(TaskError, match=r"a zip with a file enwik8, got \['text8', 'more'\]"):
        readers.read_enwik8(file, 100)


def test_text8_holds_letters_and_spaces(file):
    assert readers.read_text8(write(file, b" some text"), 4) == "text"
    with pytest.raises(TaskError, match="the letters a to z and spaces alone, got b'T' at byte 5"):
        readers.read_text8(write(file, b"some Text"), 4)


# WikiText.


def test_articles_begin_with_titles_and_not_with_sections():
    lines = " \n = One = \n text \n = = Part = = \n more \n = Two = \n end".split("\n")
    assert list(readers.articles(lines)) == [
        " = One = \n text \n = = Part = = \n more ",
        " = Two = \n end",
    ]


def test_wikitext_as_hfs_guide_joins_the_hubs_rows():
    assert readers.as_on_the_hub([" = A = ", " ", "text"]) == " = A = \n\n\n\n\ntext\n"


def test_detokenising_by_hand():
    page = ' = A = \n the well @-@ known ( so ) 1 @,@ 000 \'s " end " . \n'
    expected = ' = A =\nthe well-known (so) 1,000\'s "end".\n'
    assert readers.detokenized(page) == expected


def test_brackets_of_wikihow_are_removed():
    assert readers.without_brackets(" Go [title] And  [step] so. ") == "Go. And  so."


# The hub.


@pytest.fixture
def asked(monkeypatch):
    """What was asked of a stand-in for `datasets`."""
    calls = []

    def load_dataset(repository, name, split):
        calls.append((repository, name, split))
        if "wikitext" in repository:
            return [{"text": ""}, {"text": " = Title = \n"}]
        if "hellaswag" in repository:
            raise OSError("no network")
        return [{"text": "two words"}]

    stand_in = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    return calls


def test_data_comes_from_the_hub_in_its_published_format(tmp_path, asked):
    assert json.loads(readers.fetch("lambada", tmp_path).read_text()) == {"text": "two words"}
    assert readers.fetch("wikitext", tmp_path).read_text() == "\n = Title = \n"
    assert asked[0] == ("EleutherAI/lambada_openai", "default", "test")


def test_what_the_hub_does_not_give_is_named(tmp_path, asked):
    with pytest.raises(TaskError, match="cbt is not on the hub in a known form"):
        readers.fetch("cbt", tmp_path)
    with pytest.raises(TaskError, match=r"Rowan/hellaswag could not be downloaded \(no network\)"):
        readers.fetch("hellaswag", tmp_path)


def test_downloading_names_the_extra_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "gpt2_jax\[eval\]"'):
        readers.fetch("lambada", tmp_path)
