"""BatchEnsemble parameter testing: which initial alpha and gamma, how many members, at which learning rate?

Each run trains one setting on one data set, validates after every epoch, reads the test set once at the end, and writes
results/parameter_testing/<run_id>.csv. Beside every BatchEnsemble stand the single network and a deep ensemble of the same
size with the same number of epochs and steps, and a single network with as many epochs as the ensemble has member-epochs.

    on a cluster     python -m jobs submit parameter_testing --grid alpha_gamma --cluster NAME
    on a laptop      python -m jobs submit parameter_testing --grid demo --cluster local
    one run again    python -m jobs run parameter_testing RUN
    one of your own  python -m scripts.parameter_testing --dataset cifar10 --model cnn --method batchensemble --epochs 10
    the figures      python -m plots parameter_testing

A run of the demo takes seconds; VGG11 on CIFAR-10 for 15 epochs takes hours on a CPU and belongs on a GPU.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from batchens.data.catalog import DatasetName
from batchens.grid import grid, unique
from batchens.run import Folders, Run, command_line
from batchens.settings import check

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Config:
    """What one run trains. A field that the method has no use for takes its neutral value."""

    dataset: DatasetName = "digits"
    """images to learn; digits are bundled, the others are downloaded once"""
    model: Literal["mlp", "cnn", "vgg11"] = "cnn"
    """mlp: 512 hidden units; cnn: two convolutions; vgg11: eight"""
    batchnorm: Literal["shared", "member_affine", "member", "none"] = "shared"
    """over all members' rows; with affine parameters of each member; with statistics of each member too; or without"""
    method: Literal["single", "batchensemble", "deep_ensemble"] = "batchensemble"
    """one network; members that share slow weights; independent networks"""
    ensemble_size: int = 4
    """number of members"""
    alpha_init: float | None = 0.5
    """input factors of each member: negative v is N(1, |v|), 0 to 1 the probability of +1 (else -1), None leaves them out"""
    gamma_init: float | None = 0.5
    """output factors of each member, in the same code"""
    regime: Literal["repeat", "split"] = "repeat"
    """whether each member sees the whole batch or its share of it"""
    optimizer: Literal["sgd", "adam", "ivon"] = "sgd"
    """SGD with Nesterov momentum, AdamW, or IVON"""
    learning_rate: float = 0.1
    """peak, after the warm-up; a cosine takes it to 0 at the end"""
    weight_decay: float = 5e-4
    """on slow weights only"""
    momentum: float = 0.9
    """of SGD; beta1 of Adam and IVON"""
    hess_init: float = 0.5
    """IVON's initial Hessian"""
    epochs: int = 15
    """passes over the training images"""
    warmup_epochs: float = 1.0
    """epochs in which the learning rate rises linearly"""
    batch_size: int = 128
    """new images in each step, whatever the number of members"""
    augment: bool = True
    """random crops and flips, where the data set allows them"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of forward passes; auto: bf16 on a GPU that has it, else fp16, fp32 on a CPU"""
    seed: int = 0
    """of the initial weights, the order of the images and their augmentation"""
    device: str = "auto"
    """auto, cpu or cuda"""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch"""
    compile: bool = False
    """compile training steps with torch.compile"""

    NAMED: ClassVar[tuple[str, ...]] = (
        "dataset", "model", "method", "ensemble_size", "alpha_init", "gamma_init", "learning_rate", "epochs", "seed",
    )  # fmt: skip
    INCIDENTAL: ClassVar[tuple[str, ...]] = ("device", "threads", "compile")

    def __post_init__(self) -> None:
        neutral: dict[str, object] = {}
        if self.method == "single":
            neutral = {"ensemble_size": 1, "regime": "repeat"}
        if self.method != "batchensemble":
            neutral |= {"alpha_init": None, "gamma_init": None}
            if self.batchnorm in ("member_affine", "member"):
                neutral["batchnorm"] = "shared"
        if self.optimizer != "ivon":
            neutral["hess_init"] = 0.5
        for name, value in neutral.items():
            object.__setattr__(self, name, value)
        check(self)


SEEDS = range(3)
SIGNED = (-1.0, -0.8, -0.5, -0.2, 0.0, 0.2, 0.5, 0.8, 1.0)


def with_references(base: Config, ensembles: list[Config]) -> list[Config]:
    """Put beside BatchEnsembles what they must be compared with, at the same seeds and learning rates.

    A single network, a deep ensemble of each size, and a single network trained as many times longer as there are members,
    which sees as many images as all members of a BatchEnsemble under `repeat` together.
    """
    rates = sorted({config.learning_rate for config in ensembles})
    sizes = sorted({config.ensemble_size for config in ensembles} - {1})
    single = grid(base, method=["single"], learning_rate=rates, seed=SEEDS)
    longer = grid(base, method=["single"], learning_rate=rates, epochs=[base.epochs * m for m in sizes], seed=SEEDS)
    deep = grid(base, method=["deep_ensemble"], learning_rate=rates, ensemble_size=sizes, seed=SEEDS)
    return unique([*single, *longer, *deep, *ensembles])


def alpha_gamma(base: Config, alphas: tuple[float, ...], gammas: tuple[float, ...]) -> list[Config]:
    return with_references(base, grid(base, alpha_init=alphas, gamma_init=gammas, seed=SEEDS))


def ensemble_size(base: Config, sizes: tuple[int, ...], rates: tuple[float, ...]) -> list[Config]:
    return with_references(base, grid(base, ensemble_size=sizes, learning_rate=rates, seed=SEEDS))


DEMO = Config(epochs=8, batch_size=64)
VGG = Config(dataset="cifar10", model="vgg11")
CNN = Config(dataset="cifar10", model="cnn", epochs=4)

GRIDS = {
    # to try a new machine or cluster with
    "smoke": grid(replace(DEMO, epochs=2), method=["single", "batchensemble", "deep_ensemble"], seed=range(2)),
    # to try a scheduler with: two runs of a minute that an array can be interrupted in, and 20 of a second or two
    "cluster": [
        *grid(replace(DEMO, epochs=800), method=["single"], seed=range(2)),
        *grid(replace(DEMO, epochs=2), method=["single", "batchensemble"], seed=range(10)),
    ],
    "demo": unique(
        [
            *alpha_gamma(DEMO, (-0.5, 0.5, 1.0), (-0.5, 0.5, 1.0)),
            *ensemble_size(DEMO, (1, 2, 4), (0.03, 0.1)),
        ]
    ),
    "alpha_gamma": alpha_gamma(VGG, SIGNED, SIGNED),
    "ensemble_size": ensemble_size(VGG, (1, 2, 4, 8, 16), (0.01, 0.03, 0.1, 0.3)),
    "cnn": with_references(
        CNN,
        [
            *grid(CNN, alpha_init=[1.0], gamma_init=[1.0], seed=SEEDS),  # identical members
            *grid(CNN, alpha_init=[0.5], gamma_init=[0.5], seed=SEEDS),
            *grid(CNN, alpha_init=[-0.5], gamma_init=[-0.5], seed=SEEDS),
        ],
    ),
}


def main(config: Config, folders: Folders) -> Path:
    """Train and measure one run; return the path of its result, at once when it is there."""
    run = Run("parameter_testing", config, folders)
    return run.once(lambda: train(run, config))


def train(run: Run, config: Config) -> Path:
    from batchens.image_runs import train_on_images

    return train_on_images(
        run,
        config,
        lambda images: build(config, images.shape, images.num_classes),
        ensemble_size=config.ensemble_size,
        regime=config.regime,
        hess_init=config.hess_init,
    )


def build(config: Config, shape: tuple[int, int, int], num_classes: int) -> "nn.Module":
    """Return what a run trains on images of this shape, (channels, size, size)."""
    import torch

    from batchens.layers import batch_ensemble
    from batchens.models.cnn import cnn
    from batchens.models.deep_ensemble import DeepEnsemble
    from batchens.models.mlp import mlp
    from batchens.models.vgg import vgg11

    channels, size, _ = shape

    def network(member: int) -> "nn.Module":
        # Each network's weights are those of its own seed: a single network, the slow weights of a BatchEnsemble and the
        # first member of a deep ensemble of one seed start from the same point.
        torch.manual_seed(1000 * config.seed + member)
        if config.model == "mlp":
            return mlp(channels * size * size, [512], num_classes)
        architecture = {"cnn": cnn, "vgg11": vgg11}[config.model]
        return architecture(num_classes, channels, size, batchnorm=config.batchnorm != "none")

    if config.method == "batchensemble":
        return batch_ensemble(
            network(0),
            ensemble_size=config.ensemble_size,
            alpha_init=config.alpha_init,
            gamma_init=config.gamma_init,
            batchnorm="shared" if config.batchnorm == "none" else config.batchnorm,
        )
    if config.method == "deep_ensemble":
        return DeepEnsemble([network(m) for m in range(config.ensemble_size)])
    return network(0)


if __name__ == "__main__":
    sys.exit(command_line("parameter_testing", Config, main, __doc__))
