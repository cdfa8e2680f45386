"""Optimizer comparison: SGD, Adam or IVON, for single networks, BatchEnsembles and deep ensembles?

Every optimizer trains the same networks for the same epochs on the same schedule, at each of its own few learning rates, of
which validation chooses one. The outcome is accuracy and NLL on test, and how many epochs and seconds it took to given
validation accuracies. IVON (variational learning) is evaluated at the mean of its posterior, as an ordinary network, and
averaged over samples of it: splits validation_posterior and test_posterior. Each run validates after every epoch, reads the
test set once at the end, and writes results/optimizer_comparison/<run_id>.csv.

    on a cluster     python -m jobs submit optimizer_comparison --grid vgg11 --cluster NAME
    on a laptop      python -m jobs submit optimizer_comparison --grid demo --cluster local
    one run again    python -m jobs run optimizer_comparison RUN
    one of your own  python -m scripts.optimizer_comparison --dataset cifar10 --method single --optimizer ivon --epochs 10
    the figures      python -m plots optimizer_comparison

A run of the demo takes a second; VGG11 on CIFAR-10 for 15 epochs takes hours on a CPU and belongs on a GPU.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from batchens.data.catalog import DatasetName
from batchens.grid import grid
from batchens.run import Folders, Run, command_line
from batchens.settings import check

if TYPE_CHECKING:
    from torch import nn


# At these rates weights decay in a step by 5e-4 with SGD (0.1 * 5e-4 / (1 - 0.9)), 3e-4 with Adam and 1.5e-4 with IVON. With
# the authors' beta2 of 0.99999, made for 200 epochs, IVON's Hessian would go 5 % of its way in 15 epochs of CIFAR-10.
USUAL: dict[str, dict[str, float]] = {
    "sgd": {"learning_rate": 0.1, "weight_decay": 5e-4, "beta2": 0.999},
    "adam": {"learning_rate": 0.003, "weight_decay": 0.1, "beta2": 0.999},
    "ivon": {"learning_rate": 0.3, "weight_decay": 5e-4, "beta2": 0.9999},
}


@dataclass(frozen=True)
class Config:
    """What one run trains. A field that the method or optimizer has no use for takes its neutral value."""

    dataset: DatasetName = "digits"
    """images to learn; digits are bundled, the others are downloaded once"""
    model: Literal["cnn", "vgg11"] = "cnn"
    """cnn: two convolutions; vgg11: eight; a BatchNorm after each, of all members' rows"""
    method: Literal["single", "batchensemble", "deep_ensemble"] = "single"
    """one network; members that share slow weights; independent networks"""
    ensemble_size: int = 4
    """number of members"""
    alpha_init: float | None = -0.5
    """input factors of each member: negative v is N(1, |v|), 0 to 1 the probability of +1 (else -1), None leaves them out"""
    gamma_init: float | None = -0.5
    """output factors of each member, in the same code"""
    optimizer: Literal["sgd", "adam", "ivon"] = "sgd"
    """SGD with Nesterov momentum, AdamW, or IVON"""
    learning_rate: float | None = None
    """peak, after the warm-up; a cosine takes it to 0 at the end; if not given 0.1 (SGD), 0.003 (Adam) or 0.3 (IVON)"""
    weight_decay: float | None = None
    """on slow weights only; decoupled in Adam; if not given 5e-4 (SGD, IVON) or 0.1 (Adam)"""
    momentum: float = 0.9
    """of SGD; beta1 of Adam and IVON"""
    beta2: float | None = None
    """decay of Adam's squared gradients, 0.999 if not given, of IVON's Hessian, 0.9999"""
    hess_init: float = 0.5
    """IVON's initial Hessian; its effective sample size is the number of training images"""
    posterior_samples: int = 64
    """draws from IVON's posterior that predictions are averaged over"""
    epochs: int = 15
    """passes over the training images"""
    warmup_epochs: float = 1.0
    """epochs in which the learning rate rises linearly"""
    batch_size: int = 128
    """images in each step; every member sees all of them"""
    augment: bool = True
    """random crops and flips, where the data set allows them"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of forward passes; auto: bf16 on a GPU that has it, else fp16 (IVON: fp32), fp32 on a CPU"""
    seed: int = 0
    """of the initial weights, the order of the images, their augmentation and IVON's samples"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch"""
    compile: bool = False
    """compile training steps with torch.compile"""

    NAMED: ClassVar[tuple[str, ...]] = (
        "dataset", "model", "optimizer", "method", "ensemble_size", "learning_rate", "epochs", "seed",
    )  # fmt: skip
    INCIDENTAL: ClassVar[tuple[str, ...]] = ("device", "threads", "compile")

    def __post_init__(self) -> None:
        neutral: dict[str, object] = {}
        if self.method == "single":
            neutral["ensemble_size"] = 1
        if self.method != "batchensemble":
            neutral |= {"alpha_init": None, "gamma_init": None}
        if self.optimizer == "sgd":
            neutral["beta2"] = 0.999
        usual = USUAL[self.optimizer]
        neutral |= {name: value for name, value in usual.items() if getattr(self, name) is None and name not in neutral}
        if self.optimizer != "ivon":
            neutral |= {"hess_init": 0.5, "posterior_samples": 0}
        for name, value in neutral.items():
            object.__setattr__(self, name, value)
        check(self)
        if self.posterior_samples < 0:
            raise ValueError(f"posterior_samples must be at least 0, however: {self.posterior_samples}")
        for name in ("beta2", "hess_init"):
            if not 0 < getattr(self, name) < (1 if name == "beta2" else float("inf")):
                raise ValueError(
                    f"{name} must be above 0{' and below 1' * (name == 'beta2')}, however: {getattr(self, name)}"
                )


SEEDS = range(3)
# Half decades around what each is used with. IVON's step is about its rate times the mean gradient, that of SGD with momentum
# 0.9 ten times its rate.
RATES: dict[str, tuple[float, ...]] = {
    "sgd": (0.01, 0.03, 0.1, 0.3, 1.0),
    "adam": (0.001, 0.003, 0.01, 0.03, 0.1),
    "ivon": (0.1, 0.3, 1.0, 3.0, 10.0),
}
FULL = {"single": (1,), "batchensemble": (2, 4, 8), "deep_ensemble": (2, 4, 8)}


def comparison(
    base: Config, methods: dict[str, tuple[int, ...]], seeds: Iterable[int] = SEEDS, rates: int = 4
) -> list[Config]:
    """Return every optimizer at its first so many learning rates, for every method and ensemble size, over the seeds."""
    return [
        config
        for method, sizes in methods.items()
        for optimizer, of_optimizer in RATES.items()
        for config in grid(
            base,
            method=[method],
            ensemble_size=sizes,
            optimizer=[optimizer],
            learning_rate=of_optimizer[:rates],
            weight_decay=[None],
            beta2=[None],
            seed=seeds,
        )
    ]


# of the method and the optimizer that every field is for: the neutral values of another would stay in the grid
DIGITS = Config(method="batchensemble", optimizer="ivon", epochs=4, batch_size=64, posterior_samples=16)
CIFAR = Config(method="batchensemble", optimizer="ivon", dataset="cifar10")

GRIDS = {
    # to try a new machine or cluster with
    "smoke": comparison(replace(DIGITS, epochs=2), {"single": (1,)}, seeds=[0]),
    "demo": comparison(DIGITS, {"single": (1,), "batchensemble": (4,)}),
    # of so few steps the best rates are larger ones
    "digits": comparison(
        replace(DIGITS, epochs=8),
        {"single": (1,), "batchensemble": (2, 4), "deep_ensemble": (2, 4)},
        seeds=range(5),
        rates=5,
    ),
    "cnn": comparison(replace(CIFAR, epochs=4, posterior_samples=16), {"single": (1,)}),
    # the original's 15 epochs, and four times as many, at which these networks converge
    "cnn_full": [config for epochs in (15, 60) for config in comparison(replace(CIFAR, epochs=epochs), FULL)],
    "vgg11": comparison(replace(CIFAR, model="vgg11"), FULL),
    "vgg11_long": comparison(replace(CIFAR, model="vgg11", epochs=60), FULL),
}


def main(config: Config, folders: Folders) -> Path:
    """Train and measure one run; return the path of its result, at once when it is there."""
    run = Run("optimizer_comparison", config, folders)
    return run.once(lambda: train(run, config))


def train(run: Run, config: Config) -> Path:
    from batchens.image_runs import train_on_images

    return train_on_images(
        run,
        config,
        lambda images: build(config, images.shape, images.num_classes),
        ensemble_size=config.ensemble_size,
        regime="repeat",
        hess_init=config.hess_init,
        beta2=config.beta2,
        posterior_samples=config.posterior_samples,
    )


def build(config: Config, shape: tuple[int, int, int], num_classes: int) -> "nn.Module":
    """Return what a run trains on images of this shape, (channels, size, size)."""
    import torch

    from batchens.layers import batch_ensemble
    from batchens.models.cnn import cnn
    from batchens.models.deep_ensemble import DeepEnsemble
    from batchens.models.vgg import vgg11

    channels, size, _ = shape

    def network(member: int) -> "nn.Module":
        # Each network's weights are those of its own seed: whatever the optimizer, a single network, the slow weights of a
        # BatchEnsemble and the first member of a deep ensemble of one seed start from the same point.
        torch.manual_seed(1000 * config.seed + member)
        return {"cnn": cnn, "vgg11": vgg11}[config.model](num_classes, channels, size)

    if config.method == "batchensemble":
        return batch_ensemble(
            network(0),
            ensemble_size=config.ensemble_size,
            alpha_init=config.alpha_init,
            gamma_init=config.gamma_init,
        )
    if config.method == "deep_ensemble":
        return DeepEnsemble([network(m) for m in range(config.ensemble_size)])
    return network(0)


if __name__ == "__main__":
    sys.exit(command_line("optimizer_comparison", Config, main, __doc__))
