import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epsanet_jax import InputError
from epsanet_jax.ops import ALGORITHMS, choice, grouped_conv, pyramid_conv
from epsanet_jax.ops.algorithms import DIRECT, Algorithm

KERNELS, GROUPS = (3, 5, 7, 9), (1, 4, 8, 16)


def inputs(rng, size=(6, 7), outputs=(16, 16, 32, 16), dtype=np.float64):
    x = rng.standard_normal((2, *size, 32)).astype(dtype)
    each = zip(KERNELS, GROUPS, outputs, strict=True)
    return x, tuple(rng.standard_normal((k, k, 32 // g, o)).astype(dtype) for k, g, o in each)


def separate(x, kernels, **kwargs):
    each = zip(kernels, GROUPS, strict=True)
    return tuple(grouped_conv(x, k, groups=g, algorithm='stock', **kwargs) for k, g in each)


def value_and_gradients(pyramid, x, kernels):
    outputs, pull = jax.vjp(pyramid, x, kernels)
    return outputs, pull(tuple(jnp.cos(jnp.arange(y.size)).reshape(y.shape) for y in outputs))


@pytest.mark.parametrize(
    'algorithm',
    ['auto', *(pytest.param(n, marks=pytest.mark.slow) if n in DIRECT else n for n in ALGORITHMS)],
)
@pytest.mark.parametrize(
    ('stride', 'dilation'), [(2, 1), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((1, 1), (1, 2)))]
)
def test_equals_separate_convolutions(rng, algorithm, stride, dilation):
    kwargs = {'stride': stride, 'dilation': dilation}
    pyramid = functools.partial(pyramid_conv, groups=GROUPS, algorithm=algorithm, **kwargs)
    x, kernels = inputs(rng)
    expected = value_and_gradients(functools.partial(separate, **kwargs), x, kernels)
    actual = jax.jit(functools.partial(value_and_gradients, pyramid))(x, kernels)
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def joint_input_gradients(monkeypatch):
    def choose(platform, problem):
        stock = Algorithm('stock')
        joint = Algorithm('joint', problem.groups) if platform == 'cpu' else stock
        return choice.Choice(stock, joint, stock)

    monkeypatch.setattr(choice, 'choose', choose)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures('joint_input_gradients')
def test_a_single_direction_can_be_joint(rng):
    x, kernels = inputs(rng)
    auto = functools.partial(pyramid_conv, groups=GROUPS)
    gradient = jax.jit(jax.grad(lambda x, kernels: sum(y.sum() for y in auto(x, kernels))))
    assert gradient.lower(x, kernels).as_text().count('stablehlo.convolution') == 1
    expected = value_and_gradients(separate, x, kernels)
    actual = jax.jit(functools.partial(value_and_gradients, auto))(x, kernels)
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures('joint_input_gradients')
def test_every_mode_of_differentiation_works(rng):
    arguments = jax.tree.map(jnp.asarray, inputs(rng, (4, 4)))

    def results(pyramid):
        def loss(x, kernels):
            return sum((y**3).sum() for y in pyramid(x, kernels))

        gradient = jax.grad(loss, (0, 1))
        hessian_vector_product = jax.jvp(gradient, arguments, arguments)[1]
        x, kernels = arguments
        per_example = jax.vmap(gradient, (0, None))(x[:, None], kernels)
        one_kernel_of_several = (jnp.stack([kernels[0], -kernels[0]]), *kernels[1:])
        ensemble = jax.vmap(loss, (None, (0, None, None, None)))(x, one_kernel_of_several)
        return hessian_vector_product, per_example, ensemble

    actual = jax.jit(functools.partial(results, functools.partial(pyramid_conv, groups=GROUPS)))()
    expected = jax.jit(functools.partial(results, separate))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-6)


@pytest.mark.usefixtures('joint_input_gradients')
def test_an_export_equals_even_if_only_one_of_its_platforms_joins(rng):
    x, kernels = inputs(rng)
    gradient = jax.jit(
        jax.grad(lambda x, kernels: sum((y**2).sum() for y in pyramid_conv(x, kernels, groups=GROUPS)))
    )
    exported = jax.export.export(gradient, platforms=['cpu', 'tpu'])(x, kernels)
    expected = jax.grad(lambda x, kernels: sum((y**2).sum() for y in separate(x, kernels)))(x, kernels)
    np.testing.assert_allclose(exported.call(x, kernels), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures('joint_input_gradients')
def test_an_empty_batch_gives_empty_outputs(rng):
    x, kernels = inputs(rng)
    loss = jax.jit(jax.grad(lambda x, kernels: sum(y.sum() for y in pyramid_conv(x, kernels, groups=GROUPS))))
    assert loss(x[:0], kernels).shape == (0, *x.shape[1:])


def test_kernels_and_groups_that_do_not_fit_are_refused(rng):
    x, kernels = inputs(rng)
    with pytest.raises(InputError, match='4 kernels need as many groups, got 3'):
        pyramid_conv(x, kernels, groups=GROUPS[:3])
    with pytest.raises(InputError, match='16 groups do not fit 32 input channels'):
        pyramid_conv(x, kernels, groups=(16, 4, 8, 16))
