"""Images in parquet files, as Hugging Face writes them, read at random by row groups."""

import bisect
import functools
import itertools
import json
import os
import re
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from epsanet_jax.data.contents import Contents, Label, Part, label_column
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.errors import InputError, one_line, some

_IMAGE_COLUMNS = ('image', 'img', 'jpg', 'png', 'jpeg', 'webp')
_LABEL_TYPE = re.compile(r'u?int\d+|(large_)?string(_view)?|dictionary<values=(large_)?string,.*')
_LARGE_GROUP = 256 * 2**20  # bytes of a row group, all of which is read for one image


class _Slot:
    """The row group that was read last, of those that share the slot."""

    def __init__(self):
        self.lock = threading.Lock()
        self.key: Any = None
        self.images: Any = None


# Four row groups at most are in memory, and four threads can read at the same time.
_SLOTS = [_Slot() for _ in range(4)]


class _Opened(NamedTuple):
    """The footer of a file."""

    metadata: Any  # pyarrow's FileMetaData
    schema: Any
    image: str  # path of the column of bytes
    features: dict[str, Any]  # the features that Hugging Face's metadata declares
    ends: list[int]  # number of rows up to the end of each row group
    status: tuple[int, int]  # size in bytes and time of the last change in nanoseconds


def list_parquet(paths: Sequence[str], column: str = '', with_labels: bool = True) -> Contents:
    """Lists the rows of parquet files.

    Args:
        paths: the files.
        column: column of the labels; '': the only ClassLabel of Hugging Face's metadata, or a usual name.
        with_labels: whether to read the labels.

    Raises:
        InputError: pyarrow is missing; a file is damaged, or has other columns than needed or than the first.
    """
    opened = [(path, _open(path)) for path in paths]
    parts = []
    for path, file in opened:
        rows = file.ends[-1] if file.ends else 0
        parts.append(Part(path, (), range(rows), [file.status[0] // max(1, rows)] * rows))
    contents = Contents(parts, f'images in the column {opened[0][1].image.removesuffix(".bytes")!r}')
    if with_labels:
        labels: list[Label] = []
        for path, file in opened:
            column, names = _label_of(path, file, column)
            if path == paths[0]:
                contents.class_names = names
            elif names != contents.class_names:
                raise InputError(f'{path} declares other classes of {column!r} than {paths[0]}')
            labels += _read_labels(path, file, column)
        contents.labels = labels
        named = ', named by the schema' if contents.class_names else ''
        contents.about += f', labels in {column!r}{named}'
    groups = [file.metadata.row_group(i) for _, file in opened for i in range(len(file.ends))]
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > _LARGE_GROUP:
        contents.about += (
            f'; each image read at random reads a row group of up to {largest / 2**20:,.0f} MiB: convert '
            'them once with `epsanet prepare`'
        )
    return contents


def read_row(path: str, row: int) -> bytes:
    """Returns the image in a row of a parquet file.

    Raises:
        BadImageError: the row has no bytes, or cannot be read.
        OSError: the file cannot be read.
    """
    import pyarrow

    file = _open(path)
    group = bisect.bisect_right(file.ends, row)
    slot = _SLOTS[group % len(_SLOTS)]
    with slot.lock:
        if slot.key != (path, file.status, group):
            slot.key = slot.images = None  # first, so that the memory is free
            try:
                slot.images = _read_column(path, file, group, file.image)
            except (pyarrow.ArrowException, OSError) as e:
                raise BadImageError(f'cannot read the row group {group}: {one_line(e)}') from e
            slot.key = path, file.status, group
        image = slot.images[row - (file.ends[group - 1] if group else 0)].as_py()
    if image is None:
        raise BadImageError('cannot read the image: the row has no bytes')
    return image


def _read_column(path: str, file: _Opened, group: int, column: str) -> Any:
    """Returns a column of a row group; of a struct, one field."""
    from pyarrow import parquet

    with parquet.ParquetFile(path, metadata=file.metadata, pre_buffer=False) as reader:
        table = reader.read_row_group(group, columns=[column], use_threads=False)
    return table.flatten().column(0)


def _open(path: str) -> _Opened:
    """Returns the footer of a file; reads it again if the file has changed."""
    try:
        status = os.stat(path)
    except OSError as e:
        raise InputError(f'cannot read {path}: {e.strerror}') from e
    return _read_footer(path, (status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=1024)
def _read_footer(path: str, status: tuple[int, int]) -> _Opened:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise InputError(f"reading {path} needs pyarrow: pip install 'epsanet_jax[parquet]'") from e
    try:
        with parquet.ParquetFile(path) as reader:
            metadata, schema = reader.metadata, reader.schema_arrow
    except (pyarrow.ArrowException, OSError) as e:
        raise InputError(f'{path} is not a parquet file, or is truncated: {one_line(e)}') from e
    features = {}
    try:
        if text := (schema.metadata or {}).get(b'huggingface'):
            features = dict(json.loads(text)['info']['features'])
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: Hugging Face's metadata in the schema are damaged") from e
    rows = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    ends = list(itertools.accumulate(rows))
    return _Opened(metadata, schema, _image_of(path, schema), features, ends, status)


def _image_of(path: str, schema: Any) -> str:
    """Returns the path of the only column of images, or of the one with the first of the usual names."""
    found = {}
    for field in schema:
        inner = field.type.field('bytes').type if _has_bytes(field.type) else field.type
        if str(inner) in ('binary', 'large_binary', 'binary_view'):
            found[field.name] = f'{field.name}.bytes' if _has_bytes(field.type) else field.name
    usual = [name for name in _IMAGE_COLUMNS if name in found]
    if not found or (len(found) > 1 and not usual):
        which = f'several columns of images: {some([*found])}' if found else 'no column of images'
        raise InputError(
            f'{path} has {which} (bytes, or a struct of bytes and path, best named image); its columns are '
            f'{some(schema.names)}'
        )
    return found[usual[0] if usual else next(iter(found))]


def _has_bytes(kind: Any) -> bool:
    return str(kind).startswith('struct<') and kind.get_field_index('bytes') >= 0


def _label_of(path: str, file: _Opened, column: str) -> tuple[str, tuple[str, ...]]:
    """Returns the column of the labels, and the names of the classes if the schema declares them."""
    kinds = {name: feature for name, feature in file.features.items() if isinstance(feature, dict)}
    declared = [name for name, feature in kinds.items() if feature.get('_type') == 'ClassLabel']
    if not column and len(declared) == 1:
        column = declared[0]
    others = [name for name in file.schema.names if name != file.image.split('.')[0]]
    column = label_column(others if column or not declared else declared, column, path)
    kind = str(file.schema.field(column).type)
    if not _LABEL_TYPE.fullmatch(kind):
        raise InputError(f'{path}: the column {column!r} is {kind}, not a class number or a class name')
    names = kinds.get(column, {}).get('names') if column in declared else ()
    return column, tuple(map(str, names or ()))


def _read_labels(path: str, file: _Opened, column: str) -> list[Label]:
    import pyarrow

    try:
        groups = range(len(file.ends))
        return [label for group in groups for label in _read_column(path, file, group, column).to_pylist()]
    except (pyarrow.ArrowException, OSError) as e:
        raise InputError(f'{path}: cannot read the column {column!r}: {one_line(e)}') from e
