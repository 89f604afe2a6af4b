"""Unusual and broken files: decoded to the right image, or refused with a reason."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from epsanet_jax.data import decode as decoding
from epsanet_jax.data.decode import BadImageError, Reduced, decode

ORIENTATION = 0x0112


@pytest.fixture(scope='module')
def original():
    """A smooth image, which JPEG changes little: red to the right, green downwards, a bright corner."""
    y, x = np.mgrid[0:60, 0:80]
    pixels = np.stack([40 + 2 * x, 40 + 3 * y, np.full_like(x, 90)], -1)
    pixels[:15, :20] = 230
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gray_as_rgb(image):
    return image.convert('L').convert('RGB')


def sixteen_bits(image):
    return Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)


def with_alpha(image, mode):
    alpha = Image.new('L', image.size, 128)
    image = image.convert(mode[:-1])
    image.putalpha(alpha)
    return image


def palette_with_transparency(image):
    return encoded(image.quantize(256), 'PNG', transparency=bytes([0, 128] * 128))


# name: (file, expected image, largest mean difference in gray levels)
SAME, GRAY = (lambda p: p), gray_as_rgb
KINDS = {
    'jpeg': (lambda p: encoded(p, 'JPEG', quality=95), SAME, 2),
    'progressive jpeg': (lambda p: encoded(p, 'JPEG', quality=95, progressive=True), SAME, 2),
    'gray jpeg': (lambda p: encoded(p.convert('L'), 'JPEG', quality=95), GRAY, 2),
    'cmyk jpeg': (lambda p: encoded(p.convert('CMYK'), 'JPEG', quality=95), SAME, 3),
    'jpeg followed by other data': (lambda p: encoded(p, 'JPEG', quality=95) + b'x' * 3000, SAME, 2),
    'png': (lambda p: encoded(p, 'PNG'), SAME, 0),
    'png of 16 bits': (lambda p: encoded(sixteen_bits(p), 'PNG'), GRAY, 0),
    'png with alpha': (lambda p: encoded(with_alpha(p, 'RGBA'), 'PNG'), SAME, 0),
    'gray png with alpha': (lambda p: encoded(with_alpha(p, 'LA'), 'PNG'), GRAY, 0),
    'png with a palette': (lambda p: encoded(p.quantize(256), 'PNG'), SAME, 6),
    'png with a transparent palette': (palette_with_transparency, SAME, 6),
    'png of 1 bit': (
        lambda p: encoded(p.convert('1', dither=Image.Dither.NONE), 'PNG'),
        lambda p: p.convert('1', dither=Image.Dither.NONE).convert('RGB'),
        0,
    ),
    'webp': (lambda p: encoded(p, 'WEBP', lossless=True), SAME, 0),
    'gif': (lambda p: encoded(p, 'GIF'), SAME, 6),
    'gif of several frames': (
        lambda p: encoded(p, 'GIF', save_all=True, append_images=[Image.new('RGB', p.size)]),
        SAME,
        6,
    ),
    'bmp': (lambda p: encoded(p, 'BMP'), SAME, 0),
    'tiff': (lambda p: encoded(p, 'TIFF'), SAME, 0),
    'tiff of 16 bits': (lambda p: encoded(sixteen_bits(p), 'TIFF'), GRAY, 0),
}


@pytest.fixture(params=['simplejpeg', 'Pillow'])
def decoder(request, monkeypatch):
    if request.param == 'Pillow':
        monkeypatch.setattr(decoding, 'simplejpeg', None)
    else:
        assert decoding.simplejpeg is not None


@pytest.mark.usefixtures('decoder')
@pytest.mark.parametrize('kind', KINDS)
def test_every_format_decodes_to_the_right_image(original, kind):
    make, expected, allowed = KINDS[kind]
    image = decode(make(original))
    assert image.mode == 'RGB'
    difference = np.abs(np.asarray(image, float) - np.asarray(expected(original), float))
    assert difference.mean() <= allowed


def png_declaring(width, height):
    header = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    body = struct.pack('>I', 13) + header + struct.pack('>I', zlib.crc32(header))
    return (
        b'\x89PNG\r\n\x1a\n' + body + struct.pack('>I', 0) + b'IDAT' + struct.pack('>I', zlib.crc32(b'IDAT'))
    )


def half(data):
    return data[: len(data) // 2]


def second_half_zero(data):
    return half(data) + bytes(len(data) - len(data) // 2)


def with_a_thumbnail(data):
    """Inserts another JPEG with an end marker in a segment before the scan."""
    thumbnail = data[:200] + b'\xff\xd9'
    return data[:2] + b'\xff\xe2' + struct.pack('>H', len(thumbnail) + 2) + thumbnail + data[2:]


BROKEN = {
    'empty': (lambda jpeg: b'', 'the file is empty'),
    'text': (lambda jpeg: b'not an image', 'not a known image format'),
    'html': (lambda jpeg: b'<!DOCTYPE html><html></html>' * 20, 'not a known image format'),
    'git-lfs pointer': (
        lambda jpeg: b'version https://git-lfs.github.com/spec/v1\n',
        'not a known image format',
    ),
    'cut in half': (half, 'has no end'),
    'second half is zeros': (second_half_zero, 'has no end'),
    'second half is zeros, with a complete thumbnail': (
        lambda jpeg: with_a_thumbnail(second_half_zero(jpeg)),
        'has no end',
    ),
    'header only': (lambda jpeg: jpeg[:60], 'cannot decode the image: '),
    'decompression bomb': (lambda jpeg: png_declaring(100_000, 100_000), 'decompression bomb'),
    'smaller decompression bomb': (lambda jpeg: png_declaring(10_000, 10_000), 'decompression bomb'),
    'floats': (lambda jpeg: encoded(Image.new('F', (8, 8), 0.5), 'TIFF'), 'no known range'),
    'integers': (lambda jpeg: encoded(Image.new('I', (8, 8), 10**6), 'TIFF'), 'values of 1000000 to 1000000'),
}


@pytest.mark.usefixtures('decoder')
@pytest.mark.parametrize('kind', BROKEN)
def test_broken_files_are_refused_with_a_reason(original, kind):
    make, reason = BROKEN[kind]
    data = make(encoded(original, 'JPEG', quality=95))
    with pytest.raises(BadImageError, match=reason) as error:
        decode(data)
    assert '\n' not in str(error.value)
    with pytest.raises(BadImageError):
        Reduced(data, 8).crop((0, 0, 60, 60))


@pytest.mark.usefixtures('decoder')
def test_jpeg_with_a_complete_thumbnail_is_decoded(original):
    jpeg = encoded(original, 'JPEG', quality=95)
    assert np.array_equal(np.asarray(decode(with_a_thumbnail(jpeg))), np.asarray(decode(jpeg)))


ROTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize('orientation', [*ROTATIONS, 0, 9])
@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'TIFF'])
def test_images_are_rotated_by_their_exif_tag_if_requested(original, orientation, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(original, kind, exif=exif, **({'quality': 95} if kind == 'JPEG' else {}))
    upright = ROTATIONS.get(orientation, ROTATIONS[1])(np.asarray(original)).astype(float)
    rotated = np.asarray(decode(data), float)
    assert rotated.shape == upright.shape
    assert np.abs(rotated - upright).mean() < 2
    reduced = Reduced(data, 1000)
    assert (reduced.height, reduced.width) == upright.shape[:2]
    assert np.array_equal(np.asarray(reduced.crop((0, 0, reduced.width, reduced.height))), rotated)
    if kind != 'TIFF':  # Pillow always rotates TIFF images
        unrotated = np.asarray(decode(data, exif_orientation=False), float)
        assert np.abs(unrotated - np.asarray(original, float)).mean() < 2


def segment(marker, content):
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content


def xmp(orientation):
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" rdf:about="" '
        f'tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    )
    return segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0' + packet.encode())


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return segment(0xE1, tags.tobytes())


@pytest.mark.parametrize('simplejpeg', [True, False])
@pytest.mark.parametrize(
    'segments',
    [
        xmp(6),
        segment(0xED, b'x' * 60000) + segment(0xE2, b'x' * 60000) + exif(6),  # after 120 kB of other data
        segment(0xED, b'x' * 65000) + b'\xff' + xmp(6),  # a fill byte
    ],
)
def test_orientation_is_found_in_xmp_and_behind_long_segments(original, segments, simplejpeg, monkeypatch):
    if not simplejpeg:
        monkeypatch.setattr(decoding, 'simplejpeg', None)
    file = encoded(original, 'JPEG', quality=95)
    turned = decode(file[:2] + segments + file[2:])
    assert turned.size == original.size[::-1]
    np.testing.assert_array_equal(turned, decode(file).transpose(Image.Transpose.ROTATE_270))
    assert decode(file[:2] + segments + file[2:], exif_orientation=False).size == original.size


@pytest.mark.parametrize('subsampling', ['444', '422', '420', '440', '411'])
def test_both_decoders_give_the_same_pixels_for_every_subsampling(original, subsampling, monkeypatch):
    simplejpeg = pytest.importorskip('simplejpeg')
    file = simplejpeg.encode_jpeg(np.ascontiguousarray(original), 95, 'RGB', subsampling)
    fast = decode(file)
    monkeypatch.setattr(decoding, 'simplejpeg', None)
    np.testing.assert_array_equal(fast, decode(file))


@pytest.mark.parametrize('kind', ['GIF', 'AVIF', 'JPEG2000', 'TIFF', 'BMP', 'PPM'])
def test_formats_of_the_list_are_decoded(original, kind):
    difference = np.asarray(decode(encoded(original, kind)), float) - np.asarray(original)
    assert np.abs(difference).mean() < 6


@pytest.mark.parametrize('kind', ['EPS', 'PDF', 'ICO', 'TGA', 'PCX'])
def test_other_formats_are_refused_and_start_no_other_program(original, kind, monkeypatch):
    monkeypatch.setattr('subprocess.check_call', lambda *_, **__: pytest.fail('a program is started'))
    with pytest.raises(BadImageError, match='not a known image format'):
        decode(encoded(original, kind))


def test_too_many_pixels_are_refused_with_all_filters_of_warnings(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    file = encoded(Image.new('RGB', (40, 30)), 'PNG')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(BadImageError, match='cannot decode the image: 40x30 pixels, more than 1,000'):
            decode(file)


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'JPEG'])
def test_invalid_exif_counts_as_upright(original, kind):
    plain, damaged = (encoded(original, kind, exif=exif) for exif in (b'', b'Exif\0\0garbage!!!!!!'))
    expected = np.asarray(decode(plain))
    np.testing.assert_array_equal(np.asarray(decode(damaged)), expected)
    image = Reduced(damaged, 1000)
    np.testing.assert_array_equal(np.asarray(image.crop((0, 0, image.width, image.height))), expected)


def test_large_jpeg_is_decoded_at_the_resolution_of_the_crop(original):
    large = original.resize((1600, 1200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = Reduced(encoded(large, 'JPEG', quality=95, exif=exif), 100)
    assert (image.width, image.height) == (1200, 1600)
    part = image.crop((200, 400, 1000, 1500))
    assert part.size == (100, 138)  # an eighth of the size
    upright = Image.fromarray(ROTATIONS[6](np.asarray(large)))
    expected = upright.crop((200, 400, 1000, 1500)).resize(part.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(part, float) - np.asarray(expected, float)).mean() < 2
