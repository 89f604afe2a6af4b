"""Grad-CAM and attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch

from epsanet_jax import InputError, create_model
from epsanet_jax.analysis.explain import attention, explain, find_classes, grad_cam, kernel_labels
from epsanet_jax.convert import to_torch, torch_model
from epsanet_jax.data.augment import normalize
from epsanet_jax.weights.network import Network

TWO_STAGES = {'layers': (2, 1), 'planes': (8, 16)}
NET = small.model(**TWO_STAGES, dtype=jnp.float64, param_dtype=jnp.float64)
VARIABLES = small.random_variables(NET)


@pytest.fixture(scope='module')
def images():
    return small.images(np.random.default_rng(1), n=2, size=48)


@pytest.fixture(scope='module')
def twin():
    net = torch_model.EPSANet(NET).double().eval()
    net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in to_torch(VARIABLES, NET).items()})
    return net


def theirs_of(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


CLASSES = np.array([5, 2], np.int32)


@pytest.fixture(scope='module')
def ours(images):
    """Grad-CAM of every stage, attention and features, from one compiled function."""

    @jax.jit
    def compute(variables, images, classes):
        maps = {
            stage: tuple(grad_cam(NET, variables, images, classes, stage, up) for up in (False, True))
            for stage in ('stem', 'layer1', 'layer2')
        }
        features = NET.apply(variables, images, method='features')
        return maps, attention(NET, variables, images), features

    with jax.numpy_dtype_promotion('strict'):
        return compute(VARIABLES, images, CLASSES)


def gradients_of(twin, images, classes):
    """Returns PyTorch's activations at the stem and each stage, with the gradients of the classes' logits."""
    seen = {}

    def keep(name, activation):
        activation.retain_grad()
        seen[name] = activation

    handles = [
        twin.layer1.register_forward_pre_hook(lambda m, inputs: keep('stem', inputs[0])),
        *(
            twin.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: keep(name, out))
            for name in ('layer1', 'layer2')
        ),
    ]
    logits = twin(theirs_of(images))
    for handle in handles:
        handle.remove()
    logits[range(len(classes)), classes].sum().backward()
    return seen


@pytest.mark.slow
def test_grad_cam_equals_pytorch_at_every_stage(images, twin, ours):
    maps, _, features = ours
    for stage, a in gradients_of(twin, images, CLASSES.tolist()).items():
        weights = a.grad.mean(dim=(2, 3), keepdim=True)
        expected = torch.relu((weights * a).sum(dim=1, keepdim=True)).detach()
        large = torch.nn.functional.interpolate(expected, (48, 48), mode='bilinear', align_corners=False)
        largest = float(expected.max())
        assert largest > 0
        for one, other in zip(maps[stage], (expected, large), strict=True):
            np.testing.assert_allclose(one, other[:, 0].numpy(), rtol=0, atol=1e-10 * largest)

    # At the last stage it equals the class activation map (CAM, Zhou et al., 2016).
    a = np.asarray(features['layer2'])
    kernel = VARIABLES['params']['fc']['kernel'][:, CLASSES]  # [C, N]
    cam = np.maximum(np.einsum('nhwc,cn->nhw', a, kernel), 0) / (a.shape[1] * a.shape[2])
    np.testing.assert_allclose(maps['layer2'][0], cam, rtol=1e-9, atol=1e-12)


def test_attention_equals_the_formula_of_the_paper_in_pytorch(images, twin, ours):
    _, found, _ = ours
    assert {k: v.shape for k, v in found.items()} == {
        'layer1': (2, 2, 4, 2),
        'layer2': (2, 1, 4, 4),
    }
    for stage, weights in found.items():
        for number, block in enumerate(twin.get_submodule(stage)):
            seen = []
            handle = block.conv2.register_forward_pre_hook(lambda m, inputs, seen=seen: seen.extend(inputs))
            with torch.no_grad():
                twin(theirs_of(images))
                handle.remove()
                gates = []
                for i in range(4):
                    z = block.conv2.get_submodule(f'conv_{i + 1}')(seen[0]).mean(dim=(2, 3), keepdim=True)
                    gates.append(torch.sigmoid(block.conv2.se.fc2(torch.relu(block.conv2.se.fc1(z)))))
                gates = torch.stack(gates, dim=1)[..., 0, 0]  # [N, S, C]
                expected = gates.exp() / gates.exp().sum(dim=1, keepdim=True)
            np.testing.assert_allclose(weights[:, number], expected.numpy(), rtol=1e-10)


def test_grad_cam_in_bfloat16_is_close_to_float32(images):
    def found(dtype):
        net = small.model(**small.ONE_BLOCK, dtype=dtype)
        variables = small.random_variables(net, dtype=np.float32)
        return jax.jit(lambda x: grad_cam(net, variables, x, 4, 'layer1'))(images)

    expected, half = found(jnp.float32), found(jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert np.abs(half - expected).max() < 0.1 * expected.max()


def test_missing_stages_and_attention_are_errors(images):
    with pytest.raises(InputError, match="no stage 'layer5' .*; stages: stem, layer1"):
        grad_cam(NET, VARIABLES, images, 0, 'layer5')
    with pytest.raises(InputError, match="no stage 'layer3'.*; stages: stem, layer1, layer2"):
        NET.apply(VARIABLES, images, 'layer3', method='logits_from')
    resnet = create_model('resnet50')
    with pytest.raises(InputError, match='no attention'):
        attention(resnet, {}, images)
    large = ['3x3', '5x5', '5x5 (2nd)', '7x7']
    assert kernel_labels(create_model('epsanet50_large')) == {f'layer{i}': large for i in (1, 2, 3, 4)}
    assert kernel_labels(resnet) == kernel_labels(create_model('pyconvresnet50')) == {}


def test_attention_over_any_number_of_branches_and_grad_cam_without_attention(images):
    net = small.model(**small.PER_STAGE, planes=(8, 12, 16, 32))
    found = jax.jit(lambda v, x: attention(net, v, x))(small.random_variables(net, dtype=np.float32), images)
    assert [found[f'layer{i}'].shape[1:] for i in (1, 2, 3, 4)] == [
        (2, 4, 2),
        (1, 3, 4),
        (1, 2, 8),
        (1, 1, 32),
    ]
    np.testing.assert_allclose(found['layer2'].sum(axis=2), 1, rtol=1e-5)
    np.testing.assert_array_equal(found['layer4'], 1)
    labels = {'layer1': ['3x3', '5x5', '7x7', '9x9'], 'layer2': ['3x3', '5x5', '7x7']}
    assert kernel_labels(net) == {**labels, 'layer3': ['3x3', '5x5'], 'layer4': ['3x3']}

    net = small.pyconv()
    variables = small.random_variables(net, dtype=np.float32)
    with pytest.raises(InputError, match="middle='pyconv' has no attention: use an EPSANet"):
        attention(net, variables, images)
    cam = jax.jit(lambda v, x: grad_cam(net, v, x, 0, 'layer2'))(variables, images)
    assert cam.shape == images.shape[:3]
    assert cam.max() > 0


def test_classes_are_found_by_name_and_then_by_number():
    assert find_classes(['4', '1', 'bee', '$x$'], small.NAMES) == [3, 1, 4]  # '4' is the name of class 3
    for text in ('7', '-1', 'be'):
        with pytest.raises(InputError, match=f"no class '{text}'.*; give a name or a number from 0 to 6"):
            find_classes([text], small.NAMES)


def test_explain_yields_grad_cam_and_attention_of_the_top_class(image_folder):
    net = small.model(**small.ONE_BLOCK)
    network = Network(net, small.random_variables(net, dtype=np.float32), small.NAMES, small.PREPROCESSING)
    ((file, found),) = explain(network, [str(image_folder / 'a.png')], batch_size=1)
    assert (file.below, found.name, list(found.names)) == ('a.png', 'a.png', list(small.NAMES))
    assert found.image.shape == (32, 32, 3)
    assert list(found.classes) == [found.probabilities.argmax()]
    pixels = normalize(found.image[None], network.preprocessing.mean, network.preprocessing.std)
    expected = jax.jit(lambda v, x: grad_cam(net, v, x, found.classes, 'layer1'))(network.variables, pixels)
    np.testing.assert_allclose(found.cams['layer1'], expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.attention['layer1'].sum(axis=1), 1, rtol=1e-5)
    assert found.kernels == {'layer1': ['3x3', '5x5', '7x7', '9x9']}


def test_network_without_a_classifier_cannot_be_explained():
    net = small.model(**{**small.ONE_BLOCK, 'num_classes': 0})
    with pytest.raises(InputError, match='the network has no classifier to explain'):
        next(explain(Network(net, {}), ['x.png']))
