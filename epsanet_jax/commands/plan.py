"""`epsanet plan`: compiles a training step for devices that need not exist here."""

import argparse
import dataclasses
import json
import tempfile
from typing import Any

from epsanet_jax.commands.common import add_json, positive, to_stderr
from epsanet_jax.errors import InputError
from epsanet_jax.platform import check_platform


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'plan',
        help='memory, communication and cost of a training step on devices that you do not have',
        description='Compiles the training step of a recipe for a topology and prints memory, communication '
        'and cost. TPU slices need `pip install libtpu`, but no TPU. Exit status 1 if the step does not fit.',
        epilog='example: epsanet plan --config=configs/imagenet.py --topology=v5e:2x4 --batch=1024 '
        '--config.model.dtype=bfloat16',
    )
    parser.add_argument(
        '--config', metavar='FILE', help='recipe; change its fields with --config.FIELD=VALUE'
    )
    parser.add_argument('--topology', required=True, metavar='NAME', help='v5e:2x4, v5p:4x4x4, cpu:8, ...')
    parser.add_argument('--batch', type=positive, metavar='N', help="global batch; default: the recipe's")
    text = 'estimate the largest batch that fits, from two compilations'
    parser.add_argument('--find-batch', action='store_true', help=text)
    text = "also read the TPU compiler's schedules, for the roofline; compiling takes several times as long"
    parser.add_argument('--schedule', action='store_true', help=text)
    add_json(parser)
    parser.set_defaults(run=run, config_fields=[])


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 if nothing fits."""
    from epsanet_jax.analysis import plan, schedule, topology
    from epsanet_jax.training import tracing
    from epsanet_jax.training.flags import read_config
    from epsanet_jax.training.validation import validate

    config = read_config([*([f'--config={args.config}'] if args.config else []), *args.config_fields])
    validate(config, with_data=False)
    if args.schedule and args.find_batch:
        raise InputError('--schedule reads one compilation and --find-batch needs two: give one of them')
    folder = tempfile.TemporaryDirectory() if args.schedule else None
    if folder:
        schedule.write_schedules(folder.name)
    place = topology.open_topology(args.topology)
    check_platform()  # after the topology, which may set the number of CPU devices
    name, batch = config.model.name, args.batch or config.batch_size

    def lower(batch: int) -> Any:
        changed = dataclasses.replace(config, batch_size=batch)
        return tracing.lower_train_step(changed, place.devices, place.platform)

    def divides(batch: int) -> bool:
        return tracing.divides(dataclasses.replace(config, batch_size=batch), place.devices)

    most = None
    if args.find_batch:
        unit = len(place.devices) * config.gradient_accumulation_steps
        most, plans = plan.find_batch(lower, divides, name, batch, unit, place, to_stderr)
    else:
        schedules = folder.name if folder else None
        plans = [plan.make_plan(lower, name, batch, place, to_stderr, schedules)]
    if folder:
        folder.cleanup()
    if args.json:
        content = {'plans': [dataclasses.asdict(p) for p in plans], 'largest_batch': most}
        print(json.dumps(content if args.find_batch else dataclasses.asdict(plans[0]), indent=2))
    else:
        print('\n\n'.join('\n'.join(plan.describe(p)) for p in plans))
        if args.find_batch:
            print(f'\nlargest batch that fits: {most}, by linear extrapolation of these two')
    return int(most == 0 if args.find_batch else plans[0].fits is False)
