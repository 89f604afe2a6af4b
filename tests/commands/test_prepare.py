"""The command `epsanet prepare`; what it writes is tested in data/prepare."""

import pytest
from command import run
from labelled_files import class_folders, write_csv


@pytest.fixture
def folder(tmp_path):
    for split, count in (('train', 9), ('val', 6)):
        class_folders(tmp_path / 'in' / split, count)
    return tmp_path / 'in'


def test_says_what_it_wrote(tmp_path, capsys, folder):
    status, out, _ = run(capsys, 'prepare', folder, tmp_path / 'out', '--workers', 1, '--name', 'insects')
    assert status == 0
    assert out.startswith('train: 9 images (9 kept byte for byte, 0 converted), 0 skipped')
    assert f'--config.data.dir={tmp_path}/out' in out
    assert any('insects' in str(path) for path in (tmp_path / 'out').rglob('*'))


def test_images_that_cannot_be_decoded_stop_it_or_are_skipped(tmp_path, capsys, folder):
    (folder / 'val/bee/001.jpg').write_bytes(b'broken')
    status, out, err = run(capsys, 'prepare', folder, tmp_path / 'out', '--workers', 1)
    assert (status, out) == (2, '')
    assert 'val/bee/001.jpg' in err
    status, out, err = run(capsys, 'prepare', folder, tmp_path / 'out', '--workers', 1, '--on-bad=skip')
    assert status == 0
    assert 'val/bee/001.jpg' in out + err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--workers', '0'], 'expected a positive integer'),
        (['--on-bad', 'guess'], 'invalid choice'),
        (['--labels', 'names.txt'], '--labels is for ILSVRC2012_img_val.tar, which is not in'),
    ],
)
def test_wrong_options_write_nothing(tmp_path, capsys, folder, arguments, message):
    status, out, err = run(capsys, 'prepare', folder, tmp_path / 'out', *arguments)
    assert (status, out) == (2, '')
    assert message in err
    assert not (tmp_path / 'out').exists()


def test_column_of_labels_is_passed_on(tmp_path, capsys, folder):
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob('*.jpg'))
    rows = [(name, name.split('/')[1][0], name.split('/')[1]) for name in names]
    write_csv(folder / 'labels.csv', [('path', 'first', 'second'), *rows])
    table = folder / 'labels.csv'
    status, _, err = run(capsys, 'prepare', table, tmp_path / 'out', '--workers', 1)
    assert status == 2
    assert '--label-column' in err
    status, _, err = run(
        capsys, 'prepare', table, tmp_path / 'out', '--workers', 1, '--label-column', 'second'
    )
    assert status == 0
    assert "labels in 'second'" in err
