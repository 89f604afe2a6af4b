"""Finds the image files below a folder: one order and one set of guards for every command.

Links are followed. The walker skips links to a folder that contains them, broken links, and everything that
is named like an image and is not a regular file: reading a pipe or a device might never end. It also skips
folders and images whose names begin with a dot, folders of thumbnails and the like, and image formats that
cannot be decoded.
"""

import contextlib
import errno
import heapq
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn

from epsanet_jax.errors import InputError, one_line, some

IMAGE_EXTENSIONS = (
    '.jpg',
    '.jpeg',
    '.jpe',
    '.jfif',
    '.png',
    '.ppm',
    '.bmp',
    '.pgm',
    '.tif',
    '.tiff',
    '.webp',
    '.gif',
    '.avif',
    '.jp2',
    '.npy',
)
_UNSUPPORTED = ('.heic', '.heif', '.jxl', '.svg', '.psd', '.eps', '.dng', '.cr2', '.nef', '.arw')
_LITTER = {'__macosx', '@eadir', '#recycle', '$recycle.bin', 'system volume information', 'lost+found'}
_BROKEN = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR}  # what following a broken link ends with
_MOST_BYTES = 2**30  # of one file; a disk image would fill the memory

Identity = tuple[int, int]  # device and inode


class Folder(NamedTuple):
    """A folder that was read.

    Attributes:
        path: its path relative to the root; '' for the root.
        folders: sorted names of its subfolders.
        images: its image files, sorted by name.
    """

    path: str
    folders: tuple[str, ...]
    images: tuple[os.DirEntry[str], ...]


def stop(message: str) -> NoReturn:
    """Raises InputError."""
    raise InputError(message)


def walk(
    root: str,
    on_unreadable: Callable[[str], object] = stop,
    on_skipped: Callable[[str], object] = lambda message: None,
    without: str | None = None,
) -> Iterator[Folder]:
    """Yields a folder and every folder below it.

    The root comes first, then each subfolder of the root with the folders below it, sorted by their whole
    path. This is the order of torchvision's ImageFolder. Only the names in one folder, and those of the
    folders that are not visited yet, are in memory.

    Args:
        root: path of the folder.
        on_unreadable: called with 'PATH: reason' for each folder or link that cannot be read.
        on_skipped: called with 'PATH: reason' for each entry that is skipped; PATH is relative to the root.
        without: path of a folder to leave out, with everything below it.
    """
    left_out = _identity(without) if without and os.path.isdir(without) else None
    try:
        top = _identity(root)
    except OSError as e:
        on_unreadable(_unreadable(root, e))
        return
    pending = [] if top == left_out else [('', '', _containing(root) | {top})]
    while pending:
        first, path, above = heapq.heappop(pending)
        folder = os.path.join(root, path) if path else root
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as e:
            on_unreadable(_unreadable(folder, e))
            continue
        folders, images = [], []
        for entry in entries:
            below = os.path.join(path, entry.name)
            try:
                identity, reason = _look(entry, above)
            except OSError as e:
                on_unreadable(_unreadable(entry.path, e))
                continue
            if reason:
                on_skipped(f'{below}: {reason}')
            elif identity and identity != left_out:
                folders.append(entry.name)
                heapq.heappush(pending, (first or entry.name, below, above | {identity}))
            elif not identity and is_image_name(entry.name):
                images.append(entry)
        yield Folder(path, tuple(folders), tuple(images))


def _look(entry: os.DirEntry[str], above: frozenset[Identity]) -> tuple[Identity | None, str]:
    """Returns the identity of a folder, None for anything else, and the reason to skip the entry, or ''."""
    if reason := litter(entry.name):
        of_interest = is_image_name(entry.name) or entry.is_dir(follow_symlinks=False)
        return None, reason if of_interest or os.path.isdir(entry.path) else ''
    if entry.name.lower().endswith(_UNSUPPORTED):
        return None, f'{os.path.splitext(entry.name)[1].lower()} images cannot be decoded'
    if not entry.is_symlink():
        if entry.is_dir():
            return _identity(entry.path), ''
        regular = entry.is_file()
    else:
        try:
            mode = entry.stat().st_mode
        except OSError as e:
            if e.errno not in _BROKEN:
                raise
            return None, f'broken link: {e.strerror}'
        if stat.S_ISDIR(mode):
            identity = _identity(entry.path)
            return identity, 'link to a folder that contains it' if identity in above else ''
        regular = stat.S_ISREG(mode)
    return None, '' if regular or not is_image_name(entry.name) else 'not a regular file'


def _identity(folder: str) -> Identity:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _containing(root: str) -> frozenset[Identity]:
    """Returns the folders above the root, except those that cannot be examined."""
    folder, found = os.path.realpath(root), set()
    while folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
        with contextlib.suppress(OSError):
            found.add(_identity(folder))
    return frozenset(found)


def _unreadable(path: str, error: OSError) -> str:
    kind = 'follow the link' if os.path.islink(path) else 'read the folder'
    return f'{path}: cannot {kind}: {error.strerror or one_line(error)}'


def no_image(where: str, root: str = '', skipped: Sequence[str] = ()) -> str:
    """Returns the message that a place holds no image, and what was skipped below the folder `root`."""
    reason = f'; {skipped_line(root, skipped)}' if skipped else ''
    return f'{where} holds no image ({" ".join(IMAGE_EXTENSIONS)}){reason}'


def skipped_line(root: str, skipped: Sequence[str]) -> str:
    """Returns the line that reports what was skipped below a folder."""
    number = f'{len(skipped)} {"entry" if len(skipped) == 1 else "entries"}'
    return one_line(f'skipped {number} in {root}: {some(skipped)}', limit=None)


def is_image_name(name: str) -> bool:
    """Whether a file's name has the extension of an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def litter(name: str) -> str:
    """Returns why a file or folder of this name is skipped, or ''."""
    if name.startswith('.'):
        return 'hidden'
    return 'not a folder of the dataset' if name.lower() in _LITTER else ''


def is_there(path: str) -> bool:
    """Whether something is at a path.

    Raises:
        InputError: the system refuses the answer.
    """
    try:
        os.stat(path)
    except OSError as e:
        if e.errno in _BROKEN:
            return False
        raise InputError(f'cannot read {path}: {e.strerror or one_line(e)}') from e
    return True


def read_file(path: str) -> bytes:
    """Returns the content of a regular file of at most 1 GiB.

    Raises:
        OSError: the file cannot be read, is not regular, or is too large.
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    with open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
        status = os.fstat(f.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, 'not a regular file')
        if status.st_size > _MOST_BYTES:
            raise OSError(errno.EFBIG, f'{status.st_size:,} bytes, more than {_MOST_BYTES:,}')
        return f.read()
