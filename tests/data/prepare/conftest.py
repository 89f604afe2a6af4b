import pytest

from .helpers import TRAIN, VAL, encoded, smooth, write


@pytest.fixture
def folder(tmp_path):
    """Two splits of three classes, with subfolders."""
    for split, files in (('train', TRAIN), ('val', VAL)):
        for name, content in files.items():
            write(tmp_path / 'folder' / split / name, content)
    return tmp_path / 'folder'


@pytest.fixture
def images(tmp_path):
    """Seven training images and two validation images that JPEG changes little."""
    root = tmp_path / 'images'
    names = ['b/2.jpg', 'b/10.JPG', 'b/nested/1.jpeg', 'b/zz.jpg', 'a b/x.jpeg', 'B/deep/er/y.jpg', 'B/ü.jpg']
    for i, name in enumerate(names):
        write(root / 'train' / name, encoded(smooth(i)))
    for i, name in enumerate(['b/v.jpg', 'B/w.jpg']):
        write(root / 'val' / name, encoded(smooth(100 + i)))
    write(root / 'train/b/notes.txt', b'no image')
    write(root / 'README', b'')
    return root
