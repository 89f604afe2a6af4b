"""Finds splits, classes and images in a source: image folders, tars, or ImageNet's own tars."""

import dataclasses
import os
import re

from epsanet_jax.data import classes, formats, webdataset
from epsanet_jax.data.contents import Place
from epsanet_jax.data.prepare import archives, imagenet
from epsanet_jax.data.prepare.archives import Item, Notes
from epsanet_jax.data.prepare.imagenet import TRAIN_TAR, VALIDATION_TAR
from epsanet_jax.data.splits import split_of
from epsanet_jax.data.walk import is_image_name, is_there, litter, walk
from epsanet_jax.errors import InputError, some

SPLITS = ('train', 'val', 'validation', 'test')
_IMAGENET = tuple(name.removesuffix('.tar') for name in (TRAIN_TAR, VALIDATION_TAR))
_COMPRESSED_TAR = re.compile(r'.*\.(tar\.\w+|tgz|tbz2?|txz)', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a source."""

    root: str  # path of the source
    name: str  # name of the dataset
    class_names: tuple[str, ...]  # in the order of the labels, see `classes.in_order`
    splits: dict[str, list[Item]]  # images of each split, in order
    remarks: tuple[str, ...] = ()  # lines that say what was assumed
    skipped: tuple[str, ...] = ()  # 'PATH: reason' of `walk.walk`; PATH is relative to the root

    def name_of(self, item: Item) -> str:
        """Returns the name of an image for messages: its path relative to the root, or 'TAR: MEMBER'."""
        where = os.path.relpath(item.container, self.root)
        if item.offset >= 0:
            return f'{where}: {item.name}'
        return os.path.normpath(os.path.join(where, item.name))


def list_source(root: str, labels: str | None = None, label_column: str = '') -> Listing:
    """Lists the images of a folder in one of these layouts, or of a file of the last one.

    - split folders (train, val, test, in any case and spelling) that hold class folders or one tar per class;
    - one tar per split (train.tar and so on) that holds class folders;
    - class folders, or one tar per class, without a split: the split is 'train';
    - one tar that holds class folders or split folders;
    - ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, as ImageNet is distributed;
    - parquet files, WebDataset shards or tables of labels, see `formats.find`; their order is kept.

    Args:
        root: path of the folder.
        labels: list of the labels of ImageNet's validation images, see `imagenet.list_tars`.
        label_column: column of the labels, see `contents.label_column`; '': a usual name.

    Raises:
        InputError: the folder has another layout, or is damaged.
    """
    if is_there(root) and (listing := _list_labelled(root, label_column)) is not None:
        return listing
    if not is_there(root) or not os.path.isdir(root):
        hint = ': expected the folder that holds the tar' if os.path.isfile(root) else ''
        raise InputError(f'no such folder: {root}{hint}')
    try:
        names = sorted(os.listdir(root))
    except OSError as e:
        raise InputError(f'{root}: cannot read the folder: {e.strerror}') from e
    if not names:
        raise InputError(f'{root} is empty: expected class folders, train/ and val/, or tars')
    splits = _find_splits(root, names)
    tars = {TRAIN_TAR, VALIDATION_TAR} & set(names)
    if tars and splits:
        raise InputError(
            f'{root} holds {" and ".join([*sorted(tars), *splits.values()])}: move one kind elsewhere'
        )
    if tars:
        listed = imagenet.list_tars(root, labels)
        return Listing(root, 'imagenet2012', _class_names(listed, Notes()), listed)
    if labels is not None:
        raise InputError(f'--labels is for {VALIDATION_TAR}, which is not in {root}')
    _refuse_compressed(root, [n for n in names if split_of(n.split('.')[0]) or n.split('.')[0] in _IMAGENET])
    notes = Notes()
    if splits:
        found = {split: _list_split(root, split, name, notes) for split, name in splits.items()}
        listed = {split: items for split, items in found.items() if items is not None}
        unused = [name for name in names if name not in splits.values()]
    else:
        listed = _list_whole(root, notes)
        unused = [n for n in names if not (os.path.isdir(os.path.join(root, n)) or n.endswith('.tar'))]
    if unused:
        notes.remarks.append(f'not used: {some(unused)}')
    class_names = _class_names(listed, notes)
    return Listing(root, 'image_folder', class_names, listed, tuple(notes.remarks), tuple(notes.skipped))


def _list_labelled(root: str, label_column: str) -> Listing | None:
    """Lists parquet files, shards or tables; None if the source has another layout."""
    if os.path.isfile(root) and formats.kind_of(root) == formats.SHARDS and not webdataset.is_shard(root):
        return None
    names = {} if os.path.isfile(root) else _find_splits(root, formats.splits_in(root))
    found = {split: formats.find(root, name, label_column) for split, name in names.items()}
    if not found:
        found = {'train': formats.find(root, '.', label_column)}
    if next(iter(found.values())) is None:  # of the training split, if there is one
        return None
    notes, listed, declared = Notes(), {}, ()
    for split, files in found.items():
        if files is None:
            raise InputError(
                f'{root}: {names[split]} is of another kind than the other splits: move it elsewhere'
            )
        source, line = formats.open_labelled(files, label_column)
        notes.remarks.append(line)
        declared = declared or source.class_names
        class_of = [source.class_names[label] for label in source.labels.tolist()]
        listed[split] = [_item(source.place_of(i), name, i) for i, name in enumerate(class_of)]
    class_names = _class_names(listed, notes, declared)
    folder = root if os.path.isdir(root) else os.path.dirname(root)
    return Listing(folder, 'image_folder', class_names, listed, tuple(notes.remarks))


def _item(place: Place, class_name: str, number: int) -> Item:
    file = place.container if place.offset >= 0 else os.path.join(place.container, place.name)
    status = os.stat(file)
    size = place.size if place.offset >= 0 else status.st_size
    return Item(place.container, place.name, class_name, size, status.st_mtime_ns, place.offset, number)


def _find_splits(root: str, names: list[str]) -> dict[str, str]:
    """Returns the splits of a source and the folder or tar of each."""
    found: dict[str, str] = {}
    for name in names:
        stem = name.removesuffix('.tar')
        if (meaning := split_of(stem)) is None:
            continue
        split = stem if stem in SPLITS else meaning
        if split in found:
            raise InputError(
                f'{root} holds both {found[split]} and {name}, which mean one split: move one elsewhere'
            )
        found[split] = name
    return {split: found[split] for split in SPLITS if split in found}


def _list_split(root: str, split: str, name: str, notes: Notes) -> list[Item] | None:
    """Returns the images of a split, or None if it has images without classes, which are left out."""
    path, training = os.path.join(root, name), split == 'train'
    if split != name.removesuffix('.tar'):
        notes.remarks.append(f'{name} is used as {split!r}')
    if name.endswith('.tar') and not os.path.isdir(path):
        return archives.list_tar_of_classes(path, split, notes, not training)
    if not os.path.isdir(path):
        raise InputError(
            f'{path} is not a folder: expected a folder that holds one folder of images per class'
        )
    top = next(walk(path))
    if not training and top.images and not top.folders:
        notes.remarks.append(f'not used: {len(top.images):,} images in {name} without a class folder')
        return None
    return _list_classes(path, name, notes, not training)


def _list_whole(root: str, notes: Notes) -> dict[str, list[Item]]:
    """Lists a source without splits at its top: classes, or one tar or folder that holds everything."""
    folders = next(walk(root)).folders
    inner = next(walk(os.path.join(root, folders[0]))).folders if len(folders) == 1 else ()
    if any(map(split_of, inner)):
        path = os.path.join(root, folders[0])
        raise InputError(f'{root} holds only the folder {folders[0]}, which holds {some(inner)}: give {path}')
    tars = [name for name in _tars(root) if not litter(name)]
    if folders or len(tars) != 1:
        return {'train': _list_classes(root, '', notes)}
    path = os.path.join(root, tars[0])
    whole, all_names = archives.read_index(path, notes)
    members, names = archives.without_top(path, 'train', whole, all_names, notes)
    if all('/' not in m.name for m in members if is_image_name(m.name)):
        notes.skipped += [f'{name}: {litter(name)}' for name in _tars(root) if litter(name)]
        return {'train': archives.as_one_class(path, whole)}
    splits = _find_splits(path, sorted({n.split('/')[0] for n in (*names, *(m.name for m in members))}))
    if not splits:
        return {'train': archives.classes_in(path, members, names, notes)}
    return archives.list_splits(path, splits, members, names, notes)


def _tars(folder: str) -> list[str]:
    names = sorted(os.listdir(folder))
    return [n for n in names if n.endswith('.tar') and not os.path.isdir(os.path.join(folder, n))]


def _list_classes(folder: str, below: str, notes: Notes, allow_empty: bool = False) -> list[Item]:
    class_names, tars = next(walk(folder)).folders, _tars(folder)
    notes.skipped += [f'{os.path.join(below, name)}: {litter(name)}' for name in tars if litter(name)]
    tars = [name for name in tars if not litter(name)]
    if class_names and tars:
        raise InputError(
            f'{folder} holds folders ({class_names[0]} ...) and tars ({tars[0]} ...): move one kind elsewhere'
        )
    if class_names:
        return archives.list_folder(folder, below, notes, allow_empty)
    if not tars:
        _refuse_compressed(folder, sorted(os.listdir(folder)))
        raise InputError(
            f'no class folders in {folder}: expected one folder of images per class, or one tar per class'
        )
    items = [item for tar in tars for item in archives.list_tar_of_class(os.path.join(folder, tar), notes)]
    return sorted(items, key=archives.order)


def _refuse_compressed(folder: str, names: list[str]) -> None:
    for name in names:
        if _COMPRESSED_TAR.fullmatch(name):
            path = os.path.join(folder, name)
            raise InputError(f'{path} is compressed, which prevents random access: decompress it first')


def _class_names(
    splits: dict[str, list[Item]], notes: Notes, declared: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Returns the declared classes, those of the training split, or those of all splits without it."""
    of = {split: {item.class_name for item in items} for split, items in splits.items()}
    names = declared or classes.in_order([*(of.get('train') or set().union(*of.values()))])
    for split, own in of.items():
        if unknown := sorted(own - set(names)):
            raise InputError(f'{split!r} has classes that train lacks: {some(unknown)}')
        if missing := sorted(set(names) - own):
            notes.remarks.append(f'{split!r} has no image of these classes: {some(missing)}')
    for name in names:
        # A line of label.labels.txt holds the name; a name that is not UTF-8 has surrogates.
        is_utf8 = name.encode(errors='ignore') == os.fsencode(name)
        if name != name.strip() or {'\n', '\r'} & set(name) or not is_utf8:
            raise InputError(f'the class name {name!r} cannot be stored as a line of text: rename the class')
    if warning := classes.single(names, 'the source'):
        notes.remarks.append(warning)
    return names
