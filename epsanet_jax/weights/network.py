"""`Network`: a model with its weights and everything needed to use them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from epsanet_jax.convert.files import Checkpoint
from epsanet_jax.convert.state_dict import draw_classifier, to_jax_layout, to_torch
from epsanet_jax.data.classes import distinct
from epsanet_jax.data.preprocessing import Preprocessing
from epsanet_jax.errors import InputError
from epsanet_jax.models.epsanet import EPSANet


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the weights of a network come from.

    Attributes:
        path: file or folder of the weights; '' for weights made in memory.
        step: training step of the weights; 0 if they are not from a training run.
        averaged: whether the weights are the moving averages of a training run.
        metadata: everything stored with the weights, see `weights.metadata`.
        checkpoint: the same weights under PyTorch's names, with optimizer state and epoch; only with
            `load(..., with_checkpoint=True)`.
        no_optimizer: why `checkpoint` lacks the optimizer state of a training run; otherwise ''.
    """

    path: str = ''
    step: int = 0
    averaged: bool = False
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    no_optimizer: str = ''

    @property
    def config(self) -> dict[str, Any] | None:
        """The configuration of the training run, as nested dicts; None without a run."""
        return self.metadata.get('config')


@dataclasses.dataclass(frozen=True)
class Network:
    """A model with its weights and everything needed to use them.

    Attributes:
        model: the model; `model.apply(variables, images)` returns logits.
        variables: {'params', 'batch_stats'}.
        class_names: class names in the order of the logits, given as any sequence of strings or integers;
            empty if unknown.
        preprocessing: how to prepare images for the model.
        source: where the weights come from.
    """

    model: EPSANet
    variables: dict[str, Any]
    class_names: tuple[str, ...] = ()
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    source: Source = dataclasses.field(default_factory=Source)

    def __post_init__(self):
        # scikit-learn's LabelEncoder has an array of names or of integers.
        if wrong := [name for name in self.class_names if not isinstance(name, str | int | np.integer)]:
            raise InputError(f'class_names must be strings or integers, got {wrong[0]!r}')
        object.__setattr__(self, 'class_names', tuple(str(name) for name in self.class_names))

    @property
    def labels(self) -> list[str]:
        """A name for each output, all different: the class names or, if they are unknown, the numbers."""
        return distinct(self.class_names) or [str(i) for i in range(self.model.num_classes)]

    @property
    def state_dict(self) -> Mapping[str, Any]:
        """The weights under PyTorch's names: the original tensors if they were kept, otherwise converted."""
        return self.checkpoint.state_dict

    @property
    def checkpoint(self) -> Checkpoint:
        """The weights under PyTorch's names, with optimizer state and epoch if they were kept."""
        return self.source.checkpoint or Checkpoint(to_torch(self.variables, self.model))


def without_run(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns metadata without the configuration of the run, which may contain private paths."""
    return {**metadata, 'config': None, 'identity': None}


def with_new_classifier(network: Network, num_classes: int, key: jax.Array) -> Network:
    """Returns the network with a new random classifier, without the old class names and optimizer state."""
    model = network.model.clone(num_classes=num_classes)
    drawn = draw_classifier(model, key)
    fc = {'kernel': to_jax_layout(drawn['fc.weight']).copy(), 'bias': drawn['fc.bias']}
    variables = {**network.variables, 'params': {**network.variables['params'], 'fc': fc}}
    metadata = without_run(network.source.metadata)
    checkpoint = network.source.checkpoint
    if checkpoint is not None:
        checkpoint = Checkpoint({**checkpoint.state_dict, **drawn}, arch=checkpoint.arch)
    source = dataclasses.replace(network.source, metadata=metadata, checkpoint=checkpoint)
    return Network(model, variables, (), network.preprocessing, source)
