"""A source whose labels are beside the images: in a column, in a member of a tar, or in a table."""

import os
from collections.abc import Iterator

import numpy as np

from epsanet_jax.data import classes, parquet, tars
from epsanet_jax.data.contents import Contents, Label, Place
from epsanet_jax.data.sources import Record, fingerprint_of
from epsanet_jax.data.walk import read_file
from epsanet_jax.errors import InputError, some


def read_place(place: Place) -> bytes:
    """Returns the bytes of an image.

    Raises:
        BadImageError: a parquet file or a tar is damaged, or has no bytes for the image.
        OSError: the file cannot be read.
    """
    if place.offset < 0:
        return read_file(os.path.join(place.container, place.name))
    if place.container.lower().endswith('.parquet'):
        return parquet.read_row(place.container, place.offset)
    return tars.read_member(place.container, place.offset, place.size)


class Labelled:
    """Images and their labels as a source.

    Without declared names, the classes are the labels themselves, in the order of `classes.in_order`: numbers
    0 to N-1 stay as they are.

    Attributes:
        class_names: names of the classes.
        labels: label of each image, int32 [N].

    Raises:
        InputError: a label is missing, is neither a name nor a number, or is not declared; or some labels are
            names and others are numbers.
    """

    def __init__(self, contents: Contents):
        self._contents = contents
        declared = contents.class_names
        found = list(_declared(contents) if declared else _by_name(contents))
        self.class_names = declared or classes.in_order([*set(found)])
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.labels = np.fromiter((numbers[name] for name in found), np.int32, len(found))
        parts = [*contents.identity(), *self.class_names, str(self.labels.tolist())]
        self.fingerprint = fingerprint_of(parts)
        contents.labels = ()  # no longer needed

    def __len__(self) -> int:
        return len(self._contents)

    def __getitem__(self, index: int) -> Record:
        return {'image': read_place(self.place_of(index)), 'label': int(self.labels[index])}

    def name_of(self, index: int) -> str:
        """Returns the file and the row, the line or the member of the image."""
        return self._contents.name_of(index)

    def place_of(self, index: int) -> Place:
        """Returns where the image is."""
        return self._contents.place_of(index)


def _declared(contents: Contents) -> Iterator[str]:
    """Yields the class name of each image, whose label is the number or the name of a declared class."""
    names = contents.class_names
    known = set(names)
    if len(known) < len(names):
        raise InputError(f'{contents.name_of(0)}: two of the declared classes have one name: {some(names)}')
    for index, label in enumerate(contents.labels):
        if isinstance(label, int) and 0 <= label < len(names):
            yield names[label]
        elif label in known:
            yield str(label)
        else:
            problem = f'is not one of the {len(names)} declared classes ({some(names, 3)})'
            raise _wrong(contents, index, problem)


def _by_name(contents: Contents) -> Iterator[str]:
    """Yields the class name of each image, which is its label."""
    first: dict[bool, int] = {}  # the first image whose label is a number, and the first with a name
    known: dict[Label, str] = {}
    for index, label in enumerate(contents.labels):
        name = known.get(label)
        if name is None:
            name = known[label] = '' if label is None else classes.composed(str(label).strip())
            if not name or (name[0] == '-' and name[1:].isdecimal()):
                raise _wrong(contents, index, 'is neither a class name nor a class number')
            first.setdefault(name.isdecimal(), index)
            if len(first) == 2:
                found = [
                    f'{contents.name_of(i)} has the label {contents.labels[i]!r}' for i in first.values()
                ]
                raise InputError(f'{" and ".join(found)}: use class names or class numbers for all images')
        yield name


def _wrong(contents: Contents, index: int, problem: str) -> InputError:
    label = contents.labels[index]
    if label is None or label == '':
        return InputError(f'{contents.name_of(index)} has no label: add it, or remove the image')
    return InputError(f'{contents.name_of(index)}: the label {label!r} {problem}')
