"""GPT-2 in JAX: pure functions over an explicit params pytree."""

from gpt2_jax.beam import Beams, beam_search
from gpt2_jax.circuits import center_unembed, center_writing_weights, fold_layer_norm, ov_circuit, qk_circuit
from gpt2_jax.config import PRESETS, GPT2Config
from gpt2_jax.evaluate import Likelihood, perplexity, score, score_choices, token_logprobs
from gpt2_jax.files import CheckpointError, resolve
from gpt2_jax.generate import Generation, generate, stream
from gpt2_jax.lens import (
    LogitAttribution,
    attention_patterns,
    attribution,
    direct_logit_attribution,
    logit_lens,
    mean_ablation,
    patch_each,
    patching_sweep,
    path_patch,
    resample_ablation,
    steering_vector,
    stream_logits,
    zero_ablation,
)
from gpt2_jax.model import KVCache, apply, decode_step, init, prefill, unembed
from gpt2_jax.options import load_generation_config, sampler_from_options
from gpt2_jax.sampling import Categorical, Chain, Greedy, History, MinP, Temperature, TopK, TopP
from gpt2_jax.speculate import Speculation, speculate
from gpt2_jax.taps import SITES, Edits, add, axis_masks, capture, find_sites, make_tap, patch, replace, site_names
from gpt2_jax.text import Continuation, Conversation, complete, encode_batch, load_tokenizer, stream_text
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.train import TrainState, init_state, make_optimizer, next_token_loss, train_step, warmup_cosine
from gpt2_jax.weights import from_hf, load, save, to_hf

__all__ = [
    "PRESETS",
    "SITES",
    "Beams",
    "Categorical",
    "Chain",
    "CheckpointError",
    "Continuation",
    "Conversation",
    "Edits",
    "GPT2Config",
    "Generation",
    "Greedy",
    "History",
    "KVCache",
    "Likelihood",
    "LogitAttribution",
    "MinP",
    "Speculation",
    "Temperature",
    "Tokenizer",
    "TopK",
    "TopP",
    "TrainState",
    "add",
    "apply",
    "attention_patterns",
    "attribution",
    "axis_masks",
    "beam_search",
    "capture",
    "center_unembed",
    "center_writing_weights",
    "complete",
    "decode_step",
    "direct_logit_attribution",
    "encode_batch",
    "find_sites",
    "fold_layer_norm",
    "from_hf",
    "generate",
    "init",
    "init_state",
    "load",
    "load_generation_config",
    "load_tokenizer",
    "logit_lens",
    "make_optimizer",
    "make_tap",
    "mean_ablation",
    "next_token_loss",
    "ov_circuit",
    "patch",
    "patch_each",
    "patching_sweep",
    "path_patch",
    "perplexity",
    "prefill",
    "qk_circuit",
    "replace",
    "resample_ablation",
    "resolve",
    "sampler_from_options",
    "save",
    "score",
    "score_choices",
    "site_names",
    "speculate",
    "steering_vector",
    "stream",
    "stream_logits",
    "stream_text",
    "to_hf",
    "token_logprobs",
    "train_step",
    "unembed",
    "warmup_cosine",
    "zero_ablation",
]
