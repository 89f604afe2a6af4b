"""Reads PyTorch files without running code in them."""

import pickle
import re
import types
import warnings
import zipfile
from typing import Any

import numpy as np

from epsanet_jax.errors import InputError, one_line

STARTS = (b'PK\x03\x04', b'\x80')  # of a zip archive and of a pickle
_LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # how torch.save began before it wrote zip archives
_NUMBERS = '?bBhHiIlLqQefdg'  # type codes of NumPy's numbers


def read_torch(path: str) -> Any:
    """Returns the content of a file that `torch.save` wrote. Needs PyTorch.

    Besides tensors and plain containers it may hold NumPy numbers and an `argparse.Namespace`.

    Raises:
        InputError: PyTorch is not installed, or the file is damaged or holds other objects.
    """
    try:
        import torch
    except ImportError as e:
        raise InputError(f'reading {path} needs PyTorch: pip install torch') from e
    scalar = np.float64(0).__reduce__()[0]
    harmless = [
        (types.SimpleNamespace, 'argparse.Namespace'),
        (scalar, 'numpy._core.multiarray.scalar'),
        (scalar, 'numpy.core.multiarray.scalar'),  # NumPy 1
        np.dtype,
        *{type(np.dtype(code)) for code in _NUMBERS},
    ]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless), open(path, 'rb') as f:
            warnings.simplefilter('ignore')  # the errors report the same problems
            return torch.load(f, map_location='cpu', weights_only=True)  # given a path, it trusts the suffix
    except OSError:
        raise
    except Exception as e:  # for a damaged file torch raises almost any type of exception
        raise InputError(_reason(path, e)) from e


def _reason(path: str, error: Exception) -> str:
    """Returns why a file cannot be read."""
    text, advice = str(error), 'save only its state_dict with torch.save'
    found = re.search(r'(?:GLOBAL|class|function|global:?) ([\w.]+\.[\w.]+)', text)
    if isinstance(error, pickle.UnpicklingError) and found:
        return f'{path} contains {found.group(1)[:100]}, no tensor: {advice} (no code in the file was run)'
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition('/')[2] or name for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, NotImplementedError):
        names = []
    if 'constants.pkl' in names:
        return f'{path} is a TorchScript archive, which holds code: {advice}'
    if 'archive_format' in names or 'serialized_exported_program.json' in names:
        return f'{path} is a program of torch.export, not weights: {advice}'
    if any(name.endswith('.npy') for name in names):
        return f'{path} is an archive of NumPy arrays: {advice}'
    with open(path, 'rb') as f:
        start = f.read(len(_LEGACY))
    if 'Unsupported operand' in text or (not names and not start.startswith((b'PK', _LEGACY))):
        return f'{path} is a pickle that torch.save does not write, or damaged: {advice}'
    if isinstance(error, pickle.UnpicklingError):
        return f'{path} is damaged or contains objects other than tensors: {advice}'
    first = re.split(r'\. (?=[A-Z])', one_line(error))[0][:200] or type(error).__name__
    return f'{path} is not a PyTorch checkpoint, or it is damaged: {first}'
