"""What the pages say is so: their blocks run, and the files, options and modules in them exist."""

import contextlib
import importlib
import io
import re
import shlex
import tomllib

import pytest

import gpt2_jax
from gpt2_jax.commands import generate, main
from gpt2_jax.commands.common import COMMANDS
from gpt2_jax.generation.options import options_table
from tests.reference import ROOT

# A block of Python, and what it prints, if anything.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
SHELL = re.compile(r"```bash\n(.*?)```", re.DOTALL)
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]


def names(pattern):
    """The pages that hold something."""
    return [name for name, text in TEXTS.items() if pattern in text]


@pytest.mark.parametrize("page", names("```python"))
def test_the_python_blocks_of_a_page_print_what_it_says(page):
    scope = {}
    for code, expected in BLOCK.findall(TEXTS[page]):  # of a block without output, ""
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


def shell_lines():
    """The lines of a shell in all pages, with the page that each stands in."""
    for name, text in TEXTS.items():
        for block in SHELL.findall(text):
            for line in block.splitlines():
                yield name, line


def test_every_command_of_a_page_is_one_that_the_parser_takes():
    parsed = set()
    for page, line in shell_lines():
        for command in re.findall(r"\bgpt2-jax ([^&|]*)", line):
            words = shlex.split(command, comments=True)
            name = words.pop(0) if words[0] in COMMANDS else "generate"
            module = importlib.import_module(f"gpt2_jax.commands.{name}")
            try:
                module.parser("gpt2-jax").parse_args(words)
            except SystemExit:
                pytest.fail(f"{page}: {line}")
            parsed.add(name)
    assert parsed == set(COMMANDS)  # and no command is left out


def test_the_overview_of_options_has_each_option_once():
    text = TEXTS["command-line.md"]
    overview = re.search(r"```text\ngpt2-jax PROMPT(.*?)```", text, re.DOTALL)[1]
    shown = re.findall(r"--[a-zA-Z_]+", overview)
    parser = generate.parser("gpt2-jax")
    known = [name for action in parser._actions for name in action.option_strings]
    assert len(shown) == len(set(shown))
    assert set(shown) <= set(known)


def test_scripts_and_extras_that_pages_name_exist():
    scripts = {word for text in TEXTS.values() for word in re.findall(r"\bscripts/\w+\.py", text)}
    assert scripts and [name for name in scripts if not (ROOT / name).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [names for text in TEXTS.values() for names in re.findall(r'"\.\[([\w,]+)\]"', text)]
    extras = {extra for names in asked for extra in names.split(",")}
    assert extras and extras <= set(project["optional-dependencies"])


def test_every_link_of_the_readme_leads_somewhere():
    # Those between pages of the site are checked by its build.
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_every_file_in_the_reading_order_exists():
    table = TEXTS["architecture.md"].split("## Files, in reading order")[1]
    cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    files = [file for cell in cells for file in re.findall(r"`([^`]+)`", cell)]
    assert len(files) >= 9
    missing = [file for file in files if not (ROOT / file).exists()]
    assert missing == []


def test_the_table_of_options_is_the_tables():
    assert options_table() in TEXTS["generation.md"]


def test_the_table_of_sites_is_the_tables():
    rows = []
    for site, (axes, hook) in gpt2_jax.SITES.items():
        shown = f"`{hook}`" if hook else ""
        rows.append(f"| `{site}` | {shown} | `[{axes.replace(' ', ', ')}]` |")
    assert "\n".join(rows) in TEXTS["interpretability.md"]


def test_every_module_that_a_page_names_exists():
    named = re.findall(r"\bgpt2_jax(?:\.[a-z_]+)+", "\n".join(TEXTS.values()))
    for name in sorted(set(named)):
        parts = name.split(".")
        value = gpt2_jax
        for number, part in enumerate(parts[1:], 2):
            if not hasattr(value, part):
                value = importlib.import_module(".".join(parts[:number]))
            else:
                value = getattr(value, part)
