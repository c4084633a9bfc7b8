"""The examples of the reference: every public name has one, it runs, and it has a place there."""

import doctest
import importlib
import re

import pytest

import gpt2_jax
from tests.reference import ROOT

PAGES = {page.name: page.read_text("utf-8") for page in sorted(ROOT.glob("docs/api/*.md"))}
TEXT = "\n".join(PAGES.values())
ENTRY = re.compile(r"^\.\. auto(?:function|class):: (\S+)$", re.MULTILINE)
DATA = re.compile(r"^\.\. data:: (\S+)$", re.MULTILINE)
ENTRIES = ENTRY.findall(TEXT)
PAGES_INSTEAD = (
    "gpt2_jax.training.run.",
    "gpt2_jax.training.run_folder.",
    "gpt2_jax.interpretability.plot.",
)
FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


def find(path):
    """What a dotted name means, whose module may not have been imported."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.fixture(scope="module")
def scope(tmp_path_factory):
    """The names that examples take for granted, as docs/api/index.md tells the reader."""
    code = re.search(r"```python\n(.*?)```", PAGES["index.md"], re.DOTALL)[1]
    names = {"folder": tmp_path_factory.mktemp("examples")}
    exec(code, names)
    return names


def run(example, name, scope):
    """Runs examples and returns how many there were."""
    test = doctest.DocTestParser().get_doctest(example, scope, name, None, None)
    printed = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, out=printed.append)
    assert runner.failures == 0, "".join(printed)
    return len(test.examples)


@pytest.mark.parametrize("path", ENTRIES)
def test_the_example_of_a_name_says_what_is_so(path, scope):
    n_examples = run(find(path).__doc__ or "", path, dict(scope))
    # What takes a training run or a picture has its example on a page.
    assert n_examples or path.startswith(PAGES_INSTEAD)


def test_the_examples_of_the_pages_themselves_say_what_is_so(scope):
    for name, page in PAGES.items():
        examples = re.sub(r"^```.*$", "", page, flags=re.MULTILINE)
        run(examples, name, dict(scope))


def test_every_public_name_has_one_place_in_the_reference():
    listed = [path.removeprefix("gpt2_jax.") for path in [*ENTRIES, *DATA.findall(TEXT)]]
    assert len(listed) == len(set(listed))
    assert set(gpt2_jax.__all__) <= set(listed)


def test_every_datum_of_the_reference_has_an_example():
    for path in DATA.findall(TEXT):
        assert re.search(rf"^\.\. data:: {re.escape(path)}$(?:(?!^```$).)*>>>", TEXT, re.M | re.S)
