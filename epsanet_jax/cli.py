"""The command `epsanet`. Exit status 0, 2 with one line for bad usage or input, 75 if interrupted."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

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
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    _add_summary(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_explain(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_plan(commands)
    _add_prepare(commands)
    _add_plot(commands)
    return parser


def _add_summary(commands: Any) -> None:
    summary = commands.add_parser(
        'summary',
        help='parameters, multiply-adds and activations of a network',
        description='Shows parameters, multiply-adds and activation memory of a network, stage by stage.',
        epilog='example: epsanet summary epsanet50_small',
    )
    summary.add_argument('name', metavar='NAME', help='a model, as in epsanet_jax.list_models()')
    summary.add_argument('--num-classes', type=_positive, default=1000, metavar='N')
    summary.add_argument('--image-size', type=_positive, default=224, metavar='PIXELS')
    summary.add_argument('--json', action='store_true', help='print JSON')
    summary.set_defaults(run=_summary)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        'evaluate',
        help='accuracy of a checkpoint',
        description='Evaluates a checkpoint on every picture of a data set, each exactly once.',
        epilog='example: epsanet evaluate runs/digits --data digits --split test',
    )
    evaluate.add_argument(
        'checkpoint',
        metavar='CHECKPOINT',
        help='a workdir, a checkpoint, or a weights file',
    )
    evaluate.add_argument(
        '--data', metavar='DIR_OR_NAME', help="an image folder or a TFDS data set; default: the run's own"
    )
    evaluate.add_argument('--split', help="folder or TFDS split; default: the run's own, or what there is")
    evaluate.add_argument('--data-dir', metavar='DIR', help='where TFDS data sets lie')
    evaluate.add_argument('--batch-size', type=_positive, default=64, metavar='N')
    evaluate.add_argument('--step', default='latest', help="'latest' (default), 'best' or a number")
    evaluate.add_argument(
        '--no-ema', action='store_true', help='the weights themselves, not their moving average'
    )
    evaluate.add_argument(
        '--on-bad', choices=('stop', 'skip'), default='stop', help='at a picture that cannot be decoded'
    )
    evaluate.add_argument('--json', action='store_true', help='print JSON')
    evaluate.set_defaults(run=_evaluate)


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser(
        'predict',
        help='classes of pictures',
        description='Names the likeliest classes of pictures, prepared as the weights want them. Of folders '
        'all pictures are taken, at any depth. Those that cannot be decoded are named and skipped; exit '
        'status 2 if none could be.',
        epilog='example: epsanet predict runs/pets cat.jpg holiday/ --csv > predictions.csv',
    )
    _add_checkpoint_and_images(predict)
    predict.add_argument('--top', type=_positive, default=5, metavar='N', help='classes to name (default: 5)')
    kinds = predict.add_mutually_exclusive_group()
    for kind in ('json', 'csv'):
        text = f'print {kind.upper()}'
        kinds.add_argument(f'--{kind}', dest='kind', action='store_const', const=kind, help=text)
    predict.add_argument(
        '--batch-size', type=_positive, default=64, metavar='N', help='at once (default: 64)'
    )
    predict.set_defaults(run=_predict, kind='table')


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        'explain',
        help='what a network looks at, and with which kernels',
        description="Draws, for each picture, Grad-CAM and the pyramid's attention. For folders it also "
        'prints, and writes to attention.csv, the average attention of each class (subfolder).',
        epilog='example: epsanet explain runs/pets cat.jpg --out explained --stages layer3 layer4',
    )
    _add_checkpoint_and_images(explain)
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
    explain.set_defaults(run=_explain)


def _add_checkpoint_and_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a workdir, a checkpoint, or a weights file')
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='a picture, or a folder of pictures')
    parser.add_argument('--step', default='latest', help="'latest' (default), 'best' or a number")


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
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
    convert.add_argument('--step', default='latest', help="of a workdir: 'latest', 'best' or a number")
    convert.add_argument(
        '--no-ema', action='store_true', help='of a workdir: the weights themselves, not their moving average'
    )
    convert.add_argument(
        '--verify',
        action='store_true',
        help='compare logits with those of PyTorch',
    )
    convert.set_defaults(run=_convert)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        'export',
        help='StableHLO, ONNX and other files that run without epsanet_jax',
        description='Writes the network of a checkpoint for other programs: .stablehlo (any batch, for CPUs, '
        'CUDA and TPUs, weights inside; beside it a .json that describes it), .onnx, .safetensors, PyTorch '
        "(.pth, .pt, .pth.tar), or a folder in the layout of Hugging Face's Hub.",
        epilog='example: epsanet export runs/pets pets.stablehlo --step best --verify',
    )
    export.add_argument('checkpoint', metavar='CHECKPOINT', help='a workdir, a checkpoint, or a weights file')
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
    export.add_argument('--step', default='latest', help="of a workdir: 'latest', 'best' or a number")
    export.add_argument('--verify', action='store_true', help='compare the logits before writing')
    export.set_defaults(run=_export)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
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
    plan.set_defaults(run=_plan, config_fields=[])


def _add_prepare(commands: Any) -> None:
    prepare = commands.add_parser(
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
    prepare.set_defaults(run=_prepare)


def _add_plot(commands: Any) -> None:
    plot = commands.add_parser(
        'plot',
        help='curves of runs',
        description='Draws loss, accuracy, learning rate and images per second of one or several runs.',
        epilog='example: epsanet plot runs/a runs/b --out curves.png',
    )
    plot.add_argument('workdirs', nargs='+', metavar='WORKDIR')
    plot.add_argument(
        '--out', metavar='FILE', help=".png, .svg or .pdf; default: 'curves.png' in the first workdir"
    )
    plot.set_defaults(run=_plot)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'expected a whole number above 0, got {text!r}')
    return value


def _convert(args: argparse.Namespace) -> None:
    from epsanet_jax.convert import command

    lines = command.convert(
        args.src, args.dst, args.model, args.num_classes, args.step, args.verify, ema=not args.no_ema
    )
    for line in lines:
        print(line)


def _export(args: argparse.Namespace) -> None:
    from epsanet_jax import export
    from epsanet_jax.training.compilation import use_persistent_cache

    use_persistent_cache()
    chosen = {field.name: getattr(args, field.name) for field in dataclasses.fields(export.Options)}
    for line in export.export(args.checkpoint, args.dst, export.Options(**chosen)):
        print(line)


def _summary(args: argparse.Namespace) -> None:
    from epsanet_jax.analysis.summary import summarize
    from epsanet_jax.models import create_model, get_variant
    from epsanet_jax.models.epsanet import MIN_SIZE

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
    print('activations: what convolutions, BatchNorms and the classifier give for one picture, in float32')
    print(f"by the paper's count, 2 more for each BatchNorm output: {total['published_count']:,}")
    variant = get_variant(args.name)
    if variant.published_params:
        print(
            f'published for 1000 classes at 224 px: {variant.published_params:.2f} M, '
            f'{variant.published_flops:.2f} G, top-1 {variant.published_top1} %, '
            f'top-5 {variant.published_top5} % (no weights were published)'
        )


def _evaluate(args: argparse.Namespace) -> None:
    import jax

    from epsanet_jax.training import evaluation, inputs, parallel, pretrained, report, steps
    from epsanet_jax.training.compilation import use_persistent_cache
    from epsanet_jax.training.config import Config, DataConfig

    use_persistent_cache()
    loaded = pretrained.load(args.checkpoint, args.step, ema=not args.no_ema)
    config = loaded.metadata['config'] or dataclasses.asdict(Config())
    trained_on = DataConfig(**{**config['data'], **loaded.metadata['preprocessing']})
    data = inputs.evaluation_data(trained_on, args.data, args.split, args.data_dir, args.on_bad)
    source = inputs.open_source(data, data.eval_split)
    source = inputs.with_labels_of(source, loaded.metadata['class_names'], loaded.model.num_classes)
    batch_size = parallel.round_up_to_devices(args.batch_size)
    mesh = parallel.make_mesh(batch_size)
    eval_step = steps.make_eval_step(
        loaded.model, mesh, smoothing=config['label_smoothing'], mean=data.mean, std=data.std
    )
    means = evaluation.evaluate(
        eval_step,
        jax.device_put(loaded.variables, parallel.replicated(mesh)),
        source,
        data,
        mesh,
        batch_size,
        say=lambda text: print(text, file=sys.stderr),
    )
    if args.json:
        print(json.dumps({'checkpoint': args.checkpoint, 'step': loaded.step, **means}))
    else:
        print(f'step {loaded.step}, {report.describe(means)}')


def _predict(args: argparse.Namespace) -> None:
    from epsanet_jax import predict_command

    predict_command.print_lines(
        predict_command.command(args.checkpoint, args.images, args.step, args.top, args.batch_size, args.kind)
    )


def _explain(args: argparse.Namespace) -> None:
    from epsanet_jax import predict_command
    from epsanet_jax.analysis import explain_command

    predict_command.print_lines(
        explain_command.command(
            args.checkpoint, args.images, args.step, args.out, args.stages, args.classes, args.batch_size
        )
    )


def _plan(args: argparse.Namespace) -> int:
    from epsanet_jax.analysis import plan, topology
    from epsanet_jax.training.flags import read_config

    config = read_config([*([f'--config={args.config}'] if args.config else []), *args.config_fields])
    devices = topology.open_topology(args.topology)
    print(f'compiling for {args.topology}: minutes for a large network ...', file=sys.stderr)
    most = None
    if args.find_batch:
        most, plans = plan.find_batch(config, devices, args.batch)
    else:
        plans = [plan.make_plan(config, devices, args.batch)]
    if args.json:
        content = {'plans': [dataclasses.asdict(p) for p in plans], 'largest_batch': most}
        print(json.dumps(content if args.find_batch else dataclasses.asdict(plans[0]), indent=2))
    else:
        print('\n\n'.join('\n'.join(plan.describe(p)) for p in plans))
        if args.find_batch:
            print(f'\nlargest batch that fits: {most}, by a straight line through these two')
    return int(most == 0 if args.find_batch else plans[0].fits is False)


def _plot(args: argparse.Namespace) -> None:
    from epsanet_jax.analysis import plot

    out = args.out or os.path.join(args.workdirs[0], 'curves.png')
    for line in plot.plot(args.workdirs, out):
        print(line)
    print(f'written: {out}')


def _prepare(args: argparse.Namespace) -> None:
    from epsanet_jax.data.prepare import command

    prepared = command.prepare(args.src, args.dst, args.on_bad, args.workers, args.name, args.labels)
    for line in command.describe(prepared):
        print(line)
