"""WebDataset shards: tars in which KEY.jpg and KEY.cls, KEY.json or KEY.txt are an image and its label.

A key is the path of a member up to the first dot of its file name, as WebDataset defines it. Each shard is
indexed when it is first used; the index is kept in the user's cache folder until the shard changes.
"""

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from epsanet_jax.data import tars
from epsanet_jax.data.labelled import Label, Place, label_column
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.paths import replacing

_IMAGES = ('jpg', 'jpeg', 'png', 'webp')
_LABELS = ('cls', 'json', 'txt')  # the first one that a key has counts
_VERSION = 1  # of the files of indices
_MOST_BYTES = 2**20  # of a label


class _Index(NamedTuple):
    """The images of a shard: columns of equal length, in the order of the tar."""

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[Label]
    kinds: list[str]  # the kind of file that holds each label; '' without a label


def is_shard(path: str) -> bool:
    """Whether an image among the first members of a tar has a label of its own.

    A file that is not an uncompressed tar is not a shard.
    """
    try:
        first = list(itertools.islice((m.name for m in tars.members(path) if m.offset >= 0), 16))
    except InputError:
        return False
    kinds: dict[str, set[str]] = {}
    for name in first:
        key, kind = _split(name)
        kinds.setdefault(key, set()).add(kind)
    return any(of & set(_IMAGES) and of & set(_LABELS) for of in kinds.values())


def _split(name: str) -> tuple[str, str]:
    """Returns the key and the extension of a member."""
    folder, last = os.path.split(name)
    stem, _, kind = last.partition('.')
    return os.path.join(folder, stem), kind.lower()


class ShardImages:
    """The images of shards, in order; see `labelled.Images`.

    Args:
        paths: the shards.
        column: key of the label in KEY.json; '': a usual name.
        with_labels: whether labels are needed.

    Raises:
        InputError: a shard is damaged, holds two images with one key, or its labels are of several kinds.
    """

    def __init__(self, paths: Sequence[str], column: str = '', with_labels: bool = True):
        self._paths = list(paths)
        self._parts = [_read_index(path, column if with_labels else None) for path in paths]
        self._ends = list(itertools.accumulate(len(part.names) for part in self._parts))
        self.labels: Sequence[Label] = ()
        self.class_names: tuple[str, ...] = ()
        self.about = 'images'
        if with_labels:
            self._check_kinds()
            self.labels = [label for part in self._parts for label in part.labels]
        self._parts = [part._replace(labels=[], kinds=[]) for part in self._parts]

    def _check_kinds(self) -> None:
        first: dict[str, int] = {}
        for index, kind in enumerate(kind for part in self._parts for kind in part.kinds):
            first.setdefault(kind, index)
        for index in (first[''],) if '' in first else ():
            raise InputError(f'{self.name_of(index)} has no label: .cls, .json or .txt is missing beside it')
        if len(first) > 1:
            places = [f'{self.name_of(index)} has its label in .{kind}' for kind, index in first.items()]
            raise InputError(f'{" and ".join(places[:2])}: use one kind for all images')
        self.about += ''.join(f', labels in KEY.{kind}' for kind in first)

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, index: int) -> tuple[str, _Index, int]:
        """Returns the shard, its index, and the place of the image in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect.bisect_right(self._ends, index)
        return self._paths[which], self._parts[which], index - (self._ends[which - 1] if which else 0)

    def read(self, index: int) -> bytes:
        """Returns the bytes of the image, see `tars.read_member`."""
        path, part, i = self._find(index)
        return tars.read_member(path, part.offsets[i], part.sizes[i])

    def name_of(self, index: int) -> str:
        """Returns the shard and the member."""
        path, part, i = self._find(index)
        return f'{path}: {part.names[i]}'

    def place_of(self, index: int) -> Place:
        """Returns where the image is."""
        path, part, i = self._find(index)
        return Place(path, part.names[i], part.sizes[i], os.stat(path).st_mtime_ns, part.offsets[i])

    def identity(self) -> Iterable[str]:
        """Returns the names and sizes of the images."""
        for part in self._parts:
            yield from (f'{name} {size}' for name, size in zip(part.names, part.sizes, strict=True))


def _read_index(path: str, column: str | None) -> _Index:
    """Returns the index of a shard: from the cache if the shard has not changed, else it is built."""
    try:
        status = os.stat(path)
    except OSError as e:
        raise InputError(f'cannot read {path}: {e.strerror}') from e
    key = [_VERSION, os.path.abspath(path), column, status.st_size, status.st_mtime_ns]
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    name = hashlib.sha256(json.dumps(key[:3]).encode()).hexdigest()[:32]
    place = os.path.join(cache, 'epsanet_jax', 'shards', f'{name}.json')
    try:
        with open(place) as f:
            stored = json.load(f)
        if stored['key'] == key:
            index = _Index(**stored['index'])
            if len({len(values) for values in index}) == 1:
                return index
    except (OSError, ValueError, KeyError, TypeError):  # missing, or not written by this version
        pass
    index = _build(path, column)
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with replacing(place) as temporary:
            temporary.write_text(json.dumps({'key': key, 'index': index._asdict()}))
    except (OSError, ValueError):
        pass  # the cache only saves time: the index is built again by the next process
    return index


def _build(path: str, column: str | None) -> _Index:
    images: dict[str, tars.Member] = {}
    sidecars: dict[str, dict[str, tars.Member]] = {}
    for member in tars.members(path):
        key, kind = _split(member.name)
        if member.offset < 0 or kind not in _IMAGES + _LABELS:
            continue
        if kind in _IMAGES and key in images:
            raise InputError(f'{path}: {images[key].name} and {member.name} are two images with one key')
        if kind in _IMAGES:
            images[key] = member
        elif kind in sidecars.setdefault(key, {}):
            raise InputError(f'{path} holds {member.name} twice: which label counts is unknown')
        else:
            sidecars[key][kind] = member
    index = _Index([], [], [], [], [])
    with open(path, 'rb') as f:
        for key, image in images.items():
            kind = next((kind for kind in _LABELS if kind in sidecars.get(key, {})), '')
            label = None
            if kind and column is not None:
                member = sidecars[key][kind]
                f.seek(member.offset)
                text = f.read(min(member.size, _MOST_BYTES))
                label = _label_of(text, kind, column, f'{path}: {member.name}')
            index.names.append(image.name)
            index.offsets.append(image.offset)
            index.sizes.append(image.size)
            index.labels.append(label)
            index.kinds.append(kind)
    return index


def _label_of(content: bytes, kind: str, column: str, where: str) -> Label:
    try:
        text = content.decode().strip()
        value: Any = json.loads(text) if kind == 'json' else text
    except (ValueError, RecursionError) as e:
        expected = 'JSON' if kind == 'json' else 'text'
        raise InputError(f'{where} is not {expected}: {one_line(e)}') from e
    if isinstance(value, dict):
        value = value.get(label_column([*value], column, where))
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise InputError(f'{where}: the label {value!r} is neither a class name nor a class number')
    return value
