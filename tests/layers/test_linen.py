"""`GroupedConv` and the interceptor `fast_convs` against flax.linen's Conv."""

import functools
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax.sharding import AxisType, PartitionSpec

from epsanet_jax.layers.linen import GroupedConv, fast_convs

# Input shape and arguments of the layer: first those that `grouped_conv` computes, then the others.
SUPPORTED = {
    'dense': ((2, 8, 9, 6), {'kernel_size': (3, 3)}),
    'grouped': ((2, 8, 9, 8), {'kernel_size': (5, 5), 'feature_group_count': 4}),
    'depthwise': ((2, 8, 9, 8), {'kernel_size': (7, 7), 'feature_group_count': 8}),
    'stride 2': ((2, 8, 9, 8), {'kernel_size': (3, 3), 'strides': 2, 'padding': 1, 'feature_group_count': 2}),
    'SAME at stride 2': ((2, 7, 9, 8), {'kernel_size': (3, 3), 'strides': 2}),
    'dilated': ((2, 8, 9, 8), {'kernel_size': (3, 3), 'kernel_dilation': 2, 'feature_group_count': 2}),
    '1x1': ((2, 8, 9, 8), {'kernel_size': (1, 1), 'padding': 'VALID'}),
    'without bias': ((2, 8, 9, 8), {'kernel_size': (3, 3), 'use_bias': False}),
    'masked': ((2, 4, 4, 2), {'kernel_size': (3, 3), 'mask': np.tril(np.ones((3, 3, 2, 8), np.float32))}),
    'no batch dimension': ((8, 9, 8), {'kernel_size': (3, 3), 'feature_group_count': 2}),
    'two batch dimensions': ((2, 3, 8, 9, 8), {'kernel_size': (3, 3), 'feature_group_count': 2}),
    'VALID': ((2, 8, 9, 8), {'kernel_size': (3, 3), 'padding': 'VALID', 'feature_group_count': 2}),
    'CIRCULAR': ((2, 8, 9, 8), {'kernel_size': (3, 3), 'padding': 'CIRCULAR'}),
    'uneven padding': ((2, 8, 8, 8), {'kernel_size': (3, 3), 'strides': 2}),
    'strides that differ': ((2, 8, 9, 8), {'kernel_size': (3, 3), 'strides': (2, 1), 'padding': 1}),
    'rectangular': ((2, 8, 9, 8), {'kernel_size': (3, 5)}),
    'even': ((2, 8, 9, 8), {'kernel_size': (2, 2)}),
}
OTHERS = {
    'input dilation': ((2, 8, 9, 8), {'kernel_size': (3, 3), 'input_dilation': 2, 'padding': 1}),
    'precision': ((2, 8, 9, 8), {'kernel_size': (3, 3), 'precision': 'highest'}),
    '1-D': ((2, 9, 8), {'kernel_size': (3,), 'feature_group_count': 2}),
}
CASES = SUPPORTED | OTHERS


def value_and_gradients(layer, variables, x):
    def loss(variables, x):
        y = layer.apply(variables, x)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), y

    gradients, y = jax.grad(loss, (0, 1), has_aux=True)(variables, x)
    return y, gradients


@pytest.mark.parametrize('case', CASES)
def test_parameters_outputs_and_gradients_are_those_of_flax(rng, calls, case):
    shape, kwargs = CASES[case]
    ours, flax = (
        layer(features=8, bias_init=nn.initializers.ones, **kwargs) for layer in (GroupedConv, nn.Conv)
    )
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    variables = ours.init(jax.random.key(3), x)
    chex.assert_trees_all_equal(variables, flax.init(jax.random.key(3), x))
    calls.clear()
    actual = value_and_gradients(ours, variables, x)
    assert len(calls) == (case in SUPPORTED)
    expected = value_and_gradients(flax, variables, x)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16(rng, calls):
    x = jnp.asarray(rng.standard_normal((2, 8, 8, 16)), jnp.float32)
    kwargs = {'features': 16, 'kernel_size': (5, 5), 'feature_group_count': 4, 'dtype': jnp.bfloat16}
    variables = GroupedConv(**kwargs).init(jax.random.key(0), x)
    actual, expected = (layer(**kwargs).apply(variables, x) for layer in (GroupedConv, nn.Conv))
    assert actual.dtype == expected.dtype == jnp.bfloat16
    assert len(calls) == 2
    np.testing.assert_allclose(actual.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.02, atol=0.02)


class Network(nn.Module):
    conv: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        return self.conv(4, (3, 3), feature_group_count=2, name='named')(self.conv(4, (3, 3))(x))


def test_layers_without_names_have_the_parameters_of_flax():
    x = jnp.ones((1, 4, 4, 2))
    ours, flax = (Network(conv).init(jax.random.key(0), x) for conv in (GroupedConv, nn.Conv))
    assert set(ours['params']) == {'Conv_0', 'Conv_1', 'named'}
    chex.assert_trees_all_equal(ours, flax)


def test_a_convolution_of_the_user_is_used():
    def negative(*args, **kwargs):
        return -jax.lax.conv_general_dilated(*args, **kwargs)

    x = jnp.ones((1, 4, 4, 2))
    variables = GroupedConv(2, (3, 3)).init(jax.random.key(0), x)
    expected = -GroupedConv(2, (3, 3)).apply(variables, x)
    for option in ({'conv_general_dilated': negative}, {'conv_general_dilated_cls': lambda: negative}):
        actual = GroupedConv(2, (3, 3), **option).apply(variables, x)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_layers_can_be_compared_and_passed_to_jit():
    layer = GroupedConv(4, (3, 3), feature_group_count=2)
    assert layer == GroupedConv(4, (3, 3), feature_group_count=2)
    x = jnp.ones((1, 4, 4, 2))
    variables = layer.init(jax.random.key(0), x)
    apply = functools.partial(jax.jit, static_argnums=0)(lambda layer, x: layer.apply(variables, x))
    np.testing.assert_allclose(apply(layer, x), layer.apply(variables, x), rtol=1e-5)


def test_explicit_sharding_is_supported(calls):
    layer, x = GroupedConv(8, (3, 3), feature_group_count=2), jnp.ones((8, 6, 6, 8))
    variables = layer.init(jax.random.key(0), x)
    expected = layer.apply(variables, x)
    calls.clear()
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        y = jax.jit(layer.apply)(variables, jax.device_put(x, PartitionSpec('data')))
    assert len(calls) == 1
    assert y.sharding.spec[0] == 'data'
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


class ResNeXtBlock(nn.Module):
    conv: type[nn.Module] = nn.Conv
    channels: int = 8

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.relu(self.conv(self.channels, (1, 1), use_bias=False)(x))
        y = nn.relu(self.conv(self.channels, (3, 3), feature_group_count=4)(y))
        return x + self.conv(x.shape[-1], (1, 1))(y), None


class ResNeXt(nn.Module):
    conv: type[nn.Module] = nn.Conv
    block: type[nn.Module] = ResNeXtBlock

    @nn.compact
    def __call__(self, x):
        x = self.conv(8, (3, 3), strides=2, padding=1, name='stem')(x)
        x, _ = self.block(self.conv)(x)
        return nn.Dense(3)(x.mean((1, 2)))


IMAGES = np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32)
WRAPPED = {
    'plain': ResNeXtBlock,
    'remat': nn.remat(ResNeXtBlock),
    'scan': nn.scan(ResNeXtBlock, variable_axes={'params': 0}, split_rngs={'params': True}, length=2),
}


def test_checkpoints_load_in_both_directions():
    ours, flax = ResNeXt(GroupedConv), ResNeXt()
    saved = [jax.jit(net.init)(jax.random.key(i), IMAGES) for i, net in enumerate((ours, flax))]
    into_flax, into_ours = (
        serialization.from_bytes(target, serialization.to_bytes(source))
        for source, target in (saved, reversed(saved))
    )
    chex.assert_trees_all_equal([into_flax, into_ours], saved)
    for variables in (into_flax, into_ours):
        y, expected = (jax.jit(net.apply)(variables, IMAGES) for net in (ours, flax))
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', WRAPPED)
def test_interceptor_switches_a_whole_model(calls, kind):
    net = ResNeXt(block=WRAPPED[kind])

    def value_and_gradient(variables):
        return jax.jit(jax.value_and_grad(lambda v: jnp.square(net.apply(v, IMAGES)).sum()))(variables)

    variables = net.init(jax.random.key(0), IMAGES)
    expected = value_and_gradient(variables)
    assert not calls
    with nn.intercept_methods(fast_convs):
        chex.assert_trees_all_equal(net.init(jax.random.key(0), IMAGES), variables)
        calls.clear()
        actual = value_and_gradient(variables)
    assert {kernel.shape for _, kernel in calls} == {(3, 3, 3, 8), (1, 1, 8, 8), (3, 3, 2, 8)}
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_interceptor_ends_with_its_context(calls):
    layer = nn.Conv(4, (3, 3)).bind({'params': {'kernel': jnp.ones((3, 3, 3, 4)), 'bias': jnp.ones(4)}})
    with nn.intercept_methods(fast_convs):
        expected = layer(IMAGES)
        with pytest.raises(ValueError, match='Mask'):
            layer.clone(mask=jnp.ones(3), parent=layer.scope)(IMAGES)
    assert len(calls) == 1
    np.testing.assert_allclose(layer(IMAGES), expected, rtol=1e-5)
    assert len(calls) == 1


class Standardized(nn.Conv):
    """A subclass that changes the parameters and calls the method of its parent."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value - value.mean() if name == 'kernel' else value

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize(
    ('layer', 'switched'),
    [
        (nn.remat(nn.Conv)(4, (3, 3)), True),
        (Standardized(4, (3, 3)), True),
        (GroupedConv(4, (3, 3)), True),  # once
        (nn.Conv(4, (3, 3), conv_general_dilated_cls=lambda: jax.lax.conv_general_dilated), False),
        (nn.Conv(4, (3,)), False),
        (nn.Conv(4, (3, 3, 3)), False),
        (nn.ConvLocal(4, (3, 3)), False),
        (nn.ConvTranspose(4, (3, 3)), False),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_interceptor_changes_2d_convolutions_alone(calls, layer, switched):
    x = IMAGES[None] if layer.kernel_size == (3, 3, 3) else IMAGES
    variables = layer.init(jax.random.key(0), x)
    expected = layer.apply(variables, x)
    calls.clear()
    with nn.intercept_methods(fast_convs):
        y = layer.apply(variables, x)
    assert len(calls) == switched
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_importing_it_imports_neither_nnx_nor_the_trainer():
    code = (
        'import sys, epsanet_jax.layers.linen; '
        'unwanted = ("flax.nnx", "epsanet_jax.training", "epsanet_jax.data.pipeline", "PIL", "orbax"); '
        'print([name for name in unwanted if name in sys.modules])'
    )
    output = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == '[]'
