"""The command `epsanet predict`, and what it shares with `epsanet explain`."""

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from epsanet_jax.data.image_files import check_paths, find_images, skipped_lines
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.predict import Prediction, class_names, predict
from epsanet_jax.training import pretrained
from epsanet_jax.training.compilation import use_persistent_cache

_Row = TypeVar('_Row')


def command(
    checkpoint: str,
    images: Sequence[str],
    step: str,
    top: int,
    batch_size: int,
    kind: str,
    ema: bool = True,
) -> Iterator[str]:
    """Predicts and yields what to print, without line breaks at the ends.

    Args:
        checkpoint: workdir, Orbax checkpoint or weights file.
        images: files and folders.
        step: which checkpoint of a workdir.
        top: number of classes to name for each picture.
        batch_size: see `predict.predict`.
        kind: 'table', 'csv' or 'json', see `as_text`.
        ema: whether to take the moving averages where a run kept any.

    Raises:
        InputError: checkpoint or pictures are not there, or no picture could be decoded.
    """
    check_paths(images)  # at once, not after the weights have been read
    use_persistent_cache()
    weights = pretrained.load(checkpoint, step, ema)
    print_skipped(images)
    skipped = Skipped()
    predictions = predict(weights, images, top=top, batch_size=batch_size, on_bad=skipped)
    with contextlib.closing(predictions):
        yield from as_text(progress(skipped.counted(predictions), images), class_names(weights), kind)
    skipped.finish()


def as_text(predictions: Iterable[Prediction], names: Sequence[str], kind: str) -> Iterator[str]:
    """Yields predictions as text, as they come; nothing if there are none.

    Args:
        predictions: from `predict.predict`.
        names: of all classes.
        kind: 'table'; 'csv', with the columns image, rank (from 1), class, number and probability; or
            'json', a list of {'image': path, 'predictions': [{'class', 'number', 'probability'}, ...]}.
    """
    describe = {'table': _table, 'csv': _csv, 'json': _json}[kind]
    number = -1
    for number, prediction in enumerate(predictions):
        if kind == 'csv' and number == 0:
            yield 'image,rank,class,number,probability'
        mark = '' if kind != 'json' else ',' if number else '['
        yield mark + describe(prediction, names)
    if kind == 'json' and number >= 0:
        yield ']'


def _table(prediction: Prediction, names: Sequence[str]) -> str:
    chosen = [shown(names[int(i)]) for i in prediction.classes]
    width = max(map(len, chosen))
    rows = (
        f'  {100 * probability:6.2f} %  {name:<{width}}'.rstrip()
        for name, probability in zip(chosen, prediction.probabilities, strict=True)
    )
    return '\n'.join((shown(prediction.path), *rows))


def _csv(prediction: Prediction, names: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    for rank, (number, probability) in enumerate(_pairs(prediction), start=1):
        writer.writerow((prediction.path, rank, names[number], number, probability))
    return text.getvalue().removesuffix('\n')


def _json(prediction: Prediction, names: Sequence[str]) -> str:
    rows = [
        {'class': names[number], 'number': number, 'probability': probability}
        for number, probability in _pairs(prediction)
    ]
    return json.dumps({'image': prediction.path, 'predictions': rows})


def _pairs(prediction: Prediction) -> Iterator[tuple[int, float]]:
    """Yields class and probability, with the digits that float32 has."""
    for number, probability in zip(prediction.classes, prediction.probabilities, strict=True):
        yield int(number), float(f'{probability:.7g}')


def shown(text: str) -> str:
    """Returns a name for people: as it is, or quoted where it has characters that cannot be shown."""
    return text if text.isprintable() else repr(text)


def print_lines(lines: Iterable[str]) -> None:
    """Prints lines; characters that the terminal or the pipe cannot take are escaped."""
    reconfigure: Callable[..., None] | None = getattr(sys.stdout, 'reconfigure', None)
    if reconfigure is not None:
        reconfigure(errors='backslashreplace')
    for line in lines:
        print(line)


def progress(rows: Iterable[_Row], images: Sequence[str], without: str | None = None) -> Iterable[_Row]:
    """Returns the rows, with a progress bar if somebody can see it and no rows that are printed instead."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        return rows
    total = sum(1 for _ in find_images(images, without=without))
    return tqdm(rows, total=total, unit='picture', leave=False, disable=total < 2)


def print_skipped(images: Sequence[str], without: str | None = None) -> None:
    """Prints on stderr what is skipped in the folders given, one line for each."""
    for line in skipped_lines(images, without):
        print(shown(line), file=sys.stderr)


class Skipped:
    """Names bad pictures on stderr as they are met. The first one waits until there is anything else.

    If there is nothing else, it is the one line that says why nothing was done.
    """

    def __init__(self):
        self._bad, self._good, self._first = 0, 0, ''

    def __call__(self, message: str) -> None:
        """Notes a bad picture."""
        message = shown(one_line(message, limit=None))
        self._bad += 1
        if self._bad == 1 and not self._good:
            self._first = message
            return
        self._flush()
        tqdm.write(f'skipped: {message}', file=sys.stderr)

    def counted(self, rows: Iterable[_Row]) -> Iterator[_Row]:
        """Yields rows, each of which stands for a good picture."""
        for row in rows:
            self._good += 1
            self._flush()
            yield row

    def finish(self) -> None:
        """Says how many pictures were skipped.

        Raises:
            InputError: all of them.
        """
        if not self._good:
            raise InputError(self._first or f'none of the {self._bad} pictures can be decoded')
        if self._bad:
            print(f'skipped {self._bad} of {self._good + self._bad} pictures', file=sys.stderr)

    def _flush(self) -> None:
        if self._first:
            tqdm.write(f'skipped: {self._first}', file=sys.stderr)
        self._first = ''
