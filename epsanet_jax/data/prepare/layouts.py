"""Finds splits, classes and images in a source: image folders, tars, or ImageNet's own tars."""

import dataclasses
import os
import re
from collections.abc import Callable

from epsanet_jax.data.prepare import archives, imagenet
from epsanet_jax.data.prepare.archives import Item
from epsanet_jax.data.prepare.imagenet import TRAIN_TAR, VALIDATION_TAR
from epsanet_jax.data.walk import is_there, walk
from epsanet_jax.errors import InputError, some

SPLITS = ('train', 'val', 'validation', 'test')
_IMAGENET = tuple(name.removesuffix('.tar') for name in (TRAIN_TAR, VALIDATION_TAR))
_COMPRESSED_TAR = re.compile(r'.*\.(tar\.\w+|tgz|tbz2?|txz)', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a source."""

    root: str  # path of the source
    name: str  # name of the dataset
    class_names: tuple[str, ...]  # sorted; the label of a class is its index
    splits: dict[str, list[Item]]  # images of each split, in order
    left_alone: tuple[str, ...] = ()  # names of the entries of the root that are not used
    skipped: tuple[str, ...] = ()  # 'PATH: reason' of `walk.walk`; PATH is relative to the root

    def name_of(self, item: Item) -> str:
        """Returns the name of an image for messages: its path relative to the root, or 'TAR: MEMBER'."""
        where = os.path.relpath(item.container, self.root)
        if item.offset >= 0:
            return f'{where}: {item.name}'
        return os.path.normpath(os.path.join(where, item.name))


def list_source(root: str, labels: str | None = None) -> Listing:
    """Lists the images of a folder in one of these layouts.

    - split folders (train, val, validation, test) that hold class folders or one tar per class;
    - one tar per split (train.tar and so on) that holds class folders;
    - class folders, or one tar per class, without a split: the split is 'train';
    - ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, as ImageNet is distributed.

    Args:
        root: path of the folder.
        labels: list of the labels of ImageNet's validation images, see `imagenet.list_tars`.

    Raises:
        InputError: the folder has another layout, or is damaged.
    """
    if not is_there(root) or not os.path.isdir(root):
        hint = ': expected the folder that holds the tar' if os.path.isfile(root) else ''
        raise InputError(f'no such folder: {root}{hint}')
    try:
        names = sorted(os.listdir(root))
    except OSError as e:
        raise InputError(f'{root}: cannot read the folder: {e.strerror}') from e
    if not names:
        raise InputError(f'{root} is empty: expected class folders, train/ and val/, or tars')
    splits = [split for split in SPLITS if {split, f'{split}.tar'} & set(names)]
    tars = {TRAIN_TAR, VALIDATION_TAR} & set(names)
    if tars and splits:
        raise InputError(f'{root} holds {" and ".join([*sorted(tars), *splits])}: move one kind elsewhere')
    if tars:
        listed = imagenet.list_tars(root, labels)
        return Listing(root, 'imagenet2012', _class_names(listed), listed)
    if labels is not None:
        raise InputError(f'--labels is for {VALIDATION_TAR}, which is not in {root}')
    _refuse_compressed(root, [n for n in names if n.split('.')[0] in (*SPLITS, *_IMAGENET)])
    skipped: list[str] = []
    if splits:
        listed = {split: _list_split(root, split, skipped) for split in splits}
        used = {name for split in splits for name in (split, f'{split}.tar')}
    else:
        listed = {'train': _list_classes(root, skipped.append)}
        used = {name for name in names if os.path.isdir(os.path.join(root, name)) or name.endswith('.tar')}
    left_alone = tuple(name for name in names if name not in used)
    return Listing(root, 'image_folder', _class_names(listed), listed, left_alone, tuple(skipped))


def _list_split(root: str, split: str, skipped: list[str]) -> list[Item]:
    folder, tar = os.path.join(root, split), os.path.join(root, f'{split}.tar')
    if os.path.exists(tar):
        if os.path.exists(folder):
            raise InputError(f'{root} holds both {split} and {split}.tar: move one of them elsewhere')
        return archives.list_tar_of_classes(tar, split)
    if not os.path.isdir(folder):
        raise InputError(
            f'{folder} is not a folder: expected a folder that holds one folder of images per class'
        )
    return _list_classes(folder, lambda message: skipped.append(os.path.join(split, message)))


def _list_classes(folder: str, on_skipped: Callable[[str], object]) -> list[Item]:
    class_names, names = next(walk(folder)).folders, sorted(os.listdir(folder))
    tars = [n for n in names if n.endswith('.tar') and not os.path.isdir(os.path.join(folder, n))]
    if class_names and tars:
        raise InputError(
            f'{folder} holds folders ({class_names[0]} ...) and tars ({tars[0]} ...): move one kind elsewhere'
        )
    if class_names:
        return archives.list_folder(folder, on_skipped)
    if not tars:
        _refuse_compressed(folder, names)
        raise InputError(
            f'no class folders in {folder}: expected one folder of images per class, or one tar per class'
        )
    items = [item for tar in tars for item in archives.list_tar_of_class(os.path.join(folder, tar))]
    return sorted(items, key=archives.order)


def _refuse_compressed(folder: str, names: list[str]) -> None:
    for name in names:
        if _COMPRESSED_TAR.fullmatch(name):
            path = os.path.join(folder, name)
            raise InputError(f'{path} is compressed, which prevents random access: decompress it first')


def _class_names(splits: dict[str, list[Item]]) -> tuple[str, ...]:
    """Returns the classes of the training split, or of all splits if there is no training split."""
    of = {split: {item.class_name for item in items} for split, items in splits.items()}
    names = sorted(of.get('train') or set().union(*of.values()))
    for split, own in of.items():
        if unknown := sorted(own - set(names)):
            raise InputError(f'{split!r} has classes that train lacks: {some(unknown)}')
    for name in names:
        # A line of label.labels.txt holds the name; a name that is not UTF-8 has surrogates.
        is_utf8 = name.encode(errors='ignore') == os.fsencode(name)
        if name != name.strip() or {'\n', '\r'} & set(name) or not is_utf8:
            raise InputError(f'the class name {name!r} cannot be stored as a line of text: rename the class')
    return tuple(names)
