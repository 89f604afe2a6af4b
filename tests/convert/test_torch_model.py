"""The PyTorch twin: test_ladder.py compares its values with those of JAX."""

import numpy as np
import small
import torch

from epsanet_jax.convert.torch_model import EPSANet, FromPixels


def test_convolutions_are_initialised_as_in_the_reference():
    torch.manual_seed(0)
    weight = EPSANet(small.model()).conv1.weight
    assert abs(weight.std().item() / np.sqrt(2 / (7 * 7 * 64)) - 1) < 0.05


def test_network_without_classifier_returns_pooled_features(rng):
    twin = EPSANet(small.model(num_classes=0)).eval()
    images = torch.from_numpy(rng.standard_normal((2, 3, 32, 32)).astype(np.float32))
    with torch.no_grad():
        features = twin.features(images)
        assert torch.equal(twin(images), features['layer4'].mean(dim=(2, 3)))
    assert list(features) == ['stem', 'layer1', 'layer2', 'layer3', 'layer4']


def test_from_pixels_normalises_uint8_images(rng):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    pixels = rng.integers(0, 256, (2, 3, 4, 5), np.uint8)
    expected = (pixels / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    images = FromPixels(torch.nn.Identity(), mean, std)(torch.from_numpy(pixels))
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
