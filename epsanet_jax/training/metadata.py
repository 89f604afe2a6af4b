"""What a checkpoint says about its weights: all that their use needs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import epsanet_jax
from epsanet_jax.errors import InputError
from epsanet_jax.models.epsanet import MIN_SIZE
from epsanet_jax.training.config import (
    DTYPES,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    model_config,
)
from epsanet_jax.training.validation import validate_pixels, validate_types

MAX_SIZE = 8192  # of images, pixels: nobody means more, and a file may say anything


def make_metadata(
    model: ModelConfig,
    class_names: Sequence[str],
    data: DataConfig,
    config: Config | None = None,
    identity: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns what a checkpoint says about its weights, as JSON can hold it.

    Args:
        model: with the number of classes.
        class_names: in the order of the outputs; none if they are not known. Outputs that no class has are
            called by their numbers.
        data: for the preprocessing.
        config: of the run, if the weights are of one.
        identity: of the run, likewise.
    """
    return {
        'package': 'epsanet_jax',
        'version': epsanet_jax.__version__,
        'model': dataclasses.asdict(model),
        'class_names': name_outputs(class_names, model.num_classes),
        'preprocessing': {
            'image_size': data.size_in_use,
            'resize_size': data.resize_size,
            'mean': list(data.mean),
            'std': list(data.std),
            'exif_orientation': data.exif_orientation,
        },
        'config': None if config is None else dataclasses.asdict(config),
        'identity': identity,
    }


def name_outputs(class_names: Sequence[str], num_classes: int) -> list[str]:
    """Returns a name for each output: numbers for those beyond the classes; none if there are no names."""
    return [*class_names, *(str(i) for i in range(len(class_names), num_classes) if class_names)]


def check_metadata(metadata: Any, place: str) -> dict[str, Any]:
    """Returns the metadata read from a file, which may hold anything.

    Raises:
        InputError: they are not what `make_metadata` makes.
    """
    if not isinstance(metadata, dict) or metadata.get('package') != 'epsanet_jax':
        raise InputError(f'{place} is not a checkpoint of epsanet_jax')
    try:
        validate_types(model_config(metadata['model']), 'model')
        names, config = metadata['class_names'], metadata['config']
        data = DataConfig(**metadata['preprocessing'])
        validate_types(data, 'preprocessing')
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError('class_names must be a list of names')
        classes = metadata['model']['num_classes']
        if len(names) > classes:
            raise InputError(f'class_names has {len(names)} names for {classes} classes')
        validate_pixels(data.mean, data.std, 'preprocessing')
        if not MIN_SIZE <= data.image_size <= data.resize_size <= MAX_SIZE:
            raise InputError(f'image_size must be from {MIN_SIZE} to resize_size, got {data.image_size}')
        if config is not None:
            validate_types(OptimizerConfig(**config['optimizer']), 'optimizer')
            validate_types(DataConfig(**config['data']), 'data')
            if not 0 <= config['label_smoothing'] < 1:
                raise InputError(f'label_smoothing must be in [0, 1), got {config["label_smoothing"]}')
        if metadata['model']['dtype'] not in DTYPES or metadata['model']['param_dtype'] not in DTYPES:
            raise InputError('unknown dtype')
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        reason = f'{type(e).__name__} {e}' if not isinstance(e, InputError) else str(e)
        raise InputError(f'the metadata of {place} are damaged: {reason}') from e
    return {**metadata, 'class_names': name_outputs(names, classes)}
