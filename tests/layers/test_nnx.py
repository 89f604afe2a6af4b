"""`GroupedConv` against flax.nnx's Conv."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from epsanet_jax.layers.nnx import GroupedConv

CASES = {
    # channels, arguments of the layer, whether `grouped_conv` computes it
    'dense': (6, {'kernel_size': (3, 3)}, True),
    'grouped': (8, {'kernel_size': (5, 5), 'feature_group_count': 4}, True),
    'depthwise': (8, {'kernel_size': (7, 7), 'feature_group_count': 8, 'use_bias': False}, True),
    'stride 2': (8, {'kernel_size': (3, 3), 'strides': 2, 'padding': 1, 'feature_group_count': 2}, True),
    'VALID': (8, {'kernel_size': (3, 3), 'padding': 'VALID', 'feature_group_count': 2}, True),
    '1-D': (8, {'kernel_size': 3, 'feature_group_count': 2}, False),
    'result type': (8, {'kernel_size': (3, 3), 'preferred_element_type': jnp.float32}, False),
}


@pytest.mark.parametrize('case', CASES)
def test_parameters_outputs_and_gradients_are_those_of_flax(rng, calls, case):
    channels, kwargs, supported = CASES[case]
    ours, flax = (layer(channels, 8, **kwargs, rngs=nnx.Rngs(3)) for layer in (GroupedConv, nnx.Conv))
    chex.assert_trees_all_equal(nnx.state(ours), nnx.state(flax))
    shape = (2, 9, channels) if case == '1-D' else (2, 8, 9, channels)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def loss(layer, x):
        y = layer(x)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), y

    actual, expected = (nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x) for layer in (ours, flax))
    assert len(calls) == supported
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16(rng):
    x = jnp.asarray(rng.standard_normal((2, 8, 8, 16)), jnp.float32)
    kwargs = {'kernel_size': (5, 5), 'feature_group_count': 4, 'dtype': jnp.bfloat16}
    actual, expected = (layer(16, 16, **kwargs, rngs=nnx.Rngs(0))(x) for layer in (GroupedConv, nnx.Conv))
    assert actual.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(actual.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.02, atol=0.02)


def test_transformations_of_nnx(rng):
    layer = GroupedConv(8, 8, (3, 3), feature_group_count=8, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((3, 2, 8, 8, 8)), jnp.float32)
    expected = layer(x[1])
    np.testing.assert_allclose(
        nnx.jit(lambda layer, x: layer(x))(layer, x[1]), expected, rtol=1e-5, atol=1e-5
    )
    batched = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, x)
    np.testing.assert_allclose(batched[1], expected, rtol=1e-5, atol=1e-5)


def test_states_load_in_both_directions(rng):
    x = jnp.asarray(rng.standard_normal((2, 8, 8, 8)), jnp.float32)
    ours, flax = (
        layer(8, 8, (5, 5), feature_group_count=4, rngs=nnx.Rngs(i))
        for i, layer in enumerate((GroupedConv, nnx.Conv))
    )
    for source, target in ((ours, flax), (flax, ours)):
        assert not np.allclose(source.kernel[...], target.kernel[...])
        nnx.update(target, nnx.state(source))
        np.testing.assert_allclose(target(x), source(x), rtol=1e-5, atol=1e-5)
        source.kernel[...] += 1


def test_the_arguments_are_those_of_flax():
    assert inspect.signature(GroupedConv) == inspect.signature(nnx.Conv)
    layer = GroupedConv(2, 2, (3, 3), conv_general_dilated=jax.lax.conv_general_dilated, rngs=nnx.Rngs(0))
    assert layer.conv_general_dilated is jax.lax.conv_general_dilated
