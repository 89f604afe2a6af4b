"""Derivatives, vmap and meshes of the primitives behind `grouped_conv`."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from epsanet_jax.ops import bilinear, grouped_conv, pyramid_conv

BATCH = PartitionSpec('data')


def draw(rng, images=2, groups=4, channels=8):
    x = jnp.asarray(rng.standard_normal((images, 5, 6, channels)))
    return x, jnp.asarray(rng.standard_normal((3, 2, channels // groups, 8)))


def conv(x, kernel, groups=4, algorithm='auto'):
    return grouped_conv(x, kernel, groups=groups, stride=(2, 1), dilation=(1, 2), algorithm=algorithm)


@pytest.mark.parametrize('algorithm', ['auto', 'stock'])
def test_derivatives_up_to_the_third_order_equal_differences(rng, algorithm):
    x, kernel = draw(rng, images=1)
    check_grads(functools.partial(conv, algorithm=algorithm), (x, kernel), order=3, modes=['fwd', 'rev'])


def test_each_order_of_derivative_uses_the_three_primitives(rng):
    def loss(x, kernel):
        return (conv(x, kernel) ** 3).sum()

    third = jax.grad(lambda x, k: jax.grad(lambda x, k: jax.grad(loss)(x, k).sum(), 1)(x, k).sum())
    text = str(jax.make_jaxpr(third)(*draw(rng)))
    assert 'conv_general_dilated' not in text
    assert {'grouped_conv[', 'grouped_conv_input_gradient[', 'grouped_conv_weight_gradient['} <= set(
        re.findall(r'grouped_conv\w*\[', text)
    )


def pyramid(x, kernels, algorithm):
    return pyramid_conv(x, kernels, groups=(1, 2, 4), algorithm=algorithm)


@pytest.mark.parametrize(('algorithm', 'barriers'), [('dense', 1), ('tiled', 7)])
def test_on_a_gpu_tiles_and_gradients_of_large_kernels_are_stored(rng, monkeypatch, algorithm, barriers):
    x = jnp.asarray(rng.standard_normal((2, 6, 6, 8)))
    sizes = ((3, 8), (5, 4), (7, 2))  # only 7x7 is larger than the images
    kernels = [jnp.asarray(rng.standard_normal((k, k, inputs, 8))) for k, inputs in sizes]

    def loss(x, kernels):
        return sum((y**3).sum() for y in pyramid(x, kernels, algorithm))

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
    lowered = gradient.trace(x, kernels).lower(lowering_platforms=('cuda',))
    assert lowered.as_text().count('optimization_barrier') == barriers
    expected = gradient(x, kernels)
    monkeypatch.setattr(bilinear, 'GPUS', ('cpu',))
    jax.clear_caches()
    chex.assert_trees_all_close(gradient(x, kernels), expected, rtol=1e-12)


@pytest.mark.parametrize('dims', [(0, None), (None, 0), (0, 0), (1, 3), (3, None), (None, 2)])
@pytest.mark.parametrize('groups', [1, 4])
def test_vmap_equals_a_loop_in_value_and_gradients(rng, dims, groups):
    x, kernel = draw(rng, groups=groups)
    stacked = [
        a if dim is None else jnp.stack([a, -2 * a, a + 1], axis=dim)
        for a, dim in zip((x, kernel), dims, strict=True)
    ]

    def results(x, kernel):
        return jax.value_and_grad(lambda x, k: (conv(x, k, groups) ** 3).sum(), (0, 1))(x, kernel)

    actual = jax.vmap(results, dims)(*stacked)
    for i in range(3):
        one = [a if dim is None else jnp.take(a, i, axis=dim) for a, dim in zip(stacked, dims, strict=True)]
        chex.assert_trees_all_close(
            jax.tree.map(lambda a, i=i: a[i], actual), results(*one), rtol=1e-9, atol=1e-8
        )


def test_vmap_in_vmap_and_jacobians_equal_stock(rng):
    x, kernel = draw(rng)
    kernels, images = jnp.stack([kernel, 2 * kernel]), jnp.stack([x, -x, x + 1])

    def each(algorithm):
        one = functools.partial(conv, algorithm=algorithm)
        nested = jax.vmap(jax.vmap(one, (0, None)), (None, 0))(images, kernels)
        return nested, jax.jacrev(one, 1)(x[:1], kernel), jax.jacfwd(one, 0)(x[:1], kernel)

    chex.assert_trees_all_close(each('auto'), each('stock'), rtol=1e-9, atol=1e-9)


def test_a_gradient_of_some_kernels_computes_no_others(rng):
    x = jnp.asarray(rng.standard_normal((2, 6, 6, 8)))
    kernels = [jnp.asarray(rng.standard_normal((k, k, 4, 8))) for k in (3, 5)]

    def loss(first, second):
        return sum((y**2).sum() for y in pyramid_conv(x, (first, second), groups=(2, 2)))

    text = str(jax.make_jaxpr(jax.grad(loss))(*kernels))
    assert re.findall(r'groups=(\(.*?\))', text.split('grouped_conv_weight_gradient')[1])[0] == '(2,)'
    expected = jax.grad(lambda k: (grouped_conv(x, k, groups=2, algorithm='stock') ** 2).sum())(kernels[0])
    np.testing.assert_allclose(jax.grad(loss)(*kernels), expected, rtol=1e-10, atol=1e-10)


def test_it_runs_without_jit(rng):
    x, kernel = draw(rng)
    expected = jax.grad(lambda x, k: conv(x, k).sum(), (0, 1))(x, kernel)
    with jax.disable_jit():
        actual = jax.grad(lambda x, k: conv(x, k).sum(), (0, 1))(x, kernel)
    chex.assert_trees_all_close(actual, expected, rtol=1e-12)


def test_rematerialisation_gives_the_same_gradients(rng):
    def loss(x, kernel):
        return (jnp.sin(conv(x, kernel)) ** 2).sum()

    x, kernel = draw(rng)
    expected = jax.grad(loss, (0, 1))(x, kernel)
    actual = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(x, kernel)
    chex.assert_trees_all_close(actual, expected, rtol=1e-12)


def loss_of(x, kernel, groups, stride, algorithm='auto'):
    return (grouped_conv(x, kernel, groups=groups, stride=stride, algorithm=algorithm) ** 2).sum()


# Depthwise, thin and wide groups: each with other algorithms on a CPU.
SHAPES = {'depthwise': (16, 16, 5, 2), 'thin': (8, 32, 3, 1), 'wide': (2, 64, 3, 1), '1x1': (4, 32, 1, 1)}


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_no_device_gathers_the_images_of_others(rng, kind, shape):
    groups, channels, size, stride = SHAPES[shape]
    mesh = jax.make_mesh((8,), ('data',), axis_types=(kind,))
    x = jnp.asarray(rng.standard_normal((16, 8, 8, channels)))
    kernel = jnp.asarray(rng.standard_normal((size, size, channels // groups, channels)))
    function = functools.partial(loss_of, groups=groups, stride=stride)
    expected = jax.value_and_grad(functools.partial(function, algorithm='stock'), (0, 1))(x, kernel)
    with jax.set_mesh(mesh):
        arguments = [
            jax.device_put(x, NamedSharding(mesh, BATCH)),
            jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())),
        ]
        compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(*arguments).compile()
        actual = compiled(*arguments)
    moves = re.findall(r'(all-gather|all-to-all|collective-permute)[\w.-]*\(', compiled.as_text())
    assert moves == []
    assert actual[1][0].sharding.spec[0] == 'data'
    chex.assert_trees_all_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize('groups', [2, 17])  # side by side, and in a loop
@pytest.mark.parametrize('stride', [1, 2])
def test_no_device_gathers_images_of_large_batches(groups, stride):
    """Weight gradients take large batches in parts."""
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    sharded, whole = NamedSharding(mesh, BATCH), NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((64, 14, 14, 64 * groups), jnp.float32, sharding=sharded)
    kernel = jax.ShapeDtypeStruct((3, 3, 64, 64 * groups), jnp.float32, sharding=whole)
    function = functools.partial(loss_of, groups=groups, stride=stride)
    compiled = jax.jit(jax.grad(function, (0, 1))).lower(x, kernel).compile().as_text()
    assert re.findall(r'(all-gather|all-to-all|collective-permute)[\w.-]*\(', compiled) == []


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('checked', [True, False])
def test_in_a_shard_map_kernel_gradients_are_sums_over_the_devices(rng, shape, checked):
    groups, channels, size, stride = SHAPES[shape]
    mesh = jax.make_mesh((4,), ('data',), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    x = jnp.asarray(rng.standard_normal((4, 6, 6, channels)))
    kernel = jnp.asarray(rng.standard_normal((size, size, channels // groups, channels)))
    function = functools.partial(loss_of, groups=groups, stride=stride)

    def local(x, kernel):
        dx, dkernel = jax.grad(function, (0, 1))(x, kernel)
        return dx, dkernel if checked else jax.lax.psum(dkernel, 'data')

    spread = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(BATCH, PartitionSpec()),
        out_specs=(BATCH, PartitionSpec()),
        check_vma=checked,
    )
    expected = jax.grad(functools.partial(function, algorithm='stock'), (0, 1))(x, kernel)
    chex.assert_trees_all_close(
        jax.device_get(jax.jit(spread)(x, kernel)), jax.device_get(expected), rtol=1e-9, atol=1e-8
    )
