"""What races in `benchmark.py`: gets ready, works once to be compared, then waits for its turns.

A process of its own per contender: `python scripts/contenders.py WORK NAME SPEC`, which answers
each line of standard input with a line of JSON.
"""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

Spec = dict[str, Any]  # what is to be done: the same for all contenders


class Done(NamedTuple):
    """What a turn did."""

    amount: float  # tokens, or what else the work is counted in
    numbers: list[float]  # what was computed, for comparison
    seconds: float | None = None  # where not the whole turn counts
    peak: float | None = None  # the most memory, in MiB, where not that of this process


Once = Callable[[], Done]


# Training: AdamW steps, clipping included.


def ours_train(spec: Spec) -> Once:
    """The step of `gpt2_jax.train`."""
    import jax

    import gpt2_jax

    config, params = gpt2_jax.load(spec["folder"])
    # Of computation: the weights are float32, as PyTorch's are under `autocast`.
    config = config.replace(dtype=spec["dtype"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    tx = gpt2_jax.make_optimizer(spec["learning_rate"])
    states = [gpt2_jax.init_state(params, tx)]
    batches = batches_of(spec, config.vocab_size)

    def once():
        state, losses = states.pop(), []
        for _ in range(spec["steps"]):
            state, metrics = gpt2_jax.train_step(state, next(batches), config=config, tx=tx)
            losses.append(metrics["loss"])
        states.append(jax.block_until_ready(state))
        return Done(
            spec["steps"] * spec["batch"] * spec["length"], [float(loss) for loss in losses]
        )

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
    dtype = getattr(torch, spec["dtype"])
    is_narrow = dtype != torch.float32

    def once():
        losses = []
        for _ in range(spec["steps"]):
            ids = torch.tensor(next(batches))
            with torch.autocast("cpu", dtype if is_narrow else None, enabled=is_narrow):
                logits = forward(ids[:, :-1].contiguous())
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return Done(spec["steps"] * spec["batch"] * spec["length"], losses)

    return once


# Evaluation: the log-probability of windows of a text.


def ours_eval(spec: Spec) -> Once:
    """`gpt2_jax.perplexity`."""
    import gpt2_jax

    config, params = gpt2_jax.load(spec["folder"], dtype=spec["dtype"])
    ids = tokens_of(spec, config.vocab_size).ravel()
    options = {"window": spec["length"], "stride": spec["length"], "batch_size": 1}

    def once():
        found = gpt2_jax.perplexity(params, ids, config=config, **options)
        return Done(len(ids), [found.nll])

    return once


def hf_eval(spec: Spec) -> Once:
    """The loop of HF's guide to perplexity."""
    import torch

    model = hf_gpt2(spec).to(getattr(torch, spec["dtype"]))
    ids = torch.tensor(tokens_of(spec, model.config.vocab_size))

    @torch.inference_mode()
    def once():
        total = 0.0
        for window in ids:
            # Wide, as ours: HF's own are rounded to the dtype.
            logits = model(window[None]).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        return Done(ids.numel(), [total])

    return once


# Decoding: tokens after prompts, the likeliest or, with `sample`, drawn. `after` takes away the
# time of the prompts and the first token.


def ours_decode(spec: Spec) -> Once:
    """`gpt2_jax.generate`."""
    import jax
    import numpy as np

    import gpt2_jax

    config, params = gpt2_jax.load(spec["folder"], dtype=spec["dtype"])
    ids, key = tokens_of(spec, config.vocab_size), jax.random.key(0)
    sampler = (
        gpt2_jax.sampler_from_options(spec["sample"], do_sample=True) if spec["sample"] else None
    )

    def run(count):
        options = {"config": config, "max_new_tokens": count, "sampler": sampler, "stop_ids": ()}
        out = gpt2_jax.generate(params, ids, None, key, **options)
        return np.asarray(out.ids).ravel().tolist()

    return decoding(spec, run)


def hf_decode(spec: Spec) -> Once:
    """HF's `generate`."""
    import torch

    model = hf_gpt2(spec)
    ids = torch.tensor(tokens_of(spec, model.config.vocab_size))
    model.generation_config.eos_token_id = None

    options = {
        "attention_mask": torch.ones_like(ids),
        "pad_token_id": 0,
        "do_sample": bool(spec["sample"]),
    }

    def run(count):
        out = model.generate(ids, max_new_tokens=count, **options, **spec["sample"])
        return out[:, ids.shape[1] :].flatten().tolist()

    return decoding(spec, run)


def ctranslate2_decode(spec: Spec) -> Once:
    """CTranslate2's generator, in float32, bfloat16 or int8."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    folder = Path(spec["folder"]) / "ctranslate2"
    if not folder.exists():
        TransformersConverter(spec["folder"]).convert(str(folder))
    tokens = json.loads((folder / "vocabulary.json").read_text())
    generator = ctranslate2.Generator(
        str(folder), compute_type=spec["dtype"], intra_threads=os.cpu_count()
    )
    rows = [[tokens[id] for id in row] for row in tokens_of(spec, len(tokens)).tolist()]
    names = {
        "temperature": "sampling_temperature",
        "top_k": "sampling_topk",
        "top_p": "sampling_topp",
    }
    options = {names[name]: value for name, value in ({"top_k": 1} | spec["sample"]).items()}
    options |= {"include_prompt_in_result": False, "end_token": []}

    def run(count):
        out = generator.generate_batch(rows, max_length=count, min_length=count, **options)
        return [id for row in out for id in row.sequences_ids[0]]

    return decoding(spec, run)


def llama_decode(spec: Spec) -> Once:
    """llama.cpp by its own functions, all texts in one pass: in float32, bfloat16, or q8_0."""
    import llama_cpp
    import numpy as np

    context = llama_context(spec)
    n_vocab = llama_cpp.llama_vocab_n_tokens(
        llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context))
    )
    prompts = tokens_of(spec, n_vocab)
    batch = llama_cpp.llama_batch_init(prompts.size, 0, 1)
    chain = llama_samplers(spec["sample"]) if spec["sample"] else None

    def read(tokens, start):
        """Reads `[rows, columns]` tokens from a position on; returns where each row's last is."""
        n_columns = tokens.shape[1]
        batch.n_tokens = tokens.size
        for place, id in enumerate(tokens.ravel().tolist()):
            row, column = divmod(place, n_columns)
            batch.token[place] = id
            batch.pos[place] = start + column
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = row
            batch.logits[place] = column == n_columns - 1
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama.cpp read no {tokens.shape} tokens at position {start}.")
        return range(n_columns - 1, tokens.size, n_columns)

    def choose(places):
        """Returns the next token of each row, `[rows, 1]`."""
        if chain is not None:
            drawn = [llama_cpp.llama_sampler_sample(chain, context, place) for place in places]
            return np.array(drawn)[:, None]
        logits = llama_cpp.llama_get_logits(context)  # of those places alone, in their order
        logits = np.ctypeslib.as_array(logits, (len(places), n_vocab))
        return logits.argmax(axis=1)[:, None]

    def run(count):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        made = [choose(read(prompts, 0))]
        for position in range(prompts.shape[1], prompts.shape[1] + count - 1):
            made.append(choose(read(made[-1], position)))
        return np.concatenate(made, axis=1).ravel().tolist()

    return decoding(spec, run)


def llama_context(spec: Spec) -> Any:
    """Returns what llama.cpp computes in: a model, and room for each text."""
    import logging

    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    llama_cpp.llama_backend_init()
    file = gguf_of(spec["folder"], spec["dtype"])
    model = llama_cpp.llama_model_load_from_file(
        str(file).encode(), llama_cpp.llama_model_default_params()
    )
    options = llama_cpp.llama_context_default_params()
    n_slots = spec["length"] + spec["new"] + 1
    options.n_ctx = spec["batch"] * n_slots
    options.n_seq_max = spec["batch"]
    options.n_batch = spec["batch"] * spec["length"]
    options.kv_unified = True  # faster for 8 texts than each in a cache of its own
    options.n_threads = os.cpu_count()
    options.n_threads_batch = os.cpu_count()
    # A cache in float32, as the others'.
    options.type_k = 0
    options.type_v = 0
    context = llama_cpp.llama_init_from_model(model, options)
    if context is None:
        raise RuntimeError(f"llama.cpp has no context for {file}.")
    return context


def llama_samplers(sample: Spec) -> Any:
    """Returns llama.cpp's chain of samplers for options of drawing."""
    import llama_cpp

    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for sampler in (
        llama_cpp.llama_sampler_init_top_k(sample["top_k"]),
        llama_cpp.llama_sampler_init_top_p(sample["top_p"], 1),
        llama_cpp.llama_sampler_init_temp(sample["temperature"]),
        llama_cpp.llama_sampler_init_dist(0),
    ):
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    return chain


def gguf_of(folder: str, dtype: str) -> Path:
    """Returns a checkpoint as a file for llama.cpp, written if need be.

    In processes of their own, whose memory is not the contender's.
    """
    plain = Path(folder) / "model.gguf"
    if not plain.exists():
        command = [sys.executable, "-m", "gpt2_jax", "convert", folder, str(plain)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if dtype == "float32":
        return plain
    small = plain.with_stem(f"model-{dtype}")
    if not small.exists():
        # llama.cpp's own conversion, by the numbers of its `llama_ftype`.
        kind = {"int8": 7, "bfloat16": 32}[dtype]
        code = (
            "import sys, ctypes, llama_cpp; source, target, kind = sys.argv[1:];"
            "options = llama_cpp.llama_model_quantize_default_params(); options.ftype = int(kind);"
            "failed = llama_cpp.llama_model_quantize("
            "source.encode(), target.encode(), ctypes.byref(options)); sys.exit(failed)"
        )
        command = [sys.executable, "-c", code, str(plain), str(small), str(kind)]
        subprocess.run(command, check=True, capture_output=True)
    return small


def decoding(spec: Spec, run: Callable[[int], list[int]]) -> Once:
    """Returns a turn of making `spec["new"]` tokens of each row."""
    count = spec["new"] + 1 if spec["after"] else spec["new"]
    if spec["after"]:
        run(1)

    def once():
        begun = time.perf_counter()
        numbers = run(count)
        seconds = time.perf_counter() - begun
        if spec["after"]:
            begun = time.perf_counter()
            run(1)
            seconds -= time.perf_counter() - begun
        return Done(
            spec["batch"] * spec["new"], [len(numbers)] if spec["sample"] else numbers, seconds
        )

    return once


# Prefill: a prompt is read, its cache filled.


def ours_prefill(spec: Spec) -> Once:
    """`gpt2_jax.prefill`, jitted."""
    import jax

    import gpt2_jax

    config, params = gpt2_jax.load(spec["folder"], dtype=spec["dtype"])
    ids = tokens_of(spec, config.vocab_size)
    prefill = jax.jit(gpt2_jax.prefill, static_argnames="cache_len")

    def once():
        logits, _ = jax.block_until_ready(prefill(params, ids, config=config))
        return Done(ids.size, logits[:, :8].ravel().tolist())

    return once


def hf_prefill(spec: Spec) -> Once:
    """HF's model with a cache, asked for the last logits."""
    import torch

    model = hf_gpt2(spec)
    ids = torch.tensor(tokens_of(spec, model.config.vocab_size))

    @torch.inference_mode()
    def once():
        out = model(ids, use_cache=True, logits_to_keep=1)
        return Done(ids.numel(), out.logits[:, -1, :8].flatten().tolist())

    return once


# Patching: one activation after the other, by all layers and positions; in tokens of all runs.


def ours_patch(spec: Spec) -> Once:
    """`gpt2_jax.patching_sweep`, all in one pass."""
    import jax
    import numpy as np

    import gpt2_jax

    config, params = gpt2_jax.load(spec["folder"])
    ids, other = tokens_of(spec, config.vocab_size)[:, None]

    @jax.jit
    def sweep(params, ids, other):
        _, donors = gpt2_jax.capture(params, other, config=config, sites="h.*.resid_pre")
        options = {"config": config, "site": "resid_pre", "batch_size": 8}
        return gpt2_jax.patching_sweep(
            params, ids, donors, lambda logits: logits[0, 5] - logits[0, 7], **options
        )

    def once():
        found = np.asarray(sweep(params, ids, other))
        return Done(found.size * ids.size, found.flatten().tolist())

    return once


def hf_patch(spec: Spec) -> Once:
    """The loop of a hook for each layer and position."""
    import torch

    model = hf_gpt2(spec)
    ids, other = torch.tensor(tokens_of(spec, model.config.vocab_size))[:, None]

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
                logits = model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
                handle.remove()
                found.append((logits[5] - logits[7]).item())
        return Done(len(found) * spec["length"], found)

    return once


# The tokenizer: ids of a text, whose words were met before or are new, or of a batch of texts.


class Encoder(NamedTuple):
    """A contender's two functions."""

    one: Callable[[str], Sequence[int]]  # on one thread
    batch: Callable[[list[str]], list[Sequence[int]]]  # on all cores, if it can


def ours_tokenizer(spec: Spec) -> Once:
    """`gpt2_jax.Tokenizer`."""
    import gpt2_jax

    def make():
        tokenizer = gpt2_jax.Tokenizer.load(spec["vocabulary"])
        return Encoder(tokenizer.encode, tokenizer.encode_batch)

    return encoding(spec, make)


def hf_tokenizer(spec: Spec) -> Once:
    """`tokenizers`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if spec["case"] == "batch" else "false"
    from tokenizers import ByteLevelBPETokenizer

    def make():
        tokenizer = ByteLevelBPETokenizer(
            f"{spec['vocabulary']}/vocab.json", f"{spec['vocabulary']}/merges.txt"
        )
        return Encoder(
            lambda text: tokenizer.encode(text).ids,
            lambda texts: [encoded.ids for encoded in tokenizer.encode_batch(texts)],
        )

    return encoding(spec, make)


def tiktoken_tokenizer(spec: Spec) -> Once:
    """`tiktoken`, which remembers no words."""
    import tiktoken

    from gpt2_jax import Tokenizer

    known = Tokenizer.gpt2()
    ranks = {known.decode_bytes([id]): id for id in range(50256)}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    encoding_ = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    batch = partial(encoding_.encode_ordinary_batch, num_threads=os.cpu_count())
    return encoding(spec, lambda: Encoder(encoding_.encode_ordinary, batch))


def encoding(spec: Spec, make: Callable[[], Encoder]) -> Once:
    """Returns a turn of encoding the text of a file; in megabytes."""
    text = Path(spec["text"]).read_text(encoding="utf-8")
    texts = documents(text)
    size = len(text.encode()) / 1e6
    encoders = [make()]

    def once():
        encoder = make() if spec["case"] == "new words" else encoders[0]
        start = time.perf_counter()
        encoded = encoder.batch(texts) if spec["case"] == "batch" else [encoder.one(text)]
        seconds = time.perf_counter() - start
        numbers = [sum(map(len, encoded)), *map(len, encoded[:1000]), *encoded[0][:1000]]
        return Done(size, numbers, seconds)

    return once


def documents(text: str) -> list[str]:
    """Returns a text in parts of 2,000 characters or more, cut behind paragraphs."""
    parts = [""]
    for paragraph in text.split("\n\n"):
        if len(parts[-1]) >= 2000:
            parts.append("")
        parts[-1] += f"{paragraph}\n\n"
    return parts


# The command line, from its start to its end; `folder` has the compiled programs of earlier runs,
# or nothing.


def ours_cold(spec: Spec) -> Once:
    """The command `gpt2-jax`."""
    code = "from gpt2_jax_cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        spec["prompt"],
        "--from_pretrained",
        spec["folder"],
        "--quiet",
    ]
    return process(spec, [*command, "--max_tokens", str(spec["new"])])


def hf_cold(spec: Spec) -> Once:
    """The same with transformers and PyTorch."""
    code = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, count = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
model.generation_config.eos_token_id = None
ids = tokenizer(prompt, return_tensors="pt")
out = model.generate(**ids, max_new_tokens=int(count), do_sample=False, pad_token_id=0)
print(tokenizer.decode(out[0], clean_up_tokenization_spaces=False))
"""
    return process(
        spec, [sys.executable, "-c", code, spec["folder"], spec["prompt"], str(spec["new"])]
    )


def process(spec: Spec, command: list[str]) -> Once:
    """Returns a turn of running a command; its numbers are the characters of its text."""
    import tempfile

    def once():
        with tempfile.TemporaryDirectory() as empty:
            cache = empty if spec["empty"] else spec["cache"]
            environment = os.environ | {"XDG_CACHE_HOME": cache, "HF_HUB_OFFLINE": "1"}
            running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            text = running.stdout.read()
            _, running.returncode, usage = os.wait4(running.pid, 0)
        if running.returncode:
            raise RuntimeError(f"{command[:1]} ended with status {running.returncode}.")
        return Done(1, [ord(character) for character in text], peak=usage.ru_maxrss / 1024)

    return once


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
        return Done(0, out)

    return once


# What contenders share.


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
            self.attn = nn.ModuleDict(
                {"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)}
            )
            self.mlp = nn.ModuleDict(
                {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
            )

        def forward(self, x):
            rows, length, _ = x.shape
            qkv = self.attn["c_attn"](self.ln_1(x)).view(rows, length, 3, heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attn["c_proj"](z.transpose(1, 2).reshape(rows, length, width))
            return x + self.mlp["c_proj"](
                F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
            )

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
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(f"{folder}/model.safetensors").items()
    }
    dense = [name for name in state if name.startswith("h.") and state[name].ndim == 2]
    model.load_state_dict(state | {name: state[name].T.contiguous() for name in dense})
    return model


def batches_of(spec: Spec, vocab_size: int) -> Iterator[Any]:
    """Yields seeded batches without end, the same for all."""
    import numpy as np

    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, vocab_size, (spec["batch"], spec["length"] + 1))


def tokens_of(spec: Spec, vocab_size: int) -> Any:
    """Returns seeded ids `[batch, length]`, the same for all."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab_size, (spec["batch"], spec["length"]))


# A long life.


def ours_programs(spec: Spec) -> Once:
    """Texts of random sizes, some greedy and some drawn, by a small model."""
    import jax
    import numpy as np

    import gpt2_jax

    config = gpt2_jax.GPT2Config(
        vocab_size=257, n_positions=256, n_embd=32, n_layer=1, n_head=2, eos_token_id=None
    )
    params = gpt2_jax.init(jax.random.key(0), config)
    rng = np.random.default_rng(0)
    n_programs = 0

    def count(event: str, seconds: float, **_: Any) -> None:
        nonlocal n_programs
        n_programs += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)

    def once():
        for _ in range(spec["calls"]):
            ids = rng.integers(0, 257, (rng.choice(spec["batches"]), rng.integers(1, 151)))
            lengths = rng.integers(1, ids.shape[1] + 1, len(ids))
            drawn = gpt2_jax.Categorical(gpt2_jax.TopP(rng.random()))
            sampler = drawn if rng.random() < 0.5 else None
            key = jax.random.key(int(rng.integers(2**31)))
            new = int(rng.integers(1, 101))
            gpt2_jax.generate(
                params, ids, lengths, key, config=config, max_new_tokens=new, sampler=sampler
            )
        return Done(spec["calls"], [n_programs])

    return once


# Several tokens to a pass.


def plain_speculate(spec: Spec) -> Once:
    """`gpt2_jax.generate`, which speculation is to beat."""
    return ours_decode(spec | {"sample": {}, "after": False})


def lookup_speculate(spec: Spec) -> Once:
    """`gpt2_jax.speculate`, guesses from the text."""
    return speculating(spec, {})


def draft_speculate(spec: Spec) -> Once:
    """`gpt2_jax.speculate`, guesses of a smaller model."""
    import gpt2_jax

    draft_config, draft_params = gpt2_jax.load(spec["draft"], dtype=spec["dtype"])
    return speculating(spec, {"draft_params": draft_params, "draft_config": draft_config})


def speculating(spec: Spec, draft: dict[str, Any]) -> Once:
    """Returns a turn of speculation; its numbers are the texts, then the tokens of a pass."""
    import numpy as np

    import gpt2_jax

    config, params = gpt2_jax.load(spec["folder"], dtype=spec["dtype"])
    ids = tokens_of(spec, config.vocab_size)
    options = {"config": config, "max_new_tokens": spec["new"], "stop_ids": ()}
    options |= {"num_draft_tokens": spec["guesses"]}

    def once():
        made = gpt2_jax.speculate(params, ids, **options, **draft)
        passes = np.asarray(made.lengths - made.accepted)  # each adds one token of the model's own
        per_pass = float(np.mean(np.asarray(made.lengths) / passes))
        return Done(spec["batch"] * spec["new"], [*np.ravel(made.ids).tolist(), per_pass])

    return once


# What compiling takes, by the number of layers.


def ours_compile(spec: Spec) -> Once:
    """A training step or a decoding loop; its numbers are seconds of tracing and of compiling."""
    import jax
    import jax.numpy as jnp

    import gpt2_jax

    width = spec["width"]
    config = gpt2_jax.GPT2Config(
        vocab_size=1024, n_positions=128, n_embd=width, n_layer=spec["layers"], n_head=width // 64
    )
    params = gpt2_jax.init(jax.random.key(0), config)
    ids = jnp.zeros((4, 65), jnp.int32)
    if spec["program"] == "decoding":
        program = jax.jit(gpt2_jax.generate, static_argnames="max_new_tokens")
        arguments = (params, ids)
        options = {"config": config, "max_new_tokens": 32}
    else:
        tx = gpt2_jax.make_optimizer(1e-3)
        stacked = spec["program"] == "step, stacked"
        state = gpt2_jax.init_state(gpt2_jax.stack_layers(params) if stacked else params, tx)
        program = jax.jit(partial(gpt2_jax.train_step, config=config, tx=tx))
        arguments = (state, ids)
        options = {}

    def once():
        begun = time.perf_counter()
        lowered = program.lower(*arguments, **options)
        traced = time.perf_counter()
        lowered.compile()
        compiled = time.perf_counter()
        return Done(1, [traced - begun, compiled - traced], compiled - begun)

    return once


# The loss of a training step by chunks, and with the logits of all tokens at once.


def whole_loss(spec: Spec) -> Once:
    """The step of `gpt2_jax.train`, without chunks."""
    from gpt2_jax.training import losses

    losses.LARGEST_LOGITS = 2**60
    return ours_train(spec)


# What loading, saving and initialising take on several devices.


def ours_places(spec: Spec) -> Once:
    """On eight devices that are this CPU; its numbers are MB of the peak, and what stays."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import tempfile

    import jax

    import gpt2_jax
    from gpt2_jax import sharding

    mesh = sharding.make_mesh(spec["mesh"])
    config, params = None, None
    if spec["what"] == "save":
        config, params = gpt2_jax.load(spec["folder"], mesh=mesh)
    elif spec["what"] == "init":
        config = gpt2_jax.GPT2Config(**spec["config"])
    jax.block_until_ready(jax.numpy.zeros(8))
    before = resident()
    highest = [before]
    is_done = threading.Event()

    def watch():
        # The highest so far is that of the whole process: it may lie before.
        while not is_done.wait(0.001):
            highest[0] = max(highest[0], resident())

    def once():
        nonlocal params
        watcher = threading.Thread(target=watch)
        watcher.start()
        if spec["what"] == "load":
            _, params = gpt2_jax.load(spec["folder"], mesh=mesh)
        elif spec["what"] == "init":
            params = gpt2_jax.init(jax.random.key(0), config, mesh=mesh)
        else:
            with tempfile.TemporaryDirectory() as folder:
                gpt2_jax.save(f"{folder}/saved", params, config)
        jax.block_until_ready(params)
        is_done.set()
        watcher.join()
        stays = 0 if spec["what"] == "save" else n_bytes_of(params)
        return Done(1, [(highest[0] - before) / 1e6, stays / 1e6])

    def n_bytes_of(tree):
        leaves = jax.tree.leaves(tree)
        return sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)

    return once


def resident() -> int:
    """Returns how many bytes of this process are in memory, as Linux says."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


CONTENDERS: dict[str, dict[str, Callable[[Spec], Once]]] = {
    "train": {"ours": ours_train, "PyTorch": torch_train},
    "eval": {"ours": ours_eval, "transformers": hf_eval},
    "decode": {
        "ours": ours_decode,
        "transformers": hf_decode,
        "CTranslate2": ctranslate2_decode,
        "llama.cpp": llama_decode,
    },
    "prefill": {"ours": ours_prefill, "transformers": hf_prefill},
    "patch": {"ours": ours_patch, "transformers": hf_patch},
    "tokenizer": {
        "ours": ours_tokenizer,
        "tokenizers": hf_tokenizer,
        "tiktoken": tiktoken_tokenizer,
    },
    "cold": {"ours": ours_cold, "transformers": hf_cold},
    "programs": {"ours": ours_programs},
    "speculate": {
        "generate": plain_speculate,
        "lookup": lookup_speculate,
        "draft": draft_speculate,
    },
    "compile": {"ours": ours_compile},
    "loss": {"ours": ours_train, "in one piece": whole_loss},
    "places": {"ours": ours_places},
    "limits": {"limits": limits},
}


def serve(work: str, name: str, spec: Spec) -> None:
    """Gets a contender ready and lets it work once for each line of standard input."""

    def answer(**content):
        print(json.dumps({"answer": content}), flush=True)

    # Where a work has no other dtype, its spec names none.
    spec = {"dtype": "float32"} | spec
    plain, _, setting = name.partition(", ")
    if setting == "float32":
        spec["dtype"] = setting
    spec["compile"] = setting == "compiled"
    once = CONTENDERS[work][plain](spec)
    answer(numbers=once().numbers)  # compiles, and is the first to be compared
    for _ in sys.stdin:
        begun = time.perf_counter()
        done = once()
        seconds = time.perf_counter() - begun if done.seconds is None else done.seconds
        # MiB on Linux, where `ru_maxrss` is in KiB.
        peak = done.peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answer(seconds=seconds, amount=done.amount, numbers=done.numbers, peak=peak)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
