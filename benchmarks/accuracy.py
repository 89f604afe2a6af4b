"""Accuracy on real images: our trainer, a plain PyTorch loop, and a linear classifier on the pixels.

    python benchmarks/accuracy.py DATA --out runs/accuracy     # DATA: train/ and val/, one folder per class
    epsanet plot runs/accuracy/*/ --out curves.png

Each side trains with every seed on the same images with the same recipe: network, batch size, BatchNorm
groups, optimizer, schedule, and distribution of the crops. The PyTorch side shares only the network in
`convert/torch_model.py` with ours. Every run has a folder with its metrics.jsonl; finished runs are not
repeated. Prints one line of JSON per run, and one per side with mean and standard error.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image

from epsanet_jax.commands.common import use_persistent_cache
from epsanet_jax.models.zoo import build_model
from epsanet_jax.training.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from epsanet_jax.training.loop import train

SIDES = ('linear', 'ours', 'torch')


def recipe(args: argparse.Namespace, seed: int) -> Config:
    """Returns the recipe of both sides: a small EPSANet with four stages."""
    return Config(
        seed=seed,
        batch_size=64,
        epochs=args.epochs,
        label_smoothing=0.1,
        log_every_steps=50,
        eval_every_epochs=args.epochs / 10,
        model=ModelConfig(layers=(1, 1, 1, 1), planes=(16, 32, 64, 128), groups=(1, 2, 4, 4), reduction=4),
        data=DataConfig(
            dir=str(args.data),
            image_size=args.size,
            resize_size=round(args.size * 8 / 7),
            crop_scale=(0.35, 1.0),
        ),
        optimizer=OptimizerConfig(lr=0.05, momentum=0.9, weight_decay=5e-4),
        schedule=ScheduleConfig(name='cosine', warmup_epochs=2),
        checkpoint=CheckpointConfig(every_minutes=2),
    )


def main() -> None:
    """Trains the chosen sides and prints the results."""
    args = _parse()
    use_persistent_cache()
    args.out.mkdir(parents=True, exist_ok=True)
    device = common.describe_device()
    shared = {'benchmark': 'accuracy', **device, 'epochs': args.epochs, 'image_size': args.size}
    for side in args.sides:
        found = []
        for seed in args.seeds if side != 'linear' else [0]:
            workdir = args.out / f'{side}-{seed}'
            last = run(side, recipe(args, seed), workdir)
            found.append(100 * last['top1'])
            record = {'side': side, 'seed': seed, 'top1': last['top1'], 'top5': last['top5']}
            common.emit({**shared, **record, 'examples': last['examples']}, args.json)
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
        summary = {'side': side, 'runs': len(found), 'top1_mean_%': round(statistics.mean(found), 2)}
        summary['standard_error_%'] = None if error is None else round(error, 2)
        common.emit({**shared, **summary}, args.json)


def run(side: str, config: Config, workdir: Path) -> dict[str, Any]:
    """Returns the last evaluation of a run; trains unless the folder holds a finished run."""
    if side == 'ours':
        return train(config, str(workdir)).last
    done = workdir / 'metrics.jsonl'
    if not done.exists():
        lines = run_linear(config) if side == 'linear' else run_torch(config)
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / 'metrics.tmp'
        temporary.write_text(''.join(json.dumps(line) + '\n' for line in lines))
        temporary.rename(done)
    return json.loads(done.read_text().splitlines()[-1])


def load_images(folder: Path) -> tuple[list[Image.Image], np.ndarray]:
    """Returns the decoded images of a folder of class folders, and their labels [N]."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [(path, i) for i, name in enumerate(names) for path in sorted((folder / name).iterdir())]
    decoded = [Image.open(path).convert('RGB') for path, _ in files]
    return decoded, np.array([label for _, label in files])


def random_crop(image: Image.Image, data: DataConfig, rng: np.random.Generator) -> Image.Image:
    """Returns a random-resized crop, flipped in half of the cases, as torchvision defines them."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*data.crop_scale)
        ratio = math.exp(rng.uniform(math.log(data.crop_ratio[0]), math.log(data.crop_ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    size = (data.image_size, data.image_size)
    crop = image.resize(size, Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def centre_crop(image: Image.Image, data: DataConfig) -> Image.Image:
    """Returns the centre crop after a resize of the shorter side, as torchvision defines them."""
    scale = data.resize_size / min(image.size)
    resized = image.resize(
        (
            max(data.resize_size, int(image.width * scale)),
            max(data.resize_size, int(image.height * scale)),
        ),
        Image.Resampling.BILINEAR,
    )
    x, y = (round((side - data.image_size) / 2) for side in resized.size)
    return resized.crop((x, y, x + data.image_size, y + data.image_size))


def to_array(images: list[Image.Image], data: DataConfig) -> np.ndarray:
    """Returns the normalised images as float32 [N, H, W, 3]."""
    pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255
    return (pixels - np.float32(data.mean)) / np.float32(data.std)


def run_linear(config: Config) -> list[dict[str, Any]]:
    """Fits softmax regression to the pixels; returns the evaluation with the best of several penalties."""
    from sklearn.linear_model import LogisticRegression

    folder, arrays = Path(config.data.dir), []
    for split in (config.data.train_split, config.data.eval_split):
        images, labels = load_images(folder / split)
        flat = to_array([centre_crop(image, config.data) for image in images], config.data)
        arrays.append((flat.reshape(len(flat), -1), labels))
    (x, y), (validation, truth) = arrays
    best: dict[str, Any] = {}
    for penalty in (1e-5, 1e-4, 1e-3):
        fitted = LogisticRegression(C=penalty, max_iter=100).fit(x, y)
        order = np.argsort(-fitted.decision_function(validation), axis=1)
        top1, top5 = ((order[:, :k] == truth[:, None]).any(axis=1).mean() for k in (1, 5))
        common.log(f'linear, C {penalty}: top-1 {top1:.2%}')
        if not best or top1 > best['top1']:
            best = {'split': 'eval', 'step': 0, 'top1': top1, 'top5': top5, 'examples': len(truth)}
    return [best]


def run_torch(config: Config) -> list[dict[str, Any]]:
    """Trains our PyTorch network in a plain PyTorch loop; returns the lines of its metrics.jsonl."""
    import torch
    from torch.nn.functional import cross_entropy

    from epsanet_jax.convert.torch_model import EPSANet

    torch.manual_seed(config.seed)
    data, rng = config.data, np.random.default_rng(config.seed)
    images, labels = load_images(Path(data.dir) / data.train_split)
    validation, truth = load_images(Path(data.dir) / data.eval_split)
    model = EPSANet(build_model(config.model, len(set(labels))))
    settings = config.optimizer
    optimizer = torch.optim.SGD(
        model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
    )
    steps_per_epoch = len(images) / config.batch_size
    total, warmup = round(config.epochs * steps_per_epoch), config.schedule.warmup_epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warmup
            if step < warmup
            else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        ),
    )

    def tensor(chosen: list[Image.Image]) -> torch.Tensor:
        return torch.from_numpy(to_array(chosen, data)).permute(0, 3, 1, 2).contiguous()

    def evaluate(step: int) -> dict[str, Any]:
        model.eval()
        with torch.no_grad():
            logits = torch.cat(
                [
                    model(tensor([centre_crop(image, data) for image in validation[i : i + 100]]))
                    for i in range(0, len(validation), 100)
                ]
            )
        model.train()
        loss = cross_entropy(logits, torch.from_numpy(truth), label_smoothing=config.label_smoothing)
        order = logits.argsort(dim=1, descending=True).numpy()
        top1, top5 = (float((order[:, :k] == truth[:, None]).any(axis=1).mean()) for k in (1, 5))
        line = {'split': 'eval', 'step': step, 'loss': float(loss), 'top1': top1, 'top5': top5}
        return {**line, 'examples': len(truth)}

    lines, rows, sums = [], _shuffled(len(images), rng), []
    every, began = max(1, round(config.eval_every_epochs * steps_per_epoch)), time.perf_counter()
    for step in range(1, total + 1):
        batch = [next(rows) for _ in range(config.batch_size)]
        targets = torch.from_numpy(labels[batch])
        logits = model(tensor([random_crop(images[i], data, rng) for i in batch]))
        loss = cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr = schedule.get_last_lr()[0]
        schedule.step()
        sums.append((float(loss), float((logits.argmax(dim=1) == targets).float().mean())))
        if step % config.log_every_steps == 0 or step == total:
            mean_loss, top1 = np.mean(sums, axis=0).tolist()
            speed = round(len(sums) * config.batch_size / (time.perf_counter() - began), 2)
            line = {'split': 'train', 'step': step, 'loss': mean_loss, 'top1': top1, 'lr': lr}
            lines.append({**line, 'images_per_s': speed})
            common.log(
                f'torch, seed {config.seed}, step {step}/{total}: loss {mean_loss:.4f}, {speed} images/s'
            )
            sums, began = [], time.perf_counter()
        if step % every == 0 or step == total:
            lines.append(evaluate(step))
            common.log(f'torch, seed {config.seed}, step {step}/{total}: top-1 {lines[-1]["top1"]:.2%}')
    return lines


def _shuffled(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Yields all numbers below `count` in random order, without end and in a new order each time."""
    while True:
        yield from rng.permutation(count).tolist()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('data', type=Path, help='folder with train/ and val/, one folder per class in each')
    parser.add_argument('--out', type=Path, default=Path('runs/accuracy'), help='folder of the runs')
    parser.add_argument('--sides', nargs='+', choices=SIDES, default=list(SIDES))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--epochs', type=float, default=30)
    parser.add_argument('--size', type=int, default=64, help='image size in pixels')
    parser.add_argument('--json', type=Path, help='append the lines to this file')
    return parser.parse_args()


if __name__ == '__main__':
    main()
