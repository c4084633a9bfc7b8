"""A training run in a folder: batches, steps, validation, samples of text, checkpoints, metrics; stopped and resumed.

Knows recipes, token files and folders; the arithmetic is `train.py`'s. A run's folder holds

* `run.json`: the recipe, the model's config and the data's fingerprint;
* `metrics.jsonl`: a line for each logged step, and for each evaluation;
* `checkpoints/`: the latest and the best, each with all that the next step depends on;
* `curves.png`: the losses, where matplotlib is installed;
* the tokenizer's files, where the data came with one.
"""

import contextlib
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError, replacing, write_json
from gpt2_jax.generation.generate import generate
from gpt2_jax.generation.sampling import Categorical, Chain, Temperature, TopK
from gpt2_jax.model import init
from gpt2_jax.pretrained.hub import resolve
from gpt2_jax.pretrained.weights import load, save
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.data import Batches, DataError, fingerprint, open_tokens, read_meta, windows
from gpt2_jax.training.recipes import Recipe
from gpt2_jax.training.step import (
    Params,
    TrainState,
    init_state,
    make_optimizer,
    next_token_loss,
    train_step,
    warmup_cosine,
)


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names the step and the batch. Its checkpoints are as they were."""


class Corpus(NamedTuple):
    """What `scripts/prepare_data.py`, or nanoGPT's, left in a folder."""

    train: np.ndarray  # uint16 or uint32 [number of tokens]
    val: np.ndarray | None
    tokenizer: Tokenizer | None
    bytes_per_token: float | None  # of the validation text, where it is known
    vocab_size: int
    identity: dict[str, Any]  # tells this data from other data


class Summary(NamedTuple):
    """How a call of `fit` ended."""

    step: int
    finished: bool  # False after Ctrl-C
    val_loss: float | None  # the last that was measured, in nats per token


def fit(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    from_pretrained: str | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> Summary:
    """Trains until `recipe.steps`, or until Ctrl-C or SIGTERM, which save and return.

    Args:
      recipe: what to do.
      data: a folder with `train.bin`, and perhaps `val.bin` and a tokenizer.
      out: the run's folder.
      from_pretrained: start from these weights, which bring their own shape, instead of fresh ones.
      resume: go on from the last checkpoint in `out`, if there is one, bit for bit as if there had been no stop.
      say: takes messages.
      progress: shows a bar on standard error.

    Raises:
      CheckpointError: `out` holds a run and `resume` is false, or it holds another run than this.
      DataError: the data cannot be used.
      TrainingError: the loss is not finite, or a batch holds an id outside the vocabulary.
    """
    out = Path(out)
    corpus = open_corpus(data)
    config, params = _start(recipe, corpus, from_pretrained)
    length = recipe.length or config.n_positions
    if length > config.n_positions:
        raise ValueError(
            f"`length` must be at most {config.n_positions} (`n_positions`), got {length}."
        )
    batches = Batches(corpus.train, batch_size=recipe.batch_size, length=length, seed=recipe.seed)
    tx = optimizer(recipe)
    identity = {
        "recipe": dataclasses.asdict(recipe),
        "config": config.to_dict(),
        "data": corpus.identity,
        "from_pretrained": from_pretrained,
    }
    with Checkpoints(out / "checkpoints", keep=recipe.keep) as checkpoints, _signals() as stopped:
        if checkpoints.latest() is None:
            state, cursor, key = (
                init_state(params, tx),
                0,
                jax.random.fold_in(jax.random.key(recipe.seed), 1),
            )
        elif resume:
            state, cursor, key = _resume(
                checkpoints, identity, jax.eval_shape(partial(init_state, tx=tx), params)
            )
        else:
            raise CheckpointError(f"{out} holds a run already: resume it, or give another folder.")
        first = int(state.step)
        _write_run(out, identity, corpus.tokenizer, first)
        say(
            f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters; {len(corpus.train):,} tokens, "
            f"{batches.per_epoch:,} windows of {length} in an epoch; steps {first:,} to {recipe.steps:,}"
        )
        del params
        with _Log(out, recipe, first, length, progress) as log:
            for step in range(first + 1, recipe.steps + 1):
                try:
                    ids = batches(cursor)
                    state, metrics = train_step(
                        state,
                        ids,
                        key,
                        config=config,
                        tx=tx,
                        micro_batches=recipe.micro_batches,
                        remat=recipe.remat,
                    )
                except ValueError as error:
                    raise TrainingError(f"Step {step}, batch {cursor}: {error}") from error
                log.step(step, cursor, metrics)
                cursor += 1
                stop, val_loss = stopped() or step == recipe.steps, None
                if corpus.val is not None and (
                    step % recipe.eval_every == 0 or step == recipe.steps
                ):
                    log.settle()
                    val_loss = validation_loss(
                        state.params, corpus.val, config=config, recipe=recipe
                    )
                    sample = _sample(state.params, key, corpus, config, recipe)
                    log.evaluation(step, val_loss, corpus.bytes_per_token, sample)
                if stop or val_loss is not None or step % recipe.save_every == 0:
                    log.settle()
                    meta = {
                        "identity": identity,
                        "cursor": cursor,
                        "key": jax.random.key_data(key).tolist(),
                    }
                    checkpoints.save(state, meta, loss=val_loss)
                if stop:
                    break
    plot(out)
    return Summary(int(state.step), int(state.step) >= recipe.steps, log.val_loss)


def export(
    out: str | Path, target: str | Path, *, dtype: Any = None, overwrite: bool = False
) -> int:
    """Writes the best checkpoint of a run as a folder in HF's layout, and returns its step.

    Args:
      out: the run's folder.
      target: the folder to write, which `load` and transformers read.
      dtype: of the weights; float32 by default.
      overwrite: replaces a checkpoint that is there.

    Raises:
      CheckpointError: `out` holds no checkpoint, or `target` is in use.
    """
    out = Path(out)
    if not (out / "run.json").is_file():
        raise CheckpointError(f"{out} holds no run: expected `run.json`.")
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    config, recipe = GPT2Config.from_dict(run["config"]), Recipe(**run["recipe"])
    with Checkpoints(out / "checkpoints", keep=recipe.keep) as checkpoints:
        step = checkpoints.best()
        if step is None:
            raise CheckpointError(f"{out} holds no checkpoint yet.")
        like = jax.eval_shape(
            lambda key: init_state(init(key, config), optimizer(recipe)), jax.random.key(0)
        )
        params = checkpoints.restore(like, step).params
    params = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), params)
    save(target, params, config, overwrite=overwrite)
    if (out / "vocab.json").is_file():
        Tokenizer.load(out).save(target)
    return step


def open_corpus(folder: str | Path) -> Corpus:
    """Opens the token files in a folder: `train.bin`, and where they are there `val.bin`, `meta.json`, a tokenizer.

    Raises:
      DataError: there is no `train.bin`, or a file is damaged, too short, or holds ids outside the vocabulary.
    """
    folder = Path(folder).expanduser()
    meta = read_meta(folder)
    vocab_size = meta.get("vocab_size", 50257)  # nanoGPT's files for GPT-2 say nothing of it
    files = {
        name: folder / f"{name}.bin"
        for name in ("train", "val")
        if (folder / f"{name}.bin").is_file()
    }
    if "train" not in files:
        raise DataError(
            f"{folder}: expected `train.bin`, which `prepare_data.py` writes; it is not there."
        )
    tokens = {name: open_tokens(file, vocab_size=vocab_size) for name, file in files.items()}
    if "val" in tokens and len(tokens["val"]) < 2:
        raise DataError(
            f"{files['val']}: expected at least 2 ids, to predict one, got {len(tokens['val'])}."
        )
    try:
        tokenizer = Tokenizer.load(folder)
    except FileNotFoundError:
        tokenizer = Tokenizer.gpt2() if vocab_size == 50257 else None
    text = meta.get("val", {})
    return Corpus(
        train=tokens["train"],
        val=tokens.get("val"),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        bytes_per_token=text["bytes"] / text["tokens"] if text.get("tokens") else None,
        identity={name: fingerprint(file) for name, file in files.items()},
    )


def schedule(recipe: Recipe) -> optax.Schedule:
    """Returns a recipe's learning rate as a function of the updates made before."""
    steps = {"steps": recipe.steps, "warmup_steps": recipe.warmup_steps}
    return warmup_cosine(recipe.learning_rate, end=recipe.min_learning_rate, **steps)


@cache
def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Returns a recipe's optimizer, each time the same object: a step is compiled for each optimizer that it meets."""
    options = {
        name: getattr(recipe, name) for name in ("b1", "b2", "weight_decay", "max_grad_norm")
    }
    return make_optimizer(schedule(recipe), **options)


def validation_loss(
    params: Params, tokens: np.ndarray, *, config: GPT2Config, recipe: Recipe
) -> float:
    """Returns the mean loss over a whole token file in nats per token, each token scored once, without dropout."""
    rows, length = recipe.batch_size // recipe.micro_batches, recipe.length or config.n_positions
    total = count = 0.0
    for ids, weights in windows(tokens, batch_size=rows, length=length):
        loss, weight = _window_loss(params, ids, weights, config=config)
        total, count = total + float(loss) * float(weight), count + float(weight)
    return total / count


def plot(out: str | Path) -> Path | None:
    """Draws `curves.png` from `metrics.jsonl`, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = _read_metrics(Path(out) / "metrics.jsonl")
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
    for name, label in (("loss", "training batch"), ("val_loss", "validation set")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=label,
                marker="o" if name == "val_loss" else None,
                markersize=3,
            )
    axes.legend()
    axes.grid(alpha=0.3)
    with replacing(Path(out) / "curves.png", overwrite=True) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return Path(out) / "curves.png"


@partial(jax.jit, static_argnames="config")
def _window_loss(params, ids, weights, *, config):
    loss, metrics = next_token_loss(params, ids, config=config, weights=weights)
    return loss, metrics["weight"]


def _start(
    recipe: Recipe, corpus: Corpus, from_pretrained: str | None
) -> tuple[GPT2Config, Params]:
    """Returns the config and the params that a run begins with."""
    if from_pretrained is None:
        eot_id = corpus.tokenizer.eot_id if corpus.tokenizer else None
        config = recipe.config(vocab_size=corpus.vocab_size, eot_id=eot_id)
        return config, init(jax.random.key(recipe.seed), config.replace(dtype="float32"))
    folder = resolve(from_pretrained)
    config, params = load(folder, dtype="float32")
    with contextlib.suppress(FileNotFoundError):
        known = Tokenizer.load(folder)
        if corpus.tokenizer and corpus.tokenizer.vocab != known.vocab:
            raise DataError(
                f"The data was made with another vocabulary than {from_pretrained}'s: prepare it with "
                f"`--tokenizer {from_pretrained}`."
            )
    if corpus.vocab_size > config.vocab_size:
        raise DataError(
            f"The data has {corpus.vocab_size} tokens in its vocabulary, the model {config.vocab_size}."
        )
    return recipe.adapt(config), params


def _resume(
    checkpoints: Checkpoints, identity: dict, like: TrainState
) -> tuple[TrainState, int, Any]:
    """Returns state, cursor and key of the latest checkpoint; raises `CheckpointError` if it is of another run."""
    step = checkpoints.latest()
    meta = checkpoints.meta(step)
    free = {field.name for field in dataclasses.fields(Recipe) if not field.metadata["curve"]}
    ours, theirs = dict(_flat(identity)), dict(_flat(meta["identity"]))
    changed = [
        f"{name}: {theirs.get(name)!r} then, {ours.get(name)!r} now"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and name.removeprefix("recipe.") not in free
    ]
    if changed:
        raise CheckpointError(f"{checkpoints.folder} is of another run:\n  " + "\n  ".join(changed))
    return (
        checkpoints.restore(like, step),
        meta["cursor"],
        jax.random.wrap_key_data(np.uint32(meta["key"])),
    )


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested dicts, their names joined by ".", as JSON would give them back."""
    for name, value in json.loads(json.dumps(tree)).items():
        yield from (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else [(prefix + name, value)]
        )


def _write_run(out: Path, identity: dict, tokenizer: Tokenizer | None, first: int) -> None:
    """Writes what describes the run, and takes back the metrics of steps that will be made again."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "run.json", overwrite=True) as temporary:
        write_json(temporary, identity)
    lines = [line for line in _read_metrics(out / "metrics.jsonl") if line["step"] <= first]
    with replacing(out / "metrics.jsonl", overwrite=True) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if tokenizer:
        tokenizer.save(out)


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics; one that was cut off is left out."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def _sample(params: Params, key, corpus: Corpus, config: GPT2Config, recipe: Recipe) -> str | None:
    """Returns a text that the model makes up after the end of a text or, where there is none, a token of the data."""
    tokenizer = corpus.tokenizer
    room = min(recipe.sample_tokens, config.n_positions - 1)
    if tokenizer is None or room == 0:
        return None
    prompt = np.array([[corpus.val[0] if tokenizer.eot_id is None else tokenizer.eot_id]])
    sampler = Categorical(Chain((Temperature(0.8), TopK(min(200, config.vocab_size)))))
    out = generate(params, prompt, None, key, config=config, max_new_tokens=room, sampler=sampler)
    return tokenizer.decode(out.ids[0, : out.lengths[0]])


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C or SIGTERM came. A second Ctrl-C interrupts at once."""
    came = []

    def remember(number, frame):
        del frame
        came.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only there can signals be handled
        yield lambda: False
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Log:
    """Metrics of a run: lines in a file, a bar on the terminal. Reads a step's numbers while the next one runs."""

    def __init__(self, out: Path, recipe: Recipe, first: int, length: int, progress: bool):
        self.val_loss = None
        self._file = (out / "metrics.jsonl").open("a", encoding="utf-8")
        self._bar = tqdm(
            total=recipe.steps, initial=first, unit="step", disable=not progress, dynamic_ncols=True
        )
        self._recipe, self._schedule, self._tokens = (
            recipe,
            schedule(recipe),
            recipe.batch_size * length,
        )
        self._pending = None
        self._restart()

    def step(self, step: int, cursor: int, metrics: dict) -> None:
        """Takes the metrics of a step, and settles those of the step before."""
        self.settle()
        self._pending = step, cursor, metrics

    def settle(self) -> None:
        """Waits for the last step; raises `TrainingError` if its loss or gradient is not finite."""
        if self._pending is None:
            return
        (step, cursor, metrics), self._pending = self._pending, None
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not math.isfinite(loss + norm):
            raise TrainingError(
                f"Step {step}, batch {cursor}: the loss is {loss} and the gradient's norm {norm}, expected finite "
                "numbers. The checkpoints are as they were: a smaller learning rate may help, or a look at the batch."
            )
        self._bar.update()
        self._steps += 1
        if step % self._recipe.log_every == 0:
            speed = self._steps * self._tokens / (time.perf_counter() - self._since)
            rate = float(self._schedule(step - 1))
            line = {
                "step": step,
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": rate,
                "tokens_per_second": speed,
            }
            self._write(line)
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            self._restart()

    def evaluation(
        self, step: int, val_loss: float, bytes_per_token: float | None, sample: str | None
    ) -> None:
        """Takes what was measured on the validation set after a step."""
        self.val_loss = val_loss
        line, text = (
            {"step": step, "val_loss": val_loss},
            f"step {step}: validation loss {val_loss:.4f} nats per token",
        )
        if bytes_per_token:
            line["bits_per_byte"] = val_loss / bytes_per_token / math.log(2)
            text += f", {line['bits_per_byte']:.4f} bits per byte"
        if sample is not None:
            line["sample"] = sample
        self._write(line)
        self._bar.write(text if sample is None else f"{text}\n{sample}\n", file=sys.stderr)
        self._restart()

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _restart(self) -> None:
        self._steps, self._since = 0, time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
        self._file.close()
