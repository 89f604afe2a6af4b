"""Writes images as a TFDS dataset in ArrayRecord, without TensorFlow.

An unfinished dataset has a folder .progress: plan.json says where each shard starts, and each finished shard
has a file with its result. The same call continues; a shard whose images have changed is written again.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from epsanet_jax.data.prepare import layouts, plan, shards, workers
from epsanet_jax.data.prepare.layouts import Listing
from epsanet_jax.data.prepare.shards import Shard, Written
from epsanet_jax.data.walk import skipped_line
from epsanet_jax.data.worker import handling
from epsanet_jax.errors import InputError, Interrupted, one_line

_DESCRIPTION = ('dataset_info.json', 'features.json', 'label.labels.txt')
_SKIPPED, _CHECKSUMS = 'skipped.txt', 'checksums.sha256'


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of a split."""

    kept: int  # images kept byte for byte
    converted: int  # images converted to JPEG
    skipped: int  # images left out because they cannot be decoded
    bytes: int  # total size of the files
    shards: int  # files


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A finished dataset."""

    folder: str  # path of the dataset
    name: str  # name of the dataset in TFDS
    splits: Mapping[str, Counts]
    images: int  # number of images that this call processed; 0 if the dataset existed already
    seconds: float  # duration of this call


def prepare(
    source: str,
    folder: str,
    on_bad: str = 'stop',
    num_workers: int | None = None,
    name: str | None = None,
    labels: str | None = None,
    shard_bytes: int | None = None,
    label_column: str = '',
) -> Prepared:
    """Writes the images of a source as a TFDS dataset in ArrayRecord, and shows the progress on stderr.

    Args:
        source: path of image folders, tars, parquet files, shards or tables, see `layouts.list_source`.
        folder: path of the dataset: a new or empty folder, or one that the same call has started.
        on_bad: for images that cannot be decoded: 'stop', or 'skip', which leaves them out and lists them.
        num_workers: number of processes; None: one per processor.
        name: name of the dataset; None: 'imagenet2012' or 'image_folder'.
        labels: list of the labels of ImageNet's validation images, see `imagenet.list_tars`.
        shard_bytes: bytes of images per file; None: 256 MiB, less for small datasets.
        label_column: see `layouts.list_source`.

    Raises:
        InputError: the source or the folder cannot be used, or an image cannot be decoded.
        Interrupted: SIGINT, SIGTERM or SIGHUP was received; the same call continues.
    """
    plan.check_arguments(source, folder, name)
    source, folder = (os.path.abspath(os.path.expanduser(path)) for path in (source, folder))
    begin = time.perf_counter()
    try:
        stop = signal.default_int_handler  # raises KeyboardInterrupt
        with handling(signal.SIGTERM, stop), handling(signal.SIGHUP, stop):
            _report(f'listing {source} ...')
            listing = layouts.list_source(source, labels, label_column)
            listing = dataclasses.replace(listing, name=name or listing.name)
            for line in listing.remarks:
                _report(line)
            if listing.skipped:
                _report(skipped_line(source, listing.skipped))
            if (report := plan.read_report(folder, listing)) is not None:
                splits = {split: Counts(**counts) for split, counts in report['splits'].items()}
                return Prepared(folder, listing.name, splits, 0, 0.0)
            with plan.locked(folder):
                parts = plan.make_shards(folder, listing, shard_bytes)
                written, images = _write(parts, listing, folder, on_bad, num_workers or os.cpu_count() or 1)
                splits = _finish(parts, written, listing, folder)
    except OSError as e:
        raise InputError(f'cannot write {folder}: {e.strerror or one_line(e)}') from e
    except KeyboardInterrupt as e:
        raise Interrupted('interrupted; the same command continues') from e
    return Prepared(folder, listing.name, splits, images, time.perf_counter() - begin)


def describe(prepared: Prepared) -> list[str]:
    """Returns the lines that report the result and how to train on it."""
    lines = []
    for split, count in prepared.splits.items():
        lines.append(
            f'{split}: {count.kept + count.converted:,} images ({count.kept:,} kept byte for byte, '
            f'{count.converted:,} converted), {count.skipped:,} skipped, {count.bytes / 1e6:,.1f} MB in '
            f'{count.shards:,} {"file" if count.shards == 1 else "files"}'
        )
    if prepared.images:
        rate = prepared.images / prepared.seconds
        lines.append(f'{prepared.images:,} images in {prepared.seconds:,.1f} s, {rate:,.0f} per second')
    else:
        lines.append(f'{prepared.folder} exists already; nothing was done')
    validation = [split for split in prepared.splits if split != 'train']
    if 'train' in prepared.splits and validation:
        imagenet = prepared.name == 'imagenet2012'
        recipe, usual = ('imagenet', 'validation') if imagenet else ('image_folder', 'val')
        split = '' if usual in validation else f' --config.data.eval_split={validation[0]}'
        lines.append(
            f'train on it: python train.py --config=configs/{recipe}.py --config.data.source=records '
            f'--config.data.dir={shlex.quote(prepared.folder)}{split} --workdir=runs/new'
        )
    return lines


def _write(
    parts: list[Shard], listing: Listing, folder: str, on_bad: str, num_workers: int
) -> tuple[dict[str, Written], int]:
    """Writes the missing shards; returns the result of every shard by file name, and the number of images."""
    found = {part.file_name: plan.read_written(folder, part, on_bad) for part in parts}
    written = {name: record for name, record in found.items() if record}
    missing = [part for part in parts if part.file_name not in written]
    images = sum(len(part.items) for part in missing)
    for part in missing:  # of images that have changed
        for path in (shards.record_path(folder, part), os.path.join(folder, part.file_name)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    seconds, classes = 0.5 if sys.stderr.isatty() else 30, len(listing.class_names)
    with tqdm(total=images, unit=' images', mininterval=seconds, disable=not missing) as bar:
        results = workers.write_shards(
            missing, folder, on_bad, classes, num_workers, done=lambda count: bar.update(count - bar.n)
        )
        with contextlib.closing(results):
            for part, record in results:
                written[part.file_name] = record
    bad = [pair for part in parts if part.file_name in written for pair in written[part.file_name].bad]
    for name, reason in bad:
        _report(f'{name}: {reason}')
    if bad and on_bad == 'stop':
        raise InputError(
            f'{len(bad)} of the images read cannot be decoded, the first is {bad[0][0]}: {bad[0][1]}; fix or '
            'remove them, or leave them out with --on-bad=skip; the same command continues'
        )
    return written, images


def _finish(
    parts: list[Shard], written: Mapping[str, Written], listing: Listing, folder: str
) -> dict[str, Counts]:
    """Writes the metadata, the report and the checksums, and removes the progress folder."""
    import tensorflow_datasets as tfds

    splits, infos = {}, []
    for split in listing.splits:
        own = [written[part.file_name] for part in parts if part.split == split]
        kept, converted = sum(w.kept for w in own), sum(w.converted for w in own)
        if not kept + converted:
            raise InputError(f'no image of {split!r} can be decoded: the split would be empty')
        size = sum(w.bytes for w in own)
        splits[split] = Counts(kept, converted, sum(len(w.bad) for w in own), size, len(own))
        infos.append(tfds.core.SplitInfo(split, [w.kept + w.converted for w in own], size))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=shards.features(class_names=listing.class_names),
        split_infos=infos,
        check_data=False,  # the check needs TensorFlow
        supervised_keys=('image', 'label'),
        description='Images and their classes, written by `epsanet prepare`.',
    )
    names = [*_DESCRIPTION, plan.REPORT]
    if bad := [pair for part in parts for pair in written[part.file_name].bad]:
        with open(os.path.join(folder, _SKIPPED), 'w', errors='surrogateescape') as f:
            f.writelines(f'{one_line(name, None)}: {reason}\n' for name, reason in bad)
        names.append(_SKIPPED)
    counts = {split: dataclasses.asdict(count) for split, count in splits.items()}
    report = {'source': listing.root, 'listing': plan.digest_of(listing), 'splits': counts}
    shards.write_json(os.path.join(folder, plan.REPORT), report)
    with open(os.path.join(folder, _CHECKSUMS), 'w') as f:
        for name in sorted([*names, *written]):
            sha256 = written[name].sha256 if name in written else shards.sha256(os.path.join(folder, name))
            f.write(f'{sha256}  {name}\n')
    plan.remove_progress(folder)
    return splits


def _report(line: str) -> None:
    print(line, file=sys.stderr)
