"""Everything worth measuring on a GPU, the most important within twelve minutes.

    python benchmarks/gpu.py --out runs/gpu --images runs/images.npz  # on the GPU
    python benchmarks/gpu.py --out runs/gpu                           # again: what is missing
    python benchmarks/gpu.py --plan                                   # the parts and their times
    python benchmarks/gpu.py --adopt runs/gpu                         # rows of the table, and docs
    python benchmarks/gpu.py --pack FOLDER runs/images.npz            # images for the short training
    python benchmarks/gpu.py --rehearse --out runs/rehearsal          # all parts, tiny, on a CPU

Each part of the plan is a process with a time-out of twice its planned time. Its lines of JSON are appended
to OUT/lines.jsonl as they come, so that whatever ends the run leaves what was measured. A part that needs
more time than is left is not started. A second call with the same --out starts with what is missing, and
repeats failed parts last. OUT also holds log.txt, golden.npz, a cache of compiled programs, and a copy of the
package with the rows of the table that were measured: 'ours' is measured with it, 'stock' with XLA's own
convolutions. The lines of an earlier run as OUT/lines.jsonl let this one start with what is missing.

Nearly all of the time goes to cuDNN's choice of algorithms, 0.4 s for a convolution, and to compilation. On
an H200 eleven convolutions took 119 s; our step then compiled in 49 s, but in more than 100 s without them.

Needs a checkout, jax, flax, optax, chex, torch and numpy, and for some parts torchvision, Pillow or pytest.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # a checkout is enough

import common
import gpu_adopt
import numpy as np

from epsanet_jax.errors import InputError

MINUTES = 12
AUTOTUNING = '--xla_gpu_autotune_level=2'  # without checks of the results: programs compile sooner
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Part(NamedTuple):
    """A process of the plan.

    Attributes:
        name: its name, unique.
        seconds: planned time.
        command: script and arguments.
        rows: whether it runs with the rows of the table measured so far.
        flags: added to XLA_FLAGS.
        later: whether it is for what time is left after the plan's twelve minutes, or for a second call.
    """

    name: str
    seconds: int
    command: list[str]
    rows: bool = False
    flags: str = ''
    later: bool = False


def main() -> None:
    """Runs the plan, or does what the options say."""
    args = _parse()
    try:
        if args.pack:
            import gpu_train  # needs Pillow

            gpu_train.pack(Path(args.pack[0]), Path(args.pack[1]), args.size, args.most)
        elif args.adopt:
            for path in gpu_adopt.adopt(args.adopt, args.into or ROOT, rehearsal=args.into is not None):
                print(path)
        elif args.plan:
            show(plan(Path('OUT'), Path('IMAGES'), rehearse=False))
        elif args.images and not args.images.exists():
            raise InputError(f'no such file: {args.images}')
        else:
            run(args)
    except InputError as e:
        print(f'error: {e}', file=sys.stderr)
        raise SystemExit(2) from e


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--out', type=Path, help='folder for what is measured; run the plan')
    what.add_argument('--adopt', type=Path, metavar='OUT', help='write rows and tables into the checkout')
    what.add_argument('--pack', nargs=2, metavar=('FOLDER', 'FILE'), help='make FILE of folders of images')
    what.add_argument('--plan', action='store_true', help='show the plan')
    parser.add_argument('--minutes', type=float, default=MINUTES, help='time to use (default: %(default)s)')
    parser.add_argument('--images', type=Path, help='for the short training: a file made by --pack')
    parser.add_argument('--rehearse', action='store_true', help='all parts with tiny sizes, on a CPU')
    parser.add_argument('--into', type=Path, help='with --adopt: another folder than the checkout')
    parser.add_argument('--size', type=int, default=224, help='with --pack: height and width')
    parser.add_argument('--most', type=int, default=1600, help='with --pack: number of images')
    return parser.parse_args()


def plan(out: Path, images: Path | None, rehearse: bool) -> list[Part]:
    """Returns the parts, the most important first."""
    small = 'epsanet50_small'
    lines = ['--lines', str(out / 'lines.jsonl')]
    tests = ['gpu_parts.py', 'tests', *lines]
    on_gpu = [
        '--platforms',
        'cuda,cpu',
        '--files',
        'tests/ops/test_grouped_conv.py',
        'tests/models/test_psa.py',
    ]
    fusion = '--xla_gpu_experimental_enable_conv_fusion=true'
    stock = ['--conv', 'stock']

    def op(network: str, *more: str) -> list[str]:
        given = ['--network', 'rehearsal', '--batch', '1'] if rehearse else ['--network', network]
        return ['gpu_op.py', *given, *more, *lines]

    def step(model: str, sides: list[str], modes: list[str], batch: int = 256) -> list[str]:
        size = ['--batch', str(batch), '--dtype', 'bfloat16', '--rounds', '10', '--queued', '10']
        if rehearse:
            size = ['--batch', '2', '--image-size', '32', '--rounds', '1', '--queued', '2', '--small']
            sides = [side.removesuffix('-compiled') for side in sides]  # compiling takes a minute
        return ['train_step.py', '--model', model, '--sides', *sides, '--modes', *modes, *size]

    def train(side: str) -> list[str]:
        tiny = ['--small', '--batch', '2', '--steps', '4', '--dtype', 'float32'] if rehearse else []
        return ['gpu_train.py', '--images', str(images), '--side', side, *tiny]

    device = ['gpu_parts.py', 'device', *(['--megabytes', '4'] if rehearse else [])]
    kernels = ['gpu_parts.py', 'kernels', '--hlo', str(out / 'step.hlo')]
    kernels += ['--small', '--batch', '2'] if rehearse else []
    if rehearse:
        on_gpu = ['--files', 'tests/ops/test_materialize.py']
    parts = [
        Part('device', 12, device),
        Part('op epsanet50_small', 210, op(small)),
        Part('ours', 75, step(small, ['ours'], ['train']), rows=True),
        Part('kernels', 35, kernels, rows=True),
        Part('torch', 35, step(small, ['torch-channels-last'], ['train'])),
        Part('torch compiled', 150, step(small, ['torch-channels-last-compiled'], ['train'])),
        Part('stock', 55, [*step(small, ['ours'], ['train']), *stock]),
        Part('tests on the GPU', 30, [*tests, *on_gpu]),
        Part('torch nchw', 40, step(small, ['torch-nchw'], ['train'])),
        Part('golden', 8, ['gpu_parts.py', 'golden', '--write', str(out / 'golden.npz')]),
    ]
    compiled = 'torch-channels-last-compiled'
    every = ['torch-nchw', 'torch-channels-last', compiled]
    later = [
        Part('inference, ours', 70, step(small, ['ours'], ['inference']), rows=True),
        Part('resnet50, ours', 70, step('resnet50', ['ours'], ['train']), rows=True),
        Part('one image, ours', 50, step(small, ['ours'], ['inference'], 1), rows=True),
        Part('inference, torch', 80, step(small, every, ['inference'])),
        Part('one image, torch', 80, step(small, every, ['inference'], 1)),
        Part('training, ours', 90, train('ours'), rows=True),
        Part('training, torch', 75, train('torch')),
        Part('op resnext50', 75, op('resnext50')),
        Part('op epsanet50_large', 180, op('epsanet50_large')),
        Part('large, ours', 120, step('epsanet50_large', ['ours'], ['train']), rows=True),
        Part('large, torch', 75, step('epsanet50_large', ['torch-channels-last'], ['train'])),
        Part('large, torch compiled', 130, step('epsanet50_large', [compiled], ['train'])),
        Part('resnet50, torch', 30, step('resnet50', ['torch-channels-last'], ['train'])),
        Part('resnet50, torch compiled', 90, step('resnet50', [compiled], ['train'])),
        Part('conv fusion', 150, step(small, ['ours'], ['train']), rows=True, flags=fusion),
        Part('op epsanet50_small, others', 120, op(small, '--others')),
        Part('tests', 60, [*tests, *(['--files', 'tests/data/test_walk.py'] if rehearse else [])]),
    ]
    parts += [part._replace(later=True) for part in later]
    return [part for part in parts if images is not None or not part.name.startswith('training')]


def show(parts: list[Part]) -> None:
    """Prints the plan; parts marked as later run if there is time, or in a second call."""
    total = 0
    for part in parts:
        total += part.seconds
        print(f'{part.seconds:4} s, {total:4} in all  {part.name}{" (later)" if part.later else ""}')


def run(args: argparse.Namespace) -> None:
    """Runs the parts that are missing, until the time is up."""
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    record = Recorder(out / 'lines.jsonl')
    kinds = {line['rehearsal'] for line in record.earlier if 'rehearsal' in line}
    if kinds and kinds != {args.rehearse}:
        raise InputError(
            f'{out} holds {"a rehearsal" if True in kinds else "measurements"}: use another --out'
        )
    if args.rehearse and not args.images:
        args.images = out / 'images.npz'
        import gpu_train  # needs Pillow

        rng = np.random.default_rng(0)
        gpu_train.save(args.images, rng.integers(0, 256, (40, 32, 32, 3), np.uint8), rng.integers(0, 3, 40))
    parts = plan(out, args.images and args.images.resolve(), args.rehearse)
    ended = {line['part']: line['status'] for line in record.earlier if 'status' in line}
    missing = [part for part in parts if part.name not in ended]
    missing += [part for part in parts if ended.get(part.name, 'done') != 'done']  # again, last
    print(f'{len(parts)} parts, {len(parts) - len(missing)} done before; log: {out / "log.txt"}', flush=True)
    for i, part in enumerate(missing):
        left, name = end - time.monotonic(), f'{i + 1} of {len(missing)} {part.name}'
        if part.seconds > left:
            print(f'{name}: not started, planned {part.seconds} s, left {left:.0f} s', flush=True)
            continue
        limit = min(left, 900 if args.rehearse else 2 * part.seconds)
        status, took = start(part, out, record, limit, args.rehearse)
        after = sum(part.seconds for part in missing[i + 1 :])
        left = end - time.monotonic()
        print(f'{name}: {status} in {took:.0f} s; planned after it {after} s, left {left:.0f} s', flush=True)


class Recorder:
    """Appends records to a file of JSON lines; `earlier` holds those that were there before."""

    def __init__(self, path: Path):
        self.path, self.earlier = path, common.read_lines(path)

    def __call__(self, record: dict[str, Any]) -> None:
        """Appends a record, on a line of its own even after a line that was cut off."""
        with self.path.open('ab+') as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b'\n':
                file.write(b'\n')
            file.write(json.dumps(record).encode() + b'\n')


def start(part: Part, out: Path, record: Recorder, limit: float, rehearse: bool) -> tuple[str, float]:
    """Runs a part and records its lines and how it ended; returns its status and its seconds."""
    package = with_rows(out) if part.rows else ROOT
    flags = f'{os.environ.get("XLA_FLAGS", "")} {AUTOTUNING if not rehearse else ""} {part.flags}'.strip()
    env = {**os.environ, 'XLA_FLAGS': flags, 'PYTHONUNBUFFERED': '1', common.END_WITH_PARENT: '1'}
    env['PYTHONPATH'] = os.pathsep.join([str(package), *filter(None, [os.environ.get('PYTHONPATH')])])
    env['JAX_COMPILATION_CACHE_DIR'] = str(out / 'cache')
    env['TORCHINDUCTOR_CACHE_DIR'] = str(out / 'cache' / 'inductor')
    env |= {'JAX_PLATFORMS': 'cpu'} if rehearse else {}
    begin, late, error = time.monotonic(), threading.Event(), ''
    with (out / 'log.txt').open('ab') as log:
        log.write(f'--- {part.name}: {part.command}\n'.encode())
        log.flush()
        first = log.tell()
        with subprocess.Popen(
            [sys.executable, HERE / part.command[0], *part.command[1:]],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        ) as process:
            timer = threading.Timer(limit, lambda: (late.set(), os.killpg(process.pid, signal.SIGKILL)))
            timer.start()
            for line in process.stdout or ():
                try:
                    record({'part': part.name, 'rehearsal': rehearse, **json.loads(line)})
                except (TypeError, ValueError):
                    log.write(line)  # not one of ours
            code = process.wait()
            timer.cancel()
    took = time.monotonic() - begin
    if code:
        tail = (out / 'log.txt').read_bytes()[first:].decode(errors='replace').split('\n')
        error = next((line.strip() for line in reversed(tail) if line.strip()), '')[:500]
    status = 'done' if not code else f'stopped after {limit:.0f} s' if late.is_set() else 'failed'
    ended = {'part': part.name, 'rehearsal': rehearse, 'status': status, 'took_s': round(took, 1)}
    record({**ended, **({'exit_status': code, 'last_line': error} if code else {})})
    return status, took


def with_rows(out: Path) -> Path:
    """Copies the package with the rows measured so far; returns the folder that holds it."""
    folder = out / 'with_rows'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        ROOT / 'epsanet_jax', folder / 'epsanet_jax', ignore=shutil.ignore_patterns('__pycache__')
    )
    gpu_adopt.write_rows(common.read_lines(out / 'lines.jsonl'), folder / gpu_adopt.TABLE)
    return folder


if __name__ == '__main__':
    main()
