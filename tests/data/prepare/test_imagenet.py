"""ImageNet's own tars, with the labels of TFDS and with a list of labels."""

import io
import re
import tarfile
from collections import Counter

import pytest
import tensorflow_datasets as tfds

from epsanet_jax.data.prepare import imagenet as module

from .helpers import jpeg, packed, prepared, records, refusal, write

SYNSETS = ('n01440764', 'n02102040', 'n03888257')
TRUTH = {1: SYNSETS[2], 2: SYNSETS[0], 3: SYNSETS[0], 4: SYNSETS[1]}  # by number of the validation image


@pytest.fixture
def imagenet(tmp_path):
    """ImageNet's two tars, with two training images per synset and four validation images."""
    root = tmp_path / 'imagenet'
    inner = {
        f'{s}.tar': packed({f'{s}_{j}.JPEG': jpeg(2 * i + j) for j in (1, 0)}) for i, s in enumerate(SYNSETS)
    }
    write(root / module.TRAIN_TAR, packed(dict(reversed(inner.items()))))
    names = [f'ILSVRC2012_val_0000000{i}.JPEG' for i in (4, 1, 3, 2)]
    write(root / module.VALIDATION_TAR, packed({name: jpeg(int(name[-6])) for name in names}))
    return root


def test_list_of_labels_follows_the_sorted_file_names(imagenet, tmp_path, capsys):
    write(tmp_path / 'labels.txt', ''.join(f'{TRUTH[i]}\r\n' for i in (1, 2, 3, 4)).encode())
    out, _ = prepared(capsys, imagenet, tmp_path / 'out', '--labels', tmp_path / 'labels.txt')
    assert '--config=configs/imagenet.py --config.data.source=records' in out
    assert tfds.builder_from_directory(tmp_path / 'out').name == 'imagenet2012'
    train, validation = records(tmp_path / 'out', 'train'), records(tmp_path / 'out', 'validation')
    assert train == [(f'{s}_{j}.JPEG', s, jpeg(2 * i + j)) for i, s in enumerate(SYNSETS) for j in (0, 1)]
    assert sorted(validation) == [(f'ILSVRC2012_val_0000000{i}.JPEG', s, jpeg(i)) for i, s in TRUTH.items()]
    assert [label for _, label, _ in validation] == sorted(TRUTH.values())  # class by class, as in folders


@pytest.mark.slow
def test_whole_validation_tar_needs_no_list(tmp_path):
    with tarfile.open(tmp_path / module.VALIDATION_TAR, 'w') as tar:
        for number in reversed(range(1, 50_001)):
            header = tarfile.TarInfo(f'ILSVRC2012_val_{number:08d}.JPEG')
            header.size = 1
            tar.addfile(header, io.BytesIO(b'x'))
    items = module.list_tars(str(tmp_path), None)['validation']
    by_name = {item.name: item.class_name for item in items}
    assert [by_name[f'ILSVRC2012_val_0000000{i}.JPEG'] for i in (1, 2, 3)] == [
        'n01751748',
        'n09193705',
        'n02105855',
    ]
    counts = Counter(by_name.values())
    assert (len(by_name), len(counts), set(counts.values())) == (50_000, 1000, {50})
    assert [item.class_name for item in items] == sorted(by_name.values())


def test_part_of_the_validation_tar_needs_a_list(imagenet, tmp_path, capsys):
    line = refusal(capsys, imagenet, tmp_path / 'out')
    assert re.search(
        r'img_val.tar has 4 images, not the 50,000 of ImageNet: get the whole tar, or give .* --labels', line
    )


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        ('3\n1\n1\n2\n', r"line 1: expected a synset \(n01440764\), got '3'"),
        ('n01440764\n' * 3, 'has 3 labels, .*ILSVRC2012_img_val.tar has 4 images'),
        ('', 'has 0 labels'),
        ('n01440764\n' * 3 + 'n09999999\n', 'img_train.tar lacks 1 synsets .*: n09999999'),
        ('n01440764\nn01440764\ntench\nn01440764\n', "line 3: expected a synset .*got 'tench'"),
        ('ILSVRC2012_val_00000001.JPEG 3\n', 'line 1: expected a synset'),
        (b'\xff\xfe\x00', 'is not a text file: expected one synset per line'),
        (None, 'cannot read the labels in .*: No such file'),
    ],
)
def test_labels_that_cannot_be_right_are_refused(imagenet, tmp_path, capsys, labels, message):
    path = tmp_path / 'labels.txt'
    if labels is not None:
        write(path, labels if isinstance(labels, bytes) else labels.encode())
    line = refusal(capsys, imagenet, tmp_path / 'out', '--labels', path)
    assert re.search(f'error: .*{message}', line)


def test_labels_are_for_imagenet_only(tmp_path, capsys):
    write(tmp_path / 'in/cat/1.jpg', jpeg(0))
    line = refusal(capsys, tmp_path / 'in', tmp_path / 'out', '--labels', 'x.txt')
    assert '--labels is for ILSVRC2012_img_val.tar' in line


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (packed({'1.jpg': jpeg(0)}), "holds '1.jpg': expected one tar per synset"),
        (packed({'n01440764.tar': packed({'1.JPEG': jpeg(0)})[:600]}), 'n01440764.tar is truncated'),
        (packed({'n01440764.tar': packed({'a.txt': b''})}), 'empty class: .*n01440764.tar holds no image'),
        (packed({}), 'img_train.tar holds no tar of images'),
    ],
)
def test_training_tar_that_is_not_imagenet_s_is_refused(tmp_path, capsys, content, message):
    write(tmp_path / 'in' / module.TRAIN_TAR, content)
    assert re.search(f'error: .*{message}', refusal(capsys, tmp_path / 'in', tmp_path / 'out'))
