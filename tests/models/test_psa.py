"""Behaviour of the PSA module. What a port easily gets wrong is in test_traps.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epsanet_jax import InputError
from epsanet_jax.models.conv import Conv
from epsanet_jax.models.psa import PSAModule, SEWeightModule

pytestmark = pytest.mark.usefixtures('strict')
SETTINGS = {'kernels': (3, 5, 7, 9), 'groups': (1, 2, 4, 2), 'reduction': 2}


@pytest.mark.parametrize(('stride', 'dilation', 'size'), [(1, 1, (7, 6)), (2, 1, (4, 3)), (1, 2, (7, 6))])
def test_outputs_have_the_size_of_the_input_divided_by_the_stride(stride, dilation, size):
    x = jnp.ones((2, 7, 6, 8), jnp.float32)
    psa = PSAModule(16, stride, dilation=dilation, **SETTINGS)
    y, _ = jax.eval_shape(psa.init_with_output, jax.random.key(0), x)
    assert y.shape == (2, *size, 16)


def test_every_convolution_algorithm_gives_the_same(rng):
    x = rng.standard_normal((2, 6, 6, 16)).astype(np.float32)
    variables = PSAModule(16, **SETTINGS).init(jax.random.key(0), x)
    expected, *others = (
        PSAModule(16, conv=conv, **SETTINGS).apply(variables, x)
        for conv in ('stock', 'auto', 'dense', 'tiled')
    )
    for y in others:
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_two_branches_have_attention_in_the_order_of_their_kernels(rng):
    x = rng.standard_normal((3, 5, 5, 8)).astype(np.float32)
    psa = PSAModule(8, kernels=(1, 3), groups=(2, 4), reduction=2)
    variables = psa.init(jax.random.key(0), x)
    y, state = psa.apply(variables, x, mutable=['intermediates'])
    (attention,) = state['intermediates']['attention']  # [N, 2, 4]
    assert attention.shape == (3, 2, 4)
    first = Conv(4, 1, groups=2).apply({'params': variables['params']['conv_1']}, x)
    np.testing.assert_allclose(y[..., 4:], first * attention[:, 0, None, None, :], rtol=1e-5, atol=1e-6)


def test_intercepted_calls_include_every_branch(rng):
    x = rng.standard_normal((1, 4, 4, 8)).astype(np.float32)
    psa, seen = PSAModule(16, **SETTINGS), []

    def note(call, args, kwargs, context):
        if context.method_name == '__call__':
            seen.append(context.module.name)
        return call(*args, **kwargs)

    variables = psa.init(jax.random.key(0), x)
    with nn.intercept_methods(note):
        psa.apply(variables, x)
    assert [name for name in seen if name and name.startswith('conv_')] == [f'conv_{i}' for i in (1, 2, 3, 4)]


def test_attention_is_float32_if_the_computation_is_bfloat16():
    x = jnp.ones((1, 4, 4, 8), jnp.bfloat16)
    psa = PSAModule(16, dtype=jnp.bfloat16, **SETTINGS)
    variables = psa.init(jax.random.key(0), x)
    y, state = psa.apply(variables, x, mutable=['intermediates'])
    assert y.dtype == jnp.bfloat16
    assert state['intermediates']['attention'][0].dtype == jnp.float32


def test_se_weights_are_between_0_and_1_and_see_only_the_mean_of_each_image(rng):
    x = rng.standard_normal((2, 3, 4, 8)).astype(np.float32)
    se = SEWeightModule(8, 2)
    variables = se.init(jax.random.key(0), x)
    weights = se.apply(variables, x)
    assert weights.shape == (2, 1, 1, 8)
    assert ((weights > 0) & (weights < 1)).all()
    means = np.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)
    np.testing.assert_allclose(se.apply(variables, means), weights, rtol=1e-5)


def test_planes_that_are_not_a_multiple_of_the_branches_are_refused():
    module = PSAModule(30, groups=(1, 1, 1, 1), reduction=2)
    with pytest.raises(InputError, match='planes must be a multiple of the 4 branches, got 30'):
        module.init(jax.random.key(0), np.zeros((1, 8, 8, 30), np.float32))


def test_an_se_module_without_hidden_units_is_refused():
    with pytest.raises(InputError, match='8 channels / reduction 16 leaves no hidden unit'):
        SEWeightModule(8).init(jax.random.key(0), np.zeros((1, 2, 2, 8), np.float32))
