"""The command line of train.py, run like users run it."""

import os
import subprocess
import sys

import pytest
from command import shell
from PIL import Image
from runs import ROOT, saved_steps

from epsanet_jax.training.flags import read_config

IMPORTS = 'from epsanet_jax.training.config import Config, DataConfig, ModelConfig\n'
TINY = """
def get_config(size: str = '32'):
    model = ModelConfig(layers=(1,), planes=(8,), expansion=2, kernels=(3, 5), groups=(1, 2), reduction=2)
    data = DataConfig(source='synthetic', image_size=int(size), resize_size=int(size), synthetic_examples=64)
    return Config(batch_size=32, steps=2, log_every_steps=1, model=model, data=data)
"""


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp('recipe') / 'tiny.py'
    path.write_text(IMPORTS + TINY)
    return path


def train(*arguments, cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    return subprocess.run(
        [sys.executable, str(ROOT / 'train.py'), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=600,
    )


def assert_one_clear_line(process, *parts, status=2):
    assert process.returncode == status, process.stderr
    assert process.stderr.startswith('error: ')
    assert process.stderr.count('\n') == 1
    for part in parts:
        assert part in process.stderr


def test_kernels_of_each_stage_are_given_as_nested_tuples(recipe):
    options = ['--config.model.kernels=((3,5,7),)', '--config.model.groups=((1,2,2),)']
    model = read_config([f'--config={recipe}', *options]).model
    assert (model.kernels, model.groups) == (((3, 5, 7),), ((1, 2, 2),))


@pytest.mark.slow
def test_a_finished_run_started_again_only_prints_its_result(recipe, tmp_path):
    arguments = (f'--config={recipe}', f'--workdir={tmp_path / "run"}', '--config.optimizer.lr=0.01')
    first = train(*arguments)
    assert first.returncode == 0, first.stderr
    for part in ('step 2/2 | loss', 'lr 0.01', 'of 64 images', 'workdir: ', 'epsanet evaluate'):
        assert part in first.stdout
    before = (tmp_path / 'run' / 'metrics.jsonl').read_text()
    again = train(*arguments)
    assert again.returncode == 0
    assert 'finished at step 2' in again.stdout
    assert 'step 2/2 | loss' not in again.stdout
    assert (tmp_path / 'run' / 'metrics.jsonl').read_text() == before
    other = train(*arguments[:2], '--config.optimizer.lr=0.02')
    assert_one_clear_line(other, 'holds another run', 'optimizer.lr: 0.01 -> 0.02')


@pytest.mark.parametrize(
    ('arguments', 'parts'),
    [
        (['--config.optimizer.lrr=1'], ['unknown field config.optimizer.lrr', "did you mean 'optimizer.lr'"]),
        (['--config.batch_size=-3'], ['config.batch_size must be at least 1, got -3']),
        (['batch_size=3'], ["unexpected argument 'batch_size=3'"]),
        (['--config.data.source=folder', '--config.data.dir=/no/such/place'], ['/no/such/place/train']),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (['--config.optimiser.lr=1'], ['unknown field config.optimiser.lr', "'optimizer.lr'"]),
                (['--config.optimizer.lr=fast'], ['config.optimizer.lr=fast']),
                (['--config.batch_size=1.5'], ['config.batch_size=1.5']),
                (['--config.data.flip=perhaps'], ['config.data.flip=perhaps']),
                (['--config.optimizer=3'], ['config.optimizer']),
                (['--config.model.planes=(8,x)'], ['config.model.planes', 'x']),
                (['--config.model.planes=8.5,'], ['config.model.planes', '8.5']),
                (['--config.batch_size'], ['config.batch_size']),
                (['--confg.batch_size=3'], ['confg']),
                (
                    ['--config.data.source=records', '--config.data.dir=gs://a/b'],
                    ['gs://a/b is not on a disk'],
                ),
                (['--config.data.source=records', '--config.data.dir=~nobody_here/b'], ['~nobody_here/b']),
                (['--config.model.num_classes=3'], ['10 classes', 'num_classes=3']),
            )
        ),
    ],
)
def test_a_wrong_option_gives_one_line_and_status_2(recipe, tmp_path, arguments, parts):
    workdir = tmp_path / 'run'
    process = train(f'--config={recipe}', f'--workdir={workdir}', *arguments)
    assert_one_clear_line(process, *parts)
    assert not workdir.exists()


@pytest.mark.slow
def test_a_wrong_config_file_gives_one_line_and_status_2(recipe, tmp_path):
    workdir = f'--workdir={tmp_path / "run"}'
    (tmp_path / 'syntax.py').write_text('def get_config(:')
    (tmp_path / 'empty.py').write_text('')
    (tmp_path / 'dict.py').write_text('def get_config():\n    return {}')
    assert_one_clear_line(train('--config=no/such.py', workdir), 'no/such.py')
    assert_one_clear_line(train('--config=no/such.py', workdir, '--config.seed=1'), 'no/such.py')
    assert_one_clear_line(train(f'--config={tmp_path}/syntax.py', workdir), 'syntax.py')
    assert_one_clear_line(train(f'--config={tmp_path}/empty.py', workdir), 'get_config')
    assert_one_clear_line(train(f'--config={tmp_path}/dict.py', workdir), 'must return')
    assert_one_clear_line(train(workdir), 'no --config=FILE')
    assert_one_clear_line(train(f'--config={recipe}'), 'no --workdir=DIR')
    assert_one_clear_line(train('--config=configs/imagenet.py:epsanet51', workdir), "'epsanet51'")
    assert_one_clear_line(
        train(f'--config={recipe}', '--workdir=gs://bucket/run'), 'gs://bucket/run: ', 'gcsfs'
    )


@pytest.mark.slow
def test_an_empty_class_or_a_bad_image_gives_one_line_and_status_2(recipe, tmp_path):
    for split in ('train', 'val'):
        for name in 'ab':
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                Image.new('RGB', (40, 40)).save(tmp_path / split / name / f'{i}.png')
    (tmp_path / 'train/c').mkdir()
    folder = [f'--config={recipe}', f'--workdir={tmp_path}/run', '--config.data.source=folder']
    folder.append(f'--config.data.dir={tmp_path}')
    assert_one_clear_line(train(*folder), 'empty class folder', 'train/c')
    (tmp_path / 'train/c').rmdir()
    (tmp_path / 'train/a/5.png').write_bytes(b'')
    assert_one_clear_line(train(*folder), 'train/a/5.png', 'on_bad=skip')
    skipping = train(*folder, '--config.data.on_bad=skip')
    assert skipping.returncode == 0, skipping.stderr
    assert 'train/a/5.png' in skipping.stdout


@pytest.mark.slow
def test_a_non_finite_loss_gives_one_line_and_status_1(recipe, tmp_path):
    process = train(
        f'--config={recipe}',
        f'--workdir={tmp_path}/run',
        '--config.optimizer.lr=1e30',
        '--config.schedule.name=constant',
        '--config.steps=9',
    )
    assert_one_clear_line(process, 'the loss is', 'at step', status=1)


@pytest.mark.parametrize('name', ['digits', 'image_folder', 'imagenet'])
def test_every_recipe_is_valid_and_its_header_is_complete(name):
    import importlib.util

    from epsanet_jax.training.validation import validate

    path = ROOT / 'configs' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.data.dir = config.data.dir or 'images'
    validate(config)
    for part in (f'configs/{name}.py', 'Hardware:', 'Expected result:'):
        assert part in module.__doc__


@pytest.mark.parametrize(
    ('redirection', 'noted'),
    [
        ('| true; exit ${PIPESTATUS[0]}', 'cannot write to stdout (Broken pipe); continuing without it\n'),
        pytest.param(
            '>/dev/full',
            'cannot write to stdout (No space left on device); continuing without it\n',
            marks=pytest.mark.slow,
        ),
        pytest.param('<&- >&- 2>&-', '', marks=pytest.mark.slow),
        pytest.param('>&-', '', marks=pytest.mark.slow),
        pytest.param('>/dev/full 2>/dev/full', '', marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_without_its_console(recipe, tmp_path, redirection, noted):
    run = f'{sys.executable} train.py --config={recipe} --workdir={tmp_path} --config.steps=2'
    done = shell(f'{run} {redirection}')
    assert (done.returncode, done.stderr) == (0, noted)
    assert saved_steps(tmp_path) == [2]
    damaged = [
        path for path in tmp_path.rglob('*') if path.is_file() and b'evaluation: loss' in path.read_bytes()
    ]
    assert damaged == []  # a closed descriptor's number was not given to a file


def test_a_run_without_a_console_ends_by_its_own_result(recipe, tmp_path):
    run = f'{sys.executable} train.py --config={recipe} --workdir={tmp_path} --config.batch_size=-1'
    assert shell(f'{run} >/dev/full 2>/dev/full').returncode == 2
    assert shell(f'{run} >&- 2>&-').returncode == 2


@pytest.mark.slow
def test_a_flag_file_that_does_not_exist_gives_one_line_and_status_2(recipe, tmp_path):
    arguments = (f'--config={recipe}', f'--workdir={tmp_path / "run"}')
    for missing in ('no/such', tmp_path):
        assert_one_clear_line(train(*arguments, f'--flagfile={missing}'), str(missing))
    (tmp_path / 'flags').write_text(f'--config.steps=1\n--workdir={tmp_path / "other"}\n')
    assert train(arguments[0], f'--flagfile={tmp_path / "flags"}').returncode == 0


@pytest.mark.parametrize('platform', ['cuda', 'tpu', 'typo'])
def test_a_platform_that_is_not_there_gives_one_line_and_status_2(recipe, tmp_path, monkeypatch, platform):
    monkeypatch.setenv('JAX_PLATFORMS', platform)
    process = train(f'--config={recipe}', f'--workdir={tmp_path / "run"}')
    assert_one_clear_line(process, f'JAX_PLATFORMS={platform}', 'JAX_PLATFORMS=cpu')
    assert not (tmp_path / 'run').exists()
