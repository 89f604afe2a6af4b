"""Image folders: files, classes and labels."""

import unicodedata

import pytest
from PIL import Image

from epsanet_jax import InputError
from epsanet_jax.data.decode import decode
from epsanet_jax.data.image_folder import ImageFolder


def write(path, color=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 3), (color, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(['b/2.png', 'b/10.PNG', 'a/x.jpeg', 'B/nested/deeper/y.bmp', 'b/nested/z.png']):
        write(tmp_path / name, i)
    (tmp_path / 'b' / 'notes.txt').write_text('no image')
    (tmp_path / 'stray.png').write_bytes(b'')
    return tmp_path


def test_image_folder_has_torchvision_s_order(folder):
    source = ImageFolder(folder)
    assert source.class_names == ('B', 'a', 'b')
    names = [source.name_of(i).removeprefix(f'{folder}/') for i in range(len(source))]
    assert names == ['B/nested/deeper/y.bmp', 'a/x.jpeg', 'b/10.PNG', 'b/2.png', 'b/nested/z.png']
    assert [source[i]['label'] for i in range(5)] == [0, 1, 2, 2, 2]
    assert decode(source[3]['image']).getpixel((0, 0)) == (0, 0, 0)
    assert source[3]['image'] == (folder / 'b/2.png').read_bytes()


def test_fingerprint_depends_on_the_names_and_not_on_the_place(folder, tmp_path_factory):
    before = ImageFolder(folder).fingerprint
    elsewhere = tmp_path_factory.mktemp('elsewhere') / 'moved'
    folder.rename(elsewhere)
    assert ImageFolder(elsewhere).fingerprint == before
    write(elsewhere / 'a/new.png')
    assert ImageFolder(elsewhere).fingerprint != before


def test_invalid_folder_is_named(folder, tmp_path):
    with pytest.raises(InputError, match=r'no such data directory: .*missing'):
        ImageFolder(tmp_path / 'missing')
    (tmp_path / 'a' / 'x.jpeg').unlink()
    with pytest.raises(InputError, match=r'empty class folder: .*/a holds no image'):
        ImageFolder(folder)
    with pytest.raises(InputError, match='no class folders'):
        ImageFolder(folder / 'a')


def labels_of(source):
    """The label of each file."""
    return dict(zip(source.files, source.labels, strict=True))


def test_names_that_are_numbers_are_the_labels(tmp_path):
    for i in range(12):
        write(tmp_path / f'{i}/x.png')
    source = ImageFolder(tmp_path)
    assert source.class_names == tuple(str(i) for i in range(12))
    assert labels_of(source)['10/x.png'] == 10
    for i in range(12):  # as text, the order of the labels would be this one anyway: the same fingerprint
        (tmp_path / str(i)).rename(tmp_path / f'{i:02}')
    padded = ImageFolder(tmp_path)
    assert labels_of(padded)['10/x.png'] == 10
    (tmp_path / '11').rename(tmp_path / '12')  # not 0 to N-1
    assert ImageFolder(tmp_path).class_names[-1] == '12'
    assert labels_of(ImageFolder(tmp_path))['12/x.png'] == 11


def test_fingerprint_tells_labels_by_number_from_labels_by_text(tmp_path):
    from epsanet_jax.data.sources import fingerprint_of

    for i in range(11):
        write(tmp_path / f'{i}/x.png')
    source = ImageFolder(tmp_path)
    assert source.fingerprint != fingerprint_of(source.files)
    (tmp_path / '10/x.png').unlink()
    (tmp_path / '10').rmdir()
    source = ImageFolder(tmp_path)
    assert source.fingerprint == fingerprint_of(source.files)


def test_names_are_composed_and_two_spellings_of_one_name_are_refused(tmp_path):
    write(tmp_path / unicodedata.normalize('NFD', 'café') / 'x.png')
    write(tmp_path / 'caff/x.png')
    source = ImageFolder(tmp_path)
    assert source.class_names == ('caff', 'café')
    assert source.labels == [1, 0]  # on the disk, e and its accent come before f
    assert source[0]['label'] == 1
    write(tmp_path / unicodedata.normalize('NFC', 'café') / 'x.png')
    with pytest.raises(InputError, match='holds two spellings of one class name'):
        ImageFolder(tmp_path)


def test_classes_without_images_may_be_left_out(folder):
    (folder / 'c').mkdir()
    with pytest.raises(InputError, match=r'empty class folder: .*/c holds no image'):
        ImageFolder(folder)
    source = ImageFolder(folder, allow_empty=True)
    assert (source.class_names, source.empty) == (('B', 'a', 'b'), ('c',))
    (folder / 'B/nested/deeper/y.bmp').unlink()
    with pytest.raises(InputError, match=r'empty class folder: .*/nested holds no image'):
        ImageFolder(folder / 'B', allow_empty=True)  # nothing is left
