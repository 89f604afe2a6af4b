"""The sharded step on 8 devices, each with different data, against one device."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from epsanet_jax import InputError
from epsanet_jax.data.augment import Mixing, mix, normalize, row_keys
from epsanet_jax.training import sharding, steps
from epsanet_jax.training.config import OptimizerConfig, ScheduleConfig
from epsanet_jax.training.optimizer import make_optimizer, make_schedule
from epsanet_jax.training.state import TrainState, create_state
from epsanet_jax.training.steps import draw_keep, smoothed_targets, update_average

MEAN, STD, SMOOTHING = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 0.1
F64 = {'dtype': jnp.float64, 'param_dtype': jnp.float64}
OPTIMIZER = make_optimizer(OptimizerConfig(lr=0.1), make_schedule(ScheduleConfig('constant'), 0.1, 10, 1))


def net(layers=(1,), **changes):
    planes = (8, 16)[: len(layers)]
    return small.model(layers=layers, planes=planes, kernels=(3, 5), groups=(1, 2), **changes)


def batch(rng, n=16, size=32):
    images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    # Every row of another brightness: a step that mixes up rows or groups cannot pass.
    images = (images * np.linspace(0.1, 1, n)[:, None, None, None]).astype(np.uint8)
    return {'image': images, 'label': (np.arange(n) % 7).astype(np.int32)}


def fresh_state(model, ema=False):
    variables = small.random_variables(model)
    state = TrainState(jnp.zeros((), jnp.int32), **variables, opt_state=OPTIMIZER.init(variables['params']))
    state = state.replace(ema=variables) if ema else state
    return jax.tree.map(jnp.array, state)


# What is random, and averages.
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
    """The same without a mesh, from the pieces a researcher would use."""
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
    'bn_group', [None, 4, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8, 16))]
)
def test_eight_devices_make_the_update_of_one(rng, bn_group):
    """2 rows a device: groups of all rows, of several devices, of the local batch, and of less."""
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
        (8, 4, 2),
        (1, 4, 8),
        (2, 16, 2),
        pytest.param(8, 8, 4, marks=pytest.mark.slow),
        pytest.param(8, 1, 4, marks=pytest.mark.slow),
    ],
)
def test_microbatches_make_the_update_of_the_batch(rng, devices, bn_group, microbatches):
    """Groups within a device, over several, and over all of them."""
    model, data = net(bn_group=bn_group, **F64), batch(rng, n=32, size=32)
    data['requests'] = np.arange(32, dtype=np.float32)[:, None]
    state, sums = sharded(model, data, jax.devices()[:devices], microbatches=microbatches)
    chex.assert_trees_all_close(state, by_hand(model, data), rtol=1e-10, atol=1e-10)
    assert sums['count'] == 32
    assert sums['requests'].tolist() == [31 * 16]


@pytest.mark.parametrize(
    ('devices', 'microbatches'), [(8, 1), (4, 4), pytest.param(1, 2, marks=pytest.mark.slow)]
)
def test_what_is_random_does_not_depend_on_devices_and_microbatches(rng, devices, microbatches):
    model, data = net((1, 1), bn_group=4, **F64), batch(rng, n=32, size=32)
    state, _ = sharded(model, data, jax.devices()[:devices], microbatches=microbatches, **OPTIONS)
    chex.assert_trees_all_close(state, by_hand(model, data, **OPTIONS), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ('batch_size', 'bn_group', 'microbatches', 'message'),
    [
        (32, 4, 3, 'batch_size 32 does not divide into 3 microbatches'),
        (32, 16, 4, r'4 microbatches of 8 rows do not hold whole BatchNorm groups \(groups of 16\): set'),
        (32, None, 2, 'groups .over the whole batch.: set model.bn_group to a divisor of 16'),
    ],
)
def test_microbatches_that_would_cut_a_group_are_refused(batch_size, bn_group, microbatches, message):
    with pytest.raises(InputError, match=message):
        sharding.microbatch_size(batch_size, bn_group, microbatches)


def test_another_grouping_is_another_update(rng):
    data = batch(rng)
    whole, grouped = (by_hand(net(bn_group=g, **F64), data, 1).params for g in (None, 4))
    assert not np.allclose(whole['conv1']['kernel'], grouped['conv1']['kernel'])


@pytest.mark.parametrize('bn_group', [None, pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_compiled_step_reduces_and_gathers_nothing(bn_group):
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
def test_evaluation_adds_up_masked_rows(rng, devices):
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
    assert sums['top1'] == (best[:, 0] == data['label'])[:11].sum()
    assert sums['top5'] == (best[:, :5] == data['label'][:, None]).any(1)[:11].sum()


@pytest.mark.parametrize(
    ('batch_size', 'bn_group', 'shape'),
    [(16, None, (1, 8)), (16, 16, (1, 8)), (16, 4, (4, 2)), (16, 2, (8, 1)), (32, 2, (8, 1)), (8, 1, (8, 1))],
)
def test_the_mesh_puts_a_group_on_as_many_devices_as_it_spans(batch_size, bn_group, shape):
    mesh = sharding.make_mesh(batch_size, bn_group)
    assert mesh.devices.shape == shape
    assert mesh.devices.flatten().tolist() == jax.devices()


@pytest.mark.parametrize(
    ('batch_size', 'bn_group', 'message'),
    [
        (12, None, 'batch_size 12 does not divide among 8 devices; the next that does is 16'),
        (16, 3, 'batch_size 16 does not divide into BatchNorm groups of 3'),
        (48, 4, 'groups of 4 straddle devices with 6 rows'),
        (8, 32, 'batch_size 8 does not divide into BatchNorm groups of 32'),
    ],
)
def test_batches_that_do_not_divide_are_refused(batch_size, bn_group, message):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(batch_size, bn_group)


def test_the_pieces_work_under_vmap_and_forward_mode(rng):
    """Per-example gradients and a directional derivative of the very loss that is trained."""
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
