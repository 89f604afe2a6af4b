"""TFDS datasets in TFRecord files, read without TensorFlow."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordReader

from epsanet_jax.data.decode import decode
from epsanet_jax.data.sources import Records, Tfds
from epsanet_jax.data.tfrecord import Part, TfRecords
from epsanet_jax.errors import InputError


def write(path, records):
    """Writes records in TFRecord format, with wrong checksums, which are not checked."""
    with path.open('wb') as f:
        for record in records:
            f.write(struct.pack('<QI', len(record), 1) + record + struct.pack('<I', 2))


@pytest.fixture(scope='module')
def converted(digits_dir, tmp_path_factory):
    """The digits, with each file split into two TFRecord files."""
    (source,) = (p.parent for p in Path(digits_dir).rglob('dataset_info.json'))
    folder = tmp_path_factory.mktemp('tfrecord') / 'digits' / '1.0.0'
    folder.mkdir(parents=True)
    info = json.loads((source / 'dataset_info.json').read_text())
    for split in info['splits']:
        (path,) = source.glob(f'*-{split["name"]}.array_record-*')
        reader = ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        cut = len(records) // 3
        for i, part in enumerate((records[:cut], records[cut:])):
            write(folder / f'digits-{split["name"]}.tfrecord-0000{i}-of-00002', part)
        split['shardLengths'] = [str(cut), str(len(records) - cut)]
    info['fileFormat'] = 'tfrecord'
    (folder / 'dataset_info.json').write_text(json.dumps(info))
    for name in ('features.json', 'label.labels.txt'):
        shutil.copy(source / name, folder)
    return folder


@pytest.mark.parametrize('split', ['train', 'test', 'train[30%:60%]', 'train[:5]'])
def test_tfrecord_gives_the_same_examples_as_array_record(digits_dir, converted, split):
    expected, found = Tfds('digits', split, digits_dir), Records(converted, split)
    assert (len(found), found.class_names) == (len(expected), expected.class_names)
    for i in {0, len(found) // 3, len(found) - 1}:
        assert found[i]['label'] == expected[i]['label']
        assert found[i]['image'] == expected[i]['image']
        assert decode(found[i]['image']).size == (32, 32)
    assert pickle.loads(pickle.dumps(found))[1]['image'] == found[1]['image']


def test_split_can_use_parts_of_several_files(tmp_path, rng):
    data = [rng.bytes(int(n)) for n in rng.integers(0, 50, 12)]
    write(tmp_path / 'a', data[:7])
    write(tmp_path / 'b', data[7:])
    records = TfRecords([Part(str(tmp_path / 'a'), 4, 3), Part(str(tmp_path / 'b'), 1, 2)])
    assert [records[i] for i in range(len(records))] == data[4:7] + data[8:10]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            records[index]


def test_truncated_file_is_named(tmp_path):
    write(tmp_path / 'a', [b'x' * 10, b'y' * 10])
    whole = (tmp_path / 'a').read_bytes()
    (tmp_path / 'a').write_bytes(whole[:-1])
    records = TfRecords([Part(str(tmp_path / 'a'), 0, 2)])
    assert records[0] == b'x' * 10
    with pytest.raises(
        InputError, match=r'/a is truncated: record 1 is missing, the file holds 1 whole records'
    ):
        records[1]


def test_reading_a_record_does_not_read_the_whole_file(tmp_path):
    path = tmp_path / 'large'
    with path.open('wb') as f:  # a sparse file of 1 GiB
        f.write(struct.pack('<QI', 2**30, 1))
        f.seek(2**30 + 4, 1)
        f.write(struct.pack('<QI', 3, 1) + b'end' + struct.pack('<I', 2))
    assert TfRecords([Part(str(path), 1, 1)])[0] == b'end'
