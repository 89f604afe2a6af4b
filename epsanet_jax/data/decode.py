"""From the bytes of a file to a picture, whatever the file is."""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from epsanet_jax.errors import InputError, one_line

try:
    import simplejpeg
except ImportError:  # an option: pip install 'epsanet_jax[fast]'
    simplejpeg = None

# Pillow warns of declared sizes beyond its limit, and decodes.
warnings.simplefilter('error', Image.DecompressionBombWarning)

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_WITHIN = 2**16  # bytes from the beginning; EXIF is in one of the first segments
_EOI, _SOS = b'\xff\xd9', 0xDA  # JPEG markers: end of image, start of scan


class BadImageError(InputError):
    """A picture cannot be decoded."""


class Reduced:
    """A JPEG picture that is decoded when a part of it is asked for, no larger than that part needs.

    Not the same pixels as the picture's, but sharp ones: JPEG can be decoded to a half, quarter or eighth.

    Args:
        image: the bytes of a file; of other kinds than JPEG everything is decoded, at once.
        least: sides that a part is to have at least, pixels, if it has them in the picture.
        exif_orientation: as `decode`.

    Raises:
        BadImageError: see `open_picture`; of other kinds than JPEG also what `decode` finds.

    Attributes:
        width: of the whole picture, pixels.
        height: likewise.
    """

    def __init__(self, image: bytes, least: int, exif_orientation: bool = True):
        self._least = least
        self._picture = open_picture(image)
        if self._picture.format not in ('JPEG', 'MPO'):
            with _told_in_one_line():
                self._picture.load()
        self._orientation = orientation_of(self._picture) if exif_orientation else 1
        sizes = self._picture.size if self._orientation < 5 else self._picture.size[::-1]
        self.width, self.height = sizes

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        """Returns what lies in left, top, right, bottom, smaller or as it is.

        Raises:
            BadImageError: it cannot be decoded.
        """
        times = min(box[2] - box[0], box[3] - box[1]) // self._least
        with _told_in_one_line():
            if times > 1:  # else, and for other kinds than JPEG, everything is decoded
                self._picture.draft(None, (self._picture.width // times, self._picture.height // times))
            self._picture.load()
            rgb = _turned(to_rgb(self._picture), self._orientation)
        x, y = rgb.width / self.width, rgb.height / self.height
        left, top = int(box[0] * x), int(box[1] * y)
        return rgb.crop((left, top, max(left + 1, round(box[2] * x)), max(top + 1, round(box[3] * y))))


def decode(image: bytes | np.ndarray, exif_orientation: bool = True) -> Image.Image:
    """Decodes a picture of any kind Pillow reads to RGB.

    Of several frames the first is taken; alpha is dropped, gray is repeated, 16 bits become the upper 8.

    Args:
        image: the bytes of a file, or an uint8 array [H, W, 3].
        exif_orientation: whether to turn the picture as its EXIF tag says; torchvision's ImageFolder doesn't.

    Raises:
        BadImageError: the file is empty, truncated, damaged or no picture, declares more pixels than Pillow
            thinks safe (89 million), or its values have no known range.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    rgb = _plain_jpeg(image)
    if rgb is not None:
        return rgb
    with _told_in_one_line():
        picture = open_picture(image)
        picture.load()
        return _turned(to_rgb(picture), orientation_of(picture) if exif_orientation else 1)


def open_picture(image: bytes) -> Image.Image:
    """Reads a file's header; nothing is decoded yet.

    Raises:
        BadImageError: it is empty, no picture, a JPEG file without its end, or declares too many pixels.
    """
    if not image:
        raise BadImageError('cannot decode the image: the file is empty')
    with _told_in_one_line():
        picture = Image.open(io.BytesIO(image))
        if picture.format == 'JPEG' and not _is_complete(image):  # Pillow fills up zeros with gray
            raise BadImageError('cannot decode the image: the JPEG data has no end')
        return picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """Converts a loaded picture of any mode to RGB.

    Raises:
        BadImageError: its values have no known range.
    """
    if picture.mode.startswith('I'):  # Pillow's own conversion of 16 bits saturates to white
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() >= 2**16:
            raise BadImageError(f'cannot decode the image: values of {values.min()} to {values.max()}')
        return Image.fromarray((values >> 8).astype(np.uint8)).convert('RGB')
    if picture.mode == 'F':
        raise BadImageError('cannot decode the image: floating-point values have no known range')
    if 'transparency' in picture.info and picture.mode == 'P':
        picture = picture.convert('RGBA')
    return picture.convert('RGB')


def _plain_jpeg(image: bytes) -> Image.Image | None:
    """Decodes what most pictures are, a whole gray or colour JPEG without EXIF, by simplejpeg alone."""
    if simplejpeg is None or not image.startswith(b'\xff\xd8\xff') or b'Exif\0' in image[:_EXIF_WITHIN]:
        return None
    if not image.endswith(_EOI):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        if colours not in ('YCbCr', 'Gray') or int(height) * int(width) > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        pixels = simplejpeg.decode_jpeg(image, 'RGB', fastdct=False, fastupsample=False)
    except ValueError:  # it is stricter than Pillow, which then decides
        return None
    return Image.frombuffer('RGB', pixels.shape[1::-1], pixels, 'raw', 'RGB', 0, 1)


def orientation_of(picture: Image.Image) -> int:
    """Returns the EXIF tag, 1 to 8; whatever else stands there counts as upright.

    Of a PNG file this loads the pixels: whoever wants to hear of their damage loads them before.
    """
    if picture.format == 'TIFF':  # Pillow turns these itself when it loads them
        return 1
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises SyntaxError, struct.error, ... at metadata that are none
        return 1
    return orientation if orientation in _ORIENTATIONS else 1


def _turned(picture: Image.Image, orientation: int) -> Image.Image:
    return picture if orientation == 1 else picture.transpose(_ORIENTATIONS[orientation])


class _told_in_one_line:  # noqa: N801 (a context manager)
    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, BadImageError):
            return
        # Pillow raises OSError, ValueError, SyntaxError, struct.error, ...
        reason = 'no kind of image known' if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise BadImageError(f'cannot decode the image: {reason}') from error


def _is_complete(jpeg: bytes) -> bool:
    """Returns whether the end marker comes after the start of the scan; a thumbnail has one of its own."""
    end = jpeg.rfind(_EOI)
    if end >= len(jpeg) - 64:
        return True
    position = 2
    while position + 4 <= len(jpeg) and jpeg[position] == 0xFF:
        if jpeg[position + 1] == _SOS:
            return end > position
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4])
    return end >= 0
