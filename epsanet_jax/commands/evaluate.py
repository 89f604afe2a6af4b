"""`epsanet evaluate`: evaluates a checkpoint."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from epsanet_jax.commands import common


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'evaluate',
        help='loss and accuracy of a checkpoint',
        description='Computes loss and accuracy of a checkpoint on a dataset, with each image exactly once.',
        epilog='example: epsanet evaluate runs/digits --data digits --split test',
    )
    common.add_checkpoint(parser)
    text = "folder or file of images, or TFDS dataset (default: the run's)"
    parser.add_argument('--data', metavar='PATH_OR_NAME', help=text)
    parser.add_argument('--split', help="folder or TFDS split (default: the run's, else val or test)")
    parser.add_argument('--data-dir', metavar='DIR', help='folder that holds TFDS datasets')
    common.add_label_column(parser)
    common.add_batch_size(parser, 64)
    common.add_on_bad(parser)
    parser.add_argument(
        '--per-class', action='store_true', help='also print accuracy and precision per class'
    )
    text = 'write the confusion matrix: .csv, .png, .svg or .pdf'
    parser.add_argument('--confusion', nargs='+', default=[], metavar='FILE', help=text)
    common.add_overwrite(parser)
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    import numpy as np

    from epsanet_jax.analysis import confusion
    from epsanet_jax.paths import check_free
    from epsanet_jax.training.evaluation import evaluate
    from epsanet_jax.training.report import describe

    for path in args.confusion:
        confusion.check_suffix(path)
    check_free(args.confusion, args.overwrite, '--confusion')
    common.use_persistent_cache()
    network = common.load_network(args)
    dataset = (args.data, args.split, args.data_dir)
    counted = bool(args.per_class or args.confusion)
    counts = np.zeros([network.model.num_classes if counted else 0] * 2, np.int64)
    options = (args.batch_size, args.on_bad, common.to_stderr, args.label_column)
    means = evaluate(network, *dataset, *options, confusion=counts if counted else None)
    for path in args.confusion:
        confusion.write(path, counts, network.labels)
    classes = confusion.per_class(counts, network.labels) if args.per_class else []
    source = network.source
    if args.json:
        about = {'checkpoint': args.checkpoint, 'step': source.step, 'averaged': source.averaged}
        print(json.dumps({**about, **means, **({'classes': classes} if classes else {})}))
    else:
        averaged = ', moving averages' if source.averaged else ''
        common.print_lines(_table(classes))
        print(f'step {source.step}{averaged}, {describe(means)}')


def _table(classes: list[dict[str, Any]]) -> Iterator[str]:
    if classes:
        yield '  images  accuracy  precision  class'
    for row in classes:
        shares = (row['accuracy'], row['precision'])
        accuracy, precision = ('-' if share is None else f'{100 * share:.2f} %' for share in shares)
        name, other = row['class'], row['confused_with']
        confused = f'  (most often wrong as {common.shown(other)}: {row["confused"]})' if other else ''
        yield f'{row["images"]:8}{accuracy:>10}{precision:>11}  {common.shown(name)}{confused}'
