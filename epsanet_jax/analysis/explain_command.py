"""The command `epsanet explain`: a drawing for each picture, a table for each class of a folder."""

import contextlib
import csv
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from epsanet_jax.analysis.drawing import Explanation, draw, save
from epsanet_jax.analysis.explain import (
    attention,
    grad_cam,
    has_pyramids,
    kernel_labels,
)
from epsanet_jax.data.image_files import ImageFile, check_paths
from epsanet_jax.errors import InputError, one_line, suggest
from epsanet_jax.models.epsanet import EPSANet, check_stage, stages
from epsanet_jax.paths import write_atomically
from epsanet_jax.predict import class_names, run
from epsanet_jax.predict_command import Skipped, print_skipped, progress, shown
from epsanet_jax.training import pretrained
from epsanet_jax.training.compilation import use_persistent_cache

TABLE = 'attention.csv'


def command(
    checkpoint: str,
    images: Sequence[str],
    step: str,
    out: str,
    chosen_stages: Sequence[str] | None,
    chosen_classes: Sequence[str] | None,
    batch_size: int,
    ema: bool = True,
) -> Iterator[str]:
    """Draws, and yields what to print.

    Args:
        checkpoint: workdir, Orbax checkpoint or weights file.
        images: files and folders.
        step: which checkpoint of a workdir.
        out: folder for the drawings; made if need be.
        chosen_stages: of which to show Grad-CAM; None: the last one.
        chosen_classes: names or numbers, for which; None: the likeliest of each picture.
        batch_size: pictures computed at once.
        ema: whether to take the moving averages where a run kept any.

    Raises:
        InputError: something is not there, cannot be written, or no picture could be decoded.
    """
    check_paths(images, without=out)
    use_persistent_cache()
    weights = pretrained.load(checkpoint, step, ema)
    model, names = weights.model, class_names(weights)
    chosen_stages = list(dict.fromkeys(chosen_stages or stages(model)[-1:]))
    for stage in chosen_stages:
        check_stage(model, stage)
    numbers = None if chosen_classes is None else find_classes(chosen_classes, names)
    make_folder(out)
    places = Places(images, out)
    kernels = kernel_labels(model) if has_pyramids(model) else []
    tables = Tables(images)

    print_skipped(images, without=out)
    skipped = Skipped()
    rows = run(make_step(model, chosen_stages, numbers), weights, images, batch_size, skipped, without=out)
    with contextlib.closing(rows):
        for file, image, _, found in progress(skipped.counted(rows), images, without=out):
            explanation = Explanation(
                file.below,
                image,
                names,
                found['probabilities'],
                found['classes'],
                found['cams'],
                found['attention'],
                kernels,
            )
            path = places.of(file)
            make_folder(os.path.dirname(path))
            save(draw(explanation), path)
            tables.add(file, found['attention'])
            best = int(found['probabilities'].argmax())
            yield f'{shown(path)}: {shown(names[best])} {100 * found["probabilities"][best]:.1f} %'
    skipped.finish()
    if tables.means() and kernels:
        for name, (count, means) in tables.means().items():
            yield from ('', *table(name, count, means, kernels))
        path = os.path.join(out, TABLE)
        write_tables(path, tables.means(), model)
        yield from ('', f'written: {shown(path)}')


def make_step(
    model: EPSANet, chosen_stages: Sequence[str], classes: Sequence[int] | None
) -> Callable[[Any, jax.Array], tuple[jax.Array, dict[str, Any]]]:
    """Returns the function `(variables, images) -> (logits, arrays)` behind a drawing.

    The arrays are 'probabilities' [N, num_classes]; 'classes' int [N, K], those given or the likeliest one;
    'cams', for each stage [N, K, H, W]; and 'attention', for each stage [N, blocks, S], means over channels,
    empty for a ResNet.
    """

    def step(variables: Any, images: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        logits: Any = model.apply(variables, images, train=False)
        probabilities = jax.nn.softmax(logits)
        if classes is None:
            chosen = probabilities.argmax(axis=-1, keepdims=True)  # [N, 1]
        else:
            chosen = jnp.broadcast_to(jnp.asarray(classes), (len(images), len(classes)))  # [N, K]

        def cams(stage: str) -> jax.Array:
            one = lambda classes: grad_cam(model, variables, images, classes, stage)  # noqa: E731
            return jax.vmap(one, in_axes=1, out_axes=1)(chosen)

        looked_at = attention(model, variables, images) if has_pyramids(model) else {}
        return logits, {
            'probabilities': probabilities,
            'classes': chosen,
            'cams': {stage: cams(stage) for stage in chosen_stages},
            'attention': {stage: a.mean(axis=-1) for stage, a in looked_at.items()},
        }

    return step


def find_classes(chosen: Sequence[str], names: Sequence[str]) -> list[int]:
    """Returns the numbers of classes given by name or, where no class is called so, by number.

    Raises:
        InputError: there is no such class.
    """
    numbers = []
    for text in chosen:
        if text in names:
            numbers.append(names.index(text))
        elif text.isascii() and text.isdecimal() and int(text) < len(names):
            numbers.append(int(text))
        else:
            raise InputError(
                f'no class {text!r}{suggest(text, names)}; a name or a number from 0 to {len(names) - 1}'
            )
    return list(dict.fromkeys(numbers))


def make_folder(path: str) -> None:
    """Makes a folder, and those above it; InputError if that is not possible."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise InputError(f'cannot make the folder {path}: {e.strerror or one_line(e)}') from e


class Places:
    """Where each picture's drawing goes: the picture's name with .png, in `out`.

    The pictures of a folder keep their subfolders; if several paths are given, they lie in a folder called
    as the one they come from. Of equal names the later ones get a number.
    """

    def __init__(self, images: Sequence[str], out: str):
        self._images, self._out = images, out
        self._names: list[str] = []
        taken = {TABLE}
        for path in images:
            name = wanted = base_name(path)
            for number in range(2, len(images) + 3):
                if name not in taken:
                    break
                name = '{0}-{2}{1}'.format(*os.path.splitext(wanted), number)
            taken.add(name)
            self._names.append(name)

    def of(self, file: ImageFile) -> str:
        """Returns the path of a picture's drawing."""
        name = self._names[file.argument]
        if os.path.isdir(self._images[file.argument]):
            name = file.below if len(self._images) == 1 else os.path.join(name, file.below)
        return os.path.join(self._out, f'{name}.png')


def base_name(path: str) -> str:
    """Returns a file's or folder's own name, also for '.' and 'x/'."""
    return os.path.basename(os.path.abspath(path)) or 'pictures'


class Tables:
    """The attention of each class of the folders given, averaged over its pictures.

    A class is a folder in a folder that was given, with all below it; pictures beside those count as the
    folder's own.
    """

    def __init__(self, images: Sequence[str]):
        self._classes = {i: base_name(path) for i, path in enumerate(images) if os.path.isdir(path)}
        self._sums: dict[str, tuple[int, dict[str, np.ndarray]]] = {}

    def add(self, file: ImageFile, attention: dict[str, np.ndarray]) -> None:
        """Counts a picture's attention, [blocks, S] for each stage, if it is of a folder."""
        if file.argument not in self._classes:
            return
        first, *below = file.below.split(os.sep)
        name = first if below else self._classes[file.argument]
        count, sums = self._sums.get(name, (0, {}))
        added = {stage: a.astype(np.float64) + sums.get(stage, 0) for stage, a in attention.items()}
        self._sums[name] = count + 1, added

    def means(self) -> dict[str, tuple[int, dict[str, np.ndarray]]]:
        """Returns for each class the number of pictures and, for each stage, [blocks, S]."""
        return {
            name: (count, {stage: total / count for stage, total in sums.items()})
            for name, (count, sums) in self._sums.items()
        }


def table(name: str, count: int, means: dict[str, np.ndarray], kernels: Sequence[str]) -> Iterator[str]:
    """Yields the lines of a class's table: a row a block, a column a kernel size."""
    yield f'{shown(name)}, {count} picture{"" if count == 1 else "s"}: attention to each kernel size'
    width = max(8, *map(len, kernels)) + 2
    yield f'  {"block":<10}' + ''.join(f'{kernel:>{width}}' for kernel in kernels) + '  most'
    for stage, rows in means.items():
        for block, row in enumerate(rows):
            values = ''.join(f'{value:>{width}.4f}' for value in row)
            yield f'  {f"{stage}.{block}":<10}{values}  {kernels[int(row.argmax())]}'


def write_tables(path: str, means: dict[str, tuple[int, dict[str, np.ndarray]]], model: EPSANet) -> None:
    """Writes all tables as one CSV: class, pictures, stage, block, branch (from 1), kernel, attention."""

    def write(temporary: str) -> None:
        with open(temporary, 'w', encoding='utf-8', errors='surrogateescape', newline='') as f:
            writer = csv.writer(f, lineterminator='\n')
            writer.writerow(('class', 'pictures', 'stage', 'block', 'branch', 'kernel', 'attention'))
            for name, (count, blocks) in means.items():
                for stage, rows in blocks.items():
                    for (block, branch), value in np.ndenumerate(rows):
                        kernel = model.kernels[branch]
                        writer.writerow((name, count, stage, block, branch + 1, kernel, f'{value:.6g}'))

    write_atomically(path, write)
