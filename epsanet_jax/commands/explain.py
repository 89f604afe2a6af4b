"""`epsanet explain`: Grad-CAM and attention, drawn for each image, in tables for the classes of folders."""

import argparse
import contextlib
import csv
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from epsanet_jax.commands import common
from epsanet_jax.commands.common import shown
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.paths import check_free, write_atomically

if TYPE_CHECKING:
    from epsanet_jax.data.image_files import ImageFile

TABLE = 'attention.csv'
_LONGEST = 255  # bytes of a file name
# For each class the number of images and, for each stage, their mean attention [blocks, S].
ClassMeans = dict[str, tuple[int, dict[str, np.ndarray]]]


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'explain',
        help='Grad-CAM and attention of images',
        description='Draws Grad-CAM and the attention of the pyramids for each image. For folders it also '
        'prints the mean attention of each class (subfolder) and writes it to attention.csv.',
        epilog='example: epsanet explain runs/pets cat.jpg --out explained --stages layer3 layer4',
    )
    common.add_checkpoint(parser)
    common.add_images(parser)
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for the PNG files')
    stages = 'stages for Grad-CAM: stem, layer1, ... (default: the last stage)'
    parser.add_argument('--stages', nargs='+', metavar='STAGE', help=stages)
    classes = "names or numbers of the classes to explain (default: each image's top class)"
    parser.add_argument('--classes', nargs='+', metavar='CLASS', help=classes)
    common.add_batch_size(parser, 8)
    common.add_overwrite(parser)
    parser.set_defaults(run=run, writes_files=True)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    common.print_lines(_lines(args))


def _lines(args: argparse.Namespace) -> Iterator[str]:
    from epsanet_jax.analysis import drawing, explain
    from epsanet_jax.data.image_files import check_paths, find_images

    images, out = args.images, args.out
    check_paths(images, without=out)
    places = Places(images, out)
    written = [places.of(file) for file in find_images(images, without=out)]
    if any(map(os.path.isdir, images)):
        written.append(os.path.join(out, TABLE))
    check_free(written, args.overwrite, '--out')
    common.print_skipped(images, without=out)
    common.use_persistent_cache()
    network = common.load_network(args)
    _make_folder(out)
    tables, skipped = Tables(images), common.Skipped()
    kernels = explain.kernel_labels(network.model)
    options = (args.stages, args.classes, args.batch_size)
    rows = explain.explain(network, images, *options, on_bad=skipped, without=out)
    with contextlib.closing(rows):
        for file, explanation in common.progress(skipped.counted(rows), images, without=out):
            path = places.of(file)
            _make_folder(os.path.dirname(path))
            drawing.save(drawing.draw(explanation), path)
            tables.add(file, explanation.attention)
            best = int(explanation.probabilities.argmax())
            share = 100 * explanation.probabilities[best]
            yield f'{shown(path)}: {shown(explanation.names[best])} {share:.1f} %'
    skipped.finish()
    means = tables.means()
    if means and kernels:
        for name, (count, stages) in means.items():
            yield from ('', *table(name, count, stages, kernels))
        path = os.path.join(out, TABLE)
        write_tables(path, means, kernels)
        yield from ('', f'written: {shown(path)}')


def _make_folder(path: str) -> None:
    """Creates a folder and its parents; InputError if that is not possible."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise InputError(f'cannot create the folder {path}: {e.strerror or one_line(e)}') from e


class Places:
    """Paths of the drawings: the name of the image with .png, in the folder `out`.

    Images in a parquet file, a shard or a table are numbered.
    Images of a folder keep their subfolders. If several paths are given, each given folder gets a folder with
    its name in `out`. A name that is already in use gets a number.
    A name that would be too long with .png is cut and gets a number made of the whole name.
    """

    def __init__(self, images: Sequence[str], out: str):
        self._images, self._out = images, out
        self._names: list[str] = []
        taken = {TABLE}
        for path in images:
            name = wanted = base_name(path)
            for number in range(2, len(images) + 3):
                if name not in taken:
                    break
                name = '{0}-{2}{1}'.format(*os.path.splitext(wanted), number)
            taken.add(name)
            self._names.append(name)

    def of(self, file: 'ImageFile') -> str:
        """Returns the path of the drawing of an image."""
        name = self._names[file.argument]
        if os.path.isdir(self._images[file.argument]) or file.place is not None:
            name = file.below if len(self._images) == 1 else os.path.join(name, file.below)
        folder, last = os.path.split(f'{name}.png')
        if len(os.fsencode(last)) > _LONGEST:
            number = hashlib.sha256(os.fsencode(last)).hexdigest()[:8]
            last = os.fsencode(last)[: _LONGEST - 13].decode(errors='ignore') + f'-{number}.png'
        return os.path.join(self._out, folder, last)


def base_name(path: str) -> str:
    """Returns the name of a file or folder, also for '.' and 'x/'."""
    return os.path.basename(os.path.abspath(path)) or 'images'


class Tables:
    """Mean attention of each class in the given folders.

    A class is a direct subfolder of a given folder, with its subfolders. Images directly in a given folder
    form a class with the name of that folder.
    """

    def __init__(self, images: Sequence[str]):
        self._classes = {i: base_name(path) for i, path in enumerate(images) if os.path.isdir(path)}
        self._sums: ClassMeans = {}

    def add(self, file: 'ImageFile', attention: dict[str, np.ndarray]) -> None:
        """Adds the attention of an image, [blocks, S] for each stage, if it is in a folder."""
        if file.argument not in self._classes:
            return
        first, *below = file.below.split(os.sep)
        name = first if below else self._classes[file.argument]
        count, sums = self._sums.get(name, (0, {}))
        added = {stage: a.astype(np.float64) + sums.get(stage, 0) for stage, a in attention.items()}
        self._sums[name] = count + 1, added

    def means(self) -> ClassMeans:
        """Returns the mean attention of each class."""
        return {
            name: (count, {stage: total / count for stage, total in sums.items()})
            for name, (count, sums) in self._sums.items()
        }


def table(
    name: str, count: int, means: dict[str, np.ndarray], kernels: dict[str, list[str]]
) -> Iterator[str]:
    """Yields the lines of the table of a class: one row per block, one column per branch."""
    yield f'{shown(name)}, {count} image{"" if count == 1 else "s"}: mean attention of each kernel'
    columns = list(dict.fromkeys(label for labels in kernels.values() for label in labels))
    width = max(8, *map(len, columns)) + 2
    yield f'  {"block":<10}' + ''.join(f'{label:>{width}}' for label in columns) + '  largest'
    for stage, rows in means.items():
        for block, row in enumerate(rows):
            shares = {label: f'{value:.4f}' for label, value in zip(kernels[stage], row, strict=True)}
            values = ''.join(f'{shares.get(label, ""):>{width}}' for label in columns)
            yield f'  {f"{stage}.{block}":<10}{values}  {kernels[stage][int(row.argmax())]}'


def write_tables(path: str, means: ClassMeans, kernels: dict[str, list[str]]) -> None:
    """Writes all tables as one CSV: class, images, stage, block, branch (from 1), kernel, attention."""

    def write(temporary: str) -> None:
        with open(temporary, 'w', encoding='utf-8', errors='surrogateescape', newline='') as f:
            writer = csv.writer(f, lineterminator='\n')
            writer.writerow(('class', 'images', 'stage', 'block', 'branch', 'kernel', 'attention'))
            for name, (count, blocks) in means.items():
                for stage, rows in blocks.items():
                    for (block, branch), value in np.ndenumerate(rows):
                        size = kernels[stage][branch].partition('x')[0]
                        place = (name, count, stage, block, branch + 1, size)
                        writer.writerow((*place, f'{value:.6g}'))

    write_atomically(path, write)
