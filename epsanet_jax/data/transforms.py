"""Cropping, resizing and colour augmentation of single images on the host.

Names and definitions are those of torchvision for PIL images. A generator provides all random numbers.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from epsanet_jax.data.decode import Reduced
from epsanet_jax.data.planes import Planes
from epsanet_jax.data.randaugment import RandAugment

_THIN = 16  # longer side / shorter side above which an image is not resized as a whole


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, bilinear with antialiasing.

    Attributes:
        size: height and width of the result in pixels.
        scale: smallest and largest area of the crop, as a fraction of the image's area.
        ratio: smallest and largest width / height of the crop.
        flip: whether to mirror the crop with probability 0.5.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __call__(self, image: Image.Image | Planes | Reduced, rng: np.random.Generator) -> np.ndarray:
        """Returns [size, size, C], uint8 for three channels, else float32."""
        return np.asarray(self.cut(image, rng))

    def cut(self, image: Image.Image | Planes | Reduced, rng: np.random.Generator) -> Any:
        """Returns the result as a PIL image or as planes."""
        left, top, width, height = self.box(image.width, image.height, rng)
        # resize(box=...) would be faster, but would mix in pixels from outside the box at its border.
        part = image.crop((left, top, left + width, top + height))
        part = part.resize((self.size, self.size), Image.Resampling.BILINEAR)
        mirrored = self.flip and rng.random() < 0.5
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else part

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draws left, top, width and height; if ten draws do not fit, returns the largest centred crop."""
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
        w, h = width, height
        if width / height < self.ratio[0]:
            h = min(height, max(1, round(width / self.ratio[0])))
        elif width / height > self.ratio[1]:
            w = min(width, max(1, round(height * self.ratio[1])))
        return (width - w) // 2, (height - h) // 2, w, h


@dataclasses.dataclass(frozen=True)
class CentreCrop:
    """torchvision's Resize (shorter side, bilinear with antialiasing) and CenterCrop.

    Attributes:
        size: height and width of the result in pixels.
        resize: length of the shorter side before the crop in pixels; at least `size`.
    """

    size: int
    resize: int

    def __call__(self, image: Image.Image | Planes) -> np.ndarray:
        """Returns [size, size, C], uint8 for three channels, else float32."""
        shorter, longer = sorted(image.size)
        width = int(self.resize * image.width / shorter)
        height = int(self.resize * image.height / shorter)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        right, bottom = left + self.size, top + self.size
        if longer > _THIN * shorter:
            # Resizing all of 1x60000 pixels would take 12 GB. Rounding makes a difference of at most 1.
            x, y = image.width / width, image.height / height
            box = (left * x, top * y, right * x, bottom * y)
            return np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image.crop((left, top, right, bottom)))


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter: changes brightness, contrast, saturation and hue in random order.

    Attributes:
        brightness: b; the factor of the brightness is drawn from max(0, 1 - b) to 1 + b.
        contrast: c; the factor of the contrast is drawn from max(0, 1 - c) to 1 + c.
        saturation: s; the factor of the saturation is drawn from max(0, 1 - s) to 1 + s.
        hue: h, at most 0.5; the hue is rotated by a fraction of the circle drawn from -h to h.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Returns an RGB image of the same size."""
        order = rng.permutation(4)
        ranges = (self.brightness, self.contrast, self.saturation)
        factors = [rng.uniform(max(0.0, 1.0 - r), 1.0 + r) for r in ranges]
        turn = rng.uniform(-self.hue, self.hue)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for i in order:
            if i < 3 and ranges[i]:
                image = enhancers[i](image).enhance(factors[i])
            elif i == 3 and self.hue:
                image = adjust_hue(image, turn)
        return image


def adjust_hue(image: Image.Image, factor: float) -> Image.Image:
    """Rotates the hue of an RGB image by `factor` of the circle, -0.5 .. 0.5, in Pillow's 8-bit HSV."""
    hue, saturation, value = image.convert('HSV').split()
    shift = int(factor * 255)  # not 256: as in torchvision
    hue = hue.point([(h + shift) % 256 for h in range(256)])
    return Image.merge('HSV', (hue, saturation, value)).convert('RGB')


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """torchvision's RandomErasing (Zhong et al., 2017, arXiv:1708.04896), before normalisation.

    Attributes:
        probability: probability that a rectangle is erased.
        scale: smallest and largest area of the rectangle, as a fraction of the image's area.
        ratio: smallest and largest height / width of the rectangle.
        fill: value of each erased channel, 0..255. torchvision's default is the mean colour.
    """

    probability: float = 0.25
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    fill: tuple[float, ...] = (0, 0, 0)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns an image [H, W, C]: a copy, or the array itself if nothing is erased or no draw fits."""
        if rng.random() >= self.probability:
            return image
        height, width = image.shape[:2]
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                image = image.copy()  # arrays from Pillow are read-only
                image[top : top + h, left : left + w] = self.fill
                return image
        return image


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """All transforms of a training image on the host, in the order of torchvision's recipes.

    With the crop alone, the images are the same as those of `crop`: no other random number is drawn.

    Attributes:
        crop: crop to the final size, and mirroring.
        jitter: jitter of the colours of the crop, or None.
        randaugment: RandAugment of the crop, or None.
        erasing: random erasing, applied last, or None.
    """

    crop: RandomCrop
    jitter: ColorJitter | None = None
    randaugment: RandAugment | None = None
    erasing: RandomErasing | None = None

    def __call__(self, image: Image.Image | Planes | Reduced, rng: np.random.Generator) -> np.ndarray:
        """Returns [size, size, C], uint8 for three channels, else float32."""
        part = self.crop.cut(image, rng)
        for change in (self.jitter, self.randaugment):
            part = part if change is None else change(part, rng)
        pixels = np.asarray(part)
        return pixels if self.erasing is None else self.erasing(pixels, rng)
