"""The kernel for weight gradients, computed by XLA's operations, against XLA's own convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epsanet_jax.ops import pallas_weights, rewrites
from epsanet_jax.ops.plain import Window

# images, rows, columns, groups, inputs and outputs of a group, kernel
CASES = {
    'own groups': (3, 4, 6, 2, 8, 2, 3),
    'merged groups': (2, 4, 4, 4, 4, 1, 5),
    'groups of two chunks, several tiles': (2, 6, 4, 2, 32, 16, 3),
    'more images than lanes': (130, 2, 2, 2, 8, 1, 3),
}


def window(size):
    half = size // 2, size // 2
    return Window((1, 1), (half, half))


def arguments(rng, case, dtype):
    n, h, w, groups, inputs, outputs, size = CASES[case]
    x = jnp.asarray(rng.standard_normal((n, h, w, groups * inputs)), dtype)
    dy = jnp.asarray(rng.standard_normal((n, h, w, groups * outputs)), dtype)
    return x, dy, groups, size, (size, size, inputs, groups * outputs)


def stock(x, dy, groups, size, shape):
    def forward(kernel):
        return rewrites.stock(x, kernel, window(size), groups)

    return jax.linear_transpose(forward, jax.ShapeDtypeStruct(shape, x.dtype))(dy)[0]


@pytest.mark.parametrize(
    ('case', 'dtype', 'tolerance'),
    [
        ('own groups', 'float32', 1e-5),
        ('merged groups', 'float32', 1e-5),
        ('groups of two chunks, several tiles', 'float32', 1e-5),
        ('more images than lanes', 'float32', 1e-5),
        ('merged groups', 'bfloat16', 2**-8),
    ],
)
def test_weight_gradient_equals_stock(rng, case, dtype, tolerance):
    x, dy, groups, size, shape = arguments(rng, case, dtype)
    assert pallas_weights.fits(x.shape, x.dtype.itemsize, shape, groups)
    actual = jax.jit(lambda x, dy: pallas_weights.weight_gradient(x, dy, groups, size, interpret=True))(x, dy)
    expected = stock(x.astype('float32'), dy.astype('float32'), groups, size, shape)
    assert (actual.dtype, actual.shape) == (x.dtype, shape)
    limit = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual.astype('float32'), expected, rtol=tolerance, atol=limit)
