"""The forms of the max-pooling. Its padding, ties and NaN are in test_traps.py."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epsanet_jax.models.pool import _max_and_place, _max_of_slices, _max_window, max_pool


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


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (7, 8), (8, 7)])
def test_places_and_slices_agree_in_values_and_derivatives_with_ties_and_nan(rng, size):
    x = rng.integers(0, 3, (2, *size, 3)).astype(np.float32)
    x[0, 0, 0] = np.nan, 5, np.inf
    x = jnp.asarray(x)
    dx = jnp.asarray(rng.integers(-9, 9, x.shape), np.float32)
    for a, b in zip(*(value_and_gradient(pool, x) for pool in (_max_and_place, _max_of_slices)), strict=True):
        np.testing.assert_array_equal(a, b)
    tangents = [jax.jvp(pool, (x,), (dx,))[1] for pool in (_max_and_place, _max_of_slices)]
    np.testing.assert_array_equal(*tangents)


def test_places_can_be_mapped_and_differentiated_twice(rng):
    x = jnp.asarray(rng.standard_normal((2, 3, 5, 6, 2)), np.float32)
    both = [
        jax.vmap(lambda x, p=pool: value_and_gradient(p, x))(x) for pool in (_max_and_place, _max_of_slices)
    ]
    for a, b in zip(*both, strict=True):
        np.testing.assert_array_equal(a, b)

    def bend(pool, x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(pool(x) ** 3))(x) ** 2)

    second = [jax.grad(functools.partial(bend, pool))(x[0]) for pool in (_max_and_place, _max_of_slices)]
    np.testing.assert_allclose(*second, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_places_keeps_one_byte_for_each_output(rng):
    x = jnp.asarray(rng.standard_normal((2, 8, 8, 4)), np.float32)
    kept = jax.tree.leaves(jax.vjp(_max_and_place, x)[1])
    assert [(a.shape, a.dtype) for a in kept if a.ndim] == [((2, 4, 4, 4), np.int8)]


def test_the_form_depends_on_the_platform():
    x, platforms = jnp.ones((1, 8, 8, 1)), ('cpu', 'cuda', 'rocm', 'tpu')
    traced = jax.jit(jax.grad(lambda x: jnp.sum(max_pool(x)))).trace(x)
    texts = [traced.lower(lowering_platforms=(p,)).as_text() for p in platforms]
    assert ['select_and_scatter' in text for text in texts] == [False, False, False, True]
    assert [bool(re.search('compare.*i8>', text)) for text in texts] == [False, True, True, False]
