"""Writes docs/variants.md: size and cost of every model, next to the published figures.

python benchmarks/variants.py docs/variants.md
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from epsanet_jax.analysis.summary import summarize
from epsanet_jax.models import create_model, get_variant, list_models

HEADER = """# Models

Size and cost of every model, next to the published figures. `epsanet summary NAME` prints the same figures
for each stage.

All figures are for 1000 classes and one image of 224x224 px. Multiply-adds are those of convolutions and
linear layers; the paper's count adds 2 for each output value of BatchNorm. Activations are the float32
outputs of convolutions, BatchNorms and the classifier. Published figures come from the papers (arXiv
2105.14447; 2006.11538 for PyConv), with top-1 on ImageNet in percent; the accuracies have not been reproduced
here.

Written by `python benchmarks/variants.py docs/variants.md`.
"""
COLUMNS = (
    'model',
    'parameters, M',
    'published parameters, M',
    "paper's count, G",
    'published count, G',
    'multiply-adds, G',
    'activations, MiB',
    'published top-1, %',
)


def lines() -> Iterator[str]:
    """Yields the lines of the page."""
    yield HEADER
    yield f'| {" | ".join(COLUMNS)} |'
    yield f'|---|{"---:|" * (len(COLUMNS) - 1)}'
    for name in list_models():
        rows, variant = summarize(create_model(name)), get_variant(name)
        fields = ('params', 'published_count', 'multiply_adds', 'activation_bytes')
        params, published, multiply_adds, memory = (sum(getattr(row, f) for row in rows) for f in fields)
        cells = [
            f'`{name}`',
            f'{params / 1e6:.2f}',
            _shown(variant.published_params),
            f'{published / 1e9:.2f}',
            _shown(variant.published_flops),
            f'{multiply_adds / 1e9:.3f}',
            f'{memory / 2**20:.1f}',
            _shown(variant.published_top1),
        ]
        yield f'| {" | ".join(cells)} |'


def _shown(value: float | None) -> str:
    return '' if value is None else f'{value:.2f}'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('page', type=Path, help='file to write')
    parser.parse_args().page.write_text('\n'.join(lines()) + '\n')
