"""The dataset as a whole: order, metadata, checksums and the printed report."""

import subprocess

import numpy as np
import tensorflow_datasets as tfds
from command import run

from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.prepare.dataset import Counts, Prepared, describe

from .helpers import records


def test_record_i_is_image_i_of_the_folder(images, tmp_path, capsys):
    dst = tmp_path / 'records'
    status, out, err = run(capsys, 'prepare', images, dst, '--workers', 1)
    assert status == 0, err
    assert 'train: 7 images (7 kept byte for byte, 0 converted), 0 skipped' in out
    assert f'--config.data.source=records --config.data.dir={dst} --workdir' in out
    assert 'not used: README' in err
    for split in ('train', 'val'):
        folder, found = ImageFolder(images / split), records(dst, split)
        assert len(found) == len(folder)
        for i, (name, label, image) in enumerate(found):
            assert image == folder[i]['image']
            assert str(images / split / name) == folder.name_of(i)
            assert label == folder.class_names[folder[i]['label']]
    assert not (dst / '.progress').exists()


def test_tfds_reads_the_dataset_without_tensorflow(images, tmp_path, capsys):
    dst = tmp_path / 'records'
    assert run(capsys, 'prepare', images, dst, '--name', 'pets', '--workers', 1)[0] == 0
    builder = tfds.builder_from_directory(dst)
    assert builder.info.features['label'].names == ['B', 'a b', 'b']
    assert builder.info.supervised_keys == ('image', 'label')
    assert (builder.name, builder.info.splits['train'].num_examples) == ('pets', 7)
    image = builder.as_data_source('val')[0]['image']
    assert (image.shape, image.dtype) == ((24, 40, 3), np.uint8)
    subprocess.run(['sha256sum', '--check', '--quiet', 'checksums.sha256'], cwd=dst, check=True)
    assert len((dst / 'checksums.sha256').read_text().splitlines()) == len(list(dst.iterdir())) - 1


def test_split_with_only_bad_images_is_refused(images, tmp_path, capsys):
    for path in (images / 'val').rglob('*.jpg'):
        path.write_bytes(b'')
    status, _, err = run(capsys, 'prepare', images, tmp_path / 'out', '--on-bad=skip', '--workers', 1)
    assert status == 2
    assert "no image of 'val' can be decoded" in err


def test_report_says_what_was_written_and_how_to_train():
    counts = {'train': Counts(1000, 234, 5, 12_340_000, 2), 'test': Counts(1, 0, 0, 10, 1)}
    assert describe(Prepared('data/my pets', 'pets', counts, 1240, 2.0)) == [
        'train: 1,234 images (1,000 kept byte for byte, 234 converted), 5 skipped, 12.3 MB in 2 files',
        'test: 1 images (1 kept byte for byte, 0 converted), 0 skipped, 0.0 MB in 1 file',
        '1,240 images in 2.0 s, 620 per second',
        'train on it: python train.py --config=configs/image_folder.py --config.data.source=records '
        "--config.data.dir='data/my pets' --config.data.eval_split=test --workdir=runs/new",
    ]
