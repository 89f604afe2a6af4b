"""Folders in the layout of the Hugging Face Hub: config.json, model.safetensors and README.md, the card."""

import json
import os
from collections.abc import Mapping
from typing import Any

from epsanet_jax.errors import InputError, one_line

WEIGHTS = 'model.safetensors'
CONFIG = 'config.json'
CARD = 'README.md'


def is_hub_folder(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a folder that contains model.safetensors."""
    return os.path.isfile(os.path.join(os.path.expanduser(path), WEIGHTS))


def to_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of config.json for the result of `make_metadata`.

    The class names are in 'id2label', where the Hub expects them. The configuration of the training run is
    left out, because it may contain private paths.
    """
    config = {'architectures': ['EPSANet'], 'model_type': 'epsanet'}
    if metadata['class_names']:
        config['id2label'] = {str(i): name for i, name in enumerate(metadata['class_names'])}
    return {**config, **{k: metadata[k] for k in ('model', 'preprocessing', 'package', 'version')}}


def read_metadata(folder: str) -> dict[str, Any] | None:
    """Returns the metadata in config.json, for `weights.metadata.read_metadata`; None without that file.

    Raises:
        InputError: the file cannot be read, is of another package, or its class names do not fit the model.
    """
    path = os.path.join(folder, CONFIG)
    try:
        with open(path, encoding='utf-8') as f:
            config = json.load(f)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f'cannot read {path}: {one_line(e)}') from e
    if not isinstance(config, dict) or config.get('package') != 'epsanet_jax':
        raise InputError(f'{path} is not a config of epsanet_jax: its "package" must be "epsanet_jax"')
    labels, model = config.get('id2label', {}), config.get('model')
    classes = model.get('num_classes') if isinstance(model, dict) else None
    if not isinstance(labels, dict) or (labels and set(labels) != {str(i) for i in range(len(labels))}):
        raise InputError(
            f'{path}: the keys of id2label must be "0", "1", ..., got {one_line(str(labels), 80)}'
        )
    if labels and len(labels) != classes:
        raise InputError(f'{path}: id2label has {len(labels)} classes, but the model has {classes}')
    kept = {k: config[k] for k in ('package', 'version', 'model', 'preprocessing') if k in config}
    names = [labels[str(i)] for i in range(len(labels))]
    return {**kept, 'class_names': names, 'config': None, 'identity': None}
