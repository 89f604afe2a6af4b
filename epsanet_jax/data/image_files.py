"""Images from files and folders, as they are named on a command line, read as a stream."""

import collections
import dataclasses
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from epsanet_jax.data import formats
from epsanet_jax.data.contents import Place
from epsanet_jax.data.decode import BadImageError, decode, reason_of
from epsanet_jax.data.labelled import read_place
from epsanet_jax.data.planes import pixel_dtype
from epsanet_jax.data.transforms import CentreCrop
from epsanet_jax.data.walk import is_there, no_image, read_file, skipped_line, walk
from epsanet_jax.errors import InputError

OnBad = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """A file that may be an image.

    Attributes:
        path: path of the file.
        argument: index of the given path by which the file was found.
        below: path relative to the given folder, or the file's name if the file itself was given; a number
            for an image at a `place`.
        place: where the image is if the given file holds or lists several, see `formats`.
    """

    path: str
    argument: int
    below: str
    place: Place | None = None


def stop_at_bad(message: str) -> None:
    """Raises BadImageError with the message."""
    raise BadImageError(message)


def check_paths(paths: Sequence[str], without: str | None = None) -> None:
    """Checks that every path exists, and that every folder holds an image.

    Raises:
        InputError: a path does not exist, or a folder holds no image outside of the folder `without`.
    """
    for path in paths:
        if not is_there(path):
            raise InputError(f'no such image or folder: {path}')
        found = next(find_images([path], without=without), None)
        if found is None and os.path.isdir(path):
            raise InputError(no_image(path, path, _skipped(path, without)))
        if found is None:
            raise InputError(f'{path} holds no image')


def find_images(
    paths: Sequence[str], on_bad: OnBad = lambda message: None, without: str | None = None
) -> Iterator[ImageFile]:
    """Yields the given files, with any extension, and the images in them and in and below the given folders.

    Images in files are those of parquet files, WebDataset shards, .csv and .jsonl tables.

    Args:
        paths: files and folders. The order within a folder, and what is skipped, are those of `walk.walk`.
        on_bad: called with a message for each folder that cannot be read.
        without: path of a folder to leave out, for example the folder of the results.
    """
    for argument, path in enumerate(paths):
        if os.path.isfile(path) and (found := formats.find(path, '.')) is not None:
            contents = formats.contents_of(found, with_labels=False)
            for i in range(len(contents)):
                yield ImageFile(contents.name_of(i), argument, f'{i:06d}', contents.place_of(i))
            continue
        if not os.path.isdir(path):
            yield ImageFile(path, argument, os.path.basename(path))
            continue
        for folder in walk(path, on_bad, without=without):
            for entry in folder.images:
                yield ImageFile(entry.path, argument, os.path.join(folder.path, entry.name))


def skipped_lines(paths: Sequence[str], without: str | None = None) -> list[str]:
    """Returns one line for each given folder below which `find_images` skips anything."""
    found = ((path, _skipped(path, without)) for path in paths if os.path.isdir(path))
    return [skipped_line(path, skipped) for path, skipped in found if skipped]


def _skipped(folder: str, without: str | None) -> list[str]:
    skipped: list[str] = []
    collections.deque(walk(folder, lambda message: None, skipped.append, without), maxlen=0)
    return skipped


def read_batches(
    files: Iterable[ImageFile],
    crop: CentreCrop,
    batch_size: int,
    threads: int,
    exif_orientation: bool = True,
    channels: int = 3,
    on_bad: OnBad = stop_at_bad,
) -> Generator[tuple[list[ImageFile], np.ndarray], None, None]:
    """Reads, decodes and crops images in threads and keeps their order; reads about two batches ahead.

    Args:
        files: image files; taken from the iterable as they are needed.
        crop: crop to the size of the network.
        batch_size: number of rows of every batch.
        threads: number of threads that decode.
        exif_orientation: see `decode`.
        channels: number of channels of the images.
        on_bad: called with 'PATH: reason' for each image that cannot be decoded; the image is left out.

    Yields:
        The files of a batch, at most `batch_size`, and their images [batch_size, size, size, C], uint8 for
        three channels, else float32 in the same units. Zeros fill the unused rows of the last batch.
    """

    def read(file: ImageFile) -> np.ndarray | str:
        try:
            image = read_place(file.place) if file.place else read_file(file.path)
            return crop(decode(image, exif_orientation, channels))
        except (BadImageError, OSError) as e:
            return reason_of(e)

    shape = (batch_size, crop.size, crop.size, channels)
    batch, images = [], np.zeros(shape, pixel_dtype(channels))
    for file, image in _in_threads(read, files, threads, batch_size + threads):
        if isinstance(image, str):
            on_bad(f'{file.path}: {image}')
            continue
        images[len(batch)] = image
        batch.append(file)
        if len(batch) == batch_size:
            yield batch, images
            batch, images = [], np.zeros_like(images)
    if batch:
        yield batch, images


def _in_threads(
    read: Callable[[ImageFile], np.ndarray | str], files: Iterable[ImageFile], threads: int, ahead: int
) -> Iterator[tuple[ImageFile, np.ndarray | str]]:
    """Yields each file with what `read` returns for it."""
    executor = ThreadPoolExecutor(threads)
    waiting: collections.deque[tuple[ImageFile, Future[np.ndarray | str]]] = collections.deque()
    try:
        for file in files:
            waiting.append((file, executor.submit(read, file)))
            if len(waiting) > ahead:
                first, image = waiting.popleft()
                yield first, image.result()
        for first, image in waiting:
            yield first, image.result()
    finally:
        executor.shutdown(cancel_futures=True)
