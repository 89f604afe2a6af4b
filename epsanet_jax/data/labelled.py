"""A source whose labels are beside the images: in a column, in a member of a tar, or in a table."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from epsanet_jax.data import classes
from epsanet_jax.data.sources import Record, fingerprint_of
from epsanet_jax.errors import InputError, some

LABEL_COLUMNS = ('label', 'labels', 'class', 'class_name', 'category', 'target', 'cls')
Label = str | int | None  # a class name, a class number, or no label


class Place(NamedTuple):
    """Where an image is, for `epsanet prepare`."""

    container: str  # path of the file that holds the image, or of the folder that `name` is relative to
    name: str
    size: int  # bytes; an estimate for parquet
    mtime: int  # time of the last change in nanoseconds
    offset: int  # position in a tar; row of a parquet file; -1 for a file


class Images(Protocol):
    """Images with random access and a label each.

    Attributes:
        labels: label of each image as the files have it; empty if the images were opened without labels.
        class_names: names of the classes in the order of their numbers; () if the files do not declare them.
        about: says what was taken from the files as image and as label.
    """

    labels: Sequence[Label]
    class_names: tuple[str, ...]
    about: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """Returns the bytes of image `index`; raises BadImageError or OSError if they cannot be read."""
        ...

    def name_of(self, index: int) -> str:
        """Returns the file and the row or member of image `index`, for messages."""
        ...

    def place_of(self, index: int) -> Place:
        """Returns where image `index` is."""
        ...

    def identity(self) -> Iterable[str]:
        """Returns what identifies the images and their order; not the folder that they are in."""
        ...


class Labelled:
    """Images and their labels as a source.

    Without declared names, the classes are the labels themselves, in the order of `classes.in_order`: numbers
    0 to N-1 stay as they are.

    Attributes:
        class_names: names of the classes.
        labels: label of each image, int32 [N].

    Raises:
        InputError: a label is missing, is neither a name nor a number, or is not declared;
            or some labels are names and others are numbers.
    """

    def __init__(self, images: Images):
        self._images = images
        declared = images.class_names
        found = list(_declared(images) if declared else _by_name(images))
        self.class_names = declared or classes.in_order([*set(found)])
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.labels = np.fromiter((numbers[name] for name in found), np.int32, len(found))
        self.fingerprint = fingerprint_of([*images.identity(), *self.class_names, str(self.labels.tolist())])
        images.labels = ()  # no longer needed

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return {'image': self._images.read(index), 'label': int(self.labels[index])}

    def name_of(self, index: int) -> str:
        """Returns the file and the row or member of the image."""
        return self._images.name_of(index)

    def place_of(self, index: int) -> Place:
        """Returns where the image is."""
        return self._images.place_of(index)


def _declared(images: Images) -> Iterator[str]:
    """Yields the class name of each image, whose label is the number or the name of a declared class."""
    names = images.class_names
    known = set(names)
    if len(known) < len(names):
        raise InputError(f'{images.name_of(0)}: two of the declared classes have one name: {some(names)}')
    for index, label in enumerate(images.labels):
        if isinstance(label, int) and 0 <= label < len(names):
            yield names[label]
        elif label in known:
            yield str(label)
        else:
            problem = f'is not one of the {len(names)} declared classes ({some(names, 3)})'
            raise _wrong(images, index, problem)


def _by_name(images: Images) -> Iterator[str]:
    """Yields the class name of each image, which is its label."""
    first: dict[bool, int] = {}  # the first image whose label is a number, and the first with a name
    known: dict[Label, str] = {}
    for index, label in enumerate(images.labels):
        name = known.get(label)
        if name is None:
            name = known[label] = '' if label is None else classes.composed(str(label).strip())
            if not name or (name[0] == '-' and name[1:].isdecimal()):
                raise _wrong(images, index, 'is neither a class name nor a class number')
            first.setdefault(name.isdecimal(), index)
            if len(first) == 2:
                found = [f'{images.name_of(i)} has the label {images.labels[i]!r}' for i in first.values()]
                raise InputError(f'{" and ".join(found)}: use class names or class numbers for all images')
        yield name


def _wrong(images: Images, index: int, problem: str) -> InputError:
    label = images.labels[index]
    if label is None or label == '':
        return InputError(f'{images.name_of(index)} has no label: add it, or remove the image')
    return InputError(f'{images.name_of(index)}: the label {label!r} {problem}')


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
