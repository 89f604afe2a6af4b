import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from epsanet_jax import InputError
from epsanet_jax.models import BatchNorm
from epsanet_jax.models.norm import Weighted

pytestmark = pytest.mark.usefixtures('strict')
F64 = {'dtype': jnp.float64, 'param_dtype': jnp.float64}


def train(norm, variables, x):
    return norm.apply(variables, x, train=True, mutable=['batch_stats'])


def test_groups_are_normalised_separately_and_averaged_into_the_running_statistics(rng):
    x = rng.standard_normal((6, 2, 2, 3)) * np.arange(1, 7)[:, None, None, None]
    variables = BatchNorm(**F64).init(jax.random.key(0), x)
    y, new = train(BatchNorm(group=2, **F64), variables, x)
    parts = [train(BatchNorm(**F64), variables, x[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose(y, np.concatenate([p[0] for p in parts]), rtol=1e-12)
    for stat in ('mean', 'var'):
        expected = np.mean([p[1]['batch_stats'][stat] for p in parts], axis=0)
        np.testing.assert_allclose(new['batch_stats'][stat], expected, rtol=1e-12)
    assert not np.allclose(y, train(BatchNorm(**F64), variables, x)[0])


def test_a_group_spread_over_devices_equals_one_device(rng):
    x = rng.standard_normal((8, 3, 3, 4)) * np.arange(1, 9)[:, None, None, None]
    weights = rng.standard_normal(x.shape)
    variables = BatchNorm(**F64).init(jax.random.key(0), x)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)

    def loss(norm, variables, x, weights):
        y, new = train(norm, variables, x)
        return (y * weights).sum(), new

    def spread(variables, x, weights):
        norm = BatchNorm(group=2, axis_name='b', **F64)
        (_, new), gradient = jax.value_and_grad(loss, 2, has_aux=True)(norm, variables, x, weights)
        return gradient, jax.lax.pmean(new, ('a', 'b'))

    rows = PartitionSpec(('a', 'b'))
    spread = jax.shard_map(
        spread,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows, rows),
        out_specs=(rows, PartitionSpec()),
        check_vma=False,
    )
    gradient, new = jax.jit(spread)(variables, x, weights)
    (_, expected_new), expected = jax.value_and_grad(loss, 2, has_aux=True)(
        BatchNorm(group=2, **F64), variables, x, weights
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)
    for stat in ('mean', 'var'):
        np.testing.assert_allclose(new['batch_stats'][stat], expected_new['batch_stats'][stat], rtol=1e-12)


def test_statistics_of_bfloat16_activations_are_float32(rng):
    x = jnp.asarray(rng.standard_normal((64, 8, 8, 2)) + 10, jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x)
    y, new = train(norm, variables, x)
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64).mean((0, 1, 2)) * 0.1
    np.testing.assert_allclose(new['batch_stats']['mean'], expected, rtol=1e-5)
    assert new['batch_stats']['mean'].dtype == jnp.float32


def test_the_variance_is_exact_if_the_running_mean_is_close_to_a_large_mean(rng):
    x = (rng.standard_normal((64, 4, 4, 2)) * 0.01 + 100).astype(np.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x)
    variables['batch_stats']['mean'] = jnp.full(2, 100, jnp.float32)
    y, _ = train(norm, variables, x)
    mean, var = np.mean(x, (0, 1, 2), np.float64), np.var(x, (0, 1, 2), np.float64)
    expected = (x - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-2)


def test_a_batch_that_does_not_divide_is_refused(rng):
    x = rng.standard_normal((6, 2, 2, 3))
    with pytest.raises(InputError, match='6 examples does not divide into groups of 4'):
        train(BatchNorm(group=4, **F64), BatchNorm(**F64).init(jax.random.key(0), x), x)


def test_one_value_per_channel_is_refused(rng):
    x = rng.standard_normal((2, 1, 1, 3))
    with pytest.raises(InputError, match='more than one value per channel'):
        train(BatchNorm(group=1, **F64), BatchNorm(**F64).init(jax.random.key(0), x), x)


@pytest.mark.parametrize(('size', 'message'), [((0, 2, 2), 'an empty batch'), ((2, 0, 2), 'got 0')])
@pytest.mark.parametrize('group', [None, 2])
def test_training_without_images_or_pixels_is_refused(group, size, message):
    x, variables = jnp.zeros((*size, 3)), BatchNorm(**F64).init(jax.random.key(0), jnp.zeros((2, 2, 2, 3)))
    with pytest.raises(InputError, match=message):
        train(BatchNorm(group=group, **F64), variables, x)
    assert BatchNorm(group=group, **F64).apply(variables, x).shape == x.shape


@pytest.fixture(params=['tpu', 'cuda', 'default'])
def platform(request, monkeypatch):
    """Makes `platform_dependent` use the branch of this platform."""

    def chosen(*args, **branches):
        return branches.get(request.param, branches['default'])(*args)

    monkeypatch.setattr(jax.lax, 'platform_dependent', chosen)


@pytest.mark.usefixtures('platform')
@pytest.mark.parametrize('group', [None, 2])
@pytest.mark.parametrize('mean', [0, 1000])
def test_normalising_a_weighted_activation_equals_normalising_its_value(rng, group, mean):
    parts = tuple(rng.standard_normal((4, 3, 5, c)) * (c + 1) + mean for c in (2, 1, 3))
    weights = rng.uniform(0.1, 0.6, (4, 6))
    cotangent = rng.standard_normal((4, 3, 5, 6))
    norm = BatchNorm(group=group, **F64)
    variables = norm.init(jax.random.key(0), np.zeros((4, 3, 5, 6)))
    variables['params'] = {'scale': rng.uniform(0.5, 2, 6), 'bias': rng.standard_normal(6)}
    variables['batch_stats']['mean'] = jnp.full(6, mean / 3, jnp.float64)

    def fused(params, parts, weights, training=True):
        means = jnp.concatenate([p.mean(axis=(1, 2)) for p in parts], axis=-1)
        return apply(params, Weighted(parts, means, weights), training)

    def plain(params, parts, weights, training=True):
        return apply(params, jnp.concatenate(parts, axis=-1) * weights[:, None, None], training)

    def apply(params, x, training):
        y, new = norm.apply({**variables, 'params': params}, x, train=training, mutable=['batch_stats'])
        return (y * cotangent).sum(), (y, new)

    for training in (True, False):
        for function in (fused, plain):
            differentiated = jax.value_and_grad(function, (0, 1, 2), has_aux=True)
            result = differentiated(variables['params'], parts, weights, training)
            if function is fused:
                actual = result
        chex.assert_trees_all_close(actual, result, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures('platform')
def test_the_value_of_a_weighted_activation_is_parts_times_weights(rng):
    parts = tuple(rng.standard_normal((2, 3, 3, 2)).astype(np.float32) for _ in range(2))
    weights = rng.uniform(size=(2, 4)).astype(np.float32)
    expected = np.concatenate(parts, -1) * weights[:, None, None]
    np.testing.assert_allclose(Weighted(parts, weights, weights).value(), expected, rtol=1e-6)


def test_a_gpu_reads_the_result_of_a_matrix_product_behind_a_barrier_and_not_its_gradient(rng):
    x = jnp.asarray(rng.standard_normal((4, 2, 2, 3)), np.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x)

    def normalised(x, train):
        return norm.apply(variables, x, train=train, mutable=['batch_stats'])[0].sum()

    def barriers(platform, function, *, train):
        lowered = jax.jit(function, static_argnums=1).trace(x, train).lower(lowering_platforms=(platform,))
        return lowered.as_text().count('optimization_barrier')

    assert barriers('cuda', normalised, train=True) == barriers('cuda', jax.grad(normalised), train=True) == 1
    assert barriers('cuda', normalised, train=False) == barriers('cpu', normalised, train=True) == 0
