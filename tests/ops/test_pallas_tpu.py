"""Kernels for TPUs, computed by XLA's operations, against XLA's own convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec

from epsanet_jax.ops import grouped_conv, pallas_tpu
from epsanet_jax.ops.plain import Window


@pytest.fixture(autouse=True)
def small_images_have_kernels(monkeypatch):
    monkeypatch.setattr(pallas_tpu, 'SMALLEST', 1)
    monkeypatch.setattr(pallas_tpu, 'FEWEST', 1)


def window(size, stride=1):
    half = size // 2, size // 2
    return Window((stride, stride), (half, half))


@pytest.mark.parametrize(
    'change',
    [
        {'dtype': 'float64'},
        {'shape': (0, 8, 8, 64)},
        {'kernel': (4, 4, 8, 16)},
        {'kernel': (3, 5, 8, 16)},
        {'kernel': (1, 1, 8, 16), 'window': Window()},
        {'window': Window((2, 1), ((1, 1), (1, 1)))},
        {'window': Window((1, 1), ((1, 1), (1, 1)), (2, 2))},
        {'window': Window()},
        {'groups': 16, 'shape': (2, 8, 8, 192), 'kernel': (3, 3, 12, 16)},  # no whole registers
        {'shape': (2, 8, 8, 40), 'groups': 5, 'kernel': (3, 3, 8, 5)},
        {'shape': (2, 224, 224, 64)},  # too large for the memory of the chip
    ],
)
@pytest.mark.parametrize('direction', ['forward', 'weight_gradient'])
def test_other_convolutions_are_left_to_xla(direction, change):
    given = {'shape': (2, 8, 8, 64), 'dtype': 'float32', 'kernel': (3, 3, 8, 16), 'groups': 8}
    given = {**given, 'window': window(3)}
    assert pallas_tpu.applies(direction, **{**given, 'dtype': jnp.dtype('float32')})
    given |= change
    assert not pallas_tpu.applies(direction, **{**given, 'dtype': jnp.dtype(given['dtype'])})


@pytest.mark.parametrize(
    ('direction', 'stride', 'groups', 'expected'),
    [
        ('forward', 2, 8, True),
        ('forward', 1, 1, True),
        ('weight_gradient', 2, 8, True),
        ('weight_gradient', 1, 1, False),
        ('input_gradient', 1, 8, False),  # XLA's own are as fast
    ],
)
def test_which_directions_have_a_kernel(direction, stride, groups, expected):
    arguments = (2, 8, 8, 64), jnp.dtype('float32'), (3, 3, 64 // groups, 16), window(3, stride), groups
    assert pallas_tpu.applies(direction, *arguments) == expected


@pytest.mark.parametrize(
    ('size', 'outputs', 'groups', 'expected'),
    [(14, 16, 4, True), (13, 16, 4, False), (7, 32, 1, True), (56, 16, 1, False)],
)
def test_forward_has_a_kernel_where_it_is_faster(monkeypatch, size, outputs, groups, expected):
    monkeypatch.undo()
    arguments = (2, size, size, 64), jnp.dtype('bfloat16'), (3, 3, 64 // groups, outputs), window(3), groups
    assert pallas_tpu.applies('forward', *arguments) == expected


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


@pytest.mark.parametrize('kernel', ['toeplitz_convolution', 'toeplitz_weight_gradient'])
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
