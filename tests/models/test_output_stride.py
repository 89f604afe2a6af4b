"""Output stride: dilation instead of stride gives larger maps from the same parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch

from epsanet_jax.ops import grouped_conv


@pytest.mark.parametrize(
    ('output_stride', 'sizes'), [(32, [16, 8, 4, 2]), (16, [16, 8, 4, 4]), (8, [16, 8, 8, 8])]
)
def test_sizes_of_the_stages_follow_the_output_stride(output_stride, sizes):
    model = small.model(output_stride=output_stride)
    images = jnp.zeros((1, 64, 64, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    chex.assert_trees_all_equal_shapes(
        variables, jax.eval_shape(small.model().init, jax.random.key(0), images)
    )
    features = jax.eval_shape(lambda v: model.apply(v, images, method='features'), variables)
    assert [features[f'layer{i}'].shape[1] for i in (1, 2, 3, 4)] == sizes


def test_fifth_stage_halves_the_size():
    model = small.model(layers=(1,) * 5, planes=(8,) * 5)
    images = jnp.zeros((1, 128, 128, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    features = jax.eval_shape(lambda v: model.apply(v, images, method='features'), variables)
    assert features['layer5'].shape[1] == 2


@pytest.mark.parametrize('dilation', [1, 2, 3])
@pytest.mark.parametrize(('stride', 'groups', 'algorithm'), [(1, 1, 'auto'), (2, 2, 'auto'), (1, 2, 'tiled')])
def test_dilated_convolution_equals_pytorch(rng, dilation, stride, groups, algorithm):
    x, kernel = rng.standard_normal((2, 9, 8, 4)), rng.standard_normal((3, 3, 4 // groups, 6))
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x).permute(0, 3, 1, 2),
        torch.from_numpy(kernel).permute(3, 2, 0, 1),
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
    )
    actual = grouped_conv(x, kernel, stride=stride, groups=groups, dilation=dilation, algorithm=algorithm)
    np.testing.assert_allclose(actual, expected.permute(0, 2, 3, 1), rtol=1e-10, atol=1e-10)
