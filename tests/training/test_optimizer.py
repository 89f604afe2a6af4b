"""Optimizers against PyTorch and their formulas, learning rates of schedules, frozen parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from epsanet_jax import InputError
from epsanet_jax.training.config import OptimizerConfig, ScheduleConfig
from epsanet_jax.training.optimizer import frozen_mask, make_optimizer, make_schedule

STEPS = 20


def params_and_targets(rng):
    """Returns a kernel and a bias, and the targets of their loss sum((p - target)^2) in each step."""
    shapes = {'fc': {'kernel': (3, 4), 'bias': (4,)}}
    draw = lambda: jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda s: isinstance(s, tuple))  # noqa: E731
    return draw(), [draw() for _ in range(STEPS)]


def ours(config, start, targets, schedule=None, freeze=''):
    optimizer = make_optimizer(config, schedule or (lambda step: config.lr), freeze)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    for target in targets:
        grads = jax.tree.map(lambda p, t: 2 * (p - t), params, target)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def pytorch_s(make, start, targets, each=lambda: None, clip=None):
    parameters = [torch.nn.Parameter(torch.from_numpy(a.copy())) for a in jax.tree.leaves(start)]
    optimizer = make(parameters)
    after = each(optimizer) if each.__code__.co_argcount else each
    for target in targets:
        optimizer.zero_grad()
        goals = [torch.from_numpy(a) for a in jax.tree.leaves(target)]
        sum(((p - t) ** 2).sum() for p, t in zip(parameters, goals, strict=True)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        after()
    return [p.detach().numpy() for p in parameters]


def assert_same(params, expected):
    for a, b in zip(jax.tree.leaves(params), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize(('momentum', 'nesterov'), [(0.0, False), (0.9, False), (0.9, True)])
def test_twenty_updates_of_sgd_are_pytorch_s(rng, momentum, nesterov):
    start, targets = params_and_targets(rng)
    config = OptimizerConfig(0.1, momentum, nesterov, 0.05)
    schedule = make_schedule(ScheduleConfig('step', 0, 7, 0.1), 0.1, STEPS, 1)
    expected = pytorch_s(
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.05),
        start,
        targets,
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.1).step,
    )
    assert_same(ours(config, start, targets, schedule), expected)


@pytest.mark.parametrize('clip', [0.0, 2.0])
def test_twenty_updates_of_adamw_are_pytorch_s(rng, clip):
    start, targets = params_and_targets(rng)
    config = OptimizerConfig(0.03, weight_decay=0.1, name='adamw', b1=0.8, b2=0.95, eps=1e-3, clip_norm=clip)
    expected = pytorch_s(
        lambda p: torch.optim.AdamW(p, 0.03, (0.8, 0.95), 1e-3, weight_decay=0.1), start, targets, clip=clip
    )
    # PyTorch divides by the norm + 1e-6 when it clips.
    for a, b in zip(jax.tree.leaves(ours(config, start, targets)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4 if clip else 1e-10)


def test_sgd_with_clipping_is_pytorch_s(rng):
    start, targets = params_and_targets(rng)
    config = OptimizerConfig(0.1, 0.9, False, 0.05, clip_norm=2.0)
    make = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05)  # noqa: E731
    clipped, free = (pytorch_s(make, start, targets, clip=clip) for clip in (2.0, None))
    for a, b, c in zip(jax.tree.leaves(ours(config, start, targets)), clipped, free, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)  # PyTorch divides by the norm + 1e-6
        assert not np.allclose(a, c, rtol=1e-2)


def ratio(p, u):
    return np.linalg.norm(p) / np.linalg.norm(u)


def test_lamb_follows_its_formula(rng):
    start, targets = params_and_targets(rng)
    config = OptimizerConfig(0.05, weight_decay=0.1, name='lamb', b1=0.8, b2=0.95, eps=1e-4)
    expected = []
    for i, p in enumerate(jax.tree.leaves(start)):
        m, v = np.zeros_like(p), np.zeros_like(p)
        for t, target in enumerate(targets, start=1):
            g = 2 * (p - jax.tree.leaves(target)[i])
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
            u = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-4) + 0.1 * p
            p = p - 0.05 * ratio(p, u) * u
        expected.append(p)
    assert_same(ours(config, start, targets), expected)


@pytest.mark.parametrize('everything', [True, False])
def test_lars_follows_its_formula(rng, everything):
    start, targets = params_and_targets(rng)
    config = OptimizerConfig(
        0.5, 0.9, weight_decay=0.1, name='lars', trust_coefficient=0.02, decay_norm_and_bias=everything
    )
    expected = []
    for i, p in enumerate(jax.tree.leaves(start)):
        adapted, b = everything or p.ndim > 1, np.zeros_like(p)
        for target in targets:
            g = 2 * (p - jax.tree.leaves(target)[i])
            if adapted:
                g = g + 0.1 * p
                g = 0.02 * ratio(p, g) * g
            b = 0.9 * b + 0.5 * g
            p = p - b
        expected.append(p)
    assert_same(ours(config, start, targets), expected)


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lamb'])
def test_weight_decay_may_leave_out_batchnorm_and_biases(rng, name):
    start, targets = params_and_targets(rng)
    some, none, all_ = (
        ours(OptimizerConfig(0.01, weight_decay=d, name=name, decay_norm_and_bias=b), start, targets)['fc']
        for d, b in ((0.3, False), (0.0, True), (0.3, True))
    )
    np.testing.assert_array_equal(some['bias'], none['bias'])
    np.testing.assert_array_equal(some['kernel'], all_['kernel'])
    assert not np.allclose(some['kernel'], none['kernel'])
    assert not np.allclose(some['bias'], all_['bias'])


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lamb', 'lars'])
def test_frozen_parameters_do_not_change(rng, name):
    start, targets = params_and_targets(rng)
    config = OptimizerConfig(0.01, name=name, clip_norm=1.0)
    params = ours(config, start, targets, freeze='fc/bias')['fc']
    np.testing.assert_array_equal(params['bias'], start['fc']['bias'])
    assert not np.allclose(params['kernel'], start['fc']['kernel'])


@pytest.mark.parametrize(('pattern', 'message'), [('conv9', 'matches no parameter'), ('.', 'matches all')])
def test_freezing_nothing_or_everything_is_refused(rng, pattern, message):
    with pytest.raises(InputError, match=message):
        frozen_mask(params_and_targets(rng)[0], pattern)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_the_step_schedule_decays_at_the_exact_step_when_compiled(dtype):
    for period in (41, 47, 49, 55, 107, 330, 2.5):
        config = ScheduleConfig('step', warmup_epochs=0, step_epochs=1, step_factor=0.5)
        with jax.enable_x64(dtype == 'float64'):
            rate = jax.jit(make_schedule(config, 1.0, 10**4, period))
            due = [math.ceil(k * period) for k in (1, 2, 3)]
            rates = [float(rate(jnp.int32(step))) for k in due for step in (k - 1, k)]
        assert rates == [1, 0.5, 0.5, 0.25, 0.25, 0.125], period


def test_schedules_have_the_expected_values_where_they_change():
    def rates(config, at, total=100):
        return [float(make_schedule(config, 0.4, total, 2.0)(step)) for step in at]

    assert rates(ScheduleConfig('constant'), [0, 99]) == pytest.approx([0.4, 0.4])
    step = ScheduleConfig('step', warmup_epochs=0, step_epochs=30, step_factor=0.1)
    assert rates(step, [0, 59, 60, 119, 120]) == pytest.approx([0.4, 0.4, 0.04, 0.04, 0.004])
    cosine = ScheduleConfig('cosine', warmup_epochs=5)
    assert rates(cosine, [0, 4, 9, 10, 55, 100]) == pytest.approx([0.04, 0.2, 0.4, 0.4, 0.2, 0.0])
    ends = ScheduleConfig('cosine', warmup_epochs=5, end_factor=0.5)
    assert rates(ends, [9, 10, 55, 100]) == pytest.approx([0.4, 0.4, 0.3, 0.2])
    linear = ScheduleConfig('linear', warmup_epochs=5)
    assert rates(linear, [4, 10, 28, 55, 100]) == pytest.approx([0.2, 0.4, 0.32, 0.2, 0.0])
    assert rates(ScheduleConfig('linear', end_factor=0.25), [0, 50, 100]) == pytest.approx([0.4, 0.25, 0.1])
    assert rates(ScheduleConfig('step', warmup_epochs=1), [0, 1, 2]) == pytest.approx([0.2, 0.4, 0.4])
