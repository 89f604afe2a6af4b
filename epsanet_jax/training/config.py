"""The configuration of a run: its fields and their defaults, the reference's recipe.

0, '' and () stand for "not set" where a field has a derived default: a command line can then set any field.
"""

import dataclasses
from typing import Any

from epsanet_jax.data.augment import Mixing
from epsanet_jax.data.preprocessing import Preprocessing
from epsanet_jax.models import ModelConfig


@dataclasses.dataclass(slots=True)
class DataConfig:
    """The pictures.

    Attributes:
        source: 'folder' (an image folder), 'records' (what `epsanet prepare` makes of one), 'tfds' (a TFDS
            data set, among them 'digits') or 'synthetic'.
        name: of the TFDS data set.
        dir: the folder that holds the splits' folders or the records, or TFDS's data directory ('': its
            default).
        train_split: folder or TFDS split to train on.
        eval_split: folder or TFDS split to evaluate on.
        image_size: height and width that the network sees, pixels.
        eval_image_size: the same in evaluation and use; 0: `image_size`.
        resize_size: shorter side before the centre crop of evaluation, pixels.
        crop_scale: share of a picture's area that a training crop takes, smallest and largest.
        crop_ratio: width / height of a training crop, smallest and largest.
        flip: whether training mirrors every second picture.
        color_jitter: brightness, contrast, saturation and hue, as torchvision's ColorJitter.
        randaugment_ops: RandAugment's operations on each picture; 0: none.
        randaugment_magnitude: their strength, 0 to 30.
        random_erasing: share of the pictures of which a rectangle is erased, to the mean colour.
        reduced_decoding: decode a large JPEG for training only as large as its crop needs; much faster, and
            not the same pixels.
        mean: per channel, of values in 0..1.
        std: per channel, of values in 0..1.
        exif_orientation: whether to turn pictures as their EXIF tag says; torchvision's ImageFolder does not.
        workers: processes that decode; 0: threads of this process; -1: one for every 8 processors, above 8.
        threads: that decode, in this process or each worker; 0: as many as there are processors for it.
        on_bad: 'stop' or 'skip' at a picture that cannot be decoded.
        max_bad_images: how many different pictures a process may skip before the run stops after all.
        synthetic_examples: number of synthetic pictures to train on (and to evaluate on).
        synthetic_classes: number of their classes.
    """

    source: str = 'folder'
    name: str = ''
    dir: str = ''
    train_split: str = 'train'
    eval_split: str = 'val'
    image_size: int = 224
    eval_image_size: int = 0
    resize_size: int = 256
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    random_erasing: float = 0.0
    reduced_decoding: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    exif_orientation: bool = True
    workers: int = -1
    threads: int = 0
    on_bad: str = 'stop'
    max_bad_images: int = 100
    synthetic_examples: int = 1280
    synthetic_classes: int = 10

    @property
    def size_in_use(self) -> int:
        """Height and width in evaluation and use, pixels."""
        return self.eval_image_size or self.image_size

    @property
    def preprocessing(self) -> Preprocessing:
        """What images go through before the network, in evaluation and use."""
        return Preprocessing(
            self.size_in_use, self.resize_size, tuple(self.mean), tuple(self.std), self.exif_orientation
        )


@dataclasses.dataclass(slots=True)
class OptimizerConfig:
    """The optimizer, see `training.optimizer.make_optimizer`.

    Attributes:
        lr: the schedule's peak.
        momentum: of SGD and LARS.
        nesterov: Nesterov's variant of it.
        weight_decay: coupled with SGD and LARS, decoupled with AdamW and LAMB.
        name: 'sgd', 'adamw', 'lamb' or 'lars'.
        lr_batch: batch size that `lr` is meant for, which is scaled linearly to `batch_size`; 0: not scaled.
        b1: of AdamW and LAMB: decay of the gradient's mean.
        b2: likewise, of its square's mean.
        eps: likewise, added to the root of that.
        trust_coefficient: of LARS.
        decay_norm_and_bias: whether weight decay (and LARS's trust ratio) are for BatchNorm's parameters and
            biases too.
        clip_norm: largest norm of the whole gradient; larger ones are scaled down. 0: any.
    """

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    name: str = 'sgd'
    lr_batch: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    trust_coefficient: float = 0.001
    decay_norm_and_bias: bool = True
    clip_norm: float = 0.0


@dataclasses.dataclass(slots=True)
class ScheduleConfig:
    """The learning rate over time, see `training.optimizer.make_schedule`."""

    name: str = 'step'
    warmup_epochs: float = 0.0
    step_epochs: float = 30.0
    step_factor: float = 0.1
    end_factor: float = 0.0


@dataclasses.dataclass(slots=True)
class CheckpointConfig:
    """When to save, besides after every evaluation and at the end, and what to keep besides the best.

    Attributes:
        every_steps: 0: never by count.
        every_minutes: 0: never by time.
        keep: how many of the latest checkpoints to keep.
    """

    every_steps: int = 0
    every_minutes: float = 10.0
    keep: int = 2


@dataclasses.dataclass(slots=True)
class ProfileConfig:
    """A window of steps whose trace is written to profile/ in the workdir; `steps` 0: none."""

    start: int = 10
    steps: int = 0


@dataclasses.dataclass(slots=True)
class Config:
    """A run.

    Attributes:
        seed: of parameters, order and augmentation.
        batch_size: of the global batch, however many devices share it.
        gradient_accumulation_steps: microbatches that the batch is cut into, computed one after the other to
            save memory; each must hold whole BatchNorm groups, and the update stays the batch's.
        epochs: length of the training; may be fractional.
        steps: length in steps instead of epochs; 0: by epochs.
        label_smoothing: in training and evaluation.
        mixup_alpha: of mixup's Beta distribution; 0: no mixup.
        cutmix_alpha: of cutmix's; with both, each picture takes one of them, evenly.
        stochastic_depth: probability that the last block is skipped for a picture in training; it grows
            linearly from the first block's, which is none.
        ema_decay: of the moving average of parameters and BatchNorm statistics, which is evaluated beside
            them and then is what is used; 0: none is kept.
        log_every_steps: how often a line of metrics is written.
        eval_every_epochs: how often to evaluate; 0: only at the end.
        eval_batch_size: 0: batch_size. Rounded up to divide among the devices.
        init_from: weights to start from: a PyTorch or safetensors file, a workdir or a checkpoint. A
            classifier of another size is replaced by a new one.
        init_optimizer: go on from the file's momentum, epoch and learning rate too.
        freeze: regular expression; parameters in whose names it is found ('layer1_0/conv1/kernel') stay as
            they are, and so do the BatchNorms there: '^conv1|^bn1|^layer[12]', or '^(?!fc)' for all but the
            classifier.
        tensorboard: whether to write events for TensorBoard into the workdir, if it is on a local disk.
    """

    seed: int = 0
    batch_size: int = 256
    gradient_accumulation_steps: int = 1
    epochs: float = 120.0
    steps: int = 0
    label_smoothing: float = 0.1
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    stochastic_depth: float = 0.0
    ema_decay: float = 0.0
    log_every_steps: int = 50
    eval_every_epochs: float = 1.0
    eval_batch_size: int = 0
    init_from: str = ''
    init_optimizer: bool = False
    freeze: str = ''
    tensorboard: bool = True
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)


def with_frozen_bn(config: Config) -> ModelConfig:
    """Returns the model's configuration, with the BatchNorms frozen whose parameters `freeze` finds."""
    patterns = [pattern for pattern in (config.model.frozen_bn, config.freeze) if pattern]
    if len(patterns) > 1:
        patterns = [f'(?:{pattern})' for pattern in patterns]
    return dataclasses.replace(config.model, frozen_bn='|'.join(patterns))


def mixing(config: Config) -> Mixing | None:
    """Returns mixup and cutmix of a run, or None if it has neither."""
    if not config.mixup_alpha and not config.cutmix_alpha:
        return None
    return Mixing(config.mixup_alpha, config.cutmix_alpha)


# Fields that may change when a run is continued; all others, and the data's fingerprint, identify the run.
_FREE = (
    'epochs',
    'steps',
    'gradient_accumulation_steps',
    'log_every_steps',
    'eval_every_epochs',
    'eval_batch_size',
    'checkpoint.',
    'profile.',
    'tensorboard',
    'data.dir',
    'data.workers',
    'data.threads',
    'data.on_bad',
    'data.max_bad_images',
)


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
    """Returns {'optimizer.lr': 0.1, ...} of a configuration or of nested dicts."""
    items = tree if isinstance(tree, dict) else dataclasses.asdict(tree)
    flat: dict[str, Any] = {}
    for key, value in items.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f'{prefix}{key}.'))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def identity(config: Config, fingerprint: str, num_classes: int) -> dict[str, Any]:
    """Returns what must agree for a run to be continued, as {'field': value}."""
    fields = {k: v for k, v in flatten(config).items() if not k.startswith(_FREE)}
    return {**fields, 'model.num_classes': num_classes, 'data.fingerprint': fingerprint}
