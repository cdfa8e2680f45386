import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from PIL import Image

from batchens.data import images as module
from batchens.data import vision
from batchens.data.catalog import CIFAR20_SUPERCLASSES, DATASETS, DatasetName
from batchens.data.images import DataError, load, normalise, prepare
from batchens.files import ROOT


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def write_images(root, classes, shape, *, train=3, test=1):
    """An image folder; an image's pixels tell its class (first channel) and its number (last column)."""
    channels, height, width = shape
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB" if channels == 3 else "L", (width, height), (label, 7, 9)[:channels])
                image.paste((label, 7, 100 + number)[3 - channels :], (width - 1, 0, width, height))
                image.save(root / split / name / f"{number}.png")


def rows(split):
    """The images of a split as a set of (pixels, label)."""
    return {(image.numpy().tobytes(), int(label)) for image, label in zip(split.images, split.labels, strict=True)}


# the catalogue


def test_names_can_be_listed_without_torch():
    code = "import sys; from batchens.data.catalog import DATASETS; assert 'torch' not in sys.modules; print(*DATASETS)"
    listed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()
    assert listed == list(DATASETS) == list(get_args(DatasetName))


def test_cifar20_is_a_partition_of_the_100_classes_into_20_fives():
    fine = [name for names in CIFAR20_SUPERCLASSES.values() for name in names]
    assert len(CIFAR20_SUPERCLASSES) == 20
    assert {len(names) for names in CIFAR20_SUPERCLASSES.values()} == {5}
    assert len(set(fine)) == 100
    assert list(CIFAR20_SUPERCLASSES) == sorted(CIFAR20_SUPERCLASSES)


def test_statistics_fit_the_shape():
    for spec in DATASETS.values():
        assert len(spec.mean) == len(spec.std) == spec.shape[0]


# splits


def test_digits_sizes_types_and_statistics(digits_folder):
    digits = load("digits", digits_folder)
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1257, 180, 360)
    assert digits.source == "scikit-learn digits"
    for split in (digits.train, digits.validation, digits.test):
        assert split.images.shape == (len(split), 1, 8, 8)
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert set(split.labels.tolist()) == set(range(10))
    pixels = digits.train.images / 255
    assert pixels.mean().item() == pytest.approx(digits.mean[0], abs=0.01)
    assert pixels.std().item() == pytest.approx(digits.std[0], abs=0.01)


def test_digits_are_all_there_once_with_their_own_labels(digits_folder):
    from sklearn.datasets import load_digits

    original = load_digits()
    pixels = (torch.as_tensor(original.images) * 255 / 16).round().to(torch.uint8)
    expected = {(image.numpy().tobytes(), int(label)) for image, label in zip(pixels, original.target, strict=True)}
    digits = load("digits", digits_folder)
    train, validation, test = rows(digits.train), rows(digits.validation), rows(digits.test)
    assert train | validation | test == expected
    assert len(train) + len(validation) + len(test) == len(expected) == 1797


def test_split_ignores_the_global_seed_and_leaves_it_alone(digits_folder):
    torch.manual_seed(1)
    first = load("digits", digits_folder)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = load("digits", digits_folder)
    assert torch.equal(torch.get_rng_state(), state)
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(first, split).images, getattr(second, split).images)
        assert torch.equal(getattr(first, split).labels, getattr(second, split).labels)


def test_split_is_the_one_that_published_numbers_used():
    """Fails when a new torch permutes differently: results on either side of that would not be comparable."""
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    assert order[:6].tolist() == [36044, 49165, 37807, 11341, 6091, 16904]


def test_a_tenth_is_held_out(tmp_path):
    classes = [str(n) for n in range(10)]
    write_images(tmp_path / "fashion_mnist", classes, (1, 28, 28), train=10, test=1)
    loaded = load("fashion_mnist", tmp_path)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (90, 10, 10)


# image folders


def test_labels_follow_images_through_an_image_folder(tmp_path):
    classes = ["zebra", "ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis"]
    write_images(tmp_path / "cifar10", classes, (3, 32, 32))
    (tmp_path / "cifar10" / "train" / "ant" / ".DS_Store").write_bytes(b"left by a desktop")
    loaded = load("cifar10", tmp_path)
    assert loaded.classes == tuple(sorted(classes))
    assert loaded.source == "image folder cifar10 (30 train, 10 test)"
    for split in (loaded.train, loaded.validation, loaded.test):
        written = split.images[:, 0, 0, 0].tolist()
        assert [classes[n] for n in written] == [loaded.classes[n] for n in split.labels.tolist()]
        assert (split.images[:, 1] == 7).all()
        assert (split.images[:, 2, :, :-1] == 9).all()
        assert (split.images[:, 2, :, -1] >= 100).all()
    assert len(rows(loaded.train) | rows(loaded.validation)) == 30


def test_cifar20_from_the_folder_of_cifar100(tmp_path):
    fine = sorted(name for names in CIFAR20_SUPERCLASSES.values() for name in names)
    write_images(tmp_path / "cifar100", fine, (3, 32, 32), train=1)
    loaded = load("cifar20", tmp_path)
    assert loaded.source == "image folder cifar100 (100 train, 100 test)"
    assert loaded.num_classes == len(loaded.classes) == 20
    for image, label in zip(loaded.test.images, loaded.test.labels, strict=True):
        assert fine[int(image[0, 0, 0])] in CIFAR20_SUPERCLASSES[loaded.classes[int(label)]]


def spoil_size(root):
    Image.new("L", (28, 27)).save(root / "train" / "3" / "0.png")
    return root / "train" / "3" / "0.png"


def spoil_file(root):
    (root / "test" / "4" / "0.png").write_bytes((root / "test" / "4" / "0.png").read_bytes()[:60])
    return root / "test" / "4" / "0.png"


def spoil_text(root):
    (root / "train" / "5" / "notes.txt").write_text("not an image")
    return root / "train" / "5" / "notes.txt"


def spoil_split(root):
    (root / "test").rename(root / "elsewhere")
    return root / "test"


def spoil_class_name(root):
    (root / "test" / "6").rename(root / "test" / "six")
    return "6, six"


def spoil_class_count(root):
    (root / "train" / "7").rename(root / "7")
    (root / "test" / "7").rename(root / "77")
    return "9 classes instead of 10"


def spoil_by_emptying(root):
    (root / "test" / "8" / "0.png").unlink()
    return root / "test" / "8"


@pytest.mark.parametrize(
    "spoil",
    [spoil_size, spoil_file, spoil_text, spoil_split, spoil_class_name, spoil_class_count, spoil_by_emptying],
)
def test_a_spoilt_image_folder_is_an_error_that_names_the_place(tmp_path, spoil):
    root = tmp_path / "fashion_mnist"
    write_images(root, [str(n) for n in range(10)], (1, 28, 28), train=1)
    place = spoil(root)
    with pytest.raises(DataError, match=r"must.*however") as caught:
        prepare("fashion_mnist", tmp_path)
    assert str(place) in str(caught.value)
    assert not (tmp_path / "fashion_mnist.pt").exists()


# downloads


@pytest.mark.parametrize("dataset", ["cifar10", "cifar20", "fashion_mnist"])
def test_without_network_the_error_says_what_to_do(tmp_path, no_network, dataset):
    start = time.perf_counter()
    with pytest.raises(DataError, match="no route to host") as caught:
        load(dataset, tmp_path)
    assert time.perf_counter() - start < 10
    assert f"python -m batchens.data.images {dataset} --data {tmp_path}" in str(caught.value)
    assert f"{tmp_path / dataset}/train/CLASS/" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert not (tmp_path / f"{dataset}.pt").exists()


def test_layout_and_labels_of_what_torchvision_reads(tmp_path, monkeypatch):
    fine = sorted(name for names in CIFAR20_SUPERCLASSES.values() for name in names)

    class CIFAR100:
        """As torchvision's: `data` is an array (n, height, width, channels), `targets` a list."""

        classes = fine

        def __init__(self, root, train, download):
            self.targets = [label for label in range(100) for _ in range(10 if train else 1)]
            pixels = torch.zeros(len(self.targets), 32, 32, 3, dtype=torch.uint8)
            pixels[..., 0] = torch.tensor(self.targets).view(-1, 1, 1)
            pixels[:, 5, :, 1] = 50
            self.data = pixels.numpy()

    monkeypatch.setattr(vision, "import_datasets", lambda: SimpleNamespace(CIFAR100=CIFAR100))
    loaded = load("cifar20", tmp_path)
    assert loaded.source == "torchvision CIFAR100"
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (900, 100, 100)
    for image, label in zip(loaded.train.images, loaded.train.labels, strict=True):
        assert fine[int(image[0, 0, 0])] in CIFAR20_SUPERCLASSES[loaded.classes[int(label)]]
        assert image[1].sum(1).tolist() == [50 * 32 if row == 5 else 0 for row in range(32)]


def test_an_unfinished_download_is_not_data(tmp_path, no_network):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b only the beginning")
    with pytest.raises(DataError):
        prepare("cifar10", tmp_path)


def test_a_half_unpacked_download_is_not_data(tmp_path, no_network):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, dimensions in (("images-idx3", (60_000, 28, 28)), ("labels-idx1", (60_000,))):
        header = bytes([0, 0, 8, len(dimensions)]) + b"".join(size.to_bytes(4, "big") for size in dimensions)
        for split in ("train", "t10k"):
            (raw / f"{split}-{name}-ubyte").write_bytes(header + bytes(28 * 28))
    with pytest.raises(DataError, match="delete what an earlier, broken download left"):
        prepare("fashion_mnist", tmp_path)


def test_a_download_that_falls_silent_is_given_up(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for variable in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(variable, proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setattr(urllib.request, "_opener", None)
        monkeypatch.setattr(module, "DOWNLOAD_TIMEOUT", 0.3)
        with pytest.raises(DataError, match="timed out"):
            prepare("cifar10", tmp_path)
    assert socket.getdefaulttimeout() is None


# the cache


def test_the_cache_is_used_without_its_source(tmp_path, no_network):
    root = tmp_path / "fashion_mnist"
    write_images(root, [str(n) for n in range(10)], (1, 28, 28), train=1)
    path = prepare("fashion_mnist", tmp_path)
    root.rename(tmp_path / "elsewhere")
    assert prepare("fashion_mnist", tmp_path) == path
    assert len(load("fashion_mnist", tmp_path).test) == 10


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_cache_is_an_error_that_names_it(tmp_path, digits_folder, keep):
    whole = (digits_folder / "digits.pt").read_bytes()
    (tmp_path / "digits.pt").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(DataError, match="delete that file") as caught:
        load("digits", tmp_path)
    assert str(tmp_path / "digits.pt") in str(caught.value)


def test_a_cache_with_other_contents_is_an_error(tmp_path, digits_folder):
    contents = torch.load(digits_folder / "digits.pt", weights_only=True)
    torch.save(contents | {"train_images": contents["train_images"][:700]}, tmp_path / "digits.pt")
    with pytest.raises(DataError, match=r"train images have shape \(700, 1, 8, 8\) instead of \(1437, 1, 8, 8\)"):
        load("digits", tmp_path)


def test_two_processes_preparing_at_once_make_one_file(tmp_path):
    code = "import sys; from batchens.data.images import load; print(len(load('digits', sys.argv[1]).train))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == ["1257\n", "1257\n"]
    assert {path.name for path in tmp_path.iterdir()} <= {"digits.pt", "digits.lock"}


def test_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match="cifar10, cifar20, cifar100, fashion_mnist, however: dataset='mnist'"):
        load("mnist", tmp_path)


# normalisation


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalise_is_its_formula(channels_last):
    images = torch.randint(256, (5, 3, 6, 4), dtype=torch.uint8)
    before = images.clone()
    spec = DATASETS["cifar10"]
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (spec.mean, spec.std))
    normalised = normalise(images, spec.mean, spec.std, channels_last=channels_last)
    assert normalised.dtype == torch.float32
    assert torch.allclose(normalised.double(), (images.double() / 255 - mean) / std, rtol=0, atol=1e-6)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert normalised.is_contiguous(memory_format=memory_format)
    assert torch.equal(images, before)
