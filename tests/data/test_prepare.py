"""`epsanet prepare`: what the records hold, bad pictures, and going on after an interruption."""

import io
import json
import multiprocessing
import re
import resource
import struct
import subprocess
import threading
import time
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from command import run
from PIL import Image

from epsanet_jax import InputError
from epsanet_jax.data.decode import decode
from epsanet_jax.data.prepare import command, plan, workers
from epsanet_jax.data.sources import ImageFolder

SHARD = 1500  # bytes: one or two of the pictures below


def smooth(seed=0, size=(40, 24)):
    """A picture that JPEG keeps well."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(picture, kind='JPEG', **settings):
    out = io.BytesIO()
    picture.save(out, kind, **settings)
    return out.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / 'pictures'
    names = ['b/2.jpg', 'b/10.JPG', 'b/nested/1.jpeg', 'b/zz.jpg', 'a b/x.jpeg', 'B/deep/er/y.jpg', 'B/ü.jpg']
    for i, name in enumerate(names):
        write(root / 'train' / name, encoded(smooth(i)))
    for i, name in enumerate(['b/v.jpg', 'B/w.jpg']):
        write(root / 'val' / name, encoded(smooth(100 + i)))
    write(root / 'train/b/notes.txt', b'no picture')
    write(root / 'README', b'')
    return root


def records(folder, split):
    """File name, label and bytes of every record."""
    builder = tfds.builder_from_directory(folder)
    source = builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})
    return [(r['file_name'].decode(), int(r['label']), r['image']) for r in source]


def shard_files(folder):
    return {p.name: p.stat().st_mtime_ns for p in sorted(folder.glob('*array_record*'))}


def test_record_i_is_picture_i_of_the_folder(pictures, tmp_path, capsys):
    dst = tmp_path / 'records'
    status, out, err = run(capsys, 'prepare', pictures, dst, '--workers', 1)
    assert status == 0, err
    assert 'train: 7 pictures (7 kept byte for byte, 0 converted), 0 skipped' in out
    assert f'--config.data.source=records --config.data.dir={dst} --workdir' in out
    assert 'left alone: README' in err
    classes = ImageFolder(pictures / 'train').class_names
    for split in ('train', 'val'):
        folder, found = ImageFolder(pictures / split), records(dst, split)
        assert len(found) == len(folder)
        for i, (name, label, image) in enumerate(found):
            assert image == folder[i]['image']
            assert str(pictures / split / name) == folder.name_of(i)
            assert classes[label] == folder.class_names[folder[i]['label']]
    assert not (dst / '.progress').exists()


def test_tfds_reads_them_without_tensorflow(pictures, tmp_path, capsys):
    dst = tmp_path / 'records'
    assert run(capsys, 'prepare', pictures, dst, '--name', 'pets', '--workers', 1)[0] == 0
    builder = tfds.builder_from_directory(dst)
    assert builder.info.features['label'].names == ['B', 'a b', 'b']
    assert builder.info.supervised_keys == ('image', 'label')
    assert (builder.name, builder.info.splits['train'].num_examples) == ('pets', 7)
    picture = builder.as_data_source('val')[0]['image']
    assert (picture.shape, picture.dtype) == ((24, 40, 3), np.uint8)
    subprocess.run(['sha256sum', '--check', '--quiet', 'checksums.sha256'], cwd=dst, check=True)
    assert len((dst / 'checksums.sha256').read_text().splitlines()) == len(list(dst.iterdir())) - 1


def test_class_folders_alone_are_the_training_split(pictures, tmp_path, capsys):
    status, out, err = run(capsys, 'prepare', pictures / 'train', tmp_path / 'records', '--workers', 1)
    assert status == 0, err
    assert 'train on it' not in out  # there is nothing to evaluate on
    assert [r[0] for r in records(tmp_path / 'records', 'train')] == [
        'B/ü.jpg',
        'B/deep/er/y.jpg',
        'a b/x.jpeg',
        'b/10.JPG',
        'b/2.jpg',
        'b/zz.jpg',
        'b/nested/1.jpeg',
    ]


def test_several_processes_write_the_same_files(pictures, tmp_path):
    for n in (1, 2):
        command.prepare(str(pictures), str(tmp_path / f'{n}'), num_workers=n, shard_bytes=SHARD)
    files = sorted(p.name for p in (tmp_path / '1').iterdir())
    assert sum('train.array_record' in name for name in files) == 4
    assert sorted(p.name for p in (tmp_path / '2').iterdir()) == files
    for name in files:
        assert (tmp_path / '1' / name).read_bytes() == (tmp_path / '2' / name).read_bytes()
    folder = ImageFolder(pictures / 'train')
    assert [r[2] for r in records(tmp_path / '2', 'train')] == [folder[i]['image'] for i in range(7)]


def cmyk():
    return Image.merge('CMYK', [Image.new('L', (16, 16), v) for v in (0, 255, 255, 0)])  # red


def gray16():
    ramp = np.linspace(0, 65535, 40).astype(np.uint16)
    return Image.fromarray(np.broadcast_to(ramp, (24, 40)).copy())


def with_alpha():
    picture = smooth(3).convert('RGBA')
    picture.putalpha(Image.new('L', picture.size, 7))
    return picture


KINDS = {
    'cmyk.jpg': (cmyk(), 'JPEG', Image.new('RGB', (16, 16), (255, 0, 0))),
    'gray16.png': (gray16(), 'PNG', Image.fromarray((np.asarray(gray16()) >> 8).astype(np.uint8))),
    'gray16.tif': (gray16(), 'TIFF', Image.fromarray((np.asarray(gray16()) >> 8).astype(np.uint8))),
    'palette.png': (smooth(2).quantize(8), 'PNG', smooth(2).quantize(8).convert('RGB')),
    'gif.jpg': (smooth(2).quantize(8), 'GIF', smooth(2).quantize(8).convert('RGB')),
    'alpha.png': (with_alpha(), 'PNG', smooth(3)),
    'alpha.webp': (with_alpha(), 'WEBP', smooth(3)),
    'la.png': (with_alpha().convert('LA'), 'PNG', smooth(3).convert('L')),
    'rgb.jpeg': (smooth(4), 'PNG', smooth(4)),  # told by what it holds, not by its name
    'bmp.bmp': (smooth(5), 'BMP', smooth(5)),
    'tiff.tiff': (smooth(6), 'TIFF', smooth(6)),
    'onebit.png': (
        Image.new('1', (16, 16), 1),
        'PNG',
        Image.new('L', (16, 16), 255),
    ),
}


def test_every_other_kind_becomes_the_right_jpeg(tmp_path, capsys):
    for name, (picture, kind, _) in KINDS.items():
        settings = {'lossless': True, 'exact': True} if kind == 'WEBP' else {}
        write(tmp_path / 'in/c' / name, encoded(picture, kind, **settings))
    status, out, err = run(capsys, 'prepare', tmp_path / 'in', tmp_path / 'out', '--workers', 1)
    assert status == 0, err
    assert f'0 kept byte for byte, {len(KINDS)} converted' in out
    for name, _, image in records(tmp_path / 'out', 'train'):
        picture, expected = Image.open(io.BytesIO(image)), KINDS[name.removeprefix('c/')][2]
        assert (picture.format, picture.mode, picture.size) == ('JPEG', 'RGB', expected.size)
        difference = np.asarray(picture, int) - np.asarray(expected.convert('RGB'), int)
        assert np.abs(difference).mean() < 4, name


def test_jpegs_are_kept_gray_and_progressive_ones_too(tmp_path, capsys):
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
def test_an_orientation_means_the_same_in_folder_and_records(tmp_path, capsys, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / 'in/c/turned.png', encoded(smooth(), kind, exif=exif))
    write(tmp_path / 'in/c/upright.png', encoded(smooth(), kind))
    assert run(capsys, 'prepare', tmp_path / 'in', tmp_path / 'out', '--workers', 1)[0] == 0
    folder = ImageFolder(tmp_path / 'in')
    for i, (name, _, image) in enumerate(records(tmp_path / 'out', 'train')):
        # Pillow turns TIFF files itself.
        for turn in (False,) if kind == 'TIFF' else (False, True):
            theirs, ours = (decode(x, exif_orientation=turn) for x in (folder[i]['image'], image))
            assert ours.size == theirs.size, (name, turn)
            assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).mean() < 4


def png_of(width, height):
    """A PNG file that declares a size and ends soon."""
    chunks = ((b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)), (b'IDAT', zlib.compress(b'')))
    parts = [
        struct.pack('>I', len(c)) + name + c + struct.pack('>I', zlib.crc32(name + c)) for name, c in chunks
    ]
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


BAD = {
    'empty.jpg': (b'', 'the file is empty'),
    'page.jpg': (b'<html>404</html>', 'no kind of image'),
    'pointer.png': (b'version https://git-lfs.github.com/spec/v1\n', 'no kind of image'),
    'bomb.png': (png_of(100_000, 100_000), 'decompression bomb'),
    'large.png': (png_of(10_000, 10_000), 'decompression bomb'),
    'cut.jpg': (encoded(smooth(size=(300, 300)))[:-700], 'no end'),
    'cut_and_ended.jpg': (encoded(smooth(size=(300, 300)))[:600] + b'\xff\xd9', 'Truncated'),
    'float.tif': (encoded(smooth().convert('F'), 'TIFF'), 'floating-point'),
}


def test_bad_pictures_stop_and_are_all_named(pictures, tmp_path, capsys):
    for name, (content, _) in BAD.items():
        write(pictures / 'train/b' / name, content)
    (pictures / 'train/b/nowhere.jpg').symlink_to(tmp_path / 'nowhere')
    status, out, err = run(capsys, 'prepare', pictures, tmp_path / 'out', '--workers', 1)
    assert (status, out) == (2, '')
    for name, (_, reason) in BAD.items():
        (line,) = [line for line in err.splitlines() if line.startswith(f'train/b/{name}: ')]
        assert reason in line
    assert (
        f'skipped 1 entry in {pictures}: train/b/nowhere.jpg: broken link: No such file or directory' in err
    )
    last = err.splitlines()[-1]
    assert last.startswith(
        f'error: {len(BAD)} of the pictures read cannot be decoded, the first train/b/bomb'
    )
    assert not shard_files(tmp_path / 'out')


def test_bad_pictures_can_be_skipped(pictures, tmp_path, capsys):
    before = [ImageFolder(pictures / 'train')[i]['image'] for i in range(7)]
    write(pictures / 'train/b/3.jpg', b'')
    status, out, err = run(capsys, 'prepare', pictures, tmp_path / 'out', '--on-bad', 'skip', '--workers', 1)
    assert status == 0, err
    line = 'train/b/3.jpg: cannot decode the image: the file is empty'
    assert (tmp_path / 'out/skipped.txt').read_text() == f'{line}\n'
    assert line in err
    assert 'train: 7 pictures (7 kept byte for byte, 0 converted), 1 skipped' in out
    assert [r[2] for r in records(tmp_path / 'out', 'train')] == before
    subprocess.run(['sha256sum', '--check', '--quiet', 'checksums.sha256'], cwd=tmp_path / 'out', check=True)


def test_a_split_of_bad_pictures_alone_is_refused(pictures, tmp_path, capsys):
    for path in (pictures / 'val').rglob('*.jpg'):
        path.write_bytes(b'')
    status, _, err = run(capsys, 'prepare', pictures, tmp_path / 'out', '--on-bad=skip', '--workers', 1)
    assert status == 2
    assert "no picture of 'val' can be decoded" in err


@pytest.mark.parametrize('mend', ['remove', 'replace', 'skip'])
def test_after_a_bad_picture_what_was_written_stays(pictures, tmp_path, capsys, mend):
    dst, bad = tmp_path / 'out', pictures / 'train/b/nested/1.jpeg'
    good = bad.read_bytes()
    bad.write_bytes(good[:300])
    with pytest.raises(InputError, match='1 of the pictures'):
        command.prepare(str(pictures), str(dst), num_workers=1, shard_bytes=SHARD)
    before = shard_files(dst)
    assert 0 < len(before) < 4
    if mend == 'remove':
        bad.unlink()
    if mend == 'replace':
        bad.write_bytes(good)
    arguments = ('--on-bad=skip',) if mend == 'skip' else ()
    status, _, err = run(capsys, 'prepare', pictures, dst, '--workers', 1, *arguments)
    assert status == 0, err
    assert shard_files(dst).items() >= before.items()
    folder = ImageFolder(pictures / 'train')
    expected = [
        folder[i]['image']
        for i in range(len(folder))
        if mend == 'replace' or 'nested' not in folder.name_of(i)
    ]
    assert [r[2] for r in records(dst, 'train')] == expected


def test_after_an_interruption_the_same_command_continues(pictures, tmp_path, capsys, monkeypatch):
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
    status, out, err = run(capsys, 'prepare', pictures, dst, '--workers', 1)
    assert (status, out) == (75, '')
    assert err.splitlines()[-1] == 'stopped; the same command continues'
    before = shard_files(dst)
    assert len(before) == 2
    # Killed between the shard's name and the record of it, it is written again.
    (dst / '.progress/image_folder-train.array_record-00001-of-00004.json').unlink()
    status, out, err = run(capsys, 'prepare', pictures, dst, '--workers', 1)
    assert status == 0, err
    after = shard_files(dst)
    assert [name for name in before if after[name] == before[name]] == [min(before)]
    folder = ImageFolder(pictures / 'train')
    assert [r[2] for r in records(dst, 'train')] == [folder[i]['image'] for i in range(7)]
    files = {p.name: p.stat().st_mtime_ns for p in dst.iterdir()}
    status, out, _ = run(capsys, 'prepare', pictures, dst)
    assert status == 0
    assert 'is there already; nothing was done' in out
    assert {p.name: p.stat().st_mtime_ns for p in dst.iterdir()} == files


def test_a_killed_worker_is_told(pictures, tmp_path):
    def kill_one():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        children[0].kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(InputError, match='a worker process was killed'):
        command.prepare(str(pictures), str(tmp_path / 'out'), num_workers=2, shard_bytes=SHARD)
    killer.join(timeout=10)
    assert not multiprocessing.active_children()


def test_a_full_disk_leaves_nothing_half_written(pictures, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # fails as a full disk does
    try:
        status, _, err = run(capsys, 'prepare', pictures, tmp_path / 'out', '--workers', 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert 'cannot write image_folder-train.array_record-00000-of-00001 in' in err.splitlines()[-1]
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['.progress']
    assert run(capsys, 'prepare', pictures, tmp_path / 'out', '--workers', 1)[0] == 0


def test_nothing_is_ever_written_over(pictures, tmp_path, capsys):
    write(tmp_path / 'out/thesis.txt', b'mine')
    status, _, err = run(capsys, 'prepare', pictures, tmp_path / 'out')
    assert status == 2
    assert 'holds thesis.txt and is no data set of this command: choose another DST' in err
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['thesis.txt']


def test_a_finished_data_set_of_other_pictures_is_kept(pictures, tmp_path, capsys):
    dst = tmp_path / 'out'
    assert run(capsys, 'prepare', pictures, dst, '--workers', 1)[0] == 0
    before = shard_files(dst)
    (pictures / 'val/b/v.jpg').write_bytes(encoded(smooth(7)))
    status, _, err = run(capsys, 'prepare', pictures, dst, '--workers', 1)
    assert status == 2
    assert 'was prepared from other pictures' in err
    assert shard_files(dst) == before


@pytest.mark.parametrize('content', [b'{"lis', b'{}', b'[]', b'\xff'])
def test_a_damaged_report_or_plan_is_told_in_one_line(pictures, tmp_path, capsys, content):
    finished, begun = tmp_path / 'finished', tmp_path / 'begun'
    assert run(capsys, 'prepare', pictures, finished, '--workers', 1)[0] == 0
    write(pictures / 'train/b/bad.jpg', b'')
    assert run(capsys, 'prepare', pictures, begun, '--workers', 1)[0] == 2
    for folder, name in ((finished, 'prepare.json'), (begun, '.progress/plan.json')):
        (folder / name).write_bytes(content)
        status, out, err = run(capsys, 'prepare', pictures, folder, '--workers', 1)
        assert (status, out) == (2, '')
        assert err.splitlines()[-1].endswith(
            f'{folder / name} is damaged: choose another DST, or remove the folder'
        )


def test_a_shard_whose_record_is_damaged_is_written_again(pictures, tmp_path, capsys):
    write(pictures / 'val/b/bad.jpg', b'')
    assert run(capsys, 'prepare', pictures, tmp_path / 'out', '--workers', 1)[0] == 2
    (record,) = (tmp_path / 'out/.progress').glob('image_folder-train*.json')
    record.write_bytes(b'{"digest": ')
    status, _, err = run(capsys, 'prepare', pictures, tmp_path / 'out', '--workers', 1, '--on-bad=skip')
    assert status == 0, err
    assert [len(records(tmp_path / 'out', split)) for split in ('train', 'val')] == [7, 2]


def test_one_that_was_begun_with_other_arguments_is_refused(pictures, tmp_path, capsys):
    write(pictures / 'train/b/bad.jpg', b'')
    assert run(capsys, 'prepare', pictures, tmp_path / 'out', '--workers', 1)[0] == 2
    status, _, err = run(capsys, 'prepare', pictures, tmp_path / 'out', '--name', 'other', '--workers', 1)
    assert status == 2
    assert "was begun with the name 'image_folder', not 'other'" in err
    assert json.loads((tmp_path / 'out/.progress/plan.json').read_text())['name'] == 'image_folder'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('{src}', '{src}/records'), 'DST must lie outside of SRC'),
        (('{src}', '{src}'), 'DST must lie outside of SRC'),
        (('{src}', '{src}/README/records'), 'DST must lie outside'),
        (('{tmp}/missing', '{tmp}/out'), 'no such folder: .*missing'),
        (('{src}/README', '{tmp}/out'), 'no such folder: .*README: expected the folder'),
        (('{tmp}/void', '{tmp}/out'), 'void is empty: expected class folders'),
        (('{src}/train/b/nested', '{tmp}/out'), 'no class folders in .*nested'),
        (('{src}', '{tmp}/file'), 'file is no folder: choose another DST'),
        (('{src}', '{tmp}/file/records'), 'cannot write .*file/records'),
        (('{src}', 'gs://bucket/records'), 'gs://bucket/records is not on a disk'),
        (('{src}', '{tmp}/out', '--name', 'My pets'), "--name must be of lower-case .*got 'My pets'"),
        (('{src}', '{tmp}/out', '--labels', 'x.txt'), '--labels is for ILSVRC2012_img_val.tar'),
        (('{src}', '{tmp}/out', '--workers', '0'), "expected a whole number above 0, got '0'"),
    ],
)
def test_arguments_that_will_not_do_are_told_in_one_line(pictures, tmp_path, capsys, arguments, message):
    (tmp_path / 'void').mkdir()
    write(tmp_path / 'file', b'')
    filled = [a.format(src=pictures, tmp=tmp_path) for a in arguments]
    status, out, err = run(capsys, 'prepare', *filled)
    assert (status, out) == (2, '')
    assert re.search(f'error: .*{message}', err.splitlines()[-1])
    assert not (tmp_path / 'out').exists()
