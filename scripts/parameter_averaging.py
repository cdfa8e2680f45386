"""Averaging networks in parameter space: can several networks become one that is better than each, and what does it take?

Networks trained alike from different points (their seeds) are made into one by permuting hidden units and averaging weights:
not at all (naive average), by matching weights, or by matrices learned from the labels (PermAVG). Beside them stand what they
must be compared with: the best of the networks (on validation), the deep ensemble, its distillation into a new network, and,
trained for as many epochs as PermAVG trains its matrices, the best network, the averages and a free mixing matrix; and a new
network, trained for as many epochs as all of PermAVG's, the networks' included. The networks are trained once, kept in
runs/parameter_averaging/networks and shared by all runs, or are read from files (--base-weights): state_dicts of networks that
are trained already, of any names, in order, which are given images normalised as ours. Each run writes
results/parameter_averaging/<run_id>.csv.

Nothing is chosen on the test set, though it is read more than once: by each network at the end of its training, which is not
kept; by what is made of them, at the end, and in its other forms (see below); and at the 22 points of the lines between two.

    on a cluster     python -m jobs submit parameter_averaging --grid fashion_mnist --cluster NAME
    on a laptop      python -m jobs submit parameter_averaging --grid demo --cluster local
    one run again    python -m jobs run parameter_averaging RUN
    one of your own  python -m scripts.parameter_averaging --dataset fashion_mnist --method permavg --ensemble-size 3
    others' networks python -m scripts.parameter_averaging --method weight_matching --ensemble-size 2 --base-weights A.pt B.pt
    the figures      python -m plots parameter_averaging

A run of the demo takes a second. On one CPU core a network of Fashion-MNIST trains in about a minute, and the matrices of
three in a few; VGG11 belongs on a GPU.

The rows: none of the networks' own epochs. Epoch 0 is what a run starts from; untrained methods have only that. Each says
which networks it is of: `networks_digest`, of their weights, and what they were trained by, `networks_commit` (-dirty: with
changes) and `networks_device`, joined by + where they differ, empty where it is not known, as of files; of those there are
the names, with digests of their weights, in `networks_files`. Splits:

    train, validation, test   as everywhere; `seconds` are of an epoch of extra training
    .._stale                  BatchNorm's statistics averaged like weights; of averages and projections that nothing is trained
                              of they are estimated anew, on the first 10,000 training images, augmented as in training
    .._projected              PermAVG's network with the permutation nearest to each matrix in its place, not trained any more
    reliability               x, y and n as everywhere
    matrix                    of a member's hidden `layer`, of `size` units: means of the `diagonal` and of each row's largest
                              entry (`row_max`); `unique_argmax`, the share of rows whose largest entry is in a column that is
                              no other row's. PermAVG's columns sum to 1, its rows nearly, after at most 100 normalisations:
                              `row_error` says how nearly, the largest error of a row's sum; free matrices need not sum to 1
    picture, picture_ordered  seed 0, member 1, layer 0: the first 64 x 64 entries (y) row by row; columns in the order of the
                              nearest permutation
    line_.., matched_line_..  weight_matching of two: test accuracy and nll (y) along the line between the networks (x), as they
                              are and matched; `barrier` is by how much it gets worse than on the straight line of its ends
"""

import hashlib
import io
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from batchens.data.catalog import DatasetName
from batchens.grid import grid, unique
from batchens.results import CURVE, METRICS, numbers
from batchens.run import Cancelled, Folders, Run, attempts, code_of, command_line
from batchens.settings import check

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from batchens.data.images import Images

MATRICES = ("permavg", "mixing")
TRAINED = ("distillation", "longer", "fine_tuned_single", "fine_tuned_average", *MATRICES)
STARTS = ("fine_tuned_average", *MATRICES)  # methods that can start from matched networks
STUDENT_SHARE, STUDENT_TEMPERATURE = 0.5, 3.0  # of the teacher in the student's loss
STATISTICS_IMAGES = 10_000  # that BatchNorm's statistics are estimated on
LINE_POINTS, PICTURE = 11, 64


@dataclass(frozen=True)
class Config:
    """What one run makes of which networks. A field that the method has no use for takes its neutral value."""

    dataset: DatasetName = "digits"
    """images to learn; digits are bundled, the others are downloaded once"""
    model: Literal["mlp", "cnn", "vgg11"] = "mlp"
    """mlp: hidden layers of one width; cnn: two convolutions; vgg11: eight and one hidden layer"""
    depth: int | None = None
    """hidden layers of the mlp; 1 if not given"""
    hidden_size: int | None = None
    """units in each of them; 512 if not given"""
    batchnorm: Literal["shared", "none"] = "shared"
    """with BatchNorm after each convolution, or without; the mlp has none"""
    method: Literal[
        "single", "deep_ensemble", "distillation", "naive_average", "weight_matching", "permavg", "mixing",
        "fine_tuned_single", "fine_tuned_average", "longer",
    ] = "permavg"  # fmt: skip
    """best network; mean of probabilities; a student; averages; learned matrices, free ones; trained on; one trained longer"""
    ensemble_size: int = 3
    """number of networks"""
    matching: Literal["mean", "first"] | None = None
    """what each network is matched with: the mean of the others, or the first network; the mean if not given"""
    start: Literal["identity", "matching"] | None = None
    """whether what is trained starts from the networks as they are or matched; as they are if not given"""
    temperature: float | None = None
    """of PermAVG's matrices; at 0.1, if not given, they start near the identity, at 1 (the thesis') as almost uniform"""
    extra_epochs: int | None = None
    """of what is trained from networks; as many as theirs if not given, for files 20; longer: ensemble_size + 1 times theirs"""
    extra_learning_rate: float | None = None
    """of that training; of matrices Adam's: PermAVG's a tenth of the temperature, mixing's 0.001; of networks: as theirs"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """of the networks, and of training them on: SGD with Nesterov momentum, or AdamW"""
    learning_rate: float = 0.1
    """of the networks, peak, after the warm-up; a cosine takes it to 0 at the end"""
    weight_decay: float = 1e-5
    """on slow weights only"""
    momentum: float = 0.9
    """of SGD; beta1 of Adam"""
    epochs: int = 20
    """passes over the training images of each network; 0 where they are read from files"""
    warmup_epochs: float = 0.0
    """epochs in which the learning rate rises linearly, of whatever is trained as a network; of matrices it does not"""
    batch_size: int = 512
    """images in each step"""
    augment: bool = True
    """random crops and flips, where the data set allows them"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of forward passes; auto: bf16 on a GPU that has it, else fp16, fp32 on a CPU"""
    seed: int = 0
    """of the networks' initial weights, the orders of the images and their augmentation"""
    base_weights: tuple[Path, ...] | None = None
    """a state_dict for each network, in order; images are normalised with the suite's mean and std of the data set"""
    base_digest: str = field(default="", init=False)
    """the SHA-256 of these files, in place of their names"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch"""

    NAMED: ClassVar[tuple[str, ...]] = (
        "dataset", "model", "method", "ensemble_size", "matching", "start", "temperature", "seed",
    )  # fmt: skip
    INCIDENTAL: ClassVar[tuple[str, ...]] = ("base_weights", "device", "threads")

    def __post_init__(self) -> None:
        def settle(name: str, used: bool, otherwise: object, unused: object = None) -> None:
            value = getattr(self, name)
            object.__setattr__(self, name, (otherwise if value is None else value) if used else unused)

        least = {"ensemble_size": 1 if self.method == "single" else 2}
        if self.base_weights is not None:
            if self.method == "longer":
                raise ValueError(
                    "base_weights must not be given with method longer, which trains a network of its own, however: "
                    f"{len(self.base_weights)} files"
                )
            if len(self.base_weights) != self.ensemble_size:
                raise ValueError(
                    f"base_weights must be a file for each of ensemble_size={self.ensemble_size} networks, however: "
                    f"{len(self.base_weights)}"
                )
            settle("base_digest", True, "")
            object.__setattr__(self, "base_digest", digest_of(self.base_weights))
        mlp, trained = self.model == "mlp", self.method in TRAINED
        settle("depth", mlp, 1)
        settle("hidden_size", mlp, 512)
        settle("batchnorm", not mlp, "shared", "none")
        settle("start", self.method in STARTS, "identity")
        matched = self.method == "weight_matching" or self.start == "matching"
        settle("matching", matched, "mean")
        if matched and self.ensemble_size == 2:
            settle("matching", False, None, "mean")  # the mean of the others is the first
        settle("temperature", self.method == "permavg", 0.1)
        budget = (self.ensemble_size + 1 if self.method == "longer" else 1) * self.epochs
        settle("extra_epochs", trained, budget or 20)
        # at T = 1 the thesis' 0.1, and at every T steps of one size in the exponent: on Fashion-MNIST with T = 0.1 from
        # matched, validation (3 networks, seed 0) has 86.8 % at 0.01 and 86.3 at 0.1
        rate = {"permavg": 0.1 * (self.temperature or 0), "mixing": 0.001}.get(self.method, self.learning_rate)
        settle("extra_learning_rate", trained, round(rate, 12))
        as_network = trained and self.method not in MATRICES
        if self.base_weights:
            settle("epochs", False, None, 0)
            settle("warmup_epochs", as_network, 0.0, 0.0)
        # networks from files have no epochs that could limit the warm-up; extra_epochs do, below
        from_files = {"epochs": 1, "warmup_epochs": min(self.warmup_epochs, 0.0)}
        check(SimpleNamespace(**vars(self) | (from_files if self.base_weights else {})))
        least |= {"depth": 1, "hidden_size": 1, "seed": 0} | ({"extra_epochs": 1} if trained else {})
        for name, value in least.items():
            if not (getattr(self, name) is None or getattr(self, name) >= value):
                raise ValueError(f"{name} must be at least {value}, however: {getattr(self, name)}")
        if as_network and not self.warmup_epochs < (self.extra_epochs or 0):
            raise ValueError(
                f"warmup_epochs must be below extra_epochs={self.extra_epochs}, however: {self.warmup_epochs}"
            )
        if self.temperature is not None and not 0.001 <= self.temperature <= 1000:
            raise ValueError(f"temperature must be between 0.001 and 1000, however: {self.temperature}")
        if self.extra_learning_rate is not None and not 0 < self.extra_learning_rate < math.inf:
            raise ValueError(f"extra_learning_rate must be positive and finite, however: {self.extra_learning_rate}")


def digest_of(files: Sequence[Path]) -> str:
    known: dict[bytes, Path] = {}
    for path in files:
        try:
            digest = hashlib.sha256(Path(path).read_bytes()).digest()
        except OSError as error:
            raise ValueError(
                f"base_weights must be files that can be read, however: {path}: {error.strerror}"
            ) from error
        if digest in known:
            raise ValueError(f"base_weights must be of different networks, however {path} is what {known[digest]} is")
        known[digest] = path
    return hashlib.sha256(b"".join(known)).hexdigest()


def study(
    base: Config, sizes: Sequence[int], seeds: range, temperatures: Sequence[float] = (0.1,), rates: bool = False
) -> list[Config]:
    """Return every method on the same networks, those of few and of one seed first; its other settings are defaults.

    With `rates`, what is trained has two others beside its default one, a lower and a higher, to be chosen from on validation.
    """
    base = replace(base, method="single", ensemble_size=1)

    def of(**axes: Any) -> list[Config]:
        return grid(base, ensemble_size=sizes, seed=seeds, **axes)

    def times(*shares: float) -> list[float]:
        return [round(share * base.learning_rate, 12) for share in shares]

    starts = ["identity", "matching"]
    every = [
        *grid(base, method=["single"], ensemble_size=[1, *sizes], seed=seeds),
        *of(method=["deep_ensemble", "naive_average"]),
        *of(method=["weight_matching"], matching=["mean", "first"]),
        *of(method=["distillation", "fine_tuned_single", "longer"]),
        *of(method=["fine_tuned_average", "mixing"], start=starts),
        *of(method=["permavg"], start=starts, temperature=[0.1]),
        *of(method=["permavg"], temperature=temperatures),
    ]
    if rates:
        every += [
            *of(method=["distillation", "longer"], extra_learning_rate=times(0.3, 3.0)),
            *of(method=["fine_tuned_single"], extra_learning_rate=times(0.1, 3.0)),
            *of(method=["fine_tuned_average"], start=starts, extra_learning_rate=times(0.3, 3.0)),
            *of(method=["mixing"], start=starts, extra_learning_rate=[0.0003, 0.01]),
            *of(method=["permavg"], start=starts, temperature=[0.1], extra_learning_rate=[0.003, 0.1]),
            *of(method=["permavg"], temperature=[t for t in temperatures if t == 1], extra_learning_rate=[0.03, 0.3]),
        ]
    return sorted(unique(every), key=lambda config: (config.ensemble_size, config.seed))


def pairs(base: Config, seeds: range) -> list[Config]:
    """Return what measures the lines between two networks, for a study of other numbers of them."""
    return grid(replace(base, method="weight_matching"), ensemble_size=[2], seed=seeds)


DIGITS = Config(method="single", hidden_size=64, epochs=10, batch_size=64)
FASHION = Config(method="single", dataset="fashion_mnist")
UNAUGMENTED = replace(FASHION, augment=False)
DEEPER = replace(FASHION, depth=3)
# without warm-up the first two networks are at 10 and 39 % after their 6 epochs
CNN = Config(
    method="single", dataset="cifar10", model="cnn", epochs=6, warmup_epochs=1, batch_size=128, weight_decay=5e-4
)
VGG = Config(
    method="single", dataset="cifar10", model="vgg11", epochs=30, warmup_epochs=1, batch_size=128, weight_decay=5e-4
)

GRIDS = {
    # to try a new machine or cluster with
    "smoke": grid(
        replace(DIGITS, epochs=2),
        method=["deep_ensemble", "weight_matching", "permavg"],
        ensemble_size=[2],
        seed=range(2),
    ),
    "demo": study(DIGITS, (2, 4), range(3), (0.1, 1.0), rates=True),
    # the thesis' setting, with random crops beside its flips: its three networks; other numbers of them, at the default rates
    "thesis": study(FASHION, (3,), range(5), (0.1, 1.0), rates=True),
    "fashion_mnist": unique(
        [*study(FASHION, (3,), range(5), (0.1, 1.0), rates=True), *study(FASHION, (2, 5, 8), range(5), (0.1, 1.0))]
    ),
    # without crops and flips: the thesis, with flips alone, stands between this and the one above
    "unaugmented": [*pairs(UNAUGMENTED, range(5)), *study(UNAUGMENTED, (3,), range(5), (0.1, 1.0), rates=True)],
    "deeper": [*pairs(DEEPER, range(3)), *study(DEEPER, (3,), range(3))],
    "cnn": study(CNN, (2, 3), range(3)),
    "vgg11": unique(
        [
            *study(VGG, (2, 3, 5), range(3)),
            *study(replace(VGG, batchnorm="none", learning_rate=0.01), (2, 3, 5), range(3)),
        ]
    ),
}


def main(config: Config, folders: Folders) -> Path:
    """Train and measure one run; return the path of its result, at once when it is there."""
    run = Run("parameter_averaging", config, folders)
    return run.once(lambda: train(run, config))


def train(run: Run, config: Config) -> Path:
    import torch

    from batchens.averaging import AveragedNetwork, average, match, permute, reestimate
    from batchens.data import images as data
    from batchens.models.deep_ensemble import DeepEnsemble
    from batchens.training import autocast_dtype, choose_device, device_facts, fit, keep_freed_memory

    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    images = data.load(config.dataset, run.folders.data, device)
    networks, facts = base_networks(run, config, images)
    size, epochs = config.ensemble_size, config.extra_epochs or 0

    def new(seed: int) -> "nn.Module":
        network = build(config, images.shape, images.num_classes, seed)
        return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack it

    first = 1000 * config.seed  # the seed of the first network; of what is trained from them it is 999 more
    like = networks[0] if networks else new(first)
    dtype = autocast_dtype(config.precision, device, optimizer_of(config, like, images))
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    found = None if config.matching is None else match(networks, config.matching, config.seed)
    seconds_matching = None if found is None else time.perf_counter() - started
    matched = networks if found is None else [permute(n, p) for n, p in zip(networks, found, strict=True)]

    def measured(model: "nn.Module", splits: Sequence[str], suffix: str = "", members: int = 1) -> None:
        nonlocal rows
        rows += measure_splits(model, images, splits, members, dtype, epoch=0 if not suffix else epochs, suffix=suffix)

    def averaged(networks: "Sequence[nn.Module]") -> "nn.Module":
        network = average(networks)
        if norms(network):
            if config.method not in TRAINED:
                measured(network, ("validation", "test"), "_stale")
            reestimate(network, some_of(config, images))
        return network

    model: nn.Module
    members = 1
    if config.method in ("single", "fine_tuned_single"):
        model = best_of(networks, images, dtype)
    elif config.method == "deep_ensemble":
        model, members = DeepEnsemble(networks), size
    elif config.method in ("distillation", "longer"):
        model = new(first + (999 if config.method == "distillation" else 0))
    elif config.method in MATRICES:
        kind: Literal["doubly_stochastic", "free"] = "doubly_stochastic" if config.method == "permavg" else "free"
        model = AveragedNetwork(matched, temperature=config.temperature or 1.0, matrices=kind)
    else:
        model = averaged(matched)
    if config.method not in TRAINED:
        measured(model, ("validation", "test"), members=members)
        network = model
    else:
        start = model
        if isinstance(model, AveragedNetwork):
            start = model.export()
            reestimate(start, some_of(config, images))
        measured(start, ("validation",))
        done = 0 if config.base_weights else len(networks) * config.epochs
        rows += fit(
            model,
            images,
            optimizer_of(config, model, images, extra=True),
            ensemble_size=1,
            regime="repeat",
            epochs=epochs,
            warmup_epochs=0 if config.method in MATRICES else config.warmup_epochs,
            batch_size=config.batch_size,
            augmented=config.augment,
            seed=first + (0 if config.method == "longer" else 999),
            precision=config.precision,
            objective=distillation(networks, dtype) if config.method == "distillation" else None,
            checkpoint=run.checkpoint,
            on_epoch=lambda new: run.after_epoch(later(new, done), done + epochs),
        )
        network = model.export() if isinstance(model, AveragedNetwork) else model
    if isinstance(model, AveragedNetwork):
        rows += matrix_rows(model, epochs, pictures=config.seed == 0)
        if config.method == "permavg":
            projected = average(matched, model.project())
            reestimate(projected, some_of(config, images))
            measured(projected, ("validation", "test"), "_projected")
    if config.method == "weight_matching" and size == 2:
        rows += lines(networks, "line", config, images, dtype)
        rows += lines(matched, "matched_line", config, images, dtype)
    path = run.write(
        rows,
        measured=(*METRICS, *CURVE, "layer", "size", "diagonal", "row_max", "unique_argmax", "row_error", "barrier"),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        parameters_trained=sum(p.numel() for p in model.parameters()) if config.method in TRAINED else 0,
        **facts,
        seconds_matching=seconds_matching,
        **inference_speeds(network, new(first), images, members, dtype),
        **device_facts(device, config.precision, optimizer_of(config, network, images), compiled=False),
        data_source=images.source,
    )
    print(f"written: {path}")
    return path


def build(config: Config, shape: tuple[int, int, int], num_classes: int, seed: int) -> "nn.Module":
    """Return a network of the run's architecture, for images of this shape, (channels, size, size), untrained."""
    import torch

    from batchens.models.cnn import cnn
    from batchens.models.mlp import mlp
    from batchens.models.vgg import vgg11

    channels, size, _ = shape
    torch.manual_seed(seed)
    if config.model == "mlp":
        assert config.depth is not None and config.hidden_size is not None
        return mlp(channels * size * size, [config.hidden_size] * config.depth, num_classes)
    architecture = {"cnn": cnn, "vgg11": vgg11}[config.model]
    return architecture(num_classes, channels, size, batchnorm=config.batchnorm != "none")


def optimizer_of(config: Config, model: "nn.Module", images: "Images", extra: bool = False) -> "torch.optim.Optimizer":
    """Return the optimizer of the networks, or of what is trained from them: of learned matrices it is Adam."""
    from batchens import optimizers

    matrices = extra and config.method in MATRICES
    rate = config.extra_learning_rate if extra else config.learning_rate
    assert rate is not None
    return optimizers.build(
        "adam" if matrices else config.optimizer,
        model,
        learning_rate=rate,
        weight_decay=0.0 if matrices else config.weight_decay,
        momentum=0.9 if matrices else config.momentum,
        training_examples=len(images.train),
    )


def later(rows: list[dict[str, Any]], epochs: int) -> list[dict[str, Any]]:
    return [{**row, "epoch": row["epoch"] + epochs} for row in rows]


# the networks


# all that decides what a network is, beside its own seed and the source of the images
DECIDING = (
    "dataset", "model", "depth", "hidden_size", "batchnorm", "optimizer", "learning_rate", "weight_decay", "momentum", "epochs",
    "warmup_epochs", "batch_size", "augment", "precision",
)  # fmt: skip


def base_networks(run: Run, config: Config, images: "Images") -> "tuple[list[nn.Module], dict[str, Any]]":
    """Return the run's networks, on the images' device, and what its result says of them; of `longer` there are none.

    `seconds_base` that their training took, None for those that were read from files, and `provenance_of` them.

    Member m of seed s is the network of seed 1000 s + m. A network is trained by whichever run comes first, under a lock;
    others take those that are free meanwhile, and wait for what is left. A killed run's network goes on from its last epoch.
    """
    import torch
    from filelock import FileLock, Timeout

    from batchens.averaging import digest, load_weights
    from batchens.files import check_writable

    members = range(0 if config.method == "longer" else config.ensemble_size)
    networks = [build(config, images.shape, images.num_classes, 1000 * config.seed + member) for member in members]
    seconds: float | None = None
    known: dict[int, dict[str, Any]] = {}
    files: dict[str, Path] = {}
    if config.base_weights:
        for network, file in zip(networks, config.base_weights, strict=True):
            load_weights(network, file)
            if (same := files.setdefault(digest(network.state_dict()), file)) != file:
                raise ValueError(
                    f"base_weights must be of different networks, however {file} holds the weights of {same}"
                )
    else:
        folder = run.folders.runs / "parameter_averaging" / "networks"
        check_writable(folder)
        paths = [
            folder / f"{network_name(config, 1000 * config.seed + member, images.source)}.pt" for member in members
        ]
        waited_for: list[Path] = []
        newest = run.since
        while len(known) < len(paths):
            before = len(known)
            for member in (member for member in members if member not in known):
                with suppress(Timeout), FileLock(paths[member].with_suffix(".lock"), blocking=False):
                    facts = load_network(networks[member], paths[member])
                    if facts is None:
                        facts = train_network(run, config, images, member, networks[member], paths[member])
                    known[member] = facts
            if len(known) == before:  # others are at all of them
                with suppress(FileNotFoundError):
                    if run.cancelled.stat().st_mtime > run.since:
                        raise Cancelled(run.id)
                missing = [paths[member] for member in members if member not in known]
                # a job at its time limit is requeued where its run has made progress: here that is its networks'
                if (latest := max(last_written(path.with_suffix(".checkpoint")) for path in missing)) > newest:
                    run.progress.touch()
                    newest = latest
                if missing != waited_for:
                    names = ", ".join(path.stem for path in missing)
                    print(f"{run.id}: waits for networks that other runs train: {names}", flush=True)
                    waited_for = missing
                time.sleep(1)
        seconds = sum((facts["seconds"] for facts in known.values()), 0.0)
    for network in networks:
        network.to(images.train.images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    names = " + ".join(f"{file.name} {weights[:8]}" for weights, file in files.items())
    facts = provenance_of(networks, [known.get(member, {}) for member in members])
    return networks, {"seconds_base": seconds, **facts, "networks_files": names}


def last_written(path: Path) -> float:
    """Return when the file was last written to, in seconds since 1970; 0 where it is absent."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def provenance_of(networks: "Sequence[nn.Module]", known: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return which networks these are, by their weights, and what is known of the code and the devices they are by."""
    from batchens.averaging import digest

    def joined(values: list[str]) -> str:
        return " + ".join(sorted({value or "not known" for value in values})) if any(values) else ""

    total = hashlib.sha256("".join(digest(network.state_dict()) for network in networks).encode()).hexdigest()
    return {
        "networks_digest": total[:16] if networks else "",
        "networks_commit": joined(
            [
                commit + ("-dirty" if one.get("dirty") else "")
                for one in known
                for commit in one.get("commit", "").split(" + ")
            ]
        ),
        "networks_device": joined([one.get("device_name", "") for one in known]),
    }


def network_name(config: Config, seed: int, source: str) -> str:
    """Return the name of a network's file: what one sees at once, and a digest of all that decides it."""
    settings = {name: getattr(config, name) for name in DECIDING} | {"seed": seed, "source": source}
    # 1 and 1.0 are one setting
    same = {name: float(value) if isinstance(value, int | float) else value for name, value in settings.items()}
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
    return f"{config.dataset}-{config.model}-{seed}-{digest}"


def load_network(network: "nn.Module", path: Path) -> dict[str, Any] | None:
    """Put the network of a file into `network` and return what is known of it, its `seconds` at least.

    None: it is absent, or damaged; a damaged file is kept beside, see `put_aside`.

    Raises:
        OSError: the file can't be read now, which is no reason to train the network again.
    """
    import torch

    from batchens.averaging import digest

    if not path.exists():
        return None
    content = path.read_bytes()  # torch's own reader makes a RuntimeError of what the disk says
    try:
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if digest(saved["weights"]) != saved["digest"]:
            raise ValueError("its weights have changed")
        network.load_state_dict(saved["weights"])
        facts = {name: value for name, value in saved.items() if name != "weights"}
        return facts | {"seconds": float(saved["seconds"])}
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged archive raises whatever the reader trips over first
        reason = " ".join(str(error).split())[:200]
        print(
            f"the network is trained again, since {path} is damaged (kept as {put_aside(path).name}): "
            f"{type(error).__name__}: {reason}",
            flush=True,
        )
        return None


def put_aside(path: Path) -> Path:
    """Rename a file to `<name>.damaged1`, 2 and so on, and return that."""
    names = (path.with_name(f"{path.name}.damaged{number}") for number in itertools.count(1))
    aside = next(one for one in names if not one.exists())
    os.replace(path, aside)
    return aside


def train_network(
    run: Run, config: Config, images: "Images", member: int, network: "nn.Module", path: Path
) -> dict[str, Any]:
    """Train `network`, keep it in a file, and return what is known of it, as `load_network` does.

    A checkpoint that can't be gone on from (made on another device, say) is put aside: of a network that all methods need, it
    would stop all of them.
    """
    import torch

    from batchens.averaging import digest
    from batchens.files import write_tensors, write_text
    from batchens.training import device_facts, fit

    checkpoint, begun = path.with_suffix(".checkpoint"), path.with_suffix(".json")
    seed = 1000 * config.seed + member
    epochs = config.ensemble_size * config.epochs + (config.extra_epochs or 0)
    device = images.train.images.device

    def trained() -> tuple[list[dict[str, Any]], list[tuple[str, bool | None]]]:
        code = attempts(begun, checkpoint)

        def on_epoch(new: list[dict[str, Any]]) -> None:
            write_text(begun, json.dumps({"code": code}))
            run.after_epoch(later(new, member * config.epochs), epochs)

        # anew: a damaged file, or a checkpoint of no use, may have been read into it
        network.load_state_dict(build(config, images.shape, images.num_classes, seed).state_dict())
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        rows = fit(
            network,
            images,
            optimizer_of(config, network, images),
            ensemble_size=1,
            regime="repeat",
            epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            batch_size=config.batch_size,
            augmented=config.augment,
            seed=seed,
            precision=config.precision,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )
        return rows, code

    try:
        rows, code = trained()
    except ValueError as error:
        if not str(error).startswith(f"the checkpoint {checkpoint} can't be gone on from"):
            raise
        reason = " ".join(str(error.__cause__).split())[:200]
        print(
            f"the network is trained from its beginning, since {checkpoint} can't be gone on from (kept as "
            f"{put_aside(checkpoint).name}): {type(error.__cause__).__name__}: {reason}",
            flush=True,
        )
        rows, code = trained()
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    made = device_facts(device, config.precision, optimizer_of(config, network, images), False)
    facts = {
        "digest": digest(weights),
        "seconds": sum(row["seconds"] for row in rows if row["split"] == "train"),
        **code_of(code),
        "torch": str(made["torch"]),
        "device_name": made["device_name"],
        "number_format": made["number_format"],
    }
    write_tensors(path, {"weights": weights, **facts})
    for file in (checkpoint, begun):
        file.unlink(missing_ok=True)
    return facts


# what is made of them, and measured


def best_of(networks: "Sequence[nn.Module]", images: "Images", dtype: "torch.dtype") -> "nn.Module":
    """Return the network of the highest accuracy on the validation images, of equal ones that of the lowest NLL."""
    from batchens.metrics import measure
    from batchens.training import predict

    def quality(network: "nn.Module") -> tuple[float, float]:
        row = measure(predict(network, images, "validation", 1, dtype), images.validation.labels)[-1]
        return row["accuracy"], -row["nll"]

    return max(networks, key=quality)


def distillation(teachers: "Sequence[nn.Module]", dtype: "torch.dtype") -> "Callable[[Tensor, Tensor, Tensor], Tensor]":
    """Return the loss of a student: half that of the labels, half T^2 KL to the mean of the teachers' softened probabilities.

    Hinton et al. 2015, arXiv:1503.02531; T = 3.
    """
    import torch
    from torch.nn import functional as F

    for teacher in teachers:
        teacher.eval()

    def objective(x: "Tensor", logits: "Tensor", labels: "Tensor") -> "Tensor":
        with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            outputs = torch.stack([teacher(x) for teacher in teachers])
        soft = (outputs.float() / STUDENT_TEMPERATURE).softmax(-1).mean(0)
        student = (logits.float() / STUDENT_TEMPERATURE).log_softmax(-1)
        of_teacher = STUDENT_TEMPERATURE**2 * F.kl_div(student, soft, reduction="batchmean")
        return STUDENT_SHARE * of_teacher + (1 - STUDENT_SHARE) * F.cross_entropy(logits.float(), labels)

    return objective


def norms(network: "nn.Module") -> bool:
    return any(name.endswith("running_mean") for name in network.state_dict())


def some_of(config: Config, images: "Images") -> "Iterator[Tensor]":
    """Return training images, in batches, that BatchNorm's statistics are estimated on: augmented where networks see them so.

    Weights are trained for the statistics of such images: two convolutions on CIFAR-10 that have 74.3 % with their own
    have 74.2 with those of 10,000 augmented images, and 72.0 with those of the images as they are.
    """
    import torch

    from batchens.data.augment import augment
    from batchens.data.catalog import DATASETS
    from batchens.data.images import normalise

    dataset = DATASETS[config.dataset]
    draws = torch.Generator(images.train.images.device).manual_seed(config.seed)
    for x in images.train.images[:STATISTICS_IMAGES].split(500):
        if config.augment:
            x = augment(x, flip=dataset.flip, padding=dataset.padding, generator=draws)
        yield normalise(x, images.mean, images.std, channels_last=True)


def measure_splits(
    model: "nn.Module",
    images: "Images",
    splits: Sequence[str],
    ensemble_size: int,
    dtype: "torch.dtype",
    *,
    epoch: int,
    suffix: str = "",
) -> list[dict[str, Any]]:
    """Return the rows of a network that is not trained here, as `fit` makes them."""
    from batchens.metrics import measure, mixture, reliability
    from batchens.training import Diverged, predict

    rows: list[dict[str, Any]] = []
    for split in splits:
        log_probs = predict(model, images, split, ensemble_size, dtype)
        if not log_probs.isfinite().all():
            raise Diverged("predictions must be finite numbers, however an average's are not; no result was written")
        labels = getattr(images, split).labels
        rows += [{"epoch": epoch, "split": f"{split}{suffix}", **row} for row in measure(log_probs, labels)]
        if split == "test" and not suffix:
            curve = map(numbers, reliability(mixture(log_probs), labels))
            rows.append(
                {"epoch": epoch, "split": "reliability", "member": None, **dict(zip(CURVE, curve, strict=True))}
            )
    return rows


def matrix_rows(model: "Any", epoch: int, pictures: bool) -> list[dict[str, Any]]:
    """Return what the learned matrices are like, and two pictures of one of them."""
    import torch

    from batchens.averaging import assignment

    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        by_layer = [matrices.cpu() for matrices in model.by_layer()]
    for layer, matrices in enumerate(by_layer):
        for member, matrix in enumerate(matrices, 1):
            row_max, column = matrix.max(1)
            unique_argmax = (column.bincount(minlength=len(matrix))[column] == 1).float().mean()
            rows.append(
                {
                    "epoch": epoch,
                    "split": "matrix",
                    "member": member,
                    "layer": layer,
                    "size": len(matrix),
                    "diagonal": matrix.diagonal().mean().item(),
                    "row_max": row_max.mean().item(),
                    "unique_argmax": unique_argmax.item(),
                    "row_error": (matrix.sum(1) - 1).abs().max().item(),
                }
            )
    if pictures:
        matrix = by_layer[0][0]
        for split, shown in (("picture", matrix), ("picture_ordered", matrix[:, assignment(matrix)])):
            corner = shown[:PICTURE, :PICTURE]
            head = {"epoch": epoch, "split": split, "member": 1, "layer": 0, "size": len(corner)}
            rows.append({**head, "y": " ".join(f"{value:.3g}" for value in corner.flatten().tolist())})
    return rows


def lines(
    networks: "Sequence[nn.Module]", name: str, config: Config, images: "Images", dtype: "torch.dtype"
) -> list[dict[str, Any]]:
    """Return the test accuracy and NLL of the networks on the line between two, and how much worse they get than the chord."""
    import torch

    from batchens.averaging import between, reestimate
    from batchens.metrics import measure
    from batchens.training import predict

    shares = torch.linspace(0, 1, LINE_POINTS, dtype=torch.float64)
    points = []
    for share in shares.tolist():
        network = between(networks[0], networks[1], share)
        reestimate(network, some_of(config, images))
        points.append(measure(predict(network, images, "test", 1, dtype), images.test.labels)[-1])
    rows = []
    for metric, worse in (("accuracy", -1), ("nll", 1)):
        y = torch.tensor([point[metric] for point in points], dtype=torch.float64)
        barrier = (worse * (y - torch.lerp(y[0], y[-1], shares))).max().item()
        rows.append({"epoch": 0, "split": f"{name}_{metric}", "member": None, "x": numbers(shares), "y": numbers(y),
                     "barrier": barrier})  # fmt: skip
    return rows


def inference_speeds(
    model: "nn.Module", plain: "nn.Module", images: "Images", ensemble_size: int, dtype: "torch.dtype"
) -> dict[str, float]:
    """Return images a second of predictions, of the model and, in turn with it, of a plain network: for their ratio.

    Medians of nine batches of 500 after two others. What else a machine does moves both, so the ratio less than each.
    """
    import statistics

    import torch

    from batchens.data.images import normalise
    from batchens.layers import repeat

    x = normalise(images.test.images[:500], images.mean, images.std, channels_last=True)
    forms = {"inference_images_per_second": (model.eval(), ensemble_size), "plain_images_per_second": (plain.eval(), 1)}
    times: dict[str, list[float]] = {name: [] for name in forms}
    with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        for _ in range(11):
            for name, (form, members) in forms.items():
                started = time.perf_counter()
                form(repeat(x, members))
                if x.device.type == "cuda":
                    torch.cuda.synchronize(x.device)
                times[name].append(time.perf_counter() - started)
    return {name: len(x) / statistics.median(each[2:]) for name, each in times.items()}


if __name__ == "__main__":
    sys.exit(command_line("parameter_averaging", Config, main, __doc__))
