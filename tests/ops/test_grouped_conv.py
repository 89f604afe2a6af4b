import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epsanet_jax import InputError
from epsanet_jax.ops import ALGORITHMS, grouped_conv
from epsanet_jax.ops.choice import MOST_SPLIT

OTHERS = ('auto', *(name for name in ALGORITHMS if name != 'stock'))


def inputs(rng, size, channels, kernel, groups, outputs, dtype=np.float64):
    x = rng.standard_normal((2, *size, channels)).astype(dtype)
    k = rng.standard_normal((kernel, kernel, channels // groups, outputs)).astype(dtype)
    return x, k


def value_and_gradients(algorithm, x, k, cotangent, stride, groups):
    conv = functools.partial(grouped_conv, stride=stride, groups=groups, algorithm=algorithm)
    y, pull = jax.vjp(conv, x, k)
    return y, pull(cotangent(y))


CASES = [
    # size, stride, kernel, groups, channels, outputs
    ((8, 8), 1, 3, 1, 4, 4),
    ((9, 7), 2, 3, 4, 8, 8),
    ((7, 8), 2, 1, 1, 8, 6),
    ((5, 6), 1, 1, 2, 8, 6),
]
LONG_CASES = [
    ((3, 2), 1, 9, 4, 8, 8),
    ((8, 8), 2, 5, 4, 8, 4),
    ((7, 7), 1, 7, 8, 16, 8),
    ((6, 9), 2, 7, 2, 4, 2),
    ((5, 5), 1, 9, 16, 64, 16),
    ((4, 4), 2, 9, 16, 16, 16),
    ((1, 1), 2, 9, 32, 32, 32),
    ((7, 7), 2, 5, 32, 128, 32),
    ((4, 4), 1, 5, 8, 192, 8),
    ((9, 12), 2, 7, 1, 3, 8),
]


@pytest.mark.parametrize(
    ('size', 'stride', 'kernel', 'groups', 'channels', 'outputs'),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG_CASES)],
)
def test_outputs_and_gradients_of_every_algorithm_equal_stock(
    rng, size, stride, kernel, groups, channels, outputs
):
    x, k = inputs(rng, size, channels, kernel, groups, outputs)
    weights = rng.standard_normal((2, -(-size[0] // stride), -(-size[1] // stride), outputs))
    expected = value_and_gradients('stock', x, k, lambda y: weights, stride, groups)
    assert expected[0].shape == weights.shape
    for algorithm in OTHERS:
        actual = jax.jit(
            functools.partial(
                value_and_gradients, algorithm, cotangent=lambda y: weights, stride=stride, groups=groups
            )
        )(x, k)
        chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('kernel', [1, 3])
@pytest.mark.parametrize('size', [(0, 4), (4, 0), (0, 0)])
def test_images_without_pixels_give_outputs_without_pixels(kernel, size):
    x, k = jnp.zeros((2, *size, 4)), jnp.zeros((kernel, kernel, 2, 6))
    for algorithm in ('stock', *OTHERS):
        y, (dx, dk) = value_and_gradients(algorithm, x, k, jnp.ones_like, 2, 2)
        assert (y.shape, dx.shape, dk.shape) == ((2, size[0] // 2, size[1] // 2, 6), x.shape, k.shape)


@pytest.mark.parametrize('kernel', [1, 3])
@pytest.mark.parametrize('stride', [1, 2])
def test_an_empty_batch_gives_empty_outputs_and_zero_kernel_gradients(kernel, stride):
    x, k = jnp.zeros((0, 6, 8, 16)), jnp.ones((kernel, kernel, 4, 8))
    for algorithm in ('stock', *OTHERS):
        y, (dx, dk) = value_and_gradients(algorithm, x, k, jnp.ones_like, stride, 4)
        assert (y.shape, dx.shape) == ((0, 6 // stride, 8 // stride, 8), x.shape)
        np.testing.assert_array_equal(dk, jnp.zeros_like(k))


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('kernel', [3, 5, 7, 9])
@pytest.mark.parametrize('groups', [1, 4, 16])
@pytest.mark.slow
def test_equals_pytorch(rng, stride, kernel, groups):
    import torch

    x, k = inputs(rng, (9, 6), 16, kernel, groups, 32)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x).permute(0, 3, 1, 2),
        torch.from_numpy(k).permute(3, 2, 0, 1),
        stride=stride,
        padding=kernel // 2,
        groups=groups,
    ).permute(0, 2, 3, 1)
    for algorithm in ('stock', *OTHERS):
        actual = grouped_conv(x, k, stride=stride, groups=groups, algorithm=algorithm)
        np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize('algorithm', ['auto', *ALGORITHMS])
def test_every_mode_of_differentiation_works(rng, algorithm):
    x, k = inputs(rng, (5, 5), 8, 3, 4, 8)

    def loss(k, x, algorithm=algorithm):
        return (grouped_conv(x, k, groups=4, algorithm=algorithm) ** 3).sum()

    stock = functools.partial(loss, algorithm='stock')
    forward = jax.jacfwd(loss)(k, x)
    chex.assert_trees_all_close(forward, jax.grad(stock)(k, x), rtol=1e-10, atol=1e-8)
    hvp = jax.jvp(lambda k: jax.grad(loss)(k, x), (k,), (k,))[1]
    expected = jax.jvp(lambda k: jax.grad(stock)(k, x), (k,), (k,))[1]
    chex.assert_trees_all_close(hvp, expected, rtol=1e-10, atol=1e-8)
    per_example = jax.vmap(jax.grad(loss), (None, 0))(k, x[:, None])
    chex.assert_trees_all_close(per_example.sum(0), jax.grad(stock)(k, x), rtol=1e-10, atol=1e-8)
    ensemble = jax.vmap(loss, (0, None))(np.stack([k, 2 * k]), x)
    chex.assert_trees_all_close(ensemble[1], stock(2 * k, x), rtol=1e-10)


def lowered(platform, algorithm='auto', channels=64):
    x = jax.ShapeDtypeStruct((8, 56, 56, channels), jnp.float32)
    k = jax.ShapeDtypeStruct((9, 9, channels // 16, 16), jnp.float32)

    def loss(k, x):
        return grouped_conv(x, k, groups=16, algorithm=algorithm).sum()

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(k, x)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def convolutions(text):
    return re.findall(r'stablehlo.convolution\([^)]*\)(.*)', text)


def grouped(text):
    return set(re.findall(r'(?:feature|batch)_group_count = (\d+)', text)) != {'1'}


def test_the_cpu_does_not_use_the_stock_lowering():
    assert grouped(lowered('cpu', 'stock'))
    assert not grouped(lowered('cpu'))


def test_the_target_platform_decides():
    cpu, tpu, cuda = (convolutions(lowered(platform)) for platform in ('cpu', 'tpu', 'cuda'))
    assert cpu != tpu != cuda != cpu
    assert cuda == convolutions(lowered('cuda', 'stock'))
    assert len(cuda) == 2


def test_an_export_to_several_platforms_uses_the_portable_algorithm(rng):
    x, k = (a.astype(np.float32) for a in inputs(rng, (8, 8), 16, 3, 4, 16))
    exported = jax.export.export(
        jax.jit(lambda x, k: grouped_conv(x, k, groups=4)), platforms=['cpu', 'tpu', 'cuda']
    )(x, k)
    expected = grouped_conv(x, k, groups=4, algorithm='stock')
    np.testing.assert_allclose(exported.call(x, k), expected, rtol=0, atol=1e-5)


def test_the_algorithm_is_chosen_at_compile_time(rng):
    x, k = inputs(rng, (8, 8), 64, 9, 16, 16)
    gradient = jax.jit(jax.grad(lambda k, x: grouped_conv(x, k, groups=16).sum(), (0, 1)))
    assert 'conditional' not in gradient.lower(k, x).compile().as_text()


@pytest.mark.parametrize('algorithm', OTHERS)
def test_an_infinite_weight_stays_in_its_group(rng, algorithm):
    x, k = inputs(rng, (5, 5), 8, 3, 4, 4)
    k[..., 0] = np.inf
    y = grouped_conv(x, k, groups=4, algorithm=algorithm)
    assert np.isfinite(y[..., 1:]).all()


@pytest.mark.parametrize('algorithm', OTHERS)
def test_bfloat16_results_are_within_the_rounding_error_of_the_type(rng, algorithm):
    x, k = (jnp.asarray(a, jnp.bfloat16) for a in inputs(rng, (7, 7), 16, 5, 4, 8))
    expected = grouped_conv(x.astype(jnp.float32), k.astype(jnp.float32), groups=4, algorithm='stock')
    actual = grouped_conv(x, k, groups=4, algorithm=algorithm)
    assert actual.dtype == jnp.bfloat16
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual.astype(jnp.float32) / scale, expected / scale, rtol=0, atol=2**-8)


@pytest.mark.parametrize(
    ('x_shape', 'k_shape', 'groups', 'message'),
    [
        ((2, 8, 8), (3, 3, 4, 4), 1, r'got shapes \(2, 8, 8\)'),
        ((2, 8, 8, 8), (3, 3, 4, 4), 3, '3 groups do not fit 8 input channels'),
        ((2, 8, 8, 8), (3, 3, 4, 5), 2, '5 outputs'),
        ((2, 8, 8, 8), (0, 3, 8, 4), 1, 'no values: 0x3'),
        ((2, 8, 8, 0), (3, 3, 0, 4), 1, '1 groups do not fit 0 input channels'),
        ((2, 8, 8, 8), (3, 3, 4, 0), 2, '0 outputs'),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x_shape, k_shape, groups, message):
    with pytest.raises(InputError, match=message):
        grouped_conv(jnp.zeros(x_shape), jnp.zeros(k_shape), groups=groups)


@pytest.mark.parametrize('field', ['stride', 'dilation'])
@pytest.mark.parametrize('value', [0, -1, 1.5, (1, 0), (1, 2, 3), (1, 1.5)])
def test_stride_and_dilation_must_be_positive_integers(field, value):
    message = f'{field} must be a positive integer or two of them, got {re.escape(repr(value))}'
    with pytest.raises(InputError, match=message):
        grouped_conv(jnp.zeros((1, 8, 8, 8)), jnp.zeros((3, 3, 8, 8)), **{field: value})


@pytest.mark.parametrize('value', ['same', 1.5, (1, 2, 3), ((1, 2),), ((1, 2, 3), 1), (1.5, 1)])
def test_padding_that_is_none_is_refused(value):
    with pytest.raises(InputError, match=f"padding must be 'SAME', .* got {re.escape(repr(value))}"):
        grouped_conv(jnp.zeros((1, 8, 8, 8)), jnp.zeros((3, 3, 8, 8)), padding=value)


@pytest.mark.parametrize('dtypes', [('float32', 'bfloat16'), ('int32', 'int32')])
def test_dtypes_that_do_not_fit_are_refused(dtypes):
    x, k = jnp.zeros((1, 8, 8, 8), dtypes[0]), jnp.zeros((3, 3, 8, 8), dtypes[1])
    with pytest.raises(InputError, match=f'same floating-point dtype, got {dtypes[0]} and {dtypes[1]}'):
        grouped_conv(x, k)


@pytest.mark.parametrize(
    'padding', [None, 'SAME', 'VALID', 2, (1, 0), ((1, 2), 0), [[0, 3], [2, 1]], ((-1, 0), (0, -2))]
)
def test_every_form_of_padding(rng, padding):
    x, k = jnp.asarray(rng.standard_normal((2, 9, 8, 4))), jnp.asarray(rng.standard_normal((2, 5, 2, 6)))
    pairs = {
        None: ((1, 1), (4, 4)),
        2: ((2, 2),) * 2,
        (1, 0): ((1, 1), (0, 0)),
        ((1, 2), 0): ((1, 2), (0, 0)),
    }
    pads = padding if isinstance(padding, (list, str)) else pairs.get(padding, padding)
    expected = jax.lax.conv_general_dilated(
        x,
        k,
        (2, 1),
        pads,
        rhs_dilation=(1, 2),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=2,
    )
    for algorithm in ('stock', *OTHERS):
        actual = grouped_conv(
            x, k, stride=(2, 1), dilation=(1, 2), groups=2, padding=padding, algorithm=algorithm
        )
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10)


@st.composite
def convolutions_of_any_kind(draw):
    """Draws images, a kernel, and the arguments of `lax.conv_general_dilated`; the result has pixels."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, strides, dilation = draw(st.tuples(*[st.integers(1, 7)] * 2)), draw(pair), draw(pair)
    pads = [draw(st.tuples(*[st.integers(0, 6)] * 2)) for _ in range(2)]
    needed = [max(1, (k - 1) * d + 1 - sum(p)) for k, d, p in zip(kernel, dilation, pads, strict=True)]
    size = [n + draw(st.integers(0, 9)) for n in needed]
    groups, inputs, outputs = (
        draw(st.sampled_from([1, 2, 3, 5, 8, 48])),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
    )
    shapes = (draw(st.integers(1, 9)), *size, groups * inputs), (*kernel, inputs, groups * outputs)
    return shapes, strides, pads, dilation, groups


def check_convolution(case, algorithm):
    shapes, strides, pads, dilation, groups = case
    x, k = (jnp.asarray(np.random.default_rng(i).standard_normal(shape)) for i, shape in enumerate(shapes))

    def plain(x, k):
        return jax.lax.conv_general_dilated(
            x,
            k,
            strides,
            pads,
            rhs_dilation=dilation,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=groups,
        )

    def ours(x, k):
        arguments = {'stride': strides, 'padding': pads, 'dilation': dilation, 'groups': groups}
        return grouped_conv(x, k, algorithm=algorithm, **arguments)

    def results(conv):
        y, pull = jax.vjp(conv, x, k)
        return y, pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    chex.assert_trees_all_close(results(ours), results(plain), rtol=1e-10, atol=1e-10)
    if algorithm == 'auto':
        pull = jax.jit(lambda x, k, dy: jax.vjp(ours, x, k)[1](dy))
        y = jax.eval_shape(plain, x, k)
        for function, arguments in ((ours, (x, k)), (pull, (x, k, y))):
            text = jax.jit(function).lower(*arguments).as_text()
            emitted = len(re.findall(r'stablehlo\.(?:convolution|dot_general)', text))
            assert emitted <= MOST_SPLIT * (1 if function is ours else 2)


@given(case=convolutions_of_any_kind())
@settings(max_examples=5, deadline=None)
def test_any_convolution_equals_stock(case):
    check_convolution(case, 'auto')


@pytest.mark.slow
@given(case=convolutions_of_any_kind(), algorithm=st.sampled_from(OTHERS))
@settings(max_examples=100, deadline=None)
def test_any_convolution_by_any_algorithm_equals_stock(case, algorithm):
    check_convolution(case, algorithm)


@pytest.mark.parametrize('sizes', ['b,32*h,32*w', 'b,h,h', '2,h,w'])
@pytest.mark.parametrize(('groups', 'kernel', 'stride'), [(16, 9, 1), (32, 3, 2), (1, 7, 2), (8, 1, 1)])
def test_an_export_takes_any_batch_height_and_width(rng, sizes, groups, kernel, stride):
    symbols = jax.export.symbolic_shape(sizes, constraints=['h >= 16'] if sizes == 'b,h,h' else [])
    k = jnp.asarray(rng.standard_normal((kernel, kernel, 32 // groups, 32)), jnp.float32)

    def conv(x, algorithm='auto'):
        return grouped_conv(x, k, groups=groups, stride=stride, algorithm=algorithm)

    exported = jax.export.export(jax.jit(conv))(jax.ShapeDtypeStruct((*symbols, 32), jnp.float32))
    x = jnp.asarray(rng.standard_normal((2, 32, 32, 32)), jnp.float32)
    np.testing.assert_allclose(exported.call(x), conv(x, 'stock'), rtol=0, atol=1e-4)


def test_an_unknown_algorithm_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match=r"'mergd'.*did you mean 'merged'"):
        grouped_conv(jnp.zeros((1, 8, 8, 8)), jnp.zeros((3, 3, 8, 8)), algorithm='mergd')
