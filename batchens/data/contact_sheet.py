"""What a network is shown, to look at: a row for each class, some training images as stored, and the same as augmented."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from batchens.data.augment import augment
from batchens.data.catalog import DATASETS
from batchens.files import replacing

if TYPE_CHECKING:
    from batchens.data.images import Images

PER_CLASS = 8
SIDE = 64  # pixels of an enlarged image, about: each pixel of it becomes a square of whole pixels
GAP = 4
PAPER, INK = (255, 255, 255), (0, 0, 0)
FONT = 16


def enlargement(shape: tuple[int, int, int]) -> int:
    """Return how many pixels of the sheet, to a side, show one of an image."""
    return max(1, SIDE // max(shape[1:]))


def first_of_each_class(images: "Images", count: int = PER_CLASS) -> list[Tensor]:
    """Return for each class the first `count` of its training images, uint8 `(count or fewer, channels, height, width)`."""
    labels = images.train.labels
    return [images.train.images[(labels == label).nonzero()[:count, 0]] for label in range(images.num_classes)]


def contact_sheet(images: "Images", count: int = PER_CLASS, seed: int = 0) -> Image.Image:
    """Return a picture of training images: left as they are stored, right the same as an epoch of training may show them.

    `seed` decides the augmentation. Of a data set that is not augmented there is no right part.
    """
    spec, generator = DATASETS[images.name], torch.Generator().manual_seed(seed)
    stored = [row.cpu() for row in first_of_each_class(images, count)]
    parts = {"as stored and in training": stored}
    if spec.flip or spec.padding:
        augmented = [augment(row, flip=spec.flip, padding=spec.padding, generator=generator) for row in stored]
        parts = {"as stored": stored, "as augmented in training": augmented}
    font = ImageFont.load_default(FONT)
    scale, names = enlargement(images.shape), [name.replace("_", " ") for name in images.classes]
    height, width = (scale * side for side in images.shape[1:])
    left = round(max(font.getlength(name) for name in names)) + 2 * GAP
    top = FONT + 3 * GAP
    starts = [left + part * (count * (width + GAP) + 2 * GAP) for part in range(len(parts) + 1)]
    sheet = Image.new("RGB", (starts[-1], top + len(names) * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for (start, _), (title, rows) in zip(pairwise(starts), parts.items(), strict=True):
        draw.text((start, GAP), title, INK, font)
        for at, (name, row) in enumerate(zip(names, rows, strict=True)):
            y = top + at * (height + GAP)
            draw.text((GAP, y + height / 2), name, INK, font, anchor="lm")
            for column, image in enumerate(row):
                sheet.paste(picture(image, scale), (start + column * (width + GAP), y))
    return sheet


def picture(image: Tensor, scale: int = 1) -> Image.Image:
    """Return a uint8 `(channels, height, width)` as a picture, each pixel of it a square of `scale` pixels a side."""
    channels, height, width = image.shape
    data = image.permute(1, 2, 0).contiguous().numpy()
    small = Image.fromarray(data if channels == 3 else data[:, :, 0])
    return small.convert("RGB").resize((scale * width, scale * height), Image.Resampling.NEAREST)


def save_contact_sheet(images: "Images", path: Path) -> None:
    """Write the sheet to `path` as PNG, whole or not at all.

    Raises:
        ValueError: it can't be written there.
    """
    sheet = contact_sheet(images)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            sheet.save(temporary, "PNG")
    except OSError as error:
        raise ValueError(f"the grid must be a file that can be written, however: {path}: {error.strerror}") from error
