"""GPT-2 in JAX: pure functions over an explicit params pytree."""

from gpt2_jax.config import PRESETS, GPT2Config
from gpt2_jax.generate import Generation, generate, stream
from gpt2_jax.model import KVCache, apply, decode_step, init, prefill, unembed
from gpt2_jax.sampling import Categorical, Chain, Greedy, History, MinP, Temperature, TopK, TopP

__all__ = [
    "PRESETS",
    "Categorical",
    "Chain",
    "GPT2Config",
    "Generation",
    "Greedy",
    "History",
    "KVCache",
    "MinP",
    "Temperature",
    "TopK",
    "TopP",
    "apply",
    "decode_step",
    "generate",
    "init",
    "prefill",
    "stream",
    "unembed",
]
