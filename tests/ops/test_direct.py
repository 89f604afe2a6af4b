"""Multiply-adds of shifted images against XLA's own convolution and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epsanet_jax.ops import direct, rewrites
from epsanet_jax.ops.plain import Window

CASES = {
    'depthwise': ((6, 7), (3, 3), 8, 1, 1, Window((1, 1), ((1, 1), (1, 1)))),
    'a stride': ((7, 6), (5, 3), 4, 1, 1, Window((2, 3), ((2, 2), (1, 1)))),
    'a stride larger than the kernel': ((8, 9), (2, 1), 4, 1, 1, Window((3, 2), ((0, 1), (0, 0)))),
    'a dilation': ((9, 8), (3, 2), 4, 1, 1, Window((2, 1), ((2, 1), (3, 0)), (3, 2))),
    'several inputs': ((5, 6), (3, 3), 4, 3, 1, Window((1, 1), ((1, 1), (1, 1)))),
    'several outputs': ((5, 6), (3, 3), 4, 1, 3, Window((2, 2), ((1, 1), (1, 1)))),
    'cropped images': ((8, 9), (3, 3), 2, 2, 2, Window((1, 2), ((-1, 2), (0, -2)))),
    'more multiply-adds than one loop': ((6, 5), (5, 5), 2, 2, 2, Window((1, 1), ((2, 2), (2, 2)))),
    'several blocks': ((4, 33), (1, 3), 2, 1, 1, Window((1, 1), ((0, 0), (1, 1)))),
}


@pytest.mark.parametrize('images', [1, 3, 16])
@pytest.mark.parametrize('by_image', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_all_directions_equal_stock(rng, case, by_image, images):
    size, kernel_size, groups, inputs, outputs, window = CASES[case]
    x = jnp.asarray(rng.standard_normal((images, *size, groups * inputs)))
    kernel = jnp.asarray(rng.standard_normal((*kernel_size, inputs, groups * outputs)))
    y, pull = jax.vjp(lambda x, kernel: rewrites.stock(x, kernel, window, groups), x, kernel)
    dy = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
    dx, dkernel = pull(dy)

    @jax.jit
    def directions(x, kernel, dy):
        return (
            direct.forward(x, kernel, window, groups, by_image),
            direct.input_gradient(dy, kernel, window, groups, size, by_image),
            direct.weight_gradient(x, dy, window, groups, kernel_size, by_image),
        )

    for actual, expected in zip(directions(x, kernel, dy), (y, dx, dkernel), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures('strict')
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('by_image', [False, True])
def test_no_type_is_promoted_implicitly(by_image, dtype):
    x, kernel, window = jnp.ones((2, 4, 4, 4), dtype), jnp.ones((3, 3, 2, 4), dtype), Window()
    y = direct.forward(x, kernel, window, 2, by_image)
    dx = direct.input_gradient(y, kernel, window, 2, (4, 4), by_image)
    dkernel = direct.weight_gradient(x, y, window, 2, (3, 3), by_image)
    assert {a.dtype for a in (y, dx, dkernel)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize('by_image', [False, True])
def test_half_precision_is_added_up_in_float32(rng, by_image):
    x, kernel = (
        jnp.asarray(rng.uniform(1, 2, shape), jnp.bfloat16) for shape in ((8, 9, 9, 4), (9, 9, 1, 4))
    )
    window = Window((1, 1), ((0, 0), (0, 0)))
    actual = direct.forward(x, kernel, window, 4, by_image)
    expected = rewrites.stock(x.astype(jnp.float32), kernel.astype(jnp.float32), window, 4)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual, expected.astype(jnp.bfloat16))
