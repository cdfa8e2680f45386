"""What it costs to average networks: PermAVG's steps and predictions, its Sinkhorn normalisation, and weight matching.

    python -m benchmarks.averaging            # 784-512-10, 3 networks, batches of 512; matching of two VGG11
    python -m benchmarks.averaging --members 8

All forms run in turn, round after round, in one process; a number is the median over the rounds of a form's time over that of
the first form in the same round, with the smallest and largest. The forms:

    plain               one network 784-512-10
    ours                batchens.averaging: weights averaged once, one forward pass; predictions by the exported network.
                        Normalisation may end before 100 rounds, when rows and columns sum to 1 (`sinkhorn`, tolerance)
    thesis              always 100 normalisations of rows and columns one by one, a forward pass of every network, in each call
    thesis, in logs     the same with logsumexp, which does not overflow
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from batchens.averaging import FLOOR, ITERATIONS, AveragedNetwork, match, permute, sinkhorn
from batchens.models.mlp import mlp
from batchens.models.vgg import vgg11
from batchens.training import keep_freed_memory
from benchmarks.layers import ratios, table

BATCH, UNITS = 512, 512
Normalise = Callable[[Tensor, float], Tensor]


def one_by_one(matrices: Tensor, temperature: float) -> Tensor:
    kernel = torch.exp(matrices / temperature) + FLOOR
    for _ in range(ITERATIONS):
        kernel = kernel / kernel.sum(-1, keepdim=True)
        kernel = kernel / kernel.sum(-2, keepdim=True)
    return kernel


def in_logs(matrices: Tensor, temperature: float) -> Tensor:
    kernel = torch.logaddexp(matrices / temperature, matrices.new_tensor(FLOOR).log())
    for _ in range(ITERATIONS):
        kernel = kernel - kernel.logsumexp(-1, keepdim=True)
        kernel = kernel - kernel.logsumexp(-2, keepdim=True)
    return kernel.exp()


class Thesis(nn.Module):
    """PermAVG of networks with one hidden layer as its author wrote it."""

    def __init__(self, networks: list[nn.Module], temperature: float, normalise: Normalise):
        super().__init__()
        self.layers = [[layer for layer in network.modules() if isinstance(layer, nn.Linear)] for network in networks]
        self.matrices = nn.Parameter(torch.eye(UNITS).repeat(len(networks) - 1, 1, 1))
        self.temperature, self.normalise = temperature, normalise

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        matrices = [torch.eye(UNITS), *(self.normalise(matrix, self.temperature) for matrix in self.matrices)]
        pairs = list(zip(matrices, self.layers, strict=True))
        hidden = cast(Tensor, sum(first(x) @ p.T for p, (first, _) in pairs)) / len(pairs)
        hidden = F.relu(hidden)
        return cast(Tensor, sum(second(hidden @ p) for p, (_, second) in pairs)) / len(pairs)


def learned(size: int, members: int, spread: float) -> Tensor:
    """Return matrices as they are after some training: near the identity, with noise."""
    return torch.eye(size) + spread * torch.randn(members, size, size)


def normalisation(rounds: int, members: int, temperature: float) -> None:
    forms: dict[str, Normalise] = {"ours": sinkhorn, "one by one": one_by_one, "in logs": in_logs}
    for spread in (0.01, 0.3):
        matrices = learned(UNITS, members - 1, spread).requires_grad_()
        title = f"Sinkhorn, {members - 1} of {UNITS} x {UNITS}, temperature {temperature}, spread {spread}"
        for what, work in (("forward", forward), ("forward and backward", backward)):
            steps: dict[str, Callable[[], None]] = {
                name: partial(work, form, matrices, temperature) for name, form in forms.items()
            }
            table(f"{title}, {what}", ratios(steps, rounds, torch.device("cpu")))


@torch.no_grad()
def forward(form: Normalise, matrices: Tensor, temperature: float) -> None:
    form(matrices, temperature)


def backward(form: Normalise, matrices: Tensor, temperature: float) -> None:
    form(matrices, temperature).square().sum().backward()


def permavg(rounds: int, members: int, temperature: float) -> None:
    networks: list[nn.Module] = [mlp(784, [UNITS], 10) for _ in range(members)]
    ours = AveragedNetwork(networks, temperature=temperature)
    models: dict[str, nn.Module] = {
        "plain": mlp(784, [UNITS], 10),
        "ours": ours,
        "thesis": Thesis(networks, temperature, one_by_one),
        "thesis, in logs": Thesis(networks, temperature, in_logs),
    }
    ours.matrices[str(UNITS)].data[0] = matrices = learned(UNITS, members - 1, 0.1)
    for name in ("thesis", "thesis, in logs"):
        cast(Thesis, models[name]).matrices.data = matrices.clone()
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    with torch.no_grad():  # the same function
        torch.testing.assert_close(models["thesis"](x), ours(x), rtol=1e-3, atol=1e-3)

    def training(model: nn.Module) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()

        return step

    def predicting(model: nn.Module) -> Callable[[], None]:
        @torch.no_grad()
        def step() -> None:
            model(x)

        return step

    cpu, setting = torch.device("cpu"), f"{members} networks, batch of {BATCH}, temperature {temperature}"
    table(f"PermAVG, {setting}, a training step", ratios({n: training(m) for n, m in models.items()}, rounds, cpu))
    predictors = {n: (ours.export() if m is ours else m).eval() for n, m in models.items()}
    table(f"PermAVG, {setting}, predictions", ratios({n: predicting(m) for n, m in predictors.items()}, rounds, cpu))


def matching() -> None:
    """Print the seconds of matching two VGG11: with nothing in common, and one with itself in another order."""
    for batchnorm in (True, False):
        first, second = vgg11(10, batchnorm=batchnorm), vgg11(10, batchnorm=batchnorm)
        order = [torch.randperm(size) for size in (64, 128, 256, 256, 512, 512, 512, 512, 512)]
        for name, other in (("two networks", second), ("a network and itself in another order", permute(first, order))):
            times = []
            for seed in range(3):
                started = time.perf_counter()
                match([first, other], seed=seed)
                times.append(time.perf_counter() - started)
            title = f"VGG11 {'with' if batchnorm else 'without'} BatchNorm"
            print(f"matching, {title}, {name}: {statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f})")


def main(rounds: int = 9, members: int = 3) -> None:
    """Time averaging against a plain network and against the form of the thesis, on the CPU.

    Args:
        rounds: timed rounds; every form runs once in each
        members: number of networks
    """
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for temperature in (0.1, 1.0):
        permavg(rounds, members, temperature)
    normalisation(rounds, members, 0.1)
    print()
    matching()


if __name__ == "__main__":
    tyro.cli(main)
