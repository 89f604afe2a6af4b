"""Common errors in ports of EPSANet, one test each, against the computation in the paper's listing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch

from epsanet_jax.models import BatchNorm, PSAModule, SEWeightModule
from epsanet_jax.models.conv import Conv, Linear
from epsanet_jax.models.pool import max_pool
from epsanet_jax.ops import grouped_conv

pytestmark = pytest.mark.usefixtures('strict')
F64 = {'dtype': jnp.float64, 'param_dtype': jnp.float64}


@pytest.fixture
def psa(rng):
    """Branches, sigmoid weights computed by hand, attention and output of a PSA module."""
    module = PSAModule(16, 1, (3, 5, 7, 9), (1, 2, 4, 2), reduction=2, **F64)
    x = rng.standard_normal((2, 6, 6, 16))
    params = module.init(jax.random.key(0), x)['params']
    branches = [
        grouped_conv(x, params[f'conv_{i + 1}']['kernel'], groups=g, algorithm='stock')
        for i, g in enumerate((1, 2, 4, 2))
    ]

    def weigh(branch):
        hidden = np.maximum(
            branch.mean((1, 2)) @ params['se']['fc1']['kernel'][0, 0] + params['se']['fc1']['bias'], 0
        )
        logits = hidden @ params['se']['fc2']['kernel'][0, 0] + params['se']['fc2']['bias']
        return 1 / (1 + np.exp(-logits))  # [N, C]

    weights = np.stack([weigh(b) for b in branches])  # [4, N, C]
    output, state = module.apply({'params': params}, x, mutable=['intermediates'])
    attention = state['intermediates']['attention'][0]
    return branches, weights, attention, output


def test_1_the_branches_are_concatenated_in_reverse(psa):
    branches, _, attention, output = psa
    parts = [b * attention[:, i, None, None, :] for i, b in enumerate(branches)]
    np.testing.assert_allclose(output, np.concatenate(parts[::-1], -1), rtol=1e-10)


def test_2_one_squeeze_and_excitation_module_is_shared():
    params = PSAModule(16, 1, (3, 5, 7, 9), (1, 2, 4, 2), 2, **F64).init(
        jax.random.key(0), np.zeros((1, 4, 4, 16))
    )
    assert set(params['params']) == {'conv_1', 'conv_2', 'conv_3', 'conv_4', 'se'}
    assert params['params']['se']['fc1']['kernel'].shape == (1, 1, 4, 2)


def test_3_sigmoid_then_softmax_over_the_branches(psa):
    _, weights, attention, _ = psa
    expected = np.exp(weights) / np.exp(weights).sum(0)
    np.testing.assert_allclose(attention, expected.transpose(1, 0, 2), rtol=1e-10)
    assert attention.shape == (2, 4, 4)
    np.testing.assert_allclose(attention.sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize('size', [7, 8])
def test_4_padding_is_symmetric_at_stride_2(rng, size):
    x = rng.standard_normal((1, size, size, 2))
    kernel = rng.standard_normal((7, 7, 2, 3))
    padded = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
    expected = jax.lax.conv_general_dilated(
        padded, kernel, (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    np.testing.assert_allclose(grouped_conv(x, kernel, stride=2), expected, rtol=1e-10)


@pytest.mark.parametrize('size', [7, 8])
def test_4_padding_of_the_max_pooling_is_symmetric(rng, size):
    x = rng.standard_normal((1, size, size, 2)) - 5  # padding with zeros would change the maximum
    expected = torch.nn.functional.max_pool2d(torch.from_numpy(x).permute(0, 3, 1, 2), 3, 2, padding=1)
    np.testing.assert_array_equal(max_pool(x), expected.permute(0, 2, 3, 1))


def test_gradient_of_max_pooling_goes_to_the_first_of_equal_values(rng):
    x = rng.integers(0, 3, (2, 9, 12, 3)).astype(np.float64)
    weights = rng.standard_normal((2, 5, 6, 3))
    twin = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    pooled = torch.nn.functional.max_pool2d(twin, 3, 2, padding=1)
    (pooled * torch.from_numpy(weights).permute(0, 3, 1, 2)).sum().backward()
    gradient = jax.jit(jax.grad(lambda x: (max_pool(x) * weights).sum()))(x)
    np.testing.assert_allclose(gradient, twin.grad.permute(0, 2, 3, 1), rtol=1e-12)


def test_max_pooling_returns_nan_if_its_window_holds_one(rng):
    x = rng.standard_normal((1, 4, 4, 1))
    x[0, 1, 1] = np.nan
    np.testing.assert_array_equal(np.isnan(max_pool(x))[0, :, :, 0], [[True, True], [True, True]])


@pytest.mark.parametrize(('kernel', 'groups'), [(3, 1), (9, 16), (1, 1)])
def test_5_standard_deviation_of_kernels_does_not_depend_on_groups(kernel, groups):
    conv = Conv(64, kernel, groups=groups, param_dtype=jnp.float64)
    weights = conv.init(jax.random.key(0), np.zeros((1, 9, 9, 256), np.float32))['params']['kernel']
    expected = np.sqrt(2 / (kernel * kernel * 64))
    error = 4 * expected / np.sqrt(2 * weights.size)  # four standard errors
    assert abs(np.std(weights) - expected) < error
    assert abs(np.mean(weights)) < 4 * expected / np.sqrt(weights.size)


def test_5_initial_values_of_squeeze_and_excitation():
    se = SEWeightModule(1024, 2, param_dtype=jnp.float64)
    params = se.init(jax.random.key(0), np.zeros((1, 2, 2, 1024), np.float32))['params']
    for name, outputs in (('fc1', 512), ('fc2', 1024)):
        np.testing.assert_allclose(np.std(params[name]['kernel']), np.sqrt(2 / outputs), rtol=0.01)
    assert np.abs(params['fc1']['bias']).max() <= 1 / np.sqrt(1024)
    assert np.abs(params['fc1']['bias']).max() > 0.9 / np.sqrt(1024)


def test_5_initial_values_of_the_linear_layer():
    params = Linear(100).init(jax.random.key(0), np.zeros((1, 400), np.float32))['params']
    for leaf in (params['kernel'], params['bias']):
        assert 0.9 / 20 < np.abs(leaf).max() <= 1 / 20
        assert abs(np.mean(leaf)) < 0.01


def test_6_batch_norm_equals_pytorch(rng):
    x = rng.standard_normal((4, 3, 3, 5)) * 3 + 1
    norm = BatchNorm(**F64)
    variables = norm.init(jax.random.key(0), x)
    twin = torch.nn.BatchNorm2d(5).double()
    for _ in range(3):
        y, new = norm.apply(variables, x, train=True, mutable=['batch_stats'])
        variables = {**variables, **new}
        expected = twin(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        np.testing.assert_allclose(y, expected.detach(), rtol=1e-10, atol=1e-12)
    stats = variables['batch_stats']
    np.testing.assert_allclose(stats['mean'], twin.running_mean, rtol=1e-10)
    np.testing.assert_allclose(stats['var'], twin.running_var, rtol=1e-10)  # unbiased: n / (n - 1)
    y = norm.apply(variables, x)
    expected = twin.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(y, expected.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('psa_bias', [False, True])
def test_7_pyramids_with_and_without_biases_exist(psa_bias):
    net = small.model(psa_bias=psa_bias)
    conv2 = small.random_variables(net)['params']['layer2_0']['conv2']
    assert all(('bias' in conv2[f'conv_{i}']) == psa_bias for i in range(1, 5))


def test_8_hidden_width_is_1_at_16_channels():
    params = SEWeightModule(16).init(jax.random.key(0), np.zeros((1, 2, 2, 16), np.float32))['params']
    assert params['fc1']['kernel'].shape == (1, 1, 16, 1)
