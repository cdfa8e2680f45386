"""VGG11 for 32x32 images, and networks built like it."""

from collections.abc import Sequence

from torch import nn

from batchens.models.initialisation import kaiming

# channels of each 3x3 convolution; P halves the image
LAYERS = (64, "P", 128, "P", 256, 256, "P", 512, 512, "P", 512, 512, "P")


def vgg11(num_classes: int, in_channels: int = 3, image_size: int = 32, batchnorm: bool = True) -> nn.Sequential:
    """Return VGG11 (Simonyan and Zisserman 2015, arXiv:1409.1556, table 1, A) with a 512-512-classes head.

    Eight 3x3 convolutions with BatchNorm and ReLU; `batchnorm=False` is the form without, 9,488,266 parameters for
    CIFAR-10. Images of 28x28 are padded to 32x32 with zeros.

    Shape: `(batch, in_channels, image_size, image_size) -> (batch, num_classes)`.

    Raises:
        ValueError: image_size is neither 28 nor 32.
    """
    return vgg(LAYERS, num_classes, in_channels, image_size, batchnorm, hidden=(512,))


def vgg(
    convolutions: Sequence[int | str],
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    batchnorm: bool = True,
    *,
    hidden: Sequence[int] = (),
) -> nn.Sequential:
    """Return 3x3 convolutions of these channels with five poolings ("P") among them, then linear layers of the `hidden` widths.

    Shape: `(batch, in_channels, image_size, image_size) -> (batch, num_classes)`.

    Raises:
        ValueError: image_size is neither 28 nor 32.
    """
    if image_size not in (28, 32):
        raise ValueError(f"vgg11 takes images of 32x32, or of 28x28 and pads them, however: {image_size}x{image_size}")
    layers: list[nn.Module] = [nn.ZeroPad2d(2)] if image_size == 28 else []
    before = in_channels
    for layer in convolutions:
        if isinstance(layer, str):
            layers += [nn.MaxPool2d(2)]
            continue
        layers += [nn.Conv2d(before, layer, 3, padding=1)]
        layers += [nn.BatchNorm2d(layer)] if batchnorm else []
        layers += [nn.ReLU(inplace=True)]
        before = layer
    layers += [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(before, width), nn.ReLU(inplace=True)]
        before = width
    return kaiming(nn.Sequential(*layers, nn.Linear(before, num_classes)))
