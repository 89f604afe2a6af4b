"""Every command sees the same images of a folder, in the same order, with the same entries skipped."""

import errno
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from epsanet_jax import InputError
from epsanet_jax.data.image_files import check_paths, find_images, skipped_lines
from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.prepare import layouts
from epsanet_jax.data.walk import is_there, read_file, skipped_line, walk

# In the order of torchvision's ImageFolder: folders of a class are sorted by their whole path.
NAMES = [
    'B/nested/deeper/y.bmp',
    'a/x.jpeg',
    'a/under/h.tif',
    'b/10.PNG',
    'b/2.png',
    'b/ü.JPG',
    'b/nested/z.png',
    'b/x/1.jpg',
    'b/x-y/2.jpg',
    'b/x/z/3.jpg',
    'b-c/q.webp',
]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / 'root'
    for i in np.random.default_rng(0).permutation(len(NAMES)):
        (root / NAMES[i]).parent.mkdir(parents=True, exist_ok=True)
        (root / NAMES[i]).write_bytes(NAMES[i].encode())
    (root / 'b/notes.txt').write_text('no image')
    return root


@pytest.fixture(autouse=True)
def time_limit():
    """Ends a test that waits for a pipe."""

    def fail(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def seen(folder):
    """The images of a folder and the report, as (training, prediction, preparation) see them."""
    source, listing = ImageFolder(folder), layouts.list_source(str(folder))
    images = [os.path.relpath(source.name_of(i), folder) for i in range(len(source))]
    assert [file.below for file in find_images([str(folder)])] == images
    assert [item.name for item in listing.splits['train']] == images
    assert listing.skipped == source.skipped
    assert skipped_lines([str(folder)]) == (
        [skipped_line(str(folder), source.skipped)] if source.skipped else []
    )
    for i, name in enumerate(images):
        assert source[i]['image'] == (folder / name).read_bytes()
    return images, source.skipped


def test_order_and_fingerprint_of_a_nested_folder_stay_as_they_are(folder):
    assert seen(folder) == (NAMES, ())
    source = ImageFolder(folder)
    assert source.class_names == ('B', 'a', 'b', 'b-c')
    assert source.fingerprint == 'a656b1e8a9664cfe'  # a run continues only with the same fingerprint


LITTER, HIDDEN = 'not a folder of the dataset', 'hidden'


@pytest.mark.parametrize(
    ('name', 'reported', 'reason'),
    [
        ('b/.ipynb_checkpoints/x.jpg', 'b/.ipynb_checkpoints', HIDDEN),
        ('.cache/x.jpg', '.cache', HIDDEN),
        ('b/._x.jpg', 'b/._x.jpg', HIDDEN),
        ('__MACOSX/b/x.jpg', '__MACOSX', LITTER),
        ('b/@eaDir/x.jpg/thumb.jpg', 'b/@eaDir', LITTER),
        ('$RECYCLE.BIN/x.jpg', '$RECYCLE.BIN', LITTER),
        ('b/photo.HEIC', 'b/photo.HEIC', '.heic images cannot be decoded'),
        ('b/drawing.svg', 'b/drawing.svg', '.svg images cannot be decoded'),
        ('b/.DS_Store', None, ''),
        ('b/Thumbs.db', None, ''),
    ],
)
def test_hidden_entries_litter_and_unknown_formats_are_skipped_and_reported(folder, name, reported, reason):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b'x')
    assert seen(folder) == (NAMES, (f'{reported}: {reason}',) if reported else ())


@pytest.mark.parametrize('extension', ['gif', 'jfif', 'jpe', 'avif', 'jp2', 'GIF'])
def test_every_format_that_can_be_decoded_is_found(folder, extension):
    (folder / f'b/0.{extension}').write_bytes(b'x')
    images, skipped = seen(folder)
    assert (set(images) - set(NAMES), skipped) == ({f'b/0.{extension}'}, ())


def test_images_beside_the_class_folders_are_for_prediction_only(folder):
    (folder / 'stray.png').write_bytes(b'')
    assert len(ImageFolder(folder)) == len(NAMES)
    assert [file.below for file in find_images([str(folder)])] == ['stray.png', *NAMES]


def test_links_to_folders_and_files_elsewhere_are_followed(folder, tmp_path):
    (tmp_path / 'elsewhere/sub').mkdir(parents=True)
    (tmp_path / 'elsewhere/sub/1.jpg').write_bytes(b'1')
    (folder / 'a/link').symlink_to(tmp_path / 'elsewhere')
    (folder / 'a/same.jpg').symlink_to(tmp_path / 'elsewhere/sub/1.jpg')
    (folder / 'zoo').symlink_to(folder / 'B')
    images, skipped = seen(folder)
    assert images == [
        NAMES[0],
        'a/same.jpg',
        'a/x.jpeg',
        'a/link/sub/1.jpg',
        'a/under/h.tif',
        *NAMES[3:],
        'zoo/nested/deeper/y.bmp',
    ]
    assert not skipped
    assert ImageFolder(folder).class_names == ('B', 'a', 'b', 'b-c', 'zoo')


CYCLE, GONE = 'link to a folder that contains it', 'broken link: No such file or directory'
LOOP = 'broken link: Too many levels of symbolic links'


@pytest.mark.parametrize(
    ('name', 'target', 'reason'),
    [
        ('x', '.', CYCLE),
        ('x', '..', CYCLE),
        ('x', '../root', CYCLE),
        ('x', 'x', LOOP),
        ('x', 'nowhere', GONE),
        ('b/x.png', '.', CYCLE),
        ('b/nested/x', '..', CYCLE),
        ('b/nested/x', '../..', CYCLE),
        ('b/nested/x', '../../..', CYCLE),
        ('b/x.png', 'x.png', LOOP),
        ('b/x.png', 'nowhere.png', GONE),
        ('b/x.png', 'notes.txt/x.png', 'broken link: Not a directory'),
        ('b/x.png', '/dev/null', 'not a regular file'),
    ],
)
def test_links_that_lead_back_or_nowhere_are_skipped_and_reported(folder, name, target, reason):
    (folder / name).symlink_to(target)
    assert seen(folder) == (NAMES, (f'{name}: {reason}',))


def test_cycle_through_two_folders_is_followed_once(folder):
    (folder / 'a/to_b').symlink_to('../b')
    (folder / 'b/to_a').symlink_to('../a')
    images, skipped = seen(folder)
    assert skipped == ('a/to_b/to_a: ' + CYCLE, 'b/to_a/to_b: ' + CYCLE)
    assert {'a/to_b/x/z/3.jpg', 'b/to_a/x.jpeg'} < set(images)


def test_pipes_and_sockets_named_like_images_are_skipped_and_reported(folder, monkeypatch):
    os.mkfifo(folder / 'a/pipe.png')
    os.mkfifo(folder / 'a/pipe')  # not named like an image
    (folder / 'b/link.jpg').symlink_to('../a/pipe.png')
    monkeypatch.chdir(folder / 'b')  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind('socket.png')
        assert seen(folder) == (
            NAMES,
            tuple(f'{name}: not a regular file' for name in ('a/pipe.png', 'b/link.jpg', 'b/socket.png')),
        )


def test_file_that_became_a_pipe_is_not_read(folder):
    source = ImageFolder(folder)
    (folder / NAMES[1]).unlink()
    os.mkfifo(folder / NAMES[1])
    with pytest.raises(OSError, match='not a regular file'):
        source[1]
    with open(folder / NAMES[3], 'wb') as f:
        f.truncate(2**30 + 1)
    with pytest.raises(OSError, match='1,073,741,825 bytes, more than 1,073,741,824'):
        read_file(folder / NAMES[3])


def test_skipped_entries_are_reported_in_one_line():
    skipped = [f'{i}\n.png: not a regular file' for i in range(7)]
    line = skipped_line('data', skipped)
    assert line.startswith('skipped 7 entries in data: 0 .png: not a regular file, 1 .png')
    assert line.endswith('4 .png: not a regular file and 2 more')
    assert skipped_line('data', ['x: y']) == 'skipped 1 entry in data: x: y'


def test_class_of_broken_links_is_an_error_that_names_them(folder):
    (folder / 'a/x.jpeg').unlink()
    (folder / 'a/under/h.tif').unlink()
    (folder / 'a/1.jpg').symlink_to('objects/1.jpg')
    message = rf'/a holds no image \(.*\); skipped 1 entry in .*: a/1.jpg: {GONE}'
    for read in (ImageFolder, layouts.list_source):
        with pytest.raises(InputError, match=message):
            read(str(folder))
    message = rf'/a holds no image \(.*\); skipped 1 entry in .*: 1.jpg: {GONE}'
    with pytest.raises(InputError, match=message):
        check_paths([str(folder / 'a')])


def test_folder_to_leave_out_is_left_out_without_a_report(folder):
    found = [f.below for f in find_images([str(folder)], without=str(folder / 'b'))]
    assert found == [name for name in NAMES if not name.startswith('b/')]
    assert not skipped_lines([str(folder)], without=str(folder / 'b'))
    with pytest.raises(InputError, match='holds no image'):
        check_paths([str(folder)], without=str(folder))


UNREADABLE = """
import os, sys
from epsanet_jax import InputError
from epsanet_jax.data.image_files import find_images
from epsanet_jax.data.prepare import layouts
from epsanet_jax.data.image_folder import ImageFolder
root, bad = [], []
for read in (ImageFolder, layouts.list_source):
    try:
        print(len(read(sys.argv[1])))
    except InputError as e:
        print(e)
print(*[file.below for file in find_images(sys.argv[1:], print)], sep='|')
"""


@pytest.mark.parametrize('place', ['.', 'b', 'b/nested', 'b/x/z'])
def test_unreadable_folder_is_an_error_that_names_it(folder, place):
    """Prediction reports it and continues with the other folders."""
    (folder / place).chmod(0)
    unprivileged = ['setpriv', '--bounding-set=-dac_override,-dac_read_search'] if not os.getuid() else []
    try:
        done = subprocess.run(
            [*unprivileged, sys.executable, '-c', UNREADABLE, folder],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
        )
    finally:
        (folder / place).chmod(0o755)
    path = folder if place == '.' else folder / place
    kept = [name for name in NAMES if place != '.' and not name.startswith(f'{place}/')]
    message = f'{path}: cannot read the folder: Permission denied'
    assert done.stdout.splitlines() == [message, message, message, '|'.join(kept)]


def test_link_that_cannot_be_followed_is_an_error_that_names_it(folder, monkeypatch):
    (folder / 'b/link').symlink_to(folder / 'a')
    real = os.scandir

    class Entry:
        def __init__(self, entry):
            self._entry, self.name, self.path = entry, entry.name, entry.path

        def __getattr__(self, name):
            return getattr(self._entry, name)

        def stat(self):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    class Scan:
        def __init__(self, path):
            self._scan = real(path)

        def __enter__(self):
            return (Entry(entry) for entry in self._scan)

        def __exit__(self, *_):
            self._scan.close()

    monkeypatch.setattr(os, 'scandir', Scan)
    with pytest.raises(InputError, match=r'b/link: cannot follow the link: Stale file handle'):
        ImageFolder(folder)
    found, bad = [], []
    for part in walk(str(folder), bad.append):
        found += [os.path.join(part.path, entry.name) for entry in part.images]
    assert (found, len(bad)) == (NAMES, 1)


def test_is_there_names_the_reason_of_a_failure(tmp_path, monkeypatch):
    (tmp_path / 'loop').symlink_to('loop')
    assert [is_there(str(tmp_path / name)) for name in ('', 'loop', 'missing')] == [True, False, False]

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, 'stat', denied)
    with pytest.raises(InputError, match='cannot read x: Permission denied'):
        is_there('x')
