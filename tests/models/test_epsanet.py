"""The network: shapes, types, gradients, BatchNorm groups."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from epsanet_jax import InputError

pytestmark = pytest.mark.usefixtures('strict')

TWO_STAGES = {'layers': (1, 1), 'planes': (8, 16)}  # both kinds of block


def test_features_have_the_strides_of_a_backbone(rng):
    net = small.model()
    variables = small.random_variables(net, dtype=np.float32)
    features = jax.jit(functools.partial(net.apply, method='features'))(
        variables, small.images(rng, 1, 70, np.float32)
    )
    shapes = {k: v.shape[1:] for k, v in features.items()}
    assert shapes == {
        'stem': (18, 18, 64),
        'layer1': (18, 18, 16),
        'layer2': (9, 9, 32),
        'layer3': (5, 5, 32),
        'layer4': (3, 3, 64),
    }
    sides = jax.eval_shape(net.apply, variables, jnp.zeros((2, 64, 96, 3), jnp.float32))
    assert sides.shape == (2, 7)


def test_every_psa_module_records_its_attention(rng):
    net = small.model()
    variables = small.random_variables(net, dtype=np.float32)
    apply = jax.jit(functools.partial(net.apply, mutable=['intermediates']))
    _, state = apply(variables, small.images(rng, 3, 32, np.float32))
    attention = {k: v['conv2']['attention'][0] for k, v in state['intermediates'].items()}
    assert {k: v.shape for k, v in attention.items()} == {
        'layer1_0': (3, 4, 2),
        'layer1_1': (3, 4, 2),
        'layer2_0': (3, 4, 4),
        'layer3_0': (3, 4, 4),
        'layer4_0': (3, 4, 8),
    }
    for weights in attention.values():
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize('psa_bias', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_parameter_has_a_finite_gradient_other_than_zero(rng, psa_bias):
    f64 = {'dtype': jnp.float64, 'param_dtype': jnp.float64}
    net = small.model(psa_bias=psa_bias, reduction=1, **f64, **TWO_STAGES)
    images = small.images(rng, 4, 64)
    variables = jax.jit(net.init)(jax.random.key(1), images)

    def loss(params):
        logits, _ = net.apply({**variables, 'params': params}, images, train=True, mutable=['batch_stats'])
        return jnp.square(logits - 1).sum()

    gradients = jax.jit(jax.grad(loss))(variables['params'])
    chex.assert_tree_all_finite(gradients)
    silent = [
        jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(gradients) if not g.any()
    ]
    assert silent == []


@pytest.mark.parametrize(
    ('dtype', 'param_dtype', 'logits'),
    [
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float64, jnp.float32, jnp.float64),
        pytest.param(jnp.float32, jnp.float32, jnp.float32, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, jnp.bfloat16, jnp.float32, marks=pytest.mark.slow),
        pytest.param(jnp.float16, jnp.float32, jnp.float32, marks=pytest.mark.slow),
        pytest.param(jnp.float64, jnp.float64, jnp.float64, marks=pytest.mark.slow),
    ],
)
def test_types_under_strict_promotion(dtype, param_dtype, logits):
    net = small.model(dtype=dtype, param_dtype=param_dtype)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables['params'])} == {jnp.dtype(param_dtype)}

    def loss(params, variables, images):
        variables = {**variables, 'params': params}
        y, new = net.apply(variables, images, train=True, mutable=['batch_stats'])
        return y.sum(), (y, new)

    gradients, (y, new) = jax.eval_shape(jax.grad(loss, has_aux=True), variables['params'], variables, images)
    assert y.dtype == logits
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, variables['params'])
    chex.assert_trees_all_equal_shapes_and_dtypes(new['batch_stats'], variables['batch_stats'])


@pytest.mark.slow
def test_rematerialisation_does_not_change_gradients(rng):
    images = small.images(rng, 4)

    def gradients(remat):
        net = small.model(remat=remat, dtype=jnp.float64, param_dtype=jnp.float64, **TWO_STAGES)
        variables = small.random_variables(net)

        def loss(params):
            return net.apply({**variables, 'params': params}, images, train=True, mutable=['batch_stats'])[
                0
            ].sum()

        return jax.jit(jax.grad(loss))(variables['params'])

    chex.assert_trees_all_close(gradients(True), gradients(False), rtol=1e-9, atol=1e-12)


def test_empty_batch_gives_empty_logits():
    net = small.model(**TWO_STAGES)
    variables = small.random_variables(net, dtype=np.float32)
    logits = jax.eval_shape(net.apply, variables, jnp.zeros((0, 32, 48, 3), jnp.float32))
    assert logits.shape == (0, 7)


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        (np.zeros((32, 32, 3), np.float32), r'must be \[N, H, W, 3\], got shape \(32, 32, 3\)'),
        (np.zeros((2, 32, 32, 1), np.float32), r'3 channels, got shape \(2, 32, 32, 1\)'),
        (np.zeros((2, 3, 32, 32), np.float32), 'channels come last'),
        (np.zeros((2, 32, 31, 3), np.float32), r'at least 32x32 pixels, got shape \(2, 32, 31, 3\)'),
        (np.zeros((2, 32, 32, 3), np.uint8), 'normalised floating-point numbers, got uint8'),
        (np.zeros((2, 32, 32, 3), np.int32), 'got int32'),
    ],
)
def test_invalid_images_are_refused(images, message):
    net = small.model()
    with pytest.raises(InputError, match=message):
        net.init(jax.random.key(0), images)


def test_batch_norm_groups_change_training_but_not_evaluation(rng):
    f64 = {'dtype': jnp.float64, 'param_dtype': jnp.float64, **TWO_STAGES}
    images = small.images(rng, 4)
    whole, grouped = small.model(**f64), small.model(bn_group=2, **f64)
    variables = small.random_variables(whole)
    train = functools.partial(jax.jit, static_argnums=0)(
        lambda net, images: net.apply(variables, images, train=True, mutable=['batch_stats'])[0]
    )
    halves = np.concatenate([train(whole, images[:2]), train(whole, images[2:])])
    np.testing.assert_allclose(train(grouped, images), halves, rtol=1e-8)
    assert not np.allclose(train(whole, images), halves)
    evaluated = [jax.jit(net.apply)(variables, images) for net in (whole, grouped)]
    np.testing.assert_array_equal(*evaluated)


def test_initial_parameters_depend_only_on_the_key():
    net = small.model(**TWO_STAGES)
    small_images, large_images = (jnp.zeros((n, 32 * n, 32, 3), jnp.float32) for n in (1, 2))
    init = jax.jit(net.init)
    a = init(jax.random.key(3), small_images)
    chex.assert_trees_all_equal(a, init(jax.random.key(3), large_images))
    c = init(jax.random.key(4), small_images)
    assert not np.allclose(a['params']['conv1']['kernel'], c['params']['conv1']['kernel'])
