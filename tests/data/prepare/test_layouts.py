"""The layouts of a source, and the sources that are refused."""

import re

import pytest
from command import run

from epsanet_jax import InputError
from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.sources import Records

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


def in_records(folder, split):
    """The classes and the labels of the classes of a split."""
    source = Records(folder, split)
    return source.class_names, {source[i]['label'] for i in range(len(source))}


def test_split_names_in_other_spellings_are_used_and_reported(folder, tmp_path, capsys):
    (folder / 'train').rename(folder / 'Training')
    (folder / 'val').rename(folder / 'VALID')
    _, err = prepared(capsys, folder, tmp_path / 'out')
    assert {"Training is used as 'train'", "VALID is used as 'val'"} < set(err.splitlines())
    assert in_records(tmp_path / 'out', 'train') == (('Ox', 'cat', 'dog'), {0, 1, 2})
    assert in_records(tmp_path / 'out', 'val')[1] == {1, 2}
    assert "'val' has no image of these classes: Ox" in err
    (folder / 'val').mkdir()
    line = refusal(capsys, folder, tmp_path / 'other')
    assert 'holds both VALID and val, which mean one split' in line


def test_images_without_classes_and_empty_classes_of_a_test_split_are_reported(folder, tmp_path, capsys):
    write(folder / 'test/1.jpg', jpeg(1))
    (folder / 'val/Ox').mkdir()
    _, err = prepared(capsys, folder, tmp_path / 'out')
    assert 'not used: 1 images in test without a class folder' in err.splitlines()
    assert f'skipped 1 entry in {folder}: val/Ox: no image' in err.splitlines()
    with pytest.raises(InputError):
        Records(tmp_path / 'out', 'test')


def test_hidden_folders_and_litter_are_no_classes(folder, tmp_path, capsys):
    for name in ('.ipynb_checkpoints/x.jpg', '__MACOSX/._x.jpg', '@eaDir/x.jpg', 'cat/._z.jpg'):
        write(folder / 'train' / name, jpeg(1))
    _, err = prepared(capsys, folder, tmp_path / 'out')
    (line,) = [line for line in err.splitlines() if line.startswith('skipped')]
    assert line.startswith(f'skipped 4 entries in {folder}: train/.ipynb_checkpoints: hidden, train/@eaDir')
    in_tar = {f'train/{name}': jpeg(1) for name in ('__MACOSX/cat/x.jpg', 'cat/._z.jpg')}
    write(tmp_path / 'tars/train.tar', packed({**{f'train/{n}': c for n, c in TRAIN.items()}, **in_tar}))
    write(tmp_path / 'tars/._val.tar', b'')
    _, err = prepared(capsys, tmp_path / 'tars', tmp_path / 'from_tar')
    assert 'skipped 2 entries' in err
    assert 'not used: ._val.tar' in err
    assert records(tmp_path / 'from_tar', 'train') == records(tmp_path / 'out', 'train')


@pytest.mark.parametrize('top', ['', 'pets/', 'pets/v2/'])
def test_one_tar_may_hold_all_classes_or_splits_in_folders(tmp_path, capsys, top):
    write(tmp_path / 'classes/pets.tar', packed({f'{top}{n}': c for n, c in TRAIN.items()}))
    _, err = prepared(capsys, tmp_path / 'classes', tmp_path / 'out')
    assert records(tmp_path / 'out', 'train')[0][:2] == ('Ox/ü.jpg', 'Ox')
    assert in_records(tmp_path / 'out', 'train') == (('Ox', 'cat', 'dog'), {0, 1, 2})
    assert (f"pets.tar: the classes are the folders in '{top[:-1]}'" in err) == bool(top)
    both = {f'{top}Train/{n}': c for n, c in TRAIN.items()} | {f'{top}val/{n}': c for n, c in VAL.items()}
    write(tmp_path / 'splits/pets.tar', packed(both))
    prepared(capsys, tmp_path / 'splits', tmp_path / 'out_splits')
    assert records(tmp_path / 'out_splits', 'train') == records(tmp_path / 'out', 'train')
    assert [name for name, *_ in records(tmp_path / 'out_splits', 'val')] == ['cat/1.jpg', 'dog/1.jpg']


def test_one_tar_of_images_is_one_class_and_its_litter_is_counted_once(tmp_path, capsys):
    write(tmp_path / 'in/cat.tar', packed({'1.jpg': jpeg(1), '._1.jpg': jpeg(2)}))
    _, err = prepared(capsys, tmp_path / 'in', tmp_path / 'out')
    assert records(tmp_path / 'out', 'train') == [('cat/1.jpg', 'cat', jpeg(1))]
    assert f'skipped 1 entry in {tmp_path}/in: cat.tar: ._1.jpg: hidden' in err.splitlines()


def test_split_folders_one_level_below_are_refused_with_the_path(folder, tmp_path, capsys):
    folder.rename(tmp_path / 'pets')
    write(tmp_path / 'in/README', b'')
    (tmp_path / 'pets').rename(tmp_path / 'in/pets')
    line = refusal(capsys, tmp_path / 'in', tmp_path / 'out')
    assert line.endswith(f'holds only the folder pets, which holds train, val: give {tmp_path}/in/pets')


@pytest.mark.parametrize('extension', ['cls', 'json', 'txt'])
@pytest.mark.parametrize('place', ['shard-000000.tar', 'train/shard-000000.tar', 'train.tar'])
def test_webdataset_shards_are_read_as_such(tmp_path, capsys, monkeypatch, place, extension):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    members = {'2.jpg': jpeg(0), f'2.{extension}': b'1', '1.jpg': jpeg(1), f'1.{extension}': b'0'}
    write(tmp_path / 'in' / place, packed(members))
    _, err = prepared(capsys, tmp_path / 'in', tmp_path / 'out')
    assert f'in/{place}: 2 images of 2 classes; images, labels in KEY.{extension}' in err
    assert records(tmp_path / 'out', 'train') == [('2.jpg', '1', jpeg(0)), ('1.jpg', '0', jpeg(1))]


@pytest.mark.parametrize('place', ['cat.tar', 'train.csv'])
def test_file_that_is_no_source_is_refused(tmp_path, capsys, place):
    write(tmp_path / place, packed({'cat/1.jpg': jpeg(0), 'cat/2.jpg': jpeg(1)}))
    line = refusal(capsys, tmp_path / place, tmp_path / 'out')
    assert 'expected the folder that holds the tar' in line or 'is not UTF-8 text' in line


def test_tables_beside_class_folders_are_not_used(folder, tmp_path, capsys):
    for name in ('train.csv', 'test.csv', 'labels.csv'):
        write(folder / name, b'file,label\n')
    _, err = prepared(capsys, folder, tmp_path / 'out')
    assert 'not used: labels.csv, test.csv, train.csv' in err
    assert len(records(tmp_path / 'out', 'train')) == len(TRAIN)


def test_splits_of_two_kinds_are_refused(tmp_path, capsys):
    write(tmp_path / 'in/train.csv', b'a.jpg,cat\n')
    write(tmp_path / 'in/a.jpg', jpeg(0))
    write(tmp_path / 'in/val/cat/1.jpg', jpeg(1))
    line = refusal(capsys, tmp_path / 'in', tmp_path / 'out')
    assert 'val is of another kind than the other splits' in line


def test_class_names_are_numbers_or_composed_and_one_class_is_a_warning(tmp_path, capsys):
    for i in range(11):
        write(tmp_path / f'numbers/{i}/x.jpg', jpeg(i))
    prepared(capsys, tmp_path / 'numbers', tmp_path / 'out')
    by_number = {image: int(name) for _, name, image in records(tmp_path / 'out', 'train')}
    source = Records(tmp_path / 'out', 'train')
    assert all(source[i]['label'] == by_number[source[i]['image']] for i in range(11))
    write(tmp_path / 'in/train.tar', packed({'cafe\u0301/x.jpg': jpeg(1)}))
    _, err = prepared(capsys, tmp_path / 'in', tmp_path / 'one')
    assert "warning: the source has one class only, 'caf\u00e9': nothing can be learned" in err
    assert Records(tmp_path / 'one', 'train').class_names == ('caf\u00e9',)


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
