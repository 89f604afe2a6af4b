"""Weight gradients by the kernel for TPUs, computed by XLA's operations, against XLA's own convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec

from epsanet_jax.ops import grouped_conv, pallas_tpu, rewrites
from epsanet_jax.ops.plain import Window

# images, rows, columns, groups, inputs and outputs of a group, kernel
CASES = {
    'own groups': (3, 4, 6, 2, 8, 2, 3),
    'merged groups': (2, 4, 4, 4, 4, 1, 5),
    'groups of two chunks, several tiles': (2, 6, 4, 2, 32, 16, 3),
    'more images than lanes': (130, 2, 2, 2, 8, 1, 3),
}


def window(size):
    return Window((1, 1), ((size // 2, size // 2),) * 2)


def arguments(rng, case, dtype):
    n, h, w, groups, inputs, outputs, size = CASES[case]
    x = jnp.asarray(rng.standard_normal((n, h, w, groups * inputs)), dtype)
    dy = jnp.asarray(rng.standard_normal((n, h, w, groups * outputs)), dtype)
    return x, dy, groups, size, (size, size, inputs, groups * outputs)


def stock(x, dy, groups, size, shape):
    def forward(kernel):
        return rewrites.stock(x, kernel, window(size), groups)

    return jax.linear_transpose(forward, jax.ShapeDtypeStruct(shape, x.dtype))(dy)[0]


@pytest.mark.parametrize(
    ('case', 'dtype', 'tolerance'),
    [
        ('own groups', 'float32', 1e-5),
        ('merged groups', 'float32', 1e-5),
        ('groups of two chunks, several tiles', 'float32', 1e-5),
        ('more images than lanes', 'float32', 1e-5),
        ('merged groups', 'bfloat16', 2**-8),
    ],
)
def test_weight_gradient_equals_stock(rng, case, dtype, tolerance):
    x, dy, groups, size, shape = arguments(rng, case, dtype)
    assert pallas_tpu.applies(x.shape, x.dtype, shape, window(size), groups)
    actual = jax.jit(lambda x, dy: pallas_tpu.weight_gradient(x, dy, groups, size, interpret=True))(x, dy)
    expected = stock(x.astype('float32'), dy.astype('float32'), groups, size, shape)
    assert (actual.dtype, actual.shape) == (x.dtype, shape)
    limit = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual.astype('float32'), expected, rtol=tolerance, atol=limit)


@pytest.mark.parametrize(
    'change',
    [
        {'dtype': 'float64'},
        {'shape': (0, 8, 8, 64)},
        {'kernel': (4, 4, 8, 16)},
        {'kernel': (3, 5, 8, 16)},
        {'kernel': (1, 1, 8, 16), 'window': Window()},
        {'window': Window((2, 2), ((1, 1), (1, 1)))},
        {'window': Window((1, 1), ((1, 1), (1, 1)), (2, 2))},
        {'window': Window()},
        {'groups': 1, 'kernel': (3, 3, 64, 16)},
        {'groups': 16, 'shape': (2, 8, 8, 192), 'kernel': (3, 3, 12, 16)},  # no whole registers
        {'shape': (2, 8, 8, 40), 'groups': 5, 'kernel': (3, 3, 8, 5)},
        {'shape': (2, 224, 224, 64)},  # too large for the memory of the chip
    ],
)
def test_other_convolutions_are_left_to_xla(change):
    given = {'shape': (2, 8, 8, 64), 'dtype': 'float32', 'kernel': (3, 3, 8, 16), 'groups': 8}
    given = {**given, 'window': window(3)}
    assert pallas_tpu.applies(**{**given, 'dtype': jnp.dtype('float32')})
    given |= change
    assert not pallas_tpu.applies(**{**given, 'dtype': jnp.dtype(given['dtype'])})


@pytest.fixture
def small(rng):
    """Returns images and a kernel of 2 groups."""
    return jnp.asarray(rng.standard_normal((4, 4, 4, 16)), 'float32'), jnp.asarray(
        rng.standard_normal((3, 3, 8, 4)), 'float32'
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


def test_kernel_is_used_on_tpus_by_name_alone(small):
    assert 'toeplitz_weight_gradient' in lowered(gradients('pallas'), *small)
    assert 'toeplitz_weight_gradient' not in lowered(gradients('auto'), *small)


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
