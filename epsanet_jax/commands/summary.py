"""`epsanet summary`: prints parameters, multiply-adds and activations of a network."""

import argparse
import dataclasses
import json
from typing import Any

from epsanet_jax.commands.common import add_json, positive
from epsanet_jax.errors import InputError
from epsanet_jax.platform import check_platform


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'summary',
        help='parameters, multiply-adds and activations of a network',
        description='Prints parameters, multiply-adds and activation memory of a network, per stage.',
        epilog='example: epsanet summary epsanet50_small',
    )
    parser.add_argument('name', metavar='NAME', help='model, one of epsanet_jax.list_models()')
    parser.add_argument('--num-classes', type=positive, default=1000, metavar='N')
    parser.add_argument('--image-size', type=positive, default=224, metavar='PIXELS')
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from epsanet_jax.analysis.summary import summarize
    from epsanet_jax.models import create_model, get_variant
    from epsanet_jax.models.epsanet import MIN_SIZE

    check_platform()
    if args.image_size < MIN_SIZE:
        raise InputError(f'--image-size must be at least {MIN_SIZE}, got {args.image_size}')
    rows = summarize(create_model(args.name, num_classes=args.num_classes), args.image_size)
    counts = ('params', 'multiply_adds', 'published_count', 'activation_bytes')
    total = {field: sum(getattr(row, field) for row in rows) for field in counts}
    if args.json:
        content = {'model': args.name, 'image_size': args.image_size, **total}
        print(json.dumps({**content, 'stages': [dataclasses.asdict(row) for row in rows]}, indent=2))
        return
    print(f'{args.name}, {args.num_classes} classes, {args.image_size}x{args.image_size} pixels\n')
    print(f'{"stage":<8}{"output":>18}{"parameters":>14}{"multiply-adds":>18}{"activations":>14}')
    for row in rows:
        shape = ' x '.join(map(str, row.output))
        memory = f'{row.activation_bytes / 2**20:.2f} MiB'
        print(f'{row.stage:<8}{shape:>18}{row.params:>14,}{row.multiply_adds:>18,}{memory:>14}')
    memory = f'{total["activation_bytes"] / 2**20:.2f} MiB'
    print(f'{"total":<8}{"":>18}{total["params"]:>14,}{total["multiply_adds"]:>18,}{memory:>14}\n')
    print('activations: outputs of convolutions, BatchNorms and the classifier for one image, in float32')
    print(f"multiply-adds by the paper's count, with 2 per BatchNorm output: {total['published_count']:,}")
    variant = get_variant(args.name)
    if variant.published_params:
        print(
            f'published for 1000 classes at 224 px: {variant.published_params:.2f} M, '
            f'{variant.published_flops:.2f} G, top-1 {variant.published_top1} %, '
            f'top-5 {variant.published_top5} % (no weights were published)'
        )
    elif variant.published_top1:
        print(f'published for 1000 classes at 224 px: top-1 {variant.published_top1} % (not reproduced here)')
