"""The same images in every form give the same batches; how the files of a split are found."""

import itertools
import os
import pickle

import numpy as np
import pytest
from command import run
from labelled_files import class_folders, image, write_all, write_csv, write_parquet, write_tar

from epsanet_jax import InputError
from epsanet_jax.data.formats import find, open_labelled
from epsanet_jax.data.pipeline import Reading, Rows, train_batches
from epsanet_jax.data.transforms import RandomCrop, TrainTransform
from epsanet_jax.training import datasets
from epsanet_jax.training.config import DataConfig

FORMS = ('records', 'parquet', 'shards', 'csv', 'metadata')
TRANSFORM = TrainTransform(RandomCrop(16))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))


@pytest.fixture(scope='module')
def forms(tmp_path_factory):
    """300 training images and 9 validation images as class folders and in every other form."""
    root = tmp_path_factory.mktemp('forms')
    class_folders(root / 'folder/train', 300)
    class_folders(root / 'folder/val', 9)
    for split in ('train', 'val'):
        write_all(root, root / 'folder', split)
    return root


@pytest.fixture(scope='module')
def records(forms):
    from epsanet_jax.data.prepare.dataset import prepare

    prepare(str(forms / 'folder'), str(forms / 'records'), num_workers=1)
    return forms / 'records'


def opened(forms, form):
    kind = 'records' if form == 'records' else 'folder'
    train, evaluation, _ = datasets.open_splits(DataConfig(source=kind, dir=str(forms / form)))
    return train, evaluation


def batches_of(source, processes=1, start=0, steps=9, workers=0):
    """Global batches, joined from those of all processes."""
    parts = []
    for process in range(processes):
        rows, reading = Rows(40, process, processes), Reading(workers=workers)
        batches = train_batches(source, TRANSFORM, rows, 3, start, reading)
        parts.append(list(itertools.islice(batches, steps)))
        batches.close()
    keys = ('image', 'label', 'bad_index')
    return [{k: np.concatenate([p[k] for p in step]) for k in keys} for step in zip(*parts, strict=True)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


@pytest.mark.parametrize('form', FORMS)
def test_every_form_gives_the_batches_of_the_folder(forms, records, form):
    (folder, _), (source, evaluation) = opened(forms, 'folder'), opened(forms, form)
    assert (source.class_names, len(source), len(evaluation)) == (folder.class_names, 300, 9)
    expected = batches_of(folder)
    assert_same(batches_of(source), expected)  # more than an epoch
    assert_same(batches_of(pickle.loads(pickle.dumps(source)), 2, start=7, steps=2), expected[7:])
    assert source.fingerprint == opened(forms, form)[0].fingerprint != evaluation.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize('form', ['folder', *FORMS])
@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('workers', [0, 2])
def test_batches_do_not_depend_on_processes_workers_and_resumption(forms, records, form, processes, workers):
    expected = batches_of(opened(forms, 'folder')[0])
    source, _ = opened(forms, form)
    assert_same(batches_of(source, processes, workers=workers), expected)
    assert_same(batches_of(source, processes, 7, 2, workers), expected[7:])


@pytest.mark.parametrize('form', ['parquet', 'shards', 'csv', 'metadata'])
def test_every_form_can_be_prepared(forms, tmp_path, capsys, form):
    status, _, err = run(capsys, 'prepare', forms / form, tmp_path / 'out', '--workers', 1)
    assert status == 0, err
    assert 'images of 3 classes; images' in err
    made, _, _ = datasets.open_splits(DataConfig(source='records', dir=str(tmp_path / 'out')))
    source, _ = opened(forms, form)
    assert made.class_names == source.class_names
    assert [made[i] for i in range(300)] == [source[i] for i in range(300)]
    status, out, err = run(capsys, 'prepare', forms / form, tmp_path / 'out', '--workers', 1)
    assert (status, 'nothing was done' in out) == (0, True), err


def test_preparation_keeps_the_order_and_the_declared_classes(tmp_path, capsys):
    labels = [2, 0, 2, 1, 0, 2, 1]
    images = [image(i) for i in range(7)]
    write_parquet(tmp_path / 'in/train.parquet', images, labels, ['zoo', 'ape', 'yak', 'none'])
    status, _, err = run(capsys, 'prepare', tmp_path / 'in/train.parquet', tmp_path / 'out', '--workers', 1)
    assert status == 0, err
    assert "'train' has no image of these classes: none" in err
    made, _, _ = datasets.open_splits(
        DataConfig(source='records', dir=str(tmp_path / 'out'), eval_split='train')
    )
    assert made.class_names == ('zoo', 'ape', 'yak', 'none')
    assert [(made[i]['label'], made[i]['image']) for i in range(7)] == [*zip(labels, images, strict=True)]


def found_in(folder, split):
    found = find(str(folder), split)
    return found and [os.path.relpath(path, folder) for path in found.files]


def test_files_of_a_split_are_found_by_name(tmp_path):
    for name in ('train-0-of-2', 'train-1-of-2', 'validation-0-of-1'):
        write_parquet(tmp_path / f'hub/data/{name}.parquet', [image(0)], [0])
    assert found_in(tmp_path / 'hub', 'train') == ['data/train-0-of-2.parquet', 'data/train-1-of-2.parquet']
    assert found_in(tmp_path / 'hub', 'val') == ['data/validation-0-of-1.parquet']
    assert found_in(tmp_path / 'hub', 'test') is None
    for name in ('imagenet-train-00', 'imagenet-valid-00'):
        write_tar(tmp_path / f'tars/{name}.tar', [('0.jpg', image(0)), ('0.cls', b'0')])
    assert found_in(tmp_path / 'tars', 'val') == ['imagenet-valid-00.tar']
    write_parquet(tmp_path / 'folders/val/0000.parquet', [image(0)], [0])
    assert found_in(tmp_path / 'folders', 'val') == ['val/0000.parquet']
    write_csv(tmp_path / 'named/labels-1.csv', [('x.jpg', 'a')])
    assert found_in(tmp_path / 'named', 'labels-1.csv') == ['labels-1.csv']
    assert found_in(tmp_path / 'named', 'train') is None


def test_class_folders_stay_class_folders(tmp_path):
    class_folders(tmp_path / 'train')
    write_csv(tmp_path / 'train.csv', [('path', 'label'), ('train/ant/000.jpg', 'bee')])
    write_parquet(tmp_path / 'train-features.parquet', [image(0)], [0])
    write_csv(tmp_path / 'train/metadata.csv', [('file_name', 'text'), ('ant/000.jpg', 'an ant')])
    assert found_in(tmp_path, 'train') is None
    write_csv(tmp_path / 'train/metadata.csv', [('file_name', 'label'), ('ant/000.jpg', 'bee')])
    assert found_in(tmp_path, 'train') == ['train/metadata.csv']
    write_tar(tmp_path / 'class/cat.tar', [('1.jpg', image(0)), ('2.jpg', image(1))])
    assert found_in(tmp_path, 'class') is None


def test_several_kinds_of_files_are_refused(tmp_path):
    write_parquet(tmp_path / 'train.parquet', [image(0)], [0])
    write_csv(tmp_path / 'train.csv', [('x.jpg', 'a')])
    with pytest.raises(InputError, match=r'holds train.csv, train.parquet: keep one kind of files there'):
        find(str(tmp_path), 'train')
    (tmp_path / 'train.csv').unlink()
    write_parquet(tmp_path / 'training.parquet', [image(0)], [0])
    assert found_in(tmp_path, 'train') == ['train.parquet']
    with pytest.raises(InputError, match=r'holds train and training, which mean the same split'):
        find(str(tmp_path), 'Train')


def test_file_without_the_split_is_refused(tmp_path):
    write_parquet(tmp_path / 'train.parquet', [image(0)], [0])
    with pytest.raises(
        InputError, match=r"train.parquet is not named as the split 'val': give its folder as"
    ):
        datasets.open_splits(DataConfig(source='folder', dir=str(tmp_path / 'train.parquet')))
    (tmp_path / 'train.parquet').rename(tmp_path / '0.parquet')
    with pytest.raises(InputError, match='the names of the files in .* must begin with train'):
        datasets.open_splits(DataConfig(source='folder', dir=str(tmp_path)))


def test_what_was_taken_is_reported(tmp_path):
    write_parquet(tmp_path / 'train.parquet', [image(i) for i in range(4)], [1, 0, 1, 1], ['cat', 'dog'])
    source, line = open_labelled(find(str(tmp_path), 'train'))
    assert line == (
        f"{tmp_path}/train.parquet: 4 images of 2 classes; images in the column 'image', labels in "
        "'label', named by the schema"
    )
    assert [source[i]['label'] for i in range(4)] == [1, 0, 1, 1]
