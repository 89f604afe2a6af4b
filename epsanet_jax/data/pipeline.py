"""Batches, addressed by step: what row i of batch s holds depends on the seed, s and i alone.

Every process reads its contiguous rows of each global batch, so that row i is the same example with the same
augmentation for any number of processes, worker processes and threads, and after a restart at any step.
"""

import dataclasses
import os
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from epsanet_jax.data.sources import Source
from epsanet_jax.data.transforms import BadImageError, CentreCrop, RandomCrop, decode
from epsanet_jax.errors import InputError

Batch = dict[str, np.ndarray]
NOT_BAD = -1
_MOST_REPLACEMENTS = 100


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of each global batch this process holds.

    Attributes:
        batch_size: of the global batch.
        process: index of this process.
        processes: number of processes; divides batch_size.
    """

    batch_size: int
    process: int = 0
    processes: int = 1

    @property
    def local(self) -> int:
        """Rows of this process."""
        if self.batch_size % self.processes:
            raise InputError(
                f'a global batch of {self.batch_size} does not divide among {self.processes} processes'
            )
        return self.batch_size // self.processes


@dataclasses.dataclass(frozen=True)
class Reading:
    """How pictures are read.

    Attributes:
        workers: processes that decode; 0: threads of this process.
        threads: that decode, in this process or each worker; 0: as many as there are processors.
        on_bad: 'stop': a picture that cannot be decoded raises BadImageError, which names it;
            'skip': in training the next good picture takes its place, in evaluation it is not counted.
    """

    workers: int = 0
    threads: int = 0
    on_bad: str = 'stop'


def train_batches(
    source: Source, crop: RandomCrop, rows: Rows, seed: int, start_step: int = 0, reading: Reading = Reading()
) -> Iterator[Batch]:
    """Yields this process's rows of batches start_step, start_step + 1, ... without end.

    Batches run through epoch after epoch of the shuffled examples; an epoch may end within a batch.

    Yields:
        'image' uint8 [rows, size, size, 3], 'label' int32 [rows], and 'bad_index' int64 [rows]: the index of
        the picture that could not be decoded and was replaced, or -1.
    """
    data = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    data = data.random_map(_LoadForTraining(source, crop, reading.on_bad))
    return _iterate(_LocalRows(data, rows, start_step), rows, reading)


def eval_batches(
    source: Source, crop: CentreCrop, rows: Rows, reading: Reading = Reading()
) -> Iterator[Batch]:
    """Yields this process's rows of as many batches as it takes to see every example once, in order.

    Yields:
        'image', 'label' and 'bad_index' as `train_batches`, and 'mask' bool [rows]: false for the rows that
        fill up the last batch and for pictures that could not be decoded.
    """
    padded = num_eval_batches(len(source), rows.batch_size) * rows.batch_size
    data = grain.MapDataset.range(padded).map(_LoadForEvaluation(source, crop, reading.on_bad))
    return _iterate(_LocalRows(data, rows, 0), rows, reading)


def num_eval_batches(examples: int, batch_size: int) -> int:
    """Returns the number of batches that hold `examples`, the last one padded."""
    return -(-examples // batch_size)


def bad_image_message(source: Source, index: int) -> str:
    """Returns the name of a picture that cannot be decoded, and why."""
    try:
        _load(source, index)
    except BadImageError as e:
        return str(e)
    return f'{source.name_of(index)}: could not be decoded'


def _iterate(data: grain.MapDataset, rows: Rows, reading: Reading) -> Iterator[Batch]:
    threads = reading.threads or min(16, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    batches = data.batch(rows.local).to_iter_dataset(options)
    if reading.workers:
        if not flags.FLAGS.is_parsed():  # grain reads flags of its own, also outside of absl's app.run
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=reading.workers))
    iterator = iter(batches)
    try:
        for batch in iterator:
            yield {k: np.asarray(v) for k, v in batch.items()}
    finally:
        iterator.close()


class _LocalRows(grain.MapDataset):
    """The rows of one process, batch after batch, of a data set in global order."""

    def __init__(self, parent: grain.MapDataset, rows: Rows, start_step: int):
        super().__init__(parent)
        self._rows, self._start_step, self._local = rows, start_step, rows.local

    def __len__(self) -> int:
        rows = (len(self._parent) // self._rows.batch_size - self._start_step) * self._local
        return min(rows, 2**48)  # batches without end must be countable all the same

    def __getitem__(self, index):
        step, row = divmod(index, self._local)
        first = (self._start_step + step) * self._rows.batch_size + self._rows.process * self._local
        return self._parent[first + row]

    def __str__(self) -> str:
        return f'LocalRows({self._rows})'


class _LoadForTraining(grain.transforms.RandomMap):
    def __init__(self, source: Source, crop: RandomCrop, on_bad: str):
        self._source, self._crop, self._on_bad = source, crop, on_bad

    def random_map(self, element, rng: np.random.Generator):
        bad = NOT_BAD
        for index in range(element, element + _MOST_REPLACEMENTS):
            try:
                picture, label = _load(self._source, index % len(self._source))
            except BadImageError:
                if self._on_bad == 'stop':
                    raise
                bad = element
                continue
            return {
                'image': self._crop(picture, rng),
                'label': np.int32(label),
                'bad_index': np.int64(bad),
            }
        raise BadImageError(
            f'{_MOST_REPLACEMENTS} pictures in a row cannot be decoded, the first: '
            f'{self._source.name_of(element)}'
        )


class _LoadForEvaluation(grain.transforms.Map):
    def __init__(self, source: Source, crop: CentreCrop, on_bad: str):
        self._source, self._crop, self._on_bad = source, crop, on_bad

    def map(self, element):
        image = np.zeros((self._crop.size, self._crop.size, 3), np.uint8)
        label, mask, bad = 0, False, NOT_BAD
        if element < len(self._source):
            try:
                picture, label = _load(self._source, element)
                image, mask = self._crop(picture), True
            except BadImageError:
                if self._on_bad == 'stop':
                    raise
                bad = element
        return {
            'image': image,
            'label': np.int32(label),
            'mask': np.bool_(mask),
            'bad_index': np.int64(bad),
        }


def _load(source: Source, index: int):
    try:
        record = source[index]
        picture, label = decode(record['image']), record['label']
    except (BadImageError, OSError) as e:
        reason = str(e) if isinstance(e, BadImageError) else f'cannot read the image: {e.strerror or e}'
        raise BadImageError(f'{source.name_of(index)}: {reason}') from e
    if not 0 <= label < len(source.class_names):
        raise InputError(
            f'{source.name_of(index)} has the label {label}, there are {len(source.class_names)} classes'
        )
    return picture, label
