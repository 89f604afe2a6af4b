"""Sources of images: sequences of records with a fingerprint."""

import hashlib
import os
from collections.abc import Iterable
from typing import Any, Protocol, TypedDict

import numpy as np

from epsanet_jax.data import tfrecord
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.errors import InputError, one_line

_INFO_FILE = 'dataset_info.json'


class Record(TypedDict):
    """An image, as an encoded file or a uint8 array [H, W, C], and its class."""

    image: bytes | np.ndarray
    label: int


class Source(Protocol):
    """A dataset with random access.

    Attributes:
        class_names: names of the classes, in the order of the labels.
        fingerprint: digest of the images and their order; does not depend on the folder of the dataset.
    """

    class_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def name_of(self, index: int) -> str:
        """Returns the name of record `index` for messages: its path if it is a file."""
        ...


class Tfds:
    """A split of a prepared TFDS dataset, in ArrayRecord or TFRecord files.

    The dataset must have one image and one class label. Without supervised keys in TFDS, their names must be
    'image' and 'label'.

    Args:
        name: name in TFDS, for example 'digits' or 'imagenet2012:5.1.0'.
        split: 'train', 'test', 'train[:90%]' ...
        data_dir: folder of the datasets; None: the default of TFDS.

    Raises:
        InputError: the dataset or the split does not exist, or is not prepared in a format that can be read.
    """

    def __init__(self, name: str, split: str, data_dir: str | None = None):
        self._open(_find_builder(name, data_dir), name, split)

    def _open(self, builder: Any, name: str, split: str) -> None:
        import tensorflow_datasets as tfds

        self._name = f'{name}[{split}]'
        features = builder.info.features
        pair = builder.info.supervised_keys or ('image', 'label')
        kinds = [type(features[key]) for key in pair if key in features]
        if kinds != [tfds.features.Image, tfds.features.ClassLabel]:
            raise InputError(f'TFDS dataset {name!r} has no pair of image and class label: {list(features)}')
        self._image, self._label = pair
        try:
            decoders = {self._image: tfds.decode.SkipDecoding()}
            if builder.info.available_file_formats() == {tfds.core.FileFormat.TFRECORD}:
                self._records: Any = tfrecord.Examples(builder, split, decoders)
            else:
                self._records = builder.as_data_source(split=split, decoders=decoders)
            examples = len(self._records)
        except Exception as e:  # TFDS raises many types, for splits and for file formats
            raise InputError(f'TFDS dataset {self._name}: {_line(e)}') from e
        if not examples:
            raise InputError(f'TFDS dataset {self._name} is empty')
        self.class_names = tuple(features[self._label].names)
        self.fingerprint = fingerprint_of([builder.info.full_name, split, str(examples)])

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
        except Exception as e:  # a wrong checksum, or data that cannot be parsed
            raise BadImageError(f'the record is damaged: {_line(e)}') from e

    def name_of(self, index: int) -> str:
        """Returns the name of record `index` for messages."""
        try:
            name = self._record(index).get('file_name', b'')
        except (BadImageError, OSError):
            name = b''
        name = name.decode(errors='replace') if isinstance(name, bytes) else str(name)
        return f'{self._name} record {index}{f" ({name})" if name else ""}'


class Records(Tfds):
    """A split of a dataset that `epsanet prepare` wrote, or of another folder with one TFDS dataset.

    Args:
        folder: path of the folder that holds dataset_info.json.
        split: 'train', 'val', 'train[:90%]' ...

    Raises:
        InputError: the folder holds no dataset, or the split does not exist.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str):
        folder = os.fspath(folder)
        if not is_prepared(folder):
            raise InputError(
                f'no prepared dataset in {folder}: {_INFO_FILE} is missing; `epsanet prepare` creates one'
            )
        self._open(_builder_in(folder), folder, split)


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a TFDS dataset, as `epsanet prepare` writes it."""
    return os.path.isfile(os.path.join(folder, _INFO_FILE))


def evaluation_split(folder: str | os.PathLike[str]) -> str:
    """Returns the split of a dataset for evaluation: 'val', 'validation', 'test' or the last one."""
    splits = list(_builder_in(os.fspath(folder)).info.splits)
    if not splits:
        raise InputError(f'the dataset in {folder} has no splits')
    return next((s for s in ('val', 'validation', 'test') if s in splits), splits[-1])


def _builder_in(folder: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except Exception as e:  # TFDS raises many types for a damaged description
        raise InputError(f'cannot open the dataset in {folder}: {_line(e)}') from e


def _find_builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as e:
        place = data_dir or "TFDS's default folder"
        folder = '' if os.path.exists(name) else f', and there is no folder {name!r}'
        raise InputError(f'no TFDS dataset {name!r} is known or found in {place}{folder}') from e
    except Exception as e:  # TFDS raises many types for a name or version that it cannot parse
        raise InputError(f'TFDS cannot open the dataset {name!r}: {_line(e)}') from e
    if not os.path.exists(builder.data_path):
        raise InputError(
            f'TFDS dataset {name!r} is not prepared in {builder.data_path}: run '
            f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        )
    return builder


class Synthetic:
    """Reproducible images that are generated when read: noise added to one pattern per class.

    Args:
        examples: number of images.
        classes: number of classes.
        size: height and width in pixels.
        seed: another seed gives other images of the same classes.
        channels: number of channels.
    """

    def __init__(self, examples: int, classes: int, size: int, seed: int = 0, channels: int = 3):
        self.class_names = tuple(f'class{i}' for i in range(classes))
        parts = [examples, classes, size, seed, *([] if channels == 3 else [channels])]
        self.fingerprint = fingerprint_of(['synthetic', *map(str, parts)])
        self._examples, self._size, self._seed = examples, size, seed
        coarse = np.random.default_rng(0).integers(64, 192, (classes, 4, 4, channels))
        repeats = -(-size // 4)
        self._patterns = coarse.repeat(repeats, axis=1).repeat(repeats, axis=2)[:, :size, :size]

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._examples:
            raise IndexError(index)
        label = index % len(self.class_names)
        noise = np.random.default_rng((self._seed, index)).integers(-64, 64, self._patterns.shape[1:])
        return {'image': (self._patterns[label] + noise).astype(np.uint8), 'label': label}

    def name_of(self, index: int) -> str:
        """Returns the name of record `index` for messages."""
        return f'synthetic image {index}'


def _line(error: Exception) -> str:
    return f'{type(error).__name__}: {one_line(error)}'


def fingerprint_of(parts: Iterable[str]) -> str:
    """Returns a digest of texts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode('utf-8', 'surrogateescape') + b'\0')
    return digest.hexdigest()[:16]
