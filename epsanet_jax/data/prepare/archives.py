"""Lists the images of folders and uncompressed tars, in the order of `sources.ImageFolder`."""

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable
from typing import BinaryIO, NamedTuple

from epsanet_jax.data.walk import is_image_name, no_image, walk
from epsanet_jax.errors import InputError, one_line

_BLOCK = 512
_COMPRESSED = {
    b'\x1f\x8b': 'gzip -d',
    b'BZh': 'bzip2 -d',
    b'\xfd7zXZ\x00': 'xz -d',
    b'\x28\xb5\x2f\xfd': 'zstd -d',
}


class Item(NamedTuple):
    """An image that is not read yet: a file, or a member of a tar.

    Attributes:
        container: path of the tar, or of the folder that `name` is relative to.
        name: name that the record keeps; CLASS/FILE, except in tars of one class.
        class_name: name of the class.
        size: size in bytes.
        mtime: time of the last change in nanoseconds, from the file system or the tar.
        offset: position of the member's first byte in the tar; -1 for a file.
    """

    container: str
    name: str
    class_name: str
    size: int
    mtime: int
    offset: int = -1


class Member(NamedTuple):
    """A regular file in a tar; `name` is relative and holds no '.' or '..'."""

    name: str
    size: int
    mtime: int
    offset: int


def in_order(items: Iterable[Item]) -> list[Item]:
    """Returns items in the order of `sources.ImageFolder`."""
    return sorted(items, key=order)


def order(item: Item) -> tuple[str, str, str]:
    """Returns the sort key of `in_order`: class, folder, file name."""
    return item.class_name, *os.path.split(item.name)


def list_folder(root: str, on_skipped: Callable[[str], object]) -> list[Item]:
    """Lists the images of an image folder, which may have no class folders.

    Args:
        root: path of the folder of the class folders.
        on_skipped: see `walk.walk`.

    Raises:
        InputError: a class holds no image, or a folder cannot be read.
    """
    skipped: list[str] = []
    folders = walk(root, on_skipped=skipped.append)
    empty, items = set(next(folders).folders), []
    for folder in folders:
        class_name = folder.path.split(os.sep)[0]
        items += [_file_item(root, folder.path, class_name, entry) for entry in folder.images]
        if folder.images:
            empty.discard(class_name)
    for class_name in sorted(empty):
        raise InputError(f'empty class: {no_image(os.path.join(root, class_name), root, skipped)}')
    for message in skipped:
        on_skipped(message)
    return items


def _file_item(root: str, folder: str, class_name: str, entry: os.DirEntry) -> Item:
    try:
        status = entry.stat()
        size, mtime = status.st_size, status.st_mtime_ns
    except OSError:  # reading the file names the reason
        size, mtime = 0, 0
    return Item(root, os.path.join(folder, entry.name), class_name, size, mtime)


def list_tar_of_classes(path: str, split: str) -> list[Item]:
    """Lists the images of a tar of class folders, which may be inside one folder with the name of the split.

    Raises:
        InputError: the tar cannot be used, holds no class folder, or one without images.
    """
    members, folders = index_tar(path)
    prefix = f'{split}/'
    if all(name.startswith(prefix) or name == split for name in (*folders, *(m.name for m in members))):
        members = [m._replace(name=m.name.removeprefix(prefix)) for m in members]
        folders = [name.removeprefix(prefix) for name in folders if name != split]
    classes = {name.split('/')[0] for name in (*folders, *(m.name for m in members if '/' in m.name))}
    if not classes:
        inner = '; unpack the tars in it' if any(m.name.endswith('.tar') for m in members) else ''
        raise InputError(f'no class folders in {path}: expected one folder of images per class{inner}')
    items = [
        Item(path, m.name, m.name.split('/')[0], m.size, m.mtime, m.offset)
        for m in members
        if '/' in m.name and is_image_name(m.name)
    ]
    for empty in sorted(classes - {item.class_name for item in items}):
        _require_images([], f'{path}: {empty}')
    return in_order(items)


def list_tar_of_class(path: str) -> list[Item]:
    """Lists the images of a tar that holds one class and has its name.

    Raises:
        InputError: the tar cannot be used, or holds no image.
    """
    class_name = os.path.basename(path).removesuffix('.tar')
    members = [m for m in index_tar(path)[0] if is_image_name(m.name)]
    _require_images(members, path)
    prefix = f'{class_name}/'
    if all(m.name.startswith(prefix) for m in members):
        prefix = ''
    return in_order(Item(path, prefix + m.name, class_name, m.size, m.mtime, m.offset) for m in members)


def _require_images(found: list, where: str) -> None:
    if not found:
        raise InputError(f'empty class: {no_image(where, where, ())}')


def index_tar(path: str, within: Member | None = None) -> tuple[list[Member], list[str]]:
    """Reads the headers of an uncompressed tar, or of a tar that is a member of it.

    Args:
        path: path of the tar.
        within: the inner tar; offsets still count from the start of the outer tar.

    Returns:
        The files and the names of the folders. Of several files with the same name, the last one counts.

    Raises:
        InputError: the file is not a tar, is compressed or truncated, or holds a link, a device, or a name
            outside of the folder into which it would be unpacked.
    """
    called = f'{path}: {within.name}' if within else path
    files: dict[str, Member] = {}
    folders: list[str] = []
    try:
        with open(path, 'rb') as f:
            end = within.offset + within.size if within else f.seek(0, os.SEEK_END)
            f.seek(within.offset if within else 0)
            _refuse_compressed(f, called)
            with tarfile.open(fileobj=f, mode='r:') as tar:
                while (header := tar.next()) is not None:
                    tar.members.clear()  # a million of them would take gigabytes
                    if header.offset_data + header.size > end:
                        raise InputError(f'{called} is truncated: download or copy it again')
                    name = _safe_name(header, called)
                    if header.isdir():
                        folders.append(name)
                    else:
                        member = Member(name, header.size, int(header.mtime * 10**9), header.offset_data)
                        files[name] = member
                # tarfile stops silently at damage; a tar ends with a block of zeros.
                f.seek(tar.offset)
                mark = f.read(_BLOCK)
            if len(mark) < _BLOCK or any(mark) or tar.offset >= end:
                raise InputError(
                    f'{called} is truncated or damaged at byte {tar.offset}: download or copy it again'
                )
    except (tarfile.TarError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f'{called} is not a tar, or damaged: {one_line(e)}') from e
    except OSError as e:
        raise InputError(f'cannot read {called}: {e.strerror or one_line(e)}') from e
    return list(files.values()), [name for name in folders if name != '.']


def _safe_name(header: tarfile.TarInfo, called: str) -> str:
    name = header.name
    if name.startswith('/') or '..' in name.split('/'):
        raise InputError(
            f'{called} holds {name!r}, which is outside of the folder: make the tar again without it'
        )
    if not (header.isdir() or header.isreg()) or header.issparse():
        kind = 'a link' if header.issym() or header.islnk() else 'neither a file nor a folder'
        raise InputError(f'{called} holds {name!r}, which is {kind}: make the tar again without it')
    return posixpath.normpath(name)


def _refuse_compressed(f: BinaryIO, called: str) -> None:
    start = f.tell()
    magic = f.read(8)
    f.seek(start)
    for prefix, command in _COMPRESSED.items():
        if magic.startswith(prefix):
            raise InputError(
                f'{called} is compressed, which prevents random access: run `{command}` on it first'
            )
