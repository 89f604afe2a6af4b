"""The content of shards: JPEG files are kept, other images converted, bad images named."""

import io
import resource
import struct
import subprocess
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from command import run
from PIL import Image

from epsanet_jax.data.decode import decode
from epsanet_jax.data.image_folder import ImageFolder

from .helpers import encoded, records, shard_files, smooth, write


def cmyk():
    return Image.merge('CMYK', [Image.new('L', (16, 16), v) for v in (0, 255, 255, 0)])  # red


def gray16():
    ramp = np.linspace(0, 65535, 40).astype(np.uint16)
    return Image.fromarray(np.broadcast_to(ramp, (24, 40)).copy())


def with_alpha():
    image = smooth(3).convert('RGBA')
    image.putalpha(Image.new('L', image.size, 7))
    return image


KINDS = {
    'cmyk.jpg': (cmyk(), 'JPEG', Image.new('RGB', (16, 16), (255, 0, 0))),
    'gray16.png': (gray16(), 'PNG', Image.fromarray((np.asarray(gray16()) >> 8).astype(np.uint8))),
    'gray16.tif': (gray16(), 'TIFF', Image.fromarray((np.asarray(gray16()) >> 8).astype(np.uint8))),
    'palette.png': (smooth(2).quantize(8), 'PNG', smooth(2).quantize(8).convert('RGB')),
    'gif.jpg': (smooth(2).quantize(8), 'GIF', smooth(2).quantize(8).convert('RGB')),
    'alpha.png': (with_alpha(), 'PNG', smooth(3)),
    'alpha.webp': (with_alpha(), 'WEBP', smooth(3)),
    'la.png': (with_alpha().convert('LA'), 'PNG', smooth(3).convert('L')),
    'rgb.jpeg': (smooth(4), 'PNG', smooth(4)),  # the content decides, not the name
    'bmp.bmp': (smooth(5), 'BMP', smooth(5)),
    'tiff.tiff': (smooth(6), 'TIFF', smooth(6)),
    'onebit.png': (
        Image.new('1', (16, 16), 1),
        'PNG',
        Image.new('L', (16, 16), 255),
    ),
}


def test_every_other_format_becomes_the_right_jpeg(tmp_path, capsys):
    for name, (image, kind, _) in KINDS.items():
        settings = {'lossless': True, 'exact': True} if kind == 'WEBP' else {}
        write(tmp_path / 'in/c' / name, encoded(image, kind, **settings))
    status, out, err = run(capsys, 'prepare', tmp_path / 'in', tmp_path / 'out', '--workers', 1)
    assert status == 0, err
    assert f'0 kept byte for byte, {len(KINDS)} converted' in out
    for name, _, image in records(tmp_path / 'out', 'train'):
        image, expected = Image.open(io.BytesIO(image)), KINDS[name.removeprefix('c/')][2]
        assert (image.format, image.mode, image.size) == ('JPEG', 'RGB', expected.size)
        difference = np.asarray(image, int) - np.asarray(expected.convert('RGB'), int)
        assert np.abs(difference).mean() < 4, name


def test_gray_and_progressive_jpegs_are_kept_byte_for_byte(tmp_path, capsys):
    files = {
        'gray.jpg': encoded(smooth().convert('L')),
        'progressive.png': encoded(smooth(), progressive=True),
        'several.jpg': encoded(smooth(), 'MPO', save_all=True, append_images=[smooth(1)]),
        'trailing.jpg': encoded(smooth()) + b'\0' * 100,
    }
    for name, content in files.items():
        write(tmp_path / 'in/c' / name, content)
    status, _, err = run(capsys, 'prepare', tmp_path / 'in', tmp_path / 'out', '--workers', 1)
    assert status == 0, err
    assert {name: image for name, _, image in records(tmp_path / 'out', 'train')} == {
        f'c/{name}': content for name, content in files.items()
    }
    decoded = tfds.builder_from_directory(tmp_path / 'out').as_data_source('train')
    assert {decoded[i]['image'].shape for i in range(4)} == {(24, 40, 3)}


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'TIFF'])
def test_orientation_has_the_same_effect_in_folder_and_records(tmp_path, capsys, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / 'in/c/turned.png', encoded(smooth(), kind, exif=exif))
    write(tmp_path / 'in/c/upright.png', encoded(smooth(), kind))
    assert run(capsys, 'prepare', tmp_path / 'in', tmp_path / 'out', '--workers', 1)[0] == 0
    folder = ImageFolder(tmp_path / 'in')
    for i, (name, _, image) in enumerate(records(tmp_path / 'out', 'train')):
        # Pillow always rotates TIFF images.
        for turn in (False,) if kind == 'TIFF' else (False, True):
            theirs, ours = (decode(x, exif_orientation=turn) for x in (folder[i]['image'], image))
            assert ours.size == theirs.size, (name, turn)
            assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).mean() < 4


def png_of(width, height):
    """A PNG file that declares a size and holds no pixels."""
    chunks = ((b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)), (b'IDAT', zlib.compress(b'')))
    parts = [
        struct.pack('>I', len(c)) + name + c + struct.pack('>I', zlib.crc32(name + c)) for name, c in chunks
    ]
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


BAD = {
    'empty.jpg': (b'', 'the file is empty'),
    'html.jpg': (b'<html>404</html>', 'not a known image format'),
    'pointer.png': (b'version https://git-lfs.github.com/spec/v1\n', 'not a known image format'),
    'bomb.png': (png_of(100_000, 100_000), 'decompression bomb'),
    'large.png': (png_of(10_000, 10_000), 'pixels, more than'),
    'array.npy': (b'\x93NUMPY', 'an array cannot be stored as JPEG: train on the folder itself'),
    'cut.jpg': (encoded(smooth(size=(300, 300)))[:-700], 'no end'),
    'cut_and_ended.jpg': (encoded(smooth(size=(300, 300)))[:600] + b'\xff\xd9', 'Truncated'),
    'float.tif': (encoded(smooth().convert('F'), 'TIFF'), 'floating-point'),
}


def test_bad_images_stop_preparation_and_are_all_named(images, tmp_path, capsys):
    for name, (content, _) in BAD.items():
        write(images / 'train/b' / name, content)
    (images / 'train/b/nowhere.jpg').symlink_to(tmp_path / 'nowhere')
    status, out, err = run(capsys, 'prepare', images, tmp_path / 'out', '--workers', 1)
    assert (status, out) == (2, '')
    for name, (_, reason) in BAD.items():
        (line,) = [line for line in err.splitlines() if line.startswith(f'train/b/{name}: ')]
        assert reason in line
    assert f'skipped 1 entry in {images}: train/b/nowhere.jpg: broken link: No such file or directory' in err
    last = err.splitlines()[-1]
    assert last.startswith(
        f'error: {len(BAD)} of the images read cannot be decoded, the first is train/b/array'
    )
    assert not shard_files(tmp_path / 'out')


def test_bad_images_can_be_skipped(images, tmp_path, capsys):
    before = [ImageFolder(images / 'train')[i]['image'] for i in range(7)]
    write(images / 'train/b/3.jpg', b'')
    status, out, err = run(capsys, 'prepare', images, tmp_path / 'out', '--on-bad', 'skip', '--workers', 1)
    assert status == 0, err
    line = 'train/b/3.jpg: cannot decode the image: the file is empty'
    assert (tmp_path / 'out/skipped.txt').read_text() == f'{line}\n'
    assert line in err
    assert 'train: 7 images (7 kept byte for byte, 0 converted), 1 skipped' in out
    assert [r[2] for r in records(tmp_path / 'out', 'train')] == before
    subprocess.run(['sha256sum', '--check', '--quiet', 'checksums.sha256'], cwd=tmp_path / 'out', check=True)


def test_full_disk_leaves_no_partial_file(images, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # fails as a full disk does
    try:
        status, _, err = run(capsys, 'prepare', images, tmp_path / 'out', '--workers', 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert 'cannot write image_folder-train.array_record-00000-of-00001 in' in err.splitlines()[-1]
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['.progress']
    assert run(capsys, 'prepare', images, tmp_path / 'out', '--workers', 1)[0] == 0
