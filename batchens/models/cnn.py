"""The two-convolution network."""

from torch import nn

from batchens.models.initialisation import kaiming


def cnn(num_classes: int, in_channels: int = 3, image_size: int = 32, batchnorm: bool = True) -> nn.Sequential:
    """Return two 3x3 convolutions (32, 64 channels), each with BatchNorm, ReLU and 2x2 pooling, then one linear layer.

    Shape: `(batch, in_channels, image_size, image_size) -> (batch, num_classes)`. 60,554 parameters for CIFAR-10.
    """
    layers: list[nn.Module] = []
    for before, after in ((in_channels, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1)]
        layers += [nn.BatchNorm2d(after)] if batchnorm else []
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return kaiming(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (image_size // 4) ** 2, num_classes)))
