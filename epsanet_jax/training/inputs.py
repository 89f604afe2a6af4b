"""Batches of a data configuration, on the devices."""

import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from epsanet_jax.data import pipeline
from epsanet_jax.data.order import read_labels
from epsanet_jax.data.planes import pixel_dtype
from epsanet_jax.data.randaugment import RandAugment
from epsanet_jax.data.sources import Source
from epsanet_jax.data.transforms import CentreCrop, ColorJitter, RandomCrop, RandomErasing, TrainTransform
from epsanet_jax.training import sharding
from epsanet_jax.training.config import Config, DataConfig


def train_batches(config: Config, source: Source, start_step: int) -> Iterator[pipeline.Batch]:
    """Returns this process's rows of the training batches from `start_step` on."""
    data = config.data
    rows = _rows(config.batch_size, config.gradient_accumulation_steps)
    labels = read_labels(source) if config.balance_classes else None
    return pipeline.train_batches(
        source, _train_transform(data), rows, config.seed, start_step, reading(data), labels
    )


def _train_transform(data: DataConfig) -> TrainTransform:
    mean = tuple(255 * m if data.preprocessing.channels != 3 else round(255 * m) for m in data.mean)
    return TrainTransform(
        RandomCrop(data.image_size, data.crop_scale, data.crop_ratio, data.flip),
        ColorJitter(*data.color_jitter) if any(data.color_jitter) else None,
        RandAugment(data.randaugment_ops, data.randaugment_magnitude) if data.randaugment_ops else None,
        RandomErasing(data.random_erasing, fill=mean) if data.random_erasing else None,
    )


def eval_batches(data: DataConfig, source: Source, batch_size: int) -> Iterator[pipeline.Batch]:
    """Returns this process's rows of the evaluation batches."""
    crop = CentreCrop(data.size_in_use, data.resize_size)
    return pipeline.eval_batches(source, crop, _rows(batch_size), reading(data))


def abstract_batch(
    rows: int,
    image_size: int,
    microbatches: int = 1,
    requests: int = 0,
    mask: bool = False,
    channels: int = 3,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the global batch that a step is compiled for.

    `requests` is the number of different requests that a process can make; evaluation needs a `mask`.
    """
    shape = (rows,) if microbatches == 1 else (microbatches, rows // microbatches)
    batch = {
        'image': jax.ShapeDtypeStruct((*shape, image_size, image_size, channels), pixel_dtype(channels)),
        'label': jax.ShapeDtypeStruct(shape, np.int32),
    }
    if requests:
        batch['requests'] = jax.ShapeDtypeStruct((*shape, requests), np.float32)
    if mask:
        batch['mask'] = jax.ShapeDtypeStruct(shape, np.bool_)
    return batch


def reading(data: DataConfig) -> pipeline.Reading:
    """Returns how to read images."""
    return pipeline.Reading(
        data.workers,
        data.threads,
        data.on_bad,
        data.exif_orientation,
        data.reduced_decoding,
        data.preprocessing.channels,
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
