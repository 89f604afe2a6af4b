"""The kernel for convolutions, computed by XLA's operations, against XLA's own convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epsanet_jax.ops import pallas_convolve, rewrites
from epsanet_jax.ops.plain import Window

# images, rows, columns, groups, inputs and outputs of a group, kernel, stride
FORWARD = {
    'half registers': (3, 4, 6, 2, 8, 8, 7, 1),
    'no groups': (2, 4, 4, 1, 32, 16, 3, 1),
    'groups of two chunks': (2, 6, 4, 2, 32, 32, 3, 1),
    'tiles of one row': (2, 7, 7, 4, 16, 16, 5, 1),
    'more images than lanes': (130, 2, 2, 2, 8, 8, 3, 1),
    'stride': (2, 8, 12, 4, 16, 4, 5, 2),
    'stride, odd sizes': (2, 9, 7, 2, 16, 8, 9, 2),
    'stride 3': (2, 10, 8, 2, 16, 8, 5, 3),
}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('case', FORWARD)
def test_convolution_equals_stock(rng, case, dtype):
    n, h, w, groups, inputs, outputs, size, stride = FORWARD[case]
    x = jnp.asarray(rng.standard_normal((n, h, w, groups * inputs)), dtype)
    kernel = jnp.asarray(rng.standard_normal((size, size, inputs, groups * outputs)), dtype)
    half = size // 2, size // 2
    assert pallas_convolve.fits(x.shape, x.dtype, kernel.shape, groups, stride)
    actual = jax.jit(lambda x, k: pallas_convolve.convolve(x, k, groups, stride, interpret=True))(x, kernel)
    window = Window((stride, stride), (half, half))
    expected = rewrites.stock(x.astype('float32'), kernel.astype('float32'), window, groups)
    assert (actual.dtype, actual.shape) == (x.dtype, expected.shape)
    tolerance = 1e-5 if dtype == 'float32' else 2**-8
    limit = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual.astype('float32'), expected, rtol=tolerance, atol=limit)
