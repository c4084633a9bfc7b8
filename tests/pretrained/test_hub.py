"""Where checkpoints are found: a folder, the hub's cache, the hub; and what is said of mistakes."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest

import gpt2_jax
from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained import hub, weights
from tests.reference import ROOT


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c", "~/none-such", ""])
def test_missing_folder(name):
    with pytest.raises(
        CheckpointError, match='There is no folder .*Expected a folder, a hub id such as "gpt2"'
    ):
        hub.resolve(name)


def test_a_file_is_its_own_place(tmp_path):
    (tmp_path / "x").touch()
    assert hub.resolve(tmp_path / "x") == tmp_path / "x"


def test_a_local_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert hub.resolve("gpt2") == Path("gpt2")


def cached_snapshot(cache, repo):
    """Returns the empty folder of a cached model, as huggingface_hub lays it out."""
    home = cache / ("models--" + repo.replace("/", "--"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    folder = home / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("weight_file", ["model.safetensors", "pytorch_model.bin"])
def test_short_names_are_hub_ids(tmp_path, weight_file):
    folder = cached_snapshot(tmp_path, "openai-community/gpt2")
    (folder / weight_file).touch()
    assert hub.resolve("gpt2", cache_dir=tmp_path, local_files_only=True) == folder


def test_what_the_hub_has_is_loaded(tmp_path):
    folder = cached_snapshot(tmp_path, "some/model")
    shutil.copytree(hub.DEMO, folder, dirs_exist_ok=True)
    place = {"cache_dir": tmp_path, "local_files_only": True}
    model = gpt2_jax.load_pretrained("some/model", **place)
    config, params = gpt2_jax.load("some/model", **place)
    assert model.config == config
    assert model.params["wte"]["embedding"].shape == params["wte"]["embedding"].shape == (4096, 256)
    assert model.tokenizer.vocab == gpt2_jax.load_tokenizer("some/model", **place).vocab


def test_a_path_is_no_hub_id():
    with pytest.raises(CheckpointError, match="There is no folder gpt2"):
        hub.resolve(Path("gpt2"))


def test_unreachable_hub_points_to_the_demo(tmp_path):
    message = (
        'There is no folder "distilbert/distilgpt2", the hub could not be reached.*'
        '"demo".*needs no network'
    )
    with pytest.raises(ConnectionError, match=message):
        weights.load("distilgpt2", cache_dir=tmp_path, local_files_only=True)


def test_offline_mode(tmp_path):
    code = "from gpt2_jax.pretrained import weights; weights.load('gpt2')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert "ConnectionError: There is no folder" in done.stderr


def test_only_the_needed_files_are_fetched(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, *, allow_patterns, **options):
        asked.append((repo, tuple(allow_patterns), options["revision"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("some/model", revision="v1") == tmp_path
    assert [(repo, patterns[-3:], revision) for repo, patterns, revision in asked] == [
        (
            "some/model",
            ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
            "v1",
        ),
        (
            "some/model",
            ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
            "v1",
        ),
    ] + [
        (
            "some/model",
            (f"{stem}.{ending}", f"{stem}-*.{ending}", f"{stem}.{ending}.index.json"),
            "v1",
        )
        for stem, ending in (("flax_model", "msgpack"), ("tf_model", "h5"))
    ]
    asked.clear()
    (tmp_path / "pytorch_model.bin").touch()
    hub.resolve("some/model")
    assert len(asked) == 2


@pytest.mark.parametrize(
    "error, message",
    [
        (
            lambda e, r: e.RepositoryNotFoundError("404 Not found", response=r),
            "the hub refused this model: 404",
        ),
        (
            lambda e, r: e.RevisionNotFoundError("no v9", response=r),
            "the hub refused this model: no v9",
        ),
        (lambda e, r: e.HfHubHTTPError("503", response=r), "the hub could not be reached"),
        (lambda e, r: OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_errors_of_the_hub(monkeypatch, error, message):
    response = types.SimpleNamespace(headers={}, request=None)

    def fail(*args, **options):
        raise error(huggingface_hub.errors, response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises((CheckpointError, OSError), match=message):
        hub.resolve("some/model")
