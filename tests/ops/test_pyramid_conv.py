import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epsanet_jax import InputError
from epsanet_jax.ops import ALGORITHMS, choice, grouped_conv, pyramid_conv
from epsanet_jax.ops.algorithms import Algorithm, convolve_all

KERNELS, GROUPS = (3, 5, 7, 9), (1, 4, 8, 16)


def inputs(rng, size=(6, 7), outputs=(16, 16, 32, 16), dtype=np.float64):
    x = rng.standard_normal((2, *size, 32)).astype(dtype)
    each = zip(KERNELS, GROUPS, outputs, strict=True)
    return x, tuple(rng.standard_normal((k, k, 32 // g, o)).astype(dtype) for k, g, o in each)


def one_by_one(x, kernels, **kwargs):
    each = zip(kernels, GROUPS, strict=True)
    return tuple(grouped_conv(x, k, groups=g, algorithm='stock', **kwargs) for k, g in each)


def value_and_gradients(pyramid, x, kernels):
    outputs, pull = jax.vjp(pyramid, x, kernels)
    return outputs, pull(tuple(jnp.cos(jnp.arange(y.size)).reshape(y.shape) for y in outputs))


@pytest.mark.parametrize('algorithm', ['auto', *ALGORITHMS])
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 2)])
def test_equals_the_convolutions_one_by_one(rng, algorithm, stride, dilation):
    kwargs = {'stride': stride, 'dilation': dilation}
    pyramid = functools.partial(pyramid_conv, groups=GROUPS, algorithm=algorithm, **kwargs)
    x, kernels = inputs(rng)
    expected = value_and_gradients(functools.partial(one_by_one, **kwargs), x, kernels)
    actual = jax.jit(functools.partial(value_and_gradients, pyramid))(x, kernels)
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(
    ('merges', 'convolutions'),
    [((1, 4, 8, 16), 1), ((1, 4, 1, 2), 2), ((1, 1, 2, 4), 2), ((1, 1, 1, 1), 4), ((1, 2, 4, 8), 2)],
)
def test_what_keeps_as_many_groups_is_one_convolution(rng, stride, merges, convolutions):
    joint = functools.partial(
        convolve_all, stride=stride, groups=GROUPS, algorithms=[Algorithm('joint', m) for m in merges]
    )
    x, kernels = inputs(rng)
    lowered = jax.jit(joint).lower(x, kernels).as_text()
    assert lowered.count('stablehlo.convolution') == convolutions
    expected = value_and_gradients(functools.partial(one_by_one, stride=stride), x, kernels)
    actual = jax.jit(functools.partial(value_and_gradients, joint))(x, kernels)
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('merge', [1, 2, 8])
def test_all_branches_of_equal_groups_can_be_one_convolution(rng, stride, merge):
    kernels = tuple(rng.standard_normal((k, k, 4, 16)) for k in (3, 5, 5, 7))
    x = rng.standard_normal((2, 6, 7, 32))

    def pyramid(algorithm, x, kernels):
        chosen = [algorithm] * 4
        return convolve_all(x, kernels, stride=stride, groups=[8] * 4, algorithms=chosen)

    joint = functools.partial(pyramid, Algorithm('joint', merge))
    assert jax.jit(joint).lower(x, kernels).as_text().count('stablehlo.convolution') == 1
    expected = value_and_gradients(functools.partial(pyramid, Algorithm('stock')), x, kernels)
    actual = jax.jit(functools.partial(value_and_gradients, joint))(x, kernels)
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
def test_one_direction_alone_can_be_joint(rng):
    x, kernels = inputs(rng)
    auto = functools.partial(pyramid_conv, groups=GROUPS)
    gradient = jax.jit(jax.grad(lambda x, kernels: sum(y.sum() for y in auto(x, kernels))))
    assert gradient.lower(x, kernels).as_text().count('stablehlo.convolution') == 1
    expected = value_and_gradients(one_by_one, x, kernels)
    actual = jax.jit(functools.partial(value_and_gradients, auto))(x, kernels)
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures('joint_input_gradients')
def test_every_mode_of_differentiation(rng):
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
    expected = jax.jit(functools.partial(results, one_by_one))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-6)


@pytest.mark.usefixtures('joint_input_gradients')
def test_an_export_to_several_platforms_of_which_one_joins_gives_the_same(rng):
    x, kernels = inputs(rng)
    gradient = jax.jit(
        jax.grad(lambda x, kernels: sum((y**2).sum() for y in pyramid_conv(x, kernels, groups=GROUPS)))
    )
    exported = jax.export.export(gradient, platforms=['cpu', 'tpu'])(x, kernels)
    expected = jax.grad(lambda x, kernels: sum((y**2).sum() for y in one_by_one(x, kernels)))(x, kernels)
    np.testing.assert_allclose(exported.call(x, kernels), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures('joint_input_gradients')
def test_an_empty_batch_gives_empty_outputs(rng):
    x, kernels = inputs(rng)
    loss = jax.jit(jax.grad(lambda x, kernels: sum(y.sum() for y in pyramid_conv(x, kernels, groups=GROUPS))))
    assert loss(x[:0], kernels).shape == (0, *x.shape[1:])


def test_a_pyramid_that_does_not_fit_is_refused(rng):
    x, kernels = inputs(rng)
    with pytest.raises(InputError, match='4 kernels and 3 numbers of groups'):
        pyramid_conv(x, kernels, groups=GROUPS[:3])
    with pytest.raises(InputError, match='16 groups do not fit 32 input channels'):
        pyramid_conv(x, kernels, groups=(16, 4, 8, 16))
