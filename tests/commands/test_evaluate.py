"""The command `epsanet evaluate`."""

import dataclasses
import json

import numpy as np
import pytest
import small
from command import run
from labelled_files import class_folders, write_all
from PIL import Image

from epsanet_jax import predict, save_pretrained
from epsanet_jax.training import loop
from epsanet_jax.training.config import CheckpointConfig, Config, DataConfig, ModelConfig
from epsanet_jax.training.evaluation import evaluate
from epsanet_jax.weights.network import Network


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


@pytest.mark.slow
def test_metrics_equal_those_of_the_training(capsys, digits_run):
    workdir, result = digits_run
    names = ('loss', 'top1', 'top5', 'examples', 'mean_class_accuracy')
    expected = {k: result.last[k] for k in names}
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


@pytest.mark.slow
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


@pytest.fixture(scope='module')
def one_class_each(tmp_path_factory):
    """An image that a network without names gives the class 10 of 12, in the folder of this number."""
    folder = tmp_path_factory.mktemp('numbers')
    net = small.model(**{**small.ONE_BLOCK, 'num_classes': 12})
    variables = small.random_variables(net, dtype=np.float32)
    variables['params']['fc']['kernel'][:] = 0
    variables['params']['fc']['bias'][:] = np.arange(12) == 10
    network = Network(net, variables, (), small.PREPROCESSING)
    for number in range(12):
        (folder / f'val/{number}').mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(folder / f'val/{number}/x.png')
    return network, folder


def test_folders_named_by_numbers_are_these_outputs_if_the_model_has_no_names(one_class_each):
    network, folder = one_class_each
    (predicted,) = predict(network, [str(folder / 'val/10/x.png')], top=1)
    assert predicted.classes.tolist() == [10]
    lines = []
    only_ten = folder / 'ten'
    (only_ten / '10').mkdir(parents=True)
    Image.new('RGB', (32, 32)).save(only_ten / '10/x.png')
    assert evaluate(network, str(only_ten), report=lines.append)['top1'] == 1
    assert lines == ['the model has no class names: class folder k is output k']
    assert evaluate(network, str(folder), report=lines.append)['top1'] == pytest.approx(1 / 12)


def test_classes_of_one_name_are_ambiguous_for_every_command(one_class_each, capsys, tmp_path):
    network, _ = one_class_each
    names = tuple('crane' if i in (3, 10) else f'class{i}' for i in range(12))
    save_pretrained(tmp_path / 'hub', dataclasses.replace(network, class_names=names))
    (tmp_path / 'data/crane').mkdir(parents=True)
    Image.new('RGB', (32, 32)).save(tmp_path / 'data/crane/x.png')
    status, _, err = run(capsys, 'evaluate', tmp_path / 'hub', '--data', tmp_path / 'data')
    assert (status, err.count('\n')) == (2, 1)
    assert "the model has 2 classes named 'crane': name the class crane (3), crane (10)" in err
    status, out, _ = run(capsys, 'predict', tmp_path / 'hub', tmp_path / 'data', '--top', 1, '--json')
    assert json.loads(out)[0]['predictions'][0]['class'] == 'crane (10)'
    explain = ('explain', tmp_path / 'hub', tmp_path / 'data', '--out', tmp_path / 'out', '--classes')
    status, _, err = run(capsys, *explain, 'crane')
    assert (status, "no class 'crane' (did you mean 'crane (3)'?)" in err) == (2, True)
    (tmp_path / 'data/crane').rename(tmp_path / 'data/crane (10)')
    status, out, _ = run(capsys, 'evaluate', tmp_path / 'hub', '--data', tmp_path / 'data', '--json')
    assert (status, json.loads(out)['top1']) == (0, 1)


def test_figures_of_classes_and_the_confusion_matrix(one_class_each, capsys, tmp_path):
    """The network decides for class 10 of 12; 3 images of this class, 2 of class 4."""
    network, _ = one_class_each
    save_pretrained(tmp_path / 'hub', network)
    for number, count in ((10, 3), (4, 2)):
        (tmp_path / f'data/{number}').mkdir(parents=True)
        for i in range(count):
            Image.new('RGB', (32, 32)).save(tmp_path / f'data/{number}/{i}.png')
    files = [tmp_path / f'x.{suffix}' for suffix in ('csv', 'png')]
    command = ('evaluate', tmp_path / 'hub', '--data', tmp_path / 'data', '--batch-size', 2, '--per-class')
    status, out, _ = run(capsys, *command, '--confusion', *files)
    assert status == 0
    assert '       3  100.00 %    60.00 %  10\n' in out
    assert '       2    0.00 %          -  4  (most often wrong as 10: 2)\n' in out
    assert 'top-1 60.00%' in out
    assert 'mean per class 50.00%' in out
    rows = files[0].read_text().splitlines()
    assert (rows[11].split(',')[11], rows[5].split(',')[11]) == ('3', '2')
    assert files[1].stat().st_size
    status, out, err = run(capsys, *command, '--confusion', *files)
    assert (status, out) == (2, '')
    assert 'x.csv exists (and 1 more); choose another --confusion, or replace it with --overwrite' in err
    status, out, _ = run(capsys, *command, '--confusion', files[0], '--overwrite', '--json')
    content = json.loads(out)
    assert content['mean_class_accuracy'] == 0.5
    assert [c['images'] for c in content['classes']] == [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 3, 0]
    status, _, err = run(capsys, *command, '--confusion', 'x.gif')
    assert (status, '--confusion must end with .csv' in err) == (2, True)


def test_every_form_of_the_same_images_has_the_same_metrics(one_class_each, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    network, _ = one_class_each
    names = tuple(f'class{i}' for i in range(12))
    save_pretrained(tmp_path / 'hub', dataclasses.replace(network, class_names=names))
    class_folders(tmp_path / 'val', 6, ('class3', 'class10'))
    write_all(tmp_path, tmp_path, 'val')
    (tmp_path / 'csv/val.csv').rename(tmp_path / 'csv/x.csv')
    table = (tmp_path / 'csv/x.csv').read_text().replace('label', 'breed,class,category')
    (tmp_path / 'csv/x.csv').write_text(
        table.replace('class3', 'class3,x,y').replace('class10', 'class10,x,y')
    )
    places = ('parquet', 'shards', 'metadata', 'parquet/data/val-00000-of-00002.parquet', 'csv/x.csv')
    expected = [(6, 0.5)] * 3 + [(3, 1.0), (6, 0.5)]
    for place, found in zip(places, expected, strict=True):
        column = ('--label-column', 'breed') if place == 'csv/x.csv' else ()
        status, out, err = run(
            capsys, 'evaluate', tmp_path / 'hub', '--data', tmp_path / place, '--json', *column
        )
        assert (status, err.count('\n')) == (0, 1), err
        assert ' images of 2 classes; images' in err
        content = json.loads(out)
        assert (content['examples'], content['top1']) == found
