"""Image data sets: fetched once, kept as one file of uint8 tensors, loaded whole onto the training device.

    python -m batchens.data.images cifar10                       # on a machine with network: download and decode
    python -m batchens.data.images cifar10 --data /scratch/me/data
    python -m batchens.data.images cifar10 --grid cifar10.png    # and some images of each class, to look at

What `prepare` writes, `<folder>/<dataset>.pt`, comes from the first of: scikit-learn (digits); a folder of images
`<folder>/<dataset>/{train,test}/<class>/*` (cifar20 also takes that of cifar100); torchvision, which downloads unless
its files are in `<folder>` already. The file remembers its `source`, because two sources may hold the same images in
another order or, recompressed, not quite the same pixels.
"""

import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from batchens.data.catalog import CIFAR20_SUPERCLASSES, DATASETS, DataError, Dataset, DatasetName
from batchens.files import check_writable, data_folder, write_tensors

DOWNLOAD_TIMEOUT = 30  # seconds of silence: a compute node's firewall often drops packets rather than refuse them


@dataclass(frozen=True)
class Split:
    """uint8 images `(n, channels, height, width)` and int64 labels `(n,)`, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Images:
    """One data set on one device. `mean` and `std` are per channel, for pixels in 0..1."""

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    source: str
    """where the pixels came from; belongs in every result"""


def load(dataset: str, folder: Path, device: torch.device | str = "cpu") -> Images:
    """Load `dataset` onto `device`, preparing its file in `folder` first when that is absent.

    A tenth of the training images is held out for validation (digits: 180 of 1,437). Which ones is fixed by the data
    set, not by a run's seed, so that every run of a comparison selects on the same images.

    Raises ValueError for an unknown name, DataError where the data can't be had or its file is not whole.
    """
    spec = _spec(dataset)
    contents = _read(prepare(dataset, folder), spec)
    images, labels = contents["train_images"].to(device), contents["train_labels"].to(device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    size = 180 if dataset == "digits" else len(labels) // 10
    held_out, rest = order[:size], order[size:]
    return Images(
        name=dataset,
        train=Split(images[rest], labels[rest]),
        validation=Split(images[held_out], labels[held_out]),
        test=Split(contents["test_images"].to(device), contents["test_labels"].to(device)),
        num_classes=spec.num_classes,
        shape=spec.shape,
        mean=spec.mean,
        std=spec.std,
        classes=tuple(contents["classes"]),
        source=contents["source"],
    )


def prepare(dataset: str, folder: Path) -> Path:
    """Make `<folder>/<dataset>.pt` unless it is there, and return its path.

    Any number of processes may call this at once: one works, under a file lock, and the others wait for it. The file
    appears whole or not at all.

    Raises ValueError for an unknown name, DataError where the images can't be had or are not what they should be.
    """
    spec, folder = _spec(dataset), Path(folder).absolute()
    path = folder / f"{dataset}.pt"
    if path.exists():  # before the lock, so that a finished folder may be shared read-only
        return path
    check_writable(folder)
    with FileLock(folder / f"{dataset}.lock"):
        if not path.exists():
            contents = _gather(dataset, folder)
            wrong = _what_is_wrong(contents, spec)
            if wrong:
                raise DataError(f"{dataset} from {contents['source']} must be whole, however: {wrong}")
            write_tensors(path, contents)
    return path


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], channels_last: bool = False) -> Tensor:
    """Turn pixels 0..255 into `(pixel / 255 - mean) / std`, channel by channel.

    Shape: uint8 `(batch, channels, height, width)` -> float32, the same; `channels_last` is the memory format.
    """
    scale, shift = _scale_and_shift(mean, std, images.device)
    # In place after the conversion, 256 x 3 x 32 x 32 on two CPU cores: 0.08 ms; one addcmul instead of two steps
    # 0.26 ms (it isn't vectorised over the broadcast channels); the formula above as written 0.23 ms. Changing the
    # memory format last takes 0.3 ms in all, changing it during or before the conversion 0.9 to 1.0 ms.
    normalised = images.float().mul_(scale).add_(shift)
    return normalised.contiguous(memory_format=torch.channels_last) if channels_last else normalised


@cache  # made anew, they would cost a copy to the GPU and a wait for it in every batch
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    means, stds = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    return (1 / (255 * stds)).to(device, torch.float32), (-means / stds).to(device, torch.float32)


def _spec(dataset: str) -> Dataset:
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, however: dataset={dataset!r}")
    return DATASETS[dataset]


def _read(path: Path, spec: Dataset) -> dict[str, Any]:
    try:
        # Not memory-mapped: picked in shuffled order, the pages would be fetched from a network disk one by one.
        contents = torch.load(path, weights_only=True)
        wrong = _what_is_wrong(contents, spec)
    except Exception as error:  # a damaged archive raises whatever the reader trips over first
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        raise DataError(
            f"{path} must hold the images that `prepare` wrote there, however: {wrong}; delete that file, and the "
            "next run makes it again"
        )
    return contents


def _what_is_wrong(contents: dict[str, Any], spec: Dataset) -> str | None:
    if len(contents["classes"]) != spec.num_classes:
        return f"{len(contents['classes'])} classes instead of {spec.num_classes}"
    for split in ("train", "test"):
        images, labels = contents[f"{split}_images"], contents[f"{split}_labels"]
        if images.dtype != torch.uint8 or labels.dtype != torch.int64:
            return f"{split} images are {images.dtype} and labels {labels.dtype} instead of uint8 and int64"
        if images.shape != (len(labels), *spec.shape):
            return f"{split} images have shape {tuple(images.shape)} instead of {(len(labels), *spec.shape)}"
        if labels.unique().tolist() != list(range(spec.num_classes)):
            return f"{split} labels are not 0 to {spec.num_classes - 1}, each at least once"
    return None


def _gather(dataset: str, folder: Path) -> dict[str, Any]:
    """Images of `dataset` from the first source that has them, as they are saved."""
    if dataset == "digits":
        return _from_scikit_learn()
    if (folder / dataset).is_dir():
        return _from_folder(dataset, folder)
    if dataset == "cifar20" and (folder / "cifar100").is_dir():
        return _superclasses(_from_folder("cifar100", folder))
    contents = _from_torchvision(dataset, folder)
    return _superclasses(contents) if dataset == "cifar20" else contents


def _from_scikit_learn() -> dict[str, Any]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 0..16 becomes 0..255, as in the other sets; the 17 levels stay distinct.
    images = (torch.as_tensor(digits.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # no official test split
    test, train = order[:360], order[360:]
    return {
        "train_images": images[train],
        "train_labels": labels[train],
        "test_images": images[test],
        "test_labels": labels[test],
        "classes": [str(digit) for digit in range(10)],
        "source": "scikit-learn digits",
    }


def _superclasses(contents: dict[str, Any]) -> dict[str, Any]:
    superclass = {name: index for index, names in enumerate(CIFAR20_SUPERCLASSES.values()) for name in names}
    unknown = sorted(set(contents["classes"]) ^ set(superclass))
    if unknown:
        raise DataError(
            f"cifar20 from {contents['source']} needs CIFAR-100's 100 class names, however: absent or unknown are "
            f"{', '.join(unknown[:10])}"
        )
    new_label = torch.tensor([superclass[name] for name in contents["classes"]])
    return contents | {
        "train_labels": new_label[contents["train_labels"]],
        "test_labels": new_label[contents["test_labels"]],
        "classes": list(CIFAR20_SUPERCLASSES),
    }


def _from_folder(dataset: str, folder: Path) -> dict[str, Any]:
    """Images of `<folder>/<dataset>/{train,test}/<class>/*`; labels count the class names in sorted order."""
    root = folder / dataset
    classes = {split: _visible_names(root / split) for split in ("train", "test")}
    if classes["train"] != classes["test"]:
        differing = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise DataError(
            f"{root}/train and {root}/test must hold the same class folders, however: only one of them has "
            f"{', '.join(differing[:10])}; complete it, or move {root} away to download the images instead"
        )
    train_images, train_labels = _decode(root / "train", classes["train"], DATASETS[dataset].shape)
    test_images, test_labels = _decode(root / "test", classes["test"], DATASETS[dataset].shape)
    return {
        "train_images": train_images,
        "train_labels": train_labels,
        "test_images": test_images,
        "test_labels": test_labels,
        "classes": classes["train"],
        "source": f"image folder {dataset} ({len(train_labels)} train, {len(test_labels)} test)",
    }


def _visible_names(directory: Path) -> list[str]:
    """Sorted names of what is in `directory`, less hidden files (desktops leave them in folders they show)."""
    names = sorted(path.name for path in directory.iterdir() if path.name[0] != ".") if directory.is_dir() else []
    if not names:
        raise DataError(
            f"an image folder must be laid out as DATASET/train/CLASS/* and DATASET/test/CLASS/*, however: {directory} "
            "is absent, empty or no folder; complete it, or move the data set's folder away to download it instead"
        )
    return names


def _decode(directory: Path, classes: list[str], shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Images `(n, *shape)` and labels `(n,)` of the class folders in `directory`."""

    def decode_class(name: str) -> Tensor:
        files = [directory / name / file for file in _visible_names(directory / name)]
        pixels = bytearray().join(_pixels(file, shape) for file in files)
        channels, height, width = shape
        images = torch.frombuffer(pixels, dtype=torch.uint8).view(len(files), height, width, channels)
        return images.permute(0, 3, 1, 2).contiguous()

    # Whole classes, not single images, are handed to threads: so they cost nothing on a local disk (11,000 images a
    # second with 1, 2 or 4 threads on two cores; per image 5,400 with 4) and still overlap a network disk's waits.
    with ThreadPoolExecutor(4) as pool:
        progress = tqdm(pool.map(decode_class, classes), str(directory), len(classes), unit="class", disable=None)
        images = list(progress)
    counts = torch.tensor([len(batch) for batch in images])
    return torch.cat(images), torch.arange(len(classes)).repeat_interleave(counts)


def _pixels(file: Path, shape: tuple[int, int, int]) -> bytes:
    channels, height, width = shape
    try:
        with Image.open(file) as image:
            size = image.size
            pixels = image.convert("RGB" if channels == 3 else "L").tobytes()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's three ways to reject a damaged file
        raise DataError(
            f"every file of an image folder must be a readable image, however: {file}: {error}; replace or remove it"
        ) from error
    if size != (width, height):
        raise DataError(
            f"every image of this data set must be {width} x {height} pixels, however: {file} is {size[0]} x {size[1]}"
        )
    return pixels


def _from_torchvision(dataset: str, folder: Path) -> dict[str, Any]:
    """Images as torchvision reads them, downloaded into `folder` unless its files are there; it checks their MD5."""
    from batchens.data.vision import import_datasets

    name = DATASETS[dataset].torchvision
    assert name is not None
    read = getattr(import_datasets(), name)
    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT):
            train, test = (read(folder, train=train, download=True) for train in (True, False))
    except Exception as error:  # URLError, a failed checksum (RuntimeError), a half-unpacked file (AssertionError), ...
        reason = " ".join(str(error).split())  # torchvision's messages span lines
        raise DataError(
            f"{dataset} must be in {folder} or downloadable, however: there is neither {folder / dataset}.pt nor a "
            f"folder {folder / dataset}, and torchvision's {name} failed with {type(error).__name__}: {reason}; "
            f"on a machine with network run `python -m batchens.data.images {dataset} --data {folder}` once "
            f"(delete what an earlier, broken download left there), or put images into {folder / dataset}/train/CLASS/ "
            f"and {folder / dataset}/test/CLASS/"
        ) from error

    def images(data: Any) -> Tensor:
        pixels = torch.as_tensor(data)
        return (pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)).contiguous()

    return {
        "train_images": images(train.data),
        "train_labels": torch.as_tensor(train.targets),
        "test_images": images(test.data),
        "test_labels": torch.as_tensor(test.targets),
        "classes": list(train.classes),
        "source": f"torchvision {name}",
    }


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Limit how long a connection opened inside may stay silent: torchvision sets no limit and would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def main(dataset: DatasetName, data: Path | None = None, grid: Path | None = None) -> int:
    """Fetch and decode one data set, so that no run has to.

    Args:
        dataset: the data set
        data: where it is kept; by default $BATCHENS_DATA, else data/ in the repository
        grid: a PNG file to write too: a row of training images for each class, as stored and as augmented in training
    """
    from batchens.run import guarded

    def work() -> None:
        start = time.perf_counter()
        path = prepare(dataset, data or data_folder())
        seconds = time.perf_counter() - start
        images = load(dataset, data or data_folder())
        print(
            f"{path}: {len(images.train):,} train, {len(images.validation):,} validation, {len(images.test):,} test "
            f"from {images.source}, in {seconds:.1f} s"
        )
        if grid:
            from batchens.data.contact_sheet import save_contact_sheet

            save_contact_sheet(images, grid)
            print(f"some training images of each class: {grid}")

    return guarded(work)


if __name__ == "__main__":
    import tyro

    sys.exit(tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,), prog="python -m batchens.data.images"))
