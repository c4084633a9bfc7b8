"""The step of training: against PyTorch's AdamW on HF's model, and against itself by other ways."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import gpt2_jax
from gpt2_jax.pretrained import weights
from gpt2_jax.training.losses import next_token_loss
from gpt2_jax.training.optimizers import make_optimizer, orthogonalize, warmup_cosine
from gpt2_jax.training.step import init_state, train_step
from tests.reference import TINY, hf_model, ours

CONFIG = gpt2_jax.GPT2Config(
    **TINY | {"n_layer": 1}, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, dtype="float64"
)
# One for all tests that need no other: a step is compiled for each optimizer.
TX = make_optimizer(1e-3)


@pytest.fixture(scope="module")
def params():
    """Params of `CONFIG` in float64."""
    return gpt2_jax.init(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def batch():
    """Ids of six windows."""
    return np.random.default_rng(1).integers(0, 61, (6, 17))


def torch_loss(model, ids, scale):
    """Sum of the losses of a batch, in float64, times `scale`."""
    logits = model(torch.tensor(ids)).logits[:, :-1]
    return (
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(ids[:, 1:]).reshape(-1)
        )
        * scale
    )


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_20_steps_of_adamw_follow_pytorch(batch, micro_batches):
    steps, warmup, peak, end, clip, decay = 20, 4, 3e-3, 3e-4, 0.7, 0.1
    model = hf_model(**TINY).eval()  # without dropout
    config, params = ours(model)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), eps=1e-8)

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (
            end + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * (peak - end)
        ) / peak

    scheduler = torch.optim.lr_scheduler.LambdaLR(reference, factor)
    tx = make_optimizer(
        warmup_cosine(peak, steps=steps, warmup_steps=warmup, end=end),
        weight_decay=decay,
        max_grad_norm=clip,
    )
    state = init_state(params, tx)
    clipped = 0
    for step in range(steps):
        ids = np.roll(batch, step, axis=0)
        reference.zero_grad()
        parts = np.split(ids, micro_batches)
        losses = [torch_loss(model, part, 1 / micro_batches) for part in parts]
        for loss in losses:
            loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        # PyTorch divides by the norm plus 1e-6, optax by the norm: the one difference is taken out.
        torch.nn.utils.clip_grad_norm_(
            model.parameters(), clip * (norm.item() + 1e-6) / norm.item()
        )
        clipped += norm.item() > clip
        reference.step()
        scheduler.step()
        state, metrics = train_step(state, ids, config=config, tx=tx, micro_batches=micro_batches)
        np.testing.assert_allclose(metrics["loss"], sum(losses).item(), rtol=1e-10)
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-10)
    assert clipped > 0
    assert state.step == steps
    expected = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for name, leaf in weights.to_hf(state.params).items():
        np.testing.assert_allclose(leaf, expected.pop(name), rtol=0, atol=1e-9, err_msg=name)
    assert not expected


def test_the_loss_is_hfs_and_its_ignored_labels_are_weights_of_zero(params, batch, rng):
    model = hf_model(**TINY)
    config, params = ours(model)
    ignored = rng.random(batch.shape) < 0.3
    labels = torch.tensor(np.where(ignored, -100, batch))
    # HF computes its loss in float32.
    expected = model(torch.tensor(batch), labels=labels).loss.item()
    loss, metrics = next_token_loss(params, batch, config=config, weights=(~ignored).astype(float))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["weight"] == (~ignored[:, 1:]).sum()


def test_fractional_weights_make_a_weighted_mean(params, batch, rng):
    logp = jax.nn.log_softmax(gpt2_jax.apply(params, batch[:, :-1], config=CONFIG))
    losses = -np.take_along_axis(np.asarray(logp), batch[:, 1:, None], -1)[..., 0]
    counts = rng.random(batch.shape)
    loss, _ = next_token_loss(params, batch, config=CONFIG, weights=counts)
    np.testing.assert_allclose(loss, np.average(losses, weights=counts[:, 1:]), rtol=1e-12)
    loss, _ = next_token_loss(params, batch, config=CONFIG, weights=np.zeros(batch.shape))
    assert loss == 0


def test_a_mask_of_integers_is_weights(params, batch):
    mask = np.ones(batch.shape, int)
    mask[:, 9:] = 0
    loss, _ = next_token_loss(params, batch, config=CONFIG, weights=mask)
    expected, _ = next_token_loss(params, batch[:, :9], config=CONFIG)
    np.testing.assert_allclose(loss, expected, rtol=1e-14)


def test_padding_without_weight_changes_neither_loss_nor_gradient(params, batch):
    def loss(params, ids, weights):
        return next_token_loss(params, ids, config=CONFIG, weights=weights)[0]

    step = jax.jit(jax.value_and_grad(loss))
    padded = np.pad(batch, ((0, 0), (0, 4)), constant_values=5)
    real = np.pad(np.ones(batch.shape), ((0, 0), (0, 4)))
    chex.assert_trees_all_close(
        step(params, padded, real), step(params, batch, None), rtol=0, atol=1e-14
    )


def test_a_fresh_model_knows_nothing(params, batch):
    loss, _ = next_token_loss(params, batch, config=CONFIG)
    assert abs(loss - math.log(61)) < 0.05


def test_one_batch_is_learnt_by_heart(params, batch):
    tx = make_optimizer(1e-2)
    state = init_state(params, tx)
    for _ in range(150):
        state, metrics = train_step(state, batch[:2], config=CONFIG, tx=tx)
    assert metrics["loss"] < 0.02


def test_micro_batches_and_remat_change_only_rounding(params, batch, rng):
    counts = rng.random(batch.shape)  # parts that weigh differently

    def step(**options):
        state, metrics = train_step(
            init_state(params, TX), batch, config=CONFIG, tx=TX, weights=counts, **options
        )
        return state.params, metrics

    whole = step()
    for options in ({"micro_batches": 3}, {"micro_batches": 6, "remat": True}):
        chex.assert_trees_all_close(step(**options), whole, rtol=1e-7, atol=1e-9)


def test_only_matrices_decay(params):
    tx = make_optimizer(1.0, weight_decay=0.1, max_grad_norm=None)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for (path, update), leaf in zip(
        jax.tree.leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        name = path[-1].key
        expected = -0.1 * leaf if name in ("kernel", "embedding") else jnp.zeros_like(leaf)
        np.testing.assert_allclose(update, expected, atol=1e-15, err_msg=str(path))


def test_the_schedule_by_hand():
    rate = warmup_cosine(1.0, steps=14, warmup_steps=4, end=0.1)
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 0.1 + 0.45 * (1 + math.cos(math.pi / 10)), 0.55, 0.1, 0.1]
    np.testing.assert_allclose(
        [rate(step) for step in (0, 1, 2, 3, 4, 5, 9, 14, 99)], expected, atol=1e-7
    )
    assert warmup_cosine(1.0, steps=1)(0) == 1.0


def test_the_schedule_holds_its_peak_until_the_decay():
    rate = warmup_cosine(1.0, steps=20, warmup_steps=4, decay_steps=10, end=0.1)
    expected = [0.2, 1.0, 1.0, 1.0, 0.1 + 0.45 * (1 + math.cos(math.pi / 10)), 0.55, 0.1]
    found = [rate(step) for step in (0, 4, 7, 10, 11, 15, 20)]
    np.testing.assert_allclose(found, expected, atol=1e-7)
    with pytest.raises(ValueError, match="`decay_steps` must be in"):
        warmup_cosine(1.0, steps=20, warmup_steps=4, decay_steps=17)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_muon_keeps_the_directions_of_a_matrix_and_evens_out_its_strengths(shape):
    matrix = jax.random.normal(jax.random.key(0), shape, jnp.float64)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    core = u.T @ np.asarray(orthogonalize(matrix)) @ vt.T
    strengths = np.diag(core)
    np.testing.assert_allclose(core - np.diag(strengths), 0, atol=1e-9)
    assert strengths.min() > 0.6
    assert strengths.max() < 1.3


def test_muon_steps_the_layers_matrices_and_adam_all_else(params, batch):
    grads = jax.grad(lambda params: next_token_loss(params, batch, config=CONFIG)[0])(params)
    updates = {}
    for kind in ("muon", "adamw"):
        tx = make_optimizer(1.0, kind=kind, weight_decay=0.0, max_grad_norm=None)
        updates[kind], _ = tx.update(grads, tx.init(params), params)
    attn = grads["h"]["0"]["attn"]
    for name, n_matrices in (("c_attn", 3), ("c_proj", 1)):
        found = np.split(
            np.asarray(updates["muon"]["h"]["0"]["attn"][name]["kernel"]), n_matrices, 1
        )
        grad = np.split(np.asarray(attn[name]["kernel"]), n_matrices, 1)
        for update, matrix in zip(found, grad, strict=True):
            # The first step of Nesterov momentum is 1 + 0.95 times the gradient.
            expected = -0.2 * max(matrix.shape) ** 0.5 * orthogonalize(1.95 * matrix)
            np.testing.assert_allclose(update, expected, rtol=1e-6, atol=1e-9)
    others = [
        jax.tree.map_with_path(lambda path, x: 0 if path[-1].key == "kernel" else x, updates[kind])
        for kind in ("muon", "adamw")
    ]
    chex.assert_trees_all_close(*others, atol=1e-12)
    with pytest.raises(ValueError, match="`kind` must be"):
        make_optimizer(1.0, kind="sgd")


def test_dropout_comes_from_the_key_the_step_and_the_part(params, batch):
    config = CONFIG.replace(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    tx = make_optimizer(0.0)
    row = batch[:1]

    def losses(seed, ids=row, **options):
        state = init_state(params, tx)
        out = []
        for _ in range(2):  # the learning rate is 0: only dropout can change the loss
            state, metrics = train_step(
                state, ids, jax.random.key(seed), config=config, tx=tx, **options
            )
            out.append(float(metrics["loss"]))
        return out

    alone = losses(1)
    assert losses(1) == alone
    assert len({*alone, *losses(2)}) == 4  # two keys, two steps each
    # Parts that are equal draw masks that are not.
    first, second = losses(1, np.repeat(row, 2, axis=0), micro_batches=2)
    assert first not in alone
    assert first != second


def test_compute_in_bfloat16_keeps_float32_weights(batch):
    params = jax.tree.map(
        lambda leaf: leaf.astype("bfloat16"), gpt2_jax.init(jax.random.key(0), CONFIG)
    )
    tx = make_optimizer(1e-3)
    config = CONFIG.replace(dtype="bfloat16")
    state = init_state(params, tx)
    losses = []
    for _ in range(30):
        state, metrics = train_step(state, batch, config=config, tx=tx)
        losses.append(float(metrics["loss"]))
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.opt_state))} <= {
        "float32",
        "int32",
    }
    assert metrics["loss"].dtype == "float32"
    assert losses[-1] < losses[0] - 0.5
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_other_optimizers_fit_in(params, batch):
    tx = optax.sgd(0.1)
    gradient = jax.grad(lambda params: next_token_loss(params, batch, config=CONFIG)[0])(params)
    state, _ = train_step(init_state(params, tx), batch, config=CONFIG, tx=tx)
    expected = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, params, gradient)
    chex.assert_trees_all_close(state.params, expected, rtol=0, atol=1e-15)


def test_windows_reach_one_past_the_positions(params, rng):
    ids = rng.integers(0, 61, (1, 25))  # n_positions is 24
    loss, metrics = next_token_loss(params, ids, config=CONFIG)
    assert metrics["weight"] == 24
    assert np.isfinite(loss)
    with pytest.raises(ValueError, match="got 26"):
        next_token_loss(params, np.pad(ids, ((0, 0), (0, 1))), config=CONFIG)


@pytest.mark.parametrize(
    "ids, options, message",
    [
        ([[1, 2, 61]], {}, r"in \[0, 61\).*got 61"),
        ([[1, -1, 2]], {}, r"in \[0, 61\).*got -1"),
        ([[1]], {}, "at least 2 columns.*got 1"),
        ([[1, 2]], {"weights": np.ones((2, 2))}, r"shape of `ids`, \[1, 2\], got \[2, 2\]"),
        (
            [[1, 2]] * 3,
            {"micro_batches": 2},
            "3 rows of `ids` must split into `micro_batches`, got 2",
        ),
        ([[1, 2]] * 3, {"micro_batches": 0}, "got 0"),
    ],
)
def test_a_bad_batch_is_named_and_the_state_lives_on(params, ids, options, message):
    state = init_state(params, TX)
    with pytest.raises(ValueError, match=message):
        train_step(state, np.array(ids), config=CONFIG, tx=TX, **options)
    train_step(state, np.array([[1, 2, 3]]), config=CONFIG, tx=TX)


def test_a_schedule_must_warm_up_before_it_ends():
    with pytest.raises(
        ValueError, match=r"`warmup_steps` must be in \[0, 10\) \(`steps`\), got 10"
    ):
        warmup_cosine(1.0, steps=10, warmup_steps=10)


def test_new_batches_compile_nothing_new(params, batch):
    sgd = optax.sgd(0.1)
    traced = []

    def update(updates, state, params=None):
        traced.append(1)  # runs when the step is traced, not when it is called
        return sgd.update(updates, state, params)

    tx = optax.GradientTransformation(sgd.init, update)
    state, _ = train_step(init_state(params, tx), batch, config=CONFIG, tx=tx)
    assert len(traced) == 1
    for shift in range(3):
        state, _ = train_step(state, np.roll(batch, shift), config=CONFIG, tx=tx)
    assert len(traced) == 1
    train_step(state, batch[:2], config=CONFIG, tx=tx)  # another shape, another program
    assert len(traced) == 2
