"""What parquet files, WebDataset shards and tables of labels hold: places of images, and a label for each."""

import bisect
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from epsanet_jax.errors import InputError, some

LABEL_COLUMNS = ('label', 'labels', 'class', 'class_name', 'category', 'target', 'cls')
Label = str | int | None  # a class name, a class number, or no label


class Place(NamedTuple):
    """Where an image is."""

    container: str  # path of the file that holds the image, or of the folder that `name` is relative to
    name: str
    offset: int  # position in a tar, or row of a parquet file; -1 for a file
    size: int  # bytes; an estimate for parquet, 0 for a file


class Part(NamedTuple):
    """The images in one container, in order."""

    container: str
    names: Sequence[str]  # of members or files; () for parquet
    offsets: Sequence[int] = ()  # () for files
    sizes: Sequence[int] = ()  # () for files
    table: str = ''  # path of the table that lists the files
    lines: Sequence[int] = ()  # the line of each file in it

    def count(self) -> int:
        """Returns the number of images."""
        return len(self.offsets or self.names)


class Contents:
    """The images of parts, in order.

    Args:
        parts: the parts, at least one.
        about: says what is taken as image and as label, for the user.

    Attributes:
        labels: label of each image as the files have it; empty if no labels are needed.
        class_names: names of the classes in the order of their numbers; () if the files do not declare them.
        about: as given.
    """

    def __init__(self, parts: Sequence[Part], about: str):
        self._parts, self.about = list(parts), about
        self._ends = list(itertools.accumulate(part.count() for part in parts))
        self.labels: Sequence[Label] = ()
        self.class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, index: int) -> tuple[Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect.bisect_right(self._ends, index)
        return self._parts[which], index - (self._ends[which - 1] if which else 0)

    def place_of(self, index: int) -> Place:
        """Returns where image `index` is."""
        part, i = self._find(index)
        name = part.names[i] if part.names else f'row {part.offsets[i]}'
        if not part.offsets:
            return Place(part.container, name, -1, 0)
        return Place(part.container, name, part.offsets[i], part.sizes[i])

    def name_of(self, index: int) -> str:
        """Returns the file and the row, the line or the member of image `index`, for messages."""
        part, i = self._find(index)
        if part.table:
            return f'{part.table} line {part.lines[i]}: {part.names[i]}'
        return f'{part.container}: {self.place_of(index).name}'

    def identity(self) -> Iterator[str]:
        """Yields what identifies the images and their order; not the folder that they are in."""
        for part in self._parts:
            yield from part.names or [os.path.basename(part.container)]
            yield str([*part.sizes])


def checked_label(value: object, where: str) -> Label:
    """Returns a value of JSON or CSV that can be a label, None for a missing one.

    Raises:
        InputError: it is neither a class name nor a class number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise InputError(f'{where}: the label {value!r} is neither a class name nor a class number')
    return value


def label_column(names: Sequence[str], wanted: str, where: str) -> str:
    """Returns the column, or the key of a JSON object, that holds the label.

    Raises:
        InputError: the wanted one does not exist; or none is wanted, and none or several may be the label.
    """
    if wanted:
        if wanted not in names:
            raise InputError(f'{where} has no column {wanted!r} of labels; it has {some(names)}')
        return wanted
    usual = [name for name in names if name.strip().lower() in LABEL_COLUMNS]
    if 'label' in usual or len(usual) == 1:
        return 'label' if 'label' in usual else usual[0]
    found = f'the columns {some(usual)} may be' if usual else f'{some(names)} has no usual name of'
    raise InputError(f'{where}: {found} the label: set the column (config.data.label_column, --label-column)')
