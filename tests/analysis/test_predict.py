"""Predictions for image files."""

import dataclasses
import itertools
import os

import jax
import numpy as np
import pytest
import small
import torch
from PIL import Image

from epsanet_jax import InputError, load
from epsanet_jax.analysis import predict as module
from epsanet_jax.analysis.predict import predict
from epsanet_jax.convert import to_torch, torch_model
from epsanet_jax.data import image_files
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.transforms import CentreCrop
from epsanet_jax.training import inputs, sharding, steps
from epsanet_jax.training.config import DataConfig

NET = small.model(**small.ONE_BLOCK)
VARIABLES = small.random_variables(NET, dtype=np.float32)
DATA = DataConfig(image_size=32, resize_size=40, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'orbax'
    return load(str(small.save(path, VARIABLES, preprocessing=DATA.preprocessing, **small.ONE_BLOCK)))


def test_logits_equal_those_of_the_evaluation_step_and_of_pytorch(network, image_folder, tmp_path):
    predictions = list(predict(network, [str(image_folder)], top=3))
    assert [os.path.basename(p.path) for p in predictions] == [
        'a.png',
        'b, "c".png',
        'ü.JPG',
        'd.webp',
        'e.png',
    ]
    first = predictions[0]
    assert (first.classes.shape, first.logits.shape) == ((3,), (7,))
    expected = np.exp(first.logits) / np.exp(first.logits).sum()
    np.testing.assert_array_equal(first.classes, np.argsort(-expected)[:3])
    np.testing.assert_allclose(first.probabilities, np.sort(expected)[:-4:-1], rtol=1e-5)

    (tmp_path / 'class').mkdir()
    (tmp_path / 'class/a.png').write_bytes((image_folder / 'a.png').read_bytes())
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    eval_step = steps.make_eval_step(NET, mesh, smoothing=0.0, mean=DATA.mean, std=DATA.std)
    batch = next(inputs.eval_batches(DATA, ImageFolder(tmp_path), 1))
    losses = []
    for label in range(7):
        labelled = {'image': batch['image'], 'label': np.int32([label]), 'mask': batch['mask']}
        losses.append(float(eval_step(VARIABLES, sharding.to_devices(labelled, mesh))['loss']))
    np.testing.assert_allclose(-np.array(losses), np.log(expected), rtol=1e-4)

    twin = torch_model.EPSANet(NET).eval()
    twin.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in to_torch(VARIABLES, NET).items()})
    image = Image.open(image_folder / 'a.png').resize((60, 40), Image.Resampling.BILINEAR)
    pixels = np.asarray(image.crop((14, 4, 46, 36))) / 255
    normalised = torch.from_numpy((pixels - DATA.mean) / DATA.std).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        theirs = twin(normalised).numpy()[0]
    assert np.abs(first.logits - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_all_batches_have_one_shape_and_all_classes_are_at_most_the_top(network, image_folder):
    shapes = []

    def step(variables, images):
        shapes.append(images.shape)
        return network.model.apply(variables, images), ()

    rows = list(module.run(step, network, [str(image_folder)], 2, image_files.stop_at_bad))
    assert (len(rows), shapes) == (5, [(2, 32, 32, 3)])
    predictions = list(predict(network, [str(image_folder)], top=99))
    for (_, _, logits, _), prediction in zip(rows, predictions, strict=True):
        assert sorted(prediction.classes) == list(range(7))
        probabilities = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(
            prediction.probabilities, probabilities[prediction.classes], rtol=1e-4, atol=1e-6
        )


def test_images_are_read_at_most_a_few_batches_ahead(image_folder):
    endless = itertools.count()
    taken = (image_files.ImageFile(str(image_folder / 'a.png'), 0, str(i)) for i in endless)
    batches = image_files.read_batches(taken, CentreCrop(32, 32), 4, threads=2)
    for number in range(1, 4):
        batch, images = next(batches)
        assert ([file.below for file in batch], images.shape) == (
            [str(i) for i in range(4 * number - 4, 4 * number)],
            (4, 32, 32, 3),
        )
    batches.close()
    assert next(endless) <= 12 + 4 + 2 + 2


def test_image_that_cannot_be_decoded_stops_by_default(network, tmp_path):
    (tmp_path / 'broken.jpg').write_bytes(b'\xff\xd8\xff')
    with pytest.raises(BadImageError, match=r'broken\.jpg: cannot decode'):
        list(predict(network, [str(tmp_path)]))


def test_invalid_arguments_and_damaged_weights_are_refused(network, image_folder):
    damaged = jax.tree.map(lambda a: a * np.nan, network.variables)
    with pytest.raises(InputError, match='the logits are not finite'):
        list(predict(dataclasses.replace(network, variables=damaged), [str(image_folder)]))
    with pytest.raises(InputError, match="paths must be a list of paths, got 'a.jpg'"):
        list(predict(network, 'a.jpg'))
    for option in ('top', 'batch_size'):
        with pytest.raises(InputError, match=f'{option} must be at least 1, got 0'):
            list(predict(network, [str(image_folder)], **{option: 0}))
