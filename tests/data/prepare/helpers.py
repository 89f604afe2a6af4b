"""Images, tars and calls of `epsanet prepare`."""

import io
import tarfile

import numpy as np
import tensorflow_datasets as tfds
from command import run
from PIL import Image

SHARD = 1500  # bytes: one or two images of `smooth`


def smooth(seed=0, size=(40, 24)):
    """An image that JPEG changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind='JPEG', **settings):
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return encoded(Image.fromarray(pixels))


def packed(files, folders=()):
    """A tar of files, in the order given."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        for name in folders:
            header = tarfile.TarInfo(name)
            header.type = tarfile.DIRTYPE
            tar.addfile(header)
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return out.getvalue()


# Two splits, in random order.
TRAIN = {
    name: jpeg(i)
    for i, name in enumerate(
        ['dog/9.jpg', 'cat/z.jpg', 'dog/10.jpg', 'cat/more/b.jpeg', 'cat/a.JPG', 'Ox/ü.jpg']
    )
}
VAL = {'dog/1.jpg': jpeg(10), 'cat/1.jpg': jpeg(11)}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def records(folder, split):
    """File name, class name and bytes of every record."""
    builder = tfds.builder_from_directory(folder)
    names = builder.info.features['label'].names
    source = builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})
    return [(r['file_name'].decode(), names[int(r['label'])], r['image']) for r in source]


def shard_files(folder):
    """The time of the last change of each shard."""
    return {p.name: p.stat().st_mtime_ns for p in sorted(folder.glob('*array_record*'))}


def prepared(capsys, *arguments):
    """Runs the command, which must succeed, and returns what it prints on stdout and stderr."""
    status, out, err = run(capsys, 'prepare', *arguments, '--workers', 1)
    assert status == 0, err
    return out, err


def refusal(capsys, *arguments):
    """Runs the command, which must end with status 2, and returns the last line on stderr."""
    status, out, err = run(capsys, 'prepare', *arguments, '--workers', 1)
    assert (status, out) == (2, ''), err
    assert 'Traceback' not in err
    return err.splitlines()[-1]
