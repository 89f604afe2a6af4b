"""The command `epsanet evaluate`."""

import json

import pytest
from command import run
from PIL import Image

from epsanet_jax.training import loop
from epsanet_jax.training.config import CheckpointConfig, Config, DataConfig, ModelConfig


@pytest.fixture(scope='module')
def digits_run(tmp_path_factory, digits_dir):
    """A short run on the digits."""
    workdir = tmp_path_factory.mktemp('digits') / 'run'
    model = ModelConfig(layers=(1,), planes=(8,), expansion=2, kernels=(3, 5), groups=(1, 2), reduction=2)
    data = DataConfig(
        source='tfds',
        name='digits',
        dir=digits_dir,
        eval_split='test',
        image_size=32,
        resize_size=32,
        flip=False,
    )
    checkpoint = CheckpointConfig(every_minutes=0, every_steps=10)
    config = Config(
        batch_size=32, steps=30, eval_every_epochs=0.0, model=model, data=data, checkpoint=checkpoint
    )
    return workdir, loop.train(config, str(workdir))


def test_metrics_equal_those_of_the_training(capsys, digits_run):
    workdir, result = digits_run
    expected = {k: result.last[k] for k in ('loss', 'top1', 'top5', 'examples')}
    for arguments in ((), ('--data', 'digits'), ('--data', 'digits', '--split', 'test', '--batch-size', 7)):
        status, out, err = run(capsys, 'evaluate', workdir, '--json', *arguments)
        assert (status, err) == (0, '')
        content = json.loads(out)
        assert content.pop('step') == 30
        assert content.pop('averaged') is False
        content.pop('checkpoint')
        assert content == pytest.approx(expected, rel=1e-5)
    status, out, _ = run(capsys, 'evaluate', workdir, '--step', 20, '--split', 'train')
    assert out.startswith('step 20, ')
    assert 'of 1437 images' in out


def test_classes_of_a_folder_are_matched_by_name(capsys, digits_run, digits_dir, tmp_path):
    """Two of the ten digits as a folder: their labels there, 0 and 1, are not those of the model."""
    from epsanet_jax.data.sources import Tfds

    source = Tfds('digits', 'test', digits_dir)
    chosen = {7: 'val/7', 3: 'val/3'}
    for i in range(len(source)):
        record = source[i]
        if record['label'] in chosen:
            path = tmp_path / chosen[record['label']] / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(record['image'])
    status, out, _ = run(capsys, 'evaluate', digits_run[0], '--data', tmp_path, '--json')
    assert status == 0
    content = json.loads(out)
    assert content['examples'] > 60
    assert content['top5'] > 0.5
    status, _, err = run(capsys, 'evaluate', digits_run[0], '--data', tmp_path, '--split', 'train')
    assert (status, 'no such data directory' in err) == (2, True)
    assert run(capsys, 'prepare', tmp_path, tmp_path.with_name('records'), '--workers', 1)[0] == 0
    status, out, _ = run(capsys, 'evaluate', digits_run[0], '--data', tmp_path.with_name('records'), '--json')
    assert status == 0
    assert json.loads(out)['examples'] == content['examples']
    assert json.loads(out)['top1'] == pytest.approx(content['top1'], abs=0.05)  # as JPEGs
    Image.new('RGB', (40, 40)).save(tmp_path / 'val/3/black.png')
    (tmp_path / 'val/7/broken.png').write_bytes(b'')
    status, _, err = run(capsys, 'evaluate', digits_run[0], '--data', tmp_path)
    assert (status, 'broken.png' in err, err.count('\n')) == (2, True, 1)
    skipping = ('--on-bad', 'skip', '--json')
    status, out, err = run(capsys, 'evaluate', digits_run[0], '--data', tmp_path, *skipping)
    assert status == 0
    assert json.loads(out)['examples'] == content['examples'] + 1
    assert json.loads(out)['skipped'] == 1
    assert 'broken.png' in err
    (tmp_path / 'val/cat').mkdir()
    Image.new('RGB', (40, 40)).save(tmp_path / 'val/cat/x.png')
    status, _, err = run(capsys, 'evaluate', digits_run[0], '--data', tmp_path)
    assert (status, 'classes that the model does not know: cat' in err) == (2, True)


@pytest.mark.parametrize(
    ('arguments', 'part'),
    [
        (('--data', '/no/such/data'), 'no such data directory: /no/such/data'),
        (
            ('--data', 'no_such_set'),
            "no TFDS dataset 'no_such_set' is known or found in TFDS's default folder, "
            "and there is no folder 'no_such_set'",
        ),
        (('--step', '11'), 'no checkpoint of step 11'),
        (('--step', 'newest'), "got 'newest'"),
        (('--split', 'val'), 'val'),
    ],
)
def test_missing_data_and_steps_are_errors_of_one_line(capsys, digits_run, arguments, part):
    status, _, err = run(capsys, 'evaluate', digits_run[0], *arguments)
    assert (status, err.count('\n')) == (2, 1)
    assert part in err


@pytest.mark.parametrize(
    ('arguments', 'part'),
    [
        (('--data', '{tmp}'), 'cannot open the dataset in {tmp}'),
        (('--data', 'gs://bucket/set'), '--data=gs://bucket/set is not on a disk'),
        (('--data', '~nobody_of_this_name/set'), 'no such data directory: ~nobody_of_this_name/set'),
    ],
)
def test_unreadable_data_are_errors_of_one_line(capsys, digits_run, tmp_path, arguments, part):
    (tmp_path / 'dataset_info.json').write_text('{"name": "cut')
    filled = [a.format(tmp=tmp_path) for a in arguments]
    status, _, err = run(capsys, 'evaluate', digits_run[0], *filled)
    assert (status, err.count('\n')) == (2, 1)
    assert part.format(tmp=tmp_path) in err
