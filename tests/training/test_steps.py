"""The training and evaluation steps: 8 devices, each with different data, against one device."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import torch
from runs import (
    equal_trees,
)

from epsanet_jax import create_model
from epsanet_jax.data.augment import Mixing, mix, normalize, row_keys
from epsanet_jax.training import sharding, steps
from epsanet_jax.training.config import (
    OptimizerConfig,
    ScheduleConfig,
)
from epsanet_jax.training.optimizer import make_optimizer, make_schedule
from epsanet_jax.training.state import TrainState, create_state
from epsanet_jax.training.steps import draw_keep, smoothed_cross_entropy, smoothed_targets, update_average

MEAN, STD, SMOOTHING = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 0.1
F64 = {'dtype': jnp.float64, 'param_dtype': jnp.float64}
OPTIMIZER = make_optimizer(OptimizerConfig(lr=0.1), make_schedule(ScheduleConfig('constant'), 0.1, 10, 1))


def net(layers=(1,), **changes):
    planes = (8, 16)[: len(layers)]
    return small.model(layers=layers, planes=planes, kernels=(3, 5), groups=(1, 2), **changes)


def batch(rng, n=16, size=32):
    images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    # Every row has another brightness: a step that confuses rows or groups fails.
    images = (images * np.linspace(0.1, 1, n)[:, None, None, None]).astype(np.uint8)
    return {'image': images, 'label': (np.arange(n) % 7).astype(np.int32)}


def fresh_state(model, ema=False):
    variables = small.random_variables(model)
    state = TrainState(jnp.zeros((), jnp.int32), **variables, opt_state=OPTIMIZER.init(variables['params']))
    state = state.replace(ema=variables) if ema else state
    return jax.tree.map(jnp.array, state)


# Options with random numbers, and moving averages.
OPTIONS = {
    'mixing': Mixing(mixup_alpha=0.4, cutmix_alpha=1.0),
    'stochastic_depth': 0.5,
    'ema_decay': 0.9,
    'seed': 3,
}


def sharded(model, data, devices, n_steps=2, microbatches=1, **options):
    mesh = sharding.make_mesh(len(data['label']), model.bn_group, devices, microbatches)
    step = steps.make_train_step(
        model,
        OPTIMIZER,
        mesh,
        smoothing=SMOOTHING,
        mean=MEAN,
        std=STD,
        microbatches=microbatches,
        **options,
    )
    state = jax.device_put(fresh_state(model, 'ema_decay' in options), sharding.replicated(mesh))
    for _ in range(n_steps):
        state, sums = step(state, sharding.to_devices(data, mesh, microbatches))
    return state, sums


def by_hand(model, data, n_steps=2, mixing=None, stochastic_depth=0.0, ema_decay=0.0, seed=0):
    """Returns the same state, computed without a mesh from the public functions."""
    images = normalize(data['image'], MEAN, STD, jnp.float64)
    targets = smoothed_targets(data['label'], model.num_classes, SMOOTHING, jnp.float64)

    @jax.jit
    def step(state):
        x, y, keep = images, targets, None
        keys = row_keys(seed, state.step, jnp.arange(len(y)))
        if mixing is not None:
            x, y = mix(x, y, keys, mixing.mixup_alpha, mixing.cutmix_alpha)
        if stochastic_depth:
            keep = draw_keep(keys, stochastic_depth, sum(model.layers))

        def loss(params):
            return steps.loss_and_updates(model, params, state.batch_stats, x, y, keep)

        gradients, (stats, _, _) = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = OPTIMIZER.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = {'params': params, 'batch_stats': stats}
        ema = update_average(state.ema, new, state.step, ema_decay) if ema_decay else None
        return TrainState(state.step + 1, params, stats, opt_state, ema)

    state = fresh_state(model, ema_decay > 0)
    for _ in range(n_steps):
        state = step(state)
    return state


@pytest.mark.parametrize(
    'bn_group', [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (None, 1, 2, 8, 16))]
)
def test_eight_devices_make_the_update_of_one(rng, bn_group):
    """2 rows per device: groups of all rows, of several devices, of one device, and of less."""
    model, data = net(bn_group=bn_group, **F64), batch(rng, size=64)
    state, sums = sharded(model, data, jax.devices())
    expected = by_hand(model, data)
    chex.assert_trees_all_close(state, expected, rtol=1e-10, atol=1e-10)
    assert sums['count'] == 16
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, fresh_state(model).params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    ('devices', 'bn_group', 'microbatches'),
    [
        (2, 16, 2),
        pytest.param(8, 4, 2, marks=pytest.mark.slow),
        pytest.param(1, 4, 8, marks=pytest.mark.slow),
        pytest.param(8, 8, 4, marks=pytest.mark.slow),
        pytest.param(8, 1, 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_microbatches_make_the_update_of_the_whole_batch(rng, devices, bn_group, microbatches):
    """BatchNorm groups on one device, on several and on all."""
    model, data = net(bn_group=bn_group, **F64), batch(rng, n=32, size=32)
    data['requests'] = np.arange(32, dtype=np.float32)[:, None]
    state, sums = sharded(model, data, jax.devices()[:devices], microbatches=microbatches)
    chex.assert_trees_all_close(state, by_hand(model, data), rtol=1e-10, atol=1e-10)
    assert sums['count'] == 32
    assert sums['requests'].tolist() == [31 * 16]


@pytest.mark.parametrize(
    ('devices', 'microbatches'),
    [(8, 1), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((4, 4), (1, 2)))],
)
@pytest.mark.slow
def test_random_numbers_do_not_depend_on_devices_and_microbatches(rng, devices, microbatches):
    model, data = net((1, 1), bn_group=4, **F64), batch(rng, n=32, size=32)
    state, _ = sharded(model, data, jax.devices()[:devices], microbatches=microbatches, **OPTIONS)
    chex.assert_trees_all_close(state, by_hand(model, data, **OPTIONS), rtol=1e-10, atol=1e-10)


def test_the_size_of_batchnorm_groups_changes_the_update(rng):
    data = batch(rng)
    whole, grouped = (by_hand(net(bn_group=g, **F64), data, 1).params for g in (None, 4))
    assert not np.allclose(whole['conv1']['kernel'], grouped['conv1']['kernel'])


@pytest.mark.parametrize('bn_group', [None, pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_compiled_step_communicates_by_all_reduce_only(bn_group):
    model = net(bn_group=bn_group)
    mesh = sharding.make_mesh(16, bn_group)
    step = steps.make_train_step(model, OPTIMIZER, mesh, smoothing=SMOOTHING, mean=MEAN, std=STD)
    state = jax.eval_shape(lambda key: create_state(model, OPTIMIZER, key, 32), jax.random.key(0))
    data = {
        'image': jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.uint8),
        'label': jax.ShapeDtypeStruct((16,), jnp.int32),
    }
    text = step.lower(state, data).compile().as_text()
    collectives = set(
        re.findall(r'(all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)', text)
    )
    assert collectives == {'all-reduce'}
    assert 'input_output_alias' in text  # the state is donated


def test_a_step_is_not_compiled_twice(rng):
    model, data = net(), batch(rng, 8)
    mesh = sharding.make_mesh(8)
    step = steps.make_train_step(model, OPTIMIZER, mesh, smoothing=SMOOTHING, mean=MEAN, std=STD)
    make = jax.jit(
        lambda key: create_state(model, OPTIMIZER, key, 32), out_shardings=sharding.replicated(mesh)
    )
    state = make(jax.random.key(0))
    for _ in range(3):
        state, _ = step(state, sharding.to_devices(data, mesh))
    assert step._cache_size() == 1
    assert int(state.step) == 3


@pytest.mark.parametrize('devices', [1, 8])
def test_evaluation_leaves_out_masked_rows(rng, devices):
    model, data = net(**F64), batch(rng)
    variables = small.random_variables(model)
    mesh = sharding.make_mesh(16, None, jax.devices()[:devices])
    step = steps.make_eval_step(model, mesh, smoothing=SMOOTHING, mean=MEAN, std=STD)
    mask = np.arange(16) < 11
    sums = step(
        jax.device_put(variables, sharding.replicated(mesh)),
        sharding.to_devices({**data, 'mask': mask}, mesh),
    )
    logits = jax.jit(model.apply)(variables, normalize(data['image'], MEAN, STD, jnp.float64))
    best = np.argsort(-logits, 1)
    assert sums['count'] == 11
    np.testing.assert_array_equal(sums['label'], np.where(mask, data['label'], -1))
    np.testing.assert_array_equal(sums['decision'], best[:, 0])
    assert sums['top1'] == (best[:, 0] == data['label'])[:11].sum()
    assert sums['top5'] == (best[:, :5] == data['label'][:, None]).any(1)[:11].sum()


@pytest.mark.slow
def test_the_loss_works_under_vmap_and_forward_mode(rng):
    """Per-example gradients and a directional derivative of the training loss."""
    model, data = net(**F64), batch(rng, 4)
    images = normalize(data['image'], MEAN, STD, jnp.float64)
    variables = small.random_variables(model)

    def loss(params, image, label):
        logits = model.apply({**variables, 'params': params}, image[None])
        return steps.smoothed_cross_entropy(logits, label[None], SMOOTHING)[0]

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(variables['params'], images, data['label'])
    assert gradients['conv1']['kernel'].shape == (4, 7, 7, 3, 64)
    direction = jax.tree.map(jnp.ones_like, variables['params'])
    slope = jax.jvp(lambda p: loss(p, images[0], data['label'][0]), (variables['params'],), (direction,))[1]
    expected = sum(g[0].sum() for g in jax.tree.leaves(gradients))
    np.testing.assert_allclose(slope, expected, rtol=1e-9)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_the_loss_is_pytorch_s(rng, smoothing):
    logits, labels = rng.standard_normal((5, 7)) * 3, rng.integers(0, 7, 5)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels), label_smoothing=smoothing, reduction='none'
    )
    np.testing.assert_allclose(smoothed_cross_entropy(logits, labels, smoothing), expected, rtol=1e-12)


def test_the_moving_average_follows_its_formula():
    average, decay = 3.0, 0.9
    tree = {'a': jnp.asarray(average)}
    for step, value in enumerate([1.0, 2.0, -1.0, 0.5] * 30):
        share = min(decay, (1 + step) / (10 + step))
        average = share * average + (1 - share) * value
        tree = update_average(tree, {'a': jnp.asarray(value)}, jnp.asarray(step), decay)
    assert float(tree['a']) == pytest.approx(average, rel=1e-12)


def test_deeper_blocks_are_skipped_more_often_and_independently_per_row():
    keys = row_keys(0, 5, jnp.arange(4000))
    keep = np.asarray(draw_keep(keys, 0.6, 4))
    np.testing.assert_allclose((keep == 0).mean(axis=0), [0, 0.2, 0.4, 0.6], atol=0.03)
    np.testing.assert_allclose(keep.mean(axis=0), 1, atol=0.08)
    np.testing.assert_array_equal(draw_keep(keys[7:9], 0.6, 4), keep[7:9])


def test_a_skipped_block_is_its_shortcut(rng):
    model = small.model(layers=(2, 1), planes=(8, 16))
    variables, images = small.random_variables(model), small.images(rng)

    def run(keep):
        return model.apply(variables, images, keep=jnp.asarray(keep), method='features')

    kept = run(np.ones((2, 3)))
    chex.assert_trees_all_equal(kept, model.apply(variables, images, method='features'))
    one = run([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    first = small.model(layers=(1, 1), planes=(8, 16))
    outputs = first.apply(_without(variables, 'layer1_1'), images, method='features')
    np.testing.assert_allclose(one['layer1'][0], outputs['layer1'][0], rtol=1e-6)
    np.testing.assert_allclose(one['layer1'][1], kept['layer1'][1], rtol=1e-6)


def _without(variables, name):
    return {k: {n: v for n, v in tree.items() if n != name} for k, tree in variables.items()}


@pytest.mark.slow
def test_frozen_batchnorms_keep_their_statistics(rng):
    images = small.images(rng, n=4)
    for pattern, frozen in (('^bn1|^layer1', {'bn1', 'layer1_0', 'layer1_1'}), ('.', None), ('', set())):
        model = small.model(layers=(2, 1), planes=(8, 16), frozen_bn=pattern)
        variables = small.random_variables(model)
        logits, new = model.apply(variables, images, train=True, mutable=['batch_stats'])
        for name, before in variables['batch_stats'].items():
            same = equal_trees(new['batch_stats'][name], before)
            assert same == (frozen is None or name in frozen), (pattern, name)
        if frozen is None:
            np.testing.assert_array_equal(logits, model.apply(variables, images))


@pytest.mark.parametrize(
    ('variant', 'name'),
    [('epsanet50_small', 'sgd'), ('epsanet50_small', 'lars'), ('seresnet50', 'adamw'), ('resnet50', 'lamb')],
)
@pytest.mark.slow
def test_no_rank_is_promoted_implicitly(rng, name, variant):
    settings = {'layers': (1, 1), 'planes': (8, 16), 'num_classes': 7}
    if variant.startswith('epsanet'):
        settings |= {'kernels': (3, 5), 'groups': (1, 2), 'reduction': 2}
    model = create_model(variant, bn_group=8, frozen_bn='layer2', **settings)
    schedule = make_schedule(ScheduleConfig('cosine'), 0.1, 10, 1)
    optimizer = make_optimizer(OptimizerConfig(name=name, clip_norm=1.0), schedule, 'conv1')
    data, mesh = batch(rng), sharding.make_mesh(16, 8)
    how = {'smoothing': SMOOTHING, 'mean': MEAN, 'std': STD}
    with jax.numpy_rank_promotion('raise'):
        create = functools.partial(create_state, model, optimizer, image_size=32, ema=True)
        state = jax.eval_shape(create, jax.random.key(0))
        train_step = steps.make_train_step(model, optimizer, mesh, **how, **OPTIONS)
        after, sums = jax.eval_shape(train_step, state, data)
        masked = {**data, 'mask': np.ones(16, bool)}
        evaluated = jax.eval_shape(steps.make_eval_step(model, mesh, **how), state.variables, masked)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert evaluated.keys() == sums.keys() | {'label', 'decision'}


@pytest.mark.slow
def test_no_tracer_leaks(rng):
    with jax.checking_leaks():
        state, _ = sharded(net(bn_group=4), batch(rng), jax.devices(), n_steps=1, **OPTIONS)
    assert int(state.step) == 1
