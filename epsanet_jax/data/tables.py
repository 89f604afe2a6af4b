"""Tables of image files and their labels: CSV with a header or without one, and JSON lines."""

import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from epsanet_jax.data.contents import LABEL_COLUMNS, Contents, Label, Part, checked_label, label_column
from epsanet_jax.data.splits import find_split, split_of
from epsanet_jax.data.walk import is_image_name
from epsanet_jax.errors import InputError, one_line, some

_PATH_COLUMNS = (
    'file_name',
    'filename',
    'file',
    'filepath',
    'file_path',
    'path',
    'image_path',
    'image',
    'img',
)
_Row = tuple[int, dict[str, Any]]  # number of the line from 1, values by column
_Kept = tuple[int, str, Label]  # number of the line, path, label


def list_table(path: str, column: str = '', with_labels: bool = True, split: str = '') -> Contents:
    """Lists the images that a table lists.

    Paths are relative to the folder of the table or, if the first image is not there, to a folder beside it:
    the one with the name of the table, 'images', or the only one.

    Args:
        path: a .csv or .jsonl file.
        column: column of the labels; '': a usual name, or the second one of two columns.
        with_labels: whether to read the labels.
        split: only rows whose path begins with a folder of this split, in any spelling; '': all rows.

    Raises:
        InputError: the table is damaged, lacks a column, or holds no row of the split; an image does not
            exist, or is listed twice.
    """
    rows = _rows(path)
    first = next(rows, None)
    if first is None:
        raise InputError(f'{path} has no row')
    file, label = _columns(path, [*first[1]], column, with_labels)
    kept = [
        _checked(path, line, row.get(file), row.get(label)) for line, row in itertools.chain([first], rows)
    ]
    kept = _of_split(split, kept, path) if split else kept
    names = [name for _, name, _ in kept]
    root = _find_root(path, names[0])
    contents = Contents([Part(root, names, table=path, lines=[line for line, _, _ in kept])], '')
    contents.about = f'images in {root!r} by the column {file!r}'
    if with_labels:
        contents.about += f', labels in {label!r}'
        contents.labels = [value for _, _, value in kept]
    _check_files(root, names, contents)
    return contents


def _checked(path: str, line: int, name: Any, label: Any) -> _Kept:
    if not isinstance(name, str) or not name:
        raise InputError(f'{path} line {line}: expected the path of an image, got {name!r}')
    return line, os.path.normpath(name), checked_label(label, f'{path} line {line}')


def _of_split(split: str, rows: list[_Kept], path: str) -> list[_Kept]:
    """Returns the rows whose paths begin with a split."""
    tops = [name.split(os.sep)[0] for _, name, _ in rows]
    found = find_split(split, {top for top in tops if split_of(top) or top == split}, path)
    if found is None:
        raise InputError(
            f'{path} has no path that begins with {split}/: give its folder as config.data.dir and a table '
            'for each split as config.data.train_split and config.data.eval_split'
        )
    return [row for row, top in zip(rows, tops, strict=True) if top == found]


def _find_root(path: str, first: str) -> str:
    """Returns the folder that paths are relative to; the one of the table if the first image is nowhere."""
    folder = os.path.dirname(os.path.abspath(path))
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    stem = os.path.splitext(os.path.basename(path))[0]
    beside = [name for name in (stem, 'images') if name in names] + (names if len(names) == 1 else [])
    roots = [folder, *(os.path.join(folder, name) for name in beside)]
    return next((root for root in roots if os.path.exists(os.path.join(root, first))), folder)


def _check_files(root: str, names: list[str], contents: Contents) -> None:
    seen: dict[str, int] = {}
    folders: dict[str, set[str]] = {}  # listing them is faster than looking for each file
    for i, name in enumerate(names):
        if (before := seen.setdefault(name, i)) != i:
            raise InputError(f'{contents.name_of(i)} is listed twice, first as {contents.name_of(before)}')
        folder, last = os.path.split(os.path.join(root, name))
        if folder not in folders:
            folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if last not in folders[folder]:
            raise InputError(f'{contents.name_of(i)} does not exist in {folder}: correct or remove the row')


def has_labels(path: str, column: str) -> bool:
    """Whether a table has a column of labels."""
    names = [*next(_rows(path), (1, {}))[1]]
    return column in names or any(name.strip().lower() in LABEL_COLUMNS for name in names)


def _columns(path: str, names: list[str], column: str, with_labels: bool) -> tuple[str, str]:
    """Returns the columns of the paths and of the labels."""
    lower = {name.strip().lower(): name for name in names}
    file = next((lower[name] for name in _PATH_COLUMNS if name in lower), None)
    if file is None:
        raise InputError(f'{path} has no column of paths ({some(_PATH_COLUMNS, 9)}); it has {some(names)}')
    others = [name for name in names if name != file]
    if not with_labels:
        return file, ''
    if not column and len(others) == 1:
        column = others[0]
    return file, label_column(others, column, path)


def _rows(path: str) -> Iterator[_Row]:
    try:
        with open(path, encoding='utf-8-sig', newline='') as f:
            yield from (_json_rows if path.lower().endswith('.jsonl') else _csv_rows)(f, path)
    except UnicodeDecodeError as e:
        raise InputError(f'{path} is not UTF-8 text: {one_line(e)}') from e
    except OSError as e:
        raise InputError(f'cannot read {path}: {e.strerror or one_line(e)}') from e


def _csv_rows(lines: Iterable[str], path: str) -> Iterator[_Row]:
    reader = csv.reader(lines, skipinitialspace=True, strict=True)
    names: list[str] = []
    try:
        for row in filter(None, reader):
            if not names:
                headless = len(row) == 2 and is_image_name(row[0])
                names = ['path', 'label'] if headless else row
                if len(set(names)) < len(names):
                    raise InputError(
                        f'{path} line {reader.line_num}: expected different names of columns, separated by '
                        f'commas, got {one_line(str(row), 80)}'
                    )
                if not headless:
                    continue
            if len(row) != len(names):
                found = f'{len(row)} values for {len(names)} columns'
                raise InputError(f'{path} line {reader.line_num}: {found}')
            yield reader.line_num, dict(zip(names, row, strict=True))
    except csv.Error as e:
        raise InputError(f'{path} line {reader.line_num} is not CSV: {one_line(e)}') from e


def _json_rows(lines: Iterable[str], path: str) -> Iterator[_Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise InputError(f'{path} line {number} is not JSON: {one_line(e)}') from e
        if not isinstance(row, dict):
            raise InputError(f'{path} line {number} is not a JSON object')
        yield number, row
