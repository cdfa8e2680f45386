"""The sheet shows, pixel for pixel, training images of the right class, and what training makes of them."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from batchens.data.augment import augment
from batchens.data.catalog import DATASETS
from batchens.data.contact_sheet import (
    FONT,
    GAP,
    PAPER,
    SIDE,
    contact_sheet,
    enlargement,
    first_of_each_class,
    picture,
    save_contact_sheet,
)
from batchens.files import ROOT

TOP = FONT + 3 * GAP


def pixels(sheet):
    """A picture as a tensor `(channels, height, width)`."""
    return torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(*sheet.size[::-1], -1).permute(2, 0, 1)


def cells(sheet, images, count):
    """The images on a sheet, by part, class and column, each shrunk again to its own size; from the right edge inwards."""
    scale, (channels, height, width) = enlargement(images.shape), images.shape
    parts = 1 + (DATASETS[images.name].flip or DATASETS[images.name].padding > 0)
    found = {}
    for part in range(parts):
        start = sheet.width - (parts - part) * (count * (scale * width + GAP) + 2 * GAP)
        for label in range(images.num_classes):
            for column in range(count):
                x, y = start + column * (scale * width + GAP), TOP + label * (scale * height + GAP)
                cell = pixels(sheet.crop((x, y, x + scale * width, y + scale * height)))
                small = cell[:, ::scale, ::scale]
                assert torch.equal(small.repeat_interleave(scale, 1).repeat_interleave(scale, 2), cell)
                found[part, label, column] = small[:channels]
    return found


def test_a_pixel_is_a_square_of_the_same_colour():
    image = torch.randint(256, (3, 5, 4), dtype=torch.uint8)
    assert torch.equal(pixels(picture(image)), image)
    large = pixels(picture(image, 3))
    assert large.shape == (3, 15, 12)
    assert torch.equal(large, image.repeat_interleave(3, 1).repeat_interleave(3, 2))
    grey = torch.randint(256, (1, 2, 3), dtype=torch.uint8)
    assert torch.equal(pixels(picture(grey)), grey.expand(3, 2, 3))


@pytest.mark.parametrize(("name", "size"), [("digits", 8), ("cifar10", 32), ("fashion_mnist", 28)])
def test_images_are_enlarged_to_a_size_that_can_be_seen(name, size):
    assert DATASETS[name].shape[1] == size
    assert SIDE / 2 < size * enlargement(DATASETS[name].shape) <= SIDE
    assert enlargement((3, 500, 500)) == 1


def test_left_are_the_first_training_images_of_each_class_as_they_are_stored(tiny_images):
    images = tiny_images("cifar10")
    found = cells(contact_sheet(images, 3), images, 3)
    assert len(found) == 2 * 4 * 3
    for label in range(4):
        mine = images.train.images[images.train.labels == label]
        for column in range(3):
            assert torch.equal(found[0, label, column], mine[column])


def test_right_are_the_same_images_as_training_augments_them(tiny_images):
    images, spec = tiny_images("cifar10"), DATASETS["cifar10"]
    found, generator = cells(contact_sheet(images, 3, seed=5), images, 3), torch.Generator().manual_seed(5)
    for label, row in enumerate(first_of_each_class(images, 3)):
        expected = augment(row, flip=spec.flip, padding=spec.padding, generator=generator)
        assert not torch.equal(expected, row)
        for column in range(3):
            assert torch.equal(found[1, label, column], expected[column])


def test_a_data_set_that_is_not_augmented_is_shown_once(tiny_images):
    images = tiny_images("digits")
    sheet = contact_sheet(images, 8)
    assert sheet.height == TOP + 4 * (enlargement(images.shape) * 8 + GAP)
    assert {part for part, _, _ in cells(sheet, images, 8)} == {0}
    assert sheet.width < contact_sheet(tiny_images("cifar10"), 8).width


def test_a_class_of_few_images_leaves_the_rest_of_its_row_empty(tiny_images):
    images = tiny_images("digits", train=10)
    counts = torch.bincount(images.train.labels, minlength=4)
    assert counts.min() < 8
    found = cells(contact_sheet(images, 8), images, 8)
    for (_, label, column), cell in found.items():
        assert (cell == PAPER[0]).all() == (column >= counts[label])


def test_the_names_of_classes_stand_at_their_rows(tiny_images):
    images = tiny_images("digits")
    sheet, side = contact_sheet(images, 2), SIDE + GAP
    names = sheet.crop((0, TOP, sheet.width - 2 * side - 2 * GAP, sheet.height))
    for label in range(4):
        row = pixels(names.crop((0, label * side, names.width, (label + 1) * side)))
        assert (row < 128).any()


def test_the_command_writes_the_grid_and_says_where(digits_folder, tmp_path):
    path = tmp_path / "new" / "digits.png"
    command = [sys.executable, "-m", "batchens.data.images", "digits", "--data", str(digits_folder), "--grid"]
    done = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    with Image.open(path) as sheet:
        assert sheet.format == "PNG" and sheet.height == TOP + 10 * (64 + GAP)
    assert [file.name for file in path.parent.iterdir()] == ["digits.png"]


def test_a_place_that_can_not_be_written_is_named(tiny_images, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"the grid must be a file that can be written, however: .*grid\.png"):
        save_contact_sheet(tiny_images(), tmp_path / "file" / "grid.png")
