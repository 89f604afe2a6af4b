"""Checks images, converts them to JPEG if they are not, and writes them to an ArrayRecord file."""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from PIL import ExifTags, Image

from epsanet_jax.data import decode
from epsanet_jax.data.contents import Place
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.data.labelled import read_place
from epsanet_jax.data.planes import NPY
from epsanet_jax.data.prepare.archives import Item
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.paths import replacing

PROGRESS = '.progress'  # folder within the dataset until it is finished
QUALITY = 95
_MOST_PIXELS = 65500  # per side of a JPEG


@dataclasses.dataclass(frozen=True)
class Shard:
    """The images of one ArrayRecord file."""

    split: str
    file_name: str
    items: tuple[Item, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]  # of the images, for messages
    digest: str  # of everything that determines the content of the file


@dataclasses.dataclass(frozen=True)
class Written:
    """The result of writing a shard."""

    digest: str  # of the shard
    kept: int  # number of images kept byte for byte
    converted: int  # number of images converted to JPEG
    bytes: int  # size of the file
    sha256: str  # checksum of the file; empty if no file was written because of bad images
    bad: tuple[tuple[str, str], ...]  # name of each image that cannot be decoded, and the reason


def features(num_classes: int | None = None, class_names: Sequence[str] | None = None) -> Any:
    """Returns the TFDS features of a record."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
            'label': tfds.features.ClassLabel(num_classes=num_classes, names=class_names),
            'file_name': tfds.features.Text(),
        }
    )


def as_jpeg(image: bytes) -> tuple[bytes, bool]:
    """Returns an image as a gray or RGB JPEG file, and whether the file is unchanged.

    The EXIF orientation is kept as a tag, and the pixels are not rotated.

    Raises:
        BadImageError: the image cannot be decoded, or is too large for JPEG.
    """
    if image.startswith(NPY):
        raise BadImageError('an array cannot be stored as JPEG: train on the folder itself')
    opened = decode.open_image(image)
    if opened.format in ('JPEG', 'MPO') and opened.mode in ('L', 'RGB'):  # MPO: several JPEGs in one file
        # Decoding at an eighth of the size still reads all entropy-coded data, and is faster.
        opened.draft(None, (1, 1))
        try:
            opened.load()
        except Exception:
            decode.decode(image, exif_orientation=False)  # raises with the reason
        return image, True
    rgb = decode.decode(image, exif_orientation=False)
    if max(rgb.size) > _MOST_PIXELS:
        raise BadImageError(f'cannot convert the image: {rgb.width}x{rgb.height} is too large for JPEG')
    exif, orientation = Image.Exif(), decode.orientation_of(opened)
    if orientation > 1:
        exif[ExifTags.Base.Orientation] = orientation
    jpeg = io.BytesIO()
    rgb.save(jpeg, 'JPEG', quality=QUALITY, subsampling=0, exif=exif)
    return jpeg.getvalue(), False


def write_shard(
    shard: Shard, folder: str, on_bad: str, num_classes: int, tick: Callable[[], object]
) -> Written:
    """Writes a shard: renames the complete file to its final name, then writes the result.

    Args:
        shard: shard to write.
        folder: folder of the dataset.
        on_bad: for images that cannot be decoded: 'skip' leaves them out, 'stop' writes no file.
        num_classes: number of classes of the dataset.
        tick: called before each image.

    Raises:
        InputError: the file cannot be written.
    """
    partial = os.path.join(folder, PROGRESS, f'{shard.file_name}.partial')
    try:
        kept, converted, bad = _write_records(shard, partial, on_bad, num_classes, tick)
        if bad and on_bad == 'stop':
            return Written(shard.digest, kept, converted, 0, '', tuple(bad))
        size = os.path.getsize(partial)
        written = Written(shard.digest, kept, converted, size, sha256(partial), tuple(bad))
        with open(partial, 'rb') as f:
            os.fsync(f.fileno())
        os.replace(partial, os.path.join(folder, shard.file_name))
        write_json(record_path(folder, shard), dataclasses.asdict(written))
    except (OSError, RuntimeError) as e:  # the writer raises RuntimeError when the disk is full
        reason = getattr(e, 'strerror', None) or one_line(e)
        raise InputError(f'cannot write {shard.file_name} in {folder}: {reason}') from e
    finally:
        with suppress(OSError):
            os.unlink(partial)
    return written


def record_path(folder: str, shard: Shard) -> str:
    """Returns the path of the file that holds the result of writing a shard."""
    return os.path.join(folder, PROGRESS, f'{shard.file_name}.json')


def sha256(path: str) -> str:
    """Returns the checksum of a file."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def write_json(path: str, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2))


def _write_records(shard: Shard, path: str, on_bad: str, num_classes: int, tick: Callable[[], object]) -> Any:
    """Returns how many images were kept and converted, and the name and reason of each bad image."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    encoder = features(num_classes)
    serializer = ExampleSerializer(encoder.get_serialized_info())
    kept, converted, bad = 0, 0, []
    writer = ArrayRecordWriter(path, 'group_size:1')
    try:
        for item, label, name in zip(shard.items, shard.labels, shard.names, strict=True):
            tick()
            try:
                jpeg, unchanged = as_jpeg(_read(item))
            except BadImageError as e:
                bad.append((name, str(e)))
                continue
            if bad and on_bad == 'stop':
                continue  # only looks for more bad images
            example = {'image': io.BytesIO(jpeg), 'label': label, 'file_name': os.fsencode(item.name)}
            proto = serializer.get_tf_example(encoder.encode_example(example))
            writer.write(proto.SerializeToString(deterministic=True))  # for reproducible checksums
            kept, converted = kept + unchanged, converted + (not unchanged)
    finally:
        if writer.is_open():
            writer.close()
    return kept, converted, bad


def _read(item: Item) -> bytes:
    """Returns the bytes of an image; raises BadImageError if it cannot be read."""
    try:
        return read_place(Place(item.container, item.name, item.offset, item.size))
    except OSError as e:
        raise BadImageError(decode.reason_of(e)) from e
