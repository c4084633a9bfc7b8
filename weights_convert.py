"""Converts GPT-2 weights between HF's folder layout and one file of params, in either direction.

    python weights_convert.py gpt2 params.safetensors --dtype bfloat16
    python weights_convert.py params.safetensors my-gpt2 --verify

SRC is "demo", a folder, a hub id or a file `*.safetensors` of params; DST is a file if it ends in `.safetensors` and a
folder otherwise. A file holds its config; a folder gets SRC's tokenizer files as well. Prints one line and, with
`--verify`, the largest difference between these logits and PyTorch's. Nothing is left at DST unless all went well.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import jax

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError, replacing
from gpt2_jax.pretrained import hub, weights
from gpt2_jax.pretrained.formats import WEIGHT_FILE

# Largest difference allowed, relative to the largest logit, by the dtype of the written weights.
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}


def read(source, *, config=None, dtype=None):
    """Returns the config and params of a folder or of a file of params."""
    if is_params_file(source):
        config = read_config(source, config)
        params = weights.from_hf(weights.to_hf(weights.load_params(source)), config, dtype)
        return config.replace(dtype=params["wte"]["embedding"].dtype.name), params
    if config is not None:
        raise CheckpointError("`--config` is for a single file of params: a folder has its own.")
    return weights.load(source, dtype=dtype)


def read_config(file, config):
    """Returns the config given by the user, else the one in the file's metadata."""
    if config is not None:
        path = Path(config)
        return GPT2Config.from_json_file(path / "config.json" if path.is_dir() else path)
    stored = weights.load_config(file)
    if stored is None:
        raise CheckpointError(f"{file} holds no config: give one with `--config config.json`.")
    return stored


def write(target, params, config, source=None):
    """Writes a folder, with the tokenizer of the `source` folder, or a file of params."""
    if is_params_file(target):
        weights.save_params(target, params, config)
        return
    weights.save(target, params, config)
    for name in hub.TOKENIZER_FILES:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def verify(written, source):
    """Returns the largest difference of `written`'s logits from PyTorch's for `source`, and the largest logit."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise CheckpointError(f"`--verify` needs PyTorch and transformers: {error}.") from None
    import numpy as np

    import gpt2_jax

    transformers.utils.logging.disable_progress_bar()
    config, params = read(written)
    ids = np.random.default_rng(0).integers(
        config.vocab_size, size=(2, min(32, config.n_positions))
    )
    ours = np.asarray(gpt2_jax.apply(params, ids, config=config.replace(dtype="float32")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = source or written
        if is_params_file(folder):
            folder = Path(scratch) / "model"
            weights.save(folder, params, config)
        model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            theirs = model(torch.from_numpy(ids)).logits.numpy()
    return float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())


def is_params_file(path):
    """Tells a file of params from a folder, by its name."""
    return str(path).endswith(".safetensors") and not Path(path).is_dir()


def convert(args):
    """Converts, verifies if asked to, and only then puts the result in its place."""
    source = None if is_params_file(args.src) else hub.resolve(args.src, revision=args.revision)
    with replacing(
        args.dst, overwrite=args.overwrite, keep=lambda name: not WEIGHT_FILE.fullmatch(name)
    ) as temporary:
        config, params = read(source or args.src, config=args.config, dtype=args.dtype)
        write(temporary, params, config, source)
        dtype = params["wte"]["embedding"].dtype.name
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        if args.verify:
            error, scale = verify(temporary, source)
            print(
                f"largest difference from PyTorch's logits: {error:.3g} (largest logit: {scale:.3g})"
            )
            if not error <= TOLERANCE[dtype] * scale:
                raise CheckpointError(
                    f"Expected logits within {TOLERANCE[dtype] * scale:.3g} of PyTorch's, got {error:.3g}: "
                    f"nothing was written."
                )
    print(f"{args.dst}: {count:,} parameters, {dtype}")


def main(argv=None):
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help='"demo", a folder, a hub id, or a .safetensors file of params')
    parser.add_argument("dst", help="a folder, or a .safetensors file of params")
    parser.add_argument(
        "--dtype", help="cast to float32, float16, bfloat16 or float64 (default: as they are)"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--config", help="config.json, or a folder with one, for a file that holds none"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare logits with PyTorch's before finishing"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at DST")
    args = parser.parse_args(argv)
    try:
        with jax.enable_x64(True):  # so that float64 weights stay what they are
            convert(args)
    except (ValueError, OSError) as error:
        print(f"weights_convert: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
