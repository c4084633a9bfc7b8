"""Reading data sets: their published formats, what a question holds, where the hub has them.

Knows files and texts; nothing of tokens, models or figures. Every reader names the file, and the
line where there is one, when the format is not what it expects.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_jax.files import BYTE_ORDER_MARK, decode_text, lines_of


class TaskError(ValueError):
    """Data that is not in the format of its task; the message names the file and the place."""


# Texts and lines.


def read_text(file: Path) -> str:
    """Returns the text of a file, without a byte order mark and with plain ends of line.

    Raises:
      TaskError: it is not in UTF-8, or nothing stands in it.
    """
    try:
        text = decode_text(file.read_bytes(), file)
    except ValueError as error:
        raise TaskError(str(error)) from None
    if not text.strip():
        raise TaskError(f"{file}: expected a text, got an empty one.")
    # A copy that went through Windows has the figures of the published file. A "\r" that stands
    # alone is text, unlike in `file.read_text`.
    return text.replace("\r\n", "\n")


class Line(NamedTuple):
    """A line that holds something, and where it stands."""

    file: Path
    number: int  # from 1 on, blank lines counted
    text: str

    def error(self, message: str) -> TaskError:
        """Returns the error that names the line."""
        return TaskError(f"{self.file}, line {self.number}: {message}")


def read_lines(file: Path) -> Iterator[Line]:
    """Yields the lines that are not blank."""
    for number, text in enumerate(lines_of(read_text(file)), start=1):
        if text.strip():
            yield Line(file, number, text)


class Record(NamedTuple):
    """A JSON object on a line of its own."""

    line: Line
    fields: dict[str, Any]

    def field(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """Returns a field.

        Raises:
          TaskError: it is missing, or of another kind.
        """
        if name not in self.fields:
            raise self.line.error(f"expected a field `{name}`, got {sorted(self.fields)}.")
        value = self.fields[name]
        if not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(one_kind.__name__ for one_kind in kinds)
            raise self.line.error(f"expected `{name}` to be {expected}, got {value!r:.40}.")
        return value


def read_records(file: Path) -> Iterator[Record]:
    """Yields the JSON objects of a file that has one on each line.

    Raises:
      TaskError: a line holds something else.
    """
    for line in read_lines(file):
        try:
            fields = json.loads(line.text)
        except (ValueError, RecursionError):  # the second where it is nested too deeply
            fields = None
        if not isinstance(fields, dict):
            raise line.error(f"expected a JSON object, got {line.text[:40]!r}.")
        yield Record(line, fields)


# LAMBADA.


class LastWord(NamedTuple):
    """A text whose last word is to be guessed."""

    context: str
    word: str


def read_lambada(file: Path) -> Iterator[LastWord]:
    """Yields the texts of LAMBADA as OpenAI published it: `{"text": ...}` on each line.

    Raises:
      TaskError: a line has another form, or a text is a single word.
    """
    for record in read_records(file):
        text = record.field("text", str)
        # A plain space, as in the harness's task: other white space belongs to the word.
        context, _, word = text.rpartition(" ")
        if not context.strip() or not word:
            raise record.line.error(f"expected several words, got {text!r}.")
        yield LastWord(context, word)


# HellaSwag.

# What the harness makes its own form of the context of. Copies of the set may lack them.
HARNESS_FIELDS = ("activity_label", "ctx_a", "ctx_b")


class EndingQuestion(NamedTuple):
    """A beginning, and endings of which one is right."""

    context: str
    endings: list[str]
    label: int  # of the right one
    harness_context: str | None  # lm-eval's form of the context; None where its fields are missing


def read_hellaswag(file: Path) -> Iterator[EndingQuestion]:
    """Yields the questions of HellaSwag in its published form (`hellaswag_val.jsonl`).

    Raises:
      TaskError: a line has another form, or names an ending that it does not have.
    """
    for record in read_records(file):
        endings = record.field("endings", list)
        if not all(isinstance(ending, str) for ending in endings):
            raise record.line.error(f"expected `endings` to be texts, got {endings!r:.40}.")
        yield EndingQuestion(
            context=record.field("ctx", str),
            endings=endings,
            label=_hellaswag_label(record, len(endings)),
            harness_context=_harness_context(record),
        )


def _hellaswag_label(record: Record, n_endings: int) -> int:
    """Returns which ending is right: a number, which the hub's copy writes as a text."""
    label = record.field("label", (int, str))
    try:
        index = int(label)
    except ValueError:  # an empty one, as in the test set, whose answers are not published
        index = -1
    # True is a number to Python.
    if isinstance(label, bool) or not 0 <= index < n_endings:
        raise record.line.error(f"expected a label in [0, {n_endings}), got {label!r}.")
    return index


def _harness_context(record: Record) -> str | None:
    """Returns a context as the harness's `process_docs` writes it, if the fields are there."""
    if not all(name in record.fields for name in HARNESS_FIELDS):
        return None
    activity, first, second = (record.field(name, str) for name in HARNESS_FIELDS)
    # `capitalize` also makes the rest lower case, names included; the published figures have it so.
    return without_brackets(f"{activity}: {first} {second.capitalize()}")


def without_brackets(text: str) -> str:
    """Returns a text of HellaSwag without the marks that WikiHow left in it.

    The harness's `preprocess` (lm_eval/tasks/hellaswag/utils.py), its order included.
    """
    # Before all marks go: this one stands for the end of a sentence.
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


# The Children's Book Test.

GAP = "XXXXX"


class ClozeQuestion(NamedTuple):
    """A story, and a sentence that follows it and lacks a word."""

    context: str
    before_gap: str
    after_gap: str
    candidates: list[str]
    label: int  # of the right one


def read_cbt(file: Path) -> Iterator[ClozeQuestion]:
    """Yields the questions of the Children's Book Test in its published form.

    Numbered lines, of which the twenty-first of each question has tabs:
    `21 sentence with XXXXX<tab>answer<tab><tab>candidate|candidate|...`.

    Raises:
      TaskError: a line has no number, or a question has no gap or lacks its answer.
    """
    # Twenty lines of story come before the one that asks.
    story: list[str] = []
    for line in read_lines(file):
        number, _, text = line.text.partition(" ")
        if not number.isdigit():
            raise line.error(f"expected a numbered line, got {line.text[:40]!r}.")
        # The number itself is not needed: the line with tabs ends a question, and the story of the
        # next one begins anew.
        if "\t" in text:
            yield _cloze_question(line, text, " ".join(story))
            story = []
        else:
            story.append(text)


def _cloze_question(line: Line, text: str, story: str) -> ClozeQuestion:
    """Returns the question of a line with tabs, after its story."""
    columns = text.split("\t")
    if len(columns) < 3:
        raise line.error(f"expected a sentence, an answer and candidates, got {text[:40]!r}.")
    sentence = columns[0]
    answer = columns[1]
    candidates = columns[-1].split("|")  # the column between is empty
    if GAP not in sentence or answer not in candidates:
        raise line.error(f"expected {GAP} and an answer among the candidates.")
    before_gap, _, after_gap = sentence.partition(GAP)
    return ClozeQuestion(story, before_gap, after_gap, candidates, candidates.index(answer))


# WikiText.

# The harness's `wikitext_detokenizer` (lm_eval/tasks/wikitext/preprocess_wikitext.py), step by
# step: a later step sees what an earlier one has changed, so the order matters.
BEFORE_PUNCTUATION = (("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
PUNCTUATION = ":;.!?,"
INSIDE_BRACKETS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
AFTER_BRACKETS = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def read_wikitext(file: Path) -> list[str]:
    """Returns the lines of WikiText in its raw form (`wiki.test.raw`), without their ends.

    Raises:
      TaskError: none of them is the title of an article.
    """
    lines = lines_of(read_text(file))
    if not any(is_title(line) for line in lines):
        raise TaskError(
            f"{file}: expected WikiText with headings such as ' = Title = ', found none."
        )
    return lines


def as_on_the_hub(lines: Sequence[str]) -> str:
    """Returns WikiText as HF's guide to perplexity joins it.

    The hub's copy has a row for each line, its end included, or an empty one for a blank line; the
    guide puts two more ends of line between rows.
    """
    rows = [line + "\n" if line.strip() else "" for line in lines]
    return "\n\n".join(rows)


def is_title(line: str) -> bool:
    """Returns whether a line is the title of an article: one equals sign on either side.

    Sections have more of them, with spaces between.
    """
    # The longest first: "= = =" also holds "= =".
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def articles(lines: Sequence[str]) -> Iterator[str]:
    """Yields the articles of WikiText, and before them what stands before the first title."""
    page: list[str] = []
    for line in lines:
        if is_title(line):
            yield from _unless_blank(page)
            page = []
        page.append(line)
    yield from _unless_blank(page)


def _unless_blank(page: Sequence[str]) -> Iterator[str]:
    """Yields a page's text, unless there is nothing on it."""
    text = "\n".join(page)
    if text.strip():
        yield text


def detokenized(page: str) -> str:
    """Returns an article of WikiText as the harness would have it written.

    The set was published with spaces around punctuation, which no text that a model has read has.
    """
    for old, new in BEFORE_PUNCTUATION:
        page = page.replace(old, new)
    for mark in PUNCTUATION:
        page = page.replace(f" {mark} ", f"{mark} ")
    for pattern, new in INSIDE_BRACKETS:
        page = re.sub(pattern, new, page)
    for old, new in AFTER_BRACKETS:
        page = page.replace(old, new)
    return page


# enwik8 and text8.

# How files begin that are taken for them -> what they are.
FOREIGN = {
    b"\x1f\x8b": "a gzip",
    b"BZh": "a bzip2",
    b"\xfd7zXZ": "an xz",
    b"\x28\xb5\x2f\xfd": "a zstd",
    b"7z\xbc\xaf": "a 7z",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
ZIP = b"PK\x03\x04"
TEXT8_STRAY = re.compile(rb"[^a-z ]")


def read_enwik8(file: Path, n_bytes: int) -> str:
    """Returns the text of the last bytes of enwik8, from the file or from the zip around it.

    Raises:
      TaskError: the file is of another kind.
    """
    return _tail_of(_published_bytes(file, "enwik8"), n_bytes)


def read_text8(file: Path, n_bytes: int) -> str:
    """Returns the text of the last bytes of text8, from the file or from the zip around it.

    Raises:
      TaskError: the file is of another kind, or holds more than letters and spaces.
    """
    content = _published_bytes(file, "text8")
    stray = TEXT8_STRAY.search(content)
    if stray is not None:
        got = f"got {stray[0]!r} at byte {stray.start()}"
        raise TaskError(f"{file}: expected text8, the letters a to z and spaces alone, {got}.")
    return _tail_of(content, n_bytes)


def _tail_of(content: bytes, n_bytes: int) -> str:
    """Returns the text of the last bytes; a character cut in two becomes U+FFFD."""
    # Byte for byte, unlike `read_text`: where the tail begins, and in enwik8 itself, UTF-8 may be
    # broken.
    return content[-n_bytes:].decode("utf-8", "replace")


def _published_bytes(file: Path, name: str) -> bytes:
    """Returns the bytes of a published file, unpacked."""
    content = file.read_bytes()
    if content.startswith(ZIP):
        content = _unzipped(file, name)
    expected = f"expected {name} as it was published, unpacked or as a zip"
    for beginning, kind in FOREIGN.items():
        if content.startswith(beginning):
            raise TaskError(f"{file}: {expected}, got {kind}.")
    # No text of letters has one, but in UTF-16, and most files of other kinds do.
    if b"\0" in content:
        raise TaskError(f"{file}: {expected}, got a zero byte at {content.index(0)}.")
    return content.removeprefix(BYTE_ORDER_MARK.encode())


def _unzipped(file: Path, name: str) -> bytes:
    """Returns the file of a name in a zip."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if name not in names:
                raise TaskError(f"{file}: expected a zip with a file {name}, got {names[:5]}.")
            return archive.read(name)
    # Of a damaged file: what is wrong with it decides which.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise TaskError(f"{file}: expected a sound zip, but {error}.") from error


# The hub.


class HubSource(NamedTuple):
    """Where the hub has a data set."""

    repository: str
    configuration: str | None
    split: str


# The texts of the published files. The other sets are there in forms that no reader here knows.
HUB = {
    "wikitext": HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "lambada": HubSource("EleutherAI/lambada_openai", "default", "test"),
    "hellaswag": HubSource("Rowan/hellaswag", None, "validation"),
}


def fetch(task: str, folder: Path) -> Path:
    """Downloads a task's data from the hub and writes it to a file in its published format.

    Raises:
      TaskError: the hub has no such data, or it could not be downloaded.
      ImportError: `datasets` is not installed.
    """
    if task not in HUB:
        raise TaskError(f"{task} is not on the hub in a known form: give its file with --data.")
    rows = _download(HUB[task])
    file = folder / task
    # `newline=""`: on Windows "\n" would become two bytes, which are counted.
    with file.open("w", encoding="utf-8", newline="") as opened:
        for row in rows:
            opened.write(_published_line(task, row))
    return file


def _download(source: HubSource) -> Iterable[Mapping[str, Any]]:
    """Returns a data set's rows."""
    try:
        # Here, not above: an extra that nobody needs who has the files, and slow to import.
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            'Downloading data needs `datasets`: pip install "gpt2_jax[eval]".'
        ) from None
    try:
        rows: Any = load_dataset(source.repository, source.configuration, split=source.split)
    except Exception as error:  # of the hub, the network, or the data's format: any kind
        raise TaskError(
            f"{source.repository} could not be downloaded ({error}): give its file with --data."
        ) from error
    return rows


def _published_line(task: str, row: Mapping[str, Any]) -> str:
    """Returns a row as the line, its end included, that it is in the published file."""
    if task == "wikitext":
        return row["text"] or "\n"  # a row holds its line's end, unless it is empty
    return json.dumps(row) + "\n"
