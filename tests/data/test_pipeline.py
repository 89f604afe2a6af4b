"""Batches: the same rows on any number of processes, bad images, and restarts."""

import errno
import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest
from command import run
from PIL import Image

from epsanet_jax import InputError
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.pipeline import Reading, Rows, bad_image_message, eval_batches, train_batches
from epsanet_jax.data.sources import Records, Synthetic, Tfds
from epsanet_jax.data.transforms import CentreCrop, RandomCrop, TrainTransform

SOURCE = Synthetic(20, 4, 32)
CROP = TrainTransform(RandomCrop(32))
SIX_ROWS = Rows(6)


def take(n, rows=SIX_ROWS, start=0, source=SOURCE, **reading):
    batches = train_batches(source, CROP, rows, seed=5, start_step=start, reading=Reading(**reading))
    taken = list(itertools.islice(batches, n))
    batches.close()
    assert all((batch.pop('seconds') > 0).all() for batch in taken)
    return taken


def joined(parts):
    """The global batches, joined from those of several processes."""
    return [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts, strict=True)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for k in x:
            np.testing.assert_array_equal(x[k], y[k], err_msg=k)


def test_batch_holds_uint8_images_and_labels():
    (batch,) = take(1)
    assert batch['image'].shape == (6, 32, 32, 3)
    assert (batch['image'].dtype, batch['label'].dtype) == (np.uint8, np.int32)


def test_batches_after_a_restart_are_those_without_a_restart():
    assert_same(take(7)[4:], take(3, start=4))


@pytest.mark.parametrize('processes', [2, 3])
def test_every_process_holds_contiguous_rows(processes):
    parts = [take(3, Rows(6, i, processes), start=2) for i in range(processes)]
    assert_same(joined(parts), take(3, start=2))


@pytest.mark.parametrize('reading', [{'threads': 1}, {'threads': 5}, {'workers': 2}])
def test_batches_do_not_depend_on_threads_and_workers(reading):
    assert_same(take(4, start=1, **reading), take(4, start=1))


def test_every_epoch_holds_every_example_once_in_another_order():
    class Numbered:
        class_names, fingerprint = ('x',) * 20, ''

        def __len__(self):
            return 20

        def __getitem__(self, index):
            return {'image': np.zeros((32, 32, 3), np.uint8), 'label': index}

        def name_of(self, index):
            return str(index)

    labels = np.concatenate([b['label'] for b in take(10, source=Numbered())])
    epochs = labels.reshape(3, 20)
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert not np.array_equal(epochs[0], epochs[1])


def test_every_epoch_has_another_augmentation():
    epochs = np.concatenate([b['image'] for b in take(20)]).reshape(6, 20, -1)
    labels = np.concatenate([b['label'] for b in take(20)]).reshape(6, 20)
    assert len({image.tobytes() for image in epochs.reshape(120, -1)}) == 120
    assert (np.sort(labels, 1) == np.repeat(np.arange(4), 5)).all()


@pytest.mark.parametrize(('batch_size', 'processes'), [(6, 1), (7, 1), (20, 1), (64, 1), (8, 4), (6, 3)])
def test_evaluation_counts_every_example_once(batch_size, processes):
    parts = [
        list(eval_batches(SOURCE, CentreCrop(32, 32), Rows(batch_size, i, processes)))
        for i in range(processes)
    ]
    batches = joined(parts)
    assert {len(b['image']) for b in batches} == {batch_size}
    mask = np.concatenate([b['mask'] for b in batches])
    images = np.concatenate([b['image'] for b in batches])[mask]
    expected = np.stack([SOURCE[i]['image'] for i in range(20)])
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(np.concatenate([b['label'] for b in batches])[mask], np.arange(20) % 4)


def test_batch_size_1_is_valid():
    (batch,) = take(1, Rows(1))
    assert batch['image'].shape == (1, 32, 32, 3)


def test_label_out_of_range_is_an_error():
    class Unlabelled(Synthetic):
        def __getitem__(self, index):
            return {**super().__getitem__(index), 'label': -1}

    with pytest.raises(InputError, match='has the label -1, but there are 4 classes'):
        take(1, source=Unlabelled(20, 4, 32))


def test_file_that_cannot_be_read_is_a_bad_image(tmp_path):
    (tmp_path / 'a').mkdir()
    Image.new('RGB', (40, 40)).save(tmp_path / 'a' / '0.png')
    (tmp_path / 'a' / '1.png').write_bytes(b'')
    source = ImageFolder(tmp_path)
    (tmp_path / 'a' / '1.png').unlink()
    with pytest.raises(BadImageError, match=r'a/1.png: cannot read the image: No such file'):
        take(2, source=source)
    (batch,) = take(1, source=source, on_bad='skip')
    assert set(batch['bad_index']) == {-1, 1}


def test_batch_size_not_divisible_by_processes_is_an_error():
    with pytest.raises(InputError, match='batch of 6 is not divisible by 4 processes'):
        take(1, Rows(6, 0, 4))


@pytest.fixture
def folder_with_a_bad_image(tmp_path):
    for i in range(6):
        (tmp_path / 'abc'[i % 3]).mkdir(exist_ok=True)
        Image.new('RGB', (40, 40), (10 * i, 0, 0)).save(tmp_path / 'abc'[i % 3] / f'{i}.png')
    (tmp_path / 'b' / '4.png').write_bytes(b'no image')
    return ImageFolder(tmp_path)


@pytest.mark.parametrize('reading', [{}, {'workers': 1}])
def test_bad_image_stops_training_and_evaluation_and_is_named(folder_with_a_bad_image, reading):
    with pytest.raises(BadImageError, match=r'b/4.png: cannot decode the image'):
        take(2, source=folder_with_a_bad_image, **reading)
    with pytest.raises(BadImageError, match=r'b/4.png: cannot decode the image'):
        list(eval_batches(folder_with_a_bad_image, CentreCrop(32, 32), Rows(4), Reading(**reading)))


@pytest.mark.parametrize('reduced', [False, True])
def test_image_with_damaged_pixels_is_named(tmp_path, reduced):
    (tmp_path / 'a').mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / 'a' / '0.jpg', quality=95)
    jpeg = bytearray((tmp_path / 'a' / '0.jpg').read_bytes())
    table = jpeg.find(b'\xff\xc4') + 5  # of Huffman codes
    jpeg[table : table + 7] = b'\xff' * 7
    (tmp_path / 'a' / '0.jpg').write_bytes(jpeg)
    with pytest.raises(BadImageError, match=r'a/0.jpg: cannot decode the image'):
        take(1, Rows(1), source=ImageFolder(tmp_path), reduced=reduced)


def test_skipped_image_is_replaced_in_training_and_not_counted_in_evaluation(folder_with_a_bad_image):
    source = folder_with_a_bad_image
    (batch,) = take(1, source=source, on_bad='skip')
    bad = batch['bad_index'] >= 0
    assert batch['bad_index'][bad].tolist() == [3]
    assert source.name_of(3).endswith('b/4.png')
    assert batch['label'][bad] == source[4]['label'] == 2
    (batch,) = eval_batches(source, CentreCrop(32, 32), Rows(8), Reading(on_bad='skip'))
    assert batch['mask'].tolist() == [True, True, True, False, True, True, False, False]
    assert batch['bad_index'].max() == 3
    assert 'b/4.png: cannot decode' in bad_image_message(source, 3)


def test_many_bad_images_in_a_row_are_an_error(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'x.png').write_bytes(b'')
    with pytest.raises(BadImageError, match='100 images in a row cannot be decoded'):
        take(1, source=ImageFolder(tmp_path), on_bad='skip')


@pytest.fixture
def images(tmp_path, rng, capsys):
    """The same images three times: as a folder, as records, and by name from TFDS."""
    for i in range(13):
        place = tmp_path / 'images' / 'train' / 'ab'[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (50, 40 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f'{i}.jpg', quality=90)
    folder, records = tmp_path / 'images', tmp_path / 'data' / 'image_folder' / '1.0.0'
    assert run(capsys, 'prepare', folder, records, '--workers', '1')[0] == 0
    return [
        ImageFolder(folder / 'train'),
        Records(records, 'train'),
        Tfds('image_folder', 'train', str(tmp_path / 'data')),
    ]


@pytest.mark.parametrize(
    ('workers', 'processes'),
    [(0, 2), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((0, 1), (0, 3), (2, 1), (2, 2), (2, 3)))],
)
def test_folder_records_and_tfds_give_the_same_batches(images, processes, workers):
    """Workers take seconds to start: with workers, each number of processes reads one of the sources."""
    expected = take(3, source=images[0])
    for source in images if not workers else [images[processes - 1]]:
        parts = [take(3, Rows(6, i, processes), source=source, workers=workers) for i in range(processes)]
        assert_same(joined(parts), expected)


def test_process_holds_contiguous_rows_of_each_microbatch():
    expected = take(2, Rows(12))
    parts = [take(2, Rows(12, i, 2, microbatches=3)) for i in range(2)]
    for step in range(2):
        rows = [part[step]['image'].reshape(3, 2, 32, 32, 3) for part in parts]
        np.testing.assert_array_equal(np.concatenate(rows, 1).reshape(-1, 32, 32, 3), expected[step]['image'])


def test_reduced_decoding_changes_large_images_little(tmp_path, rng):
    (tmp_path / 'a').mkdir()
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    coarse.resize((1200, 900), Image.Resampling.BICUBIC).save(tmp_path / 'a' / '0.jpg', quality=95)
    source = ImageFolder(tmp_path)
    (exact,), (reduced,) = (take(1, Rows(4), source=source, reduced=value) for value in (False, True))
    difference = np.abs(exact['image'].astype(float) - reduced['image'])
    assert 0 < difference.mean() < 3


def test_damaged_record_is_a_bad_image(images):
    _, records, _ = images
    (path,) = Path(records._records.dataset_info.data_dir).glob('*-train.array_record-*')
    data = bytearray(path.read_bytes())
    place = data.index(b'a/4.jpg') - 300  # within the data of one image
    data[place : place + 40] = bytes(255 - byte for byte in data[place : place + 40])
    path.write_bytes(data)
    damaged = Records(path.parent, 'train')
    with pytest.raises(BadImageError, match=r'record \d+: the record is damaged: '):
        take(5, source=damaged)
    batches = take(5, source=damaged, on_bad='skip')
    assert len({i for batch in batches for i in batch['bad_index'].tolist()} - {-1}) == 1


def test_passing_errors_of_file_systems_are_retried(monkeypatch):
    failures = iter([errno.EIO, errno.ESTALE])

    class Flaky(Synthetic):
        def __getitem__(self, index):
            for number in failures:
                raise OSError(number, os.strerror(number))
            return super().__getitem__(index)

    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    assert_same(take(2, source=Flaky(20, 4, 32)), take(2))
