"""Sources and batches of a data configuration."""

import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from epsanet_jax.data import pipeline, sources
from epsanet_jax.data.randaugment import RandAugment
from epsanet_jax.data.sources import Record, Source
from epsanet_jax.data.transforms import CentreCrop, ColorJitter, RandomCrop, RandomErasing, TrainTransform
from epsanet_jax.data.walk import skipped_line
from epsanet_jax.errors import InputError, some
from epsanet_jax.paths import is_remote
from epsanet_jax.training import sharding
from epsanet_jax.training.config import Config, DataConfig


def open_source(data: DataConfig, split: str) -> Source:
    """Opens a split of a dataset; the digits are prepared first if needed.

    Raises:
        InputError: the split does not exist or is not usable.
    """
    if data.source == 'synthetic':
        seed = 0 if split == data.train_split else 1
        return sources.Synthetic(data.synthetic_examples, data.synthetic_classes, data.image_size, seed)
    if data.source == 'tfds':
        if data.name.split(':')[0] == 'digits':
            from epsanet_jax.data import digits

            digits.prepare(data.dir or None)
        return sources.Tfds(data.name, split, data.dir or None)
    folder = _on_a_disk(data.dir, '--config.data.dir')
    if data.source == 'records':
        return sources.Records(folder, split)
    if sources.is_prepared(folder):
        raise InputError(f'{folder} holds prepared records: set --config.data.source=records')
    return sources.ImageFolder(folder / split)


def _on_a_disk(path: str, option: str) -> pathlib.Path:
    if is_remote(path):
        raise InputError(f'{option}={path} is not on a disk: mount the bucket and give the mounted folder')
    return pathlib.Path(os.path.expanduser(path))


def skipped_lines(*opened: Source) -> list[str]:
    """Returns a line for each image folder in which something was skipped."""
    folders = [source for source in opened if isinstance(source, sources.ImageFolder) and source.skipped]
    return [skipped_line(folder.root, folder.skipped) for folder in folders]


def open_splits(data: DataConfig) -> tuple[Source, Source]:
    """Opens the training and the evaluation split, which must have the same classes."""
    opened = open_source(data, data.train_split), open_source(data, data.eval_split)
    train, evaluation = (source.class_names for source in opened)
    if train != evaluation:
        raise InputError(
            f'{data.train_split!r} and {data.eval_split!r} have different classes ({len(train)} and '
            f'{len(evaluation)}); only in one of them: {some(sorted(set(train) ^ set(evaluation)))}'
        )
    return opened


def train_batches(config: Config, source: Source, start_step: int) -> Iterator[pipeline.Batch]:
    """Returns this process's rows of the training batches from `start_step` on."""
    data = config.data
    rows = _rows(config.batch_size, config.gradient_accumulation_steps)
    return pipeline.train_batches(
        source, _train_transform(data), rows, config.seed, start_step, reading(data)
    )


def _train_transform(data: DataConfig) -> TrainTransform:
    red, green, blue = (round(255 * m) for m in data.mean)
    return TrainTransform(
        RandomCrop(data.image_size, data.crop_scale, data.crop_ratio, data.flip),
        ColorJitter(*data.color_jitter) if any(data.color_jitter) else None,
        RandAugment(data.randaugment_ops, data.randaugment_magnitude) if data.randaugment_ops else None,
        RandomErasing(data.random_erasing, fill=(red, green, blue)) if data.random_erasing else None,
    )


def eval_batches(data: DataConfig, source: Source, batch_size: int) -> Iterator[pipeline.Batch]:
    """Returns this process's rows of the evaluation batches."""
    crop = CentreCrop(data.size_in_use, data.resize_size)
    return pipeline.eval_batches(source, crop, _rows(batch_size), reading(data))


def abstract_batch(
    rows: int, image_size: int, microbatches: int = 1, requests: int = 0, mask: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the global batch that a step is compiled for.

    `requests` is the number of different requests that a process can make; evaluation needs a `mask`.
    """
    shape = (rows,) if microbatches == 1 else (microbatches, rows // microbatches)
    batch = {
        'image': jax.ShapeDtypeStruct((*shape, image_size, image_size, 3), np.uint8),
        'label': jax.ShapeDtypeStruct(shape, np.int32),
    }
    if requests:
        batch['requests'] = jax.ShapeDtypeStruct((*shape, requests), np.float32)
    if mask:
        batch['mask'] = jax.ShapeDtypeStruct(shape, np.bool_)
    return batch


def evaluation_data(
    trained_on: DataConfig, data: str | None, split: str | None, data_dir: str | None, on_bad: str
) -> DataConfig:
    """Returns the data to evaluate on: the evaluation split of the run, or another dataset.

    Args:
        trained_on: data configuration of the run, whose preprocessing is kept.
        data: an image folder (with a subfolder `split`, 'val' or 'test', else the folder itself), a folder of
            records, or a TFDS name; None: the dataset of the run.
        split: None: that of the run if the dataset is the run's, else 'val' or 'test'.
        data_dir: folder of TFDS datasets; None: that of the run, or TFDS's default.
        on_bad: 'stop' or 'skip' at an image that cannot be decoded.

    Raises:
        InputError: the dataset does not exist, or there is none.
    """
    change = functools.partial(
        dataclasses.replace, trained_on, on_bad=on_bad, max_bad_images=sys.maxsize, workers=0
    )
    if data is None and trained_on.source == 'folder' and not trained_on.dir:
        raise InputError('--data is missing: the weights do not name a dataset to evaluate on')
    if data is None or (trained_on.source == 'tfds' and data == trained_on.name):
        return change(eval_split=split or trained_on.eval_split, dir=data_dir or trained_on.dir)
    folder = _on_a_disk(data, '--data')
    if folder.is_dir():
        if data_dir:
            raise InputError(f'--data-dir is for TFDS datasets, but {data} is a folder')
        if sources.is_prepared(folder):
            return change(source='records', dir=str(folder), eval_split=split or sources.held_out(folder))
        there = [s for s in (trained_on.eval_split, 'val', 'test') if (folder / s).is_dir()]
        return change(source='folder', dir=str(folder), eval_split=split or (there or ['.'])[0])
    if data.startswith(('/', './', '../', '~')):
        raise InputError(f'no such data directory: {data}')
    return change(source='tfds', name=data, dir=data_dir or '', eval_split=split or 'test')


def reading(data: DataConfig) -> pipeline.Reading:
    """Returns how to read images."""
    return pipeline.Reading(
        data.workers, data.threads, data.on_bad, data.exif_orientation, data.reduced_decoding
    )


def _rows(batch_size: int, microbatches: int = 1) -> pipeline.Rows:
    return pipeline.Rows(batch_size, jax.process_index(), jax.process_count(), microbatches)


class Feed:
    """Iterator over batches on the devices.

    Args:
        batches: this process's rows.
        mesh: the devices.
        requests: called at each batch; returns this process's requests, which every row carries.
        microbatches: number of microbatches per batch.

    Attributes:
        asked: time at which the last batch was requested, in seconds of `time.perf_counter`.
        got: time at which that batch arrived.
        bad: indices of the images that could not be decoded, in the order of reading.
        images: number of images read.
        seconds: sum of the times that reading each image took.
    """

    def __init__(
        self,
        batches: Iterator[pipeline.Batch],
        mesh: Mesh,
        requests: Callable[[], Sequence[bool]] | None = None,
        microbatches: int = 1,
    ):
        self._batches, self._mesh = batches, mesh
        self._requests, self._microbatches = requests, microbatches
        self.asked = self.got = 0.0
        self.bad: list[int] = []
        self.images, self.seconds = 0, 0.0

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        self.asked = time.perf_counter()
        batch = next(self._batches)
        self.got = time.perf_counter()
        seconds, bad = batch.pop('seconds'), batch.pop('bad_index')
        self.images += len(seconds)
        self.seconds += float(seconds.sum())
        self.bad += bad[bad != pipeline.NOT_BAD].tolist()
        if self._requests is not None:
            row = np.asarray(self._requests(), np.float32)
            batch['requests'] = np.broadcast_to(row, (len(bad), len(row)))
        return sharding.to_devices(batch, self._mesh, self._microbatches)

    def close(self) -> None:
        """Ends the threads and processes that decode."""
        getattr(self._batches, 'close', lambda: None)()  # plain iterators have nothing to close


def with_labels_of(source: Source, model_classes: Sequence[str], num_classes: int) -> Source:
    """Returns a source with the labels of a model, matched by class name if the model has class names.

    Raises:
        InputError: the source has classes that the model does not have.
    """
    if model_classes:
        return Relabelled(source, tuple(model_classes))
    classes = len(source.class_names)
    if classes != num_classes:
        raise InputError(f'the data has {classes} classes, the model has {num_classes} without names')
    return source


class Relabelled:
    """A source with the labels of a model, matched by class name, see `with_labels_of`."""

    def __init__(self, source: Source, model_classes: tuple[str, ...]):
        missing = [name for name in source.class_names if name not in model_classes]
        if missing:
            raise InputError(
                f'the data has classes that the model does not know: {some(missing)}; the '
                f'{len(model_classes)} classes of the model: {some(model_classes)}'
            )
        self._source = source
        self._labels = [model_classes.index(name) for name in source.class_names]
        self.class_names, self.fingerprint = model_classes, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        return {'image': record['image'], 'label': self._labels[record['label']]}

    def name_of(self, index: int) -> str:
        """Returns the name of record `index` for messages."""
        return self._source.name_of(index)
