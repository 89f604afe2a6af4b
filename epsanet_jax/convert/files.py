"""Reads and writes weight files. Files are untrusted: no code in them runs."""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from epsanet_jax.convert import hub_folder
from epsanet_jax.convert.contents import PACKAGE, Checkpoint, find_weights
from epsanet_jax.convert.torch_file import STARTS, read_torch
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.paths import write_atomically

TORCH_SUFFIXES = ('.pth.tar', '.pth', '.pt')
SAFETENSORS_SUFFIX = '.safetensors'
SUFFIXES = (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)  # of the files that are written
# How other files begin that people take for weights, and what to do with them.
_OTHERS = {
    b'': 'empty',
    b'{': 'JSON, not weights',
    b'<': 'a web page, not weights: download the file itself',
    b'version https://git-lfs': 'a pointer of Git LFS, not weights: fetch the file with git lfs pull',
    b'\x1f\x8b': 'compressed with gzip: unpack it first',
    b'\x89HDF': 'an HDF5 file: save the state dict with PyTorch',
}


def is_weights_file(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a file or a Hub folder, or has the name of a file of weights."""
    path = os.path.expanduser(path)
    return os.path.isfile(path) or has_weights_suffix(path) or hub_folder.is_hub_folder(path)


def has_weights_suffix(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path has the name of a PyTorch or safetensors file."""
    return os.fspath(path).lower().endswith(SUFFIXES)


def read_checkpoint(path: str | os.PathLike[str], *, ema: bool = True, ignore: str = '') -> Checkpoint:
    """Reads a PyTorch file (these need PyTorch), a safetensors file or a Hub folder.

    The content decides on the type of the file, not its suffix. A PyTorch file is a state dict, or dicts that
    hold one. Besides, 'epoch' (the number of finished epochs), 'arch', 'best_prec1' and 'optimizer' are read,
    as the reference writes them. `Checkpoint.notes` says what else was found.

    Args:
        path: the file or folder.
        ema: whether to take moving averages of weights, if there are any, instead of the weights.
        ignore: regular expression for names of entries to leave out; '' for none.

    Raises:
        InputError: the file does not exist, is of another type, is damaged, contains objects other than
            tensors and plain containers, or holds no or several networks.
    """
    path = os.path.expanduser(path)
    if os.path.basename(path) == hub_folder.INDEX:
        path = os.path.dirname(path) or '.'
    try:
        if hub_folder.is_hub_folder(path):
            return _read_folder(path, ema, ignore)
        if not os.path.isfile(path):
            raise InputError(f'{path} is a folder' if os.path.isdir(path) else f'no such file: {path}')
        return _read_file(path, ema, ignore)
    except OSError as e:
        raise InputError(f'cannot read {path}: {e.strerror or e}') from e


def _read_file(path: str, ema: bool, ignore: str) -> Checkpoint:
    with open(path, 'rb') as f:
        start = f.read(32)
    # Safetensors begin with the size of a JSON header, whose first bytes may be those of a pickle.
    is_safetensors = start[5:9] == b'\0\0\0{'
    if start.startswith(STARTS) and not is_safetensors:
        return find_weights(read_torch(path), path, ema, ignore)
    if is_safetensors or path.lower().endswith(SAFETENSORS_SUFFIX):
        tensors, metadata = _read_safetensors(path)
        return dataclasses.replace(find_weights(tensors, path, ema, ignore), metadata=metadata)
    what = [text for beginning, text in _OTHERS.items() if beginning and start.startswith(beginning)]
    what = what or [
        _OTHERS[b''] if not start else f'no PyTorch or safetensors file: it starts with {start[:8]!r}'
    ]
    raise InputError(f'{path} is {what[0]}')


def _read_folder(path: str, ema: bool, ignore: str) -> Checkpoint:
    """Reads the weights of a Hub folder; its config.json replaces the metadata of the files."""
    stored: dict[str, str] = {}
    names = hub_folder.weight_files(path)
    if names == [hub_folder.TORCH]:
        content = _read_file(os.path.join(path, names[0]), ema, ignore)
    else:
        tensors: dict[str, Any] = {}
        for name in names:
            part, metadata = _read_safetensors(os.path.join(path, name))
            tensors, stored = {**tensors, **part}, {**stored, **metadata}
        content = dataclasses.replace(find_weights(tensors, path, ema, ignore), metadata=stored)
    config = hub_folder.read_config(path)
    if config is None:
        return content
    if hub_folder.is_ours(config):
        ours = {PACKAGE: json.dumps(hub_folder.to_metadata(config, path))}
        return dataclasses.replace(content, metadata={**content.metadata, **ours})
    arch, class_names, preprocessing, notes = hub_folder.read_foreign(config, path)
    return dataclasses.replace(
        content,
        arch=arch or content.arch,
        class_names=class_names,
        preprocessing=preprocessing,
        notes=(*content.notes, *notes),
    )


def _read_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
    import safetensors
    import safetensors.numpy

    try:
        with safetensors.safe_open(path, framework='np') as f:
            metadata = f.metadata() or {}
            types = [f.get_slice(name).get_dtype() for name in f.keys()]  # noqa: SIM118
        narrow = sorted(dtype for dtype in types if dtype.startswith('F8'))
        if narrow:
            raise InputError(f'{path} holds tensors of type {narrow[0]}: convert them to float32 or bfloat16')
        return safetensors.numpy.load_file(path), metadata
    except (safetensors.SafetensorError, TypeError, ValueError, KeyError, AttributeError) as e:
        if isinstance(e, InputError):
            raise
        reason = one_line(e, 200) or type(e).__name__
        raise InputError(f'{path} is not a safetensors file, or it is damaged: {reason}') from e


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
