"""Loss, metrics, optimiser, schedules, configuration."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from epsanet_jax import InputError
from epsanet_jax.training import config as configs
from epsanet_jax.training.config import Config
from epsanet_jax.training.metrics import averages, batch_sums
from epsanet_jax.training.steps import smoothed_cross_entropy
from epsanet_jax.training.validation import validate


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_the_loss_is_pytorch_s(rng, smoothing):
    logits, labels = rng.standard_normal((5, 7)) * 3, rng.integers(0, 7, 5)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels), label_smoothing=smoothing, reduction='none'
    )
    np.testing.assert_allclose(smoothed_cross_entropy(logits, labels, smoothing), expected, rtol=1e-12)


def test_accuracy_counts_only_what_the_mask_lets_through(rng):
    logits = rng.standard_normal((40, 9))
    labels, mask = rng.integers(0, 9, 40), rng.random(40) < 0.7
    losses = rng.random(40)
    sums = averages({k: float(v) for k, v in batch_sums(losses, logits, labels, mask).items()})
    order = np.argsort(-logits, axis=1)
    top5 = (order[:, :5] == labels[:, None]).any(1)[mask].mean()
    assert sums['top1'] == pytest.approx((order[:, 0] == labels)[mask].mean())
    assert sums['top5'] == pytest.approx(top5)
    assert sums['loss'] == pytest.approx(losses[mask].mean())
    assert sums['examples'] == mask.sum()


def test_no_credit_for_constant_or_broken_logits():
    labels, mask = jnp.arange(8), jnp.ones(8, bool)
    constant = batch_sums(jnp.zeros(8), jnp.zeros((8, 8)), labels, mask)
    assert (constant['top1'], constant['top5']) == (1, 5)
    broken = batch_sums(jnp.zeros(8), jnp.full((8, 8), jnp.nan), labels, mask)
    assert (broken['top1'], broken['top5']) == (0, 0)
    padded = batch_sums(jnp.full(8, jnp.nan), jnp.zeros((8, 8)), labels, ~mask)
    assert padded['loss'] == 0


def test_top_5_of_3_classes_is_top_3():
    sums = batch_sums(jnp.zeros(2), jnp.zeros((2, 3)), jnp.array([0, 2]), jnp.ones(2, bool))
    assert sums['top5'] == 2


def changed(**fields):
    """A valid configuration with dotted fields changed."""
    config = Config()
    config.data.dir = 'pictures'
    for name, value in fields.items():
        *path, last = name.split('__')
        owner = config
        for part in path:
            owner = getattr(owner, part)
        assert hasattr(owner, last)
        setattr(owner, last, value)
    return config


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('batch_size', 0, 'config.batch_size must be at least 1, got 0'),
        ('epochs', 0.0, 'config.epochs must be above 0'),
        ('label_smoothing', 1.0, r'config.label_smoothing must be in \[0, 1\), got 1.0'),
        ('seed', -1, 'config.seed'),
        ('seed', 2**32, 'config.seed'),
        ('model__name', 'epsanet', "unknown model 'epsanet'"),
        ('model__dtype', 'half', "config.model.dtype must be one of .*, got 'half'"),
        ('model__groups', (3, 3, 3, 3), '3 groups do not divide'),
        (
            'data__source',
            'disk',
            "config.data.source must be one of folder, records, tfds, synthetic, got 'disk'",
        ),
        ('data__dir', '', 'config.data.dir'),
        ('data__image_size', 16, 'config.data.image_size must be at least 32, got 16'),
        ('data__resize_size', 200, 'config.data.resize_size must be at least 224, got 200'),
        ('data__crop_scale', (0.5, 0.1), 'config.data.crop_scale'),
        ('data__crop_ratio', (1.0,), 'config.data.crop_ratio'),
        ('data__mean', (0.5,), 'config.data.mean must be three numbers from 0 to 1'),
        ('data__std', (0.0, 1.0, 1.0), 'config.data.std must be three numbers above 0'),
        ('data__on_bad', 'ignore', 'config.data.on_bad'),
        ('optimizer__lr', float('nan'), 'config.optimizer.lr must be finite, got nan'),
        ('optimizer__momentum', 1.5, 'config.optimizer.momentum'),
        ('schedule__name', 'exponential', "config.schedule.name .* got 'exponential'"),
        ('epochs', float('inf'), 'config.epochs must be finite, got inf'),
        ('checkpoint__keep', 0, 'config.checkpoint.keep must be at least 1, got 0'),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(field, value, message):
    validate(changed())
    with pytest.raises(InputError, match=message):
        validate(changed(**{field: value}))


def test_what_identifies_a_run():
    base = configs.identity(changed(), 'abc', 10)
    for free in (
        {'epochs': 3.0},
        {'steps': 5},
        {'log_every_steps': 1},
        {'eval_every_epochs': 9.0},
        {'data__dir': 'moved'},
        {'data__workers': 3},
        {'checkpoint__keep': 9},
        {'checkpoint__every_minutes': 1.0},
    ):
        assert configs.identity(changed(**free), 'abc', 10) == base, free
    for fixed in (
        {'seed': 1},
        {'batch_size': 8},
        {'label_smoothing': 0.0},
        {'model__psa_bias': True},
        {'optimizer__lr': 0.2},
        {'schedule__name': 'cosine'},
        {'data__flip': False},
    ):
        assert configs.identity(changed(**fixed), 'abc', 10) != base, fixed
    assert configs.identity(changed(), 'other data', 10) != base


def test_every_field_of_a_configuration_survives_json():
    flat = json.loads(json.dumps(configs.flatten(changed(model__planes=(8, 16)))))
    assert flat['model.planes'] == [8, 16]
    assert set(flat) == set(configs.flatten(json.loads(json.dumps(dataclasses.asdict(changed())))))


def test_averages_do_not_depend_on_how_batches_were_cut(rng):
    losses, logits = rng.random(10), rng.standard_normal((10, 6))
    labels = rng.integers(0, 6, 10)
    whole = batch_sums(losses, logits, labels, jnp.ones(10, bool))
    parts = [
        batch_sums(losses[i], logits[i], labels[i], jnp.ones(len(losses[i]), bool))
        for i in (slice(3), slice(3, 10))
    ]
    added = jax.tree.map(lambda *s: sum(s), *parts)
    for k in whole:
        assert float(added[k]) == pytest.approx(float(whole[k]), rel=1e-12)


def test_the_time_of_a_run_is_that_of_its_own_steps(tmp_path):
    """100 steps of 100 pictures at 100 pictures/s, after 1,000 steps that another training made."""
    import types

    from etils import epath

    from epsanet_jax.training.init_from import Start
    from epsanet_jax.training.result import make_result

    lines = [{'split': 'train', 'step': step, 'images_per_s': 100.0} for step in (1050, 1100)]
    lines.append({'split': 'eval', 'step': 1100, 'loss': 1.0, 'top1': 0.5, 'top5': 0.9, 'examples': 10})
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    config = Config(batch_size=100)
    run = types.SimpleNamespace(
        workdir=epath.Path(tmp_path), config=config, start=Start(10.0, 0.1), steps_per_epoch=100.0
    )
    result = make_result(run, 1100, 'runs/x')
    assert (result.seconds, result.images_per_s) == (100.0, 100.0)
    assert 'time: 0:01:40 of training steps' in str(result)
