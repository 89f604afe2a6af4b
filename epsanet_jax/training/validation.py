"""Checks of a configuration that need neither data nor devices."""

import re

import numpy as np

from epsanet_jax.data.preprocessing import check_pixels
from epsanet_jax.errors import InputError
from epsanet_jax.models import get_variant
from epsanet_jax.models.epsanet import MIN_SIZE
from epsanet_jax.models.settings import DTYPES, check_types
from epsanet_jax.models.zoo import build_model
from epsanet_jax.training import tracker
from epsanet_jax.training.config import Config, DataConfig, flatten, with_frozen_bn

_NOT_NEGATIVE = (
    'seed', 'steps', 'eval_every_epochs', 'eval_batch_size', 'mixup_alpha', 'cutmix_alpha',
    'model.num_classes', 'model.bn_group', 'data.randaugment_ops', 'data.randaugment_magnitude',
    'data.threads', 'data.max_bad_images', 'optimizer.lr', 'optimizer.momentum', 'optimizer.weight_decay',
    'optimizer.lr_batch', 'optimizer.trust_coefficient', 'optimizer.clip_norm', 'profile.start',
    'profile.steps', 'schedule.warmup_epochs', 'checkpoint.every_steps', 'checkpoint.every_minutes',
)  # fmt: skip
_BELOW_1 = (
    'label_smoothing', 'stochastic_depth', 'ema_decay', 'schedule.end_factor', 'optimizer.momentum',
    'optimizer.b1', 'optimizer.b2',
)  # fmt: skip


def validate(config: Config, with_data: bool = True) -> None:
    """Raises InputError, with the field and its value, if a configuration is invalid.

    `with_data` requires the place of the data too.
    """
    if not isinstance(config, Config):
        raise InputError(f'get_config() must return an epsanet_jax Config, got {type(config).__name__}')
    check_types(config, 'config')
    get_variant(config.model.name)
    for field, choices in {
        'data.source': ('folder', 'records', 'tfds', 'synthetic'),
        'data.on_bad': ('stop', 'skip'),
        'tracker': ('', *tracker.KINDS),
        'optimizer.name': ('sgd', 'adamw', 'lamb', 'lars'),
        'schedule.name': ('constant', 'step', 'cosine', 'linear'),
        'model.dtype': tuple(DTYPES),
        'model.param_dtype': tuple(DTYPES),
    }.items():
        value = flatten(config)[field]
        if value not in choices:
            names = ', '.join(name or repr('') for name in choices)
            raise InputError(f'config.{field} must be one of {names}, got {value!r}')
    if config.init_optimizer and not config.init_from:
        raise InputError('config.init_optimizer needs config.init_from=FILE')
    if config.init_partial and not config.init_from:
        raise InputError('config.init_partial needs config.init_from=FILE')
    if config.init_partial and config.init_optimizer:
        raise InputError('config.init_optimizer needs all weights: set config.init_partial=False')
    other_sgd = config.optimizer.name != 'sgd' or config.freeze or not config.optimizer.decay_norm_and_bias
    if config.init_optimizer and other_sgd:
        raise InputError(
            'config.init_optimizer needs config.optimizer.name=sgd, decay_norm_and_bias and no config.freeze'
        )
    patterns = {
        'config.freeze': config.freeze,
        'config.model.frozen_bn': config.model.frozen_bn,
        'config.freeze combined with config.model.frozen_bn': with_frozen_bn(config).frozen_bn,
    }
    for field, pattern in patterns.items():
        try:
            re.compile(pattern)
        except re.error as e:
            raise InputError(f'{field} must be a regular expression, got {pattern!r}: {e}') from e
    if config.ema_decay and config.model.param_dtype in ('bfloat16', 'float16'):
        raise InputError(
            f'config.ema_decay needs config.model.param_dtype=float32: changes by {1 - config.ema_decay:.1g} '
            f'are rounded off in {config.model.param_dtype}'
        )
    _validate_numbers(config)
    if with_data and config.data.source in ('folder', 'records') and not config.data.dir:
        raise InputError('config.data.dir is missing: set --config.data.dir=DIR, the folder with the splits')
    if with_data and config.data.source == 'tfds' and not config.data.name:
        raise InputError("config.data.name is missing: set it to the name of a TFDS dataset or to 'digits'")
    _validate_data(config.data, config.model.in_channels)
    build_model(config.model, 1)


def _validate_numbers(config: Config) -> None:
    at_least = dict.fromkeys(_NOT_NEGATIVE, 0) | {
        'batch_size': 1,
        'gradient_accumulation_steps': 1,
        'log_every_steps': 1,
        'data.workers': -1,
        'data.image_size': MIN_SIZE,
        'data.eval_image_size': MIN_SIZE if config.data.eval_image_size else 0,
        'data.resize_size': config.data.size_in_use,
        'data.synthetic_examples': 1,
        'data.synthetic_classes': 1,
        'checkpoint.keep': 1,
    }
    above = {'schedule.step_epochs': 0, 'schedule.step_factor': 0, 'optimizer.eps': 0}
    if not config.steps:
        above['epochs'] = 0
    flat = flatten(config)
    for field, bound in at_least.items():
        if not flat[field] >= bound:
            raise InputError(f'config.{field} must be at least {bound}, got {flat[field]}')
    for field, bound in above.items():
        if not flat[field] > bound:
            raise InputError(f'config.{field} must be above {bound}, got {flat[field]}')
    if config.seed >= 2**32:
        raise InputError(f'config.seed must be below 2**32, got {config.seed}')
    for field in _BELOW_1:
        if not 0 <= flat[field] < 1:
            raise InputError(f'config.{field} must be in [0, 1), got {flat[field]}')
    name, momentum = config.optimizer.name, config.optimizer.momentum
    if config.optimizer.nesterov and (not momentum or name not in ('sgd', 'lars')):
        raise InputError(
            'config.optimizer.nesterov needs config.optimizer.name=sgd or lars and momentum above 0, got '
            f'{name} and {momentum}'
        )


def _validate_data(data: DataConfig, channels: int) -> None:
    for field in ('crop_scale', 'crop_ratio'):
        value = getattr(data, field)
        if len(value) != 2 or not 0 < value[0] <= value[1] or (field == 'crop_scale' and value[1] > 1):
            limit = ' and at most 1' if field == 'crop_scale' else ''
            raise InputError(
                f'config.data.{field} must be a smallest and a largest number above 0{limit}, got {value}'
            )
    check_pixels(data.mean, data.std, 'config.data', channels)
    for field in ('color_jitter', 'randaugment_ops', 'reduced_decoding') if channels != 3 else ():
        if np.any(value := getattr(data, field)):
            raise InputError(
                f'config.data.{field} needs images of three channels, but config.model.in_channels is '
                f'{channels}: set it to {getattr(DataConfig(), field)}, got {value}'
            )
    if len(data.color_jitter) != 4 or min(data.color_jitter) < 0 or data.color_jitter[3] > 0.5:
        raise InputError(
            'config.data.color_jitter must be brightness, contrast, saturation and hue, at least 0, hue at '
            f'most 0.5, got {data.color_jitter}'
        )
    magnitude = data.randaugment_magnitude
    if magnitude > 30:
        raise InputError(f'config.data.randaugment_magnitude must be at most 30, got {magnitude}')
    if not 0 <= data.random_erasing <= 1:
        raise InputError(f'config.data.random_erasing must be in [0, 1], got {data.random_erasing}')
