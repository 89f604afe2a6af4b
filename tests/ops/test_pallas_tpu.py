"""Kernels for TPUs, computed by XLA's operations, against XLA's own convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec

from epsanet_jax.ops import generation, grouped_conv, pallas_tpu
from epsanet_jax.ops.plain import Window


def window(size, stride=1):
    half = size // 2, size // 2
    return Window((stride, stride), (half, half))


USUAL = {
    'shape': (2, 8, 8, 64),
    'dtype': jnp.dtype('float32'),
    'kernels': [(3, 3, 8, 16)],
    'windows': [window(3)],
    'groups': [8],
}


@pytest.mark.parametrize(
    'change',
    [
        {'dtype': jnp.dtype('float64')},
        {'shape': (0, 8, 8, 64)},
        {'kernels': [(4, 4, 8, 16)]},
        {'kernels': [(3, 5, 8, 16)]},
        {'kernels': [(1, 1, 8, 16)], 'windows': [Window()]},
        {'windows': [Window((2, 1), ((1, 1), (1, 1)))]},
        {'windows': [Window((1, 1), ((1, 1), (1, 1)), (2, 2))]},
        {'windows': [Window()]},
        {'windows': [window(3, 4)]},  # some rows are read by no output
        {'groups': [1], 'kernels': [(3, 3, 64, 16)]},
        {'groups': [16], 'shape': (2, 8, 8, 192), 'kernels': [(3, 3, 12, 16)]},  # no whole registers
        {'shape': (2, 8, 8, 40), 'groups': [5], 'kernels': [(3, 3, 8, 5)]},
        {'shape': (2, 1120, 1120, 64)},  # too large for the memory of the chip
    ],
)
@pytest.mark.parametrize('direction', ['forward', 'input_gradient', 'weight_gradient'])
def test_other_convolutions_are_left_to_xla(direction, change):
    assert pallas_tpu.taken(direction, **USUAL) == [0]
    assert pallas_tpu.taken(direction, **USUAL | change) == []


@pytest.mark.parametrize('direction', ['forward', 'input_gradient', 'weight_gradient'])
def test_those_of_the_same_images_are_taken_together(direction):
    kernels = [(3, 3, 64, 16), (3, 3, 16, 16), (4, 4, 8, 16), (5, 5, 8, 16)]
    several = {'kernels': kernels, 'windows': [window(k[0]) for k in kernels], 'groups': [1, 4, 8, 8]}
    assert pallas_tpu.taken(direction, **USUAL | several) == [0, 1, 3]


def test_kernels_must_fit_into_the_memory_of_the_generation():
    sizes, groups = (3, 5, 7, 9), [32] * 4
    convolutions = [(k, k, 16, 128) for k in sizes], [window(k) for k in sizes], groups

    def taken(device_kind):
        with generation.lowering_for(device_kind):
            return pallas_tpu.taken('forward', (128, 14, 14, 512), jnp.dtype('bfloat16'), *convolutions)

    assert taken('TPU v5 lite') == taken('TPU v6 lite') == [0, 1, 2, 3]
    assert taken('TPU v5') == taken('TPU v4') == []


@pytest.fixture
def small(rng):
    """Returns images and a kernel of 2 groups."""
    return jnp.asarray(rng.standard_normal((4, 4, 4, 16)), 'float32'), jnp.asarray(
        rng.standard_normal((3, 3, 8, 16)), 'float32'
    )


def gradients(algorithm):
    def loss(x, kernel):
        return (grouped_conv(x, kernel, groups=2, algorithm=algorithm) ** 2).sum()

    return jax.grad(loss, (0, 1))


def assert_equal(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


TRANSFORMS = {
    'remat': lambda f, x, k: jax.remat(f)(x, k),
    'jvp of grad': lambda f, x, k: jax.jvp(f, (x, k), (x, k)),
    'vmap': lambda f, x, k: jax.vmap(f)(jnp.stack([x, 2 * x]), jnp.stack([k, k + 1])),
    'vmap with one kernel': lambda f, x, k: jax.vmap(f, (0, None))(jnp.stack([x, 2 * x]), k),
}


@pytest.mark.parametrize('transform', TRANSFORMS)
def test_gradients_of_the_op_equal_stock(small, transform):
    apply = TRANSFORMS[transform]
    assert_equal(apply(gradients('pallas'), *small), apply(gradients('stock'), *small))


def test_gradients_in_a_shard_map_equal_those_of_one_device(small):
    mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def local(x, kernel):
        dx, dkernel = gradients('pallas')(x, kernel)
        return dx, jax.lax.psum(dkernel, 'data')

    rows, same = PartitionSpec('data'), PartitionSpec()
    step = jax.shard_map(local, mesh=mesh, in_specs=(rows, same), out_specs=(rows, same), check_vma=False)
    assert_equal(jax.jit(step)(*small), gradients('stock')(*small))


def lowered(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=('tpu',)).as_text()


@pytest.mark.parametrize(
    'kernel', ['toeplitz_convolution', 'toeplitz_input_gradient', 'toeplitz_weight_gradient']
)
def test_kernel_is_used_on_tpus_by_name_alone(small, kernel):
    assert kernel in lowered(gradients('pallas'), *small)
    assert kernel not in lowered(gradients('auto'), *small)


@pytest.mark.parametrize('check_vma', [False, True])
def test_kernel_is_used_in_a_shard_map(small, check_vma):
    mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows, same = PartitionSpec('data'), PartitionSpec()

    def local(x, kernel):
        dx, dkernel = gradients('pallas')(x, kernel)
        return dx, dkernel if check_vma else jax.lax.psum(dkernel, 'data')

    step = jax.shard_map(local, mesh=mesh, in_specs=(rows, same), out_specs=(rows, same), check_vma=check_vma)
    assert 'toeplitz_weight_gradient' in lowered(step, *small)


def test_exports_for_several_platforms_are_portable(small):
    exported = export.export(jax.jit(gradients('pallas')), platforms=('cpu', 'tpu'))(*small)
    again = export.deserialize(exported.serialize())
    assert again.platforms == ('cpu', 'tpu')
    assert_equal(again.call(*small), gradients('stock')(*small))
