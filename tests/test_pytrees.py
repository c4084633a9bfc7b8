"""Structures of pytrees tell classes apart, as `jax.jit` needs to choose a program."""

import inspect
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import struct

from gpt2_jax import generation, pytrees
from gpt2_jax.generation.request import Rules
from gpt2_jax.generation.sampling import Greedy
from gpt2_jax.generation.transforms import Chain
from gpt2_jax.interpretability.edits import add, replace
from gpt2_jax.interpretability.taps import Edits
from gpt2_jax.pytrees import classes_of


@pytrees.dataclass
class Shift:
    """One node and one static field."""

    by: Any
    times: int = pytrees.static(default=1)

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError("`times` must be positive.")


@struct.dataclass
class Left:
    by: Any

    def __call__(self, logits, history=None):
        return logits - self.by


@struct.dataclass
class Right:
    by: Any

    def __call__(self, logits, history=None):
        return logits + self.by


def blank(cls):
    """An object of a class with 0 in each field, made as JAX makes one: unchecked."""
    node = object.__new__(cls)
    for name in inspect.get_annotations(cls):
        object.__setattr__(node, name, 0)
    return node


def test_structures_of_all_our_classes_differ():
    homes = (generation.transforms, generation.cuts, generation.rules, generation.sampling)
    named = [vars(home) for home in homes]
    # A set, as modules hold what they import, too.
    ours = {c for names in named for c in names.values() if hasattr(c, "__dataclass_fields__")}
    nodes = [*map(blank, ours), Edits({"wte": 0}), add(0), replace(0)]
    assert len(ours) > 20
    for one, other in combinations(nodes, 2):
        assert jax.tree.structure(one) != jax.tree.structure(other), (one, other)


def test_rules_tell_users_classes_apart():
    def rules(sampler, tap=None):
        return jax.tree.structure(Rules(None, sampler, jnp.array([0]), jnp.int32(0), tap))

    chained = Greedy(Chain((Left(1.0),)))
    other = Greedy(Chain((Right(1.0),)))
    assert rules(chained) != rules(other)
    assert rules(None, Left(1.0)) != rules(None, Right(1.0))
    assert rules(chained) == rules(Greedy(Chain((Left(2.0),))))
    assert hash(classes_of(chained)) != hash(classes_of(other))


def test_numbers_are_leaves_and_static_fields_are_not():
    leaves, structure = jax.tree.flatten(Shift(2.0, times=3))
    assert leaves == [2.0]
    assert structure != jax.tree.structure(Shift(2.0))
    doubled = jax.tree.map(lambda x: 2 * x, Shift(2.0, times=3))
    assert doubled == Shift(4.0, times=3)
    (path, _), *_ = jax.tree_util.tree_leaves_with_path(Shift(2.0))
    assert jax.tree_util.keystr(path) == ".by"


def test_what_users_make_is_checked_and_frozen():
    with pytest.raises(ValueError, match="`times` must be positive"):
        Shift(2.0, times=0)
    with pytest.raises(ValueError, match="`times` must be positive"):
        Shift(2.0).replace(times=0)
    assert Shift(2.0).replace(by=3.0) == Shift(3.0)
    with pytest.raises(AttributeError):
        Shift(2.0).by = 1.0
