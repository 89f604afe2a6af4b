"""ONNX, by way of EPSANet in PyTorch."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from epsanet_jax.convert.state_dict import to_torch
from epsanet_jax.data.preprocessing import Preprocessing
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.models.epsanet import EPSANet

INPUT, OUTPUT = 'images', 'logits'


def to_onnx(
    model: EPSANet,
    variables: Mapping[str, Any],
    image_size: int,
    pixels: Preprocessing | None,
    metadata: Mapping[str, str],
) -> bytes:
    """Returns the content of an ONNX file: float32 images [batch, 3, H, W] to float32 logits, any batch.

    The network computes in float32, whatever the type of the JAX model's computation.

    Args:
        model: the network.
        variables: its parameters and statistics.
        image_size: H and W, pixels.
        pixels: if given, the file takes uint8 pictures instead and normalises them so.
        metadata: for the file's `metadata_props`.

    Raises:
        InputError: torch, onnx or onnxscript is not installed, or PyTorch cannot export the network.
    """
    torch, onnx, _ = (require(name) for name in ('torch', 'onnx', 'onnxscript'))
    from epsanet_jax.convert import torch_model

    model = model.clone(dtype=jnp.float32, param_dtype=jnp.float32)
    arrays = {
        k: np.array(v, np.float32 if v.ndim else v.dtype) for k, v in to_torch(variables, model).items()
    }
    network = torch_model.EPSANet(model)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    if pixels is not None:
        network = torch_model.FromPixels(network, pixels.mean, pixels.std)
    # Two, because PyTorch takes a batch of one for a constant.
    example = torch.zeros(
        2, model.in_channels, image_size, image_size, dtype=torch.float32 if pixels is None else torch.uint8
    )
    with _quiet():
        try:
            program = torch.onnx.export(
                network.eval(),
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim('batch', min=1)},),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as e:
            raise InputError(f'PyTorch cannot export this network to ONNX: {one_line(e)}') from e
    content = program.model_proto
    _forget_where_it_was_made(content)
    onnx.helper.set_model_props(content, dict(metadata))
    onnx.checker.check_model(content)
    return content.SerializeToString()


def run_onnx(content: bytes, images: np.ndarray) -> np.ndarray:
    """Runs an ONNX file on images [N, 3, H, W], on the CPU, by onnxruntime, and returns the logits.

    Raises:
        InputError: onnxruntime is not installed.
    """
    runtime = require('onnxruntime')
    session = runtime.InferenceSession(content, providers=['CPUExecutionProvider'])
    return session.run([OUTPUT], {INPUT: images})[0]


def require(name: str) -> Any:
    """Imports a package that is not everybody's; InputError says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise InputError(f"ONNX needs {name}: pip install 'epsanet_jax[onnx]'") from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what nobody who exports can mend."""
    logger = logging.getLogger('torch.onnx._internal.exporter._registration')
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of torchvision, which is not needed
    try:
        with warnings.catch_warnings():
            # PyTorch's own use of what PyTorch deprecates.
            text = r'`isinstance\(treespec, LeafSpec\)` is deprecated'
            warnings.filterwarnings('ignore', text, FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _forget_where_it_was_made(content: Any) -> None:
    """Takes stack traces out of a graph: they name folders of this machine, and take a lot of room."""
    graph = content.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ''
    del graph.metadata_props[:], content.functions[:]
