"""From the data configuration to sources and batches."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from epsanet_jax.data import pipeline, sources
from epsanet_jax.data.sources import Record, Source
from epsanet_jax.data.transforms import CentreCrop, RandomCrop
from epsanet_jax.errors import InputError
from epsanet_jax.training import parallel
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
    return sources.ImageFolder(pathlib.Path(data.dir).expanduser() / split)


def open_splits(data: DataConfig) -> tuple[Source, Source]:
    """Opens the training and the evaluation split, which must have the same classes."""
    train, held_out = open_source(data, data.train_split), open_source(data, data.eval_split)
    if train.class_names != held_out.class_names:
        differing = sorted(set(train.class_names) ^ set(held_out.class_names))
        raise InputError(
            f'{data.train_split!r} and {data.eval_split!r} have different classes: {_some(differing)} '
            f'(of {len(train.class_names)} and {len(held_out.class_names)}) are in only one of them'
        )
    return train, held_out


def train_batches(config: Config, source: Source, start_step: int) -> Iterator[pipeline.Batch]:
    """Returns this process's rows of the training batches from `start_step` on."""
    data = config.data
    crop = RandomCrop(data.image_size, data.crop_scale, data.crop_ratio, data.flip)
    return pipeline.train_batches(
        source, crop, _rows(config.batch_size), config.seed, start_step, reading(data)
    )


def eval_batches(data: DataConfig, source: Source, batch_size: int) -> Iterator[pipeline.Batch]:
    """Returns this process's rows of the evaluation batches."""
    crop = CentreCrop(data.image_size, data.resize_size)
    return pipeline.eval_batches(source, crop, _rows(batch_size), reading(data))


def evaluation_data(
    trained_on: DataConfig, data: str | None, split: str | None, data_dir: str | None, on_bad: str
) -> DataConfig:
    """Returns what to evaluate on: the run's own evaluation split, or the data set given.

    Args:
        trained_on: the run's data configuration, whose preprocessing is kept.
        data: an image folder (its folder `split` or 'val' where it has one, else itself), or a TFDS name.
        split: None: the run's where the data set is the run's, else 'val' or 'test'.
        data_dir: TFDS's; None: the run's, or TFDS's default.
        on_bad: 'stop' or 'skip'.
    """
    change = functools.partial(dataclasses.replace, trained_on, on_bad=on_bad, workers=0)
    if data is None and trained_on.source == 'folder' and not trained_on.dir:
        raise InputError('--data must name what to evaluate on: the weights are not of a run that knows')
    if data is None or (trained_on.source == 'tfds' and data == trained_on.name):
        data_dir = data_dir or trained_on.dir
        return change(eval_split=split or trained_on.eval_split, dir=data_dir)
    folder = pathlib.Path(data).expanduser()
    if folder.is_dir():
        if data_dir:
            raise InputError(f'--data-dir is for TFDS data sets, {data} is a folder')
        there = [s for s in (trained_on.eval_split, 'val', 'test') if (folder / s).is_dir()]
        return change(source='folder', dir=str(folder), eval_split=split or (there or ['.'])[0])
    if data.startswith(('/', './', '../', '~')):
        raise InputError(f'no such data directory: {data}')
    return change(source='tfds', name=data, dir=data_dir or '', eval_split=split or 'test')


def reading(data: DataConfig) -> pipeline.Reading:
    """Returns how pictures are to be read."""
    return pipeline.Reading(data.workers, data.threads, data.on_bad)


def _rows(batch_size: int) -> pipeline.Rows:
    return pipeline.Rows(batch_size, jax.process_index(), jax.process_count())


def _some(names: list[str], most: int = 5) -> str:
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


class Feed:
    """Batches on the devices.

    Attributes:
        asked: when the last batch was asked for, in seconds of `time.perf_counter`.
        got: when it was there.
        bad: indices of the pictures that could not be decoded, as they were met.
    """

    def __init__(self, batches: Iterator[pipeline.Batch], mesh: Mesh):
        self._batches, self._mesh = batches, mesh
        self.asked = self.got = 0.0
        self.bad: list[int] = []

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        self.asked = time.perf_counter()
        batch = next(self._batches)
        self.got = time.perf_counter()
        bad = batch.pop('bad_index')
        self.bad += bad[bad != pipeline.NOT_BAD].tolist()
        return parallel.to_devices(batch, self._mesh)

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
                f'the data has classes that the model does not know: {_some(missing)}; '
                f"the model's {len(model_classes)}: {_some(list(model_classes))}"
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
