"""Both forms of the max-pooling. Its padding, ties and NaN are in test_traps.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epsanet_jax.models.pool import _max_of_slices, _max_window, max_pool


def value_and_gradient(pool, x):
    y, pull = jax.vjp(pool, x)
    return y, pull(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))[0]


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (7, 8), (8, 7)])
@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
@pytest.mark.slow
def test_slices_and_window_agree_in_value_and_gradient(rng, size, dtype):
    x = jnp.asarray(rng.permutation(2 * 3 * size[0] * size[1]).reshape(2, *size, 3), dtype)
    slices, window = (value_and_gradient(pool, x) for pool in (_max_of_slices, _max_window))
    assert slices[0].shape == (2, -(-size[0] // 2), -(-size[1] // 2), 3)
    for a, b in zip(slices, window, strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b)


def test_all_but_tpus_use_slices():
    x = jnp.ones((1, 8, 8, 1))
    platforms = ('cpu', 'cuda', 'tpu')
    texts = [jax.jit(max_pool).trace(x).lower(lowering_platforms=(p,)).as_text() for p in platforms]
    assert ['reduce_window' in text for text in texts] == [False, False, True]
