"""Folders in the layout of the Hugging Face Hub: config.json, model.safetensors and README.md, the card."""

import json
import os
from collections.abc import Mapping
from typing import Any

from epsanet_jax.convert.contents import PACKAGE
from epsanet_jax.errors import InputError, one_line

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'  # of the parts of large networks
PARTS = 'model-*-of-*.safetensors'
TORCH = 'pytorch_model.bin'
CONFIG = 'config.json'
CARD = 'README.md'


def is_hub_folder(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a folder that contains weights under the names of the Hub."""
    folder = os.path.expanduser(path)
    return any(os.path.isfile(os.path.join(folder, name)) for name in (WEIGHTS, INDEX, TORCH))


def weight_files(folder: str) -> list[str]:
    """Returns the names of the weight files: model.safetensors, its parts, or pytorch_model.bin.

    Raises:
        InputError: the index of the parts is damaged, or names a file that is not in the folder.
    """
    present = [name for name in (WEIGHTS, INDEX, TORCH) if os.path.isfile(os.path.join(folder, name))]
    if present[0] != INDEX:
        return present[:1]
    path = os.path.join(folder, INDEX)
    table = _read_json(path)
    parts = table.get('weight_map') if isinstance(table, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise InputError(f'{path} is damaged: it has no weight_map')
    names = sorted(set(parts.values()))
    for name in names:
        if os.path.basename(name) != name or not os.path.isfile(os.path.join(folder, name)):
            raise InputError(f'{path} names {one_line(name, 100)!r}, which is not in the folder')
    return names


def to_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of config.json for the result of `make_metadata`.

    The class names are in 'id2label', where the Hub expects them. The configuration of the training run is
    left out, because it may contain private paths.
    """
    config = {'architectures': ['EPSANet'], 'model_type': 'epsanet'}
    if metadata['class_names']:
        config['id2label'] = {str(i): name for i, name in enumerate(metadata['class_names'])}
    return {**config, **{k: metadata[k] for k in ('model', 'preprocessing', 'package', 'version')}}


def read_config(folder: str) -> dict[str, Any] | None:
    """Returns the content of config.json, of this or another library; None without that file.

    Raises:
        InputError: the file cannot be read.
    """
    path = os.path.join(folder, CONFIG)
    if not os.path.exists(path):
        return None
    config = _read_json(path)
    if not isinstance(config, dict):
        raise InputError(f'{path} is not a config: it holds a {type(config).__name__}')
    return config


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f'cannot read {path}: {one_line(e)}') from e


def is_ours(config: Mapping[str, Any]) -> bool:
    """Returns whether this package wrote a config.json."""
    return config.get('package') == PACKAGE


def to_metadata(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Returns the metadata in a config.json of this package, for `weights.metadata.read_metadata`.

    Raises:
        InputError: the class names do not fit the model.
    """
    path, labels, model = os.path.join(folder, CONFIG), config.get('id2label', {}), config.get('model')
    classes = model.get('num_classes') if isinstance(model, dict) else None
    names = _names_of(labels, path)
    if labels and len(labels) != classes:
        raise InputError(f'{path}: id2label has {len(labels)} classes, but the model has {classes}')
    kept = {k: config[k] for k in ('package', 'version', 'model', 'preprocessing') if k in config}
    return {**kept, 'class_names': names, 'config': None, 'identity': None}


def _names_of(labels: Any, path: str) -> list[Any]:
    if not isinstance(labels, dict) or (labels and set(labels) != {str(i) for i in range(len(labels))}):
        shown = one_line(str(labels), 80)
        raise InputError(f'{path}: the keys of id2label must be "0", "1", ..., got {shown}')
    return [labels[str(i)] for i in range(len(labels))]


def read_foreign(
    config: Mapping[str, Any], folder: str
) -> tuple[str | None, tuple[str, ...], dict[str, Any], list[str]]:
    """Returns architecture, class names and preprocessing of a config.json of timm or another library.

    The preprocessing has the fields of `data.preprocessing.Preprocessing`. The fourth item are lines on what
    the file does not say.

    Raises:
        InputError: a value cannot be used.
    """
    path = os.path.join(folder, CONFIG)
    inner = config.get('pretrained_cfg')
    values = {**config, **inner} if isinstance(inner, dict) else config
    names = values.get('label_names') or _names_of(values.get('id2label', {}), path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f'{path}: the names of the classes must be strings')
    given = {field: values[field] for field in ('mean', 'std') if field in values}
    size, crop = values.get('input_size'), values.get('crop_pct')
    try:
        if size is not None:
            given['image_size'] = given['resize_size'] = size[-1]
        if size is not None and crop is not None:
            given['resize_size'] = int(size[-1] / crop)
    except (TypeError, ZeroDivisionError, OverflowError, ValueError, IndexError, KeyError) as e:
        raise InputError(f'{path}: input_size {size!r} and crop_pct {crop!r} cannot be used') from e
    wanted = {
        'class names': names,
        'mean': 'mean' in given,
        'std': 'std' in given,
        'input_size': size,
        'crop_pct': crop,
    }
    missing = [name for name, value in wanted.items() if not value]
    notes = (
        [f'{CONFIG} is not of this package, and lacks {", ".join(missing)}: the defaults are used']
        if missing
        else []
    )
    if values.get('interpolation') not in (None, 'bilinear'):
        shown = one_line(str(values['interpolation']), 30)
        notes.append(f'{CONFIG} asks for {shown} interpolation: images are resized bilinearly here')
    arch = values.get('architecture')
    return arch if isinstance(arch, str) else None, tuple(names), given, notes
