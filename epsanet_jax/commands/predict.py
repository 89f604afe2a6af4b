"""`epsanet predict`: the top classes of images, as a table, CSV or JSON."""

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


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'predict',
        help='top classes of images',
        description='Shows the top classes of images, preprocessed as the weights require. All images in a '
        'folder and its subfolders are taken. Images that cannot be decoded are reported and skipped; exit '
        'status 2 if no image could be decoded.',
        epilog='example: epsanet predict runs/pets cat.jpg holiday/ --csv > predictions.csv',
    )
    common.add_checkpoint(parser)
    common.add_images(parser)
    parser.add_argument(
        '--top', type=common.positive, default=5, metavar='N', help='number of classes (default: 5)'
    )
    kinds = parser.add_mutually_exclusive_group()
    for kind in ('json', 'csv'):
        text = f'print {kind.upper()}'
        kinds.add_argument(f'--{kind}', dest='kind', action='store_const', const=kind, help=text)
    parser.add_argument(
        '--batch-size', type=common.positive, default=64, metavar='N', help='images at once (default: 64)'
    )
    parser.set_defaults(run=run, kind='table')


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    common.print_lines(_lines(args))


def _lines(args: argparse.Namespace) -> Iterator[str]:
    from epsanet_jax.analysis.predict import predict
    from epsanet_jax.data.image_files import check_paths
    from epsanet_jax.weights import load

    check_paths(args.images)  # before the weights are read, which takes longer
    common.print_skipped(args.images)
    common.use_persistent_cache()
    network = load(args.checkpoint, args.step, not args.no_ema)
    skipped = common.Skipped()
    predictions = predict(network, args.images, top=args.top, batch_size=args.batch_size, on_bad=skipped)
    with contextlib.closing(predictions):
        rows = common.progress(skipped.counted(predictions), args.images)
        yield from as_text(rows, network.labels, args.kind)
    skipped.finish()


def as_text(predictions: Iterable['Prediction'], names: Sequence[str], kind: str) -> Iterator[str]:
    """Yields predictions as text, as they come; nothing if there are none.

    Args:
        predictions: from `analysis.predict`.
        names: of all classes.
        kind: 'table'; 'csv', with the columns image, rank (from 1), class, number and probability; or
            'json', a list of {'image': path, 'predictions': [{'class', 'number', 'probability'}, ...]}.
    """
    describe = {'table': _table, 'csv': _csv, 'json': _json}[kind]
    number = -1
    for number, prediction in enumerate(predictions):
        if kind == 'csv' and number == 0:
            yield 'image,rank,class,number,probability'
        mark = '' if kind != 'json' else ',' if number else '['
        yield mark + describe(prediction, names)
    if kind == 'json' and number >= 0:
        yield ']'


def _table(prediction: 'Prediction', names: Sequence[str]) -> str:
    chosen = [shown(names[int(i)]) for i in prediction.classes]
    width = max(map(len, chosen))
    rows = (
        f'  {100 * probability:6.2f} %  {name:<{width}}'.rstrip()
        for name, probability in zip(chosen, prediction.probabilities, strict=True)
    )
    return '\n'.join((shown(prediction.path), *rows))


def _csv(prediction: 'Prediction', names: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    for rank, (number, probability) in enumerate(_pairs(prediction), start=1):
        writer.writerow((prediction.path, rank, names[number], number, probability))
    return text.getvalue().removesuffix('\n')


def _json(prediction: 'Prediction', names: Sequence[str]) -> str:
    rows = [
        {'class': names[number], 'number': number, 'probability': probability}
        for number, probability in _pairs(prediction)
    ]
    return json.dumps({'image': prediction.path, 'predictions': rows})


def _pairs(prediction: 'Prediction') -> Iterator[tuple[int, float]]:
    """Yields class and probability, with the digits that float32 has."""
    for number, probability in zip(prediction.classes, prediction.probabilities, strict=True):
        yield int(number), float(f'{probability:.7g}')
