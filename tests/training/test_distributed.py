"""Runs of several processes, with fake devices and real collectives between them."""

import concurrent.futures
import contextlib
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
from runs import (
    ROOT,
    finish_all,
    free_port,
    start,
    start_all,
    wait_for,
    without_timing,
)

from epsanet_jax.training import distributed
from epsanet_jax.weights import load


@pytest.fixture(scope='module')
def alone(float64_recipe, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('alone') / 'run'
    finish_all(start_all(float64_recipe, workdir, 1, 8))
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
@pytest.mark.slow
def test_several_processes_make_the_run_of_one(
    float64_recipe, alone, tmp_path, processes, devices, microbatches
):
    """BatchNorm groups of 8 examples lie within a process, or (in microbatches, or of 4) span two."""
    accumulate = f'--config.gradient_accumulation_steps={microbatches}'
    outputs = finish_all(start_all(float64_recipe, tmp_path, processes, devices, accumulate))
    assert 'finished at step 20' in outputs[0][0]
    for out, _ in outputs[1:]:  # Gloo prints its own lines, from several threads at once
        assert not re.search('step|loss|eval|images|finished', out), out
    assert f'waiting up to 300 s for {processes} processes' in outputs[0][1]
    assert_equal_up_to_rounding(tmp_path, alone)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_another_number_of_processes_continues(
    float64_recipe, alone, tmp_path
):
    """8 devices of one process, then 2 processes with 2 devices each, then 1 with 4."""
    (first,) = start_all(float64_recipe, tmp_path, 1, 8)
    wait_for(first, 'step 5/20')
    first.send_signal(signal.SIGTERM)
    finish_all([first], status=75)
    two = start_all(float64_recipe, tmp_path, 2, 2)
    wait_for(two[0], 'first step after')
    two[1].send_signal(signal.SIGTERM)
    outputs = finish_all(two, status=75)
    assert all('stopped at step' in err for _, err in outputs)
    finish_all(start_all(float64_recipe, tmp_path, 1, 4))
    assert_equal_up_to_rounding(tmp_path, alone)


@pytest.mark.parametrize('signalled', [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.slow
def test_a_signal_to_one_process_during_compilation_ends_all(float64_recipe, tmp_path, signalled):
    two = start_all(float64_recipe, tmp_path, 2, 2, cache=False)  # compilation takes long enough
    wait_for(two[0], 'compiling ...')
    two[signalled].send_signal(signal.SIGTERM)
    for _, err in finish_all(two, status=75):
        assert 'SIGTERM: stopped, nothing was unsaved; the same command continues' in err
    assert not any((tmp_path / 'checkpoints').iterdir())


ADDRESSES = {'epsanet-a': '10.77.0.1', 'epsanet-b': '10.77.0.2'}


@pytest.fixture
def namespaces():
    """Two network namespaces with a cable between them, like two hosts with different localhosts."""
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
def test_processes_on_different_hosts_make_the_run_of_one(float64_recipe, alone, tmp_path, namespaces):
    prefixes = [('ip', 'netns', 'exec', name) for name in namespaces]
    finish_all(start_all(float64_recipe, tmp_path, 2, 2, host=ADDRESSES[namespaces[0]], prefixes=prefixes))
    assert_equal_up_to_rounding(tmp_path, alone)


def test_processes_with_different_recipes_are_refused(float64_recipe, tmp_path):
    two = start_all(float64_recipe, tmp_path, 2, 2, only=[0])
    port = next(a for a in two[0].args if a.startswith('--coordinator'))
    two += start_all(float64_recipe, tmp_path, 2, 2, '--config.seed=1', port, only=[1])
    for _, err in finish_all(two, status=2):
        assert 'processes 0 and 1 differ in configuration or data' in err


@pytest.mark.parametrize(
    'option',
    ['--config.steps=30', pytest.param('--config.data.synthetic_examples=76', marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_fields_that_decide_the_number_of_steps_must_agree(float64_recipe, tmp_path, option):
    two = start_all(float64_recipe, tmp_path, 2, 1, only=[0])
    port = next(a for a in two[0].args if a.startswith('--coordinator'))
    two += start_all(float64_recipe, tmp_path, 2, 1, option, port, only=[1])
    for _, err in finish_all(two, status=2):
        assert 'processes 0 and 1 differ in configuration or data' in err


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(float64_recipe, tmp_path):
    """The second process sees another folder of the same name, like on another host."""
    (tmp_path / 'here').mkdir()
    (tmp_path / 'there').mkdir()
    port, started = free_port(), []
    for i, place in enumerate(('here', 'there')):
        command = [
            sys.executable, str(ROOT / 'train.py'), f'--config={float64_recipe}', '--workdir=run',
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
    for _, err in finish_all(started, status=2):
        assert 'differ in workdir' in err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--coordinator=localhost:1'], '--num_processes is missing'),
        (['--coordinator=localhost', '--num_processes=2', '--process_id=0'], 'must be HOST:PORT'),
        (['--coordinator=localhost:1', '--num_processes=2', '--process_id=2'], 'below 2'),
        (['--coordinator=a:65536', '--num_processes=2', '--process_id=0'], 'must be from 1 to 65535'),
    ],
)
def test_wrong_options_give_one_line_and_status_2(float64_recipe, tmp_path, arguments, message):
    ((_, err),) = finish_all(start_all(float64_recipe, tmp_path, 1, 1, *arguments), status=2)
    assert err.startswith('error: ')
    assert message in err
    assert err.count('\n') == 1


@pytest.mark.slow
def test_the_wait_for_missing_processes_has_a_time_limit(float64_recipe, tmp_path):
    (process,) = start_all(float64_recipe, tmp_path, 2, 1, '--join_timeout=5', only=[1])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert 'error: not all processes joined within 5 s' in err


def assert_refused(process, *parts):
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2, err
    assert err.splitlines()[-1].startswith('error: ')
    assert all(part in err for part in parts), err
    assert 'Traceback' not in err


@pytest.mark.slow
def test_a_port_in_use_and_a_second_process_0_are_refused(float64_recipe, tmp_path):
    with socket.create_server(('', 0)) as taken:
        port = taken.getsockname()[1]
        coordinator = f'--coordinator=localhost:{port}'
        (process,) = start_all(float64_recipe, tmp_path, 2, 1, coordinator, only=[0])
        assert_refused(process, f'{coordinator}: cannot use port {port} here: Address already in use')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_with_one_number_are_refused(float64_recipe, tmp_path):
    three = start_all(float64_recipe, tmp_path, 3, 1, only=[0])
    port = next(a for a in three[0].args if a.startswith('--coordinator'))
    three += start_all(float64_recipe, tmp_path, 3, 1, port, only=[1, 1])
    for process in three:
        assert_refused(process, 'error: two processes have --process_id=1')


def test_other_programs_and_restarted_processes_may_connect_to_the_coordinator():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor() as threads:
        first = threads.submit(distributed._meet, f'localhost:{port}', 3, 0)
        for sent in (b'GET / HTTP/1.1\n', b'1\n', b''):  # the process that sent 1 ends
            with connected(port) as connection:
                connection.sendall(sent)
        others = [threads.submit(distributed._meet, f'localhost:{port}', 3, i) for i in (1, 2)]
        assert [future.result(60) for future in (first, *others)] == [None] * 3


def connected(port):
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(('localhost', port))


@pytest.mark.slow
def test_processes_with_different_numbers_of_devices_are_refused(float64_recipe, tmp_path):
    two = start_all(float64_recipe, tmp_path, 2, 1, only=[0])
    port = next(a for a in two[0].args if a.startswith('--coordinator'))
    two += start_all(float64_recipe, tmp_path, 2, 3, port, only=[1])
    for _, err in finish_all(two, status=2):
        assert 'the same number of devices, got process 0: 1, process 1: 3' in err


@pytest.mark.slow
def test_processes_with_different_code_are_refused(float64_recipe, tmp_path):
    """The second process has the same version with a changed file."""
    shutil.copytree(ROOT / 'epsanet_jax', tmp_path / 'epsanet_jax')
    shutil.copy(ROOT / 'train.py', tmp_path)
    with (tmp_path / 'epsanet_jax' / 'errors.py').open('a') as f:
        f.write('# changed')
    two = start_all(float64_recipe, tmp_path / 'run', 2, 1, only=[0])
    environment = {**os.environ, 'XLA_FLAGS': xla_flags(1), 'JAX_ENABLE_X64': '1', 'PYTHONPATH': ''}
    command = [sys.executable, str(tmp_path / 'train.py'), *two[0].args[2:], '--process_id=1']
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    two.append(subprocess.Popen(command, env=environment, **pipes))
    for _, err in finish_all(two, status=2):
        assert re.search('this process runs epsanet_jax .*, process 0 runs .*: install the same', err), err
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('uri', 'part'),
    [
        ('1531576320.0;tcp://127.0.0.1:34911', "'OMPI_COMM_WORLD_SIZE' is not set"),
        ('no number', 'cannot join the processes of this run'),
    ],
)
def test_half_an_environment_of_a_cluster_is_refused(float64_recipe, tmp_path, uri, part):
    assert_refused(start(float64_recipe, tmp_path, settings={'OMPI_MCA_orte_hnp_uri': uri}), part)
