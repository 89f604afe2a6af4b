"""TFDS datasets, prepared records and synthetic images."""

import pickle

import numpy as np
import pytest
from command import run
from PIL import Image

from epsanet_jax import InputError
from epsanet_jax.data.decode import decode
from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.sources import Records, Synthetic, Tfds


@pytest.mark.parametrize(
    ('name', 'split', 'message'),
    [
        ('digitz', 'test', "no TFDS dataset 'digitz'"),
        ('digits', 'val', r'digits\[val\]'),
        ('mnist', 'test', "'mnist' is not prepared in"),
        ('digits:9.9.9', 'test', "cannot open the dataset 'digits:9.9.9'"),
        ('my data', 'test', "cannot open the dataset 'my data'"),
        ('digits', 'train[5:2]', r'digits\[train\[5:2\]\]'),
    ],
)
def test_missing_dataset_or_split_is_named(digits_dir, name, split, message):
    with pytest.raises(InputError, match=message):
        Tfds(name, split, digits_dir)


def test_synthetic_images_are_reproducible():
    a, b = Synthetic(6, 3, 32), Synthetic(6, 3, 32)
    assert (a.fingerprint, len(a)) == (b.fingerprint, 6)
    np.testing.assert_array_equal(a[4]['image'], b[4]['image'])
    assert a[4]['label'] == 1
    assert a[4]['image'].shape == (32, 32, 3)
    assert not np.array_equal(a[4]['image'], a[1]['image'])
    assert not np.array_equal(a[4]['image'], Synthetic(6, 3, 32, seed=1)[4]['image'])
    with pytest.raises(IndexError):
        a[6]


@pytest.fixture
def prepared(tmp_path_factory, capsys):
    root, records = tmp_path_factory.mktemp('images'), tmp_path_factory.mktemp('out') / 'records'
    for i, name in enumerate(['b/2.png', 'b/10.PNG', 'a/x.jpeg', 'B/nested/deeper/y.bmp', 'b/nested/z.png']):
        path = root / 'train' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 3), (i, 0, 0)).save(path)
    assert run(capsys, 'prepare', root, records, '--workers', '1')[0] == 0
    return root, records


def test_records_hold_the_images_of_the_folder(prepared):
    root, records = prepared
    source, made = ImageFolder(root / 'train'), Records(records, 'train')
    assert (len(made), made.class_names) == (len(source), source.class_names)
    for i in range(len(source)):
        assert made[i]['label'] == source[i]['label']
        difference = np.asarray(decode(made[i]['image']), float) - np.asarray(
            decode(source[i]['image']), float
        )
        assert np.abs(difference).mean() < 2
    assert 'a/x.jpeg' in made.name_of(1)
    assert pickle.loads(pickle.dumps(made))[1]['image'] == made[1]['image']


def test_invalid_records_are_named(prepared):
    root, records = prepared
    with pytest.raises(InputError, match=r'no prepared dataset in .*; `epsanet prepare` creates one'):
        Records(root, 'train')
    with pytest.raises(InputError, match=r'\[val\]'):
        Records(records, 'val')
    (root / 'dataset_info.json').write_text('{')
    with pytest.raises(InputError, match='cannot open the dataset in'):
        Records(root, 'train')
