"""Cropping, resizing and colour augmentation of single pictures on the host.

What torchvision does with PIL pictures, by its names and definitions; all randomness comes in as a generator.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageEnhance

from epsanet_jax.data.decode import Reduced
from epsanet_jax.data.randaugment import RandAugment

_THIN = 16  # longer side / shorter side from which on a picture is not resized as a whole


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, bilinear with antialiasing.

    Attributes:
        size: height and width of the result, pixels.
        scale: smallest and largest share of the picture's area that is cut out.
        ratio: smallest and largest width / height of the cut.
        flip: whether to mirror every second picture.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __call__(self, picture: Image.Image | Reduced, rng: np.random.Generator) -> np.ndarray:
        """Returns uint8 [size, size, 3]."""
        return np.asarray(self.cut(picture, rng))

    def cut(self, picture: Image.Image | Reduced, rng: np.random.Generator) -> Image.Image:
        """Returns the same as a picture."""
        left, top, width, height = self.box(picture.width, picture.height, rng)
        # Not resize(box=...), which is faster: it would mix in pixels from outside the box at its rim.
        part = picture.crop((left, top, left + width, top + height))
        part = part.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if self.flip and rng.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return part

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draws left, top, width and height; after ten misfits, the largest centred cut that is allowed."""
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
        size: height and width of the result, pixels.
        resize: length of the shorter side before the crop, pixels; at least `size`.
    """

    size: int
    resize: int

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """Returns uint8 [size, size, 3]."""
        shorter, longer = sorted(picture.size)
        width = int(self.resize * picture.width / shorter)
        height = int(self.resize * picture.height / shorter)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        right, bottom = left + self.size, top + self.size
        if longer > _THIN * shorter:
            # The whole of 1x60000 pixels would become 12 GB. This differs by at most one, from rounding.
            x, y = picture.width / width, picture.height / height
            box = (left * x, top * y, right * x, bottom * y)
            return np.asarray(picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box))
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(picture.crop((left, top, right, bottom)))


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter: changes brightness, contrast, saturation and hue in an order that is drawn.

    Attributes:
        brightness: b; the factor is drawn from max(0, 1 - b) to 1 + b.
        contrast: likewise.
        saturation: likewise.
        hue: h, at most 0.5; the hue is turned by a part of the circle that is drawn from -h to h.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Returns a picture of the same size; RGB in, RGB out."""
        order = rng.permutation(4)
        ranges = (self.brightness, self.contrast, self.saturation)
        factors = [rng.uniform(max(0.0, 1.0 - r), 1.0 + r) for r in ranges]
        turn = rng.uniform(-self.hue, self.hue)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for i in order:
            if i < 3 and ranges[i]:
                picture = enhancers[i](picture).enhance(factors[i])
            elif i == 3 and self.hue:
                picture = adjust_hue(picture, turn)
        return picture


def adjust_hue(picture: Image.Image, factor: float) -> Image.Image:
    """Turns the hue of an RGB picture by `factor`, -0.5 .. 0.5, of the circle, in Pillow's HSV of 3 bytes."""
    hue, saturation, value = picture.convert('HSV').split()
    shift = int(factor * 255)  # of 256: so torchvision has it
    hue = hue.point([(h + shift) % 256 for h in range(256)])
    return Image.merge('HSV', (hue, saturation, value)).convert('RGB')


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """torchvision's RandomErasing (Zhong et al., 2017, arXiv:1708.04896), before normalisation.

    Attributes:
        probability: that something is erased.
        scale: smallest and largest share of the picture's area.
        ratio: smallest and largest height / width of the rectangle.
        fill: what is put there, 0..255 for each channel. After normalisation torchvision puts 0, the mean
            colour.
    """

    probability: float = 0.25
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    fill: tuple[int, int, int] = (0, 0, 0)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns uint8 [H, W, 3], as is or a copy; nothing is erased if ten rectangles do not fit."""
        if rng.random() >= self.probability:
            return image
        height, width = image.shape[:2]
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                image = image.copy()  # Pillow's are read-only
                image[top : top + h, left : left + w] = self.fill
                return image
        return image


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """All that happens to a training picture on the host, in the order of torchvision's recipes.

    With the crop alone it draws what `crop` draws: the pictures are the same.

    Attributes:
        crop: to the final size, and mirroring.
        jitter: of the cropped picture's colours, or None.
        randaugment: of the cropped picture, or None.
        erasing: last, or None.
    """

    crop: RandomCrop
    jitter: ColorJitter | None = None
    randaugment: RandAugment | None = None
    erasing: RandomErasing | None = None

    def __call__(self, picture: Image.Image | Reduced, rng: np.random.Generator) -> np.ndarray:
        """Returns uint8 [size, size, 3]."""
        part = self.crop.cut(picture, rng)
        if self.jitter is not None:
            part = self.jitter(part, rng)
        if self.randaugment is not None:
            part = self.randaugment(part, rng)
        image = np.asarray(part)
        return image if self.erasing is None else self.erasing(image, rng)
