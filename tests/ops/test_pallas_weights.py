"""The kernel for weight gradients, computed by XLA's operations, against XLA's own convolution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epsanet_jax.ops import pallas_weights, rewrites
from epsanet_jax.ops.plain import Window

# images, rows, columns, groups, inputs and outputs of a group, kernel, stride
CASES = {
    'own groups': (3, 4, 6, 2, 8, 2, 3, 1),
    'merged groups': (2, 4, 4, 4, 4, 1, 5, 1),
    'groups of two chunks, several tiles': (2, 6, 4, 2, 32, 16, 3, 1),
    'more images than lanes': (130, 2, 2, 2, 8, 1, 3, 1),
    'stride 2, even and odd sizes': (2, 8, 5, 2, 8, 2, 5, 2),
    'stride 3, several tiles': (2, 11, 12, 2, 8, 16, 3, 3),
}


def window(size, stride):
    half = size // 2, size // 2
    return Window((stride, stride), (half, half))


def arguments(rng, case, dtype):
    n, h, w, groups, inputs, outputs, size, stride = CASES[case]
    x = jnp.asarray(rng.standard_normal((n, h, w, groups * inputs)), dtype)
    rows, columns = -(-h // stride), -(-w // stride)
    dy = jnp.asarray(rng.standard_normal((n, rows, columns, groups * outputs)), dtype)
    return x, dy, groups, stride, (size, size, inputs, groups * outputs)


def stock(x, dy, groups, stride, shape):
    def forward(kernel):
        return rewrites.stock(x, kernel, window(shape[0], stride), groups)

    return jax.linear_transpose(forward, jax.ShapeDtypeStruct(shape, x.dtype))(dy)[0]


@pytest.mark.parametrize(
    ('case', 'dtype', 'tolerance'),
    [
        ('own groups', 'float32', 1e-5),
        ('merged groups', 'float32', 1e-5),
        ('groups of two chunks, several tiles', 'float32', 1e-5),
        ('more images than lanes', 'float32', 1e-5),
        ('stride 2, even and odd sizes', 'float32', 1e-5),
        ('stride 3, several tiles', 'float32', 1e-5),
        ('merged groups', 'bfloat16', 2**-8),
        ('stride 2, even and odd sizes', 'bfloat16', 2**-8),
    ],
)
def test_weight_gradient_equals_stock(rng, case, dtype, tolerance):
    x, dy, groups, stride, shape = arguments(rng, case, dtype)
    assert pallas_weights.fits(x.shape, x.dtype.itemsize, shape, groups, stride)
    gradient = functools.partial(
        pallas_weights.weight_gradient, groups=groups, size=shape[0], stride=stride, interpret=True
    )
    actual = jax.jit(gradient)(x, dy)
    expected = stock(x.astype('float32'), dy.astype('float32'), groups, stride, shape)
    assert (actual.dtype, actual.shape) == (x.dtype, shape)
    limit = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual.astype('float32'), expected, rtol=tolerance, atol=limit)
