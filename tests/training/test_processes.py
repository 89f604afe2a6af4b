"""Runs of several processes, with fake devices and real collectives between them."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from fake_devices import xla_flags
from test_faults import IMPORTS, wait_for, without_timing
from test_flags import ROOT

from epsanet_jax.weights import load

RECIPE = """
def get_config():
    model = ModelConfig(
        layers=(1,), planes=(8,), expansion=2, kernels=(3, 5), groups=(1, 2), reduction=2, bn_group=8,
        dtype='float64', param_dtype='float64',
    )
    data = DataConfig(source='synthetic', image_size=32, resize_size=32, synthetic_examples=75)
    return Config(
        batch_size=16, steps=20, log_every_steps=5, eval_every_epochs=2, model=model, data=data,
        optimizer=OptimizerConfig(lr=0.01), checkpoint=CheckpointConfig(every_minutes=0), tensorboard=False,
    )
"""


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp('recipe') / 'recipe.py'
    path.write_text(IMPORTS + RECIPE)
    return path


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def start(recipe, workdir, processes, devices, *arguments, only=None, host='localhost', prefixes=((), ())):
    """Starts the processes of a run, each with that many devices, by a command in front if there are any."""
    port, started = free_port(), []
    for i in range(processes) if only is None else only:
        environment = {
            **os.environ,
            'XLA_FLAGS': xla_flags(devices),
            'JAX_ENABLE_X64': '1',
            'PYTHONUNBUFFERED': '1',
        }
        command = [
            *prefixes[i % 2],
            sys.executable,
            str(ROOT / 'train.py'),
            f'--config={recipe}',
            f'--workdir={workdir}',
        ]
        if processes > 1:
            command += [
                f'--coordinator={host}:{port}',
                f'--num_processes={processes}',
                f'--process_id={i}',
            ]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
        started.append(subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, env=environment, **pipes))
    return started


def finish(processes, status=0):
    outputs = [p.communicate(timeout=500) for p in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == status, err
    return outputs


@pytest.fixture(scope='module')
def alone(recipe, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('alone') / 'run'
    finish(start(recipe, workdir, 1, 8))
    return workdir


def assert_equal_up_to_rounding(workdir, expected):
    both = [load(str(w), with_checkpoint=True) for w in (workdir, expected)]
    states = ((x.variables, x.source.checkpoint.optimizer['state']) for x in both)
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(1, np.abs(b).max()))
    for line, other in zip(*(without_timing(w) for w in (workdir, expected)), strict=True):
        assert line.pop('split') == other.pop('split')
        assert line == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize(
    ('processes', 'devices', 'microbatches'),
    [(2, 2, 2), *(pytest.param(p, d, 1, marks=pytest.mark.slow) for p, d in ((2, 2), (4, 1)))],
)
def test_several_processes_make_the_run_of_one(recipe, alone, tmp_path, processes, devices, microbatches):
    """BatchNorm groups of 8 examples lie within a process, or (in microbatches, or of 4) span two."""
    accumulate = f'--config.gradient_accumulation_steps={microbatches}'
    outputs = finish(start(recipe, tmp_path, processes, devices, accumulate))
    assert 'finished at step 20' in outputs[0][0]
    for out, _ in outputs[1:]:  # Gloo's own lines are there, of several threads at once
        assert not re.search('step|loss|eval|images|finished', out), out
    assert f'waiting up to 300 s for {processes} processes' in outputs[0][1]
    assert_equal_up_to_rounding(tmp_path, alone)


def test_a_signal_to_one_process_stops_all_and_other_numbers_continue(recipe, alone, tmp_path):
    """8 devices of one process, then 2 processes with 2 devices each, then 1 with 4."""
    (first,) = start(recipe, tmp_path, 1, 8)
    wait_for(first, 'step 5/20')
    first.send_signal(signal.SIGTERM)
    finish([first], status=75)
    two = start(recipe, tmp_path, 2, 2)
    wait_for(two[0], 'first step after')
    two[1].send_signal(signal.SIGTERM)
    outputs = finish(two, status=75)
    assert all('stopped at step' in err for _, err in outputs)
    finish(start(recipe, tmp_path, 1, 4))
    assert_equal_up_to_rounding(tmp_path, alone)


@pytest.mark.parametrize('signalled', [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_process_during_compilation_ends_all(recipe, tmp_path, signalled):
    two = start(recipe, tmp_path, 2, 2)
    wait_for(two[0], 'compiling ...')
    two[signalled].send_signal(signal.SIGTERM)
    for _, err in finish(two, status=75):
        assert 'SIGTERM: stopped, nothing was unsaved; the same command continues' in err
    assert not any((tmp_path / 'checkpoints').iterdir())


ADDRESSES = {'epsanet-a': '10.77.0.1', 'epsanet-b': '10.77.0.2'}


@pytest.fixture
def namespaces():
    """Two network namespaces with a cable between them: as two hosts, for which 'localhost' is another."""
    made, etc = [], pathlib.Path('/etc/netns')
    try:
        for name, address in ADDRESSES.items():
            subprocess.run(['ip', 'netns', 'add', name], check=True, capture_output=True)
            made.append(name)
            (etc / name).mkdir(parents=True, exist_ok=True)
            (etc / name / 'hosts').write_text(f'127.0.0.1 localhost\n{address} {socket.gethostname()}\n')
        cable = 'link add cable netns epsanet-a type veth peer name cable netns epsanet-b'
        subprocess.run(['ip', *cable.split()], check=True, capture_output=True)
        for name, address in ADDRESSES.items():
            for command in (f'addr add {address}/24 dev cable', 'link set cable up', 'link set lo up'):
                subprocess.run(['ip', '-n', name, *command.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as e:
        _remove(made, etc)
        pytest.skip(f'network namespaces cannot be made here: {e}')
    yield list(ADDRESSES)
    _remove(made, etc)


def _remove(names, etc):
    for name in names:
        subprocess.run(['ip', 'netns', 'del', name], check=True)
        shutil.rmtree(etc / name, ignore_errors=True)


@pytest.mark.slow
def test_processes_that_share_no_localhost_make_the_run_of_one(recipe, alone, tmp_path, namespaces):
    prefixes = [('ip', 'netns', 'exec', name) for name in namespaces]
    finish(start(recipe, tmp_path, 2, 2, host=ADDRESSES[namespaces[0]], prefixes=prefixes))
    assert_equal_up_to_rounding(tmp_path, alone)


@pytest.mark.parametrize('killed', [pytest.param(0, marks=pytest.mark.slow), 1])
def test_when_a_process_is_killed_the_others_end_and_say_so(recipe, tmp_path, killed):
    two = start(recipe, tmp_path, 2, 2, '--config.steps=100000')
    wait_for(two[0], 'step 5/')
    two[killed].kill()
    outputs = [p.communicate(timeout=150) for p in two]
    err = outputs[1 - killed][1]
    # Whoever notices first: the signs of life, the collective under way, or JAX, which aborts.
    assert two[1 - killed].returncode in (1, -signal.SIGABRT), err
    assert 'of this run failed or was lost' in err or 'Terminating process because' in err


def test_processes_with_different_recipes_are_refused(recipe, tmp_path):
    two = start(recipe, tmp_path, 2, 2, only=[0])
    port = next(a for a in two[0].args if a.startswith('--coordinator'))
    two += start(recipe, tmp_path, 2, 2, '--config.seed=1', port, only=[1])
    for _, err in finish(two, status=2):
        assert 'processes 0 and 1 differ in configuration or data' in err


@pytest.mark.parametrize('option', ['--config.steps=30', '--config.data.synthetic_examples=76'])
def test_what_decides_when_processes_meet_must_agree(recipe, tmp_path, option):
    two = start(recipe, tmp_path, 2, 1, only=[0])
    port = next(a for a in two[0].args if a.startswith('--coordinator'))
    two += start(recipe, tmp_path, 2, 1, option, port, only=[1])
    for _, err in finish(two, status=2):
        assert 'processes 0 and 1 differ in configuration or data' in err


def test_a_workdir_that_is_not_shared_is_refused(recipe, tmp_path):
    """The second process sees another folder under the name, as it would on another host."""
    (tmp_path / 'here').mkdir()
    (tmp_path / 'there').mkdir()
    port, started = free_port(), []
    for i, place in enumerate(('here', 'there')):
        command = [
            sys.executable, str(ROOT / 'train.py'), f'--config={recipe}', '--workdir=run',
            f'--coordinator=localhost:{port}', '--num_processes=2', f'--process_id={i}',
        ]  # fmt: skip
        environment = {
            **os.environ,
            'PYTHONPATH': str(ROOT),
            'XLA_FLAGS': xla_flags(1),
            'JAX_ENABLE_X64': '1',
        }
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
        started.append(subprocess.Popen(command, cwd=tmp_path / place, env=environment, **pipes))
    for _, err in finish(started, status=2):
        assert 'differ in workdir' in err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--coordinator=localhost:1'], '--num_processes is missing'),
        (['--coordinator=localhost', '--num_processes=2', '--process_id=0'], 'must be HOST:PORT'),
        (['--coordinator=localhost:1', '--num_processes=2', '--process_id=2'], 'below 2'),
    ],
)
def test_wrong_options_give_one_line_and_status_2(recipe, tmp_path, arguments, message):
    ((_, err),) = finish(start(recipe, tmp_path, 1, 1, *arguments), status=2)
    assert err.startswith('error: ')
    assert message in err
    assert err.count('\n') == 1


def test_processes_that_do_not_come_are_not_waited_for_without_end(recipe, tmp_path):
    (process,) = start(recipe, tmp_path, 2, 1, '--join_timeout=5', only=[1])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert 'error: not all processes joined within 5 s' in err
