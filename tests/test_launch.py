"""The parts of the launch scripts that run without a pod or a cluster."""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / 'launch'
SCHEMAS = json.loads((Path(__file__).parent / 'fixtures/launch_schemas.json').read_text())

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


@pytest.mark.parametrize(
    'script', [p for p in sorted(LAUNCH.iterdir()) if p.suffix != '.yaml'], ids=lambda p: p.name
)
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


# Pops the next line of `answers` at a describe and at a question whether the training runs; logs all calls.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" END >> calls
case "$*" in
*describe* | *pgrep*)
    read -r answer < answers; sed -i 1d answers
    [ "$answer" = none ] && exit 1
    echo "$answer" ;;
esac
"""


def queued(folder, answers):
    """Runs tpu_queued.sh with a gcloud of these answers; returns the subcommands and their options."""
    (folder / 'bin').mkdir()
    (folder / 'bin/gcloud').write_text(GCLOUD)
    (folder / 'bin/gcloud').chmod(0o755)
    (folder / 'answers').write_text('\n'.join(answers) + '\n')
    names = dict.fromkeys(('NAME', 'ZONE', 'TYPE', 'RUNTIME', 'WORKDIR', 'DATA'), 'x y')
    command = [
        LAUNCH / 'tpu_queued.sh',
        'https://host/repository',
        '--config=configs/imagenet.py:epsanet50_small',
    ]
    environment = {'PATH': f'{folder}/bin:/usr/bin:/bin', 'PAUSE': '0', **names}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (folder / 'answers').read_text().strip() == ''
    text = (folder / 'calls').read_text()
    calls = [call.split('\0')[:-1] for call in text.split('END\0')[:-1]]
    assert all(call[:2] == ['compute', 'tpus'] for call in calls)
    return [(' '.join(call[2:4]), call[4:]) for call in calls]


def test_a_slice_that_is_taken_away_is_requested_again_until_the_training_has_ended(tmp_path):
    answers = ['none', 'WAITING_FOR_RESOURCES', 'ACTIVE', 'no', 'ACTIVE', 'yes', 'SUSPENDED', 'none']
    calls = queued(tmp_path, [*answers, 'ACTIVE', 'no', 'ACTIVE', 'none', 'ACTIVE', 'yes', 'ACTIVE', 'no'])
    changes = [name for name, _ in calls if 'describe' not in name and 'ssh' not in name]
    assert changes == ['queued-resources create', 'queued-resources delete'] * 2
    started = [options for _, options in calls if any('train.py' in option for option in options)]
    assert len(started) == 2
    assert '--config=configs/imagenet.py' in started[0][-1]
    create = next(options for name, options in calls if name.endswith('create'))
    assert create[0] == 'x y'
    assert {'--node-id=x y', '--spot'} <= set(create)


def test_the_options_of_gcloud_are_published_ones(tmp_path):
    published = SCHEMAS['gcloud compute tpus']
    calls = queued(tmp_path, ['none', 'ACTIVE', 'no', 'ACTIVE', 'no'])
    for name, (target, *options) in calls:
        assert target == 'x y'
        assert {re.fullmatch(r'--([a-z-]+)(=.*)?', o, re.DOTALL)[1] for o in options} <= set(published[name])
    assert {name for name, _ in calls} == published.keys()


def check(value, schema, place='manifest'):
    """Checks a value against an excerpt in SCHEMAS."""
    kinds = {
        'object': dict,
        'array': list,
        'string': str,
        'integer': int,
        'boolean': bool,
        'quantity': (int, str),
    }
    assert isinstance(value, kinds[schema['type']]), place
    assert not isinstance(value, bool) or schema['type'] == 'boolean', place
    assert value in schema.get('enum', [value]), place
    assert re.fullmatch(schema.get('pattern', '.*'), str(value), re.DOTALL), place
    if schema['type'] == 'array':
        for i, item in enumerate(value):
            check(item, schema['items'], f'{place}[{i}]')
    elif schema['type'] == 'object':
        assert set(schema.get('required', ())) <= value.keys(), place
        for key, item in value.items():
            known = schema['values'] if 'values' in schema else schema['properties'].get(key)
            assert known, f'{place}.{key} is not a published field'
            check(item, known, f'{place}.{key}')


def test_the_jobset_has_published_fields_and_fits_its_slice():
    manifest = yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())
    check(manifest, SCHEMAS['JobSet'])
    (replicated,) = manifest['spec']['replicatedJobs']
    job = replicated['template']['spec']
    pod = job['template']['spec']
    (container,) = pod['containers']
    sides = pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')
    chips = job['parallelism'] * container['resources']['limits']['google.com/tpu']
    assert chips == int(sides[0]) * int(sides[1])
    assert job['completions'] == job['parallelism']
    exit_codes = job['podFailurePolicy']['rules'][0]['onExitCodes']
    assert (exit_codes['containerName'], exit_codes['values']) == (container['name'], [2])
    assert {m['name'] for m in container['volumeMounts']} == {v['name'] for v in pod['volumes']}
    batch = next(a for a in container['args'] if 'batch_size' in a).split('=')[1]
    assert int(batch) % chips == 0


@pytest.mark.parametrize(
    ('change', 'place'),
    [
        (lambda spec: spec['failurePolicy'].update(maxRestart=3), 'manifest.spec.failurePolicy.maxRestart'),
        (lambda spec: spec['failurePolicy']['rules'][0].update(action='Fail'), r'rules\[0\].action'),
        (lambda spec: spec.pop('replicatedJobs'), 'manifest.spec'),
    ],
)
def test_a_wrong_manifest_is_found(change, place):
    manifest = yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())
    change(manifest['spec'])
    with pytest.raises(AssertionError, match=place):
        check(manifest, SCHEMAS['JobSet'])
