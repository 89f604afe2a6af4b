"""The command `epsanet`. Exit status 0, 2 with one line for bad usage or input, 75 if interrupted."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from epsanet_jax import commands
from epsanet_jax.errors import INTERRUPTED, InputError, Interrupted, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Args:
        argv: arguments without the program's name; None: those of this process.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if 'config_fields' in args:
        args.config_fields = [argument for argument in rest if argument.startswith('--config.')]
        rest = [argument for argument in rest if argument not in args.config_fields]
    if rest:
        parser.error(f'unrecognized arguments: {" ".join(rest)}')
    status = 0
    try:
        status = args.run(args) or 0
        sys.stdout.flush()
    except InputError as e:
        print(f'error: {one_line(e, limit=None)}', file=sys.stderr)
        return 2
    except Interrupted as e:
        print(one_line(e), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:  # where nothing is to be saved
        return 130
    return status


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the usage in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f'error: {message} (see {self.prog} --help)\n')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog='epsanet', description='EPSANet for JAX.')
    subcommands = parser.add_subparsers(required=True, metavar='COMMAND')

    _add_summary(subcommands)
    _add_evaluate(subcommands)
    _add_predict(subcommands)
    _add_explain(subcommands)
    _add_convert(subcommands)
    _add_export(subcommands)
    _add_plan(subcommands)
    _add_prepare(subcommands)
    _add_plot(subcommands)
    return parser


def _add_summary(subcommands: Any) -> None:
    summary = subcommands.add_parser(
        'summary',
        help='parameters, multiply-adds and activations of a network',
        description='Shows parameters, multiply-adds and activation memory of a network, stage by stage.',
        epilog='example: epsanet summary epsanet50_small',
    )
    summary.add_argument('name', metavar='NAME', help='a model, as in epsanet_jax.list_models()')
    summary.add_argument('--num-classes', type=_positive, default=1000, metavar='N')
    summary.add_argument('--image-size', type=_positive, default=224, metavar='PIXELS')
    summary.add_argument('--json', action='store_true', help='print JSON')
    summary.set_defaults(run=commands.summary)


def _add_evaluate(subcommands: Any) -> None:
    evaluate = subcommands.add_parser(
        'evaluate',
        help='accuracy of a checkpoint',
        description='Evaluates a checkpoint on every picture of a data set, each exactly once.',
        epilog='example: epsanet evaluate runs/digits --data digits --split test',
    )
    _add_checkpoint(evaluate)
    evaluate.add_argument(
        '--data', metavar='DIR_OR_NAME', help="an image folder or a TFDS data set; default: the run's own"
    )
    evaluate.add_argument('--split', help="folder or TFDS split; default: the run's own, or what there is")
    evaluate.add_argument('--data-dir', metavar='DIR', help='where TFDS data sets lie')
    evaluate.add_argument('--batch-size', type=_positive, default=64, metavar='N')
    evaluate.add_argument(
        '--on-bad', choices=('stop', 'skip'), default='stop', help='at a picture that cannot be decoded'
    )
    evaluate.add_argument('--json', action='store_true', help='print JSON')
    evaluate.set_defaults(run=commands.evaluate)


def _add_predict(subcommands: Any) -> None:
    predict = subcommands.add_parser(
        'predict',
        help='classes of pictures',
        description='Names the likeliest classes of pictures, prepared as the weights want them. Of folders '
        'all pictures are taken, at any depth. Those that cannot be decoded are named and skipped; exit '
        'status 2 if none could be.',
        epilog='example: epsanet predict runs/pets cat.jpg holiday/ --csv > predictions.csv',
    )
    _add_checkpoint(predict)
    _add_images(predict)
    predict.add_argument('--top', type=_positive, default=5, metavar='N', help='classes to name (default: 5)')
    kinds = predict.add_mutually_exclusive_group()
    for kind in ('json', 'csv'):
        text = f'print {kind.upper()}'
        kinds.add_argument(f'--{kind}', dest='kind', action='store_const', const=kind, help=text)
    predict.add_argument(
        '--batch-size', type=_positive, default=64, metavar='N', help='at once (default: 64)'
    )
    predict.set_defaults(run=commands.predict, kind='table')


def _add_explain(subcommands: Any) -> None:
    explain = subcommands.add_parser(
        'explain',
        help='what a network looks at, and with which kernels',
        description="Draws, for each picture, Grad-CAM and the pyramid's attention. For folders it also "
        'prints, and writes to attention.csv, the average attention of each class (subfolder).',
        epilog='example: epsanet explain runs/pets cat.jpg --out explained --stages layer3 layer4',
    )
    _add_checkpoint(explain)
    _add_images(explain)
    explain.add_argument('--out', required=True, metavar='DIR', help='for the PNG files')
    explain.add_argument(
        '--stages',
        nargs='+',
        metavar='STAGE',
        help='stem, layer1, ...: where to take Grad-CAM (default: the last stage)',
    )
    explain.add_argument(
        '--classes',
        nargs='+',
        metavar='CLASS',
        help="names or numbers of the classes to explain (default: each picture's likeliest)",
    )
    explain.add_argument('--batch-size', type=_positive, default=8, metavar='N', help='at once (default: 8)')
    explain.set_defaults(run=commands.explain)


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='a picture, or a folder of pictures')


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a workdir, a checkpoint, or a weights file')
    _add_choice_of_weights(parser)


def _add_choice_of_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--step', default='latest', help="of a workdir: 'latest' (default), 'best' or a number"
    )
    parser.add_argument(
        '--no-ema', action='store_true', help='of a run: the weights themselves, not their moving average'
    )


def _add_convert(subcommands: Any) -> None:
    convert = subcommands.add_parser(
        'convert',
        help='weights from and to PyTorch',
        description='Converts weights between PyTorch files, safetensors and checkpoints of epsanet_jax. '
        'What SRC and DST are is told by their names: .pth.tar (as the reference saves it), .pth and .pt '
        '(a bare state dict), .safetensors; anything else is a folder: a workdir or a checkpoint.',
        epilog='example: epsanet convert checkpoint.pth.tar weights.safetensors --verify',
    )
    convert.add_argument('src', metavar='SRC')
    convert.add_argument('dst', metavar='DST')
    convert.add_argument('--model', metavar='NAME', help='default: found from the shapes')
    convert.add_argument(
        '--num-classes',
        type=_positive,
        metavar='N',
        help='a classifier of another size is replaced',
    )
    _add_choice_of_weights(convert)
    convert.add_argument(
        '--verify',
        action='store_true',
        help='compare logits with those of PyTorch',
    )
    convert.set_defaults(run=commands.convert)


def _add_export(subcommands: Any) -> None:
    export = subcommands.add_parser(
        'export',
        help='StableHLO, ONNX and other files that run without epsanet_jax',
        description='Writes the network of a checkpoint for other programs: .stablehlo (any batch, for CPUs, '
        'CUDA and TPUs, weights inside; beside it a .json that describes it), .onnx, .safetensors, PyTorch '
        "(.pth, .pt, .pth.tar), or a folder in the layout of Hugging Face's Hub.",
        epilog='example: epsanet export runs/pets pets.stablehlo --step best --verify',
    )
    _add_checkpoint(export)
    export.add_argument('dst', metavar='DST', help='a new file or folder')
    export.add_argument(
        '--format',
        choices=('stablehlo', 'onnx', 'safetensors', 'torch', 'hub'),
        help="default: told by DST's name",
    )
    export.add_argument(
        '--input',
        choices=('float', 'uint8'),
        default='float',
        help='images that are normalised already (default), or pictures, normalised in the file',
    )
    export.add_argument('--image-size', type=_positive, metavar='PIXELS', help="default: the checkpoint's")
    export.add_argument(
        '--dtype',
        choices=('float32', 'bfloat16', 'float16', 'float64'),
        help="of the computation; default: the checkpoint's",
    )
    export.add_argument('--verify', action='store_true', help='compare the logits before writing')
    export.set_defaults(run=commands.export)


def _add_plan(subcommands: Any) -> None:
    plan = subcommands.add_parser(
        'plan',
        help='memory, communication and cost of a training step on devices not at hand',
        description='Compiles the training step of a recipe for a topology and shows what it needs there. '
        'TPU slices need `pip install libtpu`, but no TPU. Exit status 1 if it does not fit.',
        epilog='example: epsanet plan --config=configs/imagenet.py --topology=v5e:2x4 --batch=1024 '
        '--config.model.dtype=bfloat16',
    )
    plan.add_argument('--config', metavar='FILE', help='a recipe; its fields as --config.FIELD=VALUE')
    plan.add_argument('--topology', required=True, metavar='NAME', help='v5e:2x4, v5p:4x4x4, cpu:8, ...')
    plan.add_argument('--batch', type=_positive, metavar='N', help="global batch; default: the recipe's")
    plan.add_argument(
        '--find-batch', action='store_true', help='the largest batch that fits, from two that are compiled'
    )
    plan.add_argument('--json', action='store_true', help='print JSON')
    plan.set_defaults(run=commands.plan, config_fields=[])


def _add_prepare(subcommands: Any) -> None:
    prepare = subcommands.add_parser(
        'prepare',
        help='pictures into ArrayRecord',
        description='Writes the pictures of a folder, or of tars, as a TFDS data set in sharded ArrayRecord. '
        'SRC holds train/ and val/ with a folder or a tar a class; train.tar and val.tar of class folders; '
        'class folders; or ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar. JPEG files are kept byte for '
        'byte, others are converted. After an interruption (status 75) or a kill the same command continues.',
        epilog='example: epsanet prepare pictures records/pictures --on-bad=skip',
    )
    prepare.add_argument('src', metavar='SRC')
    prepare.add_argument('dst', metavar='DST', help='a new or empty folder')
    prepare.add_argument(
        '--on-bad', choices=('stop', 'skip'), default='stop', help='at a picture that cannot be decoded'
    )
    prepare.add_argument('--workers', type=_positive, metavar='N', help='default: as many as processors')
    prepare.add_argument(
        '--name', help="of the data set; default: 'image_folder', or 'imagenet2012' for ImageNet's own tars"
    )
    prepare.add_argument(
        '--labels',
        metavar='FILE',
        help="of ImageNet's validation: one synset a line, or the development kit; default: found in SRC",
    )
    prepare.set_defaults(run=commands.prepare)


def _add_plot(subcommands: Any) -> None:
    plot = subcommands.add_parser(
        'plot',
        help='curves of runs',
        description='Draws loss, accuracy, learning rate and images per second of one or several runs.',
        epilog='example: epsanet plot runs/a runs/b --out curves.png',
    )
    plot.add_argument('workdirs', nargs='+', metavar='WORKDIR')
    plot.add_argument(
        '--out', metavar='FILE', help=".png, .svg or .pdf; default: 'curves.png' in the first workdir"
    )
    plot.set_defaults(run=commands.plot)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'expected a whole number above 0, got {text!r}')
    return value
