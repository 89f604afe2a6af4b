"""Small runs for tests: a recipe, what is in the workdir, and ways to interrupt a run or start train.py."""

import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
from fake_devices import xla_flags

from epsanet_jax.training import inputs
from epsanet_jax.training.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)

ROOT = pathlib.Path(__file__).parents[1]
TIMING = ('images_per_s', 'data_wait', 'pipeline_images_per_s')


def recipe(**changes):
    config = Config(
        batch_size=16,
        steps=6,
        log_every_steps=2,
        eval_every_epochs=0.1,
        model=ModelConfig(
            layers=(1,), planes=(8,), expansion=2, kernels=(3, 5), groups=(1, 2), reduction=2, bn_group=4
        ),
        data=DataConfig(
            source='synthetic', image_size=32, resize_size=32, synthetic_examples=300, synthetic_classes=4
        ),
        optimizer=OptimizerConfig(lr=0.05),
        # It does not depend on the number of steps: runs of any length share what is compiled.
        schedule=ScheduleConfig(name='step', step_epochs=0.25, warmup_epochs=0.1),
        checkpoint=CheckpointConfig(every_minutes=0, keep=3),
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def lines(workdir):
    """Returns the lines of metrics.jsonl without those of times."""
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return [line for line in lines if line['split'] != 'time']


def without_timing(workdir):
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines(workdir)]


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit())


def saved_state(workdir, step):
    """Returns a whole checkpoint as arrays."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(workdir / 'checkpoints') as manager:
        items = {item: ocp.args.StandardRestore() for item in ('model', 'optimizer')}
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    return jax.tree.map(np.asarray, {item: restored[item] for item in items})


def assert_equal_runs(workdir, expected, step):
    chex.assert_trees_all_equal(saved_state(workdir, step), saved_state(expected, step))
    assert without_timing(workdir) == without_timing(expected)


class Killed(BaseException):
    """Stands for anything that ends a process."""


def kill_after(monkeypatch, batches):
    """Makes the next run fail with `Killed` after that many batches."""
    original = inputs.train_batches

    def dying(*args):
        yield from itertools.islice(original(*args), batches)
        raise Killed

    monkeypatch.setattr(inputs, 'train_batches', dying)


def signal_at(monkeypatch, name, batch, number=signal.SIGTERM):
    """Sends a signal to this process when it asks for its n-th batch of training or evaluation."""
    original = getattr(inputs, name)

    def signalling(*args):
        for i, rows in enumerate(original(*args)):
            if i == batch:
                os.kill(os.getpid(), number)
            yield rows

    monkeypatch.setattr(inputs, name, signalling)


def start(config, workdir, *arguments, settings=(), prefix=(), devices=1):
    """Starts train.py, with a command in front of it if there is one; returns the process."""
    environment = {**os.environ, 'XLA_FLAGS': xla_flags(devices), 'PYTHONUNBUFFERED': '1', **dict(settings)}
    command = [sys.executable, str(ROOT / 'train.py'), f'--config={config}', f'--workdir={workdir}']
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    command = [*prefix, *command, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def start_all(
    config,
    workdir,
    processes,
    devices,
    *arguments,
    only=None,
    host='localhost',
    prefixes=((), ()),
    cache=True,
):
    """Starts the processes of a run (or only some of them), each with that many devices."""
    place, started = f'{host}:{free_port()}', []
    for i in range(processes) if only is None else only:
        joined = [f'--coordinator={place}', f'--num_processes={processes}', f'--process_id={i}']
        options = [*(joined if processes > 1 else []), *arguments]
        settings = {'JAX_ENABLE_X64': '1', 'JAX_ENABLE_COMPILATION_CACHE': str(int(cache))}
        started.append(
            start(config, workdir, *options, settings=settings, prefix=prefixes[i % 2], devices=devices)
        )
    return started


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def finish(process, status=0):
    """Waits for a process to end with an exit status; returns its stdout and stderr."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, err
    return out, err


def finish_all(processes, status=0):
    outputs = [p.communicate(timeout=600) for p in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == status, err
    return outputs


def wait_for(process, text):
    """Waits for a line of stdout with this text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f'{text!r} was never printed: {process.stderr.read()}')


def start_without_space(kibibytes, *arguments):
    """Starts a run in which writing more than so many KiB to a file fails, like on a full disk."""
    full = ('bash', '-c', f'ulimit -f {kibibytes}; exec "$@"', 'bash')
    return start(*arguments, settings={'JAX_ENABLE_COMPILATION_CACHE': '0'}, prefix=full)


def changed_config(**fields):
    """Returns a valid configuration in which fields are changed, as `data__flip=False`."""
    config = Config()
    config.data.dir = 'images'
    for name, value in fields.items():
        *path, last = name.split('__')
        owner = config
        for part in path:
            owner = getattr(owner, part)
        assert hasattr(owner, last)
        setattr(owner, last, value)
    return config


def equal_trees(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
