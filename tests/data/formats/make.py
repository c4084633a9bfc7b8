"""Writes the files of this folder, by each format's own writer.

They ask for packages that the project does not: transformers 4.53.3 with its Flax and TensorFlow
models, tensorflow-cpu 2.18, tf-keras. `python make.py FOLDER`
"""

import json
import os
import re
import sys
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import FlaxGPT2LMHeadModel, GPT2Config, TFGPT2LMHeadModel

SIZES = {"vocab_size": 37, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
CONFIG = GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)
HPARAMS = {"n_vocab": 37, "n_ctx": 12, "n_embd": 8, "n_head": 2, "n_layer": 2}
TF_NAME = re.compile(r"(wte|wpe|ln_f|h_\._\d+)/.*(?=:0)")
TF_WORDS = {"h_._": "h.", "/": ".", "gamma": "weight", "beta": "bias", "embeddings": "weight"}


def write_flax(folder, rng):
    """Writes a model of random weights; returns them in HF's layout, and the model."""
    model = FlaxGPT2LMHeadModel(CONFIG, seed=0)
    leaves = {}
    state = {}
    for path, leaf in flatten_dict(model.params, sep=".").items():
        array = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        if path.endswith("scale"):
            array += 1
        leaves[path] = array
        module, kind = path.removeprefix("transformer.").rsplit(".", 1)
        name = f"{module}.bias" if kind == "bias" else f"{module}.weight"
        state[name] = array.T if kind == "kernel" else array
    model.params = unflatten_dict(leaves, sep=".")
    model.save_pretrained(folder)
    return state, model


def write_tensorflow(folder, state):
    """Writes the same weights as HF's TensorFlow model."""
    model = TFGPT2LMHeadModel(CONFIG)
    model(tf.zeros((1, 1), tf.int32))  # which makes its variables
    for variable in model.weights:
        name = TF_NAME.search(variable.name)[0]
        for word, replacement in TF_WORDS.items():
            name = name.replace(word, replacement)
        variable.assign(state[name].reshape(variable.shape))
    model.save_pretrained(folder)


def write_openai(folder, state):
    """Writes the same weights as openai/gpt-2 names and keeps them."""
    folder.mkdir()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = []
        for name, array in state.items():
            module, kind = name.rsplit(".", 1)
            path = re.sub(r"^h\.", "h", module).replace(".", "/")
            is_norm = "ln_" in module
            if kind == "bias":
                path += "/b"
            elif is_norm:
                path += "/g"
            elif module not in ("wte", "wpe"):
                path += "/w"
                array = array[None]
            variables.append(tf.compat.v1.get_variable(f"model/{path}", initializer=array))
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(variables)
        saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)
    (folder / "checkpoint").unlink()  # the path that it was written to, for TensorFlow's own sake
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))


def main(folder):
    """Writes all of them."""
    rng = np.random.default_rng(0)
    state, model = write_flax(folder / "flax", rng)
    write_tensorflow(folder / "tf", state)
    write_openai(folder / "openai", state)
    ids = rng.integers(0, 37, (2, 12))
    np.savez(folder / "expected.npz", ids=ids, logits=np.asarray(model(ids).logits), **state)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
