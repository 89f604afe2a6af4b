"""Files and folders as named on a command line: found, checked and read in order."""

import itertools
import os

import numpy as np
import pytest
from PIL import Image

from epsanet_jax import InputError
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.data.image_files import ImageFile, check_paths, find_images, read_batches
from epsanet_jax.data.transforms import CentreCrop

CROP = CentreCrop(8, 8)


@pytest.fixture
def folder(tmp_path):
    """Five images of the colours 0 .. 4 in a folder and a subfolder, and a text file."""
    (tmp_path / 'sub.jpg').mkdir()  # a folder named like an image
    for i, name in enumerate(('a.png', 'b.PNG', 'c.bmp', 'sub.jpg/a.png', 'sub.jpg/d.png')):
        Image.new('RGB', (10, 12), (i, i, i)).save(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('no image')
    return tmp_path


def test_files_and_folders_are_found_in_the_order_given(folder):
    text, first = str(folder / 'notes.txt'), str(folder / 'a.png')
    found = list(find_images([text, str(folder / 'sub.jpg'), first]))
    assert found == [
        ImageFile(text, 0, 'notes.txt'),
        ImageFile(str(folder / 'sub.jpg/a.png'), 1, 'a.png'),
        ImageFile(str(folder / 'sub.jpg/d.png'), 1, 'd.png'),
        ImageFile(first, 2, 'a.png'),
    ]
    below = [file.below for file in find_images([f'{folder}/'])]
    assert below == ['a.png', 'b.PNG', 'c.bmp', 'sub.jpg/a.png', 'sub.jpg/d.png']


def test_relative_paths_stay_relative(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [file.path for file in find_images(['sub.jpg'])] == ['sub.jpg/a.png', 'sub.jpg/d.png']
    assert [os.path.normpath(file.path) for file in find_images(['.'])][-1] == 'sub.jpg/d.png'


def test_missing_path_and_folder_without_images_are_errors(folder):
    (folder / 'empty').mkdir()
    (folder / 'broken').symlink_to('nowhere')
    check_paths([str(folder), str(folder / 'notes.txt')])
    for name in ('missing.png', 'broken'):
        with pytest.raises(InputError, match=f'no such image or folder: .*{name}'):
            check_paths([str(folder / name)])
    with pytest.raises(InputError, match='empty holds no image'):
        check_paths([str(folder), str(folder / 'empty')])


@pytest.mark.parametrize('threads', [1, 3])
def test_batches_hold_the_images_in_order_and_zeros_after_the_last(folder, threads):
    batches = list(read_batches(find_images([str(folder)]), CROP, 2, threads))
    assert [len(files) for files, _ in batches] == [2, 2, 1]
    images = np.concatenate([images for _, images in batches])
    assert (images.shape, images.dtype) == ((6, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(images.reshape(6, -1), np.repeat([[0], [1], [2], [3], [4], [0]], 192, 1))


def test_bad_images_are_named_and_left_out(folder):
    (folder / 'b.PNG').write_bytes(b'no image')
    bad = []
    batches = list(read_batches(find_images([str(folder)]), CROP, 2, 2, on_bad=bad.append))
    assert [file.below for files, _ in batches for file in files] == [
        'a.png',
        'c.bmp',
        'sub.jpg/a.png',
        'sub.jpg/d.png',
    ]
    assert bad == [f'{folder}/b.PNG: cannot decode the image: not a known image format']
    with pytest.raises(BadImageError, match='b.PNG: cannot decode'):
        list(read_batches(find_images([str(folder)]), CROP, 2, 2))


def test_given_pipe_or_missing_file_is_a_bad_image(folder):
    os.mkfifo(folder / 'pipe')
    bad = []
    paths = [str(folder / name) for name in ('pipe', 'gone.png', 'a.png')]
    ((files, _),) = read_batches(find_images(paths), CROP, 2, 1, on_bad=bad.append)
    assert [file.below for file in files] == ['a.png']
    assert bad == [
        f'{folder}/pipe: cannot read the image: not a regular file',
        f'{folder}/gone.png: cannot read the image: No such file or directory',
    ]


def test_files_are_read_at_most_about_two_batches_ahead(folder):
    endless = itertools.count()
    taken = (ImageFile(str(folder / 'a.png'), 0, str(i)) for i in endless)
    batches = read_batches(taken, CROP, 4, threads=2)
    for _ in range(3):
        next(batches)
    batches.close()
    assert next(endless) <= 12 + 4 + 2 + 2
