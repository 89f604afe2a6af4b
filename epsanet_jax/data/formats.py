"""Recognises parquet files, WebDataset shards and tables of labels by their names and their content."""

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from epsanet_jax.data import tables, webdataset
from epsanet_jax.data.contents import Contents
from epsanet_jax.data.labelled import Labelled
from epsanet_jax.data.parquet import list_parquet
from epsanet_jax.data.splits import find_split, split_of
from epsanet_jax.data.walk import litter
from epsanet_jax.errors import InputError, some

PARQUET, SHARDS, TABLE = 'parquet', 'WebDataset', 'table'
_KINDS = {'.parquet': PARQUET, '.tar': SHARDS, '.csv': TABLE, '.jsonl': TABLE}
_METADATA = ('metadata.csv', 'metadata.jsonl')


class Found(NamedTuple):
    """The files of a split."""

    kind: str
    files: tuple[str, ...]
    split: str = ''  # only the rows of a table whose paths begin with this split


def kind_of(path: str) -> str | None:
    """Returns the kind of a file by its name, None for others."""
    return _KINDS.get(os.path.splitext(path)[1].lower())


def find(place: str, split: str, column: str = '') -> Found | None:
    """Finds the files of a split.

    They are, whichever is there first: the file `place` itself; the file `split` in it; the files in the
    folder of the split; files in `place` or in its folder `data` with the split in their names, such as
    train-00000-of-00002.parquet, shard-train-01.tar or train.csv; and metadata.csv or metadata.jsonl in
    `place`, for paths that begin with the split. A folder of the split that holds none of them, but folders,
    holds one folder per class.

    Args:
        place: path of a folder or a file.
        split: name of the split, in any spelling; '.': all of a file, or the files in the folder itself.
        column: column of the labels. A metadata file in the folder of a split counts only if it has labels.

    Returns:
        The files, or None if there are none: the place may hold class folders.

    Raises:
        InputError: files of several kinds, or of several spellings of the split, are there.
    """
    if os.path.isfile(place):
        return _in_file(place, split)
    folder = os.path.normpath(os.path.join(place, split))
    if os.path.isfile(folder):
        return _one_kind(split, [folder])
    spelled = None if os.path.isdir(folder) else find_split(split, _folders(place), place)
    folder = os.path.join(place, spelled) if spelled else folder
    inside = [
        path for path in _files(folder) if os.path.basename(path) in _METADATA or kind_of(path) != TABLE
    ]
    classes = os.path.isdir(folder) and _folders(folder)
    found = _one_kind(folder, inside)
    if found and not (found.kind == TABLE and classes and not tables.has_labels(found.files[0], column)):
        return found
    if classes:
        return None
    for there in (place, os.path.join(place, 'data')):
        names = {path: name for path in _files(there) if (name := _split_in(path))}
        chosen = find_split(split, {*names.values()}, there)
        if chosen is not None:
            return _one_kind(there, [path for path, name in names.items() if name == chosen])
    top = _one_kind(place, [path for path in _files(place) if os.path.basename(path) in _METADATA])
    return top and top._replace(split=split)


def splits_in(place: str) -> list[str]:
    """Returns the sorted names of the splits in a folder: of folders, and in the names of files."""
    files = [path for folder in (place, os.path.join(place, 'data')) for path in _files(folder)]
    return sorted({*_folders(place), *filter(None, map(_split_in, files))})


def _in_file(path: str, split: str) -> Found | None:
    kind = kind_of(path)
    if kind is None:
        return None
    if split == '.' or kind == TABLE:
        return Found(kind, (path,), '' if split == '.' else split)
    name = _split_in(path)
    if name is None or find_split(split, [name], path) is None:
        raise InputError(
            f'{path} is not named as the split {split!r}: give its folder as config.data.dir and a file for '
            'each split as config.data.train_split and config.data.eval_split'
        )
    return Found(kind, (path,))


def _files(folder: str) -> list[str]:
    """Returns the sorted files of the known kinds in a folder; of tars, only shards."""
    try:
        names = [name for name in sorted(os.listdir(folder)) if kind_of(name) and not litter(name)]
    except OSError:
        return []
    paths = [path for path in (os.path.join(folder, name) for name in names) if os.path.isfile(path)]
    tars = [path for path in paths if kind_of(path) == SHARDS]
    if tars and not webdataset.is_shard(tars[0]):
        paths = [path for path in paths if path not in set(tars)]
    return paths


def _folders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not litter(entry.name))
    except OSError:  # `ImageFolder` names the reason
        return []


def _split_in(path: str) -> str | None:
    """Returns the name of the split in a file's name; for a table, it must be the whole name."""
    stem = os.path.splitext(os.path.basename(path))[0]
    words = [stem] if kind_of(path) == TABLE else re.split(r'[\W_\d]+', stem)
    found = {word for word in words if split_of(word)}
    return found.pop() if len(found) == 1 else None


def _one_kind(where: str, paths: Iterable[str]) -> Found | None:
    paths = tuple(paths)
    kinds = {kind: path for path in paths if (kind := kind_of(path))}
    if len(kinds) > 1 or (TABLE in kinds and len(paths) > 1):
        raise InputError(
            f'{where} holds {some([*map(os.path.basename, paths)])}: keep one kind of files there'
        )
    return Found(next(iter(kinds)), paths) if kinds else None


def contents_of(found: Found, column: str = '', with_labels: bool = True) -> Contents:
    """Lists the images of files; their labels are read only if needed.

    Raises:
        InputError: a file cannot be used.
    """
    if found.kind == PARQUET:
        return list_parquet(found.files, column, with_labels)
    if found.kind == SHARDS:
        return webdataset.list_shards(found.files, column, with_labels)
    return tables.list_table(found.files[0], column, with_labels, found.split)


def open_labelled(found: Found, column: str = '') -> tuple[Labelled, str]:
    """Opens the images of files with their labels.

    Returns:
        The source, and the line that says what was taken.

    Raises:
        InputError: a file or a label cannot be used.
    """
    files = found.files[0]
    if len(found.files) > 1:
        files += f' ... {os.path.basename(found.files[-1])} ({len(found.files)} files)'
    contents = contents_of(found, column)
    if not len(contents):
        raise InputError(f'{files} holds no image; {contents.about}')
    source = Labelled(contents)
    return source, f'{files}: {len(source)} images of {len(source.class_names)} classes; {contents.about}'
