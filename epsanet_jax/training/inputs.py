"""From the data configuration to sources and batches."""

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
from epsanet_jax.data.transforms import (
    CentreCrop,
    ColorJitter,
    RandomCrop,
    RandomErasing,
    TrainTransform,
)
from epsanet_jax.data.walk import skipped_line
from epsanet_jax.errors import InputError, some
from epsanet_jax.paths import is_remote
from epsanet_jax.training import sharding
from epsanet_jax.training.config import Config, DataConfig


def open_source(data: DataConfig, split: str) -> Source:
    """Opens a split; digits that are not there are prepared.

    Raises:
        InputError: it is not there, or not usable.
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
        raise InputError(f'{option}={path} is not on a disk: mount the bucket, name that folder')
    return pathlib.Path(os.path.expanduser(path))


def skipped_lines(*opened: Source) -> list[str]:
    """Returns a line for each image folder in which something was skipped."""
    folders = [source for source in opened if isinstance(source, sources.ImageFolder) and source.skipped]
    return [skipped_line(folder.root, folder.skipped) for folder in folders]


def open_splits(data: DataConfig) -> tuple[Source, Source]:
    """Opens the training and the evaluation split, which must have the same classes."""
    train, held_out = open_source(data, data.train_split), open_source(data, data.eval_split)
    if train.class_names != held_out.class_names:
        differing = sorted(set(train.class_names) ^ set(held_out.class_names))
        raise InputError(
            f'{data.train_split!r} and {data.eval_split!r} have different classes: {some(differing)} '
            f'(of {len(train.class_names)} and {len(held_out.class_names)}) are in only one of them'
        )
    return train, held_out


def train_batches(config: Config, source: Source, start_step: int) -> Iterator[pipeline.Batch]:
    """Returns this process's rows of the training batches from `start_step` on."""
    data = config.data
    return pipeline.train_batches(
        source,
        _train_transform(data),
        _rows(config.batch_size, config.gradient_accumulation_steps),
        config.seed,
        start_step,
        reading(data),
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
    """Returns the shapes of a global batch on the devices, as the steps are compiled for.

    Args:
        rows: of the whole batch.
        image_size: pixels.
        microbatches: into which it is cut.
        requests: what processes may ask for.
        mask: whether rows may not count, as in evaluation.
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
    """Returns what to evaluate on: the run's own evaluation split, or the data set given.

    Args:
        trained_on: the run's data configuration, whose preprocessing is kept.
        data: an image folder (its folder `split` or 'val' where it has one, else itself), a folder of
            records, or a TFDS name.
        split: None: the run's where the data set is the run's, else 'val' or 'test'.
        data_dir: TFDS's; None: the run's, or TFDS's default.
        on_bad: 'stop' or 'skip'.
    """
    change = functools.partial(
        dataclasses.replace, trained_on, on_bad=on_bad, max_bad_images=sys.maxsize, workers=0
    )
    if data is None and trained_on.source == 'folder' and not trained_on.dir:
        raise InputError('--data must name what to evaluate on: the weights are not of a run that knows')
    if data is None or (trained_on.source == 'tfds' and data == trained_on.name):
        data_dir = data_dir or trained_on.dir
        return change(eval_split=split or trained_on.eval_split, dir=data_dir)
    folder = _on_a_disk(data, '--data')
    if folder.is_dir():
        if data_dir:
            raise InputError(f'--data-dir is for TFDS data sets, {data} is a folder')
        if sources.is_prepared(folder):
            return change(source='records', dir=str(folder), eval_split=split or sources.held_out(folder))
        there = [s for s in (trained_on.eval_split, 'val', 'test') if (folder / s).is_dir()]
        return change(source='folder', dir=str(folder), eval_split=split or (there or ['.'])[0])
    if data.startswith(('/', './', '../', '~')):
        raise InputError(f'no such data directory: {data}')
    return change(source='tfds', name=data, dir=data_dir or '', eval_split=split or 'test')


def reading(data: DataConfig) -> pipeline.Reading:
    """Returns how pictures are to be read."""
    return pipeline.Reading(
        data.workers, data.threads, data.on_bad, data.exif_orientation, data.reduced_decoding
    )


def _rows(batch_size: int, microbatches: int = 1) -> pipeline.Rows:
    return pipeline.Rows(batch_size, jax.process_index(), jax.process_count(), microbatches)


class Feed:
    """Batches on the devices.

    Args:
        batches: this process's rows.
        mesh: the devices.
        requests: what this process asks the others for, asked at each batch; every row gets it.
        microbatches: into which each batch is cut.

    Attributes:
        asked: when the last batch was asked for, in seconds of `time.perf_counter`.
        got: when it was there.
        bad: indices of the pictures that could not be decoded, as they were met.
        pictures: number of pictures read.
        seconds: which reading them took, one after the other.
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
        self.pictures, self.seconds = 0, 0.0

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        self.asked = time.perf_counter()
        batch = next(self._batches)
        self.got = time.perf_counter()
        seconds, bad = batch.pop('seconds'), batch.pop('bad_index')
        self.pictures += len(seconds)
        self.seconds += float(seconds.sum())
        self.bad += bad[bad != pipeline.NOT_BAD].tolist()
        if self._requests is not None:
            row = np.asarray(self._requests(), np.float32)
            batch['requests'] = np.broadcast_to(row, (len(bad), len(row)))
        return sharding.to_devices(batch, self._mesh, self._microbatches)

    def close(self) -> None:
        """Ends the threads and processes that decode."""
        close = getattr(self._batches, 'close', None)
        if close:
            close()


def with_labels_of(source: Source, model_classes: Sequence[str], num_classes: int) -> Source:
    """Returns the source with a model's labels, matched by class name where the model's are known.

    Raises:
        InputError: the source has classes that the model does not have.
    """
    if model_classes:
        return Relabelled(source, tuple(model_classes))
    if len(source.class_names) != num_classes:
        raise InputError(
            f'the data has {len(source.class_names)} classes, the model {num_classes} without names'
        )
    return source


class Relabelled:
    """A source whose labels are those of a model: classes are matched by name.

    Raises:
        InputError: the source has a class that the model does not have.
    """

    def __init__(self, source: Source, model_classes: tuple[str, ...]):
        missing = [name for name in source.class_names if name not in model_classes]
        if missing:
            raise InputError(
                f'the data has classes that the model does not know: {some(missing)}; '
                f"the model's {len(model_classes)}: {some(list(model_classes))}"
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
        """Returns what to call record `index` in a message."""
        return self._source.name_of(index)
