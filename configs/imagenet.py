"""ImageNet with the recipe of the reference (arXiv 2105.14447, section 4.1, and its training script).

Command: python train.py --config=configs/imagenet.py:epsanet50_small --config.data.dir=DIR
             --workdir=runs/imagenet
         DIR holds imagenet2012 prepared by TFDS; for the output of `epsanet prepare`:
         --config.data.source=records; for image folders with train/ and val/:
         --config.data.source=folder --config.data.eval_split=val
Hardware: the reference used 8 GPUs.
Expected result: the paper reports 77.49 / 93.54 % top-1 / top-5 for epsanet50_small (78.64 / 94.18 for 50
         large, 78.43 / 94.11 and 79.38 / 94.58 for 101 small and large). Not yet run by us.

From the reference: 120 epochs, batch size 256 with BatchNorm over groups of 32 images, SGD with momentum 0.9,
learning rate 0.1, multiplied by 0.1 every 30 epochs, no warm-up, weight decay 1e-4 on all parameters, label
smoothing 0.1, random-resized crops of 224 pixels with flips; evaluation with resize to 256 and a centre crop
of 224.
"""

from epsanet_jax.training.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig


def get_config(variant: str = 'epsanet50_small') -> Config:
    return Config(
        batch_size=256,
        epochs=120,
        label_smoothing=0.1,
        model=ModelConfig(name=variant, bn_group=32),
        data=DataConfig(source='tfds', name='imagenet2012', eval_split='validation'),
        optimizer=OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=1e-4),
        schedule=ScheduleConfig(name='step', step_epochs=30, step_factor=0.1),
    )
