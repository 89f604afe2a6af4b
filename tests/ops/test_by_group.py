import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from epsanet_jax.ops import by_group, grouped_conv
from epsanet_jax.ops.plain import Window, conv


def draw(rng, size, kernel, groups=3, inputs=2, outputs=4, images=4):
    x = rng.standard_normal((images, *size, groups * inputs))
    return jnp.asarray(x), jnp.asarray(rng.standard_normal((*kernel, inputs, groups, outputs)))


def stock(x, kernels, window):
    kh, kw, inputs, groups, outputs = kernels.shape
    kernel = kernels.reshape(kh, kw, inputs, groups * outputs)
    return conv(x, kernel, window.strides, window.padding, groups, window.dilation)


def with_gradients(function, x, kernels, window):
    y = function(x, kernels, window)
    dy = jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    dx = jax.linear_transpose(lambda x: function(x, kernels, window), x)(dy)
    return y, *dx, *jax.linear_transpose(lambda k: function(x, k, window), kernels)(dy)


def check(x, kernels, window):
    expected = with_gradients(stock, x, kernels, window)
    actual = jax.jit(with_gradients, static_argnums=(0, 3))(by_group.conv, x, kernels, window)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-11)


@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize(
    'window',
    [
        Window(padding=((1, 1), (1, 1))),
        Window((2, 2), ((1, 1), (1, 1))),
        Window((3, 2), ((0, 2), (3, 1))),
        Window((2, 1), ((2, 3), (1, 0)), (2, 3)),
        Window((1, 2), ((-1, 2), (2, -2))),
        Window((2, 5), ((1, 0), (4, 4))),
        Window((7, 4), ((2, 2), (3, 3))),
    ],
)
@pytest.mark.parametrize('kernel', [(3, 3), (1, 4)])
def test_value_and_gradients_equal_those_of_xla(rng, groups, window, kernel):
    check(*draw(rng, (9, 10), kernel, groups), window)


@pytest.mark.parametrize('largest', [1, 7 * 8 * 4 * 2])
@pytest.mark.parametrize(('groups', 'channels'), [(1, 17), (2, 17), (2, 2)])
def test_weight_gradients_of_parts_of_the_images_equal_those_of_all(
    rng, monkeypatch, largest, groups, channels
):
    monkeypatch.setattr(by_group, 'LARGEST', largest)
    check(*draw(rng, (7, 8), (3, 3), groups, channels), Window((1, 2), ((1, 1), (0, 2))))


def test_no_images_are_no_error(rng):
    check(*draw(rng, (7, 8), (3, 3), images=0), Window())


@pytest.mark.parametrize('stride', [1, 2])
def test_any_number_of_groups_has_one_convolution_to_compile(rng, stride):
    x, kernels = draw(rng, (7, 8), (3, 3), groups=40)
    window = Window((stride, stride), ((1, 1), (1, 1)))
    text = jax.jit(with_gradients, static_argnums=(0, 3)).lower(by_group.conv, x, kernels, window).as_text()
    assert len(re.findall('stablehlo.convolution', text)) == 1 + stride**2 + 1
    assert 'feature_group_count = 40' not in text


def test_sizes_may_be_symbolic(rng):
    _, kernels = draw(rng, (8, 8), (3, 3))
    n, h = jax.export.symbolic_shape('n,h', constraints=['h >= 8'])
    window = Window((1, 1), ((1, 1), (1, 1)))

    def function(x):
        return with_gradients(by_group.conv, x, kernels, window)

    exported = jax.export.export(jax.jit(function))(jax.ShapeDtypeStruct((n, h, h, 6), kernels.dtype))
    x, _ = draw(rng, (8, 8), (3, 3))
    for a, e in zip(exported.call(x), with_gradients(stock, x, kernels, window), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-11)


@pytest.fixture
def one_device(monkeypatch):
    """Several devices keep their own images; these tests have few."""
    monkeypatch.setattr(jax, 'device_count', lambda: 1)


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
@pytest.mark.usefixtures('one_device')
def test_wide_images_give_the_same_value_and_gradients(rng, groups, window, kernel):
    x, kernels = draw(rng, (9, 10), kernel, groups, 36, 40)
    forward = images_of_convolutions(lambda x: by_group.conv(x, kernels, window), x)
    assert forward == [1] * groups  # the case is one of wide images
    check(x, kernels, window)


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
@pytest.mark.usefixtures('one_device')
def test_images_stay_apart_where_that_is_as_fast(rng, inputs, outputs, window):
    x, kernels = draw(rng, (9, 10), (3, 3), 2, inputs, outputs)
    assert images_of_convolutions(lambda x: by_group.conv(x, kernels, window), x) == [4, 4]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.usefixtures('one_device')
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
