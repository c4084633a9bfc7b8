"""Measures this library beside its peers, in turn, on the same weights.

    python scripts/benchmark.py decode

Each contender is a process of its own (`contenders.py`) that prepares, warms up and then waits. A
round lets one after the other work once, alone; speeds are medians over the rounds, and a ratio is
the median of the rounds' ratios, so that a slow minute of the machine slows all contenders alike.
What they compute is compared first.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

Spec = dict[str, Any]  # what is to be done: the same for all contenders

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "gpt2_jax" / "assets" / "demo"
VOCABULARY = ROOT / "gpt2_jax" / "assets" / "gpt2"
MODELS = {
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "char": {"vocab_size": 65, "n_positions": 64, "n_embd": 128, "n_layer": 4, "n_head": 4},
    "tiny": {"vocab_size": 65, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2},
}
# Model -> batch, length, steps of a round.
TRAIN = {
    "gpt2": (4, 256, 1),
    "gpt2-medium": (1, 256, 1),
    "char": (12, 64, 50),
    "tiny": (2, 16, 3),
}
# Batch, prompt, new tokens, whether the time of the prompt is taken away.
DECODE = ((1, 32, 128, False), (8, 32, 128, False), (1, 900, 100, True))
SAMPLE = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
PREFILL = (512, 1023)
MEMORY = ((1, 32, 128), (8, 32, 128), (1, 1023, 1))  # batch, prompt, new tokens
LAYERS = (12, 24, 48)
PLACES = (
    ("load", "fsdp=8"),
    ("load", "data=2,fsdp=2,tensor=2"),
    ("save", "fsdp=8"),
    ("save", "data=2,fsdp=2,tensor=2"),
    ("init", "fsdp=8"),
)
BATCHES = (1, 2, 4, 8, 16, 32)
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
# Of logits against the peer's in float32.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 5e-2}
PROMPT = "The quick brown fox jumps over the lazy dog and runs into the forest, where"


class Contender:
    """A process that works when it is told to."""

    def __init__(self, work: str, name: str, spec: Spec):
        script = Path(__file__).with_name("contenders.py")
        command = [sys.executable, str(script), work, name, json.dumps(spec)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = self._answer()

    def once(self) -> dict[str, Any]:
        """Works once; returns `seconds`, `amount`, `numbers` and `peak`, the most memory so far in
        MiB.
        """
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
        raise RuntimeError(f"{self.process.args[2:4]} ended with status {self.process.wait()}.")


def race(work: str, spec: Spec, names: list[str], rounds: int, tolerance: float) -> dict[str, Any]:
    """Lets the contenders work in turn; returns their speeds and the ratios of ours to each.

    Raises:
      RuntimeError: what they computed differs, by more than `tolerance` relative to the largest
        number.
    """
    if spec.get("dtype", "float32") != "float32":
        names = [*names, "ours, float32"]  # in the same rounds: what fewer bits give
    contenders = {name: Contender(work, name, spec) for name in names}
    machine = Contender("limits", "limits", spec)
    mine = contenders["ours"].ready["numbers"]
    scale = max(map(abs, mine), default=0)
    for name, contender in contenders.items():
        theirs = contender.ready["numbers"]
        if len(theirs) != len(mine) or any(
            abs(a - b) > tolerance * scale for a, b in zip(mine, theirs, strict=True)
        ):
            raise RuntimeError(
                f"{work}: ours gives {mine[:20]}... where {name} gives {theirs[:20]}..."
            )
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    measured = []
    for _ in range(rounds):
        for name, contender in contenders.items():
            turns[name].append(contender.once())
        measured.append(machine.once()["numbers"])
    for contender in (*contenders.values(), machine):
        contender.close()
    speeds = {
        name: [turn["amount"] / turn["seconds"] for turn in done] for name, done in turns.items()
    }
    out: dict[str, Any] = {
        "limits": {
            "gflops": median(m[0] for m in measured),
            "gbytes": median(m[1] for m in measured),
        }
    }
    for name in names:
        out[name] = {
            "speed": median(speeds[name]),
            "slowest": min(speeds[name]),
            "fastest": max(speeds[name]),
            "ours_is": median(a / b for a, b in zip(speeds["ours"], speeds[name], strict=True)),
            "peak": turns[name][-1]["peak"],
        }
    return out


def show(
    title: str, unit: str, result: dict[str, Any], *, flops: float = 0, bytes: float = 0
) -> None:
    """Prints a table.

    `flops` and `bytes` are what one unit needs at least, for the share of the machine's limit.
    """
    compute, memory = result["limits"]["gflops"] * 1e9, result["limits"]["gbytes"] * 1e9
    print(f"\n{title}  (this machine: {compute / 1e9:.0f} GFLOP/s, {memory / 1e9:.0f} GB/s)")
    print(
        f"{'':24} {unit:>10} {'from':>10} {'to':>10} {'ours is':>9} {'of the limit':>13}"
        f" {'peak MiB':>9}"
    )
    for name, row in result.items():
        if name != "limits":
            speeds = " ".join(f"{row[key]:10,.4g}" for key in ("speed", "slowest", "fastest"))
            share = row["speed"] * max(flops / compute, bytes / memory)
            print(
                f"{name:24} {speeds} {row['ours_is']:8.2f}x {f'{share:.0%}' if share else '':>13}"
                f" {row['peak']:9.0f}"
            )


def make_checkpoint(model: str, folder: Path) -> str:
    """Writes a model of random weights, as HF would, in its own process; returns the folder."""
    target = folder / model
    if not target.exists():
        code = (
            "import sys, json, jax, gpt2_jax; target, options = sys.argv[1:];"
            "config = gpt2_jax.GPT2Config(**json.loads(options));"
            "gpt2_jax.save(target, gpt2_jax.init(jax.random.key(0), config), config)"
        )
        subprocess.run(
            [sys.executable, "-c", code, str(target), json.dumps(MODELS[model])], check=True
        )
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(VOCABULARY / file, target)
    return str(target)


def matrix_parameters(model: str) -> int:
    """The number of parameters of a model that each token is multiplied with."""
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
    """AdamW steps on float32 weights, clipping included, computed in `--dtype`."""
    results = {}
    for model in args.models or ["gpt2", "char"]:
        usual, length, steps = TRAIN[model]
        for batch in args.batches or [usual]:
            spec = {
                "folder": make_checkpoint(model, folder),
                "batch": batch,
                "length": length,
                "steps": steps,
                "dtype": args.dtype,
                "learning_rate": 3e-4,
            }
            tolerance = 1e-4 if args.dtype == "float32" else 1e-2
            result = race("train", spec, peers(args, "PyTorch"), args.rounds, tolerance)
            title = f"train {model}, batch {batch} x {length}, AdamW, {args.dtype}"
            show(title, "tokens/s", result, flops=6 * matrix_parameters(model))
            results[title] = result
    return results


def bench_eval(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Scoring in windows that do not overlap, one at a time, in `--dtype`."""
    results = {}
    for model in args.models or ["gpt2"]:
        length = MODELS[model].get("n_positions", 1024)
        spec = {"folder": make_checkpoint(model, folder), "batch": 2, "length": length}
        tolerance = 1e-5 if args.dtype == "float32" else 1e-2
        spec |= {"dtype": args.dtype}
        result = race("eval", spec, peers(args, "transformers"), args.rounds, tolerance)
        title = f"eval {model}, window {length}, {args.dtype}"
        show(title, "tokens/s", result, flops=2 * matrix_parameters(model))
        results[title] = result
    return results


def bench_decode(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Greedy tokens in `--dtype`: one text, eight, and the end of a long one."""
    works = DECODE if args.prompts is None else [(1, prompt, 63, True) for prompt in args.prompts]
    return decoding(args, folder, works, decoders(args))


def bench_batch(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Greedy tokens of one text and of more at a time, in `--dtype`, without transformers."""
    works = [(batch, 32, 64, False) for batch in args.batches or BATCHES]
    return decoding(args, folder, works, ["ours", *others_that_decode(args.dtype)])


def bench_sample(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Drawn tokens in float32, which differ between peers: their number alone is compared."""
    return decoding(args, folder, DECODE[:2], decoders(args), SAMPLE)


def decoding(
    args: argparse.Namespace,
    folder: Path,
    works: list[tuple],
    names: list[str],
    sample: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Races in decoding, drawn by the options of `sample` or greedy without any."""
    sample = sample or {}
    results = {}
    kind = ", ".join(f"{name} {value}" for name, value in sample.items()) or "greedy"
    for model in args.models or ["gpt2"]:
        path = make_checkpoint(model, folder)
        for batch, prompt, new, after in works:
            spec = {
                "folder": path,
                "batch": batch,
                "length": prompt,
                "new": new,
                "after": after,
                "sample": sample,
                "dtype": args.dtype,
            }
            # What rounds the weights chooses other tokens: their number alone is compared then.
            tolerance = 0 if args.dtype == "float32" else float("inf")
            result = race("decode", spec, names, args.rounds, tolerance)
            title = f"decode {model}, batch {batch}, {new} tokens after {prompt}, {kind}"
            title += f", {args.dtype}"
            passes = WEIGHT_BYTES[args.dtype] * matrix_parameters(model) / batch
            show(title, "tokens/s", result, flops=2 * matrix_parameters(model), bytes=passes)
            results[title] = result
    return results


def decoders(args: argparse.Namespace) -> list[str]:
    """Returns the contenders that decode in `--dtype`."""
    # PyTorch has no int8 of its own for this model, and on CPU bfloat16 that is no faster.
    theirs = peers(args, "transformers") if args.dtype == "float32" else ["ours"]
    return theirs + others_that_decode(args.dtype)


def others_that_decode(dtype: str) -> list[str]:
    """Returns the contenders, beside ours and HF's, that are installed and decode in a dtype."""
    modules = {"CTranslate2": "ctranslate2", "llama.cpp": "llama_cpp"}
    if dtype == "bfloat16":
        del modules["CTranslate2"]  # which refuses it on CPU
    return [name for name, module in modules.items() if importlib.util.find_spec(module)]


def bench_prefill(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A prompt read and its cache filled, in float32."""
    results = {}
    for model in args.models or ["gpt2"]:
        for length in sorted(
            {min(length, MODELS[model].get("n_positions", 1024)) for length in PREFILL}
        ):
            spec = {"folder": make_checkpoint(model, folder), "batch": 1, "length": length}
            spec["dtype"] = args.dtype
            # The peer stays in float32.
            tolerance = TOLERANCE[args.dtype]
            result = race("prefill", spec, peers(args, "transformers"), args.rounds, tolerance)
            title = f"prefill {model}, {length} tokens, {args.dtype}"
            head = MODELS[model].get("vocab_size", 50257) * MODELS[model].get("n_embd", 768)
            show(title, "tokens/s", result, flops=2 * (matrix_parameters(model) - head))
            results[title] = result
    return results


def bench_patch(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Activation patching at every layer and position of a prompt, in float32.

    The tokens are those of all runs.
    """
    results = {}
    for model in args.models or ["gpt2"]:
        length = min(32, MODELS[model].get("n_positions", 1024))
        spec = {"folder": make_checkpoint(model, folder), "batch": 2, "length": length}
        result = race("patch", spec, peers(args, "transformers"), args.rounds, 1e-3)
        title = f"patch {model}, every layer and position of {length} tokens, float32"
        show(title, "tokens/s", result)
        results[title] = result
    return results


def bench_tokenizer(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Encoding a text on one thread, its words met before or new, and a batch on all cores."""
    text = args.text
    if text is None:
        text = folder / "text.txt"
        text.write_text(
            (ROOT / "tests" / "data" / "held-out.txt").read_text(encoding="utf-8") * 100,
            encoding="utf-8",
        )
    names = ["ours", "tokenizers"] + (["tiktoken"] if importlib.util.find_spec("tiktoken") else [])
    results = {}
    for case in ("known words", "new words", "batch"):
        spec = {"text": str(text), "vocabulary": str(VOCABULARY), "case": case}
        result = race("tokenizer", spec, names, args.rounds, 0)
        title = f"tokenizer, {Path(text).name}, {case}"
        show(title, "MB/s", result)
        results[title] = result
    return results


def bench_cold(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The command line from start to end, and the most memory that it takes."""
    results = {}
    for model in args.models or ["gpt2"]:
        spec = {"folder": make_checkpoint(model, folder), "prompt": PROMPT}
        for new, empty in ((1, False), (1, True), (128, False)):
            spec |= {"new": new, "empty": empty, "cache": str(folder / "cache")}
            result = race("cold", spec, ["ours", "transformers"], args.rounds, 0)
            kind = "no program compiled before" if empty else "programs in the cache"
            title = f"command line {model}, {new} tokens, {kind}, float32"
            show(title, "runs/s", result)
            results[title] = result
    return results


def bench_programs(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """How programs and memory grow with the number of calls."""
    del folder
    calls = 200
    contender = Contender("programs", "ours", {"calls": calls, "batches": args.batches or [1, 4]})
    results = {}
    print(f"\n{'calls of generate':>20} {'programs':>10} {'peak MiB':>10}")
    for number in range(2, 2 + args.rounds):  # the first were made to get ready
        turn = contender.once()
        (n_programs,) = turn["numbers"]
        print(f"{number * calls:20,} {n_programs:10,} {turn['peak']:10,.0f}")
        results[number * calls] = {"programs": n_programs, "peak": turn["peak"]}
    contender.close()
    return results


def bench_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The most memory of a process that decodes, or reads a long prompt, through the public API."""
    results = {}
    for model in args.models or ["gpt2"]:
        path = make_checkpoint(model, folder)
        weights = Path(path, "model.safetensors").stat().st_size / 2**20
        print(f"\n{model}, float32, most memory in MiB; the weights are {weights:,.0f}")
        for batch, length, new in MEMORY:
            spec = {"folder": path, "batch": batch, "length": length, "new": new, "after": False}
            found = {}
            for name in ["ours", "transformers", *others_that_decode("float32")]:
                # Twice: the first may convert the weights, in this very process.
                for _ in range(2):
                    contender = Contender("decode", name, spec | {"sample": {}})
                    found[name] = contender.once()["peak"]
                    contender.close()
            title = f"memory {model}, batch {batch}, {new} tokens after {length}, float32"
            shown = ", ".join(f"{name} {peak:,.0f}" for name, peak in found.items())
            print(f"batch {batch}, {new} tokens after {length}: {shown}", flush=True)
            results[title] = found
    return results


def bench_speculate(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Speculation beside `generate`, greedy, on the model in the package and on random weights."""
    results = {}
    for model in ("demo", *(args.models or ["gpt2"])):
        path = str(DEMO) if model == "demo" else make_checkpoint(model, folder)
        draft = args.draft if model == "demo" else None
        draft = draft or make_draft(path, folder / f"draft of {model}")
        print(f"\nspeculate {model}, greedy, {args.guesses} guesses to a pass, float32")
        for batch in args.batches or (1, 8):
            spec = {"folder": path, "draft": draft, "batch": batch, "length": 32, "new": 96}
            spec |= {"guesses": args.guesses, "dtype": "float32"}
            names = ["generate", "lookup", "draft"]
            contenders = {name: Contender("speculate", name, spec) for name in names}
            turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for _ in range(args.rounds):
                for name, contender in contenders.items():
                    turns[name].append(contender.once())
            for contender in contenders.values():
                contender.close()
            for name in names[1:]:
                pairs = zip(turns["generate"], turns[name], strict=True)
                ratio = median(plain["seconds"] / mine["seconds"] for plain, mine in pairs)
                per_pass = turns[name][-1]["numbers"][-1]
                title = f"speculate {model}, batch {batch}, {name}"
                print(f"{title}: {per_pass:.2f} tokens a pass, {ratio:.2f}x generate", flush=True)
                results[title] = {"per_pass": per_pass, "ratio": ratio}
    return results


def make_draft(path: str, target: Path) -> str:
    """Writes the first layers of a model, a sixth of them, as a model of its own."""
    if not target.exists():
        code = (
            "import sys, gpt2_jax; path, target = sys.argv[1:];"
            "config, params = gpt2_jax.load(path, dtype='float32');"
            "n = max(1, config.n_layer // 6);"
            "params['h'] = {str(layer): params['h'][str(layer)] for layer in range(n)};"
            "gpt2_jax.save(target, params, config.replace(n_layer=n))"
        )
        subprocess.run([sys.executable, "-c", code, path, str(target)], check=True)
    return str(target)


def bench_growth(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """How cost grows: decoding and reading by the size of the model, compiling by its layers."""
    results = {}
    for model in args.models or ["gpt2", "gpt2-medium", "gpt2-large"]:
        path = make_checkpoint(model, folder)
        names = peers(args, "transformers")
        spec = {"folder": path, "batch": 1, "length": 32, "new": 32, "after": False, "sample": {}}
        result = race("decode", spec, names, args.rounds, 0)
        title = f"decode {model}, batch 1, 32 tokens after 32, greedy, float32"
        n_matrix = matrix_parameters(model)
        show(title, "tokens/s", result, flops=2 * n_matrix, bytes=4 * n_matrix)
        results[title] = result
        result = race("prefill", spec | {"length": 512}, names, args.rounds, 1e-4)
        title = f"prefill {model}, 512 tokens, float32"
        head = MODELS[model].get("vocab_size", 50257) * MODELS[model].get("n_embd", 768)
        show(title, "tokens/s", result, flops=2 * (n_matrix - head))
        results[title] = result
    return results


def bench_compile(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a program takes to trace and to compile, by the number of layers, 256 wide."""
    del args, folder
    results = {}
    print(f"\n{'program':>16} {'layers':>7} {'traced s':>9} {'compiled s':>11}")
    for program in ("decoding", "step", "step, stacked"):
        for layers in LAYERS:
            spec = {"program": program, "layers": layers, "width": 256}
            contender = Contender("compile", "ours", spec)
            traced, compiled = contender.ready["numbers"]  # once: the largest take minutes
            contender.close()
            print(f"{program:>16} {layers:7} {traced:9.2f} {compiled:11.2f}", flush=True)
            results[f"{program}, {layers} layers"] = {"traced": traced, "compiled": compiled}
    return results


def bench_loss(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A training step whose loss goes by chunks, beside one that holds all logits."""
    results = {}
    for model in args.models or ["gpt2"]:
        batch, length, steps = TRAIN[model]
        spec = {"folder": make_checkpoint(model, folder), "batch": batch, "length": length}
        spec |= {"steps": steps, "learning_rate": 3e-4}
        result = race("loss", spec, ["ours", "in one piece"], args.rounds, 1e-4)
        title = f"loss {model}, batch {batch} x {length}, a training step, float32"
        show(title, "tokens/s", result)
        results[title] = result
    return results


def bench_places(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The host memory of loading, saving and initialising on a mesh of eight CPU devices."""
    results = {}
    print(f"\n{'':44} {'peak MB':>9} {'params MB':>10}")
    for model in args.models or ["gpt2-medium"]:
        for what, mesh in PLACES:
            spec = {"folder": make_checkpoint(model, folder), "mesh": mesh, "what": what}
            contender = Contender("places", "ours", spec | {"config": MODELS[model]})
            peak, params = contender.ready["numbers"]
            contender.close()
            title = f"{what} {model}, {mesh}"
            print(f"{title:44} {peak:9,.0f} {params:10,.0f}", flush=True)
            results[title] = {"peak": peak, "params": params}
    return results


def bench_plan(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a training step would take on many chips: a prediction, made by `plan.py`."""
    del folder
    results = {}
    for model in args.models or ["gpt2-xl"]:
        for mesh in args.mesh:
            # A process each, as the number of simulated devices is one of a process.
            command = [sys.executable, str(Path(__file__).with_name("plan.py"))]
            command += ["--model", model, "--mesh", mesh, "--rows", str(args.rows)]
            command += ["--remat", args.remat, "--chip", *args.chip]
            made = subprocess.run(command, check=True, capture_output=True, text=True)
            *shown, numbers = made.stdout.splitlines()
            print("\n".join(shown), flush=True)
            results[f"{model} on {mesh}"] = json.loads(numbers)
    return results


def peers(args: argparse.Namespace, name: str) -> list[str]:
    """Returns the contenders: ours, the peer, and the peer compiled if that is asked for."""
    return ["ours", name] + ([f"{name}, compiled"] if args.compile else [])


BENCHES = {
    "decode": bench_decode,
    "batch": bench_batch,
    "sample": bench_sample,
    "prefill": bench_prefill,
    "train": bench_train,
    "eval": bench_eval,
    "patch": bench_patch,
    "tokenizer": bench_tokenizer,
    "cold": bench_cold,
    "programs": bench_programs,
    "memory": bench_memory,
    "speculate": bench_speculate,
    "growth": bench_growth,
    "compile": bench_compile,
    "loss": bench_loss,
    "places": bench_places,
    "plan": bench_plan,
}


def main() -> None:
    """Runs the benchmarks that are asked for."""
    parser = argparse.ArgumentParser(
        description="Measure gpt2_jax beside its peers, interleaved, on the same weights."
    )
    parser.add_argument("work", choices=[*BENCHES, "all"])
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        help="of which size (default: what the README quotes)",
    )
    parser.add_argument(
        "--batches",
        nargs="+",
        type=int,
        metavar="N",
        help="train, batch, programs, speculate: of which batch sizes",
    )
    parser.add_argument(
        "--dtype",
        choices=WEIGHT_BYTES,
        default="float32",
        help="train, eval: what is computed in; decode, batch, sample, prefill: of ours and of the "
        "peers that have it (llama.cpp's int8 is its q8_0)",
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        type=int,
        metavar="N",
        help="decode: 63 tokens after N, the prompt apart",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="times that each contender works (default: 7)"
    )
    parser.add_argument(
        "--draft", metavar="FOLDER", help="speculate: the draft of the model in the package"
    )
    parser.add_argument(
        "--guesses", type=int, default=5, help="speculate: guesses to a pass (default: 5)"
    )
    parser.add_argument("--compile", action="store_true", help="let torch.compile take part too")
    parser.add_argument(
        "--text", metavar="FILE", help="tokenizer: the text (default: a page, a hundred times)"
    )
    parser.add_argument(
        "--mesh", nargs="+", default=["fsdp=8"], metavar="AXES", help="plan: as data=16,fsdp=16"
    )
    parser.add_argument(
        "--chip", nargs="+", default=["v5e", "h100"], metavar="NAME", help="plan: v5e, h100"
    )
    parser.add_argument("--rows", type=int, default=4, help="plan: windows of a device")
    parser.add_argument("--remat", default="full", help="plan: none, dots or full")
    parser.add_argument(
        "--folder", metavar="FOLDER", help="keep the models there, for the next run to find"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there, as JSON")
    args = parser.parse_args()
    if args.dtype == "int8" and args.work in ("train", "eval", "all"):
        parser.error(f"{args.work} computes in float32 or bfloat16, got --dtype int8")
    facts = {"date": date.today().isoformat(), "cores": os.cpu_count(), "processor": processor()}
    facts |= {name: version(name) for name in ("jax", "flax", "optax", "torch", "transformers")}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    place = contextlib.nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory()
    with place as folder:
        # A plan is no race: who asks for all wants figures of this machine.
        races = [work for work in BENCHES if work != "plan"]
        works = races if args.work == "all" else [args.work]
        results = {work: BENCHES[work](args, Path(folder)) for work in works}
    if args.json:
        Path(args.json).write_text(json.dumps(facts | results, indent=1))


if __name__ == "__main__":
    main()
