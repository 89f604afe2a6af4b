"""Tables of image files and their labels: CSV with a header or without one, and JSON lines."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from epsanet_jax.data.labelled import LABEL_COLUMNS, Label, Place, label_column
from epsanet_jax.data.splits import find_split, split_of
from epsanet_jax.data.walk import is_image_name, read_file
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


class TableImages:
    """The images that a table lists, in its order; see `labelled.Images`.

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

    def __init__(self, path: str, column: str = '', with_labels: bool = True, split: str = ''):
        self._path = path
        rows = _rows(path)
        first = next(rows, None)
        if first is None:
            raise InputError(f'{path} has no row')
        file, self._label = _columns(path, [*first[1]], column, with_labels)
        self._files: list[str] = []
        self._lines: list[int] = []
        labels: list[Label] = []
        for line, row in (first, *rows):
            if not isinstance(name := row.get(file), str) or not name:
                raise InputError(f'{path} line {line}: {file!r} must be the path of an image, got {name!r}')
            self._files.append(os.path.normpath(name))
            self._lines.append(line)
            if with_labels:
                labels.append(_checked(row.get(self._label), path, line))
        self.labels: Sequence[Label] = labels
        self.class_names: tuple[str, ...] = ()
        if split:
            self._keep(split)
        self._root = self._find_root()
        self._check_files()
        self.about = f'images in {self._root!r} by the column {file!r}'
        self.about += f', labels in {self._label!r}' if with_labels else ''

    def _keep(self, split: str) -> None:
        """Leaves out the rows of other splits."""
        tops = [name.split(os.sep)[0] for name in self._files]
        found = find_split(split, {top for top in tops if split_of(top) or top == split}, self._path)
        if found is None:
            raise InputError(
                f'{self._path} has no path that begins with {split}/: give its folder as config.data.dir '
                'and a table for each split as config.data.train_split and config.data.eval_split'
            )
        kept = [i for i, top in enumerate(tops) if top == found]
        self._files, self._lines = [self._files[i] for i in kept], [self._lines[i] for i in kept]
        self.labels = [self.labels[i] for i in kept] if self.labels else ()

    def _find_root(self) -> str:
        folder = os.path.dirname(os.path.abspath(self._path))
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        stem = os.path.splitext(os.path.basename(self._path))[0]
        beside = [name for name in dict.fromkeys((stem, 'images', *names)) if name in names]
        for name in ('', *(beside if len(names) == 1 else [n for n in beside if n in (stem, 'images')])):
            root = os.path.join(folder, name) if name else folder
            if os.path.exists(os.path.join(root, self._files[0])):
                return root
        return folder

    def _check_files(self) -> None:
        seen: dict[str, int] = {}
        folders: dict[str, set[str]] = {}  # listing them is faster than looking for each file
        for i, name in enumerate(self._files):
            if name in seen:
                raise InputError(
                    f'{self.name_of(i)} is listed twice, first in line {self._lines[seen[name]]}'
                )
            seen[name] = i
            folder, last = os.path.split(os.path.join(self._root, name))
            if folder not in folders:
                folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if last not in folders[folder]:
                raise InputError(f'{self.name_of(i)} does not exist in {folder}: correct or remove the row')

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        """Returns the bytes of the file, see `walk.read_file`."""
        return read_file(os.path.join(self._root, self._files[index]))

    def name_of(self, index: int) -> str:
        """Returns the table, the line and the path."""
        return f'{self._path} line {self._lines[index]}: {self._files[index]}'

    def place_of(self, index: int) -> Place:
        """Returns where the image is."""
        status = os.stat(os.path.join(self._root, self._files[index]))
        return Place(self._root, self._files[index], status.st_size, status.st_mtime_ns, -1)

    def identity(self) -> Iterable[str]:
        """Returns the paths."""
        return self._files


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


def _checked(label: Any, path: str, line: int) -> Label:
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise InputError(
            f'{path} line {line}: the label {label!r} is neither a class name nor a class number'
        )
    return label


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
