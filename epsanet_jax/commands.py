"""What the commands of `epsanet` do with their arguments. What each needs is imported when it runs."""

import argparse
import dataclasses
import functools
import json
import os
import sys

from epsanet_jax.errors import InputError


def convert(args: argparse.Namespace) -> None:
    """Runs `epsanet convert`."""
    from epsanet_jax.convert import command

    lines = command.convert(
        args.src, args.dst, args.model, args.num_classes, args.step, args.verify, ema=not args.no_ema
    )
    for line in lines:
        print(line)


def export(args: argparse.Namespace) -> None:
    """Runs `epsanet export`."""
    from epsanet_jax import export
    from epsanet_jax.training.compilation import use_persistent_cache

    use_persistent_cache()
    chosen = {field.name: getattr(args, field.name) for field in dataclasses.fields(export.Options)}
    for line in export.export(args.checkpoint, args.dst, export.Options(**chosen)):
        print(line)


def summary(args: argparse.Namespace) -> None:
    """Runs `epsanet summary`."""
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


def evaluate(args: argparse.Namespace) -> None:
    """Runs `epsanet evaluate`."""
    import jax

    from epsanet_jax.training import evaluation, inputs, pretrained, report, sharding, steps
    from epsanet_jax.training.compilation import use_persistent_cache
    from epsanet_jax.training.config import Config, DataConfig

    use_persistent_cache()
    loaded = pretrained.load(args.checkpoint, args.step, ema=not args.no_ema)
    config = loaded.metadata['config'] or dataclasses.asdict(Config())
    trained_on = DataConfig(**{**config['data'], **loaded.metadata['preprocessing']})
    data = inputs.evaluation_data(trained_on, args.data, args.split, args.data_dir, args.on_bad)
    source = inputs.open_source(data, data.eval_split)
    source = inputs.with_labels_of(source, loaded.metadata['class_names'], loaded.model.num_classes)
    batch_size = sharding.round_up_to_devices(args.batch_size)
    mesh = sharding.make_mesh(batch_size)
    eval_step = steps.make_eval_step(
        loaded.model, mesh, smoothing=config['label_smoothing'], mean=data.mean, std=data.std
    )
    means = evaluation.evaluate(
        eval_step,
        jax.device_put(loaded.variables, sharding.replicated(mesh)),
        source,
        data,
        mesh,
        batch_size,
        say=functools.partial(print, file=sys.stderr),
    )
    if args.json:
        about = {'checkpoint': args.checkpoint, 'step': loaded.step, 'averaged': loaded.averaged}
        print(json.dumps({**about, **means}))
    else:
        averaged = ', moving averages' if loaded.averaged else ''
        print(f'step {loaded.step}{averaged}, {report.describe(means)}')


def predict(args: argparse.Namespace) -> None:
    """Runs `epsanet predict`."""
    from epsanet_jax import predict_command

    predict_command.print_lines(
        predict_command.command(
            args.checkpoint,
            args.images,
            args.step,
            args.top,
            args.batch_size,
            args.kind,
            ema=not args.no_ema,
        )
    )


def explain(args: argparse.Namespace) -> None:
    """Runs `epsanet explain`."""
    from epsanet_jax import predict_command
    from epsanet_jax.analysis import explain_command

    predict_command.print_lines(
        explain_command.command(
            args.checkpoint,
            args.images,
            args.step,
            args.out,
            args.stages,
            args.classes,
            args.batch_size,
            ema=not args.no_ema,
        )
    )


def plan(args: argparse.Namespace) -> int:
    """Runs `epsanet plan`; returns 1 if nothing fits."""
    from epsanet_jax.analysis import plan, topology
    from epsanet_jax.training.flags import read_config

    config = read_config([*([f'--config={args.config}'] if args.config else []), *args.config_fields])
    devices = topology.open_topology(args.topology)
    say = functools.partial(print, file=sys.stderr)
    most = None
    if args.find_batch:
        most, plans = plan.find_batch(config, devices, args.batch, say)
    else:
        plans = [plan.make_plan(config, devices, args.batch, say)]
    if args.json:
        content = {'plans': [dataclasses.asdict(p) for p in plans], 'largest_batch': most}
        print(json.dumps(content if args.find_batch else dataclasses.asdict(plans[0]), indent=2))
    else:
        print('\n\n'.join('\n'.join(plan.describe(p)) for p in plans))
        if args.find_batch:
            print(f'\nlargest batch that fits: {most}, by a straight line through these two')
    return int(most == 0 if args.find_batch else plans[0].fits is False)


def plot(args: argparse.Namespace) -> None:
    """Runs `epsanet plot`."""
    from epsanet_jax.analysis import plot
    from epsanet_jax.paths import is_remote

    out = args.out or (
        'curves.png' if is_remote(args.workdirs[0]) else os.path.join(args.workdirs[0], 'curves.png')
    )
    out = os.path.expanduser(out)
    for line in plot.plot(args.workdirs, out):
        print(line)
    print(f'written: {out}')


def prepare(args: argparse.Namespace) -> None:
    """Runs `epsanet prepare`."""
    from epsanet_jax.data.prepare import dataset

    prepared = dataset.prepare(args.src, args.dst, args.on_bad, args.workers, args.name, args.labels)
    for line in dataset.describe(prepared):
        print(line)
