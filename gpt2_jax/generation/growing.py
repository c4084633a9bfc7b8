"""Work that a host drives in parts, with a cache that grows as it goes on.

One program for each of a few sizes of the cache, the next compiled while the present one fills.
Knows caches by their slots alone, and nothing of what is decoded.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Int

from gpt2_jax import cache as kv_cache
from gpt2_jax.cache import KVCache, cache_slots
from gpt2_jax.sharding import automatic

AHEAD = 128  # tokens before the end of a cache at which the program of the next one is compiled
STEPS = 32  # of a part, after which the host looks how far the cache is filled


class Progress(NamedTuple):
    """How far a part has come."""

    state: Any  # a pytree with caches in it, all of one size
    done: Bool[Array, ""]
    used: Int[Array, ""]  # slots that are in use


class Ahead:
    """Compiles a program for the next size of the cache in a thread, while this one is filled.

    The call that later needs the program finds it, or waits for it, instead of compiling it then.
    """

    def __init__(self, pool: ThreadPoolExecutor):
        self.pool = pool
        self.compiling: dict[int, Future] = {}  # by the number of slots

    def start(self, slots: int, lower: Callable[[], Any]) -> None:
        """Begins to compile what `lower` lowers for `slots`, unless that was begun before."""
        if slots not in self.compiling:
            # JAX remembers what it has compiled; the program itself is of no use here.
            self.compiling[slots] = self.pool.submit(lambda: lower().compile())

    def finish(self, slots: int) -> None:
        """Waits for the program, not for its success: the call that needs it would compile it."""
        if slots in self.compiling:
            wait([self.compiling[slots]])


@partial(jax.jit, static_argnames="slots")
@automatic
def lengthened(state: Any, *, slots: int) -> Any:
    """Returns a state whose caches have room for `slots` tokens."""

    def lengthen(node):
        return kv_cache.lengthen(node, slots) if isinstance(node, KVCache) else node

    return jax.tree.map(lengthen, state, is_leaf=lambda node: isinstance(node, KVCache))


def to_the_end(
    program: Any, call: Callable[[Any, Any], Any], state: Any, *, used: int, step: int, most: int
) -> Any:
    """Returns the state when it is done.

    Args:
      program: a jitted function that takes a state on by at most `STEPS` steps, as long as the
        cache has room for one more, and returns its `Progress`.
      call: calls what it is given, the program or its `lower`, with a state and all else.
      state: where to begin.
      used: slots that are in use there.
      step: slots that a step needs; the cache has room for one.
      most: slots that will be needed at most.
    """
    slots = _slots_of(state)
    with ThreadPoolExecutor(1) as pool:
        ahead = Ahead(pool)
        while True:
            if used + step > slots:
                slots = cache_slots(slots, most)
                ahead.finish(slots)
                state = lengthened(state, slots=slots)
            if slots < most and slots - used <= max(STEPS * step, AHEAD):
                next_size = cache_slots(slots, most)
                # Shapes alone: the larger cache itself is made when it is needed.
                larger = jax.eval_shape(partial(lengthened, slots=next_size), state)
                ahead.start(next_size, partial(call, program.lower, larger))
            progress = call(program, state)
            state = progress.state
            if progress.done:
                return state
            used = int(progress.used)


def _slots_of(state: Any) -> int:
    """Returns how many slots the caches of a state have."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, KVCache))
    return next(node.slots for node in nodes if isinstance(node, KVCache))
