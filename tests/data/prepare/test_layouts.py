"""The layouts of a source, and the sources that are refused."""

import re

import pytest
from command import run

from epsanet_jax.data.sources import ImageFolder

from .helpers import TRAIN, VAL, jpeg, packed, prepared, records, refusal, write


def tar_per_split(root):
    write(root / 'train.tar', packed({**TRAIN, 'cat/notes.txt': b'', 'stray.jpg': b''}, ['cat', 'dog', 'Ox']))
    write(root / 'val.tar', packed({f'./{name}': content for name, content in VAL.items()}, ['.', './dog']))


def tar_per_split_with_its_folder(root):
    for split, files in (('train', TRAIN), ('val', VAL)):
        write(root / f'{split}.tar', packed({f'{split}/{n}': c for n, c in files.items()}, [split]))


def tar_per_class(root):
    for split, files in (('train', TRAIN), ('val', VAL)):
        for class_name in {name.split('/')[0] for name in files}:
            own = {n.partition('/')[2]: c for n, c in files.items() if n.startswith(f'{class_name}/')}
            write(root / split / f'{class_name}.tar', packed(own))


def tar_per_class_with_its_folder(root):
    for split, files in (('train', TRAIN), ('val', VAL)):
        for class_name in {name.split('/')[0] for name in files}:
            own = {n: c for n, c in files.items() if n.startswith(f'{class_name}/')}
            write(root / split / f'{class_name}.tar', packed(own))


@pytest.mark.parametrize(
    'pack', [tar_per_split, tar_per_split_with_its_folder, tar_per_class, tar_per_class_with_its_folder]
)
def test_tars_give_the_same_shards_as_folders(folder, tmp_path, capsys, pack):
    pack(tmp_path / 'tars')
    prepared(capsys, folder, tmp_path / 'from_folder')
    prepared(capsys, tmp_path / 'tars', tmp_path / 'from_tars')
    for path in sorted((tmp_path / 'from_folder').glob('*array_record*')):
        assert (tmp_path / 'from_tars' / path.name).read_bytes() == path.read_bytes()
    source = ImageFolder(folder / 'train')
    assert [(source.name_of(i), source[i]['image']) for i in range(len(source))] == [
        (str(folder / 'train' / name), image) for name, _, image in records(tmp_path / 'from_tars', 'train')
    ]


def test_class_folders_alone_are_the_training_split(images, tmp_path, capsys):
    out, _ = prepared(capsys, images / 'train', tmp_path / 'records')
    assert 'train on it' not in out  # there is no split to evaluate on
    assert [r[0] for r in records(tmp_path / 'records', 'train')] == [
        'B/ü.jpg',
        'B/deep/er/y.jpg',
        'a b/x.jpeg',
        'b/10.JPG',
        'b/2.jpg',
        'b/zz.jpg',
        'b/nested/1.jpeg',
    ]


def test_linked_folders_are_followed_and_cycles_skipped(folder, tmp_path, capsys):
    write(tmp_path / 'elsewhere/9.jpg', jpeg(9))
    (folder / 'train/cat/link').symlink_to(tmp_path / 'elsewhere')
    prepared(capsys, folder, tmp_path / 'out')
    source, found = ImageFolder(folder / 'train'), records(tmp_path / 'out', 'train')
    assert [image for *_, image in found] == [source[i]['image'] for i in range(len(source))]
    assert 'cat/link/9.jpg' in [name for name, *_ in found]
    (folder / 'train/cat/loop').symlink_to(folder / 'train/cat')
    out, err = prepared(capsys, folder, tmp_path / 'out')
    assert 'exists already; nothing was done' in out
    line = f'skipped 1 entry in {folder}: train/cat/loop: link to a folder that contains it'
    assert line in err.splitlines()


@pytest.mark.parametrize('name', ['train.tar.gz', 'train/cat.tgz', 'ILSVRC2012_img_val.tar.xz'])
def test_compressed_tars_are_refused(tmp_path, capsys, name):
    write(tmp_path / 'in' / name, b'')
    line = refusal(capsys, tmp_path / 'in', tmp_path / 'out')
    assert f'{name} is compressed, which prevents random access: decompress it first' in line


def test_class_that_train_lacks_is_refused(folder, tmp_path, capsys):
    write(folder / 'val/zebra/1.jpg', jpeg(0))
    assert "'val' has classes that train lacks: zebra" in refusal(capsys, folder, tmp_path / 'out')


def test_both_a_folder_and_a_tar_of_a_split_are_refused(folder, tmp_path, capsys):
    write(folder / 'val.tar', packed(VAL))
    assert 'holds both val and val.tar' in refusal(capsys, folder, tmp_path / 'out')
    (folder / 'val.tar').unlink()
    write(folder / 'train/dog.tar', packed({'1.jpg': jpeg(0)}))
    assert 'holds folders (Ox ...) and tars (dog.tar ...)' in refusal(capsys, folder, tmp_path / 'out')


def test_imagenet_s_tars_beside_split_folders_are_refused(folder, tmp_path, capsys):
    write(folder / 'ILSVRC2012_img_val.tar', packed({'1.JPEG': jpeg(0)}))
    assert 'holds ILSVRC2012_img_val.tar and train and val' in refusal(capsys, folder, tmp_path / 'out')


def test_empty_class_and_class_name_of_two_lines_are_refused(folder, tmp_path, capsys):
    (folder / 'train/empty').mkdir()
    assert 'train/empty holds no image' in refusal(capsys, folder, tmp_path / 'out')
    (folder / 'train/empty').rename(folder / 'train/two\nlines')
    write(folder / 'train/two\nlines/1.jpg', jpeg(0))
    assert 'cannot be stored as a line of text: rename the class' in refusal(capsys, folder, tmp_path / 'out')


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('missing', 'no such folder: .*missing'),
        ('file', 'no such folder: .*file: expected the folder that holds the tar'),
        ('empty', 'empty is empty: expected class folders'),
        ('images/train/b/nested', 'no class folders in .*nested'),
        (
            'file_as_split',
            'train is not a folder: expected a folder that holds one folder of images per class',
        ),
    ],
)
def test_source_in_no_known_layout_is_refused(images, tmp_path, capsys, source, message):
    (tmp_path / 'empty').mkdir()
    write(tmp_path / 'file', b'')
    write(tmp_path / 'file_as_split/train', b'')
    status, out, err = run(capsys, 'prepare', tmp_path / source, tmp_path / 'out')
    assert (status, out) == (2, '')
    assert re.search(f'error: .*{message}', err.splitlines()[-1])
    assert not (tmp_path / 'out').exists()
