"""`epsanet prepare`: writes images as a dataset in ArrayRecord."""

import argparse
from typing import Any

from epsanet_jax.commands.common import add_label_column, add_on_bad, positive


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'prepare',
        help='write images as a dataset in ArrayRecord',
        description='Writes the images of a folder or of tar files as a TFDS dataset in sharded ArrayRecord. '
        'SRC holds train/ and val/ with one folder or tar file per class; train.tar and val.tar of class '
        'folders; class folders; ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; or parquet files, '
        'WebDataset shards, or images with a CSV or JSONL table of labels. JPEG files are copied '
        'unchanged, other formats are converted. After an interruption (status 75) or a crash, the same '
        'command continues.',
        epilog='example: epsanet prepare images records/images --on-bad=skip',
    )
    parser.add_argument('src', metavar='SRC')
    parser.add_argument('dst', metavar='DST', help='a new or empty folder')
    add_on_bad(parser)
    workers = 'number of processes (default: the number of processors)'
    parser.add_argument('--workers', type=positive, metavar='N', help=workers)
    name = "name of the dataset (default: 'image_folder', or 'imagenet2012' for ImageNet's tar files)"
    parser.add_argument('--name', help=name)
    labels = "labels of ImageNet's validation images, one synset per line (default: the list of TFDS)"
    parser.add_argument('--labels', metavar='FILE', help=labels)
    add_label_column(parser)
    parser.set_defaults(run=run, writes_files=True)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from epsanet_jax.data.prepare import dataset

    options = (args.on_bad, args.workers, args.name, args.labels)
    prepared = dataset.prepare(args.src, args.dst, *options, label_column=args.label_column or '')
    for line in dataset.describe(prepared):
        print(line)
