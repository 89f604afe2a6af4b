"""The parts of the launch scripts that run without a pod or a cluster."""

import signal
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / 'launch'

# Exits with the next status of a file; for 'wait' it waits for SIGTERM and exits with 75.
COMMAND = """
read -r status < statuses; sed -i 1d statuses; echo "$status" >> log
[ "$status" != wait ] && exit "$status"
trap 'exit 75' TERM
echo waiting
while true; do sleep 0.1; done
"""


def start(folder, statuses, **settings):
    (folder / 'statuses').write_text('\n'.join(map(str, statuses)) + '\n')
    (folder / 'command.sh').write_text(COMMAND)
    return subprocess.Popen(
        [LAUNCH / 'keep_going.sh', 'bash', 'command.sh'],
        cwd=folder,
        env={'PATH': '/usr/bin:/bin', 'PAUSE': '0', **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ('statuses', 'runs', 'status'),
    [
        ([75, 1, 75, 134, 0, 0], 5, 0),
        ([2, 0], 1, 2),
        ([1, 75, 137, 1, 0], 4, 1),
    ],
)
def test_training_is_restarted_until_it_finishes_or_fails_too_often(tmp_path, statuses, runs, status):
    process = start(tmp_path, statuses, MAX_FAILURES='2')
    process.communicate(timeout=60)
    assert process.returncode == status
    assert len((tmp_path / 'log').read_text().split()) == runs


def test_a_signal_to_the_script_stops_the_training(tmp_path):
    process = start(tmp_path, ['wait', 0])
    assert process.stdout.readline() == 'waiting\n'
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (tmp_path / 'log').read_text() == 'wait\n'


@pytest.mark.parametrize('script', sorted(LAUNCH.iterdir()), ids=lambda p: p.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(['bash', '-n', script], check=True)


def test_the_pod_script_reports_missing_settings_and_unknown_commands():
    done = subprocess.run(
        [LAUNCH / 'tpu_pod.sh'], capture_output=True, text=True, env={'PATH': '/usr/bin:/bin'}
    )
    assert done.returncode
    assert 'NAME' in done.stderr
    settings = {'PATH': '/usr/bin:/bin', 'NAME': 'a', 'ZONE': 'b'}
    done = subprocess.run([LAUNCH / 'tpu_pod.sh', 'fly'], capture_output=True, text=True, env=settings)
    assert (done.returncode, done.stdout) == (2, '')
    assert 'unknown command fly' in done.stderr
