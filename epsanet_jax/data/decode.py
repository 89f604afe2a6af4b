"""Decodes image files of any format, and refuses damaged ones with a reason."""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from epsanet_jax.data import planes
from epsanet_jax.data.planes import Planes
from epsanet_jax.errors import InputError, one_line

try:
    import simplejpeg
except ImportError:  # optional: pip install 'epsanet_jax[fast]'
    simplejpeg = None

# Of the formats that Pillow reads, some start other programs. JPEG includes MPO.
_FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'DIB', 'PPM', 'TIFF', 'WEBP', 'AVIF', 'JPEG2000')
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EOI, _SOS, _APP1 = b'\xff\xd9', 0xDA, 0xE1  # JPEG markers: end of image, start of scan, EXIF or XMP


class BadImageError(InputError):
    """An image cannot be decoded."""


def ignore_pillow_warnings() -> None:
    """Hides Pillow's warnings, which do not name the image, in this process; for commands and workers."""
    warnings.filterwarnings('ignore', module='PIL')


def reason_of(error: BadImageError | OSError) -> str:
    """Returns why an image cannot be read or decoded."""
    return (
        str(error)
        if isinstance(error, BadImageError)
        else f'cannot read the image: {error.strerror or error}'
    )


class Reduced:
    """A JPEG image that is decoded when a crop is taken, at the lowest resolution that the crop needs.

    JPEG can be decoded at a half, a quarter or an eighth of its size. The pixels are sharp, but differ from
    those of the whole image resized.

    Args:
        image: the bytes of a file; formats other than JPEG are decoded whole and immediately.
        least: least height and width of a decoded crop in pixels; smaller crops are not reduced.
        exif_orientation: see `decode`.

    Raises:
        BadImageError: see `open_image`, and `decode` for formats other than JPEG.

    Attributes:
        width: width of the whole image in pixels.
        height: height of the whole image in pixels.
    """

    def __init__(self, image: bytes, least: int, exif_orientation: bool = True):
        self._least = least
        self._image = open_image(image)
        if self._image.format not in ('JPEG', 'MPO'):
            with _bad_image_errors():
                self._image.load()
        self._orientation = orientation_of(self._image) if exif_orientation else 1
        self.width, self.height = self._image.size if self._orientation < 5 else self._image.size[::-1]

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        """Returns the crop (left, top, right, bottom), possibly at a lower resolution.

        Raises:
            BadImageError: the image cannot be decoded.
        """
        times = min(box[2] - box[0], box[3] - box[1]) // self._least
        with _bad_image_errors():
            if times > 1:  # without effect for formats other than JPEG
                self._image.draft(None, (self._image.width // times, self._image.height // times))
            self._image.load()
            rgb = _upright_rgb(self._image, self._orientation)
        x, y = rgb.width / self.width, rgb.height / self.height
        left, top = int(box[0] * x), int(box[1] * y)
        return rgb.crop((left, top, max(left + 1, round(box[2] * x)), max(top + 1, round(box[3] * y))))


def decode(
    image: bytes | np.ndarray, exif_orientation: bool = True, channels: int = 3
) -> Image.Image | Planes:
    """Decodes an image, or an array in a .npy file, to RGB or to planes of another number of channels.

    The first of several frames is used. For three channels, alpha is dropped, gray is repeated, and the upper
    8 of 16 bits are kept; for others see `planes.from_image` and `planes.from_array`.

    Args:
        image: the bytes of a file, or an array [H, W, channels].
        exif_orientation: whether to rotate the image by its EXIF tag; torchvision's ImageFolder does not.
        channels: number of channels of the network.

    Raises:
        BadImageError: the file is empty, truncated, damaged or not an image, declares more pixels than
            Pillow's limit (89 million), its values have no known range, or its channels do not fit.
    """
    with _bad_image_errors():
        if isinstance(image, np.ndarray):
            return planes.from_array(image, channels)
        if image.startswith(planes.NPY):
            return planes.from_npy(image, channels)
        if channels == 3 and (rgb := _plain_jpeg(image)) is not None:
            return rgb
        opened = open_image(image)
        opened.load()
        orientation = orientation_of(opened) if exif_orientation else 1
        if channels == 3:
            return _upright_rgb(opened, orientation)
        _check_range(opened)
        found = planes.from_image(opened, channels)
        return found if orientation == 1 else found.transpose(_ORIENTATIONS[orientation])


def open_image(image: bytes) -> Image.Image:
    """Reads the header of a file without decoding the image.

    Raises:
        BadImageError: the file is empty, not an image, a JPEG without an end, or declares too many pixels.
    """
    if not image:
        raise BadImageError('cannot decode the image: the file is empty')
    with _bad_image_errors():
        opened = Image.open(io.BytesIO(image), formats=_FORMATS)
        limit = Image.MAX_IMAGE_PIXELS  # of which Pillow itself only warns
        if limit and opened.width * opened.height > limit:
            raise BadImageError(
                f'cannot decode the image: {opened.width}x{opened.height} pixels, more than {limit:,}'
            )
        if opened.format == 'JPEG' and not _is_complete(image):  # Pillow fills missing data with gray
            raise BadImageError('cannot decode the image: the JPEG data has no end')
        return opened


def _upright_rgb(image: Image.Image, orientation: int) -> Image.Image:
    """Converts a loaded image of any mode to RGB, and rotates it."""
    rgb = _rgb(image)
    return rgb if orientation == 1 else rgb.transpose(_ORIENTATIONS[orientation])


def _rgb(image: Image.Image) -> Image.Image:
    _check_range(image)
    if image.mode.startswith('I'):  # Pillow's conversion of 16 bits saturates to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert('RGB')
    if 'transparency' in image.info and image.mode == 'P':
        image = image.convert('RGBA')
    return image.convert('RGB')


def _check_range(image: Image.Image) -> None:
    """Raises BadImageError if values are not those of 8 or 16 bits."""
    if image.mode == 'F':
        raise BadImageError('cannot decode the image: floating-point values have no known range')
    if image.mode.startswith('I'):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise BadImageError(f'cannot decode the image: values of {values.min()} to {values.max()}')


def _plain_jpeg(image: bytes) -> Image.Image | None:
    """Decodes a complete gray or colour JPEG without EXIF and XMP with simplejpeg; else returns None."""
    if simplejpeg is None or not (image.startswith(b'\xff\xd8\xff') and image.endswith(_EOI)):
        return None
    markers = [marker for marker, _ in _segments(image)]
    if _APP1 in markers or _SOS not in markers:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        if colours not in ('YCbCr', 'Gray') or int(height) * int(width) > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        pixels = simplejpeg.decode_jpeg(image, 'RGB', fastdct=False, fastupsample=False)
    except ValueError:  # simplejpeg is stricter than Pillow, which decides
        return None
    return Image.frombuffer('RGB', pixels.shape[1::-1], pixels, 'raw', 'RGB', 0, 1)


def orientation_of(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; any other value counts as 1, upright.

    For a PNG file this loads the pixels and hides errors in them: call `load` first to detect damage.
    """
    if image.format == 'TIFF':  # Pillow rotates TIFF images when it loads them
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises SyntaxError, struct.error, ... for invalid metadata
        return 1
    return orientation if orientation in _ORIENTATIONS else 1


@contextlib.contextmanager
def _bad_image_errors() -> Iterator[None]:
    """Raises the errors of Pillow as BadImageError with a message of one line."""
    try:
        yield
    except BadImageError:
        raise
    except Exception as e:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ...
        reason = 'not a known image format' if isinstance(e, UnidentifiedImageError) else one_line(e)
        raise BadImageError(f'cannot decode the image: {reason}') from e


def _is_complete(jpeg: bytes) -> bool:
    """Whether an end marker follows the start of the scan; a thumbnail before it has its own end marker."""
    end = jpeg.rfind(_EOI)
    if end >= len(jpeg) - 64:
        return True
    return end > next((start for marker, start in _segments(jpeg) if marker == _SOS), -1)


def _segments(jpeg: bytes) -> Iterator[tuple[int, int]]:
    """Yields the marker and the position of each segment of a JPEG up to the start of the scan."""
    position = 2
    while position + 4 <= len(jpeg) and jpeg[position] == 0xFF:
        if jpeg[position + 1] == 0xFF:  # fill
            position += 1
            continue
        yield jpeg[position + 1], position
        if jpeg[position + 1] == _SOS:
            return
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4])
