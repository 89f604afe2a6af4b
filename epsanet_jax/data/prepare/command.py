"""The command `epsanet prepare`: pictures into ArrayRecord, in TFDS's layout, without TensorFlow.

A data set that is not finished has a folder .progress: plan.json says where the shards begin, and each
finished shard has a record there. The same command takes up what is there; a shard whose pictures have
changed is written again.
"""

import contextlib
import dataclasses
import hashlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from tqdm import tqdm

from epsanet_jax.data.prepare import layouts, plan, shards, workers
from epsanet_jax.data.prepare.layouts import Listing
from epsanet_jax.data.prepare.shards import Shard, Written
from epsanet_jax.data.walk import skipped_line
from epsanet_jax.errors import InputError, Interrupted, one_line

_DESCRIPTION = ('dataset_info.json', 'features.json', 'label.labels.txt')
_SKIPPED, _CHECKSUMS = 'skipped.txt', 'checksums.sha256'


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of a split's pictures; `bytes` are those of its `shards` files."""

    kept: int
    converted: int
    skipped: int
    bytes: int
    shards: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A data set that is ready.

    Attributes:
        folder: where it lies.
        name: what TFDS calls it.
        splits: their counts.
        pictures: dealt with by this call; 0 if it was there already.
        seconds: this took.
    """

    folder: str
    name: str
    splits: Mapping[str, Counts]
    pictures: int
    seconds: float


def prepare(
    source: str,
    folder: str,
    on_bad: str = 'stop',
    num_workers: int | None = None,
    name: str | None = None,
    labels: str | None = None,
    shard_bytes: int | None = None,
) -> Prepared:
    """Writes the pictures of a folder as a TFDS data set in ArrayRecord; progress goes to stderr.

    Args:
        source: image folders or tars, see `layouts.list_source`.
        folder: of the data set: new, empty, or one that the same call has begun.
        on_bad: at pictures that cannot be decoded: 'stop', or 'skip', which leaves them out and lists them.
        num_workers: processes; None: as many as there are processors.
        name: of the data set; None: 'imagenet2012' or 'image_folder'.
        labels: of ImageNet's validation pictures, see `imagenet.read_labels`.
        shard_bytes: of pictures in a file; None: 256 MiB, less for small data sets.

    Raises:
        InputError: the source or the folder cannot be used, or a picture cannot be decoded.
        Interrupted: SIGINT or SIGTERM came; the same call continues.
    """
    plan.check_arguments(source, folder, name)
    source, folder = (os.path.abspath(os.path.expanduser(path)) for path in (source, folder))
    begin = time.perf_counter()
    try:
        with _terminated_as_interrupted():
            _say(f'listing {source} ...')
            listing = layouts.list_source(source, labels)
            listing = dataclasses.replace(listing, name=name or listing.name)
            if listing.left_alone:
                more = ' ...' if listing.left_alone[5:] else ''
                _say(f'left alone: {", ".join(listing.left_alone[:5])}{more}')
            if listing.skipped:
                _say(skipped_line(source, listing.skipped))
            report = plan.read_report(folder, listing)
            if report is not None:
                splits = {split: Counts(**counts) for split, counts in report['splits'].items()}
                return Prepared(folder, listing.name, splits, 0, 0.0)
            with plan.locked(folder):
                parts = plan.make_shards(folder, listing, shard_bytes)
                written, pictures = _write(parts, listing, folder, on_bad, num_workers or os.cpu_count() or 1)
                splits = _finish(parts, written, listing, folder)
    except OSError as e:
        raise InputError(f'cannot write {folder}: {e.strerror or one_line(e)}') from e
    except KeyboardInterrupt as e:
        raise Interrupted('stopped; the same command continues') from e
    return Prepared(folder, listing.name, splits, pictures, time.perf_counter() - begin)


def describe(prepared: Prepared) -> list[str]:
    """Returns the lines that say what was done and how to train on it."""
    lines = []
    for split, count in prepared.splits.items():
        lines.append(
            f'{split}: {count.kept + count.converted:,} pictures ({count.kept:,} kept byte for byte, '
            f'{count.converted:,} converted), {count.skipped:,} skipped, {count.bytes / 1e6:,.1f} MB in '
            f'{count.shards:,} {"file" if count.shards == 1 else "files"}'
        )
    if prepared.pictures:
        rate = prepared.pictures / prepared.seconds
        lines.append(f'{prepared.pictures:,} pictures in {prepared.seconds:,.1f} s, {rate:,.0f} a second')
    else:
        lines.append(f'{prepared.folder} is there already; nothing was done')
    held_out = [split for split in prepared.splits if split != 'train']
    if 'train' in prepared.splits and held_out:
        recipe, usual = ('image_folder', 'val')
        if prepared.name == 'imagenet2012':
            recipe, usual = ('imagenet', 'validation')
        split = '' if usual in held_out else f' --config.data.eval_split={held_out[0]}'
        lines.append(
            f'train on it: python train.py --config=configs/{recipe}.py --config.data.source=records '
            f'--config.data.dir={shlex.quote(prepared.folder)}{split} --workdir=runs/new'
        )
    return lines


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Lets SIGTERM do what SIGINT does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(
    parts: list[Shard], listing: Listing, folder: str, on_bad: str, num_workers: int
) -> tuple[dict[str, Written], int]:
    """Writes the shards that are not there yet; returns what became of all, by file, and pictures read.

    Raises:
        InputError: a picture cannot be decoded and none may be left out, or a file cannot be written.
    """
    found = {part.file_name: plan.read_written(folder, part, on_bad) for part in parts}
    written = {name: record for name, record in found.items() if record is not None}
    missing = [part for part in parts if part.file_name not in written]
    pictures = sum(len(part.items) for part in missing)
    for part in missing:  # one that has become another
        for path in (shards.record_path(folder, part), os.path.join(folder, part.file_name)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    seconds = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=pictures, unit=' pictures', mininterval=seconds, disable=not missing) as bar:

        def done(count: int) -> None:
            bar.update(count - bar.n)

        classes = len(listing.class_names)
        results = workers.write_shards(missing, folder, on_bad, classes, num_workers, done)
        with contextlib.closing(results):
            for part, record in results:
                written[part.file_name] = record
    bad = [pair for part in parts if part.file_name in written for pair in written[part.file_name].bad]
    for name, reason in bad:
        _say(f'{name}: {reason}')
    if bad and on_bad == 'stop':
        raise InputError(
            f'{len(bad)} of the pictures read cannot be decoded, the first {bad[0][0]}: {bad[0][1]}; mend or '
            'remove them, or leave them out by --on-bad=skip; the same command continues'
        )
    return written, pictures


def _finish(
    parts: list[Shard], written: dict[str, Written], listing: Listing, folder: str
) -> dict[str, Counts]:
    """Writes everything but the shards, and removes what was kept for continuing."""
    splits = {}
    for split in listing.splits:
        own = [written[part.file_name] for part in parts if part.split == split]
        kept, converted = sum(w.kept for w in own), sum(w.converted for w in own)
        if not kept + converted:
            raise InputError(f'no picture of {split!r} can be decoded: nothing is left of it')
        splits[split] = Counts(
            kept, converted, sum(len(w.bad) for w in own), sum(w.bytes for w in own), len(own)
        )
    _write_description(parts, written, listing, folder)
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
            sha256 = written[name].sha256 if name in written else _sha256(os.path.join(folder, name))
            f.write(f'{sha256}  {name}\n')
    plan.remove_progress(folder)
    return splits


def _write_description(
    parts: list[Shard], written: dict[str, Written], listing: Listing, folder: str
) -> None:
    import tensorflow_datasets as tfds

    infos = []
    for split in listing.splits:
        own = [written[part.file_name] for part in parts if part.split == split]
        infos.append(tfds.core.SplitInfo(split, [w.examples for w in own], sum(w.bytes for w in own)))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=shards.features(class_names=listing.class_names),
        split_infos=infos,
        check_data=False,  # with TensorFlow, it means
        supervised_keys=('image', 'label'),
        description='Pictures and their classes, written by `epsanet prepare`.',
    )


def _sha256(path: str) -> str:
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def _say(line: str) -> None:
    print(line, file=sys.stderr)
