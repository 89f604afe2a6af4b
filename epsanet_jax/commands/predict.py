"""`epsanet predict`: prints the top classes of images, as a table, CSV or JSON."""

import argparse
import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from epsanet_jax.commands import common
from epsanet_jax.commands.common import shown

if TYPE_CHECKING:
    from epsanet_jax.analysis.predict import Prediction

_Row = tuple[str, int, float]  # class name, class number, probability


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'predict',
        help='top classes of images',
        description='Prints the top classes of images. Folders are searched with their subfolders. Images '
        'that cannot be decoded are reported and skipped; exit status 2 if no image could be decoded.',
        epilog='example: epsanet predict runs/pets cat.jpg holiday/ --csv > predictions.csv',
    )
    common.add_checkpoint(parser)
    common.add_images(parser)
    top = 'number of classes (default: 5)'
    parser.add_argument('--top', type=common.positive, default=5, metavar='N', help=top)
    kinds = parser.add_mutually_exclusive_group()
    for kind in ('json', 'csv'):
        text = f'print {kind.upper()}'
        kinds.add_argument(f'--{kind}', dest='kind', action='store_const', const=kind, help=text)
    common.add_batch_size(parser, 64)
    parser.set_defaults(run=run, kind='table')


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    common.print_lines(_lines(args))


def _lines(args: argparse.Namespace) -> Iterator[str]:
    from epsanet_jax.analysis.predict import predict
    from epsanet_jax.data.image_files import check_paths

    check_paths(args.images)  # first, because reading the weights takes longer
    common.print_skipped(args.images)
    common.use_persistent_cache()
    network = common.load_network(args)
    skipped = common.Skipped()
    predictions = predict(network, args.images, top=args.top, batch_size=args.batch_size, on_bad=skipped)
    with contextlib.closing(predictions):
        rows = common.progress(skipped.counted(predictions), args.images)
        yield from as_text(rows, network.labels, args.kind)
    skipped.finish()


def as_text(predictions: Iterable['Prediction'], names: Sequence[str], kind: str) -> Iterator[str]:
    """Yields predictions as text, one at a time; nothing if there are none.

    Args:
        predictions: predictions from `analysis.predict`.
        names: names of all classes.
        kind: 'table'; 'csv', with the columns image, rank (from 1), class, number and probability; or
            'json', a list of {'image': path, 'predictions': [{'class', 'number', 'probability'}, ...]}.
    """
    describe = {'table': _table, 'csv': _csv, 'json': _json}[kind]
    number = -1
    for number, prediction in enumerate(predictions):
        if kind == 'csv' and number == 0:
            yield 'image,rank,class,number,probability'
        mark = '' if kind != 'json' else ',' if number else '['
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        # 7 digits: the precision of float32
        rows = [(names[int(i)], int(i), float(f'{probability:.7g}')) for i, probability in pairs]
        yield mark + describe(prediction.path, rows)
    if kind == 'json' and number >= 0:
        yield ']'


def _table(path: str, rows: Sequence[_Row]) -> str:
    return '\n'.join((shown(path), *(f'  {100 * share:6.2f} %  {shown(name)}' for name, _, share in rows)))


def _csv(path: str, rows: Sequence[_Row]) -> str:
    text = io.StringIO()
    ranked = ((path, rank, *row) for rank, row in enumerate(rows, start=1))
    csv.writer(text, lineterminator='\n').writerows(ranked)
    return text.getvalue().removesuffix('\n')


def _json(path: str, rows: Sequence[_Row]) -> str:
    keys = ('class', 'number', 'probability')
    return json.dumps({'image': path, 'predictions': [dict(zip(keys, row, strict=True)) for row in rows]})
