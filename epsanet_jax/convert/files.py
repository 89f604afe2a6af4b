"""Reads and writes weight files. Files are untrusted: no code in them runs."""

import collections
import dataclasses
import json
import os
import pathlib
import pickle
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from epsanet_jax.convert import hub_folder
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.paths import write_atomically

TORCH_SUFFIXES = ('.pth.tar', '.pth', '.pt')
SAFETENSORS_SUFFIX = '.safetensors'
SUFFIXES = (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)
PACKAGE = 'epsanet_jax'  # key of the metadata in a file
_WEIGHTS_KEYS = ('state_dict', 'model', 'state_dict_ema', 'model_state_dict')  # used by training scripts


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a weight file.

    Attributes:
        state_dict: name -> tensor (PyTorch files) or array (safetensors).
        epoch: number of finished epochs, if known.
        optimizer: state dict of the optimizer, if the file has one.
        arch: name of the network in the training script, if known.
        best_prec1: best top-1 accuracy in percent, if known.
        metadata: metadata of the file, as strings.
    """

    state_dict: Mapping[str, Any]
    epoch: float | None = None
    optimizer: Mapping[str, Any] | None = None
    arch: str | None = None
    best_prec1: float | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def is_weights_file(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path has the name of a PyTorch or safetensors file, or is a Hub folder."""
    return os.fspath(path).lower().endswith(SUFFIXES) or hub_folder.is_hub_folder(path)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a .pth, .pth.tar or .pt file (these need PyTorch), a .safetensors file or a Hub folder.

    A PyTorch file is a state dict, or a dict with one under 'state_dict', 'model', 'state_dict_ema' or
    'model_state_dict'. Such a dict may also have 'epoch' (the number of finished epochs), 'arch',
    'best_prec1' and 'optimizer', as the reference writes them.

    Raises:
        InputError: the file does not exist, has an unknown suffix, is damaged, or contains objects other
            than tensors and plain containers.
    """
    path = os.path.expanduser(path)
    if hub_folder.is_hub_folder(path):
        content = _read_safetensors(os.path.join(path, hub_folder.WEIGHTS))
        metadata = hub_folder.read_metadata(path)  # replaces that of the safetensors file
        stored = {} if metadata is None else {PACKAGE: json.dumps(metadata)}
        return dataclasses.replace(content, metadata={**content.metadata, **stored})
    if not os.path.isfile(path):
        raise InputError(f'no such file: {path}' if not os.path.isdir(path) else f'{path} is a folder')
    if not is_weights_file(path):
        raise InputError(f'{path}: unknown file type, expected one of {", ".join(SUFFIXES)}')
    try:
        if path.lower().endswith(SAFETENSORS_SUFFIX):
            return _read_safetensors(path)
        return _read_torch(path)
    except OSError as e:
        raise InputError(f'cannot read {path}: {e.strerror or e}') from e


def _read_safetensors(path: str) -> Checkpoint:
    import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
    import safetensors
    import safetensors.numpy

    try:
        with safetensors.safe_open(path, framework='np') as f:
            metadata = f.metadata() or {}
        return Checkpoint(safetensors.numpy.load_file(path), metadata=metadata)
    except (safetensors.SafetensorError, TypeError, ValueError, KeyError) as e:
        raise InputError(f'{path} is not a safetensors file, or it is damaged: {_reason(e)}') from e


def _read_torch(path: str) -> Checkpoint:
    try:
        import torch
    except ImportError as e:
        raise InputError(f'reading {path} needs PyTorch: pip install torch') from e
    with open(path, 'rb') as f:
        start = f.read(8)
    if not start.startswith((b'PK\x03\x04', b'\x80')):
        raise InputError(f'{path} is not a PyTorch file: it starts with {start!r}')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the errors report the same problems
            content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        found = re.search(r'(?:GLOBAL|class|function|global:?) ([\w.]+\.[\w.]+)', str(e))
        what = f' ({found.group(1)})' if found else ''
        raise InputError(
            f'{path} is damaged or contains objects other than tensors{what}: '
            'save only its state_dict (no code in the file was run)'
        ) from e
    except Exception as e:  # for a damaged file torch raises almost any type of exception
        raise InputError(f'{path} is not a PyTorch checkpoint, or it is damaged: {_reason(e)}') from e
    return _find_weights(content, path)


def _find_weights(content: Any, path: str) -> Checkpoint:
    if not isinstance(content, dict):
        raise InputError(f'{path} contains a {type(content).__name__} instead of a state dict')
    weights = next((content[key] for key in _WEIGHTS_KEYS if isinstance(content.get(key), dict)), content)
    named = {name: value for name, value in weights.items() if hasattr(value, 'shape')}
    if not named or len(named) < len(weights) or not all(isinstance(name, str) for name in named):
        raise InputError(f'{path} contains no state dict; its entries: {", ".join(map(str, weights))[:200]}')
    note = getattr(weights, PACKAGE, None)
    metadata = {PACKAGE: note} if isinstance(note, str) else {}
    if weights is content:
        return Checkpoint(named, metadata=metadata)
    epoch, arch, optimizer = (content.get(key) for key in ('epoch', 'arch', 'optimizer'))
    return Checkpoint(
        named,
        epoch=epoch if isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0 else None,
        optimizer=optimizer if isinstance(optimizer, dict) else None,
        arch=arch if isinstance(arch, str) else None,
        best_prec1=_number(content.get('best_prec1')),
        metadata=metadata,
    )


def _number(value: Any) -> float | None:
    """Returns a number or a scalar tensor as a float, and None for other values."""
    value = value.item() if getattr(value, 'ndim', None) == 0 else value
    return float(value) if isinstance(value, int | float) else None


def write_torch(
    path: str,
    state_dict: Mapping[str, np.ndarray],
    rest: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a state dict or, with `rest`, {**rest, 'state_dict': ...}. Needs PyTorch.

    The metadata become an attribute of the state dict, which other programs ignore.

    Raises:
        InputError: PyTorch is not installed, or the file cannot be written.
    """
    try:
        import torch
    except ImportError as e:
        raise InputError(f'writing {path} needs PyTorch: pip install torch') from e
    tensors = collections.OrderedDict((name, _tensor(a, torch)) for name, a in state_dict.items())
    if metadata is not None:
        setattr(tensors, PACKAGE, json.dumps(metadata))
    content = tensors if rest is None else {**_to_tensors(rest, torch), 'state_dict': tensors}

    def write(temporary: str) -> None:
        with open(temporary, 'wb') as f:  # given a path, torch stores its name in the file
            torch.save(content, f)

    write_atomically(path, write)


def write_safetensors(path: str, state_dict: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes a safetensors file. Metadata that are not strings are stored as JSON.

    Raises:
        InputError: the file cannot be written.
    """
    import safetensors.numpy

    strings = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    content = safetensors.numpy.save(dict(state_dict), metadata={'format': 'pt', **strings})
    write_atomically(path, lambda temporary: pathlib.Path(temporary).write_bytes(content))


def weights_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a file for the result of `make_metadata`: all of it, and the main items."""
    model = metadata['model']
    shown = {'model': model['name'], 'num_classes': str(model['num_classes'])}
    shown |= {k: metadata[k] for k in ('class_names', 'preprocessing')}
    return {**shown, PACKAGE: metadata}


def _to_tensors(tree: Any, torch: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _to_tensors(v, torch) for k, v in tree.items()}
    return _tensor(tree, torch) if isinstance(tree, np.ndarray) else tree


def _tensor(array: np.ndarray, torch: Any) -> Any:
    if array.dtype.name == 'bfloat16':
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


def _reason(error: Exception) -> str:
    """Returns the first sentence of a message."""
    return re.split(r'\. (?=[A-Z])', one_line(error))[0][:200] or type(error).__name__
