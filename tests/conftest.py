"""All tests run on 8 CPU devices with float64 enabled; warnings are errors (pyproject.toml)."""

import os
import tracemalloc  # noqa: F401  (a late import fails in etils' lazy imports)

from fake_devices import xla_flags

os.environ['JAX_PLATFORMS'] = os.environ.get('EPSANET_TESTS_PLATFORMS', 'cpu')  # 'cuda,cpu' for a GPU
os.environ['XLA_FLAGS'] = (
    f'{xla_flags(devices=8)} '
    # On a busy machine the threads of 8 devices may be minutes apart, and XLA would end the process.
    '--xla_cpu_collective_call_warn_stuck_timeout_seconds=300 '
    '--xla_cpu_collective_call_terminate_timeout_seconds=900'
)

import jax
import numpy as np
import pytest
from PIL import Image

CACHE = os.path.expanduser('~/.cache/epsanet_jax/xla-tests')

jax.config.update('jax_enable_x64', True)
jax.config.update('jax_compilation_cache_dir', CACHE)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
# Processes that the tests start share the cache.
os.environ['JAX_COMPILATION_CACHE_DIR'] = CACHE


@pytest.fixture
def strict():
    """Strict dtype promotion: every conversion must be explicit."""
    with jax.numpy_dtype_promotion('strict'):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory):
    """Folder with the digits as a TFDS dataset, prepared once."""
    from epsanet_jax.data import digits

    folder = tmp_path_factory.mktemp('tfds')
    digits.prepare(str(folder))
    return str(folder)


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """Folder with five images, some of unusual sizes and names, one subfolder and one other file."""
    folder = tmp_path_factory.mktemp('images')
    generator = np.random.default_rng(0)
    (folder / 'sub.jpg').mkdir()  # a folder with the name of an image
    for name, size in (
        ('a.png', (40, 60)),
        ('b, "c".png', (90, 50)),
        ('ü.JPG', (64, 64)),
        ('sub.jpg/d.webp', (33, 200)),
        ('sub.jpg/e.png', (32, 32)),
    ):
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / 'notes.txt').write_text('not an image')
    return folder
