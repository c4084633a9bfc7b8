"""Measures this library beside its peers, in turn, on the same weights: `python scripts/benchmark.py train`.

Each contender is a process of its own that prepares, warms up and then waits. A round lets one after the other work
once, alone; speeds are medians over the rounds, and a ratio is the median of the rounds' ratios, so that a slow minute
of the machine slows all contenders alike. What they compute is compared before any figure is printed.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

Spec = dict[str, Any]  # what is to be done: the same for all contenders
Once = Callable[[], tuple[int, list[float]]]  # works once; returns tokens done and numbers that must agree

MODELS = {
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "char": {"vocab_size": 65, "n_positions": 64, "n_embd": 128, "n_layer": 4, "n_head": 4},
    "tiny": {"vocab_size": 65, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2},
}
TRAIN = {  # model -> batch, length, steps of a round
    "gpt2": (4, 256, 1),
    "gpt2-medium": (1, 256, 1),
    "char": (12, 64, 50),
    "tiny": (2, 16, 3),
}


# Contenders: each gets ready and returns what works once.


def ours_train(spec: Spec) -> Once:
    """The step of `gpt2_jax.train`."""
    import jax

    import gpt2_jax

    config, params = gpt2_jax.load(spec["folder"])
    config = config.replace(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    tx = gpt2_jax.make_optimizer(spec["learning_rate"])
    states = [gpt2_jax.init_state(params, tx)]
    batches = batches_of(spec, config.vocab_size)

    def once():
        state, losses = states.pop(), []
        for _ in range(spec["steps"]):
            state, metrics = gpt2_jax.train_step(state, next(batches), config=config, tx=tx)
            losses.append(metrics["loss"])
        states.append(jax.block_until_ready(state))
        return spec["steps"] * spec["batch"] * spec["length"], [float(loss) for loss in losses]

    return once


def torch_train(spec: Spec) -> Once:
    """A lean PyTorch step: fused attention kernel, fused AdamW, no more than the model needs."""
    import torch

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    model = lean_gpt2(spec["folder"])
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=spec["learning_rate"], betas=(0.9, 0.95), fused=True)
    batches = batches_of(spec, model.wte.num_embeddings)
    forward = torch.compile(model) if spec["compile"] else model

    def once():
        losses = []
        for _ in range(spec["steps"]):
            ids = torch.tensor(next(batches))
            logits = forward(ids[:, :-1].contiguous())
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return spec["steps"] * spec["batch"] * spec["length"], losses

    return once


def ours_eval(spec: Spec) -> Once:
    """`gpt2_jax.perplexity`."""
    import gpt2_jax

    config, params = gpt2_jax.load(spec["folder"])
    ids = text_of(spec, config.vocab_size)
    options = {"window": spec["length"], "stride": spec["length"], "batch_size": 1}

    def once():
        found = gpt2_jax.perplexity(params, ids, config=config, **options)
        return len(ids), [found.nll]

    return once


def hf_eval(spec: Spec) -> Once:
    """The loop of HF's guide to perplexity."""
    import torch

    model = hf_gpt2(spec)
    ids = torch.tensor(text_of(spec, model.config.vocab_size))

    @torch.inference_mode()
    def once():
        total = 0.0
        for window in ids.split(spec["length"]):
            logits = model(window[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        return len(ids), [total]

    return once


def ours_patch(spec: Spec) -> Once:
    """`gpt2_jax.patching_sweep`, all in one pass."""

    import jax
    import numpy as np

    import gpt2_jax

    config, params = gpt2_jax.load(spec["folder"])
    ids, other = text_of(spec, config.vocab_size).reshape(2, 1, -1)

    @jax.jit
    def sweep(params, ids, other):
        _, donors = gpt2_jax.capture(params, other, config=config, sites="h.*.resid_pre")
        options = {"config": config, "site": "resid_pre", "batch_size": spec["batch_size"]}
        return gpt2_jax.patching_sweep(params, ids, donors, lambda logits: logits[0, 5] - logits[0, 7], **options)

    def once():
        found = np.asarray(sweep(params, ids, other))
        return found.size * ids.size, found.flatten().tolist()

    return once


def hf_patch(spec: Spec) -> Once:
    """The loop of a hook for each layer and position."""
    import torch

    model = hf_gpt2(spec)
    model.set_attn_implementation("eager")
    ids, other = torch.tensor(text_of(spec, model.config.vocab_size)).view(2, 1, -1)

    @torch.inference_mode()
    def once():
        donors = model(other, output_hidden_states=True).hidden_states
        found = []
        for layer, donor in zip(model.transformer.h, donors[:-1], strict=True):
            for place in range(spec["length"]):

                def put(module, args, donor=donor, place=place):
                    x = args[0].clone()
                    x[:, place] = donor[:, place]
                    return (x, *args[1:])

                handle = layer.register_forward_pre_hook(put)
                logits = model(ids).logits[0, -1]
                handle.remove()
                found.append((logits[5] - logits[7]).item())
        return len(found) * spec["length"], found

    return once


def hf_gpt2(spec: Spec) -> Any:
    """Returns HF's model, as transformers sets it up."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count())
    model = transformers.GPT2LMHeadModel.from_pretrained(spec["folder"]).eval()
    return torch.compile(model) if spec["compile"] else model


def lean_gpt2(folder: str) -> Any:
    """Returns a small, fast GPT-2 in PyTorch with the weights of a folder."""
    from safetensors.torch import load_file
    from torch import nn
    from torch.nn import functional as F

    config = json.loads((Path(folder) / "config.json").read_text())
    width, heads, epsilon = config["n_embd"], config["n_head"], config["layer_norm_epsilon"]

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
            self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
            self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

        def forward(self, x):
            rows, length, _ = x.shape
            qkv = self.attn["c_attn"](self.ln_1(x)).view(rows, length, 3, heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attn["c_proj"](z.transpose(1, 2).reshape(rows, length, width))
            return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))

    class Lean(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(config["vocab_size"], width)
            self.wpe = nn.Embedding(config["n_positions"], width)
            self.h = nn.ModuleList(Layer() for _ in range(config["n_layer"]))
            self.ln_f = nn.LayerNorm(width, epsilon)

        def forward(self, ids):
            x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
            for layer in self.h:
                x = layer(x)
            return self.ln_f(x) @ self.wte.weight.T

    model = Lean()
    state = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(f"{folder}/model.safetensors").items()
    }
    dense = [name for name in state if name.startswith("h.") and state[name].ndim == 2]
    model.load_state_dict(state | {name: state[name].T.contiguous() for name in dense})
    return model


CONTENDERS = {
    "train": {"ours": ours_train, "PyTorch": torch_train, "PyTorch, compiled": torch_train},
    "eval": {"ours": ours_eval, "transformers": hf_eval, "transformers, compiled": hf_eval},
    "patch": {"ours": ours_patch, "transformers": hf_patch},
}


def batches_of(spec: Spec, vocab_size: int) -> Iterator[Any]:
    """Yields seeded batches without end, the same for all."""
    import numpy as np

    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, vocab_size, (spec["batch"], spec["length"] + 1))


def text_of(spec: Spec, vocab_size: int) -> Any:
    """Returns a seeded text of as many windows as the batch has rows."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab_size, spec["batch"] * spec["length"])


# The limits of the machine, measured among the rounds.


def limits(spec: Spec) -> Once:
    """A large matrix product and a large sum: GFLOP/s and GB/s."""
    import jax
    import jax.numpy as jnp

    del spec
    square, long = jnp.ones((2048, 2048)), jnp.ones(2**27)
    product, total = jax.jit(lambda x: x @ x), jax.jit(jnp.sum)

    def once():
        out = []
        for function, x, amount in ((product, square, 2 * 2048**3), (total, long, long.nbytes)):
            function(x).block_until_ready()
            begun = time.perf_counter()
            function(x).block_until_ready()
            out.append(amount / (time.perf_counter() - begun) / 1e9)
        return 0, out

    return once


# The race.


class Contender:
    """A process that works when it is told to."""

    def __init__(self, work: str, name: str, spec: Spec):
        command = [sys.executable, __file__, "--serve", work, name, json.dumps(spec)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer()

    def once(self) -> dict[str, Any]:
        """Works once; returns `seconds`, `tokens` and `numbers`."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith('{"answer"'):
                return json.loads(line)["answer"]
        raise RuntimeError(f"{self.process.args[3:5]} ended with status {self.process.wait()}.")


def serve(work: str, name: str, spec: Spec) -> None:
    """What runs in a contender's process."""

    def answer(content):
        print(json.dumps({"answer": content}), flush=True)

    make = limits if work == "limits" else CONTENDERS[work][name]
    once = make(spec | {"compile": name.endswith("compiled")})
    answer({"numbers": once()[1]})  # compiles, and is the first to be compared
    for _ in sys.stdin:
        begun = time.perf_counter()
        tokens, numbers = once()
        answer({"seconds": time.perf_counter() - begun, "tokens": tokens, "numbers": numbers})


def race(work: str, spec: Spec, names: list[str], rounds: int, tolerance: float) -> dict[str, Any]:
    """Lets the contenders work in turn; returns their speeds and the ratios to the first peer.

    Raises:
      RuntimeError: what they computed differs.
    """
    contenders = {name: Contender(work, name, spec) for name in names}
    machine = Contender("limits", "limits", spec)
    first = {name: contender.ready["numbers"] for name, contender in contenders.items()}
    for name, numbers in first.items():
        for mine, theirs in zip(first["ours"], numbers, strict=True):
            if abs(mine - theirs) > tolerance * abs(theirs):
                raise RuntimeError(f"{work}: ours gives {mine} where {name} gives {theirs}.")
    speeds: dict[str, list[float]] = {name: [] for name in names}
    measured = []
    for _ in range(rounds):
        for name, contender in contenders.items():
            done = contender.once()
            speeds[name].append(done["tokens"] / done["seconds"])
        measured.append(machine.once()["numbers"])
    for contender in (*contenders.values(), machine):
        contender.close()
    out = {"limits": {"gflops": _median(m[0] for m in measured), "gigabytes": _median(m[1] for m in measured)}}
    for name in names:
        ratios = [mine / theirs for mine, theirs in zip(speeds["ours"], speeds[name], strict=True)]
        out[name] = {
            "tokens_per_second": _median(speeds[name]),
            "slowest": min(speeds[name]),
            "fastest": max(speeds[name]),
            "ours_is": _median(ratios),
        }
    return out


def _median(values) -> float:
    return statistics.median(values)


def make_checkpoint(model: str, folder: Path) -> str:
    """Writes a model of random weights, as HF would, in a process of its own; returns its folder."""
    target = folder / model
    code = (
        "import sys, json, jax, gpt2_jax; name, target, options = sys.argv[1:];"
        "config = gpt2_jax.GPT2Config(**json.loads(options));"
        "gpt2_jax.save(target, gpt2_jax.init(jax.random.key(0), config), config)"
    )
    subprocess.run([sys.executable, "-c", code, model, str(target), json.dumps(MODELS[model])], check=True)
    return str(target)


def show(title: str, result: dict[str, Any], flops_per_token: float) -> None:
    """Prints a table."""
    peak, memory = result["limits"]["gflops"], result["limits"]["gigabytes"]
    print(f"\n{title}  (this machine: {peak:.0f} GFLOP/s, {memory:.0f} GB/s)")
    print(f"{'':20} {'tokens/s':>10} {'from':>10} {'to':>10} {'ours is':>9} {'of the limit':>14}")
    for name, row in result.items():
        if name != "limits":
            numbers = (row[key] for key in ("tokens_per_second", "slowest", "fastest"))
            share = row["tokens_per_second"] * flops_per_token / peak / 1e9
            print(f"{name:20}", *(f"{number:10,.1f}" for number in numbers), f"{row['ours_is']:8.2f}x {share:14.0%}")


def parameters(model: str) -> int:
    """The number of parameters of a model, positions apart: what a token is multiplied with."""
    c = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12} | MODELS[model]
    return c["vocab_size"] * c["n_embd"] + 12 * c["n_layer"] * c["n_embd"] ** 2


def processor() -> str:
    """The name of the processor, as Linux knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor()


def bench_train(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """AdamW steps in float32, clipping included."""
    names = ["ours", "PyTorch"] + (["PyTorch, compiled"] if args.compile else [])
    results = {}
    for model in args.models or ["gpt2", "char"]:
        batch, length, steps = TRAIN[model]
        spec = {"folder": make_checkpoint(model, folder), "batch": batch, "length": length, "steps": steps}
        result = race("train", spec | {"learning_rate": 3e-4}, names, args.rounds, tolerance=1e-4)
        results[model] = result
        if not args.json:
            show(f"train {model}, batch {batch} x {length}, AdamW, float32", result, 6 * parameters(model))
    return results


def bench_eval(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Scoring in windows that do not overlap, one at a time, in float32."""
    names = ["ours", "transformers"] + (["transformers, compiled"] if args.compile else [])
    results = {}
    for model in args.models or ["gpt2"]:
        length = MODELS[model].get("n_positions", 1024)
        spec = {"folder": make_checkpoint(model, folder), "batch": 2, "length": length}
        results[model] = race("eval", spec, names, args.rounds, tolerance=1e-5)
        if not args.json:
            show(f"eval {model}, window {length}, float32", results[model], 2 * parameters(model))
    return results


def bench_patch(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Activation patching at every layer and position of a prompt, in float32; the tokens are those of all runs."""
    results = {}
    for model in args.models or ["gpt2"]:
        length = min(32, MODELS[model].get("n_positions", 1024))
        spec = {"folder": make_checkpoint(model, folder), "batch": 2, "length": length, "batch_size": 8}
        results[model] = race("patch", spec, ["ours", "transformers"], args.rounds, tolerance=1e-3)
        if not args.json:
            title = f"patch {model}, {length} tokens, float32; the limit is that of whole passes"
            show(title, results[model], 2 * parameters(model))
    return results


BENCHES = {"train": bench_train, "eval": bench_eval, "patch": bench_patch}


def main() -> None:
    """Runs the benchmarks that are asked for."""
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
    parser = argparse.ArgumentParser(
        description="Measure gpt2_jax beside its peers, interleaved, on the same weights."
    )
    parser.add_argument("work", choices=BENCHES)
    parser.add_argument("--models", nargs="+", choices=MODELS, help="of which size (default: what the README quotes)")
    parser.add_argument("--rounds", type=int, default=7, help="times that each contender works (default: 7)")
    parser.add_argument("--compile", action="store_true", help="let torch.compile take part too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    facts = {"date": date.today().isoformat(), "cores": os.cpu_count(), "processor": processor()}
    facts |= {name: version(name) for name in ("jax", "flax", "optax", "torch", "transformers")}
    with tempfile.TemporaryDirectory() as folder:
        results = BENCHES[args.work](args, Path(folder))
    if args.json:
        print(json.dumps(facts | {args.work: results}))
    else:
        print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
