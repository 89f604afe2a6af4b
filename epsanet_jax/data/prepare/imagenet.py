"""ImageNet as it is distributed: ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.

The labels of the validation images are synsets, in the order of the sorted file names; TFDS has the list.
The class numbers of the ILSVRC2012 development kit are not accepted: TFDS, torchvision and this package
number the sorted synsets, and the kit uses another order. With wrong numbers the accuracy is about 0 %.
"""

import os
import re

from epsanet_jax.data.prepare.archives import Item, images_of_class, index_tar, order
from epsanet_jax.data.walk import is_image_name
from epsanet_jax.errors import InputError, one_line

TRAIN_TAR, VALIDATION_TAR = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
_SYNSET = re.compile(r'n\d{8}')
_MOST_BYTES = 64 * 2**20  # of a list of labels


def list_tars(root: str, labels: str | None) -> dict[str, list[Item]]:
    """Lists the images of 'train' and 'validation', for each of ImageNet's tars that a folder holds.

    Args:
        root: path of the folder.
        labels: list of the labels of the validation images, see `read_labels`; None: the list of TFDS.

    Raises:
        InputError: a tar is damaged or not ImageNet's, or the labels do not fit the images.
    """
    splits: dict[str, list[Item]] = {}
    train, validation = os.path.join(root, TRAIN_TAR), os.path.join(root, VALIDATION_TAR)
    if os.path.exists(train):
        splits['train'] = _list_training(train)
    if os.path.exists(validation):
        known = {item.class_name for item in splits.get('train', [])}
        splits['validation'] = _list_validation(validation, labels, known)
    return splits


def _list_training(path: str) -> list[Item]:
    items = []
    for tar in index_tar(path)[0]:
        synset = tar.name.removesuffix('.tar')
        if not _SYNSET.fullmatch(synset) or synset == tar.name:
            raise InputError(
                f'{path} holds {tar.name!r}: expected one tar per synset, n01440764.tar and so on'
            )
        items += images_of_class(synset, path, tar)
    if not items:
        raise InputError(f'{path} holds no tar of images')
    return sorted(items, key=order)


def _list_validation(path: str, labels: str | None, known: set[str]) -> list[Item]:
    items = sorted(item for item in index_tar(path)[0] if is_image_name(item.name))
    synsets = read_labels(labels or _labels_of_tfds())
    if len(synsets) != len(items):
        have = f'{path} has {len(items):,} images'
        if labels:
            raise InputError(f'{labels} has {len(synsets):,} labels, {have}')
        raise InputError(
            f'{have}, not the {len(synsets):,} of ImageNet: get the whole tar, or give the labels with '
            '--labels FILE, one synset per line in the order of the sorted file names'
        )
    if known and (unknown := sorted(set(synsets) - known)):
        raise InputError(
            f'{TRAIN_TAR} lacks {len(unknown):,} synsets of the validation images: {unknown[0]} ...'
        )
    labelled = zip(items, synsets, strict=True)
    return sorted((item._replace(class_name=synset) for item, synset in labelled), key=order)


def _labels_of_tfds() -> str:
    import tensorflow_datasets as tfds

    return str(tfds.core.tfds_path('datasets/imagenet2012/validation_labels.txt'))


def read_labels(path: str) -> list[str]:
    """Returns the synset of each validation image from a text file with one synset per line.

    Raises:
        InputError: the file cannot be read, or a line is not a synset.
    """
    try:
        with open(path, 'rb') as f:
            lines = [line.strip() for line in f.read(_MOST_BYTES).decode().strip().splitlines()]
    except OSError as e:
        raise InputError(f'cannot read the labels in {path}: {e.strerror or one_line(e)}') from e
    except UnicodeDecodeError as e:
        raise InputError(f'{path} is not a text file: expected one synset per line') from e
    for number, line in enumerate(lines, 1):
        if not _SYNSET.fullmatch(line):
            raise InputError(f'{path} line {number}: expected a synset (n01440764), got {line[:40]!r}')
    return lines
