"""GPT-2 in JAX: pure functions over an explicit params pytree."""

from gpt2_jax.beam import Beams, beam_search
from gpt2_jax.config import PRESETS, GPT2Config
from gpt2_jax.evaluate import Likelihood, perplexity, score, score_choices, token_logprobs
from gpt2_jax.files import CheckpointError, resolve
from gpt2_jax.generate import Generation, generate, stream
from gpt2_jax.model import KVCache, apply, decode_step, init, prefill, unembed
from gpt2_jax.options import load_generation_config, sampler_from_options
from gpt2_jax.sampling import Categorical, Chain, Greedy, History, MinP, Temperature, TopK, TopP
from gpt2_jax.speculate import Speculation, speculate
from gpt2_jax.text import Continuation, Conversation, complete, encode_batch, stream_text
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.train import TrainState, init_state, make_optimizer, next_token_loss, train_step, warmup_cosine
from gpt2_jax.weights import from_hf, load, save, to_hf

__all__ = [
    "PRESETS",
    "Beams",
    "Categorical",
    "Chain",
    "CheckpointError",
    "Continuation",
    "Conversation",
    "GPT2Config",
    "Generation",
    "Greedy",
    "History",
    "KVCache",
    "Likelihood",
    "MinP",
    "Speculation",
    "Temperature",
    "TopK",
    "Tokenizer",
    "TopP",
    "TrainState",
    "apply",
    "beam_search",
    "complete",
    "decode_step",
    "encode_batch",
    "from_hf",
    "generate",
    "init",
    "init_state",
    "load",
    "load_generation_config",
    "make_optimizer",
    "next_token_loss",
    "perplexity",
    "prefill",
    "resolve",
    "sampler_from_options",
    "save",
    "score",
    "score_choices",
    "speculate",
    "stream",
    "stream_text",
    "to_hf",
    "token_logprobs",
    "train_step",
    "unembed",
    "warmup_cosine",
]
