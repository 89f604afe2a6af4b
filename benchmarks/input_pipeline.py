"""How fast pictures become batches: our pipeline against a PyTorch DataLoader of the same work.

    python benchmarks/input_pipeline.py --data PICTURES/train --workers 1 --out results.jsonl
    python benchmarks/input_pipeline.py --data PICTURES/train --enlarge 500x375 --workers 2

Both read the same files, cut them as random-resized crops to 224 pixels and mirror half of them. The PyTorch
side is the usual data set of Pillow pictures, once up to uint8 tensors as ours ('torch') and once up to
normalised floats, as recipes have it ('torch-float'). Both have the same number of worker processes;
'ours-threads' has as many threads in this process instead. They take turns, each after its first batches.
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

SIZE, WARM_UP = 224, 2  # pixels; batches before the clock starts
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    """Measures and prints."""
    args = _parse()
    with tempfile.TemporaryDirectory() as folder:
        root = enlarged(args.data, args.enlarge, Path(folder), args.pictures) if args.enlarge else args.data
        source = sources.ImageFolder(root)
        sides: dict[str, Callable[[], Iterator[Any]]] = {
            'ours': lambda: ours(source, args, pipeline.Reading(workers=args.workers, threads=1)),
            'ours-threads': lambda: ours(source, args, pipeline.Reading(threads=args.workers)),
            'torch': lambda: torch_loader(source, args, floats=False),
            'torch-float': lambda: torch_loader(source, args, floats=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in tqdm(range(args.rounds), desc='rounds'):
            for name, batches in sides.items():
                rates[name].append(rate(batches(), args))
    best = {name: statistics.median(found) for name, found in rates.items()}
    about = common.describe_device()
    for name, found in best.items():
        record = {'benchmark': 'input_pipeline', 'side': name, 'workers': args.workers, 'batch': args.batch}
        record |= {'pictures': args.enlarge or 'as they are', 'images_per_s': round(found, 1)}
        record |= {
            'ratio': round(found / best['torch'], 3),
            'ratio_float': round(found / best['torch-float'], 3),
        }
        record |= {'simplejpeg': decode.simplejpeg is not None, 'pillow': Image.__version__, **about}
        common.emit(record, args.out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='a folder of class folders')
    parser.add_argument('--enlarge', metavar='WxH', help='first make JPEGs of that size of the pictures')
    parser.add_argument('--pictures', type=int, default=400, help='how many, if they are made')
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--batches', type=int, default=20, help='to be timed, each turn')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--out', type=Path, help='append the lines to this file')
    return parser.parse_args()


def rate(batches: Iterator[Any], args: argparse.Namespace) -> float:
    """Returns pictures per second after the first batches."""
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
    """Returns the batches of the trainer's own pipeline."""
    return pipeline.train_batches(
        source,
        transforms.TrainTransform(transforms.RandomCrop(SIZE)),
        pipeline.Rows(args.batch),
        0,
        reading=reading,
    )


class Pictures:
    """The same files as a PyTorch data set, with torchvision's transforms in Pillow's terms."""

    def __init__(self, source: sources.Source, floats: bool):
        self._source, self._floats = source, floats
        self._crop = transforms.RandomCrop(SIZE)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import torch

        record = self._source[index]
        picture = Image.open(io.BytesIO(record['image'])).convert('RGB')  # pyright: ignore[reportArgumentType]
        image = self._crop(picture, np.random.default_rng(index))
        tensor = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()
        if self._floats:
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
            tensor = tensor.float().div(255).sub_(mean).div_(std)
        return tensor, record['label']


def torch_loader(source: sources.Source, args: argparse.Namespace, floats: bool) -> Iterator[Any]:
    """Returns the batches of a DataLoader, epoch after epoch."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Pictures(source, floats),  # pyright: ignore[reportArgumentType]
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=True,
    )
    while True:
        yield from loader


def enlarged(data: Path, size: str, folder: Path, count: int) -> Path:
    """Writes JPEGs of that size, the classes kept."""
    width, height = map(int, size.split('x'))
    source = sources.ImageFolder(data)
    for i in tqdm(range(0, len(source), max(1, len(source) // count)), desc=f'pictures of {size}'):
        picture = decode.decode(source[i]['image']).resize((width, height), Image.Resampling.BICUBIC)
        place = folder / source.class_names[source[i]['label']]
        place.mkdir(exist_ok=True)
        picture.save(place / f'{i}.jpg', quality=90)
    return folder


if __name__ == '__main__':
    main()
