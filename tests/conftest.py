"""All tests run on 8 CPU devices, with float64 to be had; warnings are errors (pyproject.toml)."""

import os
import tracemalloc  # noqa: F401  (imported late, it breaks within etils' lazy imports)

from fake_devices import xla_flags

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    f'{xla_flags(devices=8)} '
    # On a machine under load the threads of 8 devices may be minutes apart; XLA would end the process.
    '--xla_cpu_collective_call_warn_stuck_timeout_seconds=300 '
    '--xla_cpu_collective_call_terminate_timeout_seconds=900'
)

import jax
import numpy as np
import pytest

CACHE = os.path.expanduser('~/.cache/epsanet_jax/xla-tests')

jax.config.update('jax_enable_x64', True)
jax.config.update('jax_compilation_cache_dir', CACHE)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
# Programs started by the tests share it.
os.environ['JAX_COMPILATION_CACHE_DIR'] = CACHE


@pytest.fixture
def strict():
    """Strict dtype promotion: every change of type must be written out."""
    with jax.numpy_dtype_promotion('strict'):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory):
    """The digits, prepared once."""
    from epsanet_jax.data import digits

    folder = tmp_path_factory.mktemp('tfds')
    digits.prepare(str(folder))
    return str(folder)
