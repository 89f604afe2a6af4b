"""Pictures from files and folders as they are named on a command line, read as a stream."""

import collections
import dataclasses
import os
import stat
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from epsanet_jax.data.decode import BadImageError, decode
from epsanet_jax.data.sources import IMAGE_EXTENSIONS
from epsanet_jax.data.transforms import CentreCrop
from epsanet_jax.errors import InputError

_MOST_BYTES = 2**30  # of a file: a device or a disk image would otherwise fill the memory

OnBad = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class PictureFile:
    """A file that may be a picture.

    Attributes:
        path: where it is.
        argument: which of the paths given it was found by, from 0.
        below: its path within the folder given, or its name if the file itself was given.
    """

    path: str
    argument: int
    below: str


def stop_at_bad(message: str) -> None:
    """Raises BadImageError with the message: what to do where bad pictures are not expected."""
    raise BadImageError(message)


def check_paths(paths: Sequence[str], without: str | None = None) -> None:
    """Raises InputError if a path is not there, or is a folder without pictures (other than in `without`)."""
    for path in paths:
        if not os.path.exists(path):
            raise InputError(f'no such picture or folder: {path}')
        if os.path.isdir(path) and next(find_pictures([path], without=without), None) is None:
            raise InputError(f'no picture in {path} ({" ".join(IMAGE_EXTENSIONS)})')


def find_pictures(
    paths: Sequence[str], on_bad: OnBad = lambda message: None, without: str | None = None
) -> Iterator[PictureFile]:
    """Yields the files given, whatever they are called, and the pictures in and below the folders given.

    Within a folder, sorted files come before sorted subfolders; no more than the names of one folder and of
    those above it are held. Links are followed, but not in circles.

    Args:
        paths: of files and folders.
        on_bad: told of folders that cannot be read.
        without: a folder to leave out, that of the results say.
    """
    left_out = {_identity(without)} if without is not None and os.path.isdir(without) else set()
    for argument, path in enumerate(paths):
        if os.path.isdir(path):
            for file in _below(path, on_bad, left_out):
                yield PictureFile(file, argument, os.path.relpath(file, path))
        else:
            yield PictureFile(path, argument, os.path.basename(path))


def _below(folder: str, on_bad: OnBad, above: Collection[tuple[int, int]]) -> Iterator[str]:
    try:
        identity = _identity(folder)
        if identity in above:
            return
        with os.scandir(folder) as scanned:
            entries = sorted((os.path.isdir(entry.path), entry.name) for entry in scanned)
    except OSError as e:
        on_bad(f'{folder}: cannot read the folder: {e.strerror or e}')
        return
    for is_folder, name in entries:
        if is_folder:
            yield from _below(os.path.join(folder, name), on_bad, {*above, identity})
        elif name.lower().endswith(IMAGE_EXTENSIONS):
            yield os.path.join(folder, name)


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def read_batches(
    files: Iterable[PictureFile],
    crop: CentreCrop,
    batch_size: int,
    threads: int,
    exif_orientation: bool = True,
    on_bad: OnBad = stop_at_bad,
) -> Generator[tuple[list[PictureFile], np.ndarray], None, None]:
    """Reads, decodes and crops pictures in threads, in order, no more than about two batches ahead.

    Args:
        files: taken as they are needed.
        crop: to the network's size.
        batch_size: rows of every batch.
        threads: that decode.
        exif_orientation: see `decode`.
        on_bad: told of each picture that cannot be decoded, in one line with its path; it is left out.

    Yields:
        The files of a batch, at most `batch_size`, and uint8 [batch_size, size, size, 3]; rows of zeros fill
        up the last one.
    """
    batch, images = [], np.zeros((batch_size, crop.size, crop.size, 3), np.uint8)
    for file, image in _in_threads(files, crop, exif_orientation, threads, batch_size + threads):
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
    files: Iterable[PictureFile], crop: CentreCrop, exif_orientation: bool, threads: int, ahead: int
) -> Iterator[tuple[PictureFile, np.ndarray | str]]:
    """Yields each file with its picture, or the reason why there is none."""
    executor = ThreadPoolExecutor(threads)
    waiting: collections.deque[tuple[PictureFile, Future[np.ndarray | str]]] = collections.deque()
    try:
        for file in files:
            waiting.append((file, executor.submit(_read, file.path, crop, exif_orientation)))
            if len(waiting) > ahead:
                first, image = waiting.popleft()
                yield first, image.result()
        for first, image in waiting:
            yield first, image.result()
    finally:
        executor.shutdown(cancel_futures=True)


def _read(path: str, crop: CentreCrop, exif_orientation: bool) -> np.ndarray | str:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a terminal might never end
            return 'cannot read the image: not a regular file'
        if status.st_size > _MOST_BYTES:
            return f'cannot read the image: {status.st_size:,} bytes, more than {_MOST_BYTES:,}'
        with open(path, 'rb') as f:
            return crop(decode(f.read(), exif_orientation))
    except BadImageError as e:
        return str(e)
    except OSError as e:
        return f'cannot read the image: {e.strerror or e}'
