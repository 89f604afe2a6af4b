"""Opens the datasets of a configuration and gives their classes the numbers of the model's outputs."""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Sequence

from epsanet_jax.data import classes, formats, sources
from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.sources import Record, Source
from epsanet_jax.data.splits import find_split
from epsanet_jax.data.walk import skipped_line
from epsanet_jax.errors import InputError, some
from epsanet_jax.paths import is_remote
from epsanet_jax.training.config import DataConfig


def open_source(data: DataConfig, split: str, training: bool = False) -> tuple[Source, list[str]]:
    """Opens a split of a dataset; the digits are prepared first if needed.

    Returns:
        The source, and a line for everything that was assumed or skipped.

    Raises:
        InputError: the split does not exist or is not usable; for training, a class has no image.
    """
    if data.source == 'synthetic':
        seed = 0 if split == data.train_split else 1
        size, channels = data.image_size, data.preprocessing.channels
        return sources.Synthetic(data.synthetic_examples, data.synthetic_classes, size, seed, channels), []
    if data.source == 'tfds':
        if data.name.split(':')[0] == 'digits':
            from epsanet_jax.data import digits

            digits.prepare(data.dir or None)
        return sources.Tfds(data.name, split, data.dir or None), []
    folder = _on_a_disk(data.dir, '--config.data.dir')
    if data.source == 'records':
        return sources.Records(folder, split), []
    if sources.is_prepared(folder):
        raise InputError(f'{folder} holds prepared records: set --config.data.source=records')
    found = formats.find(str(folder), split, data.label_column)
    if found is not None:
        source, line = formats.open_labelled(found, data.label_column)
        return source, [line]
    return _open_folder(folder, split, training)


def _open_folder(folder: pathlib.Path, split: str, training: bool) -> tuple[ImageFolder, list[str]]:
    lines = []
    if not (folder / split).is_dir():
        there = formats.splits_in(str(folder))
        found = find_split(split, there, str(folder))
        if found is None:
            holds = f'; {folder} holds {some(there)}' if there else ''
            if not there and formats.find(str(folder), '.') is not None:
                holds = f'; the names of the files in {folder} must begin with {split}'
            raise InputError(f'no such data directory: {folder / split}{holds}')
        lines.append(f'{folder / found} is used as {split!r}')
        split = found
    source = ImageFolder(folder / split, allow_empty=not training)
    if source.skipped:
        lines.append(skipped_line(source.root, source.skipped))
    if source.empty:
        lines.append(f'{source.root} has no image of these classes: {some(source.empty)}')
    return source, lines


def _on_a_disk(path: str, option: str) -> pathlib.Path:
    if is_remote(path):
        raise InputError(f'{option}={path} is not on a disk: mount the bucket and give the mounted folder')
    return pathlib.Path(os.path.expanduser(path))


def open_splits(data: DataConfig) -> tuple[Source, Source, list[str]]:
    """Opens the training and the evaluation split.

    The evaluation split has the classes of the training split, but needs not have images of all of them.

    Returns:
        Both splits, and a line for everything that was assumed or skipped.

    Raises:
        InputError: a split is not usable, or the evaluation split has classes that the training split lacks.
    """
    train, lines = open_source(data, data.train_split, training=True)
    evaluation, more = open_source(data, data.eval_split)
    lines += more
    ours, theirs = (list(map(classes.composed, s.class_names)) for s in (train, evaluation))
    if unknown := sorted(set(theirs) - set(ours)):
        raise InputError(f'{data.eval_split!r} has classes that {data.train_split!r} lacks: {some(unknown)}')
    if warning := classes.single(train.class_names, repr(data.train_split)):
        lines.append(warning)
    if ours == theirs:
        return train, evaluation, lines
    empty = evaluation.empty if isinstance(evaluation, ImageFolder) else ()
    if missing := sorted(set(ours) - set(theirs) - set(empty)):
        lines.append(f'{data.eval_split!r} has no image of these classes: {some(missing)}')
    return train, with_labels_of(evaluation, train.class_names, len(ours))[0], lines


def evaluation_data(
    trained_on: DataConfig,
    data: str | None,
    split: str | None,
    data_dir: str | None,
    on_bad: str,
    label_column: str | None = None,
) -> DataConfig:
    """Returns the data to evaluate on: the evaluation split of the run, or another dataset.

    Args:
        trained_on: data configuration of the run, whose preprocessing is kept.
        data: an image folder (with a subfolder `split`, 'val' or 'test', else the folder itself), a folder of
            records, parquet files, shards or tables, one such file, or a TFDS name; None: the dataset of the
            run.
        split: None: that of the run if the dataset is the run's, else 'val' or 'test'.
        data_dir: folder of TFDS datasets; None: that of the run, or TFDS's default.
        on_bad: 'stop' or 'skip' at an image that cannot be decoded.
        label_column: column of the labels; None: that of the run if the dataset is the run's, else ''.

    Raises:
        InputError: the dataset does not exist, or there is none.
    """
    change = functools.partial(
        dataclasses.replace, trained_on, on_bad=on_bad, max_bad_images=sys.maxsize, workers=0
    )
    if data is None and trained_on.source == 'folder' and not trained_on.dir:
        raise InputError('--data is missing: the weights do not name a dataset to evaluate on')
    if data is None or (trained_on.source == 'tfds' and data == trained_on.name):
        column = trained_on.label_column if label_column is None else label_column
        chosen = split or trained_on.eval_split
        return change(eval_split=chosen, dir=data_dir or trained_on.dir, label_column=column)
    change = functools.partial(change, label_column=label_column or '')
    folder = _on_a_disk(data, '--data')
    if folder.is_file():
        if data_dir:
            raise InputError(f'--data-dir is for TFDS datasets, but {data} is a file')
        return change(source='folder', dir=str(folder), eval_split=split or '.')
    if folder.is_dir():
        if data_dir:
            raise InputError(f'--data-dir is for TFDS datasets, but {data} is a folder')
        if sources.is_prepared(folder):
            chosen = split or sources.evaluation_split(folder)
            return change(source='records', dir=str(folder), eval_split=chosen)
        there = formats.splits_in(str(folder))
        usual = [s for s in (trained_on.eval_split, 'val', 'test') if find_split(s, there, data)]
        return change(source='folder', dir=str(folder), eval_split=split or (usual or ['.'])[0])
    if data.startswith(('/', './', '../', '~')) or formats.kind_of(data):
        raise InputError(f'no such data directory: {data}')
    return change(source='tfds', name=data, dir=data_dir or '', eval_split=split or 'test')


def with_labels_of(source: Source, model_classes: Sequence[str], num_classes: int) -> tuple[Source, str]:
    """Gives the classes of a source the labels of a model, see `classes.match`.

    Returns:
        The source, and what had to be assumed, or ''.

    Raises:
        InputError: the source has classes that the model does not have.
    """
    labels, assumption = classes.match(source.class_names, model_classes, num_classes)
    if labels == list(range(num_classes)):
        return source, assumption
    names = model_classes or [str(i) for i in range(num_classes)]
    return Relabelled(source, labels, tuple(names)), assumption


class Relabelled:
    """A source with other labels: `labels[k]` for images of its class k."""

    def __init__(self, source: Source, labels: Sequence[int], class_names: tuple[str, ...]):
        self._source, self._labels = source, labels
        self.class_names, self.fingerprint = class_names, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        return {'image': record['image'], 'label': self._labels[record['label']]}

    def name_of(self, index: int) -> str:
        """Returns the name of record `index` for messages."""
        return self._source.name_of(index)
