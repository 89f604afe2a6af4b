"""Convolutions of ten networks at their real sizes, for `zoo_convs.py`."""

from typing import NamedTuple


class Conv(NamedTuple):
    """A convolution with a square kernel and dilation * (kernel // 2) zeros on every side."""

    network: str
    size: int  # height and width of the images
    inputs: int
    outputs: int
    kernel: int
    stride: int
    dilation: int
    groups: int

    @property
    def family(self) -> str:
        """The name of its network for --only, for example 'resnext-50'."""
        return self.network.split()[0].rstrip(',').lower()

    @property
    def name(self) -> str:
        """The name for --only, for example 'resnext-50-56x256-k3-g32-s2'."""
        sizes = f'{self.family}-{self.size}x{self.inputs}-k{self.kernel}-g{self.groups}'
        stride = f'-s{self.stride}' if self.stride > 1 else ''
        return sizes + stride + (f'-d{self.dilation}' if self.dilation > 1 else '')


# fmt: off
NETWORKS = {  # size, inputs, outputs, kernel, stride, dilation, groups
    'ResNeXt-50 32x4d': [
        (56, 128, 128, 3, 1, 1, 32), (56, 256, 256, 3, 2, 1, 32), (28, 256, 256, 3, 1, 1, 32),
        (14, 512, 512, 3, 1, 1, 32), (7, 1024, 1024, 3, 1, 1, 32)],
    'RegNetY-4G': [
        (56, 128, 128, 3, 1, 1, 2), (28, 192, 192, 3, 1, 1, 3), (28, 512, 512, 3, 2, 1, 8),
        (14, 512, 512, 3, 1, 1, 8), (7, 1088, 1088, 3, 1, 1, 17)],
    'SKNet-50, dilated branch': [
        (56, 128, 128, 3, 1, 2, 32), (28, 256, 256, 3, 1, 2, 32), (14, 512, 512, 3, 1, 2, 32)],
    'ConvNeXt-T': [
        (56, 96, 96, 7, 1, 1, 96), (28, 192, 192, 7, 1, 1, 192), (14, 384, 384, 7, 1, 1, 384),
        (7, 768, 768, 7, 1, 1, 768)],
    'MobileNetV3-L': [
        (112, 64, 64, 3, 2, 1, 64), (56, 72, 72, 5, 2, 1, 72), (28, 120, 120, 5, 1, 1, 120),
        (14, 480, 480, 3, 1, 1, 480), (7, 960, 960, 5, 1, 1, 960)],
    'EfficientNet-B0': [
        (112, 32, 32, 3, 1, 1, 32), (112, 96, 96, 3, 2, 1, 96), (28, 240, 240, 5, 1, 1, 240),
        (14, 672, 672, 5, 1, 1, 672), (7, 1152, 1152, 5, 1, 1, 1152)],
    'ShuffleNetV1 1x, 3 groups': [
        (28, 240, 60, 1, 1, 1, 3), (28, 60, 240, 1, 1, 1, 3), (14, 480, 120, 1, 1, 1, 3)],
    'PyConvResNet-50': [
        (112, 64, 16, 9, 2, 1, 16), (28, 128, 64, 7, 1, 1, 8), (14, 256, 128, 5, 1, 1, 4)],
    'Xception': [
        (147, 128, 128, 3, 1, 1, 128), (37, 728, 728, 3, 1, 1, 728), (19, 728, 728, 3, 1, 1, 728)],
    'EPSANet-50 Small': [
        (56, 64, 16, 5, 1, 1, 4), (56, 64, 16, 9, 1, 1, 16), (28, 128, 32, 7, 1, 1, 8),
        (14, 256, 64, 9, 1, 1, 16)],
}
# fmt: on
CONVS = [Conv(network, *sizes) for network, rows in NETWORKS.items() for sizes in rows]
