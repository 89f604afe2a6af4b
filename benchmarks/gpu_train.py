"""A part of `gpu.py`: a short training on real images, on our side or in PyTorch.

    python benchmarks/gpu_train.py --side ours --images images.npz

Both sides start with the same parameters and see the same batches. The images are those of `gpu.py --pack`.
"""

import argparse
import io
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # leave GPU memory for PyTorch

import jax
import jax.numpy as jnp
import numpy as np
import train_step

from epsanet_jax.convert import to_torch, torch_model
from epsanet_jax.data.augment import normalize
from epsanet_jax.training import sharding, steps
from epsanet_jax.training.config import OptimizerConfig
from epsanet_jax.training.optimizer import make_optimizer


def main() -> None:
    """Trains and prints a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--side', choices=('ours', 'torch'), default='ours')
    parser.add_argument('--images', type=Path, required=True, help='made by gpu.py --pack')
    parser.add_argument('--model', default='epsanet50_small')
    parser.add_argument('--small', action='store_true', help='as in train_step.py')
    parser.add_argument('--conv', default='auto', help='convolution algorithm of our side')
    parser.add_argument('--lr', type=float, default=0.05)
    parser.add_argument('--batch', type=int, default=256)
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--dtype', default='bfloat16')
    common.emit(train(parser.parse_args()), None)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns losses, speed, and the accuracy on the last tenth of the images, at least a batch."""
    images, labels = load(args.images)
    held, rng = max(args.batch, len(images) // 10), np.random.default_rng(0)
    model = train_step.make_model(args, num_classes=int(labels.max()) + 1)
    optimizer = make_optimizer(OptimizerConfig(), lambda step: args.lr * warm_up(args, step))
    state = train_step.first_state(model, optimizer, sharding.make_mesh(args.batch))
    make = {'ours': train_ours, 'torch': train_in_torch}[args.side]
    step, classify = make(args, model, optimizer, state)
    losses, start = [], 0.0
    for i in range(args.steps):
        rows = rng.integers(0, len(images) - held, args.batch)
        loss = step(images[rows], labels[rows])
        if i == args.steps // 10:  # compiled and warm
            float(loss)  # waits
            start = time.perf_counter()
        losses.append(loss)
    last = float(losses[-1])  # waits
    rate = (args.steps - args.steps // 10 - 1) * args.batch / (time.perf_counter() - start)
    firsts = range(len(images) - held, len(images) - args.batch + 1, args.batch)  # whole batches
    right = [classify(images[i : i + args.batch]) == labels[i : i + args.batch] for i in firsts]
    record = {'benchmark': 'gpu_train', **common.describe_device(), 'side': args.side, 'model': args.model}
    record |= {'batch': args.batch, 'steps': args.steps, 'image_size': images.shape[1], 'dtype': args.dtype}
    record |= {'losses': [round(float(v), 4) for v in losses[:: max(1, args.steps // 20)]], 'last_loss': last}
    record |= {'images_per_s': round(rate, 1), 'accuracy': round(float(np.mean(right)), 4) if right else None}
    return record


def warm_up(args: argparse.Namespace, step: Any) -> Any:
    """Returns the factor of the learning rate, which rises during the first quarter of the steps."""
    return jnp.minimum(1.0, (step + 1) / max(1, args.steps // 4))


def train_ours(args: argparse.Namespace, model: Any, optimizer: Any, state: Any) -> tuple[Any, Any]:
    """Returns a step `(images, labels) -> loss` and a function that classifies images."""
    mesh = sharding.make_mesh(args.batch)
    data = {'smoothing': train_step.SMOOTHING, 'mean': train_step.DATA.mean, 'std': train_step.DATA.std}
    update = steps.make_train_step(model, optimizer, mesh, **data)

    @jax.jit
    def logits(variables: Any, images: jax.Array) -> jax.Array:
        return model.apply(variables, normalize(images, data['mean'], data['std'], model.dtype)).argmax(1)

    def step(images: np.ndarray, labels: np.ndarray) -> jax.Array:
        nonlocal state
        batch = sharding.to_devices({'image': images, 'label': labels}, mesh)
        state, sums = update(state, batch)
        return sums['loss'] / args.batch

    return step, lambda images: np.asarray(logits(state.variables, images))


def train_in_torch(args: argparse.Namespace, model: Any, optimizer: Any, state: Any) -> tuple[Any, Any]:
    """Returns the same for PyTorch, from the same parameters; `optimizer` is rebuilt."""
    import torch

    device = torch.device('cuda' if jax.devices()[0].platform == 'gpu' else 'cpu')
    net: Any = torch_model.EPSANet(model)
    net.load_state_dict({k: torch.tensor(v) for k, v in to_torch(state.variables, model).items()})
    net.to(device, memory_format=torch.channels_last)
    sgd = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda i: float(warm_up(args, i)))
    mean, std = (
        torch.tensor(v, device=device).view(1, 3, 1, 1) * 255
        for v in (train_step.DATA.mean, train_step.DATA.std)
    )

    def logits(images: np.ndarray) -> Any:
        x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == 'bfloat16'):
            return net((x - mean) / std).float()

    def step(images: np.ndarray, labels: np.ndarray) -> Any:
        sgd.zero_grad(set_to_none=True)
        wanted = torch.from_numpy(labels).long().to(device)
        loss = torch.nn.functional.cross_entropy(logits(images), wanted, label_smoothing=train_step.SMOOTHING)
        loss.backward()
        sgd.step()
        schedule.step()
        return loss.detach()

    def classify(images: np.ndarray) -> np.ndarray:
        net.eval()
        with torch.no_grad():
            return logits(images).argmax(1).cpu().numpy()

    return step, classify


def pack(folder: Path, file: Path, size: int, most: int) -> None:
    """Writes images of a folder of classes, evenly drawn, in random order."""
    from epsanet_jax.data.decode import decode
    from epsanet_jax.data.image_folder import ImageFolder
    from epsanet_jax.data.transforms import CentreCrop

    source, crop = ImageFolder(folder), CentreCrop(size, size)
    rows = np.random.default_rng(0).permutation(len(source))[:most]
    records = [source[int(row)] for row in rows]
    images = (crop(decode(record['image'])) for record in records)
    save(file, images, [record['label'] for record in records])
    print(f'{file}: {len(rows)} images of {size} px, {file.stat().st_size / 1e6:.1f} MB')


def save(file: Path, images: Iterable[np.ndarray], labels: Sequence[int]) -> None:
    """Writes images [H, W, 3] of one size as JPEG, and labels."""
    from PIL import Image

    encoded = []
    for image in images:
        Image.fromarray(image).save(buffer := io.BytesIO(), 'JPEG', quality=90)
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    file.parent.mkdir(parents=True, exist_ok=True)
    starts = np.cumsum([0, *map(len, encoded)])
    np.savez(file, jpegs=np.concatenate(encoded), starts=starts, labels=np.asarray(labels, np.int32))


def load(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns images [N, H, W, 3] in uint8 and labels [N] that `save` wrote."""
    from epsanet_jax.data.decode import decode

    with np.load(file) as arrays:
        jpegs, starts, labels = (arrays[name] for name in ('jpegs', 'starts', 'labels'))
    with ThreadPoolExecutor() as pool:
        images = pool.map(lambda i: decode(jpegs[starts[i] : starts[i + 1]].tobytes()), range(len(labels)))
        return np.stack(list(images)), labels


if __name__ == '__main__':
    main()
