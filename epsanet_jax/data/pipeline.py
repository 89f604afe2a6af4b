"""Yields batches whose rows depend only on the seed, the step and the row.

Every process reads its contiguous rows of each global batch. So row i is the same example with the same
augmentation for any number of processes, worker processes and threads, and after a restart at any step.
"""

import dataclasses
import errno
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from epsanet_jax.data import order
from epsanet_jax.data.decode import BadImageError, Reduced, decode, reason_of
from epsanet_jax.data.planes import pixel_dtype
from epsanet_jax.data.sources import Record, Source
from epsanet_jax.data.stack import Stack
from epsanet_jax.data.transforms import CentreCrop, TrainTransform
from epsanet_jax.data.worker import InWorkers, until_killed
from epsanet_jax.errors import InputError

Batch = dict[str, np.ndarray]
NOT_BAD = -1
_MOST_REPLACEMENTS = 100
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE}


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of each global batch that this process holds: contiguous rows of each microbatch."""

    batch_size: int  # rows of the global batch
    process: int = 0  # index of this process
    processes: int = 1
    microbatches: int = 1

    @property
    def local(self) -> int:
        """Number of rows of this process."""
        if self.batch_size % (self.processes * self.microbatches):
            parts = f'{self.processes} processes and {self.microbatches} microbatches'
            raise InputError(f'a global batch of {self.batch_size} is not divisible by {parts}')
        return self.batch_size // self.processes

    def in_batch(self, row: int) -> int:
        """Returns the index in the global batch of row `row` of this process."""
        rows = self.local // self.microbatches
        microbatch, place = divmod(row, rows)
        return (microbatch * self.processes + self.process) * rows + place


def _cores() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        workers: number of processes that decode. 0: decode in threads of this process; -1: one process per 8
            processors, or 0 for up to 8 processors.
        threads: number of threads that decode, in this process or in each worker; 0: one per processor.
        on_bad: 'stop': an image that cannot be decoded raises BadImageError, which names it;
            'skip': in training the next good image replaces it; evaluation does not count it.
        exif_orientation: whether to rotate images by their EXIF tag.
        reduced: whether to decode large JPEGs for training at the lowest resolution that their crops need.
        channels: number of channels of the images.
    """

    workers: int = 0
    threads: int = 0
    on_bad: str = 'stop'
    exif_orientation: bool = True
    reduced: bool = False
    channels: int = 3

    def processes(self) -> int:
        """Returns the number of worker processes; Python's lock limits one process to about 8 processors."""
        cores = _cores()
        return self.workers if self.workers >= 0 else (cores // 8 if cores > 8 else 0)

    def threads_each(self) -> int:
        """Returns the number of threads in this process, or in each worker."""
        return self.threads or min(16, max(1, _cores() // max(1, self.processes())))

    def at_once(self) -> int:
        """Returns the number of images that are read at the same time."""
        return min(_cores(), max(1, self.processes()) * self.threads_each())


def train_batches(
    source: Source,
    transform: TrainTransform,
    rows: Rows,
    seed: int,
    start_step: int = 0,
    reading: Reading = Reading(),
    labels: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yields this process's rows of batches start_step, start_step + 1, ... without end.

    The rows of the first microbatch come first. Every epoch is shuffled again, and may end within a batch.
    With `labels`, the labels of all examples, the classes have equal shares instead: see `order.balanced`.

    Yields:
        'image' [rows, size, size, C], uint8 for three channels, else float32 in the same units; 'label' int32
        [rows]; 'bad_index' int64 [rows], the index of the image that could not be decoded and was replaced,
        or -1; 'seconds' float32 [rows], the time that reading took.
    """
    data = order.shuffled(len(source), seed) if labels is None else order.balanced(labels, seed)
    data = data.random_map(_LoadForTraining(source, transform, reading))
    return _iterate(_LocalRows(data, rows, start_step), rows, reading)


def eval_batches(
    source: Source, crop: CentreCrop, rows: Rows, reading: Reading = Reading()
) -> Iterator[Batch]:
    """Yields this process's rows of the batches that hold every example once, in order.

    Yields:
        'image', 'label', 'bad_index' and 'seconds' as `train_batches`, and 'mask' bool [rows]: false for the
        padding of the last batch and for images that could not be decoded.
    """
    padded = num_eval_batches(len(source), rows.batch_size) * rows.batch_size
    data = grain.MapDataset.range(padded).map(_LoadForEvaluation(source, crop, reading))
    return _iterate(_LocalRows(data, rows, 0), rows, reading)


def num_eval_batches(examples: int, batch_size: int) -> int:
    """Returns the number of batches for `examples` examples; the last batch is padded."""
    return -(-examples // batch_size)


def bad_image_message(source: Source, index: int, channels: int = 3) -> str:
    """Returns the name of an image that cannot be decoded, and the reason."""
    try:
        _load(source, index, functools.partial(decode, channels=channels))
    except BadImageError as e:
        return str(e)
    return f'{source.name_of(index)}: could not be decoded'


def _iterate(data: grain.MapDataset, rows: Rows, reading: Reading) -> Iterator[Batch]:
    threads = reading.threads_each()
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    batches = data.batch(rows.local, batch_fn=Stack()).to_iter_dataset(options)
    if reading.processes():
        if not flags.FLAGS.is_parsed():  # grain reads its flags also outside of absl's app.run
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=reading.processes()))
    iterator = iter(batches)
    try:
        for batch in until_killed(iterator):
            yield {k: np.asarray(v) for k, v in batch.items()}
    finally:
        iterator.close()


class _LocalRows(grain.MapDataset):
    """The rows of one process from each batch of a dataset in global order."""

    def __init__(self, parent: grain.MapDataset, rows: Rows, start_step: int):
        super().__init__(parent)
        self._rows, self._start_step, self._local = rows, start_step, rows.local

    def __len__(self) -> int:
        rows = (len(self._parent) // self._rows.batch_size - self._start_step) * self._local
        return min(rows, 2**48)  # also endless batches need a length

    def __getitem__(self, index):
        step, row = divmod(index, self._local)
        first = (self._start_step + step) * self._rows.batch_size
        return self._parent[first + self._rows.in_batch(row)]

    def __str__(self) -> str:
        return f'LocalRows({self._rows})'


class _LoadForTraining(InWorkers, grain.transforms.RandomMap):
    def __init__(self, source: Source, transform: TrainTransform, reading: Reading):
        self._source, self._transform, self._reading = source, transform, reading

    def _read(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        size, exif_orientation = self._transform.crop.size, self._reading.exif_orientation
        if self._reading.reduced and isinstance(image, bytes):
            return self._transform(Reduced(image, size, exif_orientation), rng)
        return self._transform(decode(image, exif_orientation, self._reading.channels), rng)

    def random_map(self, element, rng: np.random.Generator):
        began = time.perf_counter()
        read = functools.partial(self._read, rng=rng)
        for index in range(element, element + _MOST_REPLACEMENTS):
            try:
                image, label = _load(self._source, index % len(self._source), read)
            except BadImageError:
                if self._reading.on_bad == 'stop':
                    raise
                continue
            return _row(image, label, NOT_BAD if index == element else element, began)
        first = self._source.name_of(element)
        raise BadImageError(f'{_MOST_REPLACEMENTS} images in a row cannot be decoded, the first is {first}')


class _LoadForEvaluation(InWorkers, grain.transforms.Map):
    def __init__(self, source: Source, crop: CentreCrop, reading: Reading):
        self._source, self._crop, self._reading = source, crop, reading

    def _read(self, image: bytes | np.ndarray) -> np.ndarray:
        return self._crop(decode(image, self._reading.exif_orientation, self._reading.channels))

    def map(self, element):
        began, channels = time.perf_counter(), self._reading.channels
        image = np.zeros((self._crop.size, self._crop.size, channels), pixel_dtype(channels))
        label, mask, bad = 0, False, NOT_BAD
        if element < len(self._source):
            try:
                image, label = _load(self._source, element, self._read)
                mask = True
            except BadImageError:
                if self._reading.on_bad == 'stop':
                    raise
                bad = element
        return {**_row(image, label, bad, began), 'mask': np.bool_(mask)}


def _row(image: np.ndarray, label: int, bad: int, began: float) -> dict[str, Any]:
    seconds = np.float32(time.perf_counter() - began)
    return {'image': image, 'label': np.int32(label), 'bad_index': np.int64(bad), 'seconds': seconds}


def _load(source: Source, index: int, read: Callable[[bytes | np.ndarray], Any]) -> tuple[Any, int]:
    """Returns `read` of the record's image, and its label; errors name the record."""
    try:
        record = _read_record(source, index)
        image, label = read(record['image']), record['label']
    except (BadImageError, OSError) as e:
        raise BadImageError(f'{source.name_of(index)}: {reason_of(e)}') from e
    if (classes := len(source.class_names)) <= label or label < 0:
        raise InputError(f'{source.name_of(index)} has the label {label}, but there are {classes} classes')
    return image, label


def _read_record(source: Source, index: int, tries: int = 4) -> Record:
    """Returns a record; retries after errors of network file systems that may pass."""
    try:
        return source[index]
    except OSError as e:
        if e.errno not in _PASSING or tries == 1:
            raise
    time.sleep(0.5)
    return _read_record(source, index, tries - 1)
