"""Lists the images of folders and uncompressed tars, in the order of `sources.ImageFolder`."""

import contextlib
import os
import posixpath
import tarfile
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from epsanet_jax.data.sources import ImageFolder
from epsanet_jax.data.walk import is_image_name, no_image
from epsanet_jax.errors import InputError, one_line

_BLOCK = 512
_COMPRESSED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ\x00': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}


class Item(NamedTuple):
    """An image that is not read yet: a file, or a member of a tar."""

    container: str  # path of the tar, or of the folder that `name` is relative to
    name: str  # name that the record keeps; CLASS/FILE, except in ImageNet's tars
    class_name: str
    size: int  # bytes
    mtime: int  # time of the last change in nanoseconds, from the file system or the tar
    offset: int = -1  # position of the member's first byte in the tar; -1 for a file


def order(item: Item) -> tuple[str, str, str]:
    """Returns the key that sorts items in the order of `sources.ImageFolder`: class, folder, file name."""
    return item.class_name, *os.path.split(item.name)


def list_folder(root: str, on_skipped: Callable[[str], object]) -> list[Item]:
    """Lists the images of a folder of class folders, see `sources.ImageFolder` and `walk.walk`."""
    folder, items = ImageFolder(root), []
    for message in folder.skipped:
        on_skipped(message)
    for name, label in zip(folder.files, folder.labels, strict=True):
        size, mtime = 0, 0
        with contextlib.suppress(OSError):  # reading the file names the reason
            status = os.stat(os.path.join(root, name))
            size, mtime = status.st_size, status.st_mtime_ns
        items.append(Item(root, name, folder.class_names[label], size, mtime))
    return items


def list_tar_of_classes(path: str, split: str) -> list[Item]:
    """Lists the images of a tar of class folders, which may be inside one folder with the name of the split.

    Raises:
        InputError: the tar cannot be used, holds no class folder, or one without images.
    """
    members, folders = index_tar(path)
    prefix = f'{split}/'
    if all(f'{name}/'.startswith(prefix) for name in (*folders, *(m.name for m in members))):
        members = [m._replace(name=m.name.removeprefix(prefix)) for m in members]
        folders = [name.removeprefix(prefix) for name in folders if name != split]
    inside = [m._replace(class_name=m.name.split('/')[0]) for m in members if '/' in m.name]
    classes = {name.split('/')[0] for name in folders} | {m.class_name for m in inside}
    if not classes:
        inner = '; unpack the tars in it' if any(m.name.endswith('.tar') for m in members) else ''
        raise InputError(f'no class folders in {path}: expected one folder of images per class{inner}')
    items = [m for m in inside if is_image_name(m.name)]
    for empty in sorted(classes - {item.class_name for item in items}):
        raise InputError(f'empty class: {no_image(f"{path}: {empty}")}')
    return sorted(items, key=order)


def list_tar_of_class(path: str) -> list[Item]:
    """Lists the images of a tar that holds one class and has its name.

    Raises:
        InputError: the tar cannot be used, or holds no image.
    """
    class_name = os.path.basename(path).removesuffix('.tar')
    items = images_of_class(class_name, path)
    prefix = f'{class_name}/'
    if not all(item.name.startswith(prefix) for item in items):
        items = [item._replace(name=prefix + item.name) for item in items]
    return sorted(items, key=order)


def images_of_class(class_name: str, path: str, within: Item | None = None) -> list[Item]:
    """Lists the images of a tar, in its order, see `index_tar`.

    Raises:
        InputError: the tar cannot be used, or holds no image.
    """
    items = [m._replace(class_name=class_name) for m in index_tar(path, within)[0] if is_image_name(m.name)]
    if not items:
        raise InputError(f'empty class: {no_image(f"{path}: {within.name}" if within else path)}')
    return items


def index_tar(path: str, within: Item | None = None) -> tuple[list[Item], list[str]]:
    """Reads the headers of an uncompressed tar, or of a tar that is a member of it.

    Args:
        path: path of the tar.
        within: the inner tar; offsets still count from the start of the outer tar.

    Returns:
        The files, without a class, and the names of the folders. Names are relative and hold no '.' or '..'.
        Of several files with the same name, the last one counts.

    Raises:
        InputError: the file is not a tar, is compressed or truncated, or holds a link, a device, or a name
            outside of the folder into which it would be unpacked.
    """
    called = f'{path}: {within.name}' if within else path
    files: dict[str, Item] = {}
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
                        mtime = int(header.mtime * 10**9)
                        files[name] = Item(path, name, '', header.size, mtime, header.offset_data)
                # tarfile stops silently at damage; a tar ends with a block of zeros.
                f.seek(tar.offset)
                mark = f.read(_BLOCK)
            if len(mark) < _BLOCK or any(mark) or tar.offset >= end:
                raise InputError(
                    f'{called} is truncated or damaged at byte {tar.offset}: download or copy it again'
                )
    except InputError:
        raise
    except (tarfile.TarError, ValueError) as e:
        raise InputError(f'{called} is not a tar, or damaged: {one_line(e)}') from e
    except OSError as e:
        raise InputError(f'cannot read {called}: {e.strerror or one_line(e)}') from e
    return list(files.values()), [name for name in folders if name != '.']


def _safe_name(header: tarfile.TarInfo, called: str) -> str:
    name = header.name
    if name.startswith('/') or '..' in name.split('/'):
        reason = 'outside of the folder'
    elif header.issym() or header.islnk():
        reason = 'a link'
    elif not (header.isdir() or header.isreg()) or header.issparse():
        reason = 'neither a file nor a folder'
    else:
        return posixpath.normpath(name)
    raise InputError(f'{called} holds {name!r}, which is {reason}: make the tar again without it')


def _refuse_compressed(f: BinaryIO, called: str) -> None:
    start = f.tell()
    magic = f.read(8)
    f.seek(start)
    for prefix, program in _COMPRESSED.items():
        if magic.startswith(prefix):
            raise InputError(
                f'{called} is compressed, which prevents random access: run `{program} -d` on it first'
            )
