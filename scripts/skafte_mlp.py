"""BatchEnsemble MLP on a toy regression: do members that share weights say how sure they are, in a gap and outside the data?

Each run draws a small data set with a gap, trains one method on it, measures RMSE, NLL and coverage of central intervals on
test points inside the training range, in the gap and outside, and writes results/skafte_mlp/<run_id>.csv. Methods, a single
network, a BatchEnsemble and a deep ensemble, are compared on the same data, from the same weights, in as many steps; beside
them is a single network trained as many times longer as there are members. Under regime `split`, where a member sees a random
share of the points in each step, so do the single networks: what small batches do is not mistaken for what members do. Runs
of seed 0 also store what they predict along x, for the figures.

    the whole study  python -m jobs submit skafte_mlp --grid full --cluster local --runs-per-job 20
    a taste of it    python -m jobs submit skafte_mlp --grid demo --cluster local --runs-per-job 20
    one run again    python -m jobs run skafte_mlp RUN
    one of your own  python -m scripts.skafte_mlp --generator john --method batchensemble --variance constant
    the figures      python -m plots skafte_mlp

A run takes less than a second, one of five times the steps a little more; the 640 of the study take two minutes on four cores,
three and a half on two. It is too small for a cluster to matter. A run that is killed starts from its beginning. Expect
differences of hundredths of a nat inside and of tenths in the gap; outside they are of whole nats and so is their spread over
seeds. Five times the steps fit the noise of so few points, most of all where the variance is learned too.
"""

import sys
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from batchens.data.skafte import GENERATORS, Dataset, GeneratorName, load
from batchens.grid import grid, unique
from batchens.results import REGRESSION_METRICS, numbers
from batchens.run import Folders, Run, command_line

EVALUATION_POINTS = 1000  # of each split but the training points
CURVE_POINTS = 101


@dataclass(frozen=True)
class Config:
    """What one run trains. A field that the method has no use for takes its neutral value."""

    generator: GeneratorName = "dtu"
    """distribution of the data: dtu on 2.5 to 12.5, gap 5 to 7; john on 0 to 10, gap 2.5 to 4.5"""
    method: Literal["single", "batchensemble", "deep_ensemble"] = "batchensemble"
    """one network; members that share slow weights; independent networks"""
    ensemble_size: int = 5
    """number of members; for a single network under split, of the shares of which it sees one"""
    alpha_init: float | None = 0.5
    """input factors of each member: negative v is N(1, |v|), 0 to 1 the probability of +1 (else -1), None leaves them out"""
    gamma_init: float | None = 0.5
    """output factors of each member, in the same code"""
    regime: Literal["repeat", "split"] = "split"
    """whether in a step each member, or a single network, sees all training points or its share, dealt anew each time"""
    variance: Literal["constant", "predicted"] = "predicted"
    """one for all x, the mean squared residual on the training points; or a second output of the network"""
    mean_first: float = 0.5
    """share of the epochs in which only the mean is trained, before the predicted variance is too"""
    hidden_size: int = 50
    """units in each of the two hidden layers"""
    train_points: int = 50
    """all of them are the batch of every step, but for a single network under split"""
    learning_rate: float = 0.003
    """of Adam; a cosine takes it to 0 at the end"""
    epochs: int = 250
    """steps, each a pass over the training points, or over the share of a single network under split"""
    seed: int = 0
    """of the data, the initial weights and the shares of the points"""
    threads: int = 1
    """CPU threads; more do not help networks this small"""

    NAMED: ClassVar[tuple[str, ...]] = (
        "generator", "method", "regime", "variance", "ensemble_size", "alpha_init", "gamma_init", "seed",
    )  # fmt: skip
    INCIDENTAL: ClassVar[tuple[str, ...]] = ("threads",)

    def __post_init__(self) -> None:
        neutral: dict[str, object] = {}
        if self.method == "single" and self.regime == "repeat":
            neutral = {"ensemble_size": 1}
        if self.method != "batchensemble":
            neutral |= {"alpha_init": None, "gamma_init": None}
        if self.variance == "constant":
            neutral["mean_first"] = 1.0
        for name, value in neutral.items():
            object.__setattr__(self, name, value)
        for name, least in (
            ("ensemble_size", 1),
            ("hidden_size", 1),
            ("train_points", 2),
            ("epochs", 1),
            ("seed", 0),
            ("threads", 1),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, however: {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, however: {self.learning_rate}")
        if not 0 <= self.mean_first <= 1:
            raise ValueError(f"mean_first must be between 0 and 1, however: {self.mean_first}")
        for name in ("alpha_init", "gamma_init"):
            value = getattr(self, name)
            if value is not None and not value <= 1:
                raise ValueError(f"{name} must be negative, between 0 and 1, or None, however: {value}")
        if self.regime == "split" and self.train_points % self.ensemble_size:
            raise ValueError(
                f"with regime split, train_points must be divisible by ensemble_size, however: train_points="
                f"{self.train_points}, ensemble_size={self.ensemble_size}; choose another number, or regime repeat"
            )


def study(seeds: range) -> list[Config]:
    """Return every method in both regimes on both generators, with both kinds of variance.

    A single network is there twice, the second time for as many times the steps as the others have members.
    """
    base = Config()
    methods = grid(
        base,
        seed=seeds,
        generator=list(GENERATORS),
        variance=["constant", "predicted"],
        method=["single", "batchensemble", "deep_ensemble"],
        regime=["split", "repeat"],
    )
    singles = [config for config in methods if config.method == "single"]
    return unique([*methods, *(replace(config, epochs=base.ensemble_size * base.epochs) for config in singles)])


# The learning rate and the number of steps are those of the experiment that this one was made from. Of 0.003, 0.01 and 0.03
# none was clearly better for any method, on validation points of six seeds that are in no grid.
GRIDS = {"demo": study(range(3)), "full": study(range(20))}


def main(config: Config, folders: Folders) -> Path:
    """Train and measure one run; return the path of its result, at once when it is there."""
    run = Run("skafte_mlp", config, folders)
    return run.once(lambda: train(run, config))


def train(run: Run, config: Config) -> Path:
    import torch
    from torch import Tensor, nn

    from batchens import optimizers, regression
    from batchens.layers import batch_ensemble, members, repeat
    from batchens.models.deep_ensemble import DeepEnsemble
    from batchens.models.mlp import mlp
    from batchens.training import Diverged, device_facts, schedule

    torch.set_num_threads(config.threads)
    size = 1 if config.method == "single" else config.ensemble_size
    data = load(config.generator, config.train_points, EVALUATION_POINTS, config.seed)
    # inputs and targets are standardised; what is measured is in the units of the data
    (x_mean, x_sd), (y_mean, y_sd) = ((values.mean(), values.std(ddof=1)) for values in data.train)

    def column(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32)[:, None]

    x, y = column((data.train.x - x_mean) / x_sd), column((data.train.y - y_mean) / y_sd)

    def network(member: int) -> nn.Sequential:
        # A single network, the slow weights of a BatchEnsemble and the first member of a deep ensemble of one seed start
        # from the same point. With biases of 0, as `mlp` leaves them, every unit of the first layer would bend at the mean x.
        torch.manual_seed(1000 * config.seed + member)
        plain = mlp(1, [config.hidden_size] * 2, 1 if config.variance == "constant" else 2)
        for layer in plain:
            if isinstance(layer, nn.Linear):
                nn.init.uniform_(layer.bias, -(layer.in_features**-0.5), layer.in_features**-0.5)  # nn.Linear's own
        return plain

    model: nn.Module
    if config.method == "batchensemble":
        model = batch_ensemble(
            network(0), ensemble_size=size, alpha_init=config.alpha_init, gamma_init=config.gamma_init
        )
    elif config.method == "deep_ensemble":
        model = DeepEnsemble([network(m) for m in range(size)])
    else:
        model = network(0)
    optimizer = optimizers.build(
        "adam", model, learning_rate=config.learning_rate, weight_decay=0.0, training_examples=config.train_points
    )
    scheduler = schedule(optimizer, 0, config.epochs)
    shares = torch.Generator().manual_seed(config.seed)

    def loss_of(x: Tensor, y: Tensor, with_variance: bool) -> Tensor:
        outputs = model(x)
        # a variance of 1 leaves the squared error, which has its minimum where the likelihood has it for any constant
        variance = regression.variance_of(outputs[:, 1:]) if with_variance else torch.ones_like(y)
        loss = regression.gaussian_nll(y, outputs[:, :1], variance).mean()
        # the networks of a deep ensemble each follow the gradient of their own loss, as if trained alone
        return loss * size if config.method == "deep_ensemble" else loss

    started = time.perf_counter()
    for epoch in range(config.epochs):
        if config.regime == "split":
            dealt = torch.randperm(len(x), generator=shares)[: size * (len(x) // config.ensemble_size)]
            batch = x[dealt], y[dealt]
        else:
            batch = repeat(x, size), repeat(y, size)
        with_variance = epoch >= round(config.mean_first * config.epochs)
        optimizers.step(optimizer, partial(loss_of, *batch, with_variance))
        scheduler.step()
    seconds = time.perf_counter() - started

    @torch.no_grad()
    def outputs_at(x: Tensor) -> Tensor:
        outputs = members(model(repeat(x, size)), size).double()
        if not outputs.isfinite().all():
            raise Diverged(
                f"predictions must be finite numbers, however they are not after {config.epochs} epochs: the learning rate is "
                "too high for this setting; no result was written"
            )
        return outputs

    # the likelihood's own estimate of each member's constant variance, (ensemble_size, 1)
    residual = (outputs_at(x)[..., 0] - y[:, 0]).square().mean(1, keepdim=True)

    def predict(inputs: Any) -> tuple[Tensor, Tensor]:
        """Return each member's means and variances in the units of the data: (ensemble_size, points) both."""
        outputs = outputs_at(column((inputs - x_mean) / x_sd))
        mean, constant = outputs[..., 0], residual.clamp_min(regression.LEAST_VARIANCE)
        variance = (
            constant.expand_as(mean) if config.variance == "constant" else regression.variance_of(outputs[..., 1])
        )
        return y_mean + y_sd * mean, y_sd**2 * variance

    rows: list[dict[str, Any]] = []
    generator = GENERATORS[config.generator]
    for split in (field.name for field in fields(Dataset)):
        points = getattr(data, split)
        targets = torch.as_tensor(points.y)
        new = regression.measure(targets, *predict(points.x))
        truth = [
            torch.as_tensor(part)[None] for part in (generator.target(points.x), generator.noise_sd(points.x) ** 2)
        ]
        of_truth = regression.measure(targets, *truth)[-1]
        new[-1] |= {"rmse_of_truth": of_truth["rmse"], "nll_of_truth": of_truth["nll"]}
        rows += [{"epoch": config.epochs, "split": split, **row, "seconds": seconds} for row in new]
    if config.seed == 0:
        rows += [{"epoch": config.epochs, **row} for row in curves(config, data, predict)]
    path = run.write(
        rows,
        measured=(*REGRESSION_METRICS, "rmse_of_truth", "nll_of_truth", *CURVE),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        **device_facts(torch.device("cpu"), "fp32", optimizer, compiled=False),
        data_source=f"generated: {config.generator}",
    )
    print(f"written: {path}")
    return path


CURVE = ("x", "mean", "sd", "lower", "upper")


def curves(config: Config, data: Dataset, predict: Any) -> list[dict[str, Any]]:
    """Return what a figure of the predictions needs, a row a curve: each cell of CURVE holds numbers, separated by spaces.

    split curve: of each member and the ensemble, `mean` and `sd`, of the ensemble also the ends of its central 95 %
    interval; truth: the generator's; points: the training points, their targets as `mean`; gap and outside: their two ends.
    """
    from batchens.regression import mixture_moments, mixture_quantile

    def row(split: str, member: int | None = None, **curves: Any) -> dict[str, Any]:
        return {"split": split, "member": member, **{name: numbers(values) for name, values in curves.items()}}

    generator = GENERATORS[config.generator]
    x = generator.grid(CURVE_POINTS)
    means, variances = predict(x)
    mean, variance = mixture_moments(means, variances)
    lower, upper = (mixture_quantile(p, means, variances) for p in (0.025, 0.975))
    return [
        *(row("curve", m, x=x, mean=means[m], sd=variances[m].sqrt()) for m in range(len(means))),
        row("curve", x=x, mean=mean, sd=variance.sqrt(), lower=lower, upper=upper),
        row("truth", x=x, mean=generator.target(x), sd=generator.noise_sd(x)),
        row("points", x=data.train.x, mean=data.train.y),
        *(row(region, x=generator.intervals(region)[0]) for region in ("gap", "outside")),
    ]


if __name__ == "__main__":
    sys.exit(command_line("skafte_mlp", Config, main, __doc__))
