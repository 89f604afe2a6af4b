"""The replacement for `jax.lax.conv_general_dilated`."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from epsanet_jax.layers.conv_general import conv_general_dilated, is_supported

NUMBERS = lax.conv_dimension_numbers((1, 8, 9, 4), (3, 3, 2, 6), ('NHWC', 'HWIO', 'NHWC'))
SUPPORTED = {'dimension_numbers': NUMBERS, 'feature_group_count': 2}


@pytest.mark.parametrize(
    ('strides', 'padding', 'options', 'supported'),
    [
        ((1, 1), 'SAME', {}, True),
        ((2, 2), [(1, 1), (1, 1)], {}, True),
        ((1, 1), [(2, 2), (2, 2)], {'rhs_dilation': (2, 2)}, True),
        ((1, 1), 'VALID', {}, True),
        ((2, 2), 'SAME', {}, True),
        ((1, 1), 'SAME_LOWER', {}, False),
        ((1, 2), [(1, 3), (0, 1)], {'rhs_dilation': (2, 1)}, True),
        ((1, 1), [(1, 1), (1, 1)], {'lhs_dilation': (2, 2)}, False),
        ((1, 1), [(1, 1), (1, 1)], {'preferred_element_type': jnp.float64}, False),
    ],
)
def test_result_equals_that_of_jax(rng, strides, padding, options, supported):
    x, kernel = rng.standard_normal((1, 8, 9, 4)), rng.standard_normal((3, 3, 2, 6))
    options = {**SUPPORTED, **options}
    assert is_supported(jnp.asarray(x), jnp.asarray(kernel), strides, padding, **options) is supported
    expected = lax.conv_general_dilated(x, kernel, strides, padding, **options)
    actual = conv_general_dilated(jnp.asarray(x), jnp.asarray(kernel), strides, padding, **options)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ('images', 'kernel'),
    [
        ((1, 8, 4), (3, 2, 6)),
        ((1, 8, 9, 4), (3, 3, 4, 6)),
        ((1, 8, 9, 4), (3, 3, 2, 5)),
    ],
)
def test_other_ranks_and_groups_that_do_not_fit_are_not_supported(images, kernel):
    padding = [(1, 1)] * (len(images) - 2)
    assert not is_supported(jnp.zeros(images), jnp.zeros(kernel), (1, 1), padding, **SUPPORTED)


def test_integers_and_mixed_types_are_not_supported():
    x, kernel = jnp.zeros((1, 8, 9, 4), jnp.int32), jnp.zeros((3, 3, 2, 6), jnp.int32)
    assert not is_supported(x, kernel, (1, 1), 'SAME', **SUPPORTED)
    assert not is_supported(x.astype('float32'), kernel.astype('float64'), (1, 1), 'SAME', **SUPPORTED)
