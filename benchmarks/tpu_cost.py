"""What a training step costs on a TPU, by its compiler's estimate and by its schedules; needs no TPU.

    pip install libtpu
    python benchmarks/tpu_cost.py --models epsanet50_small resnet50 --topology v5e:2x4
    python benchmarks/tpu_cost.py --models epsanet50_small resnet50 --blocks     # block by block
    python benchmarks/tpu_cost.py --models epsanet50_small resnet50 --blocks --schedule --by-op 10
    python benchmarks/tpu_cost.py --known                # the schedule where the answer is known

Compiles the step for all chips of the topology as one program. Prints the sum of the compiler's estimates for
one chip: cycles and bytes per image, temporary memory, compile time; and the bytes that go through HBM. The
body of a loop counts as often as it runs. Collectives have no estimate, and that of a custom call is written
by its author: both are listed separately. The compiler puts the batch into the 128 lanes: compare at 128
images per chip. --blocks compiles each distinct block alone instead, forward and backward, in seconds.
--by-op N also lists the N most expensive operations.

--schedule also reads the final schedules that the compiler writes (`epsanet_jax.analysis.schedule`): compute
cycles, bytes in HBM and the roofline, the larger of the two for each operation. Next to it, the estimate is a
coarse model. Compiling then takes two to four times as long, minutes for a block and hours for a step.
"""

import argparse
import dataclasses
import functools
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp

from epsanet_jax.analysis import hlo, schedule
from epsanet_jax.analysis.topology import CHIPS
from epsanet_jax.models import EPSABlock, create_model
from epsanet_jax.models.epsanet import STEM_WIDTH, EPSANet
from epsanet_jax.models.settings import of_stage, settings_of
from epsanet_jax.ops import generation
from epsanet_jax.training import sharding, steps
from epsanet_jax.training.config import DataConfig, OptimizerConfig
from epsanet_jax.training.optimizer import make_optimizer
from epsanet_jax.training.state import create_state

DATA = DataConfig()  # mean and std of the images


@dataclasses.dataclass(frozen=True)
class Measure:
    """What to report: the `by_op` most expensive operations and, if schedules are written, the roofline."""

    by_op: int = 0
    folder: str = ''  # of the schedules
    bytes_per_cycle: float = 1.0
    device_kind: str = ''  # of the chip; by default the algorithms for all TPUs are used


def main() -> None:
    """Compiles and prints."""
    args = _parse()
    with tempfile.TemporaryDirectory() as folder:
        devices, measure = begin(args.topology, folder if args.schedule or args.known else '', args.by_op)
        report(args, devices, measure)


def begin(topology: str, folder: str, by_op: int = 0) -> tuple[list[Any], Measure]:
    """Returns the devices of a topology and what to report; call it before JAX starts.

    With a folder, the compiler writes its schedules there.
    """
    bytes_per_cycle = 1.0
    if folder:
        schedule.write_schedules(folder)
        chip = CHIPS[topology.partition(':')[0]]
        if chip.clock is None:
            raise SystemExit(f'error: --schedule: the clock of {topology} is not known')
        bytes_per_cycle = chip.bandwidth / chip.clock
    devices = common.tpu_devices(topology)
    return devices, Measure(by_op, folder, bytes_per_cycle, devices[0].device_kind)


def report(args: argparse.Namespace, devices: list[Any], measure: Measure) -> None:
    """Prints the cost of each model, or of each block."""
    if args.known:
        for name, (function, shapes) in known().items():
            place = jax.sharding.SingleDeviceSharding(devices[0])
            step = jax.jit(function, in_shardings=place, out_shardings=place)
            record = compile_cost(step, shapes, args.batch_per_chip, measure)
            where = {'benchmark': 'tpu_known', 'case': name, 'topology': args.topology, **_versions()}
            common.emit({**where, **record}, args.out)
        return
    for name in args.models:
        model = create_model(name, dtype=jnp.dtype(args.dtype), conv=args.conv)
        where = {'benchmark': 'tpu_cost', 'model': name, 'conv': args.conv, 'topology': args.topology}
        where |= {'chips': len(devices), 'batch_per_chip': args.batch_per_chip, 'dtype': args.dtype}
        where |= {'image_size': args.image_size, **_versions()}
        if args.blocks:
            for layer, (block, shape) in blocks(model, args.batch_per_chip, args.image_size).items():
                if args.layers and layer not in args.layers:
                    continue
                record = block_cost(block, shape, devices[0], measure)
                common.emit({**where, 'block': layer, **record}, args.out)
        else:
            common.log(f'{name}: compiling for {len(devices)} chips')
            common.emit({**where, **step_cost(model, devices, args, measure)}, args.out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['epsanet50_small', 'resnet50'])
    parser.add_argument('--conv', default='auto', help='convolution algorithm')
    parser.add_argument('--topology', default='v5e:2x4', help='v4:2x2x1, v5p:2x2x1, v6e:2x4, ...')
    parser.add_argument('--batch-per-chip', type=int, default=128)
    parser.add_argument('--dtype', default='bfloat16')
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--blocks', action='store_true', help='separate blocks instead of the step')
    parser.add_argument('--layers', nargs='*', help='only these blocks: layer1_0, layer1_1, ...')
    parser.add_argument('--schedule', action='store_true', help='also read the schedules; slow')
    parser.add_argument('--known', action='store_true', help='schedules of cases whose answer is known')
    parser.add_argument(
        '--by-op', type=int, default=0, metavar='N', help='list the most expensive operations'
    )
    parser.add_argument('--out', type=Path, help='append the lines to this file')
    return parser.parse_args()


def _versions() -> dict[str, str]:
    import importlib.metadata

    versions = {'jax': jax.__version__}
    try:
        versions['libtpu'] = importlib.metadata.version('libtpu')
    except importlib.metadata.PackageNotFoundError:
        common.log('libtpu has no package metadata: its version is not recorded')
    return versions


def step_cost(
    model: EPSANet, devices: list[Any], args: argparse.Namespace, measure: Measure
) -> dict[str, Any]:
    """Returns the cost of the training step on all devices, with BatchNorm over the whole batch."""
    batch = args.batch_per_chip * len(devices)
    mesh = sharding.make_mesh(batch, None, devices)
    optimizer = make_optimizer(OptimizerConfig(), lambda step: 0.1)
    step: Any = steps.make_train_step(model, optimizer, mesh, smoothing=0.1, mean=DATA.mean, std=DATA.std)
    state = jax.eval_shape(lambda key: create_state(model, optimizer, key, 64), jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch, args.image_size, args.image_size, 3), jnp.uint8)
    rows = {'image': images, 'label': jax.ShapeDtypeStruct((batch,), jnp.int32)}
    return compile_cost(step, (state, rows), args.batch_per_chip, measure)


def blocks(model: EPSANet, batch: int, image_size: int) -> dict[str, tuple[EPSABlock, tuple[int, ...]]]:
    """Returns the distinct blocks of a network: module and input shape by the name of the layer."""
    found = {}
    channels, size = STEM_WIDTH, image_size // (4 if model.pools_stem else 2)
    for stage, planes in enumerate(model.planes):
        settings = of_stage(settings_of(model), stage)
        make = functools.partial(model.block_type, settings=settings, middle=model.middle)
        stride = 2 if stage or not model.pools_stem else 1
        first = make(planes, stride=stride, downsample=True)
        found[f'layer{stage + 1}_0'] = first, (batch, size, size, channels)
        channels, size = planes * model.expansion, size // stride
        found[f'layer{stage + 1}_1'] = make(planes), (batch, size, size, channels)
    return found


def block_cost(
    block: EPSABlock, shape: tuple[int, ...], device: Any, measure: Measure | None = None
) -> dict[str, Any]:
    """Returns the cost of one residual block, forward and backward, on one chip."""
    x = jax.ShapeDtypeStruct(shape, block.settings.dtype)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    y = jax.eval_shape(block.apply, variables, x)

    def forward_and_backward(variables, x, dy):
        def forward(params, x):
            both = {'params': params, 'batch_stats': variables['batch_stats']}
            return block.apply(both, x, True, mutable=['batch_stats'])

        y, pull, stats = jax.vjp(forward, variables['params'], x, has_aux=True)
        return y, pull(dy), stats

    place = jax.sharding.SingleDeviceSharding(device)
    step = jax.jit(forward_and_backward, in_shardings=place, out_shardings=place)
    return compile_cost(step, (variables, x, y), shape[0], measure or Measure())


def known() -> dict[str, tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]]:
    """Returns functions of known cost, with the shapes of their arguments, for 128 images."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    return {
        'matrix product 4096': (lambda a, b: a @ b, (array(4096, 4096), array(4096, 4096))),
        'copy 256 MB': (lambda a: -a, (array(8192, 16384),)),
        'conv 1x1 256 -> 64, 56': (convolve, (array(128, 56, 56, 256), array(1, 1, 256, 64))),
        'conv 3x3 64 -> 64, 56': (convolve, (array(128, 56, 56, 64), array(3, 3, 64, 64))),
        'conv 3x3 128 -> 128, 28': (convolve, (array(128, 28, 28, 128), array(3, 3, 128, 128))),
    }


def compile_cost(step: Any, arguments: tuple[Any, ...], images: int, measure: Measure) -> dict[str, Any]:
    """Returns what the compiler says about a function that is jitted for a chip, per image."""
    start = time.perf_counter()
    with generation.lowering_for(measure.device_kind):
        compiled = step.trace(*arguments).lower(lowering_platforms=('tpu',)).compile()
    compile_s = round(time.perf_counter() - start, 1)
    text = compiled.as_text()
    found = hlo.analyze(text)
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    record = {
        'cycles_per_image': round(found.pop('cycles') / images),
        'bytes_per_image': round(cost['bytes accessed'] / images),
        'flops_per_image': round(cost['flops'] / images),
        'temp_bytes': memory.temp_size_in_bytes,
        'compile_s': compile_s,
        **found,
    }
    kernels = schedule.read_kernels(measure.folder) if measure.folder else {}
    limits = schedule.roofline(text, kernels, measure.bytes_per_cycle)
    record['hbm_bytes_per_image'] = round(limits.hbm_bytes / images)
    if measure.folder:
        schedule.clear(measure.folder)
        for line in schedule.describe(limits.ops, measure.by_op, images) if measure.by_op else ():
            common.log(line)
        record |= {
            'schedule_cycles_per_image': round(limits.schedule_cycles / images),
            'roofline_cycles_per_image': round(limits.roofline_cycles / images),
            'unknown_loops_in_kernels': limits.unknown_loops,
            'unscheduled': limits.unscheduled,
        }
    elif measure.by_op:
        _list_most_expensive(text, measure.by_op)
    return record


def _list_most_expensive(text: str, count: int) -> None:
    """Prints the operations with the largest estimates, in thousand cycles."""
    costs: Counter[str] = Counter()
    for line in text.splitlines():
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        if cycles:
            name = re.search(r'op_name="([^"]*)"', line)
            shape = re.search(r'= \(?(\S+?\])', line)
            label = re.sub(r'jit\(\w+\)/|jvp\((\w*)\)/', '', name.group(1) if name else '?')[-90:]
            costs[f'{shape.group(1) if shape else "":28} {label}'] += int(cycles.group(1))
    for label, cycles in costs.most_common(count):
        print(f'{cycles / 1e3:10.0f}  {label}', file=sys.stderr)


if __name__ == '__main__':
    main()
