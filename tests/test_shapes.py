"""The shapes and dtypes in the signatures are true: a process of their own executes them."""

import subprocess
import sys
import textwrap

# Every module is imported through jaxtyping's hook, which checks each call against its annotations.
HOOK = """
from jaxtyping import install_import_hook

hook = install_import_hook("gpt2_jax", "beartype.beartype")
import jax
import numpy as np
import gpt2_jax

config = gpt2_jax.GPT2Config(
    vocab_size=61, n_positions=24, n_embd=24, n_layer=2, n_head=3, eos_token_id=0, bos_token_id=0
)
params = gpt2_jax.init(jax.random.key(0), config)
ids = np.random.default_rng(0).integers(1, 61, (2, 6))
lengths = np.array([6, 4])
key = jax.random.key(1)
"""
WALK = """
jax.jit(gpt2_jax.apply)(params, ids, config=config)
options = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "temperature": 0.9, "top_k": 9}
options |= {"top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "min_new_tokens": 2}
sampler = gpt2_jax.sampler_from_options(options, do_sample=True, stop_ids=(0,))
gpt2_jax.generate(params, ids, lengths, key, config=config, max_new_tokens=5, sampler=sampler)
gpt2_jax.generate(params, ids, config=config, max_new_tokens=30, overflow="slide")
made = gpt2_jax.generate(
    params, ids, None, key, config=config, max_new_tokens=3, num_return_sequences=2,
    sampler=gpt2_jax.Categorical(gpt2_jax.Guidance(params, config, 1.5)),
    outputs=("scores", "embed"),
)
gpt2_jax.join(ids, lengths, made)
jax.jit(lambda ids: gpt2_jax.generate(params, ids, config=config, max_new_tokens=3))(ids)
gpt2_jax.beam_search(params, ids, config=config, max_new_tokens=3, num_beams=2)
gpt2_jax.speculate(params, ids, lengths, key, config=config, max_new_tokens=3, sampler=sampler)
draft = {"draft_params": params, "draft_config": config}
gpt2_jax.speculate(params, ids, lengths, config=config, max_new_tokens=3, **draft)
gpt2_jax.score(params, [([1, 2, 3], 2), ([4, 5], 1)], config=config)
gpt2_jax.perplexity(params, list(range(1, 40)), config=config, bytes=80)
gpt2_jax.score_choices(params, [1, 2], [[3], [4, 5]], config=config)
tx = gpt2_jax.make_optimizer(1e-3)
state = gpt2_jax.init_state(params, tx)
gpt2_jax.train_step(state, ids, key, config=config, tx=tx, micro_batches=2)
tap = gpt2_jax.make_tap({"h.*.resid_pre": gpt2_jax.add(np.ones(24), at=[1, 3])}, config=config)
gpt2_jax.score(params, [([1, 2, 3], 2)], config=config, tap=tap)
many = [f"wor{i} l\xe9tters{i}\u3000don't" for i in range(2000)]  # words, cut and merged at once
gpt2_jax.Tokenizer.gpt2().encode_batch(many)
next(gpt2_jax.capture_stream(params, ids.ravel(), config=config, sites="embed", length=5))


def traced():  # no need to compile
    gpt2_jax.apply(params, ids, lengths, config=config, padding_side="left")
    gpt2_jax.apply(params, ids, config=config, dropout_key=key, remat=True)
    logits, cache = gpt2_jax.prefill(params, ids, lengths, config=config, cache_len=12)
    gpt2_jax.decode_step(params, logits.argmax(-1), cache, config=config)
    gpt2_jax.token_logprobs(params, ids, config=config)
    _, acts = gpt2_jax.capture(params, ids, config=config, sites="*")
    gpt2_jax.patch(params, ids, config=config, edits={"h.0.attn.z": 0.0})
    gpt2_jax.logit_lens(params, ids, config=config)
    gpt2_jax.attention_patterns(params, ids, config=config)
    gpt2_jax.direct_logit_attribution(params, ids, ids, config=config)
    metric = lambda logits: logits[:, 3] - logits[:, 4]
    gpt2_jax.patching_sweep(
        params, ids, acts, metric, lengths, config=config, site="attn.z", over="TH"
    )
    total = lambda logits: metric(logits).sum()
    gpt2_jax.attribution(params, ids, total, lengths, config=config, sites="h.*.mlp.out")
    gpt2_jax.qk_circuit(params, 0, 1, config=config)
    gpt2_jax.apply(params, ids, config=config, tap=tap)
    gpt2_jax.edge_attribution(params, ids, acts, total, lengths, config=config, steps=2)
    gpt2_jax.resid_stack(params, ids, lengths, config=config, by="neuron", last_only=True)
    gpt2_jax.head_scores(params, key, config=config)
    gpt2_jax.run_layers(params, acts["h.1.resid_pre"], config=config, start=1)
    gpt2_jax.composition_scores(params, config=config)
    gpt2_jax.circuit_svd(params, 0, 1, config=config)
    gpt2_jax.mean_ablation(acts["embed"], True, lengths)


jax.eval_shape(traced)
gpt2_jax.fold_layer_norm(params, config=config)
gpt2_jax.from_hf(gpt2_jax.to_hf(params), config)
print("walked")
"""
WRONG = """
from gpt2_jax.model import token_logprobs_of, unembed

for call in (
    lambda: unembed(params, np.zeros(24, int), config=config),
    lambda: token_logprobs_of(np.zeros((2, 61)), np.zeros(2)),
):
    try:
        call()
    except Exception as error:
        print(type(error).__name__)
"""


def run(code):
    """What a program prints that begins with the hook."""
    program = textwrap.dedent(HOOK + code)
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout.split()


def test_the_public_functions_keep_to_their_annotations():
    assert run(WALK) == ["walked"]


def test_a_wrong_shape_or_dtype_would_be_seen():
    assert run(WRONG) == ["TypeCheckError", "TypeCheckError"]
