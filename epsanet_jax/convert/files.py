"""Reading and writing of weight files. Nothing in a file is trusted: no code in it is run."""

import dataclasses
import json
import os
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
# Where training scripts keep the weights.
_INSIDE = ('state_dict', 'model', 'state_dict_ema', 'model_state_dict')


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state_dict: name -> tensor (PyTorch files) or array (safetensors).
        epoch: epochs trained, if the file says.
        optimizer: the optimiser's state dict, if there is one.
        arch: the name that the training script gave the network, if there is one.
        best_prec1: best top-1 in percent, if the file says.
        metadata: of a safetensors file, strings.
    """

    state_dict: Mapping[str, Any]
    epoch: float | None = None
    optimizer: Mapping[str, Any] | None = None
    arch: str | None = None
    best_prec1: float | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def is_weights_file(path: str | os.PathLike[str]) -> bool:
    """Whether the name is that of a PyTorch or safetensors file, or of a folder in the Hub's layout."""
    known = os.fspath(path).lower().endswith((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))
    return known or hub_folder.is_hub_folder(path)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads .pth, .pth.tar, .pt (needs PyTorch), .safetensors or a folder in the Hub's layout (do not).

    The weights of a PyTorch file are the dict itself, or its 'state_dict', 'model', 'state_dict_ema' or
    'model_state_dict'; 'epoch', 'arch', 'best_prec1' and 'optimizer' are read as the reference writes them,
    whose epoch counts those done. Of a folder, config.json says what a safetensors file's metadata would.

    Raises:
        InputError: there is no such file, it is of another kind or damaged, or it holds objects other than
            tensors and plain containers.
    """
    path = os.path.expanduser(path)
    if hub_folder.is_hub_folder(path):
        return _read_hub_folder(path)
    if not os.path.isfile(path):
        raise InputError(f'no such file: {path}' if not os.path.isdir(path) else f'{path} is a folder')
    if not is_weights_file(path):
        known = ', '.join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))
        raise InputError(f'{path}: unknown kind of file, expected one of {known}')
    try:
        if path.lower().endswith(SAFETENSORS_SUFFIX):
            return _read_safetensors(path)
        return _read_torch(path)
    except OSError as e:
        raise InputError(f'cannot read {path}: {e.strerror or e}') from e


def _read_hub_folder(path: str) -> Checkpoint:
    content = _read_safetensors(os.path.join(path, hub_folder.WEIGHTS))
    metadata = hub_folder.read_metadata(path)
    if metadata is None:
        return content
    return dataclasses.replace(content, metadata={**content.metadata, 'epsanet_jax': json.dumps(metadata)})


def _read_safetensors(path: str) -> Checkpoint:
    import ml_dtypes  # noqa: F401  (makes bfloat16 known to numpy)
    import safetensors
    import safetensors.numpy

    try:
        with safetensors.safe_open(path, framework='np') as f:
            metadata = f.metadata() or {}
        return Checkpoint(safetensors.numpy.load_file(path), metadata=metadata)
    except (safetensors.SafetensorError, TypeError, ValueError, KeyError) as e:
        raise InputError(f'{path} is no safetensors file, or damaged: {_line(e)}') from e


def _read_torch(path: str) -> Checkpoint:
    try:
        import torch
    except ImportError as e:
        raise InputError(f'reading {path} needs PyTorch: pip install torch') from e
    with open(path, 'rb') as f:
        start = f.read(8)
    if not start.startswith((b'PK\x03\x04', b'\x80')):
        raise InputError(f'{path} is no PyTorch file: it begins with {start!r}')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of pickle protocols and TorchScript: the errors say it too
            content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        found = re.search(r'(?:GLOBAL|class|function|global:?) ([\w.]+\.[\w.]+)', str(e))
        what = f' ({found.group(1)})' if found else ''
        raise InputError(
            f'{path} is damaged or holds more than tensors{what}, which only code from it could read; '
            'nothing of it was run; save its state_dict alone'
        ) from e
    # A damaged file makes torch raise anything: RuntimeError, EOFError, KeyError, AssertionError ...
    except Exception as e:
        raise InputError(f'{path} is no PyTorch checkpoint, or damaged: {_line(e)}') from e
    return _find_weights(content, path)


def _find_weights(content: Any, path: str) -> Checkpoint:
    if not isinstance(content, dict):
        raise InputError(f'{path} holds a {type(content).__name__}, no state dict')
    weights = next((content[key] for key in _INSIDE if isinstance(content.get(key), dict)), content)
    named = {name: value for name, value in weights.items() if hasattr(value, 'shape')}
    if not named or len(named) < len(weights) or not all(isinstance(name, str) for name in named):
        raise InputError(f'{path} holds no state dict: its entries are {", ".join(map(str, weights))[:200]}')
    if weights is content:
        return Checkpoint(named)
    epoch, best, arch = content.get('epoch'), content.get('best_prec1'), content.get('arch')
    optimizer = content.get('optimizer')
    return Checkpoint(
        named,
        epoch=epoch if isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0 else None,
        optimizer=optimizer if isinstance(optimizer, dict) else None,
        arch=arch if isinstance(arch, str) else None,
        best_prec1=_number(best),
    )


def _number(value: Any) -> float | None:
    """Returns a number, or a tensor of one, as float."""
    value = value.item() if getattr(value, 'ndim', None) == 0 else value
    return float(value) if isinstance(value, int | float) else None


def write_torch(
    path: str, state_dict: Mapping[str, np.ndarray], rest: Mapping[str, Any] | None = None
) -> None:
    """Writes a bare state dict or, with `rest`, {**rest, 'state_dict': ...}; needs PyTorch.

    Raises:
        InputError: PyTorch is not installed, or the file cannot be written.
    """
    try:
        import torch
    except ImportError as e:
        raise InputError(f'writing {path} needs PyTorch: pip install torch') from e
    tensors = {name: _tensor(array, torch) for name, array in state_dict.items()}
    content = tensors if rest is None else {**_to_tensors(rest, torch), 'state_dict': tensors}

    def write(temporary: str) -> None:
        with open(temporary, 'wb') as f:  # given a path, torch would keep its name inside the file
            torch.save(content, f)

    write_atomically(path, write)


def write_safetensors(path: str, state_dict: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes a safetensors file; values of the metadata that are not strings become JSON.

    Raises:
        InputError: the file cannot be written.
    """
    import safetensors.numpy

    strings = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    content = safetensors.numpy.save(dict(state_dict), metadata={'format': 'pt', **strings})

    def write(temporary: str) -> None:
        with open(temporary, 'wb') as f:
            f.write(content)

    write_atomically(path, write)


def weights_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a file of weights says about them: all of it, and for other programs the main things.

    Args:
        metadata: from `weights.metadata.make_metadata`.
    """
    model = metadata['model']
    shown = {'model': model['name'], 'num_classes': str(model['num_classes'])}
    shown |= {k: metadata[k] for k in ('class_names', 'preprocessing')}
    return {**shown, 'epsanet_jax': metadata}


def _to_tensors(tree: Any, torch: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _to_tensors(v, torch) for k, v in tree.items()}
    return _tensor(tree, torch) if isinstance(tree, np.ndarray) else tree


def _tensor(array: np.ndarray, torch: Any) -> Any:
    if array.dtype.name == 'bfloat16':
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


def _line(error: Exception) -> str:
    text = one_line(error)
    return re.split(r'\. (?=[A-Z])', text)[0][:200] or type(error).__name__
