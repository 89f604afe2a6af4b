"""Images beside each other: the same results from convolutions of one wide image, where they pay."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from epsanet_jax.ops import by_group, grouped_conv
from epsanet_jax.ops.plain import Window, conv
from epsanet_jax.ops.wide import Wide


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Several devices keep their own images; the tests have few."""
    monkeypatch.setattr(jax, 'device_count', lambda: 1)


def stock(x, kernels, window):
    kh, kw, inputs, groups, outputs = kernels.shape
    kernel = kernels.reshape(kh, kw, inputs, groups * outputs)
    return conv(x, kernel, window.strides, window.padding, groups, window.dilation)


def with_gradients(function, x, kernels, window):
    y = function(x, kernels, window)
    dy = jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    dx = jax.linear_transpose(lambda x: function(x, kernels, window), x)(dy)
    return y, *dx, *jax.linear_transpose(lambda k: function(x, k, window), kernels)(dy)


def draw(rng, groups, inputs, outputs, size=(9, 10), kernel=(3, 3), images=4):
    x = rng.standard_normal((images, *size, groups * inputs))
    return jnp.asarray(x), jnp.asarray(rng.standard_normal((*kernel, inputs, groups, outputs)))


def images_of_convolutions(function, *arguments):
    """Returns the number of images of each convolution in the program."""
    text = jax.jit(function).lower(*arguments).as_text()
    return [int(n) for n in re.findall(r'stablehlo\.convolution.*?: \(tensor<(\d+)x', text)]


@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize(
    ('window', 'kernel'),
    [
        (Window(padding=((1, 1), (1, 1))), (3, 3)),
        (Window(padding=((0, 0), (0, 0))), (3, 3)),
        (Window(padding=((2, 1), (2, 0))), (3, 3)),
        (Window((2, 2), ((1, 1), (1, 1))), (3, 3)),
        (Window((1, 3), ((1, 1), (1, 2))), (2, 5)),
        (Window((1, 1), ((2, 2), (3, 3)), (2, 3)), (3, 3)),
        (Window((2, 1), ((2, 3), (1, 0)), (1, 2)), (3, 3)),
    ],
)
def test_wide_images_give_the_same_value_and_gradients(rng, groups, window, kernel):
    x, kernels = draw(rng, groups, 36, 40, kernel=kernel)
    forward = images_of_convolutions(lambda x: by_group.conv(x, kernels, window), x)
    assert forward == [1] * groups  # the case is one of wide images
    expected = with_gradients(stock, x, kernels, window)
    actual = jax.jit(with_gradients, static_argnums=(0, 3))(by_group.conv, x, kernels, window)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ('inputs', 'outputs', 'window'),
    [
        (4, 24, Window(padding=((1, 1), (1, 1)))),  # few products
        (36, 128, Window(padding=((1, 1), (1, 1)))),  # many outputs
        (16, 16, Window(padding=((1, 1), (1, 1)))),  # few channels
        (36, 40, Window(padding=((1, 1), (-1, 1)))),  # columns are cut off
        (36, 40, Window(padding=((1, 1), (3, 1)))),  # padding beyond the kernel
    ],
)
def test_images_stay_apart_where_that_is_as_fast(rng, inputs, outputs, window):
    x, kernels = draw(rng, 2, inputs, outputs)
    assert images_of_convolutions(lambda x: by_group.conv(x, kernels, window), x) == [4, 4]


def test_a_symbolic_batch_keeps_images_apart():
    (n,) = jax.export.symbolic_shape('n')
    x = jax.ShapeDtypeStruct((n, 8, 8, 40), jnp.float32)
    window = Window(padding=((1, 1), (1, 1)))
    assert Wide.of(x, 1000, [(window, (3, 3))], 8) == Wide()
    assert Wide.of(x.update(shape=(4, 8, 8, 40)), 1000, [(window, (3, 3))], 8).images == 4


def test_each_device_keeps_its_own_images(monkeypatch):
    x = jax.ShapeDtypeStruct((12, 8, 8, 40), jnp.float32)
    window = Window(padding=((1, 1), (1, 1)))
    monkeypatch.setattr(jax, 'device_count', lambda: 4)
    assert Wide.of(x, 1000, [(window, (3, 3))], 8).images == 3
    monkeypatch.setattr(jax, 'device_count', lambda: 12)
    assert Wide.of(x, 1000, [(window, (3, 3))], 8) == Wide()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_convolution_without_groups_becomes_wide_by_itself(rng, dtype):
    x = jnp.asarray(rng.standard_normal((4, 14, 14, 32)), dtype)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 32, 24)), dtype)
    expected = lax.conv_general_dilated(
        x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    y = jax.jit(grouped_conv)(x, kernel)
    assert y.dtype == dtype
    tolerance = 1e-3 if dtype == jnp.float32 else 1.0
    np.testing.assert_allclose(np.float32(y), np.float32(expected), atol=tolerance)
    assert images_of_convolutions(grouped_conv, x, kernel) == [1]
