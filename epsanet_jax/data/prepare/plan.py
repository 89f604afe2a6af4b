"""Assigns images to shards, and finds what an earlier call has already written."""

import bisect
import fcntl
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from epsanet_jax.data.prepare import archives, shards
from epsanet_jax.data.prepare.archives import Item
from epsanet_jax.data.prepare.layouts import Listing
from epsanet_jax.data.prepare.shards import PROGRESS, Shard, Written
from epsanet_jax.errors import InputError
from epsanet_jax.paths import is_remote

SHARD_BYTES = 256 * 2**20
REPORT = 'prepare.json'  # in a finished dataset: the source it was made from
_LEAST_SHARD_BYTES, _FEW = 16 * 2**20, 8  # small datasets become up to 8 shards, for several workers
_PLAN, _LOCK = 'plan.json', 'lock'
_NAME = re.compile(r'[a-z][a-z0-9_]*')


def check_arguments(source: str, folder: str, name: str | None) -> None:
    """Checks the arguments before anything is read.

    Raises:
        InputError: the folder is inside the source, one of them is not on a disk, or the name is invalid.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise InputError(
            f'--name must consist of lower-case letters, digits and _, as in my_images, got {name!r}'
        )
    for path in (source, folder):
        if is_remote(path):
            raise InputError(f'{path} is not on a disk: prepare the dataset on a disk, then copy the folder')
    inner, outer = (os.path.realpath(os.path.expanduser(path)) for path in (folder, source))
    if os.path.commonpath([inner, outer]) == outer:
        raise InputError(f'DST must be outside of SRC: {folder} is in {source}')


def read_report(folder: str, listing: Listing) -> dict[str, Any] | None:
    """Returns the report of a finished dataset made from the same images, or None if there is no dataset.

    Raises:
        InputError: the folder holds other files, a damaged report, or a dataset made from other images.
    """
    if not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise InputError(f'{folder} is not a folder: choose another DST')
        return None
    names = set(os.listdir(folder)) - {PROGRESS}
    if not names or os.path.exists(os.path.join(folder, PROGRESS, _PLAN)):
        return None
    if REPORT not in names:
        raise InputError(
            f'{folder} holds {min(names)} and is not a dataset of this command: choose another DST'
        )
    report = _read_json(os.path.join(folder, REPORT), {'listing', 'splits'})
    if report['listing'] != digest_of(listing):
        raise InputError(
            f'{folder} was prepared from other images, from images that have changed since, or with another '
            '--name: choose another DST, or remove the folder'
        )
    return report


def _read_json(path: str, keys: Iterable[str]) -> dict[str, Any]:
    """Returns a JSON object that an earlier call wrote, which must have the keys."""
    try:
        with open(path) as f:
            content = json.load(f)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise InputError(f'{path} is damaged: choose another DST, or remove the folder')
    return content


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Creates the folder, and locks it against other processes.

    Raises:
        InputError: another process has locked it.
    """
    progress = os.path.join(folder, PROGRESS)
    os.makedirs(progress, exist_ok=True)
    with open(os.path.join(progress, _LOCK), 'w') as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(f'another process is preparing {folder}: wait for it, or stop it') from e
        _remove_partial(folder)  # files of a call that was killed
        try:
            yield
        finally:
            _remove_partial(folder)  # files of workers that were ended


def _remove_partial(folder: str) -> None:
    for place in filter(os.path.isdir, (folder, os.path.join(folder, PROGRESS))):
        for name in os.listdir(place):
            if name.endswith('.partial') or name.startswith('.tmp-'):
                os.unlink(os.path.join(place, name))


def make_shards(folder: str, listing: Listing, shard_bytes: int | None) -> list[Shard]:
    """Divides each split into shards. If a plan exists, each shard starts at the same image as before.

    So a shard does not change when images of other shards are removed or fixed.

    Raises:
        InputError: the plan is damaged, or was made for another source, name or list of splits.
    """
    path = os.path.join(folder, PROGRESS, _PLAN)
    identity = {'source': os.path.realpath(listing.root), 'name': listing.name, 'splits': [*listing.splits]}
    if os.path.exists(path):
        plan = _read_json(path, {*identity, 'starts'})
        for key, value in identity.items():
            if plan[key] != value:
                started = f'{folder} was started with the {key} {plan[key]!r}, not {value!r}'
                raise InputError(f'{started}: choose another DST, or remove the folder')
    else:
        starts = {split: _starts(items, shard_bytes) for split, items in listing.splits.items()}
        plan = {**identity, 'starts': starts}
        shards.write_json(path, plan)
    labels, made = {name: label for label, name in enumerate(listing.class_names)}, []
    for split, items in listing.splits.items():
        starts = plan['starts'][split]
        cuts = [bisect.bisect_left(items, tuple(start), key=archives.order) for start in starts]
        for index, (begin, end) in enumerate(itertools.pairwise([0, *cuts, len(items)])):
            file_name = f'{listing.name}-{split}.array_record-{index:05d}-of-{len(starts) + 1:05d}'
            own = tuple(items[begin:end])
            own_labels = tuple(labels[item.class_name] for item in own)
            names, digest = tuple(map(listing.name_of, own)), _digest([file_name], own, own_labels)
            made.append(Shard(split, file_name, own, own_labels, names, digest))
    return made


def _starts(items: list[Item], shard_bytes: int | None) -> list[tuple[str, ...]]:
    """Returns the sort key of the first image of every shard but the first one."""
    total = sum(item.size for item in items)
    size = shard_bytes or min(SHARD_BYTES, max(_LEAST_SHARD_BYTES, -(-total // _FEW)))
    number = max(1, -(-total // size))
    starts, before = [], 0
    for item in items:
        if before >= (len(starts) + 1) * total / number:
            starts.append(archives.order(item))
        before += item.size
    return starts


def digest_of(listing: Listing) -> str:
    """Returns a digest of the names, classes, sizes and times of all images, in order."""
    splits = [_digest([split], items, [0] * len(items)) for split, items in listing.splits.items()]
    return _digest([listing.name, *listing.class_names, '', *splits])


def _digest(parts: list[str], items: Sequence[Item] = (), labels: Sequence[int] = ()) -> str:
    digest = hashlib.sha256(json.dumps(parts).encode())
    for item, label in zip(items, labels, strict=True):
        digest.update(json.dumps([item.name, item.class_name, item.size, item.mtime, label]).encode())
    return digest.hexdigest()


def read_written(folder: str, shard: Shard, on_bad: str) -> Written | None:
    """Returns the result of writing a shard in an earlier call; None: the shard must be written.

    A shard that left out bad images counts only if this call may leave them out too.
    """
    path = os.path.join(folder, shard.file_name)
    try:
        with open(shards.record_path(folder, shard)) as f:
            content = json.load(f)
        written = Written(**{**content, 'bad': tuple(map(tuple, content['bad']))})
        same = written.digest == shard.digest and os.path.getsize(path) == written.bytes
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # missing or damaged
        return None
    return written if same and (on_bad == 'skip' or not written.bad) else None


def remove_progress(folder: str) -> None:
    """Removes the progress folder, the plan first: a dataset without a plan is finished."""
    progress = os.path.join(folder, PROGRESS)
    for name in sorted(os.listdir(progress), key=lambda name: name != _PLAN):
        os.unlink(os.path.join(progress, name))
    os.rmdir(progress)
