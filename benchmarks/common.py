"""What the benchmarks share: JSON lines with device and versions, and timing."""

import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def describe_device() -> dict[str, Any]:
    """Returns what the numbers depend on: device and versions."""
    device = jax.devices()[0]
    kind = platform.machine() if device.platform == 'cpu' else device.device_kind
    versions = {name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax')}
    return {'platform': device.platform, 'device': f'{kind} x {len(jax.devices())}', **versions}


def emit(record: dict[str, Any], out: Path | None) -> None:
    """Prints a record as one line of JSON, and appends it to a file if there is one."""
    line = json.dumps(record)
    print(line, flush=True)
    if out is not None:
        with out.open('a') as f:
            f.write(line + '\n')


def say(text: str) -> None:
    """Tells progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def seconds(run: Callable[[], Any], wait: Callable[[Any], Any], budget: float = 0.2, most: int = 7) -> float:
    """Returns the median time of `run`, after a first run that is not counted.

    Args:
        run: the work.
        wait: called with its result, returns when it is there.
        budget: seconds after which no further repetition begins.
        most: repetitions.
    """
    wait(run())
    times: list[float] = []
    while not times or (sum(times) < budget and len(times) < most):
        start = time.perf_counter()
        wait(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
