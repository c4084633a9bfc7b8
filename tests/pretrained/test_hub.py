"""Where checkpoints are found: a folder, the hub's cache, the hub; and what is said of mistakes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi

import gpt2_jax
from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained import hub, weights
from tests.pretrained.hub_server import Hub
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


# A hub of our own.

FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")
OTHERS = (
    "README.md",
    "model-fp16.safetensors",
    "tf_model.h5",
    "onnx/model.onnx",
    "config.json.bak",
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
BIN_SHARDS = ("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json")


def text_of(names):
    """Files, no two of which are alike: the cache keeps what is alike once."""
    return {name: f"this is {name}".encode() for name in names}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The hub, a server of this process; it has one model."""
    with Hub("some/model", text_of([*FILES, *OTHERS])) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (huggingface_hub.constants, huggingface_hub.file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(hub, "TIMEOUT", 0.5)
        made = HfApi.__init__
        # It looks up its address where the module is imported.
        wrapped = lambda api, endpoint=None, **options: made(api, server.url, **options)  # noqa: E731
        monkeypatch.setattr(HfApi, "__init__", wrapped)
        huggingface_hub.utils.disable_progress_bars()
        yield server


@pytest.mark.parametrize(
    "there, wanted",
    [
        ([*FILES, *OTHERS, *SHARDS, INDEX, "pytorch_model.bin"], FILES),
        ([*FILES[:3], *SHARDS, INDEX, "pytorch_model.bin"], [*FILES[:3], *SHARDS, INDEX]),
        ([*FILES[:3], *BIN_SHARDS, *OTHERS], [*FILES[:3], *BIN_SHARDS]),
        (
            ["config.json", "a.spm", "pytorch_model.bin"],
            ["config.json", "a.spm", "pytorch_model.bin"],
        ),
    ],
)
def test_only_the_needed_files_are_fetched(server, tmp_path, there, wanted):
    server.files = text_of(there)
    folder = hub.resolve("some/model", cache_dir=tmp_path)
    assert sorted(server.asked) == sorted(wanted)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == text_of(wanted)


def test_a_tokenizer_is_fetched_without_weights(server, tmp_path):
    with pytest.raises(ValueError, match="json: expected JSON"):
        gpt2_jax.load_tokenizer("some/model", cache_dir=tmp_path)
    assert sorted(server.asked) == ["config.json", "merges.txt", "vocab.json"]


NETWORK = {
    "close": r"the hub could not be reached \(\w+\)",
    "hang": "the hub did not answer in time",
    "html": "something else than the hub answered, such as a network's login page",
    "429": r"the hub has had too many requests from here \(429",
    "500": r"the hub is out of order \(500: try again later\)",
    "503": r"the hub is out of order \(503: try again later\)",
}


def test_whenever_the_network_fails_the_cache_serves(server, tmp_path):
    folder = hub.resolve("some/model", cache_dir=tmp_path)
    for server.mode in NETWORK:
        assert hub.resolve("some/model", cache_dir=tmp_path) == folder
    (folder / "model.safetensors").unlink()
    server.mode = "503"
    with pytest.raises(ConnectionError, match="out of order.*and this model is not in its cache"):
        hub.resolve("some/model", cache_dir=tmp_path)
    assert hub.resolve("some/model", cache_dir=tmp_path, with_weights=False) == folder


def test_where_an_update_is_broken_off_the_one_before_serves(server, tmp_path, monkeypatch):
    before = hub.resolve("some/model", cache_dir=tmp_path)
    server.commit = "f" * 40
    server.files = {name: content + b" anew" for name, content in server.files.items()}
    server.mode = "broken"
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    assert hub.resolve("some/model", cache_dir=tmp_path) == before
    with pytest.raises(ConnectionError, match="the hub could not be reached"):
        hub.resolve("some/model", revision="f" * 40, cache_dir=tmp_path)
    server.mode = "sound"
    after = hub.resolve("some/model", cache_dir=tmp_path)
    assert after.name == server.commit
    assert (after / "config.json").read_bytes() == b"this is config.json anew"


@pytest.mark.parametrize("mode", [*NETWORK, "wrong"])
def test_every_failure_of_the_network_has_its_sentence(server, tmp_path, mode):
    server.mode = mode
    reason = (NETWORK | {"wrong": "the download was not what the hub had announced"})[mode]
    message = f'There is no folder "some/model", {reason}.*Give a folder, or "demo"'
    with pytest.raises(ConnectionError, match=message):
        hub.resolve("some/model", cache_dir=tmp_path)
    server.mode = "sound"
    assert (hub.resolve("some/model", cache_dir=tmp_path) / "config.json").is_file()


@pytest.mark.parametrize(
    "mode, message",
    [
        ("401 RepoNotFound", r"no such model, or a private one \(401\): check the name, or log in"),
        ("401 GatedRepo", r"to ask for this model first \(401\): at https://huggingface.co/some/m"),
        ("403 GatedRepo", r"to ask for this model first \(403\): at https://huggingface.co/some/m"),
        ("404 RepoNotFound", r"the hub has no such model \(404\): check the name"),
        ("404 RevisionNotFound", r'the hub has no revision "None" of this model \(404\)'),
    ],
)
def test_every_refusal_of_the_hub_has_its_sentence(server, tmp_path, mode, message):
    server.mode = mode
    with pytest.raises(CheckpointError, match=f'There is no folder "some/model", and .*{message}'):
        hub.resolve("some/model", cache_dir=tmp_path)


def test_a_revision_that_is_missing_is_named(server, tmp_path):
    with pytest.raises(CheckpointError, match='the hub has no revision "v9" of this model'):
        hub.resolve("some/model", revision="v9", cache_dir=tmp_path)


def test_a_name_that_no_model_can_have_is_refused(server, tmp_path):
    with pytest.raises(CheckpointError, match="the hub has no models of such names"):
        hub.resolve("a--b/c", cache_dir=tmp_path)


def test_a_damaged_download_says_what_to_delete(server, tmp_path):
    folder = hub.resolve("some/model", cache_dir=tmp_path)
    file = folder / "config.json"
    with pytest.raises(CheckpointError, match=f"{file}: expected JSON.*delete {file.resolve()} to"):
        weights.load("some/model", cache_dir=tmp_path)


def test_a_disk_that_is_full_is_no_failure_of_the_network(server, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    folder = hub.resolve("some/model", cache_dir=tmp_path / "shared")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="No space left"):
        hub.resolve("some/model", cache_dir=tmp_path / "empty")
    # As a cache that cannot be written, but has the model.
    assert hub.resolve("some/model", cache_dir=tmp_path / "shared") == folder


@pytest.mark.parametrize(
    "names, is_whole",
    [
        (["config.json", "model.safetensors"], True),
        (["config.json", INDEX, *SHARDS], True),
        (["config.json", INDEX, SHARDS[1]], False),
        (["config.json", INDEX], False),
        (["config.json"], False),
    ],
)
def test_a_download_that_was_broken_off_is_not_whole(tmp_path, names, is_whole):
    folder = cached_snapshot(tmp_path, "some/model")
    for name in names:
        (folder / name).touch()
    place = {"cache_dir": tmp_path, "local_files_only": True}
    if is_whole:
        assert hub.resolve("some/model", **place) == folder
    else:
        with pytest.raises(ConnectionError, match="not in its cache"):
            hub.resolve("some/model", **place)


def test_a_device_is_no_folder(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="Expected a folder.*got a FIFO"):
        hub.resolve(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="got an address"):
        hub.resolve("https://huggingface.co/gpt2")
    with pytest.raises(CheckpointError, match="got an unknown home"):
        hub.resolve("~no-such-user/model")
