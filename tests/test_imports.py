"""Imports point one way: root modules know no cluster, clusters the root, `commands` all."""

import ast
import subprocess
import sys

from tests.reference import ROOT

PACKAGE = ROOT / "gpt2_jax"
CLUSTERS = {"pretrained", "generation", "training", "evaluation", "interpretability", "commands"}
# Edges between clusters, each with what it is for.
ALLOWED = {
    ("training/vocabularies.py", "pretrained"),  # the tokenizer of a checkpoint
    ("training/plan.py", "pretrained"),  # weights to start from
    ("training/run.py", "pretrained"),  # the export of those that came out
    ("training/validation.py", "generation"),  # a sample text to look at
    ("evaluation/harness.py", "pretrained"),  # the harness names a model, it does not pass one
    ("evaluation/harness.py", "generation"),  # tasks that let the model write
}


def imported(file):
    """The modules of this package that a file imports anywhere, functions included."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name.split(".")[1:] for name in names if name.split(".")[0] == "gpt2_jax"]


def test_clusters_know_the_root_and_not_each_other():
    edges = set()
    for file in PACKAGE.rglob("*.py"):
        home = file.relative_to(PACKAGE)
        cluster = home.parts[0] if len(home.parts) > 1 else None
        if cluster == "commands" or home.name in ("__init__.py", "__main__.py"):
            continue
        for name, *_ in filter(None, imported(file)):
            if name in CLUSTERS and name != cluster:
                edges.add((home.as_posix(), name))
    assert edges - ALLOWED == set()


def test_every_edge_that_is_allowed_is_there():
    for home, cluster in ALLOWED:
        if cluster in CLUSTERS:
            assert cluster in {name for name, *_ in filter(None, imported(PACKAGE / home))}


def test_nothing_heavy_is_imported_by_the_library_itself():
    heavy = ("torch", "transformers", "orbax", "lm_eval", "datasets", "pyarrow", "matplotlib")
    heavy += ("tokenizers", "gguf", "h5py", "outlines_core")
    code = f"import gpt2_jax, sys; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_are_those_of_the_stub_and_are_imported_when_asked_for():
    code = """
import ast, importlib, pathlib, sys, types
import gpt2_jax

stub = ast.parse(pathlib.Path(gpt2_jax.__file__).with_suffix(".pyi").read_text())
homes = {}
for node in stub.body:
    if isinstance(node, ast.ImportFrom):
        homes |= {alias.name: node.module for alias in node.names}
    elif isinstance(node, ast.Assign):
        assert sorted(ast.literal_eval(node.value)) == sorted(homes) == gpt2_jax.__all__
assert homes.keys() <= set(dir(gpt2_jax))

tokenizer = gpt2_jax.Tokenizer
assert "jax" not in sys.modules
gpt2_jax.generate, gpt2_jax.load_pretrained
for idle in ("optax", "gpt2_jax.training.step", "gpt2_jax.interpretability.taps"):
    assert idle not in sys.modules, idle

for name, home in homes.items():
    # Before anything has asked the package for the name.
    assert getattr(importlib.import_module(home), name) is getattr(gpt2_jax, name), name
    assert not isinstance(getattr(gpt2_jax, name), types.ModuleType), name
assert gpt2_jax.Tokenizer is tokenizer
assert gpt2_jax.training.run.__name__ == "gpt2_jax.training.run"
for missing in ("no_such_name", "_no_such_name"):
    assert not hasattr(gpt2_jax, missing) and not hasattr(gpt2_jax.training, missing)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
