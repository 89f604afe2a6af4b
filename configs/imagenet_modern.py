"""ImageNet with a modern recipe: longer training, strong augmentation, averaged weights, bfloat16.

Command: python train.py --config=configs/imagenet_modern.py:epsanet50_small --config.data.dir=DIR
             --workdir=runs/modern
         DIR holds imagenet2012 prepared by TFDS; for the output of `epsanet prepare`:
         --config.data.source=records
Hardware: intended for 8 GPUs or a TPU slice of 8 chips.
Expected result: not yet run. torchvision reports 80.86 % top-1 for ResNet-50 with a recipe of this kind and
         76.13 % with the older one.

Sources: torchvision's recipe of 2021 (Vryniotis, "How to Train State-Of-The-Art Models Using
TorchVision's Latest Primitives"): batch 1,024, SGD at 0.5 with cosine and 5 epochs of warm-up, no weight
decay on BatchNorm and biases (2e-5 on the rest), label smoothing, mixup 0.2 and cutmix 1.0, random
erasing 0.1, moving average of the weights, images of 176 px in training and 224 px in evaluation. Different
here: 300 epochs instead of 600, RandAugment (arXiv 1909.13719) instead of TrivialAugment, stochastic depth
0.05 (as in "ResNet strikes back", arXiv 2110.00476), and BatchNorm over groups of 32 images, as in the
reference's recipe for EPSANet.
"""

from epsanet_jax.training.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig


def get_config(variant: str = 'epsanet50_small') -> Config:
    return Config(
        batch_size=1024,
        epochs=300,
        label_smoothing=0.1,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        stochastic_depth=0.05,
        ema_decay=0.9999,
        eval_every_epochs=5,
        model=ModelConfig(name=variant, bn_group=32, dtype='bfloat16'),
        data=DataConfig(
            source='tfds',
            name='imagenet2012',
            eval_split='validation',
            image_size=176,
            eval_image_size=224,
            resize_size=232,
            randaugment_ops=2,
            randaugment_magnitude=9,
            random_erasing=0.1,
        ),
        optimizer=OptimizerConfig(lr=0.5, momentum=0.9, weight_decay=2e-5, decay_norm_and_bias=False),
        schedule=ScheduleConfig(name='cosine', warmup_epochs=5),
    )
