"""The drawings of `epsanet explain`."""

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from epsanet_jax import InputError
from epsanet_jax.analysis import drawing
from epsanet_jax.analysis.explain import Explanation


def explanation(rng, **changes):
    values = {
        'name': 'cat.png',
        'image': rng.integers(0, 256, (32, 32, 3), np.uint8),
        'names': ['ant', 'bee', '$x$', 'a name that is longer than the space for it'],
        'probabilities': np.array([0.1, 0.2, 0.3, 0.4]),
        'classes': np.array([3, 2]),
        'cams': {'stem': np.zeros((2, 32, 32)), 'layer1': rng.random((2, 32, 32))},
        'attention': {'layer1': np.full((3, 4), 0.25)},
        'kernels': {'layer1': ['3x3', '5x5', '7x7', '9x9']},
    }
    return Explanation(**{**values, **changes})


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def test_drawing_names_classes_stages_and_kernels(rng, tmp_path):
    figure = drawing.draw(explanation(rng))
    found = texts(figure)
    for text in ('cat.png', 'top classes', '$x$, 30.0 %\nGrad-CAM at layer1', 'kernel 9x9', 'layer1, block'):
        assert text in found
    assert '$x$, 30.0 %\nGrad-CAM at stem (all 0)' in found
    drawing.save(figure, str(tmp_path / 'x.png'))
    with Image.open(tmp_path / 'x.png') as image:
        assert image.format == 'PNG'
        assert min(image.size) > 500
    with pytest.raises(InputError, match='cannot write'):
        drawing.save(figure, str(tmp_path / 'x.png/y.png'))


def test_drawing_without_attention_has_no_bars(rng):
    found = texts(drawing.draw(explanation(rng, attention={}, kernels={})))
    assert 'top classes' in found
    assert 'mean attention' not in found


def test_stages_may_have_different_branches(rng):
    attention = {'layer1': np.full((3, 4), 0.25), 'layer2': np.full((2, 2), 0.5), 'layer3': np.ones((1, 1))}
    kernels = {'layer1': ['3x3', '5x5', '7x7', '9x9'], 'layer2': ['5x5', '11x11'], 'layer3': ['3x3']}
    found = texts(drawing.draw(explanation(rng, attention=attention, kernels=kernels)))
    assert [t for t in found if t.startswith('kernel ')] == [f'kernel {k}x{k}' for k in (3, 5, 7, 9, 11)]
    assert any(text.endswith('line: equal share, 0.25, 0.5, 1') for text in found)


def test_long_names_lose_their_end_or_their_middle():
    assert drawing.shorten('short') == 'short'
    assert drawing.shorten('0123456789', 5) == '0123…'
    assert drawing.shorten('0123456789', 5, middle=True) == '01…89'
    assert drawing.shorten('a\nb') == repr('a\nb')
