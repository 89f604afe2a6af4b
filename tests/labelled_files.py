"""Writes the images of a folder of class folders as parquet, WebDataset shards and tables."""

import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from epsanet_jax.data.image_folder import ImageFolder


def image(seed, size=(20, 16), kind='JPEG'):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def class_folders(root, count=12, classes=('ant', 'bee', 'cat')):
    """A split of `count` images."""
    for i in range(count):
        path = root / classes[i % len(classes)] / f'{i:03d}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(i))
    return ImageFolder(root)


def write_parquet(path, images, labels, names=None, rows=5, image_type='struct'):
    """Writes images as Hugging Face does; with names, the labels are declared in the schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = images
    if image_type == 'struct':
        values = [{'bytes': image, 'path': f'{i}.jpg'} for i, image in enumerate(images)]
    table = pa.table({'image': values, 'label': labels})
    if names:
        label = {'names': list(names), '_type': 'ClassLabel'}
        features = {'image': {'_type': 'Image'}, 'label': label}
        text = json.dumps({'info': {'features': features}})
        table = table.replace_schema_metadata({'huggingface': text})
    pq.write_table(table, path, row_group_size=rows)


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def write_shards(folder, split, source, count, kind='cls'):
    """Divides the images of a source among shards."""
    for part in range(count):
        members = []
        for i in range(part * len(source) // count, (part + 1) * len(source) // count):
            name = source.class_names[source.labels[i]]
            label = json.dumps({'label': name, 'width': 20}) if kind == 'json' else name
            members += [(f'{i:05d}.jpg', source[i]['image']), (f'{i:05d}.{kind}', label.encode())]
        write_tar(folder / f'{split}-{part:04d}.tar', members)


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as f:
        csv.writer(f).writerows(rows)


def write_all(folder, root, split):
    """Writes the split of a folder of images in every form, in the folder's order."""
    source = ImageFolder(root / split)
    images = [source[i]['image'] for i in range(len(source))]
    half = len(images) // 2
    for part, rows in enumerate((slice(half), slice(half, None))):
        path = folder / 'parquet/data' / f'{split}-{part:05d}-of-00002.parquet'
        write_parquet(path, images[rows], source.labels[rows], source.class_names)
    write_shards(folder / 'shards', split, source, 3)
    names = [source.class_names[label] for label in source.labels]
    paths = [f'{split}/{name}' for name in source.files]
    flat = [f'{i:05d}.jpg' for i in range(len(images))]
    write_csv(folder / 'csv' / f'{split}.csv', [('path', 'label'), *zip(flat, names, strict=True)])
    for place in ('csv', 'metadata'):
        (folder / place / split).mkdir(parents=True, exist_ok=True)
        for name, content in zip(flat, images, strict=True):
            (folder / place / split / name).write_bytes(content)
    lines = [json.dumps({'file_name': n, 'label': c}) for n, c in zip(flat, names, strict=True)]
    (folder / 'metadata' / split / 'metadata.jsonl').write_text('\n'.join(lines))
    return paths
