"""Each rewritten convolution against XLA's plain one."""

import jax
import numpy as np
import pytest

from epsanet_jax.ops import rewrites
from epsanet_jax.ops.plain import Window


def half(kernel, stride, dilation=1):
    """Returns the window with half the kernel's extent as padding on every side."""
    padding = tuple((dilation * (size // 2),) * 2 for size in kernel.shape[:2])
    return Window((stride, stride), padding, (dilation, dilation))


def plain(x, kernel, stride):
    return rewrites.stock(x, kernel, half(kernel, stride), x.shape[3] // kernel.shape[2])


def draw(rng, size, kernel, groups=1):
    return rng.standard_normal((2, *size, 4)), rng.standard_normal((kernel, kernel, 4 // groups, 6))


@pytest.mark.parametrize('stride', [1, 2, 3])
def test_stock_pads_half_the_kernel_on_every_side(rng, stride):
    x, kernel = draw(rng, (7, 8), 5)
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    expected = jax.lax.conv_general_dilated(
        padded, kernel, (stride, stride), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    np.testing.assert_allclose(plain(x, kernel, stride), expected, rtol=1e-12, atol=1e-12)


def test_a_dilated_kernel_equals_one_with_zeros_between_its_values(rng):
    x, kernel = draw(rng, (7, 8), 3, groups=2)
    wide = np.zeros((5, 5, 2, 6))
    wide[::2, ::2] = kernel
    actual = rewrites.stock(x, kernel, half(kernel, 2, 2), 2)
    np.testing.assert_allclose(actual, plain(x, wide, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('size', [(7, 8), (12, 5), (4, 4)])
@pytest.mark.parametrize(
    ('strides', 'dilation'),
    [((1, 1), (2, 3)), ((2, 3), (3, 2)), ((2, 4), (4, 2)), ((3, 1), (3, 1)), ((4, 6), (6, 4))],
)
def test_images_without_dilation_equal_stock(rng, size, strides, dilation):
    x, kernel = rng.standard_normal((2, *size, 4)), rng.standard_normal((3, 2, 4, 6))
    window = Window(strides, ((6, 7), (8, 5)), dilation)

    def convolve(x, window):
        assert window.dilation == (1, 1)
        return rewrites.stock(x, kernel, window, 1)

    actual = rewrites.without_dilation(x, kernel, window, convolve)
    np.testing.assert_allclose(actual, rewrites.stock(x, kernel, window, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('stride', [1, 2])
def test_matmul_equals_stock(rng, stride):
    x, kernel = draw(rng, (5, 6), 1)
    np.testing.assert_allclose(
        rewrites.matmul(x, kernel, half(kernel, stride), 1), plain(x, kernel, stride), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('kernel', [3, 9])
@pytest.mark.parametrize(('groups', 'convolutions'), [(2, 2), (16, 16), (17, 1)])
def test_merged_splits_into_convolutions_side_by_side_or_in_a_loop(rng, stride, kernel, groups, convolutions):
    x, k = rng.standard_normal((2, 5, 6, groups)), rng.standard_normal((kernel, kernel, 1, 3 * groups))
    expected = plain(x, k, stride)
    for split, count in ((False, 1), (True, convolutions)):
        window = half(k, stride)
        function = jax.jit(
            lambda x, k, s=split, w=window: rewrites.merged(x, k.reshape(*k.shape[:3], groups, 3), w, s)
        )
        np.testing.assert_allclose(function(x, k), expected, rtol=1e-10, atol=1e-12)
        assert function.lower(x, k).as_text().count('stablehlo.convolution') == count


@pytest.mark.parametrize(('stride', 'count'), [(1, 1), (2, 4), (3, 9), (7, 35)])
def test_every_pixel_is_in_exactly_one_phase(stride, count):
    x = np.arange(5 * 7.0).reshape(1, 5, 7, 1)
    by_phase = rewrites.split_phases(x, (stride, stride))
    assert len(by_phase) == count
    assert sorted(np.concatenate([np.ravel(part) for part in by_phase.values()])) == list(np.ravel(x))
    for (row, column), part in by_phase.items():
        assert part[0, 0, 0, 0] == x[0, row, column, 0]


@pytest.mark.parametrize(('kernel', 'stride'), [(1, 2), (3, 2), (5, 3), (3, 4)])
def test_phases_equals_stock(rng, kernel, stride):
    x, k = draw(rng, (7, 8), kernel, groups=2)
    expected, by_phase = plain(x, k, stride), rewrites.split_phases(x, (stride, stride))
    kernels = k.reshape(*k.shape[:3], 2, 3)
    actual = rewrites.phases(by_phase, kernels, half(k, stride), expected.shape[1:3])
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ('kernel', 'stride', 'columns', 'expected'),
    [(3, 1, 2, (1, 1)), (9, 1, 2, (2, 2)), (9, 1, 4, (1, 1)), (3, 2, 2, (1, 0)), (1, 1, 2, (0, 0))],
)
def test_bands_counts_the_neighbours_that_a_band_reads(kernel, stride, columns, expected):
    assert rewrites.bands(kernel, stride, kernel // 2, columns) == expected


@pytest.mark.parametrize('columns', [2, 3])
@pytest.mark.parametrize(('kernel', 'stride'), [(3, 1), (5, 2)])
def test_banded_equals_stock(rng, kernel, stride, columns):
    x, k = draw(rng, (6, 7), kernel)
    np.testing.assert_allclose(
        rewrites.banded(x, k, half(k, stride), columns), plain(x, k, stride), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize('fold', [False, True])
@pytest.mark.parametrize(('kernel', 'stride', 'tile'), [(3, 1, (2, 2)), (5, 2, (1, 3)), (7, 1, (4, 2))])
def test_tiled_equals_stock(rng, kernel, stride, tile, fold):
    x, k = draw(rng, (6, 7), kernel, groups=2)
    actual = rewrites.tiled(x, k.reshape(*k.shape[:3], 2, 3), half(k, stride), tile, False, fold)
    np.testing.assert_allclose(actual, plain(x, k, stride), rtol=1e-10, atol=1e-12)
