"""Images with a circle, a square and a triangle each, and the class of each pixel."""

import numpy as np

SIZE, IMAGES = 64, 6
CLASSES = 4  # background, circle, square, triangle


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns noisy images of a circle, a square and a triangle, [N, 64, 64, 3], and masks [N, 64, 64]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]  # [64, 64] each
    images = rng.normal(0, 0.3, (IMAGES, SIZE, SIZE, 3))
    masks = np.zeros((IMAGES, SIZE, SIZE), np.int32)
    for image, mask in zip(images, masks, strict=True):
        corners = rng.permutation([(18, 18), (18, 46), (46, 18), (46, 46)])
        for label, (cy, cx) in enumerate(corners[:3] + rng.integers(-4, 5, (3, 2)), start=1):
            dy, dx, r = y - cy, x - cx, rng.integers(8, 13)
            circle, square = dy**2 + dx**2 < r**2, np.maximum(abs(dy), abs(dx)) < 0.9 * r
            triangle = (abs(dy) < r) & (2 * abs(dx) < dy + r)
            inside = (circle, square, triangle)[label - 1]
            mask[inside] = label
            image[inside] += rng.uniform(-1.5, 1.5, 3)  # the colour does not depend on the shape
    return images.astype(np.float32), masks
