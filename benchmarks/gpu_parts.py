"""Parts of `gpu.py`: the device, the kernels of a training step, the tests, golden outputs of torchvision.

    python benchmarks/gpu_parts.py device
    python benchmarks/gpu_parts.py kernels
    python benchmarks/gpu_parts.py tests --files tests/ops/test_bilinear.py
    python benchmarks/gpu_parts.py golden --write golden.npz

Each prints lines of JSON. Packages that only one part needs are imported there.
"""

import argparse
import collections
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import common

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # leave GPU memory for PyTorch

import jax
import jax.numpy as jnp
import numpy as np
import train_step

from epsanet_jax.commands.common import use_persistent_cache

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ('ops', 'layers', 'models', 'convert', 'data', 'analysis', 'weights')  # without training


def main() -> None:
    """Runs a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = parser.add_subparsers(required=True, metavar='PART')
    part = parts.add_parser('device', help='its bandwidth and rate, and a small training step')
    part.add_argument('--megabytes', type=int, default=2048, help='size of the copied array')
    part.set_defaults(run=check_device)
    part = parts.add_parser('kernels', help='the kernels of our training step that take most time')
    part.add_argument('--model', default='epsanet50_small')
    part.add_argument('--small', action='store_true', help='as in train_step.py')
    part.add_argument('--batch', type=int, default=256)
    part.add_argument('--most', type=int, default=60, help='number of kernels')
    part.add_argument('--hlo', type=Path, help='write the compiled program to this file')
    part.set_defaults(run=list_kernels, image_size=224, dtype='bfloat16', conv='auto')
    part = parts.add_parser('tests', help='test files, each in a process')
    part.add_argument('--files', nargs='+', type=Path, help='by default those of most folders')
    part.add_argument('--platforms', default='cpu', help="such as 'cuda,cpu'; the first one is used")
    part.add_argument('--lines', type=Path, help='lines of earlier calls; files in it are not repeated')
    part.set_defaults(run=run_tests)
    part = parts.add_parser('golden', help="outputs of torchvision's transforms")
    part.add_argument('--write', type=Path, required=True, help='an .npz file')
    part.set_defaults(run=write_golden)
    args = parser.parse_args()
    args.run(args)


def check_device(args: argparse.Namespace) -> None:
    """Measures a copy and a matrix product, and runs a training step of a small network."""
    side, count = 512 if args.megabytes < 100 else 8192, args.megabytes * 2**20 // 2
    array = jax.random.normal(jax.random.key(0), (count,), jnp.bfloat16)
    square = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    copy, multiply = jax.jit(jnp.negative), jax.jit(jnp.dot)
    copied = common.per_call(lambda: copy(array), jax.block_until_ready)
    product = common.per_call(lambda: multiply(square, square), jax.block_until_ready)
    record = {'benchmark': 'gpu_device', **common.describe_device()}
    record |= {'tb_per_s': round(4 * count / copied / 1e12, 4), 'tflops': round(2e-12 * side**3 / product, 3)}
    common.emit(record, None)

    settings = argparse.Namespace(model='epsanet50_small', small=True, batch=2, image_size=32)
    settings.dtype, settings.conv, facts = 'float32', 'auto', {}
    train_step.ours(settings, 'train', facts)()
    common.emit({'benchmark': 'gpu_device', 'small_train_step': 'runs', **facts}, None)


def list_kernels(args: argparse.Namespace) -> None:
    """Runs our training step under the profiler and prints its kernels, in ms for a step."""
    use_persistent_cache()
    run, steps = train_step.ours(args, 'train', {}, args.hlo), 2
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                run()
        files = Path(folder).rglob('*.trace.json.gz')
        traces = [json.loads(gzip.decompress(path.read_bytes())) for path in files]
    events = [event for trace in traces for event in trace['traceEvents'] if 'pid' in event]
    threads = [e for e in events if e['name'] == 'thread_name']
    names = {(e['pid'], e['tid']): e['args']['name'] for e in threads}
    on_gpu = jax.devices()[0].platform == 'gpu'
    took: collections.Counter[tuple[str, str]] = collections.Counter()
    for event in (e for e in events if e['ph'] == 'X'):
        if not on_gpu or 'Stream' in names.get((event['pid'], event['tid']), ''):
            took[event['name'][:200], event.get('args', {}).get('name', '')[-200:]] += event['dur']
    record = {
        'benchmark': 'gpu_kernels',
        **common.describe_device(),
        'model': args.model,
        'batch': args.batch,
    }
    common.emit({**record, 'all_ms': round(sum(took.values()) / steps / 1e3, 3)}, None)
    for (kernel, source), total in took.most_common(args.most):
        ms = round(total / steps / 1e3, 3)
        common.emit({'benchmark': 'gpu_kernels', 'kernel_name': kernel, 'source': source, 'ms': ms}, None)


def run_tests(args: argparse.Namespace) -> None:
    """Runs test files side by side; those whose imports need a missing package are reported as left out."""
    files = args.files or [
        p.relative_to(ROOT) for f in FOLDERS for p in sorted(ROOT.glob(f'tests/{f}/**/test_*.py'))
    ]
    done = {(line.get('file'), line.get('platforms')) for line in common.read_lines(args.lines)}
    missing = [path for path in files if (str(path), args.platforms) not in done]

    def run(path: Path) -> dict[str, Any]:
        start = time.perf_counter()
        command = [sys.executable, '-m', 'pytest', '-o', 'addopts=-q', '-rfE', '--tb=line', '-m']
        # Without the flags of tests/fake_devices.py for fast compilation: a newer JAX may not know them.
        env = {**os.environ, 'EPSANET_TESTS_OPTIMIZE': '1', 'EPSANET_TESTS_PLATFORMS': args.platforms}
        # Without TensorFloat-32, whose products have the precision of 10 bits.
        env |= {'JAX_DEFAULT_MATMUL_PRECISION': 'highest', 'COLUMNS': '200'}
        command += ['not slow and not faults', str(path)]
        process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        record = {'file': str(path), 'platforms': args.platforms, **outcome(process.stdout + process.stderr)}
        return {**record, 'took_s': round(time.perf_counter() - start, 1)}

    about = {'benchmark': 'gpu_tests', 'python': sys.version.split()[0], 'jax': jax.__version__}
    at_once = max(1, (os.cpu_count() or 1) // 2)
    with ThreadPoolExecutor(at_once) as pool:
        for future in as_completed([pool.submit(run, path) for path in missing]):
            common.emit({**about, **future.result()}, None)


def outcome(output: str) -> dict[str, Any]:
    """Returns the numbers of passed and failed tests and the first failures, from pytest's output."""
    absent = re.search(r"ModuleNotFoundError: No module named '(\w+)", output)
    counts = {
        word: int(found[1]) if (found := re.search(rf'(\d+) {word}', output)) else 0
        for word in ('passed', 'failed', 'skipped', 'error')
    }
    if absent and not counts['passed'] + counts['failed']:
        return {'left_out': f'needs the package {absent[1]}'}
    failures = [line[:300] for line in output.splitlines() if line.startswith(('FAILED', 'ERROR'))]
    if not any(counts.values()):
        failures.append(' '.join(output.split())[-300:])
    return {**counts, 'failures': failures[:10]}


def write_golden(args: argparse.Namespace) -> None:
    """Writes images, torchvision's outputs for them, and prints how far ours differ."""
    try:
        import torchvision
        from torchvision.transforms import InterpolationMode, autoaugment
        from torchvision.transforms import functional as F  # noqa: N812
    except ImportError as e:
        common.emit({'benchmark': 'gpu_golden', 'skipped': f'torchvision cannot be imported: {e}'}, None)
        return
    from PIL import Image

    from epsanet_jax.data import randaugment
    from epsanet_jax.data.transforms import CentreCrop, adjust_hue

    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    about = {'benchmark': 'gpu_golden', 'torchvision': torchvision.__version__}

    def compare(name: str, theirs: Any, ours: Callable[[], Any]) -> None:
        arrays[name] = np.asarray(theirs)
        try:
            difference = np.abs(np.asarray(ours()).astype(int) - arrays[name].astype(int))
            common.emit({**about, 'transform': name, 'largest_difference': int(difference.max())}, None)
        except Exception as e:  # the golden output is kept
            common.emit({**about, 'transform': name, 'failed': f'{type(e).__name__}: {e}'[:300]}, None)

    for width, height in ((60, 45), (33, 70), (24, 24), (101, 26)):
        size = f'{width}x{height}'
        arrays[f'{size} pixels'] = rng.integers(0, 256, (height, width, 3), np.uint8)
        image = Image.fromarray(arrays[f'{size} pixels'])
        theirs = F.center_crop(F.resize(image, 32, InterpolationMode.BILINEAR), [24, 24])
        compare(f'CentreCrop {size}', theirs, lambda i=image: CentreCrop(24, 32)(i))
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((24, 16))
    arrays['pixels'] = np.asarray(image)
    for turn in (-0.5, -0.1, 0.03, 0.4):
        compare(f'hue {turn}', F.adjust_hue(image, turn), lambda t=turn: adjust_hue(image, t))
    for name, (magnitudes, signed) in randaugment.augmentation_space(31, *image.size).items():
        signs = (1, -1) if signed else (1,)
        for magnitude in dict.fromkeys(sign * magnitudes[i] for i in (9, 30) for sign in signs):
            # torchvision's own function applies an operation of its RandAugment.
            theirs = autoaugment._apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)
            compare(
                f'{name} {magnitude!r}', theirs, lambda n=name, m=magnitude: randaugment.apply_op(image, n, m)
            )
    np.savez_compressed(args.write, **arrays)


if __name__ == '__main__':
    main()
