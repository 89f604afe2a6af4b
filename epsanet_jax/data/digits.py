"""Handwritten digits as a TFDS data set: real pictures that need no network.

The 1,797 pictures are scikit-learn's copy of the test set of the UCI "Optical Recognition of Handwritten
Digits" data set (E. Alpaydin, C. Kaynak, 1998): 8x8 pixels, 17 shades, enlarged here to 32x32.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from epsanet_jax.errors import InputError

SIZE = 32
HELD_OUT = 5  # every fifth picture, 360 of 1,797, is in the split 'test'


class Digits(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set 'digits', splits 'train' (1,437 pictures) and 'test' (360).

    Pictures are yielded as encoded PNG files, which lets TFDS write ArrayRecord without TensorFlow.
    """

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="scikit-learn's handwritten digits, enlarged to 32x32",
            homepage='https://doi.org/10.24432/C50P49',
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format='png'),
                    'label': tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=('image', 'label'),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {'train': self._generate_examples(False), 'test': self._generate_examples(True)}

    def _generate_examples(self, held_out: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            if (i % HELD_OUT == 0) == held_out:
                small = Image.fromarray((pixels * (255 / 16)).astype('uint8'))
                png = io.BytesIO()
                small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert('RGB').save(png, 'PNG')
                png.seek(0)
                yield i, {'image': png, 'label': int(label)}


def prepare(data_dir: str | None = None) -> None:
    """Writes the data set below `data_dir` (None: TFDS's own default) unless it is there; takes seconds."""
    tfds.disable_progress_bar()
    try:
        builder = Digits(data_dir=data_dir, file_format='array_record')
        # TFDS prints a paragraph on a download of "Unknown size".
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError as e:
        raise InputError(
            f'cannot prepare the digits in {data_dir or "the default folder of TFDS"}: {e}'
        ) from e
