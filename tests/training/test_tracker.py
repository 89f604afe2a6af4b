"""Trackers: the real packages, offline, read back; failures that must not reach the run."""

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time

import pytest
from etils import epath
from runs import ROOT, Killed, kill_after, lines, recipe

from epsanet_jax import InputError
from epsanet_jax.training import loop, tracker
from epsanet_jax.training.config import CheckpointConfig
from epsanet_jax.training.tracker import Tracker

TRAIN = [{'split': 'train', 'step': s, 'loss': 1 / s, 'lr': 0.1, 'data_wait': None} for s in range(1, 9)]
EVALUATION = {'split': 'eval', 'step': 4, 'top1': 0.5}
LINES = [*TRAIN[:4], EVALUATION, *TRAIN[4:]]

# A run that is killed after its sixth step and whose last checkpoint is that of step 4.
KILLED = """
import json, os, sys, time
from etils import epath
from epsanet_jax.training.tracker import Tracker
lines = json.loads(sys.stdin.read())
tracker = Tracker('{kind}', 'tests', epath.Path('{workdir}'), {{'lr': 0.1}}, [], print)
for line in lines[:7]:
    tracker.write(line)
time.sleep({pause})
print('pid', tracker._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def records(path):
    """The records in a file of W&B: LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b''
    while place + 7 <= len(data):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        _, length, kind = struct.unpack_from('<IHB', data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b''


def wandb_runs(workdir):
    """(id, configuration, {step: values}) of each process of a run, in order."""
    runs = []
    for path in sorted((workdir / 'wandb').glob('offline-run-*/*.wandb')):
        name, config, rows = None, {}, {}
        for record in records(path):
            kind = record.WhichOneof('record_type')
            if kind == 'run':
                name = record.run.run_id
                config = {u.key: json.loads(u.value_json) for u in record.run.config.update}
            elif kind == 'history':
                values = {
                    '/'.join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
                }
                step = values.pop('_step')
                assert step not in rows
                rows[step] = {k: v for k, v in values.items() if not k.startswith('_')}
        runs.append((name, config, rows))
    return runs


def rows_of(written):
    rows = {}
    for line in written:
        values = {f'{line["split"]}/{k}': v for k, v in line.items() if v is not None}
        row = rows.setdefault(line['step'], {})
        row |= {k: v for k, v in values.items() if not k.endswith(('/split', '/step'))}
    return rows


def killed(kind, workdir, pause, whole_group):
    """A process with a tracker that gets SIGKILL, its tracker too if `whole_group`."""
    script = KILLED.format(kind=kind, workdir=workdir, pause=pause)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [sys.executable, '-c', script],
        input=json.dumps(LINES),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout.split('pid ')[1].split()[0])
    if whole_group:
        os.killpg(pid, signal.SIGKILL)
    while True:  # it finishes by itself
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize('whole_group', [False, True])
def test_a_killed_and_continued_run_is_one_run_of_wandb_without_gaps(tmp_path, monkeypatch, whole_group):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    killed('wandb', tmp_path, 0, whole_group)
    printed = []
    kept = [line for line in LINES if line['step'] <= 4]
    continued = Tracker('wandb', 'tests', epath.Path(tmp_path), {'lr': 0.1}, kept, printed.append)
    for line in LINES[len(kept) :]:
        continued.write(line)
    continued.close()
    assert [line.startswith('wandb: ') for line in printed] == [True]
    runs = [run for run in wandb_runs(tmp_path) if run[0]]
    assert len(runs) == (1 if whole_group else 2)
    assert {name for name, _, _ in runs} == set(json.loads((tmp_path / 'tracker.json').read_text()).values())
    assert all(config['lr'] == 0.1 for _, config, _ in runs)
    assert runs[-1][2] == rows_of(LINES)
    assert all(rows.items() <= rows_of(LINES).items() for *_, rows in runs[:-1])


@pytest.mark.slow
@pytest.mark.parametrize('pause', [0, 15])
def test_a_killed_and_continued_run_is_one_run_of_trackio_without_gaps(tmp_path, monkeypatch, pause):
    pytest.importorskip('trackio', reason='not in the dev extra: trackio needs an older Pillow')
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
    workdir = tmp_path / 'run'
    workdir.mkdir()
    killed('trackio', workdir, pause, whole_group=True)
    kept, printed = [line for line in LINES if line['step'] <= 4], []
    continued = Tracker('trackio', 'tests', epath.Path(workdir), {'lr': 0.1}, kept, printed.append)
    for line in LINES[len(kept) :]:
        continued.write(line)
    continued.close()
    name = f'run-{json.loads((workdir / "tracker.json").read_text())["trackio"]}'
    assert printed == [f'trackio: {name}']
    read = (
        'import json; from trackio.sqlite_storage import SQLiteStorage as s; '
        f'print(json.dumps([s.get_runs("tests"), s.get_logs("tests", "{name}")], default=str))'
    )
    done = subprocess.run([sys.executable, '-c', read], capture_output=True, text=True, check=True)
    names, logs = json.loads(done.stdout.splitlines()[-1])
    assert len(names) == 1
    values = [(row['step'], k, v) for row in logs for k, v in row.items() if '/' in k]
    assert sorted(values) == sorted((s, k, v) for s, row in rows_of(LINES).items() for k, v in row.items())


@pytest.mark.slow
def test_a_run_sends_what_metrics_jsonl_gets_and_its_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    config = recipe(
        tracker='wandb', eval_every_epochs=0.0, checkpoint=CheckpointConfig(every_steps=3, every_minutes=0)
    )
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            loop.train(config, str(tmp_path))
    loop.train(config, str(tmp_path))
    assert capsys.readouterr().out.count('wandb: ') == 2
    (first, _, before), (second, saved, rows) = wandb_runs(tmp_path)
    assert first == second
    assert rows == rows_of(lines(tmp_path))
    assert before.keys() == {2, 4}
    assert saved['optimizer']['lr'] == 0.05


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a module named wandb with this code before the real one."""

    def write(code):
        (tmp_path / 'fake').mkdir()
        (tmp_path / 'fake/wandb.py').write_text(textwrap.dedent(code))
        monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'fake'))
        return Tracker('wandb', 'tests', epath.Path(tmp_path), {}, LINES, printed.append)

    printed = []
    write.printed = printed
    return write


RUN = """
    import os, time
    class Run:
        dir = url = 'place'
        class settings:
            _offline = False
        def log(self, values, step): {log}
        def finish(self): {finish}
    def Settings(**settings): pass
    def init(**settings):
        print('a message of the package')
        return Run()
"""


@pytest.mark.parametrize(
    ('code', 'reason'),
    [
        (RUN + '\n    def Settings(**k): raise ValueError("no\\nkey")', 'ValueError: no key'),
        ('raise SystemExit("gone")', 'SystemExit: gone'),
        ('import os; os._exit(3)', 'its process ended with status 3'),
        (RUN.format(log='1 / 0', finish='pass'), 'ZeroDivisionError: division by zero'),
        (RUN.format(log='pass', finish='os.kill(os.getpid(), 9)'), 'its process ended with status -9'),
        (RUN.format(log='pass', finish='time.sleep(600)'), 'not finished after 1 s'),
        (RUN.format(log='time.sleep(600)', finish='pass'), 'not finished after 1 s'),
    ],
)
def test_a_tracker_that_fails_or_hangs_is_one_warning(fake, monkeypatch, code, reason):
    started = fake(code)
    if 'sleep' in code:
        monkeypatch.setattr(tracker, '_PATIENCE', 1.0)
        while not fake.printed:  # until the package has accepted the run
            time.sleep(0.05)
    for _ in range(2000):  # more than a pipe holds
        started.write(TRAIN[0])
    started.close()
    warning = f'warning: wandb failed: {reason}; the run goes on without it'
    assert fake.printed == [*(['wandb: place'] if '{log}' not in code and 'Run' in code else []), warning]


def test_a_missing_package_and_a_damaged_id_are_errors_of_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(
        InputError, match=r"config.tracker=wandb needs the package wandb: pip install '\.\[wandb\]'"
    ):
        loop.train(recipe(tracker='wandb'), str(tmp_path))
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="config.tracker must be one of '', wandb, trackio, got 'mlflow'"):
        loop.train(recipe(tracker='mlflow'), str(tmp_path))
    (tmp_path / 'tracker.json').write_text('{"wandb"')
    with pytest.raises(
        InputError, match=r'cannot use .*tracker.json: .*; remove it to start a new run of wandb'
    ):
        Tracker('wandb', 'tests', epath.Path(tmp_path), {}, [], print)
