"""Settings and small models that the tests share."""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# The workers of a run use all cores: one compilation must not try to, too. Programs are the same.
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_parallel_codegen_split_count=1"
    # For meshes; what is placed nowhere lies on the first, as if there were one.
    " --xla_force_host_platform_device_count=8"
    # Nearly all programs of the tests are tiny and run once: LLVM's optimisations take several
    # times as long as they save, where XLA's older emitters leave it less to do. `.ci/run` also
    # tests parity in the programs that users get.
    " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    f" {os.environ.get('XLA_FLAGS', '')}"  # the caller's come last, and hold
)

import jax
import numpy as np
import pytest

# Most of the time goes into compiling: what one process of a run has compiled, or a run before it,
# the others find. Programs are found by their whole text, and by JAX's version.
XLA_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(XLA_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


# Traced programs are millions of small objects, which Python's collector would look through again
# and again.
gc.set_threshold(200_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs():
    """Drops the programs of a file with it: together they take many gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def rng():
    """A numpy generator with a fixed seed."""
    return np.random.default_rng(0)
