"""`epsanet export`: writes a network for other programs."""

import argparse
import dataclasses
from typing import Any

from epsanet_jax.commands.common import (
    add_checkpoint,
    add_overwrite,
    positive,
    report_on,
    use_persistent_cache,
)


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'export',
        help='write a network as StableHLO, ONNX, safetensors or for PyTorch',
        description='Writes the network of a checkpoint for other programs: .stablehlo (with the weights, '
        'for any batch size, on CPUs, CUDA and TPUs; a .json file next to it describes it), .onnx, '
        ".safetensors, PyTorch (.pth, .pt, .pth.tar), or a folder in the layout of Hugging Face's Hub.",
        epilog='example: epsanet export runs/pets pets.stablehlo --step best --verify',
    )
    add_checkpoint(parser)
    parser.add_argument('dst', metavar='DST', help='a new file or folder')
    formats = ('stablehlo', 'onnx', 'safetensors', 'torch', 'hub')
    parser.add_argument('--format', choices=formats, help='default: selected by the name of DST')
    text = 'normalised images (default), or uint8 images that the exported function normalises'
    parser.add_argument('--input', choices=('float', 'uint8'), default='float', help=text)
    parser.add_argument('--image-size', type=positive, metavar='PIXELS', help="default: the checkpoint's")
    dtypes = ('float32', 'bfloat16', 'float16', 'float64')
    parser.add_argument('--dtype', choices=dtypes, help="type of the computation; default: the checkpoint's")
    parser.add_argument('--verify', action='store_true', help='compare the logits before writing')
    add_overwrite(parser)
    parser.set_defaults(run=run, writes_files=True)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from epsanet_jax.weights import export

    use_persistent_cache()
    chosen = {field.name: getattr(args, field.name) for field in dataclasses.fields(export.Options)}
    report = report_on(args.checkpoint)
    for line in export.export(args.checkpoint, args.dst, export.Options(**chosen), report):
        print(line)
