"""What training codes save with `torch.save`: nanoGPT's `ckpt.pt`, minGPT's, Lightning's.

Weights stand at the top or within a container, under HF's names with a prefix or without. nanoGPT's
names are HF's; its kernels are `nn.Linear`'s, `[O, I]` (karpathy/nanoGPT, `model.py`, `train.py`).
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained.foreign.names import DENSE_WEIGHT, Checkpoint, upright
from gpt2_jax.pretrained.formats import Tensor, TorchFile

# Where training codes keep the weights, besides the optimiser's state: nanoGPT, Lightning, others.
CONTAINERS = ("model", "state_dict", "model_state_dict")
ARGUMENTS = "model_args"  # nanoGPT's, of its `GPTConfig`
OUR_CONFIG = "gpt2_jax_config"  # beside them, in files that are written here

# nanoGPT's names, and those of a fork that is around -> HF's.
FIELDS = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "bias": "bias",
    "seq_length": "n_positions",
    "dim_embedding": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "use_bias": "bias",
}
NEEDED = ("vocab_size", "block_size", "n_embd", "n_layer", "n_head")
N_GPT2_TOKENS = 50257  # from here on, ids are GPT-2's, perhaps padded to a multiple of 64
END_OF_TEXT = 50256


class ContainedTensors(TorchFile):
    """A file of `torch.save` whose tensors stand at the top or in a container.

    Raises:
      CheckpointError: as `TorchFile`.
    """

    def __init__(self, file: Path):
        self.container: str | None = None
        self.beside: dict[str, Any] = {}  # what else the file holds
        super().__init__(file)

    def _open(self) -> dict[str, Any]:
        content = super()._open()
        if not isinstance(content, Mapping):
            return content  # for `TorchFile` to refuse
        for name in CONTAINERS:
            inside = content.get(name)
            if isinstance(inside, Mapping):
                self.container = name
                self.beside = {key: content[key] for key in content if key != name}
                return dict(inside)
        return dict(content)


def read(file: Path) -> Checkpoint:
    """Returns what a file of PyTorch holds. Only nanoGPT's has a config.

    Raises:
      CheckpointError: as `TorchFile`, or nanoGPT's arguments lack a field.
    """
    stored = ContainedTensors(file)
    arguments = stored.beside.get(ARGUMENTS)
    kind = "a PyTorch file"
    if "pytorch-lightning_version" in stored.beside:
        kind = "a Lightning checkpoint"
    elif isinstance(arguments, Mapping):
        kind = "a nanoGPT checkpoint"
    if stored.container is not None:
        kind += f", whose weights stand under `{stored.container}`"
    config = None
    if isinstance(stored.beside.get(OUR_CONFIG), Mapping):
        config = GPT2Config.from_dict(stored.beside[OUR_CONFIG])
    elif isinstance(arguments, Mapping):
        config = _nanogpt_config(file, arguments)
    return Checkpoint(kind, upright(stored), config)


def _nanogpt_config(file: Path, arguments: Mapping[str, Any]) -> GPT2Config:
    """Returns the config of a nanoGPT model: it has the exact GELU, and its head is tied."""
    fields = {FIELDS[name]: value for name, value in arguments.items() if name in FIELDS}
    # By HF's names, as a fork's other name of a field will do.
    missing = [name for name in NEEDED if FIELDS[name] not in fields]
    if missing:
        got = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise CheckpointError(
            f"{file}: expected {', '.join(missing)} among `{ARGUMENTS}`, got {got}."
        )
    dropout = arguments.get("dropout", 0.0)
    # Characters, or whatever else has fewer tokens, have no end of a text that nanoGPT knows.
    end = END_OF_TEXT if fields["vocab_size"] >= N_GPT2_TOKENS else None
    return GPT2Config(
        activation_function="gelu",
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=end,
        eos_token_id=end,
        **fields,
    )


def write(file: Path, state: Mapping[str, Tensor], config: GPT2Config) -> None:
    """Writes HF's names and arrays as a `ckpt.pt` that nanoGPT's `sample.py` reads.

    There is no optimiser's state in it: nanoGPT's `train.py` cannot resume from it.

    Raises:
      CheckpointError: PyTorch is not installed, or nanoGPT's model computes something else.
    """
    try:
        import torch
    except ImportError:
        advice = "which is not installed. Install `gpt2_jax[torch]`."
        raise CheckpointError(f"Writing nanoGPT's files needs PyTorch, {advice}") from None
    # Before any tensor is copied.
    _check_nanogpt_computes(config)
    model = {}
    for name, array in state.items():
        tensor = _to_torch(array)
        model[name] = tensor.T.contiguous() if DENSE_WEIGHT.fullmatch(name) else tensor
    # One tensor under two names, as in nanoGPT, so that it is stored once.
    model["lm_head.weight"] = model["transformer.wte.weight"]
    arguments = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.n_positions,
        "bias": config.bias,
        "vocab_size": config.vocab_size,
        # nanoGPT has one rate for all places; the config beside it keeps the three.
        "dropout": config.resid_pdrop,
    }
    # The last two are in nanoGPT's files: `sample.py` looks for a `dataset` in `config`.
    content = {"model": model, ARGUMENTS: arguments, "iter_num": 0, "config": {}}
    content[OUR_CONFIG] = config.to_dict()  # what nanoGPT has no argument for
    torch.save(content, file)


def _to_torch(array: Tensor) -> Any:
    """Returns an array as a tensor with the same bits."""
    import torch

    # Numpy itself has no bfloat16, and PyTorch takes no dtype that is not numpy's own.
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _check_nanogpt_computes(config: GPT2Config) -> None:
    """Raises unless nanoGPT's model is this config's; warns where only its GELU is another."""
    expected = {
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "layer_norm_epsilon": 1e-5,
        "mlp_width": 4 * config.n_embd,
    }
    for name, value in expected.items():
        got = getattr(config, name)
        if got != value:
            raise CheckpointError(f"nanoGPT has {name}={value} only, got {got}.")
    if config.activation_function not in ("gelu", "gelu_python"):
        used = f"this model was trained with {config.activation_function}"
        warnings.warn(
            f"nanoGPT computes the exact GELU, and {used}: its logits will differ a little. Read "
            "back here, the file keeps its own.",
            stacklevel=2,
        )
