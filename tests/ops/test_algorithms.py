"""Every algorithm computes the plain convolution and its gradients."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import pytest

from epsanet_jax import InputError
from epsanet_jax.ops.algorithms import (
    DIRECT,
    NAMES,
    Algorithm,
    by_name,
    check_name,
    convolve,
    convolve_all,
    input_gradient,
    weight_gradient,
)
from epsanet_jax.ops.plain import Window

STOCK = Algorithm('stock')
KERNELS, GROUPS = (3, 5, 7, 9), (1, 4, 8, 16)


def draw(rng, size, channels, kernels, groups, outputs):
    """Draws images and a kernel for each kernel size."""
    x = rng.standard_normal((2, *size, channels))
    each = zip(kernels, groups, strict=True)
    return x, tuple(rng.standard_normal((k, k, channels // g, outputs)) for k, g in each)


def half(kernel, stride):
    """Returns the window with half the kernel's size as padding on every side."""
    return Window((stride, stride), tuple((size // 2,) * 2 for size in kernel[:2]))


def assert_equal_stock(algorithms, x, kernels, stride):
    """Compares outputs and gradients with those of XLA's own convolutions."""
    groups = tuple(x.shape[3] // kernel.shape[2] for kernel in kernels)

    @functools.partial(jax.jit, static_argnums=0)
    def results(algorithms):
        windows = [half(kernel.shape, stride) for kernel in kernels]
        outputs = convolve_all(x, kernels, windows, groups, algorithms)
        dys = tuple(jnp.cos(jnp.arange(y.size)).reshape(y.shape) for y in outputs)
        dx = input_gradient(x.shape, dys, kernels, windows, groups, algorithms)
        shapes = [kernel.shape for kernel in kernels]
        return outputs, dx, weight_gradient(x, dys, shapes, windows, groups, algorithms)

    stock = (STOCK,) * len(kernels)
    chex.assert_trees_all_close(results(tuple(algorithms)), results(stock), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', ['tiled', 'folded', 'merged'])
@pytest.mark.parametrize('split', [False, True])
@pytest.mark.parametrize('merge', [1, 2, 4])
@pytest.mark.parametrize(
    ('tile', 'size', 'stride', 'kernel'),
    [((1, 2), 6, 1, 3), ((4, 4), 7, 1, 9), ((2, 8), 9, 2, 7), ((3, 2), 5, 2, 5), ((2, 2), 1, 2, 3)],
)
def test_every_merge_and_tile_equals_stock(rng, name, split, merge, tile, size, stride, kernel):
    x, kernels = draw(rng, (size, size + 1), 8, (kernel,), (4,), 8)
    assert_equal_stock([Algorithm(name, merge, tile, split)], x, kernels, stride)


@pytest.mark.parametrize(
    'algorithm',
    [
        Algorithm('banded', 4, (1, 2)),
        Algorithm('banded', 4, (1, 3)),
        Algorithm('merged', 2, phases=True),
        Algorithm('joint', 4, phases=True),
    ],
    ids=str,
)
@pytest.mark.parametrize('size', [(7, 8), (6, 5), (2, 3), (1, 1)])
@pytest.mark.parametrize(('kernel', 'stride'), [(1, 2), (3, 1), (3, 2), (5, 3), (7, 2), (9, 1)])
def test_bands_and_phases_equal_stock(rng, algorithm, size, kernel, stride):
    x, kernels = draw(rng, size, 8, (kernel,), (4,), 8)
    assert_equal_stock([algorithm], x, kernels, stride)


def test_joint_branches_with_phases_equal_stock(rng):
    x, kernels = draw(rng, (7, 6), 8, (3, 5, 9), (1, 4, 8), 8)
    joint = [Algorithm('joint', g, phases=True) for g in (1, 4)] + [Algorithm('merged', 2, phases=True)]
    assert_equal_stock(joint, x, kernels, stride=2)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(
    ('merges', 'convolutions'),
    [((1, 4, 8, 16), 1), ((1, 4, 1, 2), 2), ((1, 1, 2, 4), 2), ((1, 1, 1, 1), 4), ((1, 2, 4, 8), 2)],
)
def test_joint_branches_with_equally_many_groups_are_one_convolution(rng, stride, merges, convolutions):
    x, kernels = draw(rng, (6, 7), 32, KERNELS, GROUPS, 16)
    joint = [Algorithm('joint', merge) for merge in merges]
    windows = [half((k, k), stride) for k in KERNELS]
    conv = functools.partial(convolve_all, windows=windows, groups=GROUPS, algorithms=joint)
    lowered = jax.jit(conv).lower(x, kernels).as_text()
    assert lowered.count('stablehlo.convolution') == convolutions
    assert_equal_stock(joint, x, kernels, stride)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('merge', [1, 2, 8])
def test_branches_of_equal_groups_are_joined_at_every_merge(rng, stride, merge):
    x, kernels = draw(rng, (6, 7), 32, (3, 5, 5, 7), (8,) * 4, 16)
    joint = [Algorithm('joint', merge)] * 4
    windows = [half(kernel.shape, stride) for kernel in kernels]
    conv = functools.partial(convolve_all, windows=windows, groups=[8] * 4, algorithms=joint)
    assert jax.jit(conv).lower(x, kernels).as_text().count('stablehlo.convolution') == 1
    assert_equal_stock(joint, x, kernels, stride)


def test_phases_insert_no_zeros_into_the_input_gradient(rng):
    x, (k,) = draw(rng, (8, 8), 8, (5,), (4,), 8)

    def dilations(algorithm):
        window = half(k.shape, 2)
        forward = functools.partial(convolve, kernel=k, window=window, groups=4, algorithm=algorithm)
        gradient = jax.jit(lambda dy: jax.linear_transpose(forward, x)(dy)[0])
        text = gradient.lower(rng.standard_normal((2, 4, 4, 8))).as_text()
        return set(re.findall(r'lhs_dilate = \[(\d, \d)\]', text)) - {'1, 1'}

    assert dilations(STOCK) == {'2, 2'}
    assert not dilations(Algorithm('merged', phases=True))


@pytest.mark.parametrize(
    ('channels', 'groups', 'merge'), [(4, 16, 16), (8, 16, 8), (16, 8, 4), (64, 8, 1), (48, 4, 2), (2, 4, 4)]
)
def test_merged_groups_have_at_least_64_channels(channels, groups, merge):
    assert by_name('merged', (3, 3, channels, groups), groups) == Algorithm('merged', merge, split=True)


@pytest.mark.parametrize('name', NAMES)
def test_a_name_that_does_not_apply_is_stock(name):
    applies_to_1x1 = {
        'phases': Algorithm('merged', phases=True),
        **{name: Algorithm(name) for name in ('matmul', 'by_channel', 'by_image')},
    }
    assert by_name(name, (1, 1, 8, 8), 1) == applies_to_1x1.get(name, STOCK)


@pytest.mark.parametrize('name', DIRECT)
def test_multiply_adds_have_a_bound(name):
    assert by_name(name, (9, 9, 4, 64), 16) == Algorithm(name)
    assert by_name(name, (9, 9, 8, 64), 8) == STOCK
    assert by_name(name, (9, 9, 4, 256), 8) == STOCK


def test_an_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match=r"'tild'.*did you mean 'tiled'.*known: auto, stock"):
        check_name('tild')
