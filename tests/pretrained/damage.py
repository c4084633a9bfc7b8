"""Seeded damages of a checkpoint: one byte or many, a file cut off or gone.

Run as a program it makes 1,200 of them in each layout, and prints how many were refused.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.generation_config import load_generation_config
from gpt2_jax.pretrained import weights
from gpt2_jax.pretrained.formats import SafetensorsFile
from gpt2_jax.pretrained.layout import param_shapes

CONFIG = GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2, eos_token_id=0)
KINDS = ("flip", "replace", "garbage", "truncate", "extend", "delete")
LAYOUTS = ("whole", "shards", "bin", "bin shards")


def make(folder, layout, rng):
    """Writes a checkpoint in one of the layouts."""
    state = {}
    for name, shape in param_shapes(CONFIG).items():
        state[f"transformer.{name}"] = rng.normal(size=shape).astype(np.float32)
    size = 3000 if "shards" in layout else None
    weights.save(folder, weights.from_hf(state, CONFIG), CONFIG, max_shard_size=size)
    if not layout.startswith("bin"):
        return
    for file in folder.glob("model*.safetensors"):
        tensors = SafetensorsFile(file)
        held = {name: torch.from_numpy(tensors.read(name)) for name in tensors.shapes}
        name = file.name.replace("model", "pytorch_model").replace("safetensors", "bin")
        torch.save(held, folder / name)
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        text = index.read_text().replace("model-", "pytorch_model-").replace("safetensors", "bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def damage(file, rng):
    """Damages a file, and returns how."""
    kind = KINDS[rng.integers(len(KINDS))]
    content = bytearray(file.read_bytes())
    # Half of the damages lie at the start, where headers are.
    end = len(content) if rng.random() < 0.5 else min(len(content), 600)
    at = int(rng.integers(end))
    if kind == "flip":
        content[at] ^= 1 << int(rng.integers(8))
    elif kind == "replace":
        content[at] = int(rng.integers(256))
    elif kind == "garbage":
        content[at : at + 32] = rng.bytes(min(32, len(content) - at))
    elif kind == "truncate":
        del content[at:]
    elif kind == "extend":
        content += rng.bytes(at + 1)
    file.write_bytes(content)
    if kind == "delete":
        file.unlink()
    return f"{kind} at {at}"


def read(folder):
    """Reads all that a checkpoint has but its tokenizer."""
    config, _ = weights.load(folder)
    if (folder / "generation_config.json").is_file():
        load_generation_config(folder, config=config)


def try_damages(layout, n, seed=0):
    """Returns how many of `n` damages were refused, and what was wrong with refusals."""
    rng = np.random.default_rng(seed)
    n_refused = 0
    wrongs = []
    root = Path(tempfile.mkdtemp())
    make(root / "sound", layout, rng)
    names = sorted(file.name for file in (root / "sound").iterdir())
    for number in range(n):
        folder = shutil.copytree(root / "sound", root / str(number))
        name = names[rng.integers(len(names))]
        how = damage(folder / name, rng)
        try:
            read(folder)
        except Exception as error:
            n_refused += 1
            message = str(error)
            is_named = name in message and str(folder) in message
            if not isinstance(error, ValueError) or not is_named or len(message) > 4000:
                wrongs.append(f"{name}, {how}: {type(error).__name__}: {message:.300}")
        shutil.rmtree(folder)
    shutil.rmtree(root)
    return n_refused, wrongs


if __name__ == "__main__":
    for layout in LAYOUTS:
        print(layout, *try_damages(layout, 1200), sep="\n")
