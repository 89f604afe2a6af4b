import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from epsanet_jax.models.conv import Conv, Linear, conv_kernel_init, uniform_init

pytestmark = pytest.mark.usefixtures('strict')
F64 = {'dtype': jnp.float64, 'param_dtype': jnp.float64}


@pytest.mark.parametrize(('stride', 'groups', 'dilation'), [(1, 1, 1), (2, 4, 1), (1, 2, 2)])
def test_a_convolution_with_bias_equals_pytorchs(rng, stride, groups, dilation):
    x = rng.standard_normal((2, 9, 8, 8))
    conv = Conv(12, 3, stride, groups, dilation, use_bias=True, **F64)
    variables = conv.init(jax.random.key(0), x)
    kernel, bias = (np.array(variables['params'][name]) for name in ('kernel', 'bias'))
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x).permute(0, 3, 1, 2),
        torch.from_numpy(kernel).permute(3, 2, 0, 1),
        torch.from_numpy(bias),
        stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
    )
    np.testing.assert_allclose(conv.apply(variables, x), expected.permute(0, 2, 3, 1), rtol=0, atol=1e-12)


def test_a_given_convolution_is_used_and_gets_the_bias(rng):
    x, convolved = rng.standard_normal((1, 4, 4, 2)), rng.standard_normal((1, 4, 4, 3))
    conv = Conv(3, 3, use_bias=True, **F64)
    variables = conv.init(jax.random.key(0), x)
    y = conv.apply(variables, x, convolved=jnp.asarray(convolved))
    np.testing.assert_allclose(y, convolved + variables['params']['bias'], rtol=1e-12)


@pytest.mark.parametrize('layer', [Conv(4, 1, use_bias=True, dtype=jnp.bfloat16), Linear(4, jnp.bfloat16)])
def test_parameters_stay_float32_if_the_computation_is_bfloat16(layer):
    x = jnp.ones((2, 3, 3, 8) if isinstance(layer, Conv) else (2, 8), jnp.float32)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


def test_linear_is_a_matrix_product_plus_bias(rng):
    x = rng.standard_normal((3, 5))
    y, variables = Linear(4, **F64).init_with_output(jax.random.key(0), x)
    params = variables['params']
    np.testing.assert_allclose(y, x @ params['kernel'] + params['bias'], rtol=1e-12)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32, jnp.float64])
def test_initial_values_have_the_requested_type_and_depend_on_the_key(dtype):
    for init in (conv_kernel_init, uniform_init(36)):
        values = [init(jax.random.key(seed), (3, 3, 4, 8), dtype) for seed in (0, 0, 1)]
        assert values[0].dtype == dtype
        np.testing.assert_array_equal(values[0], values[1])
        assert (values[0] != values[2]).any()
