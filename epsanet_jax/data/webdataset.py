"""WebDataset shards: tars in which KEY.jpg and KEY.cls, KEY.json or KEY.txt are an image and its label.

A key is the path of a member up to the first dot of its file name, as WebDataset defines it. Each shard is
indexed when it is first used; the index is kept in the user's cache folder until the shard changes.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from epsanet_jax.data import tars
from epsanet_jax.data.contents import Contents, Label, Part, checked_label, label_column
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


def list_shards(paths: Sequence[str], column: str = '', with_labels: bool = True) -> Contents:
    """Lists the images of shards.

    Args:
        paths: the shards.
        column: key of the label in KEY.json; '': a usual name.
        with_labels: whether labels are needed.

    Raises:
        InputError: a shard is damaged, holds two images with one key, or its labels are of several kinds.
    """
    indices = [_read_index(path, column if with_labels else None) for path in paths]
    parts = [Part(path, i.names, i.offsets, i.sizes) for path, i in zip(paths, indices, strict=True)]
    contents = Contents(parts, 'images')
    if not with_labels:
        return contents
    first: dict[str, str] = {}  # the first image with each kind of label
    for number, kind in enumerate(kind for index in indices for kind in index.kinds):
        if kind not in first:
            first[kind] = contents.name_of(number)
    if '' in first:
        raise InputError(f'{first[""]} has no label: .cls, .json or .txt is missing beside it')
    if len(first) > 1:
        places = [f'{name} has its label in .{kind}' for kind, name in first.items()]
        raise InputError(f'{" and ".join(places[:2])}: use one kind for all images')
    contents.labels = [label for index in indices for label in index.labels]
    contents.about += ''.join(f', labels in KEY.{kind}' for kind in first)
    return contents


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
    return checked_label(value, where)
