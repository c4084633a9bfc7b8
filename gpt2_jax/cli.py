"""The command `gpt2-jax`: continues prompts. Text goes to standard output, everything else to standard error."""

import argparse
import json
import os
import secrets
import sys
import time
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16", "float64")


class UserError(Exception):
    """A mistake that a message explains better than a traceback."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = argparse.ArgumentParser(
        prog="gpt2-jax",
        description="Continue a prompt with GPT-2.",
        epilog="Example, with the small story model that ships with the package (no network needed):\n"
        '  gpt2-jax "Once upon a time" --from_pretrained demo --do_sample --temperature 0.8 --seed 1',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("prompt", nargs="*", help="one or more prompts; without any, standard input is the prompt")
    model = out.add_argument_group("model")
    model.add_argument(
        "--from_pretrained",
        default="gpt2",
        metavar="MODEL",
        help="a Hugging Face hub id (gpt2, gpt2-medium, distilgpt2, user/name, ...), a local folder, or demo, the"
        " model in the package (default: gpt2)",
    )
    model.add_argument(
        "--model_name",
        metavar="NAME",
        help="whose tokenizer to use: a folder, hub id or GPT-2 size (default: the checkpoint's own, or GPT-2's)",
    )
    model.add_argument("--revision", help="branch, tag or commit of the hub repository")
    model.add_argument("--dtype", choices=DTYPES, default="float32", help="parameters and compute (default: float32)")
    model.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="where to run (default: the best there is)")
    text = out.add_argument_group("text")
    text.add_argument("--max_tokens", type=int, default=100, metavar="N", help="new tokens to make (default: 100)")
    text.add_argument(
        "--do_sample", action="store_true", help="draw tokens at random; otherwise the likeliest is taken"
    )
    text.add_argument("--temperature", type=float, help="below 1 is safer, above 1 is wilder; needs --do_sample")
    text.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens; needs --do_sample")
    text.add_argument(
        "--top_p", type=float, metavar="P", help="draw from the likeliest that hold P of the probability"
    )
    text.add_argument(
        "--min_p", type=float, metavar="P", help="draw from those at least P times as likely as the first"
    )
    text.add_argument("--seed", type=int, help="makes --do_sample repeatable (default: a new one each time, reported)")
    text.add_argument(
        "--num_samples", type=int, default=1, metavar="N", help="continuations of each prompt (default: 1)"
    )
    text.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    text.add_argument(
        "--allow_special", action="store_true", help="read <|endoftext|> in a prompt as the special token"
    )
    text.add_argument("--lines", action="store_true", help="take each line of standard input as a prompt of its own")
    out.add_argument("--json", action="store_true", help="print one JSON object per continuation")
    out.add_argument("--quiet", action="store_true", help="nothing on standard error but mistakes")
    return out


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; exits with 2 after a user's mistake and with 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        print("\ngpt2-jax: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, loads the model and prints the continuations."""
    check_options(args)
    prompts = read_prompts(args)
    sampling_seed = secrets.randbits(32) if args.seed is None else args.seed
    started = time.perf_counter()
    say = (lambda *_: None) if args.quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    set_up_jax(args, say)

    import jax
    import numpy as np

    import gpt2_jax
    from gpt2_jax import files, weights

    try:
        folder = files.resolve(args.from_pretrained, revision=args.revision)
        config, params = weights.load(folder, dtype=args.dtype)
        tokenizer = load_tokenizer(args, folder)
        encoded = [tokenizer.encode(prompt, "all" if args.allow_special else ()) for prompt in prompts]
    except (ValueError, OSError, ImportError) as error:
        raise UserError(error) from error
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise UserError(
                f"The prompt {prompt!r} is empty. To start from nothing, pass '<|endoftext|>' and --allow_special."
            )
    encoded = [ids for ids in encoded for _ in range(args.num_samples)]
    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    say(
        f"{args.from_pretrained}: {count:,} parameters, {config.n_layer} layers, {args.dtype},"
        f" on {jax.devices()[0].device_kind}; ready after {time.perf_counter() - started:.1f} s"
        + (f"; seed {sampling_seed}" if args.do_sample else "")
    )

    lengths = np.array([len(ids) for ids in encoded])
    batch = np.zeros((len(encoded), lengths.max()), np.int64)
    for row, ids in zip(batch, encoded, strict=True):
        row[: len(ids)] = ids
    begun = time.perf_counter()
    try:
        key = jax.random.key(sampling_seed)
        pieces = gpt2_jax.stream(
            params, batch, lengths, key, config=config, max_new_tokens=args.max_tokens, sampler=make_sampler(args)
        )
    except ValueError as error:
        raise UserError(error) from error
    rows = [Row(prompt, tokenizer, args.stop, config.eos_token_ids) for prompt in prompts]
    live = len(rows) == 1 and not args.json
    if live:
        print(prompts[0], end="", flush=True)
    first = None
    try:
        for piece in pieces:
            for row, ids, length, logprobs in zip(rows, *map(np.asarray, piece), strict=True):
                new = row.push(ids[:length].tolist(), logprobs[:length].tolist())
                if live:
                    print(new, end="", flush=True)
            first = first or time.perf_counter()
            if all(row.finished for row in rows):
                break
        for row in rows:
            new = row.finish()
            if live:
                print(new, flush=True)
    except KeyboardInterrupt:
        if not live:
            print_rows(rows, args)
        raise
    if not live:
        print_rows(rows, args)
    made, now = sum(len(row.ids) for row in rows), time.perf_counter()
    rate = f", then {(made - len(rows)) / (now - first):.1f} tokens/s" if made > len(rows) else ""
    say(f"{made} tokens; the first after {first - begun:.2f} s{rate}")


class Row:
    """One continuation as it grows: its ids, its text up to a stop, and what of it can be shown already."""

    def __init__(self, prompt, tokenizer, stops, stop_ids):
        self.prompt, self.stops, self.stop_ids = prompt, stops, stop_ids
        self.decoder = tokenizer.stream_decoder()
        self.ids, self.logprobs, self.text, self.shown = [], [], "", 0
        self.finished = None  # "stop" once a stop id or a stop text has come

    def push(self, ids, logprobs) -> str:
        """Takes new ids and returns the text that can be shown."""
        for token, logprob in zip(ids, logprobs, strict=True):
            if self.finished:
                break
            self.ids.append(token)
            self.logprobs.append(logprob)
            if token in self.stop_ids:
                self.finished = "stop"
            else:
                self._extend(self.decoder.push([token]))
        return self._show(0 if self.finished else self._held())

    def finish(self) -> str:
        """Returns the rest of the text."""
        if not self.finished:
            self._extend(self.decoder.flush())
        return self._show(0)

    def _extend(self, text):
        self.text += text
        cuts = [at for at in (self.text.find(stop) for stop in self.stops) if at >= 0]
        if cuts:
            self.text, self.finished = self.text[: min(cuts)], "stop"

    def _held(self):
        """How many characters at the end could turn out to begin a stop text."""
        sizes = (size for stop in self.stops for size in range(1, len(stop)) if self.text.endswith(stop[:size]))
        return max(sizes, default=0)

    def _show(self, held):
        end = max(self.shown, len(self.text) - held)
        new, self.shown = self.text[self.shown : end], end
        return new


def print_rows(rows: list[Row], args: argparse.Namespace) -> None:
    """Prints finished continuations, as JSON lines or as text parted by rules."""
    for number, row in enumerate(rows):
        if args.json:
            record = {"prompt": row.prompt, "text": row.text, "ids": row.ids, "logprobs": row.logprobs}
            print(json.dumps(record | {"finish_reason": row.finished or "length"}, ensure_ascii=False), flush=True)
        else:
            print(f"=== {number + 1} of {len(rows)} ===\n{row.prompt}{row.text}", flush=True)


def check_options(args: argparse.Namespace) -> None:
    """Raises `UserError` for options that would do nothing or cannot be met."""
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if getattr(args, name) is not None and not args.do_sample:
            raise UserError(f"--{name} acts on random draws: add --do_sample.")
    if args.num_samples < 1:
        raise UserError(f"--num_samples must be at least 1, got {args.num_samples}.")
    if args.num_samples > 1 and not args.do_sample:
        raise UserError("--num_samples would repeat the one likeliest text: add --do_sample.")
    if args.max_tokens < 1:
        raise UserError(f"--max_tokens must be at least 1, got {args.max_tokens}.")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise UserError(f"--seed must be in [0, {2**32}), got {args.seed}.")
    if "" in args.stop:
        raise UserError("--stop must not be empty.")
    if args.prompt and args.lines:
        raise UserError("--lines reads standard input: give no prompt with it.")
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        raise UserError(f"--temperature must be greater than 0, got {args.temperature}; without --do_sample it is 0.")
    if args.top_k is not None and args.top_k < 1:
        raise UserError(f"--top_k must be at least 1, got {args.top_k}.")
    for name in ("top_p", "min_p"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"--{name} must be in [0, 1], got {value}.")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Returns the prompts from the arguments or from standard input."""
    if args.prompt and args.prompt != ["-"]:
        return args.prompt
    if sys.stdin is None or (sys.stdin.isatty() and not args.prompt):
        raise UserError('No prompt: give one, as in  gpt2-jax "Once upon a time", or pipe text in.')
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"Standard input must be UTF-8, but {error.reason} at byte {error.start}.") from error
    if args.lines:
        prompts = [line for line in text.splitlines() if line]
        if not prompts:
            raise UserError("Standard input holds no line with a prompt.")
        return prompts
    return [text.removesuffix("\n")]


def set_up_jax(args: argparse.Namespace, say) -> None:
    """Chooses the device and keeps compiled programs in a cache folder, where one can be written."""
    import jax

    if args.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if not jax.config.jax_compilation_cache_dir:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "gpt2_jax" / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if writable:
            jax.config.update("jax_compilation_cache_dir", str(folder))
        else:
            say(f"{folder} cannot be written: programs are compiled anew at every start.")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if args.device:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(args.device, args.device))
        try:
            jax.devices()
        except RuntimeError as error:
            raise UserError(f"--device {args.device}: JAX finds no such device here ({error}).") from error


def load_tokenizer(args: argparse.Namespace, folder: Path):
    """Returns the tokenizer that was asked for: by name, or the checkpoint's own, or GPT-2's."""
    from gpt2_jax import files
    from gpt2_jax.config import PRESETS
    from gpt2_jax.tokenizer import Tokenizer

    if args.model_name is None:
        try:
            return Tokenizer.load(folder)
        except FileNotFoundError:
            return Tokenizer.gpt2()
    if args.model_name in PRESETS and not Path(args.model_name).is_dir():
        return Tokenizer.gpt2()  # all of OpenAI's sizes share it
    return Tokenizer.load(files.resolve(args.model_name))


def make_sampler(args: argparse.Namespace):
    """Returns the sampler that the options describe, transforms in HF's order."""
    from gpt2_jax import sampling

    if not args.do_sample:
        return sampling.Greedy()
    kinds = {
        "temperature": sampling.Temperature,
        "top_k": sampling.TopK,
        "top_p": sampling.TopP,
        "min_p": sampling.MinP,
    }
    chosen = [kind(getattr(args, name)) for name, kind in kinds.items() if getattr(args, name) is not None]
    return sampling.Categorical(sampling.Chain(tuple(chosen)))


def _fail(message: str) -> int:
    print(f"gpt2-jax: {message}", file=sys.stderr)
    return 2
