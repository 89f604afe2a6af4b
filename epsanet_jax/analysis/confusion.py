"""Confusion matrices: accuracy and precision of each class, as a table, a CSV file or a figure."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from epsanet_jax.analysis.drawing import shorten
from epsanet_jax.errors import InputError
from epsanet_jax.paths import write_atomically

SUFFIXES = ('.csv', '.png', '.svg', '.pdf')
_MOST_NUMBERS, _MOST_NAMES = 20, 60  # classes with which numbers and names can be read in the figure


def per_class(confusion: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each class.

    Args:
        confusion: [K, K], the number of images of class i with the prediction j at [i, j].
        names: [K], names of the classes.

    Returns:
        'class', 'images', 'accuracy' (share of the images of the class that are predicted as it, also called
        recall; None without images), 'precision' (share of the predictions of the class that are correct;
        None without predictions), 'confused_with' (the most frequent wrong prediction; None if there is
        none) and 'confused' (its number of images).
    """
    images, predictions, hits = confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal()
    wrong = confusion - np.diag(hits)
    rows = []
    for i, name in enumerate(names):
        other = int(wrong[i].argmax())
        count = int(wrong[i, other])
        rows.append(
            {
                'class': name,
                'images': int(images[i]),
                'accuracy': float(hits[i] / images[i]) if images[i] else None,
                'precision': float(hits[i] / predictions[i]) if predictions[i] else None,
                'confused_with': names[other] if count else None,
                'confused': count,
            }
        )
    return rows


def check_suffix(path: str) -> None:
    """Raises InputError if `write` does not know the suffix."""
    if not path.lower().endswith(SUFFIXES):
        raise InputError(f'--confusion must end with {", ".join(SUFFIXES)}, got {path}')


def write(path: str, confusion: np.ndarray, names: Sequence[str]) -> None:
    """Writes a confusion matrix: as numbers to a .csv file, else as a figure; an existing file is replaced.

    The first row of the CSV file holds the names of the predicted classes, the first column those of the
    images' classes.

    Raises:
        InputError: the suffix is unknown, or the file cannot be written.
    """
    check_suffix(path)
    kind = Path(path).suffix[1:].lower()
    if kind == 'csv':
        text = io.StringIO()
        rows = [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)]
        csv.writer(text, lineterminator='\n').writerows([['class', *names], *rows])
        write_atomically(path, lambda temporary: Path(temporary).write_text(text.getvalue(), 'utf-8'))
    else:
        figure = draw(confusion, names)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format=kind))


def draw(confusion: np.ndarray, names: Sequence[str]) -> Figure:
    """Draws the share of the images of each class (row) that get each prediction (column)."""
    images = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(images, 1)
    side = min(16.0, 3.0 + 0.3 * len(names))
    figure = Figure(figsize=(side + 1, side), layout='constrained')
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1, interpolation='nearest')
    figure.colorbar(drawn, ax=axes, shrink=0.8, label='share of the images of the class')
    axes.set(xlabel='predicted class', ylabel='class')
    if len(names) <= _MOST_NAMES:
        for axis, rotation in ((axes.xaxis, 90), (axes.yaxis, 0)):
            axis.set_ticks(range(len(names)))
            axis.set_ticklabels([shorten(name) for name in names], rotation=rotation, parse_math=False)
    if len(names) <= _MOST_NUMBERS:
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                colour = 'white' if shares[i, j] > 0.5 else 'black'
                axes.text(j, i, str(count), ha='center', va='center', fontsize=8, color=colour)
    return figure
