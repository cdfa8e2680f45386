import pytest
import torch

from batchens.data.augment import augment, crop_and_flip, draw


def random_images(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand(image, top, left, mirrored, padding):
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    crop = padded[:, top : top + height, left : left + width]
    return crop.flip(2) if mirrored else crop


@pytest.mark.parametrize(("shape", "padding"), [((3, 32, 32), 4), ((1, 28, 28), 2), ((2, 5, 7), 3)])
@pytest.mark.parametrize("flip", [True, False])
def test_each_image_equals_its_copy_cropped_and_flipped_by_hand(shape, padding, flip):
    images = random_images(200, *shape)
    top, left, mirrored = draw(len(images), flip=flip, padding=padding, generator=seeded())
    augmented = augment(images, flip=flip, padding=padding, generator=seeded())
    assert augmented.dtype == torch.uint8
    for n in range(len(images)):
        expected = by_hand(images[n], int(top[n]), int(left[n]), bool(mirrored[n]), padding)
        assert torch.equal(augmented[n], expected), n


def test_every_offset_and_flip_occurs_independently_and_equally_often():
    top, left, mirrored = draw(162_000, flip=True, padding=4, generator=seeded())
    counts = ((top * 9 + left) * 2 + mirrored).bincount(minlength=162)
    assert counts.shape == (162,)
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


def test_without_flip_nothing_is_mirrored_and_without_padding_nothing_is_moved():
    images = random_images(64, 3, 8, 8)
    _, _, mirrored = draw(1000, flip=False, padding=4, generator=seeded())
    assert not mirrored.any()
    flipped = augment(images, flip=True, padding=0, generator=seeded())
    unchanged = (flipped == images).flatten(1).all(1)
    assert 10 < unchanged.sum() < 54
    assert torch.equal(flipped[~unchanged], images[~unchanged].flip(3))
    assert torch.equal(augment(images, flip=False, padding=0, generator=seeded()), images)


def test_centre_crop_is_the_image():
    images, centre = random_images(4, 3, 6, 6), torch.full((4,), 2)
    assert torch.equal(crop_and_flip(images, centre, centre, torch.zeros_like(centre), padding=2), images)


def test_restored_generator_repeats_the_augmentation_whatever_the_global_seed():
    images, generator = random_images(64, 3, 32, 32), seeded(7)
    augment(images, flip=True, padding=4, generator=generator)
    state = generator.get_state()
    first = augment(images, flip=True, padding=4, generator=generator)
    other = augment(images, flip=True, padding=4, generator=generator)
    torch.manual_seed(123)
    restored = torch.Generator()
    restored.set_state(state)
    assert torch.equal(augment(images, flip=True, padding=4, generator=restored), first)
    assert not torch.equal(first, other)


def test_the_global_generator_and_the_input_are_left_alone():
    images = random_images(16, 3, 8, 8)
    before, state = images.clone(), torch.get_rng_state()
    augment(images, flip=True, padding=2, generator=seeded())
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_images_that_are_not_contiguous():
    images = random_images(16, 8, 8, 3).permute(0, 3, 1, 2)
    expected = augment(images.contiguous(), flip=True, padding=2, generator=seeded())
    assert torch.equal(augment(images, flip=True, padding=2, generator=seeded()), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_for_it():
    images = random_images(64, 3, 32, 32).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    augment(images, flip=True, padding=4, generator=generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmented = augment(images, flip=True, padding=4, generator=generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert augmented.is_cuda
