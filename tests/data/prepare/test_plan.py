"""Unfinished datasets are continued, finished ones kept, and other folders refused."""

import json
import re

import pytest
from command import run

from epsanet_jax import InputError
from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.prepare import dataset, plan, workers

from .helpers import SHARD, encoded, records, shard_files, smooth, write


@pytest.mark.parametrize('fix', ['remove', 'replace', 'skip'])
def test_finished_shards_stay_after_a_bad_image(images, tmp_path, capsys, fix):
    dst, bad = tmp_path / 'out', images / 'train/b/nested/1.jpeg'
    good = bad.read_bytes()
    bad.write_bytes(good[:300])
    with pytest.raises(InputError, match='1 of the images'):
        dataset.prepare(str(images), str(dst), num_workers=1, shard_bytes=SHARD)
    before = shard_files(dst)
    assert 0 < len(before) < 4
    if fix == 'remove':
        bad.unlink()
    if fix == 'replace':
        bad.write_bytes(good)
    arguments = ('--on-bad=skip',) if fix == 'skip' else ()
    status, _, err = run(capsys, 'prepare', images, dst, '--workers', 1, *arguments)
    assert status == 0, err
    assert shard_files(dst).items() >= before.items()
    folder = ImageFolder(images / 'train')
    expected = [
        folder[i]['image']
        for i in range(len(folder))
        if fix == 'replace' or 'nested' not in folder.name_of(i)
    ]
    assert [r[2] for r in records(dst, 'train')] == expected


def test_same_command_continues_after_an_interruption(images, tmp_path, capsys, monkeypatch):
    dst, calls, write_shard = tmp_path / 'out', [], workers.write_shard

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            (dst / '.progress/image_folder-train.array_record-00002-of-00004.partial').write_bytes(b'half')
            (dst / '.tmp-1-00000000').write_bytes(b'half of a report')
            raise KeyboardInterrupt
        return write_shard(*args, **kwargs)

    monkeypatch.setattr(workers, 'write_shard', interrupted)
    monkeypatch.setattr(plan, '_LEAST_SHARD_BYTES', SHARD)
    status, out, err = run(capsys, 'prepare', images, dst, '--workers', 1)
    assert (status, out) == (75, '')
    assert err.splitlines()[-1] == 'interrupted; the same command continues'
    before = shard_files(dst)
    assert len(before) == 2
    # A shard without a result, as after a kill, is written again.
    (dst / '.progress/image_folder-train.array_record-00001-of-00004.json').unlink()
    status, out, err = run(capsys, 'prepare', images, dst, '--workers', 1)
    assert status == 0, err
    after = shard_files(dst)
    assert [name for name in before if after[name] == before[name]] == [min(before)]
    folder = ImageFolder(images / 'train')
    assert [r[2] for r in records(dst, 'train')] == [folder[i]['image'] for i in range(7)]
    files = {p.name: p.stat().st_mtime_ns for p in dst.iterdir()}
    status, out, _ = run(capsys, 'prepare', images, dst)
    assert status == 0
    assert 'exists already; nothing was done' in out
    assert {p.name: p.stat().st_mtime_ns for p in dst.iterdir()} == files


def test_folder_with_other_files_is_refused(images, tmp_path, capsys):
    write(tmp_path / 'out/thesis.txt', b'mine')
    status, _, err = run(capsys, 'prepare', images, tmp_path / 'out')
    assert status == 2
    assert 'holds thesis.txt and is not a dataset of this command: choose another DST' in err
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['thesis.txt']


def test_finished_dataset_of_other_images_is_kept(images, tmp_path, capsys):
    dst = tmp_path / 'out'
    assert run(capsys, 'prepare', images, dst, '--workers', 1)[0] == 0
    before = shard_files(dst)
    (images / 'val/b/v.jpg').write_bytes(encoded(smooth(7)))
    status, _, err = run(capsys, 'prepare', images, dst, '--workers', 1)
    assert status == 2
    assert 'was prepared from other images' in err
    assert shard_files(dst) == before


@pytest.mark.parametrize('content', [b'{"lis', b'{}', b'[]', b'\xff'])
def test_damaged_report_or_plan_is_an_error(images, tmp_path, capsys, content):
    finished, started = tmp_path / 'finished', tmp_path / 'started'
    assert run(capsys, 'prepare', images, finished, '--workers', 1)[0] == 0
    write(images / 'train/b/bad.jpg', b'')
    assert run(capsys, 'prepare', images, started, '--workers', 1)[0] == 2
    for folder, name in ((finished, 'prepare.json'), (started, '.progress/plan.json')):
        (folder / name).write_bytes(content)
        status, out, err = run(capsys, 'prepare', images, folder, '--workers', 1)
        assert (status, out) == (2, '')
        assert err.splitlines()[-1].endswith(
            f'{folder / name} is damaged: choose another DST, or remove the folder'
        )


def test_shard_with_a_damaged_result_is_written_again(images, tmp_path, capsys):
    write(images / 'val/b/bad.jpg', b'')
    assert run(capsys, 'prepare', images, tmp_path / 'out', '--workers', 1)[0] == 2
    (record,) = (tmp_path / 'out/.progress').glob('image_folder-train*.json')
    record.write_bytes(b'{"digest": ')
    status, _, err = run(capsys, 'prepare', images, tmp_path / 'out', '--workers', 1, '--on-bad=skip')
    assert status == 0, err
    assert [len(records(tmp_path / 'out', split)) for split in ('train', 'val')] == [7, 2]


def test_other_arguments_than_at_the_start_are_refused(images, tmp_path, capsys):
    write(images / 'train/b/bad.jpg', b'')
    assert run(capsys, 'prepare', images, tmp_path / 'out', '--workers', 1)[0] == 2
    status, _, err = run(capsys, 'prepare', images, tmp_path / 'out', '--name', 'other', '--workers', 1)
    assert status == 2
    assert "was started with the name 'image_folder', not 'other'" in err
    assert json.loads((tmp_path / 'out/.progress/plan.json').read_text())['name'] == 'image_folder'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('{src}', '{src}/records'), 'DST must be outside of SRC'),
        (('{src}', '{src}'), 'DST must be outside of SRC'),
        (('{src}', '{src}/README/records'), 'DST must be outside'),
        (('{src}', '{tmp}/file'), 'file is not a folder: choose another DST'),
        (('{src}', '{tmp}/file/records'), 'cannot write .*file/records'),
        (('{src}', 'gs://bucket/records'), 'gs://bucket/records is not on a disk'),
        (('{src}', '{tmp}/out', '--name', 'My pets'), "--name must consist of lower-case .*got 'My pets'"),
        (('{src}', '{tmp}/out', '--workers', '0'), "expected a positive integer, got '0'"),
    ],
)
def test_invalid_arguments_are_errors_of_one_line(images, tmp_path, capsys, arguments, message):
    write(tmp_path / 'file', b'')
    filled = [a.format(src=images, tmp=tmp_path) for a in arguments]
    status, out, err = run(capsys, 'prepare', *filled)
    assert (status, out) == (2, '')
    assert re.search(f'error: .*{message}', err.splitlines()[-1])
    assert not (tmp_path / 'out').exists()
