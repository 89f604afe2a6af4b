"""Speed of the input pipeline, compared with a PyTorch DataLoader that does the same work.

    python benchmarks/input_pipeline.py --data IMAGES/train --workers 1 --out results.jsonl
    python benchmarks/input_pipeline.py --data IMAGES/train --enlarge 500x375 --workers 2

Both sides read the same files, take random-resized crops of 224 pixels and mirror half of them. The PyTorch
side is a common dataset of Pillow images. It returns uint8 tensors like ours ('torch') or normalised floats
as in most recipes ('torch-float'). Both sides use the same number of worker processes; 'ours-threads' uses as
many threads in this process instead. The sides take turns, and their first batches are not timed.
"""

import argparse
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image
from tqdm import tqdm

from epsanet_jax.data import decode, pipeline, sources, transforms
from epsanet_jax.data.image_folder import ImageFolder

SIZE, WARM_UP = 224, 2  # pixels; batches that are not timed
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    """Measures and prints."""
    args = _parse()
    with tempfile.TemporaryDirectory() as folder:
        root = enlarged(args.data, args.enlarge, Path(folder), args.images) if args.enlarge else args.data
        source = ImageFolder(root)
        sides: dict[str, Callable[[], Iterator[Any]]] = {
            'ours': lambda: ours(source, args, pipeline.Reading(workers=args.workers, threads=1)),
            'ours-threads': lambda: ours(source, args, pipeline.Reading(threads=args.workers)),
            'torch': lambda: torch_loader(source, args, floats=False),
            'torch-float': lambda: torch_loader(source, args, floats=True),
        }
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in tqdm(range(args.rounds), desc='rounds'):
            for name, batches in sides.items():
                speeds[name].append(images_per_second(batches(), args))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    about = common.describe_device()
    for name, found in medians.items():
        record = {'benchmark': 'input_pipeline', 'side': name, 'workers': args.workers, 'batch': args.batch}
        record |= {'pictures': args.enlarge or 'as they are', 'images_per_s': round(found, 1)}
        record |= {
            'ratio': round(found / medians['torch'], 3),
            'ratio_float': round(found / medians['torch-float'], 3),
        }
        record |= {'simplejpeg': decode.simplejpeg is not None, 'pillow': Image.__version__, **about}
        common.emit(record, args.out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='folder of class folders')
    parser.add_argument('--enlarge', metavar='WxH', help='first resize the images to JPEGs of this size')
    parser.add_argument('--images', type=int, default=400, help='number of images to resize')
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--batches', type=int, default=20, help='batches timed in each round')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--out', type=Path, help='append the lines to this file')
    return parser.parse_args()


def images_per_second(batches: Iterator[Any], args: argparse.Namespace) -> float:
    """Returns images per second after the first batches."""
    for _ in itertools.islice(batches, WARM_UP + args.workers):
        pass
    start = time.perf_counter()
    for _ in itertools.islice(batches, args.batches):
        pass
    seconds = time.perf_counter() - start
    close = getattr(batches, 'close', None)
    if close:
        close()
    return args.batches * args.batch / seconds


def ours(source: sources.Source, args: argparse.Namespace, reading: pipeline.Reading) -> Iterator[Any]:
    """Returns the batches of the trainer's input pipeline."""
    return pipeline.train_batches(
        source,
        transforms.TrainTransform(transforms.RandomCrop(SIZE)),
        pipeline.Rows(args.batch),
        0,
        reading=reading,
    )


class Dataset:
    """The same files as a PyTorch dataset, with torchvision's transforms by Pillow."""

    def __init__(self, source: sources.Source, floats: bool):
        self._source, self._floats = source, floats
        self._crop = transforms.RandomCrop(SIZE)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import torch

        record = self._source[index]
        image = Image.open(io.BytesIO(record['image'])).convert('RGB')  # pyright: ignore[reportArgumentType]
        crop = self._crop(image, np.random.default_rng(index))
        tensor = torch.from_numpy(crop.copy()).permute(2, 0, 1).contiguous()
        if self._floats:
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
            tensor = tensor.float().div(255).sub_(mean).div_(std)
        return tensor, record['label']


def torch_loader(source: sources.Source, args: argparse.Namespace, floats: bool) -> Iterator[Any]:
    """Yields the batches of a DataLoader without end."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Dataset(source, floats),  # pyright: ignore[reportArgumentType]
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=True,
    )
    while True:
        yield from loader


def enlarged(data: Path, size: str, folder: Path, count: int) -> Path:
    """Writes `count` images as JPEGs of this size into class folders; returns the folder."""
    width, height = map(int, size.split('x'))
    source = ImageFolder(data)
    for i in tqdm(range(0, len(source), max(1, len(source) // count)), desc=f'images of {size}'):
        image = decode.decode(source[i]['image']).resize((width, height), Image.Resampling.BICUBIC)
        place = folder / source.class_names[source[i]['label']]
        place.mkdir(exist_ok=True)
        image.save(place / f'{i}.jpg', quality=90)
    return folder


if __name__ == '__main__':
    main()
