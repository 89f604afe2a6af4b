"""Parquet files: columns, labels, damage, and memory that does not grow with the file."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelled_files import image, write_parquet

from epsanet_jax import InputError
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.data.formats import PARQUET, Found, open_labelled

IMAGES = [image(i) for i in range(12)]


def source(*paths, column=''):
    return open_labelled(Found(PARQUET, tuple(map(str, paths))), column)[0]


@pytest.mark.parametrize('image_type', ['struct', 'bytes'])
@pytest.mark.parametrize(
    ('labels', 'names', 'expected'),
    [
        ([1, 0, 1, 2] * 3, ['c', 'a', 'b'], ('c', 'a', 'b')),
        ([1, 0, 1, 2] * 3, None, ('0', '1', '2')),
        (['b', 'a', 'b', 'c'] * 3, None, ('a', 'b', 'c')),
    ],
)
def test_rows_have_their_images_and_labels(tmp_path, image_type, labels, names, expected):
    write_parquet(tmp_path / 'x.parquet', IMAGES[:7], labels[:7], names, 3, image_type)
    write_parquet(tmp_path / 'y.parquet', IMAGES[7:], labels[7:], names, 3, image_type)
    rows = source(tmp_path / 'x.parquet', tmp_path / 'y.parquet')
    assert rows.class_names == expected
    found = [rows[i] for i in (*range(12), 0, 11, 5)]
    assert [r['image'] for r in found] == [IMAGES[i] for i in (*range(12), 0, 11, 5)]
    assert [r['label'] for r in found[:4]] == [1, 0, 1, 2]
    assert rows.name_of(8) == f'{tmp_path}/y.parquet: row 1'
    with pytest.raises(IndexError):
        rows[12]


def test_file_that_changes_is_read_again(tmp_path):
    write_parquet(tmp_path / 'x.parquet', IMAGES[:4], [0, 1, 0, 1])
    assert source(tmp_path / 'x.parquet')[3]['image'] == IMAGES[3]
    write_parquet(tmp_path / 'x.parquet', IMAGES[4:10], [0, 1, 0, 1, 0, 1])
    assert source(tmp_path / 'x.parquet')[3]['image'] == IMAGES[7]


@pytest.mark.parametrize(
    ('labels', 'names', 'message'),
    [
        (
            [0, 1, -1, 0],
            ['a', 'b'],
            r'x.parquet: row 2: the label -1 is not one of the 2 declared classes \(a, b\)',
        ),
        ([0, 1, 2, 0], ['a', 'b'], r'x.parquet: row 2: the label 2 is not one of the 2 declared classes'),
        ([0, 1, -1, 0], None, r'x.parquet: row 2: the label -1 is neither a class name nor a class number'),
        ([0, 1, None, 0], None, r'x.parquet: row 2 has no label: add it, or remove the image'),
        ([0, 1, None, 0], ['a', 'b'], r'x.parquet: row 2 has no label'),
        (['a', '', 'b', 'a'], None, r'x.parquet: row 1 has no label'),
        (
            ['a', 'b', '7', 'a'],
            None,
            "x.parquet: row 0 has the label 'a' and .* row 2 has .* '7': use",
        ),
        (
            [0.0, 1.0, 1.0, 0.0],
            None,
            "x.parquet: the column 'label' is double, not a class number or a class name",
        ),
        ([[0], [1], [1], [0]], None, "the column 'label' is list<.*>, not a class number"),
        ([0, 1, 1, 0], ['a', 'a'], 'two of the declared classes have one name: a, a'),
    ],
)
def test_wrong_label_is_named_with_its_row(tmp_path, labels, names, message):
    write_parquet(tmp_path / 'x.parquet', IMAGES[:4], labels, names)
    with pytest.raises(InputError, match=message):
        source(tmp_path / 'x.parquet')


def test_files_must_agree(tmp_path):
    write_parquet(tmp_path / 'x.parquet', IMAGES[:2], [0, 1], ['a', 'b'])
    write_parquet(tmp_path / 'y.parquet', IMAGES[:2], [0, 1], ['b', 'a'])
    with pytest.raises(InputError, match=r"y.parquet declares other classes of 'label' than .*x.parquet"):
        source(tmp_path / 'x.parquet', tmp_path / 'y.parquet')
    write_parquet(tmp_path / 'x.parquet', IMAGES[:2], [0, 1])
    write_parquet(tmp_path / 'y.parquet', IMAGES[:2], ['a', 'b'])
    with pytest.raises(InputError, match=r"x.parquet: row 0 has .* 0 and .*y.parquet: row 0 has .*'a'"):
        source(tmp_path / 'x.parquet', tmp_path / 'y.parquet')


def test_columns_are_chosen_or_asked_for(tmp_path):
    path = tmp_path / 'x.parquet'
    pq.write_table(pa.table({'img': IMAGES[:2], 'fine': [1, 0], 'coarse': ['x', 'y']}), path)
    with pytest.raises(InputError, match='fine, coarse has no usual name of the label: set the column'):
        source(path)
    assert source(path, column='coarse').class_names == ('x', 'y')
    with pytest.raises(InputError, match="has no column 'rough' of labels; it has fine, coarse"):
        source(path, column='rough')
    classes = {name: {'_type': 'ClassLabel', 'names': ['a', 'b']} for name in ('fine', 'coarse')}
    pq.write_table(
        pa.table({'img': IMAGES[:2], 'fine': [1, 0], 'coarse': [0, 1]}).replace_schema_metadata(
            {'huggingface': json.dumps({'info': {'features': classes}})}
        ),
        path,
    )
    with pytest.raises(InputError, match='fine, coarse has no usual name of the label'):
        source(path)
    assert source(path, column='fine')[0]['label'] == 1
    pq.write_table(pa.table({'a': IMAGES[:2], 'b': IMAGES[:2], 'label': [0, 1]}), path)
    with pytest.raises(InputError, match='x.parquet has several columns of images: a, b'):
        source(path)
    pq.write_table(pa.table({'text': ['a', 'b'], 'label': [0, 1]}), path)
    with pytest.raises(InputError, match=r'x.parquet has no column of images .* its columns are text, label'):
        source(path)
    pq.write_table(pa.table({'image': pa.array([], pa.binary()), 'label': pa.array([], pa.int8())}), path)
    with pytest.raises(InputError, match=r"x.parquet holds no image; images in the column 'image'"):
        source(path)


def test_damage_is_named(tmp_path):
    path = tmp_path / 'x.parquet'
    write_parquet(path, [IMAGES[0], None, IMAGES[2]], [0, 1, 0], rows=1)
    with pytest.raises(BadImageError, match='the row has no bytes'):
        source(path)[1]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r'x.parquet is not a parquet file, or is truncated: '):
        source(path)
    write_parquet(path, IMAGES, [0] * 12, rows=3)
    rows, content = source(path), bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[place : place + 60] = b'\xff' * 60
    path.write_bytes(content)
    with pytest.raises(BadImageError, match='cannot read the row group 1: '):
        rows[4]
    assert rows[0]['image'] == IMAGES[0]


def test_missing_pyarrow_is_named(tmp_path, monkeypatch):
    write_parquet(tmp_path / 'x.parquet', IMAGES[:2], [0, 1])
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'epsanet_jax\[parquet\]'"):
        source(tmp_path / 'x.parquet')


READ = """
import concurrent.futures, random, sys
from epsanet_jax.data.formats import PARQUET, Found, open_labelled

def peak():  # MiB
    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) / 1024

source, _ = open_labelled(Found(PARQUET, (sys.argv[1],)))
source[0]
before = peak()
order = [*range(len(source)), *random.Random(0).sample(range(len(source)), 64)]
with concurrent.futures.ThreadPoolExecutor(4) as threads:
    read = sum(threads.map(lambda i: len(source[i]['image']), order))
print(read / 2**20, peak() - before)
"""


def test_memory_stays_flat_over_a_large_file(tmp_path):
    """160 MiB in row groups of 2 MiB: all images are read in order, and some at random."""
    rng = np.random.default_rng(0)
    schema = pa.schema({'image': pa.binary(), 'label': pa.int64()})
    with pq.ParquetWriter(tmp_path / 'x.parquet', schema) as writer:
        for _ in range(80):
            images = [rng.bytes(2**18) for _ in range(8)]
            writer.write_table(pa.table({'image': images, 'label': list(range(8))}, schema=schema))
    command = [sys.executable, '-c', READ, str(tmp_path / 'x.parquet')]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read, grown = map(float, output.split())
    assert read == 176
    assert grown < 96, f'reading 160 MiB needed {grown:.0f} MiB more memory'
