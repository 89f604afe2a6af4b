"""Handwritten digits as a TFDS dataset: real images without a download.

The 1,797 images are scikit-learn's copy of the test set of the UCI dataset "Optical Recognition of
Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998): 8x8 pixels with 17 gray levels, enlarged here to 32x32.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from epsanet_jax.errors import InputError

SIZE = 32
TEST_EVERY = 5  # every fifth image, 360 of 1,797, is in the split 'test'


class Digits(tfds.core.GeneratorBasedBuilder):
    """Builder of the dataset 'digits' with the splits 'train' (1,437 images) and 'test' (360 images).

    The examples are encoded PNG files, because TFDS can write those to ArrayRecord without TensorFlow.
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

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            if (i % TEST_EVERY == 0) == test:
                small = Image.fromarray((pixels * (255 / 16)).astype('uint8'))
                png = io.BytesIO()
                small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert('RGB').save(png, 'PNG')
                png.seek(0)
                yield i, {'image': png, 'label': int(label)}


def prepare(data_dir: str | None = None) -> None:
    """Writes the dataset to the folder `data_dir` (None: the default of TFDS), unless it exists there.

    Several processes may do this at the same time.
    """
    tfds.disable_progress_bar()
    try:
        builder = Digits(data_dir=data_dir, file_format='array_record')
        # TFDS prints several lines about a download of "Unknown size".
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                builder.download_and_prepare()
            except OSError:  # TFDS renames a temporary folder; another process may have been faster
                if not builder.data_path.exists():
                    raise
    except OSError as e:
        folder = data_dir or 'the default folder of TFDS'
        raise InputError(f'cannot prepare the digits in {folder}: {e}') from e
