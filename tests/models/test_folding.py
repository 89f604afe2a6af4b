"""Inference with BatchNorm folded into the convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from epsanet_jax import InputError
from epsanet_jax.models import fold_batch_norm


def logits(net, variables, images):
    return np.asarray(jax.jit(net.apply)(variables, images))


@pytest.mark.parametrize(
    'changes',
    [
        {'psa_bias': True, 'output_stride': 16},
        {'middle': 'conv3x3'},
        {'middle': 'conv3x3', 'use_se': True},
    ],
    ids=['epsanet', 'resnet', 'se-resnet'],
)
def test_logits_do_not_change(rng, changes):
    net = small.model(dtype=jnp.float64, param_dtype=jnp.float64).clone(**changes)
    assert_folding_keeps_logits(rng, net)


def test_logits_of_a_pyconvresnet_do_not_change(rng):
    net = small.pyconv(dtype=jnp.float64, param_dtype=jnp.float64)
    folded = assert_folding_keeps_logits(rng, net)
    assert set(folded['params']['layer1_0']) == {'conv1', 'conv2', 'conv3', 'downsample_1'}


def assert_folding_keeps_logits(rng, net):
    variables, images = small.random_variables(net), small.images(rng)
    folded, params = fold_batch_norm(net, variables)
    expected = logits(net, variables, images)
    np.testing.assert_allclose(
        logits(folded, params, images), expected, rtol=0, atol=1e-10 * np.abs(expected).max()
    )
    return params


def test_float32_logits_agree_to_1e_5(rng):
    net = small.model()
    variables = small.random_variables(net, dtype=np.float32)
    images = small.images(rng, dtype=np.float32)
    folded, params = fold_batch_norm(net, variables)
    expected = logits(net, variables, images)
    assert np.abs(logits(folded, params, images) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_the_error_in_bfloat16_is_that_of_the_type(rng):
    net = small.model()
    variables = small.random_variables(net, dtype=np.float32)
    images = small.images(rng, n=8, dtype=np.float32)
    exact = logits(net, variables, images)
    narrow = net.clone(dtype=jnp.bfloat16)
    plain = np.abs(logits(narrow, variables, images) - exact).max()
    assert np.abs(logits(*fold_batch_norm(narrow, variables), images) - exact).max() < 3 * plain


def test_only_parameters_with_the_shapes_of_the_folded_network_remain(rng):
    net = small.model()
    folded, params = fold_batch_norm(net, small.random_variables(net, dtype=np.float32))
    shapes = jax.eval_shape(folded.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, dict(shapes))
    assert set(params) == {'params'}


def test_gradients_flow_through_folding(rng):
    net = small.model(layers=(1,), planes=(8,))
    variables, images = small.random_variables(net, dtype=np.float32), small.images(rng, dtype=np.float32)

    def folded_first(params):
        folded, params = fold_batch_norm(net, variables | {'params': params})
        return folded.apply(params, images).sum()

    def plain(params):
        return net.apply(variables | {'params': params}, images).sum()

    def gradient(function):
        return np.concatenate(
            [np.ravel(x) for x in jax.tree.leaves(jax.jit(jax.grad(function))(variables['params']))]
        )

    expected = gradient(plain)
    assert np.abs(gradient(folded_first) - expected).max() < 1e-4 * np.abs(expected).max()


def test_folding_twice_is_refused():
    net = small.model()
    folded, params = fold_batch_norm(net, small.random_variables(net, dtype=np.float32))
    with pytest.raises(InputError, match='already folded'):
        fold_batch_norm(folded, params)
