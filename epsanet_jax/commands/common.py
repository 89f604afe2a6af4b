"""Arguments, progress and output that several commands share."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from epsanet_jax.errors import InputError, one_line

if TYPE_CHECKING:
    from epsanet_jax.weights import Network

_Row = TypeVar('_Row')


def positive(text: str) -> int:
    """Returns a positive integer; a type for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'expected a positive integer, got {text!r}')
    return value


def add_batch_size(parser: argparse.ArgumentParser, default: int) -> None:
    """Adds --batch-size."""
    text = f'images per batch (default: {default})'
    parser.add_argument('--batch-size', type=positive, default=default, metavar='N', help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json."""
    parser.add_argument('--json', action='store_true', help='print JSON')


def add_on_bad(parser: argparse.ArgumentParser) -> None:
    """Adds --on-bad."""
    text = 'what to do at an image that cannot be decoded (default: stop)'
    parser.add_argument('--on-bad', choices=('stop', 'skip'), default='stop', help=text)


def add_label_column(parser: argparse.ArgumentParser) -> None:
    """Adds --label-column."""
    text = 'column or key of the labels in parquet, CSV and JSON (default: a usual name, such as label)'
    parser.add_argument('--label-column', metavar='NAME', help=text)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Adds --overwrite."""
    parser.add_argument('--overwrite', action='store_true', help='replace existing files')


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds the argument IMAGE ..."""
    text = (
        'an image, a folder of images, or a file that holds or lists them (parquet, WebDataset, CSV, JSONL)'
    )
    parser.add_argument('images', metavar='IMAGE', nargs='+', help=text)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the argument CHECKPOINT and the choice of weights in it."""
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a workdir, a checkpoint, or a weights file')
    add_choice_of_weights(parser)


def add_choice_of_weights(parser: argparse.ArgumentParser) -> None:
    """Adds --step, --no-ema and --ignore."""
    text = "step of a workdir: 'latest' (default), 'best' or a number"
    parser.add_argument('--step', default='latest', help=text)
    parser.add_argument('--no-ema', action='store_true', help='use the weights, not their moving averages')
    text = 'leave out the entries of a file whose names contain REGEX'
    parser.add_argument('--ignore', default='', metavar='REGEX', help=text)


def load_network(args: argparse.Namespace) -> 'Network':
    """Loads CHECKPOINT and prints on stderr what was taken from a file of another program."""
    from epsanet_jax.weights import load

    network = load(args.checkpoint, args.step, ema=not args.no_ema, ignore=args.ignore)
    for note in network.source.notes:
        report_on(args.checkpoint)(note)
    return network


def report_on(path: str) -> Callable[[str], None]:
    """Returns a function that prints a line on a file on stderr."""
    return lambda note: to_stderr(shown(f'{path}: {note}'))


def use_persistent_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR or ~/.cache/epsanet_jax/xla, to start faster."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser('~/.cache/epsanet_jax/xla'))


def to_stderr(line: str) -> None:
    """Prints a line on stderr."""
    print(line, file=sys.stderr)


def shown(text: str) -> str:
    """Returns a name to print, in quotes and escaped if it has characters that cannot be printed."""
    return text if text.isprintable() else repr(text)


def print_lines(lines: Iterable[str]) -> None:
    """Prints lines, with escapes for characters that stdout cannot encode."""
    reconfigure: Callable[..., None] | None = getattr(sys.stdout, 'reconfigure', None)
    if reconfigure is not None:
        reconfigure(errors='backslashreplace')
    for line in lines:
        print(line)


def print_skipped(images: Sequence[str], without: str | None = None) -> None:
    """Prints on stderr what is skipped in the given folders, one line per folder."""
    from epsanet_jax.data.image_files import skipped_lines

    for line in skipped_lines(images, without):
        to_stderr(shown(line))


def progress(rows: Iterable[_Row], images: Sequence[str], without: str | None = None) -> Iterable[_Row]:
    """Returns the rows, with a progress bar if stderr is a terminal and stdout, which shows rows, is not."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        return rows
    from tqdm import tqdm

    from epsanet_jax.data.image_files import find_images

    total = sum(1 for _ in find_images(images, without=without))
    return tqdm(rows, total=total, unit='image', leave=False, disable=total < 2)


class Skipped:
    """Reports images that cannot be decoded on stderr.

    The first report waits for the next image. If there is none, it becomes the error of the command.
    """

    def __init__(self):
        self._bad, self._good, self._first = 0, 0, ''

    def __call__(self, message: str) -> None:
        """Counts and reports an image that cannot be decoded."""
        message = shown(one_line(message, limit=None))
        self._bad += 1
        if self._bad == 1 and not self._good:
            self._first = message
        else:
            self._report(message)

    def counted(self, rows: Iterable[_Row]) -> Iterator[_Row]:
        """Yields rows and counts each as an image that was decoded."""
        for row in rows:
            self._good += 1
            self._report()
            yield row

    def finish(self) -> None:
        """Reports how many images were skipped.

        Raises:
            InputError: all images were skipped.
        """
        if not self._good:
            raise InputError(self._first or f'none of the {self._bad} images can be decoded')
        if self._bad:
            to_stderr(f'skipped {self._bad} of {self._good + self._bad} images')

    def _report(self, *messages: str) -> None:
        from tqdm import tqdm

        for message in filter(None, (self._first, *messages)):
            tqdm.write(f'skipped: {message}', file=sys.stderr)
        self._first = ''
