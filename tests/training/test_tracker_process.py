"""The process that talks to a tracker, with packages that only write down what they get."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from epsanet_jax.training import tracker_process

SETTINGS = {
    'project': 'tests',
    'name': 'run',
    'id': 'abc',
    'config': {'lr': 0.1},
    'dir': '.',
    'pid': 1,
}
WANDB = """
    import json, types
    class Run:
        dir, url = 'here', 'there'
        settings = types.SimpleNamespace(_offline=True)
        def log(self, values, step): print('log', step, json.dumps(values))
        def finish(self): print('finish')
    def Settings(**settings): return None
    def init(**settings):
        print('init', settings['id'], settings['resume'], json.dumps(settings['config']))
        return Run()
"""
TRACKIO = """
    import json
    class Run:
        def log(self, values, step): print('log', step, json.dumps(values))
        def finish(self): print('finish')
    def init(**settings):
        print('init', settings['name'], settings['resume'], json.dumps(settings['config']))
        return Run()
"""
STORAGE = """
    class SQLiteStorage:
        @staticmethod
        def get_logs(project, name):
            return [{'step': 1, 'train/loss': 2.0}]
"""
LINES = [
    {'split': 'train', 'step': 1, 'loss': 2.0, 'lr': 0.1},
    {'split': 'train', 'step': 2, 'loss': 1.5, 'data_wait': None},
]


@pytest.fixture
def process(tmp_path):
    """Starts the process of a kind of tracker, and sends it the settings and lines."""

    def start(kind, lines):
        for name, code in (
            ('wandb.py', WANDB),
            ('trackio/__init__.py', TRACKIO),
            ('trackio/sqlite_storage.py', STORAGE),
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(textwrap.dedent(code))
        started = subprocess.Popen(
            [sys.executable, tracker_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, 'PYTHONPATH': str(tmp_path)},
        )
        for line in ({**SETTINGS, 'kind': kind}, *lines):
            started.stdin.write(json.dumps(line) + '\n')
        started.stdin.flush()
        return started

    return start


@pytest.mark.parametrize(
    ('kind', 'place', 'run', 'first'),
    [
        ('wandb', 'here', 'abc', '{"train/loss": 2.0, "train/lr": 0.1}'),
        ('trackio', 'run-abc', 'run-abc', '{"train/lr": 0.1}'),  # what it does not have yet
    ],
)
def test_lines_become_values_with_the_name_of_their_split(process, kind, place, run, first):
    started = process(kind, LINES)
    out, err = started.communicate()
    assert (started.returncode, out) == (0, f'{place}\n')
    assert err.splitlines() == [
        f'init {run} allow {{"lr": 0.1}}',
        f'log 1 {first}',
        'log 2 {"train/loss": 1.5}',
        'finish',
    ]


def test_signals_for_the_whole_group_do_not_end_it(process):
    started = process('wandb', LINES[:1])
    assert started.stdout.readline() == 'here\n'
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        started.send_signal(number)
    _, err = started.communicate(json.dumps(LINES[1]) + '\n')
    assert started.returncode == 0
    assert err.splitlines()[-2:] == ['log 2 {"train/loss": 1.5}', 'finish']


def test_a_failure_is_one_line(process):
    started = process('wandb', [{'split': 'train'}])
    out, _ = started.communicate()
    assert (started.returncode, out) == (1, "here\nerror: KeyError: 'step'\n")
