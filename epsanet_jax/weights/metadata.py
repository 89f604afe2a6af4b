"""The metadata stored with weights, as JSON: model, class names, preprocessing and training run."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from epsanet_jax.convert.files import PACKAGE
from epsanet_jax.data.preprocessing import Preprocessing, preprocessing_from_json
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.models.settings import DTYPES, ModelConfig, check_types, model_config
from epsanet_jax.version import __version__


def make_metadata(
    model: ModelConfig,
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    config: dict[str, Any] | None = None,
    identity: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the metadata of weights, ready for JSON.

    Args:
        model: configuration of the model, with the number of classes.
        class_names: class names in the order of the outputs; empty if unknown. Further outputs are named
            by their numbers.
        preprocessing: how to prepare images for the network.
        config: configuration of the training run, as nested dicts.
        identity: identity of the training run.
    """
    return {
        'package': PACKAGE,
        'version': __version__,
        'model': dataclasses.asdict(model),
        'class_names': name_outputs(class_names, model.num_classes),
        'preprocessing': preprocessing.to_json(),
        'config': config,
        'identity': identity,
    }


def name_outputs(class_names: Sequence[str], num_classes: int) -> list[str]:
    """Returns a name for each output, a number for each output beyond the names; [] without names."""
    return [*class_names, *(str(i) for i in range(len(class_names), num_classes) if class_names)]


@contextlib.contextmanager
def damage_as_input_error(place: str) -> Iterator[None]:
    """Turns what reading the untrusted metadata of a file named `place` raises into an InputError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        reason = str(e) if isinstance(e, InputError) else f'{type(e).__name__} {e}'
        raise InputError(f'the metadata of {place} are damaged: {one_line(reason)}') from e


def read_metadata(metadata: Any, place: str) -> tuple[ModelConfig, tuple[str, ...], Preprocessing]:
    """Returns model, class names and preprocessing from the untrusted metadata of a file named `place`.

    Raises:
        InputError: the metadata are not those of `make_metadata`.
    """
    if not isinstance(metadata, dict) or metadata.get('package') != PACKAGE:
        raise InputError(f'{place} is not a checkpoint of epsanet_jax')
    with damage_as_input_error(place):
        model = model_config(metadata['model'])
        check_types(model)
        for dtype in (model.dtype, model.param_dtype):
            if dtype not in DTYPES:
                raise InputError(f'unknown dtype {dtype!r}')
        names, config = metadata['class_names'], metadata['config']
        preprocessing = preprocessing_from_json(metadata['preprocessing'])
        if preprocessing.channels != model.in_channels:
            raise InputError(
                f'preprocessing is for {preprocessing.channels} channels, the model takes {model.in_channels}'
            )
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError('class_names must be a list of names')
        if len(names) > model.num_classes:
            raise InputError(
                f'class_names has {len(names)} names, but the model has {model.num_classes} classes'
            )
        if config is not None and not all(isinstance(config[k], dict) for k in ('data', 'optimizer')):
            raise InputError('the configuration has no data or optimizer section')
    return model, tuple(name_outputs(names, model.num_classes)), preprocessing
