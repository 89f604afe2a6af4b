"""Datasets of a configuration: splits, classes, and labels of the model."""

import pytest
from PIL import Image

from epsanet_jax import InputError
from epsanet_jax.data import sources
from epsanet_jax.training import datasets, loop
from epsanet_jax.training.config import DataConfig


def images(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new('RGB', (4, 3)).save(root / name / 'x.png')
    return root


def test_evaluation_split_with_a_class_that_training_lacks_is_refused(bad_folder):
    config, path = bad_folder
    (path / 'data/val/b').rename(path / 'data/val/c')
    with pytest.raises(InputError, match="'val' has classes that 'train' lacks: c"):
        loop.train(config, str(path / 'run'))


def test_evaluation_split_keeps_the_labels_if_classes_are_missing(tmp_path):
    images(tmp_path, 'train/a', 'train/b', 'train/c', 'train/d', 'val/b', 'val/d')
    (tmp_path / 'val/a').mkdir()
    train, evaluation, lines = datasets.open_splits(DataConfig(source='folder', dir=str(tmp_path)))
    assert train.class_names == evaluation.class_names == ('a', 'b', 'c', 'd')
    assert [evaluation[i]['label'] for i in range(2)] == [1, 3]
    assert lines == [
        f'{tmp_path}/val has no image of these classes: a',
        "'val' has no image of these classes: c",
    ]
    images(tmp_path, 'train/e')
    (tmp_path / 'train/e/x.png').unlink()
    with pytest.raises(InputError, match=r'empty class folder: .*train/e'):
        datasets.open_splits(DataConfig(source='folder', dir=str(tmp_path)))


def test_splits_are_found_in_other_spellings_which_is_reported(tmp_path):
    images(tmp_path, 'Training/a', 'Training/b', 'Valid/a', 'Valid/b')
    train, evaluation, lines = datasets.open_splits(DataConfig(source='folder', dir=str(tmp_path)))
    assert (len(train), len(evaluation)) == (2, 2)
    assert lines == [f"{tmp_path}/Training is used as 'train'", f"{tmp_path}/Valid is used as 'val'"]
    images(tmp_path, 'validation/a')
    with pytest.raises(InputError, match='holds Valid and validation, which mean the same split'):
        datasets.open_splits(DataConfig(source='folder', dir=str(tmp_path)))
    with pytest.raises(InputError, match=r'no such data directory: .*/fold1; .* holds Training, Valid'):
        datasets.open_source(DataConfig(source='folder', dir=str(tmp_path)), 'fold1')


def test_one_class_only_is_reported(tmp_path):
    images(tmp_path, 'train/a', 'val/a')
    *_, lines = datasets.open_splits(DataConfig(source='folder', dir=str(tmp_path)))
    assert lines == ["warning: 'train' has one class only, 'a': nothing can be learned"]


def test_labels_are_those_of_the_model():
    source = sources.Synthetic(6, 2, 32, 0)
    matched, assumption = datasets.with_labels_of(source, ('class1', 'x', 'class0'), 3)
    assert (len(matched), matched.class_names, assumption) == (6, ('class1', 'x', 'class0'), '')
    assert {(source[i]['label'], matched[i]['label']) for i in range(6)} == {(0, 2), (1, 0)}
    assert datasets.with_labels_of(source, (), 2)[0] is source


def test_the_data_of_an_evaluation_are_those_of_the_run_or_of_the_option(tmp_path):
    run = DataConfig(source='tfds', name='digits', dir='datasets', eval_split='test', image_size=48)

    def chosen(data=None, split=None, data_dir=None, trained_on=run):
        found = datasets.evaluation_data(trained_on, data, split, data_dir, 'skip')
        assert (found.image_size, found.on_bad) == (trained_on.image_size, 'skip')
        return found.source, found.name or found.dir, found.eval_split

    assert chosen() == chosen('digits') == ('tfds', 'digits', 'test')
    assert chosen(split='train') == ('tfds', 'digits', 'train')
    assert chosen('flowers') == ('tfds', 'flowers', 'test')
    folder = DataConfig(dir='somewhere')
    assert chosen(str(tmp_path), trained_on=folder) == ('folder', str(tmp_path), '.')
    (tmp_path / 'val').mkdir()
    assert chosen(str(tmp_path), trained_on=folder) == ('folder', str(tmp_path), 'val')
    table = str(tmp_path / 'x.csv')
    (tmp_path / 'test.csv').write_bytes(b'')
    (tmp_path / 'x.csv').write_bytes(b'')
    assert chosen(str(tmp_path), trained_on=folder) == ('folder', str(tmp_path), 'val')
    (tmp_path / 'val').rmdir()
    assert chosen(str(tmp_path), trained_on=folder) == ('folder', str(tmp_path), 'test')
    assert chosen(table, trained_on=folder) == ('folder', table, '.')
    assert chosen(table, 'val', trained_on=folder) == ('folder', table, 'val')
    for arguments, message in (
        ((table, None, 'datasets'), '--data-dir is for TFDS datasets, but .* is a file'),
        (('no.parquet',), 'no such data directory: no.parquet'),
        ((str(tmp_path), None, 'datasets'), '--data-dir is for TFDS datasets, but .* is a folder'),
        (('/no/such/folder',), 'no such data directory: /no/such/folder'),
        (('gs://bucket/data',), '--data=gs://bucket/data is not on a disk'),
        ((None, None, None, DataConfig()), '--data is missing'),
    ):
        with pytest.raises(InputError, match=message):
            chosen(*arguments)


def test_column_of_the_labels_is_that_of_the_run_for_its_data_only(tmp_path):
    run = DataConfig(dir=str(tmp_path), label_column='breed')
    for data, column, expected in ((None, None, 'breed'), (None, 'x', 'x'), (str(tmp_path), None, '')):
        assert datasets.evaluation_data(run, data, None, None, 'stop', column).label_column == expected


def test_file_without_an_image_of_the_classes_is_matched_by_name(tmp_path):
    """The validation table lacks a class, and the training labels are not sorted."""
    for split, labels in (('train', 'zba'), ('val', 'az')):
        images(tmp_path, split)
        (tmp_path / f'{split}.csv').write_text(''.join(f'{split}/x.png,{labels[0]}\n'))
        for i, label in enumerate(labels[1:]):
            (tmp_path / split / f'{i}.png').write_bytes((tmp_path / split / 'x.png').read_bytes())
            with open(tmp_path / f'{split}.csv', 'a') as f:
                f.write(f'{split}/{i}.png,{label}\n')
    train, evaluation, lines = datasets.open_splits(DataConfig(dir=str(tmp_path)))
    assert [train[i]['label'] for i in range(3)] == [2, 1, 0]
    assert [evaluation[i]['label'] for i in range(2)] == [0, 2]
    assert lines[-1] == "'val' has no image of these classes: b"
