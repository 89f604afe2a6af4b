"""The labels of ImageNet's validation pictures, from a list of synsets or from the development kit.

The kit numbers its 1,000 classes in an order of its own. TFDS, torchvision and this package number the sorted
synsets. Taking one number for the other trains well and evaluates to nothing; so numbers are never taken
without the kit's own table, data/meta.mat.
"""

import io
import os
import re
import tarfile
from typing import IO

from epsanet_jax.errors import InputError, one_line

SYNSET = re.compile(r'n\d{8}')
_TRUTH, _TABLE = 'ILSVRC2012_validation_ground_truth.txt', 'meta.mat'
_KIT = 'ILSVRC2012_devkit_t12'
_MOST_BYTES = 64 * 2**20


def find_labels(folder: str) -> str:
    """Returns the path of a list of synsets, else of the development kit.

    Raises:
        InputError: neither is in the folder, or several lists are.
    """
    lists = sorted(name for name in os.listdir(folder) if re.fullmatch(r'.*synset_labels.*\.txt', name))
    if len(lists) > 1:
        raise InputError(f'{folder} holds several lists of labels, {", ".join(lists)}: choose with --labels')
    for name in (*lists, _KIT, f'{_KIT}.tar.gz', f'{_KIT}.tar', os.path.join('data', _TRUTH)):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    raise InputError(
        f'no labels of the validation pictures in {folder}: put {_KIT}.tar.gz there, or name a file with '
        'one synset a line, in the order of the sorted file names, with --labels'
    )


def read_labels(path: str) -> list[str]:
    """Returns the synset of each validation picture, in the order of the sorted file names.

    Args:
        path: a text with one synset a line; or the kit: its folder, its tar, or the list of numbers in it.

    Raises:
        InputError: it cannot be read, or holds numbers without the table that says what they mean.
    """
    try:
        if os.path.isdir(path):
            folder = os.path.join(path, 'data') if os.path.isdir(os.path.join(path, 'data')) else path
            return _from_kit(_read(folder, _TRUTH), _read(folder, _TABLE), path)
        if '.tar' in path or path.endswith('.tgz'):
            return _from_kit(*_unpack(path), path)
        text = _read(*os.path.split(path))
        table = os.path.join(os.path.dirname(path), _TABLE)
        if _lines(text, path) and all(line.isdigit() for line in _lines(text, path)):
            if not os.path.isfile(table):
                raise InputError(
                    f'{path} holds class numbers, and no {_TABLE} lies beside it to say what they mean: the '
                    'development kit does not number sorted synsets; give the whole kit, or one synset a line'
                )
            return _from_kit(text, _read(*os.path.split(table)), path)
    except (OSError, tarfile.TarError, EOFError) as e:
        raise InputError(f'cannot read the labels in {path}: {one_line(e)}') from e
    lines = _lines(text, path)
    for number, line in enumerate(lines, 1):
        if not SYNSET.fullmatch(line):
            raise InputError(f'{path} line {number}: expected a synset (n01440764), got {line[:40]!r}')
    return lines


def _from_kit(truth: bytes, table: bytes, path: str) -> list[str]:
    synsets = _read_table(table, path)
    lines = _lines(truth, path)
    for number, line in enumerate(lines, 1):
        if not line.isdigit() or int(line) not in synsets:
            raise InputError(f'{path}: {_TRUTH} line {number}: no such class in {_TABLE}: {line[:40]!r}')
    return [synsets[int(line)] for line in lines]


def _read_table(table: bytes, path: str) -> dict[int, str]:
    import scipy.io

    try:
        rows = scipy.io.loadmat(io.BytesIO(table), squeeze_me=True)['synsets']
        synsets = dict(zip(map(int, rows['ILSVRC2012_ID'].flat), map(str, rows['WNID'].flat), strict=True))
    except Exception as e:  # for a damaged file it raises many things
        raise InputError(f'{path}: cannot read {_TABLE}: {type(e).__name__}: {one_line(e)}') from e
    for synset in synsets.values():
        if not SYNSET.fullmatch(synset):
            raise InputError(f'{path}: {_TABLE} holds {synset[:40]!r}, which is no synset')
    return synsets


def _unpack(path: str) -> tuple[bytes, bytes]:
    found: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = os.path.basename(member.name)
            if name in (_TRUTH, _TABLE) and member.isreg():
                content = tar.extractfile(member)
                assert content is not None
                found[name] = _limited(content)
    if missing := [name for name in (_TRUTH, _TABLE) if name not in found]:
        raise InputError(f'{path} is not the development kit of ILSVRC2012: it holds no {missing[0]}')
    return found[_TRUTH], found[_TABLE]


def _read(folder: str, name: str) -> bytes:
    with open(os.path.join(folder, name), 'rb') as f:
        return _limited(f)


def _limited(f: IO[bytes]) -> bytes:
    content = f.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise InputError(f'{f.name} is far too large for labels')
    return content


def _lines(text: bytes, path: str) -> list[str]:
    try:
        return [line.strip() for line in text.decode().strip().splitlines()]
    except UnicodeDecodeError as e:
        raise InputError(f'{path} is no text: expected one label a line') from e
