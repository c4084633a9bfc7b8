"""What the pages say is so: their blocks run, and the files and modules that they name exist."""

import contextlib
import importlib
import io
import re
import shlex

import pytest

import gpt2_jax
from gpt2_jax.commands import generate, main
from tests.reference import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
# A block of Python, and what it prints, if anything.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
PAGES = [page for page in sorted(ROOT.glob("docs/*.md")) if "```python" in page.read_text("utf-8")]


def test_the_python_blocks_print_what_the_readme_says():
    blocks = BLOCK.findall(README)
    assert len(blocks) == 10
    scope = {}
    for code, expected in blocks:  # of a block without output, ""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, scope)
        assert printed.getvalue() == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_print_what_it_says(page):
    scope = {}
    for code, expected in BLOCK.findall(page.read_text(encoding="utf-8")):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, scope)
        assert printed.getvalue() == expected


def test_the_first_command_writes_what_the_readme_shows(capsys, monkeypatch):
    monkeypatch.setattr(generate, "set_up_jax", lambda args, report: None)  # for other tests' sake
    command, expected = re.search(
        r"gpt2-jax ([^\n]*)\n```\n\n```text\n(.*?)```", README, re.DOTALL
    ).groups()
    assert main.run([*shlex.split(command), "--quiet"]) == 0
    assert capsys.readouterr().out == expected


def test_every_file_in_the_reading_order_exists():
    table = README.split("## Files, in reading order")[1]
    cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    files = [file for cell in cells for file in re.findall(r"`([^`]+)`", cell)]
    assert len(files) >= 9
    missing = [file for file in files if not (ROOT / file).exists()]
    assert missing == []


def test_every_module_that_a_page_names_exists():
    pages = [README, *(page.read_text(encoding="utf-8") for page in ROOT.glob("docs/*.md"))]
    named = re.findall(r"\bgpt2_jax(?:\.[a-z_]+)+", "\n".join(pages))
    for name in sorted(set(named)):
        parts = name.split(".")
        value = gpt2_jax
        for number, part in enumerate(parts[1:], 2):
            if not hasattr(value, part):
                value = importlib.import_module(".".join(parts[:number]))
            else:
                value = getattr(value, part)
