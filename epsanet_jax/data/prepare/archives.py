"""Lists the images of folders and uncompressed tars, in the order of `image_folder.ImageFolder`."""

import contextlib
import os
import posixpath
from typing import NamedTuple

from epsanet_jax.data import tars
from epsanet_jax.data.classes import composed
from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.splits import split_of
from epsanet_jax.data.walk import is_image_name, litter, no_image
from epsanet_jax.errors import InputError


class Item(NamedTuple):
    """An image that is not read yet: a file, a member of a tar, or a row of a parquet file."""

    container: str  # path of the tar or parquet file, or of the folder that `name` is relative to
    name: str  # name that the record keeps; CLASS/FILE, except in ImageNet's tars
    class_name: str
    size: int  # bytes
    mtime: int  # time of the last change in nanoseconds, from the file system or the tar
    offset: int = -1  # position of the member's first byte in the tar, or the row; -1 for a file
    number: int = -1  # place among the images of a source that keeps its own order


def order(item: Item) -> tuple[str, str, str]:
    """Returns the key that sorts items in the order of `ImageFolder`: class, folder, file name.

    Items with a number are sorted by the number.
    """
    if item.number >= 0:
        return f'{item.number:012d}', '', ''
    return item.class_name, *os.path.split(item.name)


class Notes:
    """What was skipped or assumed while a source was listed.

    Attributes:
        skipped: 'PATH: reason' for each entry that is skipped; PATH is relative to the root.
        remarks: lines for the user.
    """

    def __init__(self):
        self.skipped: list[str] = []
        self.remarks: list[str] = []


def list_folder(root: str, below: str, notes: Notes, allow_empty: bool = False) -> list[Item]:
    """Lists the images of a folder of class folders, see `image_folder.ImageFolder`.

    `below` is the path of the folder relative to the source, for messages.
    """
    folder, items = ImageFolder(root, allow_empty), []
    notes.skipped += [os.path.join(below, message) for message in folder.skipped]
    notes.skipped += [f'{os.path.join(below, name)}: no image' for name in folder.empty]
    for name, label in zip(folder.files, folder.labels, strict=True):
        size, mtime = 0, 0
        with contextlib.suppress(OSError):  # reading the file names the reason
            status = os.stat(os.path.join(root, name))
            size, mtime = status.st_size, status.st_mtime_ns
        items.append(Item(root, name, folder.class_names[label], size, mtime))
    return items


def list_tar_of_classes(path: str, split: str, notes: Notes, allow_empty: bool = False) -> list[Item]:
    """Lists the images of a tar of class folders, which may be inside one folder.

    Raises:
        InputError: the tar cannot be used, or holds no class folder, or, unless allowed, one without images.
    """
    return classes_in(path, *without_top(path, split, *read_index(path, notes), notes), notes, allow_empty)


def classes_in(
    path: str, members: list[Item], folders: list[str], notes: Notes, allow_empty: bool = False
) -> list[Item]:
    """Returns the images among the members of a tar that holds class folders, with their classes."""
    inside = [m._replace(class_name=composed(m.name.split('/')[0])) for m in members if '/' in m.name]
    classes = {composed(name.split('/')[0]) for name in folders} | {m.class_name for m in inside}
    if not classes:
        inner = '; unpack the tars in it' if any(m.name.endswith('.tar') for m in members) else ''
        raise InputError(f'no class folders in {path}: expected one folder of images per class{inner}')
    items = [m for m in inside if is_image_name(m.name)]
    empty = sorted(classes - {item.class_name for item in items})
    if empty and not (allow_empty and items):
        raise InputError(f'empty class: {no_image(f"{path}: {empty[0]}")}')
    notes.skipped += [f'{os.path.basename(path)}: {name}: no image' for name in empty]
    return sorted(items, key=order)


def read_index(path: str, notes: Notes) -> tuple[list[Item], list[str]]:
    """Returns the files and folders of a tar, see `index_tar`, without hidden ones and litter.

    Raises:
        InputError: the tar cannot be used.
    """
    return _without_litter(path, *index_tar(path), notes)


def without_top(
    path: str, split: str, members: list[Item], folders: list[str], notes: Notes
) -> tuple[list[Item], list[str]]:
    """Returns the files and folders of a tar without the folders around the classes.

    Such a folder has the name of the split, or holds all images, in folders of their own.
    """
    names = [*folders, *(m.name for m in members)]
    top = names[0].split('/')[0] if names else ''
    if split_of(top) != split or any(name.split('/')[0] != top for name in names):
        where = {posixpath.dirname(m.name) for m in members if is_image_name(m.name)}
        where |= {name for name in folders if not any(other.startswith(f'{name}/') for other in names)}
        top = posixpath.commonpath(where) if where else ''
        top = posixpath.dirname(top) if top in where else top  # the last folder is a class
        if top:
            notes.remarks.append(f'{path}: the classes are the folders in {top!r}')
    return _below(top, members, folders)


def _below(top: str, members: list[Item], folders: list[str]) -> tuple[list[Item], list[str]]:
    """Returns what is below a folder of a tar, with names relative to it."""
    start = f'{top}/' if top else ''
    inside = [m._replace(name=m.name[len(start) :]) for m in members if m.name.startswith(start)]
    return inside, [name[len(start) :] for name in folders if name.startswith(start)]


def list_splits(
    path: str, splits: dict[str, str], members: list[Item], folders: list[str], notes: Notes
) -> dict[str, list[Item]]:
    """Lists the images of a tar that holds a folder of class folders for each split."""
    return {
        split: classes_in(path, *_below(top, members, folders), notes, split != 'train')
        for split, top in splits.items()
    }


def _without_litter(
    path: str, members: list[Item], folders: list[str], notes: Notes
) -> tuple[list[Item], list[str]]:
    def reason(name: str) -> str:
        return next(filter(None, map(litter, name.split('/'))), '')

    where = os.path.basename(path)
    skipped = [m.name for m in members if is_image_name(m.name) and reason(m.name)]
    notes.skipped += [f'{where}: {name}: {reason(name)}' for name in skipped]
    kept = [m for m in members if not reason(m.name)]
    return kept, [name for name in folders if not reason(name)]


def list_tar_of_class(path: str, notes: Notes) -> list[Item]:
    """Lists the images of a tar that holds one class and has its name.

    Raises:
        InputError: the tar cannot be used, or holds no image.
    """
    return as_one_class(path, read_index(path, notes)[0])


def as_one_class(path: str, members: list[Item]) -> list[Item]:
    """Returns the images among the members of a tar that holds one class and has its name.

    Raises:
        InputError: there is no image.
    """
    class_name = os.path.basename(path).removesuffix('.tar')
    items = _of_class(class_name, members, path)
    prefix = f'{class_name}/'
    if not all(item.name.startswith(prefix) for item in items):
        items = [item._replace(name=prefix + item.name) for item in items]
    return sorted(items, key=order)


def images_of_class(class_name: str, path: str, within: Item) -> list[Item]:
    """Lists the images of a tar within a tar, in its order, see `index_tar`.

    Raises:
        InputError: the tar cannot be used, or holds no image.
    """
    return _of_class(class_name, index_tar(path, within)[0], f'{path}: {within.name}')


def _of_class(class_name: str, members: list[Item], called: str) -> list[Item]:
    items = [m._replace(class_name=composed(class_name)) for m in members if is_image_name(m.name)]
    if not items:
        raise InputError(f'empty class: {no_image(called)}')
    return items


def index_tar(path: str, within: Item | None = None) -> tuple[list[Item], list[str]]:
    """Reads the headers of an uncompressed tar, or of a tar that is a member of it, see `tars.members`.

    Args:
        path: path of the tar.
        within: the inner tar; offsets still count from the start of the outer tar.

    Returns:
        The files, without a class, and the names of the folders. Of several files with the same name, the
        last one counts.

    Raises:
        InputError: the tar cannot be used.
    """
    members = tars.members(path)
    if within:
        members = tars.members(path, within.offset, within.size, f'{path}: {within.name}')
    files: dict[str, Item] = {}
    folders: list[str] = []
    for name, size, mtime, offset in members:
        if offset < 0:
            folders.append(name)
        else:
            files[name] = Item(path, name, '', size, mtime, offset)
    return list(files.values()), [name for name in folders if name != '.']
