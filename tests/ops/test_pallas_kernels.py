"""The kernels for TPUs, computed by XLA's operations, against XLA's own convolutions and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from epsanet_jax.ops import pallas_convolve, pallas_input, pallas_weights, rewrites
from epsanet_jax.ops.pallas_call import clear
from epsanet_jax.ops.plain import Window

PYRAMID = (3, 5, 7, 9), (1, 4, 8, 16)
# images, rows, columns and channels of images; sizes, groups and outputs of each convolution; stride
CASES = {
    'pyramid': (2, 8, 8, 64, *PYRAMID, (16,) * 4, 1),
    'pyramid, stride 2': (2, 8, 8, 64, *PYRAMID, (32,) * 4, 2),
    'odd sizes, stride 2': (2, 9, 7, 64, *PYRAMID, (16, 32, 48, 64), 2),
    'stride 3, more images than lanes': (130, 5, 4, 32, (3, 9), (1, 4), (16, 16), 3),
    'one column': (2, 6, 1, 32, (5,), (2,), (16,), 1),
    'one input in a group': (1, 6, 6, 16, (3,), (16,), (16,), 1),
    'registers of two thirds': (1, 6, 6, 32, (3,), (4,), (48,), 1),
    'tiles of a row in a loop, and two others': (1, 2, 14, 256, (3, 5), (1, 4), (64, 64), 1),
}


WITH_TYPES = [
    *((case, 'float32') for case in CASES),
    ('pyramid', 'bfloat16'),
    ('odd sizes, stride 2', 'bfloat16'),
]
in_each = pytest.mark.parametrize(('case', 'dtype'), WITH_TYPES)


def convolutions(rng, case, dtype):
    """Returns images, kernels, groups, gradients of the outputs, stride, and XLA's convolutions."""
    n, h, w, channels, sizes, groups, outputs, stride = CASES[case]
    each = list(zip(sizes, groups, outputs, strict=True))
    x = jnp.asarray(rng.standard_normal((n, h, w, channels)), dtype)
    kernels = [jnp.asarray(rng.standard_normal((k, k, channels // g, o)), dtype) for k, g, o in each]
    small = -(-h // stride), -(-w // stride)
    dys = [jnp.asarray(rng.standard_normal((n, *small, o)), dtype) for o in outputs]
    windows = [Window((stride, stride), ((k // 2, k // 2),) * 2) for k in sizes]

    def convolve(x, kernels):
        return [rewrites.stock(x, *settings) for settings in zip(kernels, windows, groups, strict=True)]

    return x, kernels, groups, dys, stride, convolve


def single(arrays):
    return jax.tree.map(lambda a: a.astype('float32'), arrays)


def assert_equal(actual, expected, dtype):
    assert (actual.dtype, actual.shape) == (jnp.dtype(dtype), expected.shape)
    tolerance = 1e-5 if dtype == 'float32' else 2**-8
    limit = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual.astype('float32'), expected, rtol=tolerance, atol=limit)


@in_each
def test_input_gradient_equals_stock(rng, case, dtype):
    x, kernels, groups, dys, stride, convolve = convolutions(rng, case, dtype)

    @jax.jit
    def gradient(dys, kernels):
        return pallas_input.input_gradient(x.shape, dys, kernels, groups, stride, interpret=True)

    (expected,) = jax.linear_transpose(lambda x: convolve(x, single(kernels)), single(x))(single(dys))
    assert_equal(gradient(dys, kernels), expected, dtype)


@in_each
def test_weight_gradients_equal_stock(rng, case, dtype):
    x, kernels, groups, dys, stride, convolve = convolutions(rng, case, dtype)

    @jax.jit
    def gradients(x, dys):
        sizes = tuple(k.shape[0] for k in kernels)
        return pallas_weights.weight_gradients(x, dys, groups, sizes, stride, interpret=True)

    transpose = jax.linear_transpose(lambda kernels: convolve(single(x), kernels), single(kernels))
    (expected,) = transpose(single(dys))
    for a, b in zip(gradients(x, dys), expected, strict=True):
        assert_equal(a, b, dtype)


@in_each
def test_convolutions_equal_stock(rng, case, dtype):
    x, kernels, groups, _, stride, convolve = convolutions(rng, case, dtype)
    ours = jax.jit(lambda x, kernels: pallas_convolve.convolve(x, kernels, groups, stride, interpret=True))
    for a, b in zip(ours(x, kernels), convolve(single(x), single(kernels)), strict=True):
        assert_equal(a, b, dtype)


@pytest.mark.parametrize('shape', [(4, 3), (2, 3, 2, 90, 8, 128), (1152, 512), (1031, 128)])
def test_clear_fills_all_with_zeros(shape):
    def kernel(out):
        out[...] = jnp.ones_like(out)
        clear([out])

    cleared = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(shape, 'bfloat16'), interpret=True)()
    np.testing.assert_array_equal(cleared.astype('float32'), np.zeros(shape))


def test_loops_have_a_constant_number_of_steps(rng):
    # Pallas lowers the body of any other loop twice.
    x, kernels, groups, dys, stride, _ = convolutions(rng, 'pyramid', 'float32')
    sizes = tuple(k.shape[0] for k in kernels)
    for function, *args in [
        (lambda x, kernels: pallas_convolve.convolve(x, kernels, groups, stride), x, kernels),
        (lambda dys, k: pallas_input.input_gradient(x.shape, dys, k, groups, stride), dys, kernels),
        (lambda x, dys: pallas_weights.weight_gradients(x, dys, groups, sizes, stride), x, dys),
    ]:
        text = str(jax.make_jaxpr(function)(*args))
        assert 'scan[' in text
        assert 'while[' not in text
