"""`replace_convs` on models of flax.nnx."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import epsanet_jax.layers
from epsanet_jax.errors import InputError
from epsanet_jax.layers import replace_convs
from epsanet_jax.layers.nnx import GroupedConv


class Block(nnx.Module):
    def __init__(self, conv, *, rngs):
        grouped = conv(8, 8, (3, 3), feature_group_count=4, rngs=rngs)
        self.convs = nnx.List([grouped, conv(8, 8, (1, 1), use_bias=False, rngs=rngs)])

    def __call__(self, x):
        return x + self.convs[1](nnx.relu(self.convs[0](x)))


class ResNeXt(nnx.Module):
    """A net that keeps its layers in all kinds of containers; one block is used twice."""

    def __init__(self, conv=nnx.Conv, *, rngs):
        self.stem = conv(3, 8, (3, 3), strides=2, padding=1, rngs=rngs)
        block = Block(conv, rngs=rngs)
        self.blocks = nnx.Dict(first=block, again=block, other=Block(conv, rngs=rngs))
        pair = conv(8, 8, (5, 5), feature_group_count=8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.pair = nnx.data(pair)
        self.tail = nnx.Sequential(nnx.relu, nnx.Conv(8, 8, (3, 3), rngs=rngs), nnx.Linear(8, 2, rngs=rngs))
        self.along = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.up = nnx.ConvTranspose(8, 8, (3, 3), rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for name in ('first', 'again', 'other'):
            x = self.blocks[name](x)
        x = self.up(self.along(self.pair[1](self.pair[0](x))))
        return self.tail(x).mean((1, 2))


IMAGES = np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32)


def value_and_gradient(net):
    return nnx.jit(nnx.value_and_grad(lambda net: jnp.square(net(IMAGES)).sum()))(net)


def test_a_whole_model_is_switched_and_keeps_its_parameters(calls):
    net, expected = ResNeXt(rngs=nnx.Rngs(0)), ResNeXt(rngs=nnx.Rngs(0))
    layers = dict(nnx.iter_modules(net))
    variables = jax.tree.leaves(nnx.state(net), is_leaf=lambda v: isinstance(v, nnx.Variable))
    assert replace_convs(net) is net
    after = dict(nnx.iter_modules(net))
    assert [(path, id(layer)) for path, layer in after.items()] == [(p, id(m)) for p, m in layers.items()]
    kept = jax.tree.leaves(nnx.state(net), is_leaf=lambda v: isinstance(v, nnx.Variable))
    assert all(a is b for a, b in zip(kept, variables, strict=True))
    assert net.blocks['first'] is net.blocks['again']

    actual = value_and_gradient(net)
    assert len(calls) == 9  # the stem, two convolutions in each of three blocks, `pair` and `tail`
    chex.assert_trees_all_close(actual, value_and_gradient(expected), rtol=1e-4, atol=1e-4)
    assert len(calls) == 9


def test_optimizers_made_before_stay_valid(calls):
    net, other = ResNeXt(rngs=nnx.Rngs(0)), ResNeXt(rngs=nnx.Rngs(0))
    for model in (net, other):
        optimizer = nnx.Optimizer(model, optax.sgd(0.01, momentum=0.9), wrt=nnx.Param)
        if model is net:
            replace_convs(net)
        for _ in range(2):
            optimizer.update(model, value_and_gradient(model)[1])
    assert calls
    chex.assert_trees_all_close(nnx.state(net), nnx.state(other), rtol=1e-4, atol=1e-5)


def test_states_load_in_both_directions():
    fast, stock = replace_convs(ResNeXt(rngs=nnx.Rngs(0))), ResNeXt(rngs=nnx.Rngs(1))
    for source, target in ((fast, stock), (stock, fast)):
        source.stem.kernel[...] += 1
        nnx.update(target, nnx.state(source))
        chex.assert_trees_all_equal(nnx.state(target), nnx.state(source))
        np.testing.assert_allclose(target(IMAGES), source(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_single_layer_and_subclasses_are_switched(calls):
    class Twice(nnx.Conv):
        def __call__(self, x):
            return 2 * super().__call__(x)

    layer = Twice(3, 4, (3, 3), rngs=nnx.Rngs(0))
    expected = layer(IMAGES)
    assert not calls
    np.testing.assert_allclose(replace_convs(layer)(IMAGES), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize('make', [nnx.Conv, GroupedConv])
def test_a_convolution_of_the_user_is_kept(calls, make):
    def negative(*args, **kwargs):
        return -jax.lax.conv_general_dilated(*args, **kwargs)

    layer = make(3, 4, (3, 3), conv_general_dilated=negative, rngs=nnx.Rngs(0))
    replace_convs(nnx.List([layer]))
    assert layer.conv_general_dilated is negative
    assert not calls


def test_switching_twice_and_switching_our_layer_change_nothing(calls):
    net = replace_convs(replace_convs(ResNeXt(GroupedConv, rngs=nnx.Rngs(0))))
    net(IMAGES)
    assert len(calls) == 9


@pytest.mark.parametrize(('module', 'name'), [(nn.Conv(3, (3, 3)), 'Conv'), ([1], 'list')])
def test_other_objects_are_refused(module, name):
    with pytest.raises(InputError, match=f'expected a flax.nnx Module, got {name}; for flax.linen, use'):
        replace_convs(module)


def test_it_is_the_public_name_of_the_package():
    assert epsanet_jax.layers.__all__ == ['replace_convs']
