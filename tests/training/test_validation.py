"""Invalid configurations are refused with the field and its value."""

import pytest
from runs import (
    changed_config,
    recipe,
)

from epsanet_jax import InputError
from epsanet_jax.training import loop
from epsanet_jax.training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ProfileConfig,
)
from epsanet_jax.training.validation import validate


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
        ('model__in_channels', 13, 'config.data.mean must be 13 numbers, one per channel, got'),
        ('data__std', (0.0, 1.0, 1.0), 'config.data.std must be three numbers above 0'),
        ('data__on_bad', 'ignore', 'config.data.on_bad'),
        ('optimizer__lr', float('nan'), 'config.optimizer.lr must be finite, got nan'),
        ('optimizer__momentum', 1.5, 'config.optimizer.momentum'),
        ('schedule__name', 'exponential', "config.schedule.name .* got 'exponential'"),
        ('epochs', float('inf'), 'config.epochs must be finite, got inf'),
        ('checkpoint__keep', 0, 'config.checkpoint.keep must be at least 1, got 0'),
    ],
)
def test_invalid_fields_are_refused(field, value, message):
    validate(changed_config())
    with pytest.raises(InputError, match=message):
        validate(changed_config(**{field: value}))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'freeze': '('}, r"config.freeze must be a regular expression, got '\('"),
        ({'freeze': 'conv9'}, "config.freeze='conv9' matches no parameter"),
        (
            {'init_from': 'x', 'init_optimizer': True, 'freeze': 'fc'},
            'config.init_optimizer needs config.optimizer.name=sgd',
        ),
        ({'optimizer': OptimizerConfig(name='adam')}, "config.optimizer.name must be one of .* got 'adam'"),
        ({'optimizer': OptimizerConfig(name='adamw', nesterov=True)}, 'config.optimizer.nesterov needs'),
        ({'model': ModelConfig(frozen_bn='nosuch')}, "config.model.frozen_bn='nosuch' matches no scale"),
        (
            {'model': ModelConfig(param_dtype='bfloat16'), 'ema_decay': 0.999},
            'config.ema_decay needs config.model.param_dtype=float32: changes by 0.001 are rounded off',
        ),
        (
            {'profile': ProfileConfig(5, 2)},
            'config.profile ends at step 7, after the end of the run at step 6',
        ),
        ({'ema_decay': 1.0}, r'config.ema_decay must be in \[0, 1\), got 1.0'),
        (
            {'data': DataConfig(dir='x', mean=(123.675, 116.28, 103.53))},
            r'config.data.mean must be three numbers from 0 to 1, of pixels / 255, got \(123.675',
        ),
        ({'data': DataConfig(dir='x', mean=(0.5,))}, r'config.data.mean must be three .* got \(0.5,'),
        ({'data': DataConfig(dir='x', std=(0.2, 0.0, 0.2))}, 'config.data.std must be three numbers above 0'),
        ({'data': DataConfig(dir='x', std=(58.4, 57.1, 57.4))}, r'config.data.std must be .* got \(58.4'),
        ({'stochastic_depth': -0.1}, r'config.stochastic_depth must be in \[0, 1\), got -0.1'),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        loop.train(recipe(**changes), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_a_negative_profile_length_is_refused(tmp_path):
    with pytest.raises(InputError, match='config.profile.steps must be at least 0, got -1'):
        loop.train(recipe(profile=ProfileConfig(0, -1)), str(tmp_path / 'run'))
