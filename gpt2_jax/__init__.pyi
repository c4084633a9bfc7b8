"""The public names, and where each is defined: one place for Python, type checkers and editors.

`__init__.py` reads it, and imports a module when one of its names is first asked for.
"""

from gpt2_jax.cache import KVCache, lengthen, share
from gpt2_jax.config import PRESETS, GPT2Config
from gpt2_jax.evaluation.score import Likelihood, perplexity, score, score_choices, token_logprobs
from gpt2_jax.files import CheckpointError
from gpt2_jax.generation.beam import Beams, beam_search
from gpt2_jax.generation.constrained import (
    Constrained,
    PrefixAllowedTokens,
    from_json_schema,
    from_regex,
)
from gpt2_jax.generation.conversation import Conversation
from gpt2_jax.generation.cuts import MinP, Temperature, TopK, TopP
from gpt2_jax.generation.decode import Generation
from gpt2_jax.generation.from_options import sampler_from_options
from gpt2_jax.generation.generate import generate, join, stream
from gpt2_jax.generation.generation_config import load_generation_config
from gpt2_jax.generation.guided import Contrastive, Guidance
from gpt2_jax.generation.sampling import Categorical, Greedy
from gpt2_jax.generation.speculate import Speculation, speculate
from gpt2_jax.generation.text import Continuation, complete, encode_batch, stream_text
from gpt2_jax.generation.transforms import Chain, History, Stateful
from gpt2_jax.interpretability.circuits import (
    CircuitSVD,
    CompositionScores,
    center_unembed,
    center_writing_weights,
    circuit_svd,
    composition_scores,
    fold_layer_norm,
    ov_circuit,
    qk_circuit,
)
from gpt2_jax.interpretability.edges import EDGE_SITES, Edge, EdgeScores, edge_attribution
from gpt2_jax.interpretability.edits import add, replace
from gpt2_jax.interpretability.page import Page, inspect_page
from gpt2_jax.interpretability.patching import (
    mean_ablation,
    patch_each,
    patching_sweep,
    path_patch,
    resample_ablation,
    zero_ablation,
)
from gpt2_jax.interpretability.reading import (
    HeadScores,
    LogitAttribution,
    SiteGradients,
    attention_patterns,
    attribution,
    direct_logit_attribution,
    head_scores,
    logit_lens,
    site_gradients,
    steering_vector,
    stream_logits,
)
from gpt2_jax.interpretability.residual import ResidStack, resid_stack
from gpt2_jax.interpretability.sites import SITES, axis_masks, find_sites, site_names
from gpt2_jax.interpretability.stream import Captured, capture_stream
from gpt2_jax.interpretability.taps import ChainedTaps, Edits, capture, make_tap, patch
from gpt2_jax.model import apply, decode_step, extend, init, prefill, run_layers, unembed
from gpt2_jax.pretrained.hub import resolve
from gpt2_jax.pretrained.loading import Pretrained, load_pretrained, load_tokenizer
from gpt2_jax.pretrained.peft import load_lora, save_lora
from gpt2_jax.pretrained.weights import from_hf, load, save, to_hf
from gpt2_jax.quantised import Quantised, dequantize, quantize
from gpt2_jax.resize import resize_vocab
from gpt2_jax.stack import stack_layers, unstack_layers
from gpt2_jax.summary import Summary, summarize
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.lora import lora, merge_lora
from gpt2_jax.training.losses import next_token_loss
from gpt2_jax.training.optimizers import make_optimizer, warmup_cosine
from gpt2_jax.training.step import TrainState, init_state, train_step

__version__: str

__all__ = [
    "EDGE_SITES",
    "PRESETS",
    "SITES",
    "Beams",
    "Captured",
    "Categorical",
    "Chain",
    "ChainedTaps",
    "CheckpointError",
    "Constrained",
    "CircuitSVD",
    "CompositionScores",
    "Continuation",
    "Contrastive",
    "Conversation",
    "Edge",
    "EdgeScores",
    "Edits",
    "GPT2Config",
    "Generation",
    "Greedy",
    "Guidance",
    "HeadScores",
    "History",
    "KVCache",
    "Likelihood",
    "LogitAttribution",
    "MinP",
    "Page",
    "PrefixAllowedTokens",
    "Pretrained",
    "Quantised",
    "ResidStack",
    "SiteGradients",
    "Speculation",
    "Stateful",
    "Summary",
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
    "capture_stream",
    "center_unembed",
    "center_writing_weights",
    "circuit_svd",
    "complete",
    "composition_scores",
    "decode_step",
    "dequantize",
    "direct_logit_attribution",
    "edge_attribution",
    "encode_batch",
    "extend",
    "find_sites",
    "fold_layer_norm",
    "from_hf",
    "from_json_schema",
    "from_regex",
    "generate",
    "head_scores",
    "init",
    "init_state",
    "inspect_page",
    "join",
    "lengthen",
    "load",
    "load_generation_config",
    "load_lora",
    "load_pretrained",
    "load_tokenizer",
    "logit_lens",
    "lora",
    "make_optimizer",
    "make_tap",
    "mean_ablation",
    "merge_lora",
    "next_token_loss",
    "ov_circuit",
    "patch",
    "patch_each",
    "patching_sweep",
    "path_patch",
    "perplexity",
    "prefill",
    "qk_circuit",
    "quantize",
    "replace",
    "resample_ablation",
    "resid_stack",
    "resize_vocab",
    "resolve",
    "run_layers",
    "sampler_from_options",
    "save",
    "save_lora",
    "score",
    "score_choices",
    "share",
    "site_gradients",
    "site_names",
    "speculate",
    "stack_layers",
    "steering_vector",
    "stream",
    "stream_logits",
    "stream_text",
    "summarize",
    "to_hf",
    "token_logprobs",
    "train_step",
    "unembed",
    "unstack_layers",
    "warmup_cosine",
    "zero_ablation",
]
