"""Where pictures come from: each source is a sequence of records with a name and a fingerprint."""

import hashlib
import os
from collections.abc import Iterable
from typing import Any, Protocol, TypedDict

import numpy as np

from epsanet_jax.data import tfrecord
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.data.walk import IMAGE_EXTENSIONS, is_there, read_file, walk
from epsanet_jax.errors import InputError, one_line

_INFO_FILE = 'dataset_info.json'


class Record(TypedDict):
    """A picture, as an encoded file or an uint8 array [H, W, 3], and its class."""

    image: bytes | np.ndarray
    label: int


class Source(Protocol):
    """A data set with random access.

    Attributes:
        class_names: in the order of the labels.
        fingerprint: the same for the same pictures in the same order, wherever they lie.
    """

    class_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def name_of(self, index: int) -> str:
        """Returns what to call record `index` in a message: a path where there is one."""
        ...


class ImageFolder:
    """A folder with one folder of images per class, in the layout and order of torchvision.

    Classes are numbered in the order of their sorted names. The images of a class are all image files below
    its folder, in the order of `walk.walk`. The fingerprint depends on the relative paths alone.

    Args:
        root: path of the folder, on a local disk.

    Attributes:
        skipped: 'PATH: reason' for each entry that is no image to read, see `walk.walk`.

    Raises:
        InputError: the folder does not exist, holds no class folder or an empty one, or holds a folder that
            cannot be read.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self._root = os.fspath(root)
        if not is_there(self._root) or not os.path.isdir(self._root):
            raise InputError(f'no such data directory: {self._root}')
        skipped: list[str] = []
        folders = walk(self._root, on_skipped=skipped.append)
        self.class_names = next(folders).folders
        if not self.class_names:
            raise InputError(f'no class folders in {self._root}: expected one folder of images per class')
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._files: list[str] = []
        self._labels: list[int] = []
        for folder in folders:
            self._files += [os.path.join(folder.path, entry.name) for entry in folder.images]
            self._labels += [labels[folder.path.split(os.sep)[0]]] * len(folder.images)
        for label in sorted({*labels.values()} - {*self._labels}):
            raise InputError(
                f'empty class folder: {os.path.join(self._root, self.class_names[label])} holds no image '
                f'({" ".join(IMAGE_EXTENSIONS)})'
            )
        self.skipped = tuple(skipped)
        self.fingerprint = _fingerprint(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        return {'image': read_file(self.name_of(index)), 'label': self._labels[index]}

    def name_of(self, index: int) -> str:
        """Returns the path of the image."""
        return os.path.join(self._root, self._files[index])


class Tfds:
    """A split of a TFDS data set that lies prepared, as ArrayRecord or as TFRecord, on a file system.

    The data set must have one image and one class label; where TFDS names no supervised pair they must be
    called 'image' and 'label'.

    Args:
        name: as TFDS knows it, 'digits' or 'imagenet2012:5.1.0'.
        split: 'train', 'test', 'train[:90%]' ...
        data_dir: where data sets lie; None: TFDS's own default.

    Raises:
        InputError: there is no such data set or split, or it is not prepared in a form that can be read.
    """

    def __init__(self, name: str, split: str, data_dir: str | None = None):
        self._open(_find_builder(name, data_dir), name, split)

    def _open(self, builder: Any, name: str, split: str) -> None:
        import tensorflow_datasets as tfds

        self._name = f'{name}[{split}]'
        features = builder.info.features
        pair = builder.info.supervised_keys or ('image', 'label')
        kinds = (tfds.features.Image, tfds.features.ClassLabel)
        if len(pair) != 2 or not all(
            key in features and type(features[key]) is kind for key, kind in zip(pair, kinds, strict=True)
        ):
            raise InputError(f'TFDS data set {name!r} has no pair of image and class label: {list(features)}')
        self._image, self._label = pair
        try:
            decoders = {self._image: tfds.decode.SkipDecoding()}
            if builder.info.available_file_formats() == {tfds.core.FileFormat.TFRECORD}:
                self._records: Any = tfrecord.Examples(builder, split, decoders)
            else:
                self._records = builder.as_data_source(split=split, decoders=decoders)
            examples = len(self._records)
        except Exception as e:  # TFDS raises many things, for splits and for file formats
            raise InputError(f'TFDS data set {self._name}: {_line(e)}') from e
        if not examples:
            raise InputError(f'TFDS data set {self._name} is empty')
        self.class_names = tuple(features[self._label].names)
        self.fingerprint = _fingerprint([builder.info.full_name, split, str(examples)])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._record(index)
        return {'image': record[self._image], 'label': int(record[self._label])}

    def _record(self, index: int) -> dict[str, Any]:
        try:
            return self._records[index]
        except (IndexError, OSError):
            raise
        except Exception as e:  # what damage makes of it: a checksum, or something that cannot be parsed
            raise BadImageError(f'the record is damaged: {_line(e)}') from e

    def name_of(self, index: int) -> str:
        """Returns what to call record `index` in a message."""
        try:
            name = self._record(index).get('file_name', b'')
        except (BadImageError, OSError):
            name = b''
        name = name.decode(errors='replace') if isinstance(name, bytes) else str(name)
        return f'{self._name} record {index}{f" ({name})" if name else ""}'


class Records(Tfds):
    """A split of a folder that `epsanet prepare` wrote, or of any other that holds one TFDS data set.

    Args:
        folder: the one with dataset_info.json.
        split: 'train', 'val', 'train[:90%]' ...

    Raises:
        InputError: it is no such folder, or there is no such split.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str):
        folder = os.fspath(folder)
        if not is_prepared(folder):
            raise InputError(
                f'no prepared data set in {folder}: it holds no {_INFO_FILE}; `epsanet prepare` makes one'
            )
        self._open(_builder_in(folder), folder, split)


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a TFDS data set, as `epsanet prepare` writes it."""
    return os.path.isfile(os.path.join(folder, _INFO_FILE))


def held_out(folder: str | os.PathLike[str]) -> str:
    """Returns the split of prepared records to evaluate on: 'val', 'validation', 'test' or the last one."""
    splits = list(_builder_in(os.fspath(folder)).info.splits)
    if not splits:
        raise InputError(f'the data set in {folder} has no splits')
    return next((s for s in ('val', 'validation', 'test') if s in splits), splits[-1])


def _builder_in(folder: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except Exception as e:  # a damaged description is met in many ways
        raise InputError(f'cannot open the data set in {folder}: {_line(e)}') from e


def _find_builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as e:
        place = data_dir or "TFDS's default folder"
        folder = '' if os.path.exists(name) else f', and there is no folder {name!r}'
        raise InputError(f'no TFDS data set {name!r} is known or found in {place}{folder}') from e
    except Exception as e:  # for a name or version that it cannot parse TFDS raises many things
        raise InputError(f'TFDS cannot open the data set {name!r}: {_line(e)}') from e
    if not os.path.exists(builder.data_path):
        raise InputError(
            f'TFDS data set {name!r} is not prepared in {builder.data_path}: run '
            f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        )
    return builder


class Synthetic:
    """Noise around a pattern of its own for each class: learnable, made on the fly, the same every time.

    Args:
        examples: number of pictures.
        classes: number of classes.
        size: height and width, pixels.
        seed: another seed gives other pictures of the same classes.
    """

    def __init__(self, examples: int, classes: int, size: int, seed: int = 0):
        self.class_names = tuple(f'class{i}' for i in range(classes))
        self.fingerprint = _fingerprint(['synthetic', str(examples), str(classes), str(size), str(seed)])
        self._examples, self._size, self._seed = examples, size, seed
        coarse = np.random.default_rng(0).integers(64, 192, (classes, 4, 4, 3))
        repeats = -(-size // 4)
        self._patterns = coarse.repeat(repeats, axis=1).repeat(repeats, axis=2)[:, :size, :size]

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._examples:
            raise IndexError(index)
        label = index % len(self.class_names)
        noise = np.random.default_rng((self._seed, index)).integers(-64, 64, (self._size, self._size, 3))
        return {'image': (self._patterns[label] + noise).astype(np.uint8), 'label': label}

    def name_of(self, index: int) -> str:
        """Returns what to call record `index` in a message."""
        return f'synthetic picture {index}'


def _line(error: Exception) -> str:
    return f'{type(error).__name__}: {one_line(error)}'


def _fingerprint(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode('utf-8', 'surrogateescape') + b'\0')
    return digest.hexdigest()[:16]
