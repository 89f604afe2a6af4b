import jax
import numpy as np
import pytest

from epsanet_jax.ops.plain import Window, conv, interleave, pad


def test_padding_adds_zeros_and_negative_padding_crops():
    x = np.arange(1.0, 7).reshape(2, 3)
    np.testing.assert_array_equal(pad(x, ((1, 0), (-1, 2))), [[0] * 4, [2, 3, 0, 0], [5, 6, 0, 0]])


def test_interleave_takes_from_each_part_in_turn():
    x = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(interleave([x[:, i::3] for i in range(3)], 1), x)


@pytest.mark.parametrize(
    'window', [Window((2, 1), ((1, 2), (-1, 3)), (1, 2)), Window(padding=((-2, 0), (0, -1)))]
)
def test_a_window_knows_the_size_of_the_result(rng, window):
    x, kernel = rng.standard_normal((2, 9, 8, 3)), rng.standard_normal((2, 3, 3, 4))
    y = conv(x, kernel, window.strides, window.padding, dilation=window.dilation)
    assert y.shape == (2, *window.outputs((9, 8), kernel.shape), 4)
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
