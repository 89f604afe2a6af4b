"""One trainer at a time in a workdir."""

import json
import os
import signal
import subprocess
import threading

import pytest
from etils import epath
from runs import finish, saved_steps, start, wait_for

from epsanet_jax.errors import InputError
from epsanet_jax.training import liveness, lock
from epsanet_jax.workdir import LOCK_FILE


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def owner(**changes):
    return {**lock._this_process(), 'since': 'today', 'id': 'x', 'beat': 0, **changes}


def take(folder):
    lines = []
    with lock.Lock(folder, lines.append):
        assert (folder / LOCK_FILE).exists()
    assert not (folder / LOCK_FILE).exists()
    assert liveness.before_end == []
    return lines


def test_a_workdir_in_use_is_refused_with_the_owner(folder):
    with lock.Lock(folder / 'new', print), pytest.raises(InputError) as e, lock.Lock(folder / 'new', print):
        pass
    assert (
        f'{folder}/new is in use by process {os.getpid()} on {lock._this_process()["host"]} (since 2'
        in str(e.value)
    )
    assert take(folder / 'new') == []


@pytest.mark.parametrize(
    'changes',
    [
        {'started': '1'},  # another process has the number now
        {'pid': 2**22 + 1},  # above the largest number that Linux gives
    ],
)
def test_the_lock_of_a_process_that_has_ended_is_taken_over_at_once(folder, changes):
    (folder / LOCK_FILE).write_text(json.dumps(owner(**changes)))
    (line,) = take(folder)
    assert line.startswith('warning: the lock of ')
    assert 'which has ended' in line


def test_a_zombie_has_ended(folder):
    with subprocess.Popen(['cat'], stdin=subprocess.PIPE) as child:
        (folder / LOCK_FILE).write_text(json.dumps(owner(pid=child.pid, started=lock._started(child.pid))))
        with pytest.raises(InputError, match=f'is in use by process {child.pid}'):
            take(folder)
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # its status stays there
        assert len(take(folder)) == 1


@pytest.mark.parametrize('content', [json.dumps(owner(machine='another')), '', '[]', '{"pid": "x"}'])
def test_a_lock_that_does_not_change_is_taken_over_after_a_while(folder, monkeypatch, content):
    monkeypatch.setattr(lock, 'STALE', 0.2)
    (folder / LOCK_FILE).write_text(content)
    watched, taken = take(folder)
    assert 'waiting 0.2 s' in watched
    assert taken.startswith('warning: ')


def test_the_lock_of_a_living_process_on_another_machine_is_respected(folder, monkeypatch):
    monkeypatch.setattr(lock, 'BEAT', 0.05)
    with lock.Lock(folder, print) as held:
        held._own['machine'] = 'another'
        while lock._has_ended(held._read()) is not None:
            assert held._thread.is_alive()
        with pytest.raises(InputError, match='is in use by process'):
            take(folder)
    assert not (folder / LOCK_FILE).exists()


def test_a_released_lock_is_free_while_another_process_watches_it(folder):
    (folder / LOCK_FILE).write_text(json.dumps(owner(machine='another')))
    threading.Timer(0.3, (folder / LOCK_FILE).unlink).start()
    assert ['heartbeat' in line for line in take(folder)] == [True]


def test_a_run_that_lost_its_lock_ends_and_leaves_the_lock_of_the_other(folder, monkeypatch):
    monkeypatch.setattr(lock, 'BEAT', 0.01)
    with lock.Lock(folder, print) as held:
        held.check()
        (folder / LOCK_FILE).write_text(json.dumps(owner(pid=7)))
        held._thread.join(60)
        with pytest.raises(InputError, match='process 7 on .* has taken over'):
            held.check()
    assert json.loads((folder / LOCK_FILE).read_text())['pid'] == 7


def test_a_lock_that_somebody_removed_is_written_again(folder, monkeypatch):
    monkeypatch.setattr(lock, 'BEAT', 0.01)
    with lock.Lock(folder, print) as held:
        (folder / LOCK_FILE).unlink()
        while not (folder / LOCK_FILE).exists():
            assert held._thread.is_alive()


@pytest.mark.slow
def test_a_second_trainer_is_refused_and_the_first_one_can_be_killed_and_continued(tiny, tmp_path):
    first = start(tiny, tmp_path, '--config.steps=100000')
    wait_for(first, 'step 5/')
    _, err = finish(start(tiny, tmp_path, '--config.steps=100000'), status=2)
    assert err.startswith(f'error: {tmp_path} is in use by process {first.pid} on ')
    assert err.count('\n') == 1
    first.kill()
    first.communicate()
    assert (tmp_path / LOCK_FILE).exists()
    again = start(tiny, tmp_path, '--config.steps=100000')
    wait_for(again, 'warning: the lock of ')
    wait_for(again, 'continuing at')
    again.send_signal(signal.SIGTERM)
    again.communicate()
    assert again.returncode == 75
    assert not (tmp_path / LOCK_FILE).exists()
    assert saved_steps(tmp_path)
