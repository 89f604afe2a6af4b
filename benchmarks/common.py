"""Shared by the benchmarks: JSON lines with device and versions, and timing."""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from epsanet_jax.analysis.topology import open_topology
from epsanet_jax.errors import InputError

END_WITH_PARENT = 'EPSANET_END_WITH_PARENT'  # environment variable, set by gpu.py for its parts
if END_WITH_PARENT in os.environ and sys.platform == 'linux':
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing goes on after gpu.py was killed

SETTINGS = ('GLIBC_TUNABLES', 'LD_PRELOAD', 'MALLOC_', 'OMP_', 'XLA_FLAGS')


def describe_device() -> dict[str, Any]:
    """Returns what the measurements depend on: device, versions, and settings of the environment."""
    device = jax.devices()[0]
    count, kind = len(jax.devices()), device.device_kind
    if device.platform == 'cpu':
        count, kind = os.cpu_count() or 1, platform.machine() + ' cores'
    versions = {name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax')}
    settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)}
    about = {'platform': device.platform, 'device': f'{count} x {kind}', **versions}
    return {**about, 'settings': settings} if settings else about


def tpu_devices(topology: str) -> list[Any]:
    """Returns the devices of a TPU topology such as 'v5e:2x4'; call it before JAX starts."""
    try:
        return open_topology(topology).devices
    except InputError as e:
        raise SystemExit(f'error: {e}') from e


def emit(record: dict[str, Any], out: Path | None) -> None:
    """Prints a record as one line of JSON and appends it to `out` if given."""
    line = json.dumps(record)
    print(line, flush=True)
    if out is not None:
        with out.open('a') as f:
            f.write(line + '\n')


def read_lines(path: Path | None) -> list[dict[str, Any]]:
    """Returns the records of a file, without a last line that was not written to its end."""
    records = []
    for line in path.read_bytes().splitlines() if path is not None and path.exists() else ():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def log(text: str) -> None:
    """Prints progress to stderr; results go to stdout."""
    print(text, file=sys.stderr, flush=True)


def seconds(run: Callable[[], Any], wait: Callable[[Any], Any], budget: float = 0.2, most: int = 7) -> float:
    """Returns the median time of `run` in seconds, after one run that is not timed.

    Args:
        run: function to measure.
        wait: called with the result of `run`; returns when the result is computed.
        budget: seconds after which no further repetition starts.
        most: largest number of repetitions.
    """
    wait(run())
    times: list[float] = []
    while not times or (sum(times) < budget and len(times) < most):
        start = time.perf_counter()
        wait(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def per_call(run: Callable[[], Any], wait: Callable[[Any], Any], budget: float = 0.02) -> float:
    """Returns the median seconds of a call of several that are started without waiting for each other."""
    wait(run())
    start = time.perf_counter()
    wait(run())
    once = time.perf_counter() - start
    return queued(run, wait, max(1, min(20, int(budget / once))), 3 if once < 5 * budget else 1)


def queued(run: Callable[[], Any], wait: Callable[[Any], Any], count: int, repetitions: int = 3) -> float:
    """Returns the median seconds of one of `count` calls that are started without waiting for each other."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(count):
            result = run()
        wait(result)
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)
