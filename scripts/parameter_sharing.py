"""Parameter sharing: what does it cost when layers share weights, within a network, between members, or both?

Each cell of the study ties the early layers, the deep ones or all but the head: within one network, layers of one shape;
between the members of an ensemble, layers at one place; or both. Beside every cell stand the same cell with a scale of its
own for each use of a tied layer, or with only part of each layer tied, and a plain network with the cell's number of
parameters; beside all of them a single network and a deep ensemble, which are the cells where nothing is tied, a
BatchEnsemble, and a single network with as many epochs as the ensembles have member-epochs. Each run validates after every
epoch, reads the test set once at the end, and writes results/parameter_sharing/<run_id>.csv, whose column `parameters` counts
a tied one once.

    on a cluster     python -m jobs submit parameter_sharing --grid full --cluster NAME
    on a laptop      python -m jobs submit parameter_sharing --grid demo --cluster local
    one run again    python -m jobs run parameter_sharing RUN
    one of your own  python -m scripts.parameter_sharing --dataset cifar10 --model vgg11 --regime between --intensity early

A run of the demo takes a second; VGG11 on CIFAR-10 for 15 epochs takes hours on a CPU and belongs on a GPU.
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

# channels of each 3x3 convolution; P halves the image. In VGG11 the only layers of one shape are three deep ones of 512
# channels, so within a network there would be nothing to tie early: the second has two equal ones of 64, and of 256.
CONVOLUTIONS = {
    "vgg11": (64, "P", 128, "P", 256, 256, "P", 512, 512, "P", 512, 512, "P"),
    "vgg11_repeats": (64, 64, 64, "P", 128, "P", 256, 256, 256, "P", 512, 512, "P", 512, 512, "P"),
}
HIDDEN = (128,) * 5
EARLY = {"mlp": 3, "cnn": 1, "vgg11": 2, "vgg11_repeats": 4}  # so many first layers: of VGG, those before the second P


@dataclass(frozen=True)
class Config:
    """What one run trains. A field that the method has no use for takes its neutral value."""

    dataset: DatasetName = "digits"
    """images to learn; digits are bundled, the others are downloaded once"""
    model: Literal["mlp", "cnn", "vgg11", "vgg11_repeats"] = "mlp"
    """mlp: five layers of 128 units; cnn: two convolutions; vgg11: eight and one linear layer; vgg11_repeats: three more"""
    batchnorm: Literal["shared", "member", "none"] = "shared"
    """after a layer that members share: shared too, over all their rows, or one for each member; or without"""
    method: Literal["sharing", "single", "deep_ensemble", "batchensemble", "same_size"] = "sharing"
    """a cell of the study; one network; independent ones; members of rank 1; a plain network with a cell's parameter count"""
    regime: Literal["within", "between", "both"] = "between"
    """where layers are tied: within one network, between the members of an ensemble, or both"""
    intensity: Literal["none", "early", "deep", "all"] = "all"
    """which layers are tied; the last one, the head, never is"""
    ties: Literal["whole", "scaled", "part"] = "whole"
    """tied layers are equal; or are scaled by an alpha, gamma and bias of each use; or part of their outputs is tied"""
    fraction: float | None = None
    """share of a layer's outputs that is tied where part is; 0.5 if not given"""
    ensemble_size: int = 4
    """number of members; of same_size: of the cell that it is as large as"""
    alpha_init: float | None = None
    """input factors of each member: negative v is N(1, |v|), 0 to 1 the probability of +1 (else -1), None leaves them out"""
    gamma_init: float | None = None
    """output factors of each member, in the same code; both are 0.5 where ties are scaled and neither is given"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with Nesterov momentum, or AdamW"""
    learning_rate: float = 0.1
    """peak, after the warm-up; a cosine takes it to 0 at the end"""
    weight_decay: float = 5e-4
    """on slow weights only"""
    momentum: float = 0.9
    """of SGD; beta1 of Adam"""
    epochs: int = 15
    """passes over the training images"""
    warmup_epochs: float = 1.0
    """epochs in which the learning rate rises linearly"""
    batch_size: int = 128
    """images in each step; every member sees all of them"""
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
        "dataset", "model", "method", "regime", "intensity", "ties", "fraction", "ensemble_size", "epochs", "seed",
    )  # fmt: skip
    INCIDENTAL: ClassVar[tuple[str, ...]] = ("device", "threads", "compile")

    def __post_init__(self) -> None:
        def neutral(**values: object) -> None:
            for name, value in values.items():
                object.__setattr__(self, name, value)

        if self.method == "sharing" and self.intensity == "none":
            neutral(method="single" if self.regime == "within" else "deep_ensemble")
        if self.method == "single":
            neutral(regime="within", intensity="none", ties="whole")
        elif self.method == "deep_ensemble":
            neutral(regime="between", intensity="none", ties="whole")
        elif self.method == "batchensemble":
            neutral(regime="between", intensity="all", ties="scaled")
        if self.regime == "within":  # where scales of 1 start as the tied network
            neutral(ensemble_size=1, alpha_init=1.0, gamma_init=1.0)
        if self.ties != "scaled":
            neutral(alpha_init=None, gamma_init=None)
        elif self.alpha_init is None and self.gamma_init is None:
            neutral(alpha_init=0.5, gamma_init=0.5)
        if self.ties != "part":
            neutral(fraction=None)
        elif self.fraction is None:
            neutral(fraction=0.5)
        elif not 0 < self.fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1 where part is tied, however: {self.fraction}")
        if self.model == "mlp":
            neutral(batchnorm="none")
        elif self.batchnorm != "none":
            if self.method == "deep_ensemble" or self.regime == "within":
                neutral(batchnorm="shared")
            elif self.ties == "part":
                neutral(batchnorm="member")  # of channels that members do not share
        check(self)
        if self.regime != "within" and self.ensemble_size < 2:
            raise ValueError(f"ensemble_size must be at least 2, however: {self.ensemble_size}")
        if self.method == "same_size" and self.model == "cnn":
            raise ValueError("same_size must be of a model whose width can be chosen, mlp or vgg11, however: cnn")

    @property
    def members(self) -> int:
        """The number of members that are trained: a plain network is one, whatever cell it is as large as."""
        return 1 if self.method == "same_size" else self.ensemble_size


SEEDS = range(3)
TIED = ("early", "deep", "all")


def study(base: Config, regime: str) -> list[Config]:
    """Return the cells of a regime, tied whole, scaled and in part, and what they must be compared with."""
    cells = grid(base, regime=[regime], intensity=TIED, ties=["whole", "scaled", "part"], seed=SEEDS)
    same_size = grid(base, method=["same_size"], regime=[regime], intensity=TIED, seed=SEEDS)
    return unique([*references(base), *cells, *same_size])


def references(base: Config) -> list[Config]:
    methods = grid(base, method=["single", "deep_ensemble", "batchensemble"], seed=SEEDS)
    return [*methods, *grid(base, method=["single"], epochs=[base.epochs * base.ensemble_size], seed=SEEDS)]


def cifar(model: str, *regimes: str) -> list[Config]:
    bases = grid(Config(dataset="cifar10", model="vgg11"), dataset=["cifar10", "cifar20"], model=[model])
    return unique([config for base in bases for regime in regimes for config in study(base, regime)])


def mlp(base: Config) -> list[Config]:
    """Return all cells tied whole, those where all is tied in the other arms too, and the references."""
    whole = grid(base, regime=["within", "between", "both"], intensity=TIED, seed=SEEDS)
    arms = grid(base, regime=["within", "between", "both"], ties=["scaled", "part"], seed=SEEDS)
    same_size = grid(base, method=["same_size"], regime=["within", "between", "both"], seed=SEEDS)
    return unique([*references(base), *whole, *arms, *same_size])


GRIDS = {
    # to try a new machine or cluster with
    "smoke": grid(
        Config(epochs=2, batch_size=64, learning_rate=0.05), regime=["within", "between", "both"], seed=range(2)
    ),
    "demo": mlp(Config(epochs=5, batch_size=64, learning_rate=0.05)),
    # of 0.02, 0.05 and 0.1 the rate that validation chose for the single network
    "fashion_mnist": mlp(Config(dataset="fashion_mnist", epochs=10, learning_rate=0.05)),
    "within": cifar("vgg11_repeats", "within"),
    "between": cifar("vgg11", "between"),
    "both": cifar("vgg11_repeats", "both"),
    # all three regimes in one network, and VGG11 itself
    "full": unique([*cifar("vgg11_repeats", "within", "between", "both"), *cifar("vgg11", "between")]),
}


def main(config: Config, folders: Folders) -> Path:
    """Train and measure one run; return the path of its result, at once when it is there."""
    run = Run("parameter_sharing", config, folders)
    return run.once(lambda: train(run, config))


def train(run: Run, config: Config) -> Path:
    from batchens.image_runs import train_on_images

    return train_on_images(
        run,
        config,
        lambda images: build(config, images.shape, images.num_classes),
        ensemble_size=config.members,
        regime="repeat",
    )


def build(config: Config, shape: tuple[int, int, int], num_classes: int) -> "nn.Module":
    """Return what a run trains on images of this shape, (channels, size, size)."""
    import torch
    from torch import nn

    from batchens.layers import batch_ensemble
    from batchens.models.cnn import cnn
    from batchens.models.deep_ensemble import DeepEnsemble
    from batchens.models.mlp import mlp
    from batchens.models.vgg import vgg
    from batchens.sharing import SharedEnsemble, plan, share

    channels, size, _ = shape
    batchnorm = config.batchnorm != "none"

    def network(member: int, width: float = 1.0) -> nn.Sequential:
        # Each network's weights are those of its own seed: a single network, the tied layers of a cell and the first member
        # of a deep ensemble of one seed start from the same point.
        torch.manual_seed(1000 * config.seed + member)
        if config.model == "mlp":
            return mlp(channels * size * size, [round(width * units) for units in HIDDEN], num_classes)
        if config.model == "cnn":
            return cnn(num_classes, channels, size, batchnorm)
        layers = [one if isinstance(one, str) else round(width * one) for one in CONVOLUTIONS[config.model]]
        return vgg(layers, num_classes, channels, size, batchnorm)

    def as_large_as(parameters: int) -> nn.Sequential:
        low, high = 0.05, 8.0  # times the width; parameters grow with its square
        with torch.device("meta"):
            for _ in range(20):
                middle = (low + high) / 2
                low, high = (middle, high) if count(network(0, middle)) < parameters else (low, middle)
            nearest = min(low, high, key=lambda width: abs(count(network(0, width)) - parameters))
        return network(0, nearest)

    if config.method == "single":
        return network(0)
    if config.method == "same_size":
        return as_large_as(count(build(replace(config, method="sharing"), shape, num_classes)))
    if config.method == "batchensemble":
        return batch_ensemble(
            network(0),
            ensemble_size=config.ensemble_size,
            alpha_init=config.alpha_init,
            gamma_init=config.gamma_init,
            batchnorm="member" if config.batchnorm == "member" else "shared",
        )
    networks = [network(member) for member in range(config.ensemble_size)]
    if config.method == "deep_ensemble":
        return DeepEnsemble(networks)
    sharing = plan(
        networks[0],
        config.regime,
        config.intensity,
        early=EARLY[config.model],
        batchnorm="member" if config.batchnorm == "member" else "shared",
        fraction=1.0 if config.fraction is None else config.fraction,
        alpha_init=config.alpha_init,
        gamma_init=config.gamma_init,
    )
    torch.manual_seed(1000 * config.seed + config.ensemble_size)  # of alpha and gamma
    networks = share(networks, sharing)
    return networks[0] if config.regime == "within" else SharedEnsemble(networks)


def count(model: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    sys.exit(command_line("parameter_sharing", Config, main, __doc__))
