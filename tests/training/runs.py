"""What tests of whole runs share: a tiny recipe, data for it, the command, what a run wrote."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import numpy as np

import gpt2_jax
from gpt2_jax.training.recipes import Recipe
from tests.reference import ROOT

SMALL = Recipe(
    n_layer=1,
    n_head=2,
    n_embd=16,
    n_positions=8,
    dropout=0.1,
    batch_size=4,
    micro_batches=2,
    steps=12,
    learning_rate=1e-2,
    min_learning_rate=1e-3,
    warmup_steps=2,
    eval_every=6,
    save_every=4,
    log_every=1,
    sample_tokens=5,
)


def write_corpus(folder):
    """A folder of token files, as `prepare` makes them, of few letters, each a token."""
    text = ("the cat sat on the mat and the dog sat on the log " * 20).encode()
    letters = [*sorted(set(text.decode())), "z"]  # 14, which the devices of a mesh divide
    space = "\u0120"
    gpt2_jax.Tokenizer({space if c == " " else c: i for i, c in enumerate(letters)}, []).save(
        folder
    )
    ids = np.array([letters.index(chr(byte)) for byte in text], np.uint16)
    ids[:900].tofile(folder / "train.bin")
    ids[900:].tofile(folder / "val.bin")
    meta = {"dtype": "uint16", "vocab_size": len(letters), "val": {"tokens": 100, "bytes": 100}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def curve(run):
    """What is to be the same whatever happened: all metrics but the speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "tokens_per_second"}
        for line in lines
    ]


def checkpoint_steps(run):
    """The steps of which there are checkpoints."""
    names = [child.name for child in (run / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def train(corpus, out, *options, devices=8, **kwargs):
    """Starts `scripts/train.py` on the tiny recipe, in a process of so many devices."""
    fields = dataclasses.asdict(SMALL)
    flags = [f"--{name}={value}" for name, value in fields.items() if not isinstance(value, bool)]
    command = [
        sys.executable,
        ROOT / "scripts" / "train.py",
        corpus,
        "--out",
        out,
        *flags,
        *options,
    ]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_cpu_parallel_codegen_split_count=1"
        f" --xla_force_host_platform_device_count={devices}",
        # As in `conftest.py`: what was compiled once is found.
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **kwargs)


def wait_for(condition, process, seconds=90):
    """Waits until `condition()` or the process has ended."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.stderr.read()
        time.sleep(0.02)
