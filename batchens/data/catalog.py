"""What is fixed for each image data set. Imports no torch, so that a login node can list the names at once."""

from dataclasses import dataclass
from typing import Literal

DatasetName = Literal["digits", "cifar10", "cifar20", "cifar100", "fashion_mnist"]


class DataError(RuntimeError):
    """A data set is absent, incomplete or not what its name says; the message tells what to do."""


@dataclass(frozen=True)
class Dataset:
    """One image data set: classes, shape `(channels, height, width)`, augmentation and normalisation."""

    num_classes: int
    shape: tuple[int, int, int]
    flip: bool
    """whether a training image may be mirrored left to right"""
    padding: int
    """pixels of zero padding on each side before a random crop back to `shape`; 0: no crop"""
    mean: tuple[float, ...]
    """per channel, over the training set, for pixels in 0..1"""
    std: tuple[float, ...]
    torchvision: str | None
    """class in torchvision.datasets to download with; None: bundled with scikit-learn"""


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(10, (1, 8, 8), False, 0, (0.305,), (0.376,), None),
    "cifar10": Dataset(10, (3, 32, 32), True, 4, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "CIFAR10"),
    "cifar20": Dataset(20, (3, 32, 32), True, 4, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "CIFAR100"),
    "cifar100": Dataset(100, (3, 32, 32), True, 4, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "CIFAR100"),
    "fashion_mnist": Dataset(10, (1, 28, 28), True, 2, (0.2860,), (0.3530,), "FashionMNIST"),
}

# CIFAR-100's 20 superclasses in the official label order (alphabetical), by class name: torchvision offers only the 100
# fine labels, and a folder of images holds only names.
CIFAR20_SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
