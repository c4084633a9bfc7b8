"""A command within the process of the tests, which have imported JAX already."""

import io
import sys
from typing import NamedTuple

import pytest

from gpt2_jax.commands import generate, main


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command with the packaged model unless told otherwise, and `typed` as its input.

    `model=()` leaves the choice to the command.
    """
    # It would change JAX for every test that follows; its own tests have a process each.
    monkeypatch.setattr(generate, "set_up_jax", lambda args, report: None)

    def run(*arguments, typed="", model=("--from_pretrained", "demo")):
        stdin = io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        default = () if "--from_pretrained" in arguments else model
        code = main.run([*arguments, *default])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return run


@pytest.fixture(scope="session")
def demo():
    """The packaged model."""
    from gpt2_jax import load_pretrained

    return load_pretrained("demo", dtype="float32")
