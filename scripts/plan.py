"""Predicts a training step on many chips, from its program compiled for as many simulated devices.

    python scripts/plan.py --model gpt2-xl --mesh data=16,fsdp=16

No chip is asked. XLA partitions the step for so many devices of this machine's CPU, which it
compiles for and never runs. From the program come the memory of a device, the operations and bytes
of a step, and what devices send each other; from the chip's data sheet, how long each of these
takes at the chip's full speed. The longest of the three bounds the step. Bytes are those of the
program for CPU, which fuses less than a chip's does: as a bound they are too pessimistic.

Operations, bytes and collectives are those of models of two and three layers, continued to the
whole depth: XLA counts the body of a loop once, and layers in a row would take minutes to compile.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


class Chip(NamedTuple):
    """What a data sheet says of one chip, in units a second and bytes."""

    flops: float  # in bfloat16, dense
    memory_speed: float
    memory: float
    link_speed: float  # of all links together, one way
    source: str  # where the figures are from


CHIPS = {
    "v5e": Chip(197e12, 819e9, 16e9, 200e9, "cloud.google.com/tpu/docs/v5e"),
    # Four links of 100 GB/s each way within a host of eight; between hosts a ninth of it.
    "h100": Chip(989e12, 3.35e12, 80e9, 450e9, "nvidia.com/h100, SXM, eight to a host"),
}
MODELS = {
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
# Bytes that a device sends for each byte of what a collective makes, `n` devices in a ring.
COLLECTIVES = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,  # of a part, which is what it makes
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}  # XLA's names


class Cost(NamedTuple):
    """What one device does in a step."""

    flops: float
    bytes: float
    sent: float

    def continued(self, other: "Cost", layers: int) -> "Cost":
        """The cost of `layers` layers, this being that of two and `other` that of three."""
        return Cost(*(a + (b - a) * (layers - 2) for a, b in zip(self, other, strict=True)))


def sent_bytes(program: str, dtype: str) -> float:
    """Returns the bytes that a device sends in the collectives of a compiled program.

    For CPU a program of bfloat16 sends float32, as its products are; on a chip they are not.
    """
    item = ITEM_BYTES | {"f32": ITEM_BYTES[DTYPES[dtype]]}
    total = 0.0
    kinds = "|".join(COLLECTIVES)
    for line in program.splitlines():
        found = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        if not found:
            continue
        made = 0
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
            made += math.prod(int(size) for size in sizes.split(",") if size) * item[dtype]
        total += made * COLLECTIVES[found[2]](group_size(line))
    return total


def group_size(line: str) -> int:
    """Returns how many devices take part in each group of a collective."""
    if "source_target_pairs" in line:
        return 2
    # Written as axes of a mesh and those that take part, as a shape, or one by one.
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}", line)
    if mesh:
        sizes = dict(re.findall(r"('\w+')=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in mesh[2].split(","))
    shape = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if shape:
        return int(shape[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    raise ValueError(f"Expected the groups of a collective, got {line.strip()[:200]}")


def compiled_step(options: dict[str, Any], args: argparse.Namespace, *, stacked: bool) -> Any:
    """Returns the training step of a model, compiled for the mesh."""
    import jax
    import jax.numpy as jnp

    import gpt2_jax
    from gpt2_jax import sharding
    from gpt2_jax.inputs import Layout
    from gpt2_jax.training import step as training
    from gpt2_jax.training.losses import TextBatch

    config = gpt2_jax.GPT2Config(
        **options,
        vocab_size=args.vocab_size,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        dtype=args.dtype,
    )
    mesh = sharding.make_mesh(args.mesh)
    tx = gpt2_jax.make_optimizer(1e-4)

    def make_state() -> Any:
        params = gpt2_jax.init(jax.random.key(0), config.replace(dtype="float32"))
        return gpt2_jax.init_state(gpt2_jax.stack_layers(params) if stacked else params, tx)

    shapes = jax.eval_shape(make_state)
    where = sharding.shardings(shapes, mesh)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        where,
    )
    n_rows = args.rows * sharding.n_batch_shards(mesh) * args.micro_batches
    rows = sharding.batch_sharding(mesh)
    shape = (n_rows, config.n_positions + 1)
    batch = TextBatch(
        ids=jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),
        weights=jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows),
        layout=Layout(),
        inputs_embeds=None,
    )
    specs = tuple(place.spec for place in jax.tree.leaves(where))
    program = training._Program(tx, args.micro_batches, args.remat, None, None, specs)
    lowered = training._train_step.lower(state, batch, None, config=config, program=program)
    return lowered.compile()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the plan of a step, as numbers."""
    import jax

    from gpt2_jax.training import losses

    options = MODELS[args.model]
    n_layers = options.get("n_layer", 12)
    memory = compiled_step(options, args, stacked=True).memory_analysis()
    parts = args.micro_batches
    args.micro_batches = 1
    # In one chunk: a loop's body would be counted once.
    losses.LARGEST_LOGITS = 2**60
    costs = []
    for depth in (2, 3):
        jax.clear_caches()
        program = compiled_step(options | {"n_layer": depth}, args, stacked=False)
        analysis = program.cost_analysis()
        sent = sent_bytes(program.as_text(), args.dtype)
        costs.append(Cost(analysis["flops"], analysis["bytes accessed"], sent))
    cost = costs[0].continued(costs[1], n_layers)
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "flops": cost.flops * parts,
        "bytes": cost.bytes * parts,
        "sent": cost.sent * parts,
    }


def n_devices(mesh: str) -> int:
    """Returns how many devices a mesh has."""
    count = 1
    for size in re.findall(r"=\s*(\d+)", mesh):
        count *= int(size)
    return count


def show(args: argparse.Namespace, plan: dict[str, Any]) -> None:
    """Prints a plan."""
    batch_parts = n_devices(re.sub(r"tensor=\d+", "", args.mesh))
    tokens = args.rows * batch_parts * args.micro_batches * 1024
    print(
        f"{args.model} on {args.mesh}, {tokens:,} tokens a step, {args.dtype}, remat {args.remat}"
    )
    print(
        f"  a device: {plan['arguments'] / 2**30:.1f} GiB of state,"
        f" {plan['temporaries'] / 2**30:.1f} GiB of temporaries; {plan['flops'] / 1e12:.2f} TFLOP,"
        f" {plan['bytes'] / 1e9:.0f} GB from memory, {plan['sent'] / 1e9:.2f} GB sent"
    )
    for name in args.chip:
        chip = CHIPS[name]
        times = {
            "operations": plan["flops"] / chip.flops,
            "memory": plan["bytes"] / chip.memory_speed,
            "links": plan["sent"] / chip.link_speed,
        }
        bound = max(times, key=times.__getitem__)
        fits = plan["arguments"] + plan["temporaries"] < chip.memory
        each = ", ".join(f"{what} {1000 * seconds:.0f} ms" for what, seconds in times.items())
        print(
            f"  {name}: {'fits' if fits else 'does not fit'} into {chip.memory / 1e9:.0f} GB;"
            f" {each}; bound by {bound}, {tokens / times[bound]:,.0f} tokens/s"
        )


def main() -> None:
    """Makes one plan."""
    parser = argparse.ArgumentParser(description="Predict a training step on many chips.")
    parser.add_argument("--model", choices=MODELS, default="gpt2-xl")
    parser.add_argument("--mesh", default="fsdp=8", help="such as data=16,fsdp=16")
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--rows", type=int, default=1, help="windows of a device at a time")
    parser.add_argument("--micro_batches", type=int, default=1)
    parser.add_argument("--remat", default="full", help="none, dots or full")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    # 50,257 divides by no number of devices: see docs/devices.md.
    parser.add_argument("--vocab_size", type=int, default=50_304)
    args = parser.parse_args()
    # Before JAX is imported, which reads it once.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={n_devices(args.mesh)}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    parts = args.micro_batches
    plan = measure(args)
    args.micro_batches = parts
    show(args, plan)
    print(json.dumps(plan))


if __name__ == "__main__":
    main()
