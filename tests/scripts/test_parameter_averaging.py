import csv
import hashlib
import re
import signal
import threading
from collections import Counter
from dataclasses import fields, replace

import pytest

from batchens import optimizers
from batchens.grid import run_id
from batchens.results import METRICS, damage, differences
from batchens.run import Cancelled, Folders, Run
from scripts import parameter_averaging
from scripts.parameter_averaging import GRIDS, MATRICES, STARTS, TRAINED, Config, main

SMALL = {"hidden_size": 16, "epochs": 2, "batch_size": 128, "ensemble_size": 2, "threads": 1, "device": "cpu"}
OPTIONS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
METHODS = ("single", "deep_ensemble", "naive_average", "weight_matching", *TRAINED)


def rows_of(path):
    assert damage(path) is None
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run(folder="", **settings):
    """Do a run in this process and return its rows."""
    folders = Folders()
    if folder:
        folders = Folders(folders.data, folder / "runs", folder / "results")
    return rows_of(main(Config(**SMALL | settings), folders))


def find(rows, split, member=""):
    (row,) = (row for row in rows if (row["split"], row["member"]) == (split, str(member)))
    return row


def networks(folder):
    return sorted((folder / "runs" / "parameter_averaging" / "networks").glob("*.pt"))


# settings and grids


def test_a_field_that_a_method_has_no_use_for_makes_no_other_run():
    single = Config(method="single", extra_epochs=7, extra_learning_rate=1, temperature=1, start="matching")
    assert single == Config(method="single", matching="first")
    assert Config(method="fine_tuned_average", start="identity", matching="first") == Config(
        method="fine_tuned_average"
    )
    assert Config(method="weight_matching", matching="first", ensemble_size=2) == Config(
        method="weight_matching", ensemble_size=2
    )
    assert Config(model="cnn", depth=3, hidden_size=7) == Config(model="cnn")
    assert Config(batchnorm="none") == Config() != Config(temperature=1.0)
    assert (
        Config(start="matching", matching="first")
        != Config(start="matching")
        == Config(start="matching", matching="mean")
    )


def test_what_is_not_given_is_the_methods_own():
    rates = {method: Config(method=method).extra_learning_rate for method in METHODS}
    assert {method: rate for method, rate in rates.items() if rate is not None} == {
        "distillation": 0.1,
        "longer": 0.1,
        "fine_tuned_single": 0.1,
        "fine_tuned_average": 0.1,
        "permavg": 0.01,
        "mixing": 0.001,
    }
    assert Config(temperature=1.0).extra_learning_rate == 0.1  # as in the thesis
    extra = {method: Config(method=method, epochs=7).extra_epochs for method in TRAINED}
    assert extra.pop("longer") == 3 * 7 + 7 and set(extra.values()) == {7}
    assert {Config(method=method, epochs=7).extra_epochs for method in METHODS if method not in TRAINED} == {None}
    assert Config().temperature == 0.1 and Config().start == "identity" and Config().matching is None


BASE = Config(model="mlp", start="matching")
OTHERS = {
    "dataset": "fashion_mnist", "model": "cnn", "depth": 2, "hidden_size": 64, "batchnorm": "none", "method": "mixing",
    "ensemble_size": 4, "matching": "first", "start": "identity", "temperature": 1.0, "extra_epochs": 3,
    "extra_learning_rate": 0.2, "optimizer": "adam", "learning_rate": 0.2, "weight_decay": 0, "momentum": 0.8, "epochs": 3,
    "warmup_epochs": 1, "batch_size": 64, "augment": False, "precision": "bf16", "seed": 1, "device": "cpu", "threads": 2,
}  # fmt: skip


def test_every_field_changes_the_id_except_those_that_do_not_decide_the_result():
    assert set(OTHERS) | {"base_weights", "base_digest"} == {field.name for field in fields(Config)}
    same = {name for name, value in OTHERS.items() if run_id(replace(BASE, **{name: value})) == run_id(BASE)}
    assert same == {"device", "threads", "batchnorm"}
    assert run_id(Config(model="cnn", batchnorm="none")) != run_id(Config(model="cnn"))


def test_the_id_of_the_default_run_never_changes():
    assert run_id(Config(extra_learning_rate=0.1)) == "digits-mlp-permavg-m3-identity-0.1-s0-48cd539f"


# of the ids of a grid's runs before it had longer networks and other rates: such runs have been made
IDS = {"demo": "0b6354bd", "thesis": "9f9c6ca0"}


@pytest.mark.parametrize("name", IDS)
def test_the_ids_of_runs_that_were_in_a_grid_never_change(name):
    ids = []
    for config in GRIDS[name]:
        rate = config.learning_rate
        first = {"permavg": 0.1, "mixing": 0.001, "fine_tuned_single": round(0.1 * rate, 12)}.get(config.method, rate)
        if config.method != "longer" and config.extra_learning_rate in (None, first):
            ids.append(run_id(config))
    assert hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:8] == IDS[name]


STUDIES = [name for name in GRIDS if name != "smoke"]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_every_method_on_the_same_networks_with_as_much_extra_training(name):
    configs = GRIDS[name]
    assert len(set(Counter(replace(config, seed=0) for config in configs).values())) == 1
    sizes = {config.ensemble_size for config in configs} - {1}
    if name in ("unaugmented", "deeper"):  # of three; of two the lines between them are measured
        assert {config.method for config in configs if config.ensemble_size == 2} == {"weight_matching"}
        sizes.remove(2)
    assert sizes
    for size in sizes:
        of_size = [config for config in configs if config.ensemble_size == size]
        assert {config.method for config in of_size} == set(METHODS)
        assert {(c.method, c.start) for c in of_size if c.start} == {
            (m, s) for m in STARTS for s in ("identity", "matching")
        }
    for config in configs:
        if config.method in TRAINED:
            networks = config.ensemble_size if config.method == "longer" else 0
            assert config.extra_epochs == (1 + networks) * config.epochs
    many = Counter((replace(c, extra_learning_rate=None)) for c in configs)  # the default of each, so often
    studied = {3} if name in ("thesis", "fashion_mnist", "unaugmented") else {2, 4} if name == "demo" else set()
    for config, count in many.items():
        several = config.ensemble_size in studied and config.method in TRAINED
        assert config in configs and count == (3 if several else 1)


def test_the_thesis_setting_is_among_them():
    mine = GRIDS["fashion_mnist"]
    assert {
        (c.depth, c.hidden_size, c.epochs, c.batch_size, c.learning_rate, c.weight_decay, c.momentum) for c in mine
    } == {(1, 512, 20, 512, 0.1, 1e-5, 0.9)}
    assert {(c.ensemble_size, c.temperature) for c in mine if c.method == "permavg" and c.start == "identity"} == {
        (size, temperature) for size in (2, 3, 5, 8) for temperature in (0.1, 1.0)
    }
    assert {config.seed for config in mine} == set(range(5))
    assert {config.depth for config in GRIDS["deeper"]} == {3}
    assert {config.batchnorm for config in GRIDS["vgg11"]} == {"shared", "none"}


# the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "median"], "median"),
        (["--epochs", "0"], "epochs must be at least 1, however: 0"),
        (["--extra-epochs", "0"], "extra_epochs must be at least 1, however: 0"),
        (["--ensemble-size", "1"], "ensemble_size must be at least 2, however: 1"),
        (["--depth", "0"], "depth must be at least 1, however: 0"),
        (["--learning-rate", "-1"], "learning_rate must be positive and finite, however: -1.0"),
        (["--weight-decay", "inf"], "weight_decay must be finite, however: inf"),
        (["--extra-learning-rate", "0"], "extra_learning_rate must be positive and finite, however: 0"),
        (["--extra-learning-rate", "inf"], "extra_learning_rate must be positive and finite, however: inf"),
        (["--temperature", "0"], "temperature must be between 0.001 and 1000, however: 0"),
        (["--temperature", "nan"], "temperature must be between 0.001 and 1000, however: nan"),
        (["--temperature", "inf"], "temperature must be between 0.001 and 1000, however: inf"),
        (["--warmup-epochs", "20"], "warmup_epochs must be below epochs=20, however: 20"),
        (
            ["--method", "distillation", "--warmup-epochs", "2", "--extra-epochs", "2"],
            "warmup_epochs must be below extra_epochs=2, however: 2",
        ),
        (["--method", "distillation", "--extra-epochs", "0"], "extra_epochs must be at least 1, however: 0"),
        (["--model", "vgg11"], "vgg11 takes images of 28x28 or 32x32, however digits has smaller ones"),
        (["--batch-size", "2000"], "batch_size must be at most the number of training images, however: 2000 > 1257"),
        (
            ["--base-weights", "none.pt", "none.pt", "none.pt"],
            "base_weights must be files that can be read, however: none.pt",
        ),
        (["--base-digest", "0"], "Unrecognized options: --base-digest"),
        (["--base-weights", "none.pt"], "a file for each of ensemble_size=3 networks, however: 1"),
        (["--base-weights", *4 * ["none.pt"]], "a file for each of ensemble_size=3 networks, however: 4"),
        (
            ["--method", "single", "--ensemble-size", "1", "--base-weights", "none.pt", "none.pt"],
            "a file for each of ensemble_size=1 networks, however: 2",
        ),
        (
            ["--method", "longer", "--base-weights", *3 * ["none.pt"]],
            "base_weights must not be given with method longer, which trains a network of its own, however: 3 files",
        ),
        (["--base-weights"], "a file for each of ensemble_size=3 networks, however: 0"),
    ],
)
def test_what_is_not_possible_is_said_and_nothing_is_trained(arguments, message, refused):
    assert message in refused(*arguments)


# what a run measures


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


NETWORK = 64 * 16 + 16 + 16 * 10 + 10


@pytest.mark.parametrize("method", METHODS)
def test_a_run_says_what_it_was_and_what_came_of_it(method, shared, tmp_path, monkeypatch):
    rows = run(shared, method=method, epochs=6, batch_size=64)
    trained, members = method in TRAINED, 2 if method == "deep_ensemble" else 1
    epochs = 0 if not trained else 18 if method == "longer" else 6
    for split in ("validation", "test"):
        last = [row for row in rows if row["split"] == split and row["epoch"] == str(epochs)]
        assert sorted(row["member"] for row in last) == ["", *map(str, range(members))]
    assert float(find(rows, "test")["accuracy"]) > (0.3 if method == "naive_average" else 0.75)
    assert all(0 <= float(find(rows, "test")[name]) for name in ("nll", "brier", "ece"))
    assert {row["epoch"] for row in rows if row["split"] == "train"} == set(map(str, range(1, epochs + 1)))
    assert all(float(row["seconds"]) > 0 for row in rows if row["split"] == "train")
    for row in rows:
        assert row["method"] == method and row["ensemble_size"] == "2"
        assert (float(row["seconds_base"]) > 0) == bool(row["networks_digest"]) == (method != "longer")
        assert int(row["parameters"]) == members * NETWORK
        matrices = method in MATRICES
        assert int(row["parameters_trained"]) == (16 * 16 if matrices else NETWORK if trained else 0)
        assert float(row["inference_images_per_second"]) > 0 and float(row["plain_images_per_second"]) > 0
        assert bool(row["seconds_matching"]) == (method == "weight_matching")
    assert len(find(rows, "reliability")["y"].split()) == 15
    splits = {row["split"] for row in rows} - {"train", "validation", "test", "reliability"}
    expected = {"matrix", "picture", "picture_ordered"} if method in MATRICES else set()
    if method == "permavg":
        expected |= {"validation_projected", "test_projected"}
    if method == "weight_matching":
        expected |= {f"{which}_{metric}" for which in ("line", "matched_line") for metric in ("accuracy", "nll")}
    assert splits == expected
    assert len(networks(shared)) == 2


def test_the_matrices_are_kept_as_numbers_and_pictures():
    rows = run(extra_epochs=1, temperature=1.0, depth=2, ensemble_size=3)
    assert [(row["member"], row["layer"], row["size"]) for row in rows if row["split"] == "matrix"] == [
        ("1", "0", "16"), ("2", "0", "16"), ("1", "1", "16"), ("2", "1", "16"),
    ]  # fmt: skip
    for row in rows:
        if row["split"] == "matrix":
            # rows may not be less than their diagonals but for rounding
            assert 0 < float(row["diagonal"]) <= float(row["row_max"]) + 1e-6 and float(row["row_max"]) <= 1.0001
            assert 0 <= float(row["unique_argmax"]) <= 1 and 0 <= float(row["row_error"]) < 0.01
    picture, ordered = (find(rows, split, 1)["y"].split() for split in ("picture", "picture_ordered"))
    assert len(picture) == 16 * 16 and sorted(picture) == sorted(ordered)
    trace = [sum(float(y[17 * i]) for i in range(16)) for y in (picture, ordered)]
    assert trace[0] <= trace[1]


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_line_goes_from_one_network_to_the_other_and_its_barrier_is_above_the_chord(model):
    rows = run(method="weight_matching", ensemble_size=2, model=model)
    for which in ("line", "matched_line"):
        x, y = ([float(number) for number in find(rows, f"{which}_nll")[name].split()] for name in "xy")
        assert x == pytest.approx([n / 10 for n in range(11)])
        chord = [y[0] + (y[-1] - y[0]) * share for share in x]
        barrier = float(find(rows, f"{which}_nll")["barrier"])
        assert barrier == pytest.approx(max(a - b for a, b in zip(y, chord, strict=True)), abs=1e-4)
        y = [float(number) for number in find(rows, f"{which}_accuracy")["y"].split()]
        chord = [y[0] + (y[-1] - y[0]) * share for share in x]
        barrier = float(find(rows, f"{which}_accuracy")["barrier"])
        assert barrier == pytest.approx(max(b - a for a, b in zip(y, chord, strict=True)), abs=1e-4)
    assert find(rows, "line_nll")["y"].split()[0] == find(rows, "matched_line_nll")["y"].split()[0]
    assert float(find(rows, "line_accuracy")["barrier"]) > 0.01  # what is lost is positive
    middle = float(find(rows, "matched_line_accuracy")["y"].split()[5])
    assert middle == pytest.approx(float(find(rows, "test")["accuracy"]), abs=1e-4)


def test_with_batchnorm_there_is_what_stale_statistics_do():
    rows = run(method="naive_average", model="cnn")
    assert {row["split"] for row in rows} == {
        "validation", "test", "validation_stale", "test_stale", "reliability",
    }  # fmt: skip
    assert float(find(rows, "test_stale")["nll"]) != float(find(rows, "test")["nll"])


def kept(folder):
    """The networks that a run has trained, and its images."""
    from batchens.data import images as data

    found = [fresh() for _ in networks(folder)]
    for network, path in zip(found, networks(folder), strict=True):
        assert parameter_averaging.load_network(network, path)
    return found, data.load("digits", Folders().data, "cpu")


def nll_of(network, images, split="test"):
    from batchens.metrics import measure
    from batchens.training import predict

    return measure(predict(network, images, split, 1), getattr(images, split).labels)[-1]["nll"]


def test_statistics_are_estimated_on_images_as_networks_are_given_them(tmp_path, monkeypatch):
    """Normalised, and augmented where they are: so those of one network hardly change."""
    import copy

    import torch

    from batchens.averaging import average, reestimate
    from batchens.data.catalog import DATASETS

    monkeypatch.setitem(DATASETS, "digits", replace(DATASETS["digits"], padding=2))
    rows = run(method="naive_average", model="cnn", epochs=4, learning_rate=0.02)
    monkeypatch.setitem(SMALL, "model", "cnn")
    found, images = kept(tmp_path)
    config = Config(**SMALL | {"method": "naive_average"})

    def reestimated(network, **settings):
        network = copy.deepcopy(network)
        reestimate(network, parameter_averaging.some_of(replace(config, **settings), images))
        return network

    assert float(find(rows, "test")["nll"]) == pytest.approx(nll_of(reestimated(average(found)), images), rel=1e-4)
    for network in found:
        own, same, other = (
            one.state_dict()["1.running_var"]
            for one in (network, reestimated(network), reestimated(network, augment=False))
        )
        assert 5 * (same - own).norm() < (other - own).norm()
    clean = next(parameter_averaging.some_of(replace(config, augment=False), images))
    mean, std = images.mean[0], images.std[0]
    torch.testing.assert_close(clean, (images.train.images[:500] / 255 - mean) / std, check_stride=False)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_what_is_projected_is_the_average_of_the_matched_networks_in_the_nearest_order(model, tmp_path, monkeypatch):
    import torch

    from batchens.averaging import average, match, permute, reestimate

    def nll(networks, order, split):
        network = average(networks, order)
        reestimate(network, parameter_averaging.some_of(Config(**SMALL), images))
        return pytest.approx(nll_of(network, images, split), rel=1e-4)

    monkeypatch.setitem(SMALL, "model", model)
    models, matrix_rows = [], parameter_averaging.matrix_rows
    monkeypatch.setattr(parameter_averaging, "matrix_rows", lambda *a, **o: models.append(a[0]) or matrix_rows(*a, **o))
    rows = run(start="matching", temperature=1.0, extra_learning_rate=1.0, extra_epochs=3)
    found, images = kept(tmp_path)
    matched = [permute(n, p) for n, p in zip(found, match(found, "mean"), strict=True)]
    order = models[0].project()
    assert not torch.equal(order[1][0], torch.arange(len(order[1][0])))
    for split in ("validation", "test"):
        measured = float(find(rows, f"{split}_projected")["nll"])
        assert measured == nll(matched, order, split)
        assert measured != nll(found, order, split)


def test_a_student_learns_half_from_the_labels_and_half_from_its_softened_teachers():
    import torch

    from batchens.models.cnn import cnn

    teachers, x, labels = [cnn(5, 1, 8) for _ in range(3)], torch.randn(6, 1, 8, 8), torch.arange(6) % 5
    logits = torch.randn(6, 5)
    for teacher in teachers:
        teacher(x)  # in training, of which BatchNorm gathers statistics
        teacher.eval()
    soft = sum((teacher(x) / 3).exp() / (teacher(x) / 3).exp().sum(1, keepdim=True) for teacher in teachers) / 3
    student = (logits / 3).exp() / (logits / 3).exp().sum(1, keepdim=True)
    kl = (soft * (soft.log() - student.log())).sum() / 6
    of_labels = -(logits[range(6), labels] - logits.exp().sum(1).log()).mean()
    for teacher in teachers:
        teacher.train()
    objective = parameter_averaging.distillation(teachers, torch.float32)
    torch.testing.assert_close(objective(x, logits, labels), (0.5 * 9 * kl + 0.5 * of_labels).detach())


def test_matching_with_the_first_is_not_matching_with_the_mean():
    first, mean = (run(method="weight_matching", ensemble_size=3, matching=to) for to in ("first", "mean"))
    assert find(first, "test")["nll"] != find(mean, "test")["nll"]
    assert first[0]["networks_digest"] == mean[0]["networks_digest"]


def test_the_longer_network_is_the_first_one_with_more_epochs(tmp_path):
    rows = run(method="longer", extra_epochs=2)
    assert not networks(tmp_path)
    single = run(method="single", ensemble_size=1)
    for name in METRICS:
        assert find(rows, "test")[name] == find(single, "test")[name]
    with_warmup = run(method="longer", extra_epochs=2, warmup_epochs=1)
    assert find(with_warmup, "test")["nll"] != find(rows, "test")["nll"]
    assert (
        find(with_warmup, "test")["nll"] == find(run(method="single", warmup_epochs=1, ensemble_size=1), "test")["nll"]
    )


@pytest.mark.parametrize("method", TRAINED)
def test_what_is_trained_as_a_network_warms_up_as_networks_do(method, monkeypatch):
    """Convolutional networks from a new start, the student among them, hardly learn without it."""
    from batchens import training

    warmups = []

    def fit(*args, **options):
        warmups.append(options["warmup_epochs"])
        return original(*args, **options)

    original = training.fit
    monkeypatch.setattr(training, "fit", fit)
    run(method=method, warmup_epochs=1)
    networks_warm_up = [] if method == "longer" else [1, 1]
    assert warmups == [*networks_warm_up, 0 if method in MATRICES else 1]


def test_the_best_network_is_chosen_on_validation_images():
    single = [run(method="single", ensemble_size=size) for size in (1, 2)]
    deep = run(method="deep_ensemble")
    accuracy = {m: float(find(deep, "validation", m)["accuracy"]) for m in (0, 1)}
    nll = {m: float(find(deep, "validation", m)["nll"]) for m in (0, 1)}
    best = max((0, 1), key=lambda m: (accuracy[m], -nll[m]))
    assert find(single[0], "test")["nll"] == find(deep, "test", 0)["nll"]
    assert find(single[1], "test")["nll"] == find(deep, "test", best)["nll"]


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_run_begins_with_what_it_is_trained_from(model, monkeypatch):
    monkeypatch.setitem(SMALL, "model", model)

    def first(rows):
        return next(row for row in rows if (row["split"], row["epoch"], row["member"]) == ("validation", "0", ""))[
            "nll"
        ]

    assert first(run(method="fine_tuned_average", extra_epochs=1)) == first(run(method="naive_average"))
    assert first(run(method="fine_tuned_single", extra_epochs=1)) == first(run(method="single"))
    matched = first(run(method="weight_matching"))
    assert first(run(method="fine_tuned_average", start="matching", extra_epochs=1)) == matched
    free = float(first(run(method="mixing", start="matching", extra_epochs=1)))
    assert free == pytest.approx(float(matched), rel=1e-4)


# the networks


def test_a_network_is_trained_once_for_all_runs(monkeypatch, tmp_path):
    trained, train_network = [], parameter_averaging.train_network
    monkeypatch.setattr(parameter_averaging, "train_network", lambda *a: trained.append(a[3]) or train_network(*a))
    one, two = run(method="naive_average"), run(method="weight_matching")
    assert trained == [0, 1]
    assert {row["seconds_base"] for row in one} == {row["seconds_base"] for row in two}
    run(method="naive_average", ensemble_size=3)
    assert trained == [0, 1, 2]
    run(method="naive_average", seed=1)
    run(method="naive_average", learning_rate=0.05)
    assert trained == [0, 1, 2, 0, 1, 0, 1]
    assert len(networks(tmp_path)) == 7
    assert not list(tmp_path.rglob("*.checkpoint"))


def test_networks_of_a_seed_differ_in_their_weights_and_in_the_order_of_their_images(monkeypatch):
    from batchens import training

    given, fit = [], training.fit
    monkeypatch.setattr(training, "fit", lambda *a, **o: given.append(o["seed"]) or fit(*a, **o))
    run(seed=3, method="distillation", extra_epochs=1)
    assert given == [3000, 3001, 3999]


@pytest.mark.parametrize("harm", ["cut", "changed", "empty", "other"])
def test_a_damaged_network_is_trained_again(harm, tmp_path, capsys):
    import torch

    before = run(method="deep_ensemble")
    path = networks(tmp_path)[0]
    content = path.read_bytes()
    if harm == "other":
        torch.save({"weights": {}}, path)
    elif harm == "changed":  # a few bits of the weights
        at = content.index(b"data/0") + 2000
        path.write_bytes(content[:at] + bytes(255 - byte for byte in content[at : at + 8]) + content[at + 8 :])
    else:
        path.write_bytes(content[: {"cut": -300, "empty": 0}[harm]])
    after = run(tmp_path / "again", method="deep_ensemble")  # with networks of its own
    (tmp_path / "results").rename(tmp_path / "before")
    repeated = run(method="deep_ensemble")
    assert "is trained again" in capsys.readouterr().out
    assert set(differences(repeated, before).values()) == set(differences(after, before).values()) == {0.0}
    assert parameter_averaging.load_network(fresh(), path) is not None
    aside = path.with_name(f"{path.name}.damaged1")
    assert aside.exists() and aside.read_bytes() != content
    path.write_bytes(b"")
    assert parameter_averaging.load_network(fresh(), path) is None
    assert not path.exists() and path.with_name(f"{path.name}.damaged2").read_bytes() == b""


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_network_that_cannot_be_read_now_is_neither_trained_again_nor_moved(error, tmp_path, monkeypatch):
    import torch

    run(method="deep_ensemble")
    path = networks(tmp_path)[0]
    content = path.read_bytes()

    def failing(*arguments, **options):
        raise error

    for name, place in (("read_bytes", type(path)), ("load", torch)):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, failing)
            with pytest.raises(type(error)):
                parameter_averaging.load_network(fresh(), path)
    assert path.read_bytes() == content and [p.name for p in path.parent.glob(f"{path.name}*")] == [path.name]


def test_a_result_says_which_networks_it_is_of_and_by_what_they_were_trained(tmp_path, monkeypatch):
    import torch

    import batchens.results

    by = {"commit": "c0ffee", "dirty": False}
    monkeypatch.setattr(batchens.results, "code_version", lambda: tuple(by.values()))
    one, other = run(method="naive_average"), run(method="deep_ensemble")
    assert len(one[0]["networks_digest"]) == 16 and one[0]["networks_digest"] == other[0]["networks_digest"]
    assert {row["networks_commit"] for row in one + other} == {"c0ffee"}
    assert {row["networks_device"] for row in one + other} == {one[0]["device_name"]} != {""}
    saved = torch.load(networks(tmp_path)[0], weights_only=True)
    assert {name: saved[name] for name in ("commit", "dirty", "torch", "device_name", "number_format")} == {
        **by, "torch": one[0]["torch"], "device_name": one[0]["device_name"], "number_format": "float32",
    }  # fmt: skip
    by |= {"dirty": True}
    more = run(method="deep_ensemble", ensemble_size=3)
    assert {row["networks_commit"] for row in more} == {"c0ffee + c0ffee-dirty"}
    assert more[0]["networks_digest"] != one[0]["networks_digest"]
    for path in networks(tmp_path)[:2]:  # as they were before they said by what they were made
        saved = torch.load(path, weights_only=True)
        torch.save({name: saved[name] for name in ("weights", "digest", "seconds")}, path)
    old = run(method="weight_matching")
    assert (old[0]["networks_commit"], old[0]["networks_device"]) == ("", "")
    assert old[0]["networks_digest"] == one[0]["networks_digest"] and old[0]["seconds_base"] == one[0]["seconds_base"]
    mixed = run(method="naive_average", ensemble_size=3)
    assert mixed[0]["networks_commit"] == "c0ffee-dirty + not known"


def test_a_network_that_was_gone_on_with_by_other_code_says_so(stopped, tmp_path, monkeypatch):
    import batchens.results

    monkeypatch.setattr(batchens.results, "code_version", lambda: ("c0ffee", False))
    stopped(*OPTIONS, "--method", "naive_average")
    monkeypatch.setattr(batchens.results, "code_version", lambda: ("decade", False))
    rows = run(method="naive_average")
    assert {row["networks_commit"] for row in rows} == {"c0ffee + decade"}
    assert {path.suffix for path in networks(tmp_path)[0].parent.iterdir()} <= {".pt", ".lock"}


def test_a_full_disk_is_told_as_such_and_the_network_goes_on_from_its_checkpoint(command, tmp_path, monkeypatch):
    import torch

    save = torch.save

    def full(content, path):
        if "weights" in content:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
        save(content, path)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        code, said = command(*OPTIONS, "--method", "naive_average")
    assert code == 1 and "free some space, then the same command goes on" in said
    assert len(list(tmp_path.rglob("*.checkpoint"))) == 1 and not networks(tmp_path)
    assert run(method="naive_average") and len(networks(tmp_path)) == 2


@pytest.mark.parametrize("content", [b"", b"another"])
def test_a_checkpoint_that_cannot_be_gone_on_from_is_put_aside_and_its_network_begun_again(content, tmp_path, capsys):
    folder = tmp_path / "runs" / "parameter_averaging" / "networks"
    folder.mkdir(parents=True)
    name = parameter_averaging.network_name(Config(**SMALL), 1, "scikit-learn digits")
    (folder / f"{name}.checkpoint").write_bytes(content)
    rows = run(method="deep_ensemble")
    said = [line for line in capsys.readouterr().out.splitlines() if "from its beginning" in line]
    assert len(said) == 1 and f"{name}.checkpoint can't be gone on from (kept as {name}.checkpoint.damaged1)" in said[0]
    assert (folder / f"{name}.checkpoint.damaged1").read_bytes() == content
    undisturbed = run(tmp_path / "other", method="deep_ensemble")
    assert set(differences(rows, undisturbed).values()) == {0.0}


def test_a_checkpoint_of_another_kind_of_state_leaves_nothing_in_the_network(tmp_path):
    import torch

    folder = tmp_path / "runs" / "parameter_averaging" / "networks"
    folder.mkdir(parents=True)
    name = parameter_averaging.network_name(Config(**SMALL), 0, "scikit-learn digits")
    other = parameter_averaging.build(Config(**SMALL), (1, 8, 8), 10, 77)
    torch.save({"model": other.state_dict(), "optimizer": {}}, folder / f"{name}.checkpoint")  # read in part
    rows, undisturbed = run(method="naive_average"), run(tmp_path / "other", method="naive_average")
    assert set(differences(rows, undisturbed).values()) == {0.0}


def test_another_reason_not_to_train_a_network_is_no_reason_to_move_its_checkpoint(tmp_path, monkeypatch):
    from batchens import training

    def failing(*arguments, checkpoint, **options):
        checkpoint.touch()
        raise ValueError("another reason")

    monkeypatch.setattr(training, "fit", failing)
    with pytest.raises(ValueError, match="another reason"):
        run(method="naive_average")
    assert len(list(tmp_path.rglob("*.checkpoint*"))) == 1


def fresh():
    return parameter_averaging.build(Config(**SMALL), (1, 8, 8), 10, 0)


def test_of_two_runs_that_want_the_same_networks_each_takes_a_free_one_and_waits_for_the_other(
    tmp_path, monkeypatch, capsys
):
    from filelock import FileLock

    folders = Folders()
    config = Config(**SMALL, method="deep_ensemble")
    name = parameter_averaging.network_name(config, 0, "scikit-learn digits")
    lock = folders.runs / "parameter_averaging" / "networks" / f"{name}.lock"
    lock.parent.mkdir(parents=True)
    held, waiting = FileLock(lock, thread_local=False), threading.Event()
    monkeypatch.setattr(parameter_averaging.time, "sleep", lambda seconds: waiting.set())
    held.acquire()
    seen = []

    def release():
        assert waiting.wait(60)
        seen.extend(path.name.rsplit("-", 1)[0] for path in networks(tmp_path))
        held.release()

    other = threading.Thread(target=release)
    other.start()
    main(config, folders)
    other.join()
    assert seen == ["digits-mlp-1"]  # the second network while the first was held
    said = [line for line in capsys.readouterr().out.splitlines() if "waits for" in line]
    assert len(said) == 1 and said[0].endswith(f"waits for networks that other runs train: {name}")
    assert len(networks(tmp_path)) == 2


def test_a_run_that_waits_for_others_can_be_cancelled(monkeypatch):
    from filelock import FileLock

    config = Config(**SMALL, method="naive_average")
    own = Run("parameter_averaging", config, Folders())
    folder = own.folders.runs / "parameter_averaging" / "networks"
    folder.mkdir(parents=True)
    names = [parameter_averaging.network_name(config, member, "scikit-learn digits") for member in (0, 1)]
    locks = [FileLock(folder / f"{name}.lock") for name in names]
    for lock in locks:
        lock.acquire()
    monkeypatch.setattr(parameter_averaging.time, "sleep", lambda seconds: own.cancelled.touch())
    with pytest.raises(Cancelled):
        main(config, own.folders)
    for lock in locks:
        lock.release()


def test_a_run_that_waits_makes_progress_when_the_network_does_that_it_waits_for(monkeypatch):
    """So that at its time limit its job is requeued (see jobs.element)."""
    from filelock import FileLock

    config = Config(**SMALL, method="single")
    own = Run("parameter_averaging", config, Folders())
    folder = own.folders.runs / "parameter_averaging" / "networks"
    folder.mkdir(parents=True)
    name = parameter_averaging.network_name(config, 0, "scikit-learn digits")
    lock, checkpoint, seen = FileLock(folder / f"{name}.lock"), folder / f"{name}.checkpoint", []
    other = FileLock(folder / f"{parameter_averaging.network_name(config, 1, 'scikit-learn digits')}.lock")

    def sleep(seconds):
        seen.append(own.progress.exists())
        if len(seen) == 2:
            checkpoint.touch()
        if len(seen) == 3:
            own.cancelled.touch()

    monkeypatch.setattr(parameter_averaging.time, "sleep", sleep)
    with lock, other, pytest.raises(Cancelled):
        main(config, own.folders)
    assert seen == [False, False, True]


# interruptions


@pytest.mark.parametrize(
    ("method", "at"),
    [("permavg", 14), ("permavg", 48), ("distillation", 48), ("fine_tuned_average", 48)],
)  # of 9 steps an epoch and 3 epochs a network: in the second of the first network, in the third of the extra ones
def test_a_run_stopped_in_mid_epoch_and_gone_on_with_ends_as_one_that_was_not(
    method, at, stopped, command, tmp_path, monkeypatch
):
    options = (*OPTIONS, "--method", method, "--epochs", 3)
    own = Run("parameter_averaging", Config(**SMALL | {"method": method, "epochs": 3}), Folders())
    step, steps = optimizers.step, []
    stopped(*options, at=at + (27 if at > 27 else 0))
    assert own.checkpoint.exists() == (at > 27) and len(list(tmp_path.rglob("*.checkpoint"))) == (at < 27)
    with monkeypatch.context() as patched:
        patched.setattr(optimizers, "step", lambda *a: steps.append(1) or step(*a))
        assert command(*options)[0] == 0
    assert len(steps) == 81 - (9 if at < 27 else 72)  # whole epochs are not repeated
    assert list(own.folder.iterdir()) == [] and not list(tmp_path.rglob("*.checkpoint"))
    resumed = rows_of(own.result)
    uninterrupted = run(tmp_path / "other", method=method, epochs=3)
    names = ("epoch", "split", "member", "x", "y", "row_max", *METRICS)
    assert [[row[name] for name in names] for row in resumed] == [
        [row[name] for name in names] for row in uninterrupted
    ]
    assert command(*options) == (0, "")  # done before


def test_a_killed_run_leaves_its_network_to_others(paused, tmp_path):
    killed = paused(*OPTIONS, "--method", "deep_ensemble")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(list(tmp_path.rglob("*.checkpoint"))) == 1 and networks(tmp_path) == []
    gone_on, undisturbed = run(method="naive_average"), run(tmp_path / "other", method="naive_average")
    assert set(differences(gone_on, undisturbed).values()) == {0.0}


# networks that others trained


@pytest.fixture
def files(tmp_path):
    import torch

    def make(count=2, width=16, folder="theirs"):
        (tmp_path / folder).mkdir(exist_ok=True)
        paths = [tmp_path / folder / f"{m}.pt" for m in range(count)]
        for m, path in enumerate(paths):
            network = parameter_averaging.build(Config(**SMALL | {"hidden_size": width}), (1, 8, 8), 10, m)
            torch.save({f"their.{key}": tensor for key, tensor in network.state_dict().items()}, path)
        return paths

    return make


def test_networks_of_others_are_read_and_their_content_names_the_run(files, command, tmp_path):
    first, second = files()
    config = Config(**SMALL | {"base_weights": (first, second), "method": "weight_matching"})
    assert config.epochs == 0 and replace(config, warmup_epochs=2).warmup_epochs == 0
    assert replace(config, method="distillation", warmup_epochs=2).warmup_epochs == 2
    for many, most in ((20, "below extra_epochs=20"), (-1, "at least 0"), (float("nan"), "at least 0")):
        with pytest.raises(ValueError, match=f"warmup_epochs must be {most}"):
            replace(config, method="distillation", warmup_epochs=many)
    rows = rows_of(main(config, Folders()))
    assert {row["base_digest"] for row in rows} == {config.base_digest} and len(config.base_digest) == 64
    assert {row["seconds_base"] for row in rows} == {""} and not networks(tmp_path)
    assert {(row["networks_commit"], row["networks_device"]) for row in rows} == {("", "")}
    assert len(rows[0]["networks_digest"]) == 16
    assert re.fullmatch(r"0\.pt [0-9a-f]{8} \+ 1\.pt [0-9a-f]{8}", rows[0]["networks_files"])
    other = Config(**SMALL | {"base_weights": (second, first), "method": "weight_matching"})
    assert rows_of(main(other, Folders()))[0]["networks_digest"] != rows[0]["networks_digest"]
    copies = tuple(path.with_name(f"copy{number}") for number, path in enumerate((first, second)))
    for path, copy in zip((first, second), copies, strict=True):
        copy.write_bytes(path.read_bytes())
    assert run_id(replace(config, base_weights=copies)) == run_id(config)
    assert run_id(replace(config, base_weights=(second, first))) != run_id(config)
    assert run_id(replace(config, base_weights=(first, second), epochs=9)) == run_id(config)
    with pytest.raises(ValueError, match="a file for each of ensemble_size=2 networks, however: 3"):
        replace(config, base_weights=(first, second, first))
    code, _ = command(*OPTIONS, "--method", "permavg", "--extra-epochs", 1, "--base-weights", first, second)
    assert code == 0


def test_files_that_do_not_fit_are_refused_before_any_training(files, refused):
    import torch

    first, second = files()
    narrow = files(1, 8, "narrow")[0]
    second.write_bytes(second.read_bytes()[:-100])
    copied = first.with_name("copy.pt")
    copied.write_bytes(first.read_bytes())
    for path, message in (
        (copied, f"base_weights must be of different networks, however {copied} is what {first} is"),
        (narrow, "their.1.weight is 8 x 64 where 1.weight is 16 x 64"),
        (second, "must be a state_dict"),
    ):
        said = refused(*OPTIONS, "--base-weights", first, path)
        assert message in said and str(path) in said
    again = first.with_name("again.pt")
    torch.save({name: t.clone() for name, t in torch.load(first).items()} | {"more": torch.tensor(3)}, again)
    assert f"{again} holds the weights of {first}" in refused(*OPTIONS, "--base-weights", first, again)
