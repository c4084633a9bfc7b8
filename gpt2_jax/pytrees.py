"""Frozen dataclasses that are pytrees, of structures that tell their classes apart.

`flax.struct.dataclass` makes such classes through `jax.tree_util.register_dataclass`, and there JAX
(0.8 to 0.10) takes two classes with equal fields for the same: `jax.tree.structure(Greedy())` would
equal that of `Categorical()`. `jax.jit` looks its programs up by that comparison, so where two
hashes share a slot of its table, a greedy call would run the program that draws. Nodes with
functions of their own, as here, are compared by their class as well.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.tree_util import GetAttrKey

Class = TypeVar("Class", bound=type)


def static(**options: Any) -> Any:
    """Returns a field that is a part of the structure: hashable, and compiled in."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def dataclass(cls: Class) -> Class:
    """Returns the class as a frozen dataclass and a pytree; all fields but the `static` are nodes.

    `replace(**fields)` returns a copy with other values. JAX rebuilds objects without `__init__`,
    so that `__post_init__` checks what users give, never tracers.
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)
    nodes = [field.name for field in fields if not field.metadata.get("static")]
    statics = [field.name for field in fields if field.metadata.get("static")]

    def flatten(node):
        return [getattr(node, name) for name in nodes], tuple(getattr(node, n) for n in statics)

    # Named as the fields are, so that paths in messages of JAX read as the code does.
    def flatten_with_keys(node):
        values, structure = flatten(node)
        pairs = zip(map(GetAttrKey, nodes), values, strict=True)
        return list(pairs), structure

    def unflatten(structure, values):
        node = object.__new__(made)
        for name, value in zip([*nodes, *statics], [*values, *structure], strict=True):
            object.__setattr__(node, name, value)  # as the class is frozen
        return node

    made.replace = dataclasses.replace
    # With `flatten` besides: `jit` flattens its arguments at every call and needs no names.
    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made


def classes_of(tree: Any) -> tuple[Any, ...]:
    """Returns the classes of a pytree's nodes, nested as they are; hashable.

    Beside a tree of users' classes, which may be flax's, it keeps their programs apart.
    """
    return _classes(jax.tree.structure(tree))


def _classes(structure: Any) -> tuple[Any, ...]:
    node = structure.node_data()
    if node is None:
        return ()  # a leaf, or None
    node_class, _ = node
    return (node_class, *(_classes(child) for child in structure.children()))
