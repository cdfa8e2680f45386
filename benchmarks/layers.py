"""What a BatchEnsemble layer costs over a plain one: VGG11, 4 members of 64 images, forward and backward.

    make bench                                  # this and the other benchmarks
    python -m benchmarks.layers --each          # every convolution of VGG11 alone: where folding beats scaling

All forms run in turn, round after round, in one process; a number is the median over the rounds of a form's time over the
plain network's in the same round, with the smallest and largest. On a CPU with one thread and with all; on a GPU in the
number format of training there, with and without torch.compile, beside the share of the measured matmul peak. The forms:

    plain               the plain network on the same 256 images
    ours                batchens.layers, which chooses folding or scaling for each convolution
    ours, BN of members the same, with BatchNorm affine parameters of each member
    folded, scaled      the same layers, made to fold, or to scale, everywhere
    naive               activation scaling as it is usually written: fast weights repeated for each row, three extra passes
    torch-uncertainty   its layers, where it is installed
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from batchens.data.vision import import_datasets
from batchens.layers import BatchEnsembleConv2d, BatchEnsembleLinear, batch_ensemble
from batchens.models.vgg import vgg11
from batchens.training import autocast_dtype, keep_freed_memory

MEMBERS, BATCH = 4, 64


class NaiveConv2d(BatchEnsembleConv2d):
    """Scaling activations row by row, as seed implementations write it."""

    def forward(self, x: Tensor) -> Tensor:
        alpha, gamma, bias = (
            p.repeat_interleave(len(x) // self.ensemble_size, 0)[:, :, None, None]
            for p in (self.alpha, self.gamma, self.bias)
        )
        return self._conv_forward(x * alpha, self.weight, None) * gamma + bias


class NaiveLinear(BatchEnsembleLinear):
    def forward(self, x: Tensor) -> Tensor:
        alpha, gamma, bias = (
            p.repeat_interleave(len(x) // self.ensemble_size, 0) for p in (self.alpha, self.gamma, self.bias)
        )
        return F.linear(x * alpha, self.weight) * gamma + bias


class FoldedConv2d(BatchEnsembleConv2d):
    forward = BatchEnsembleConv2d.forward_folded


class ScaledConv2d(BatchEnsembleConv2d):
    forward = BatchEnsembleConv2d.forward_scaled


def ensemble(
    conv: type = BatchEnsembleConv2d, linear: type = BatchEnsembleLinear, batchnorm: Any = "shared"
) -> nn.Module:
    model = batch_ensemble(vgg11(10), ensemble_size=MEMBERS, alpha_init=-0.5, gamma_init=-0.5, batchnorm=batchnorm)
    for layer in model.modules():
        if isinstance(layer, BatchEnsembleConv2d):
            layer.__class__ = conv
        elif isinstance(layer, BatchEnsembleLinear):
            layer.__class__ = linear
    return model


def torch_uncertainty() -> nn.Module | None:
    """VGG11 of torch-uncertainty's layers, or None where it is not installed."""
    try:
        import_datasets()  # it imports torchvision, which may need our help
        from torch_uncertainty.layers.batch_ensemble import BatchConv2d, BatchLinear
    except ImportError as error:
        print(f"torch-uncertainty is left out: {error}")
        return None
    layers: list[nn.Module] = []
    for layer in vgg11(10):
        if isinstance(layer, nn.Conv2d):
            layers.append(BatchConv2d(layer.in_channels, layer.out_channels, 3, padding=1, num_estimators=MEMBERS))
        elif isinstance(layer, nn.Linear):
            layers.append(BatchLinear(layer.in_features, layer.out_features, num_estimators=MEMBERS))
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


def ratios(forms: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return seconds of each form in each round, all forms in turn; the first, untimed round warms up."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, form in forms.items():
            synchronise(device)
            started = time.perf_counter()
            form()
            synchronise(device)
            if number:
                times[name].append(time.perf_counter() - started)
    return times


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(title: str, times: dict[str, list[float]], peak: float | None = None) -> None:
    """Print a form a line: median ms, ratio to the first form (median and range over rounds), share of the peak."""
    print(f"\n{title}")
    first = next(iter(times.values()))
    for name, seconds in times.items():
        over = sorted(one / plain for one, plain in zip(seconds, first, strict=True))
        line = f"  {name:20} {1000 * statistics.median(seconds):8.2f} ms {statistics.median(over):6.3f} of {next(iter(times))}"
        line += f" ({over[0]:.3f} to {over[-1]:.3f})"
        if peak is not None:
            line += f"  {100 * FLOPS / statistics.median(seconds) / peak:5.1f} % of the matmul peak"
        print(line, flush=True)


# Forward and backward of VGG11 on 256 images: 2 operations a multiply-add, and the backward pass is two forward ones (the
# first convolution needs no gradient of its input).
_FORWARD = 2 * MEMBERS * BATCH * (
    sum(9 * i * o * s * s for i, o, s in ((3, 64, 32), (64, 128, 16), (128, 256, 8), (256, 256, 8), (256, 512, 4)))
    + sum(9 * 512 * 512 * s * s for s in (4, 2, 2)) + 512 * 512 + 5120
)  # fmt: skip
FLOPS = 3 * _FORWARD - 2 * MEMBERS * BATCH * 9 * 3 * 64 * 32 * 32


def step_of(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    model.to(x.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = torch.compile(model) if compiled else model

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with nullcontext() if dtype == torch.float32 else torch.autocast(x.device.type, dtype):
            logits = network(x)
        F.cross_entropy(logits.float(), y).backward()

    return step


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of a large square matrix product, the best of twenty."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        torch.mm(a, b)

    return 2 * size**3 / min(ratios({"matmul": multiply}, 20, device)["matmul"])


def network(rounds: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = autocast_dtype("auto", device, torch.optim.SGD([torch.zeros(1)]))  # as with SGD
    x = torch.randn(MEMBERS * BATCH, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (MEMBERS * BATCH,), device=device)
    models: dict[str, nn.Module | None] = {
        "plain": vgg11(10),
        "ours": ensemble(),
        "ours, BN of members": ensemble(batchnorm="member_affine"),
        "folded": ensemble(FoldedConv2d),
        "scaled": ensemble(ScaledConv2d),
        "naive": ensemble(NaiveConv2d, NaiveLinear),
        "torch-uncertainty": torch_uncertainty(),
    }
    present = {name: model for name, model in models.items() if model is not None}
    if device.type == "cuda":
        peak = matmul_peak(device, dtype)
        print(
            f"{torch.cuda.get_device_name()}, {dtype}, matmul peak {peak / 1e12:.0f} TFLOP/s, torch {torch.__version__}"
        )
        for compiled in (False, True):
            steps = {name: step_of(model, x, y, dtype, compiled) for name, model in present.items()}
            title = "torch.compile" if compiled else "eager"
            table(f"VGG11, {MEMBERS} members of {BATCH}, {title}", ratios(steps, 10 * rounds, device), peak)
        return
    steps = {name: step_of(model, x, y, dtype, False) for name, model in present.items()}
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        table(f"VGG11, {MEMBERS} members of {BATCH}, CPU, {threads} thread(s)", ratios(steps, rounds, device))


def each_convolution(rounds: int) -> None:
    """Print folding and scaling over the plain layer for every convolution of VGG11."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 32
    for number, layer in enumerate(layer for layer in vgg11(10) if isinstance(layer, nn.Conv2d | nn.MaxPool2d)):
        if isinstance(layer, nn.MaxPool2d):
            size //= 2
            continue
        x = torch.randn(MEMBERS * BATCH, layer.in_channels, size, size, device=device)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(number > 0)
        gradient = torch.randn(MEMBERS * BATCH, layer.out_channels, size, size, device=device)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        model = batch_ensemble(layer, ensemble_size=MEMBERS, alpha_init=-0.5, gamma_init=-0.5)
        assert isinstance(model, BatchEnsembleConv2d)
        forms = {}
        for name, module, forward in (
            ("plain", layer, layer.forward),
            ("folded", model, model.forward_folded),
            ("scaled", model, model.forward_scaled),
        ):
            module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            forms[name] = lambda forward=forward, x=x, gradient=gradient: forward(x).backward(gradient)
        activations = MEMBERS * BATCH * size * size * (layer.in_channels + layer.out_channels)
        ratio = activations / (MEMBERS * layer.weight.numel())
        title = (
            f"{layer.in_channels} to {layer.out_channels} channels at {size}x{size}, activations / weights {ratio:.2f}"
        )
        table(title, ratios(forms, rounds, device))


def main(rounds: int = 9, each: bool = False) -> None:
    """Time BatchEnsemble layers against the plain network.

    Args:
        rounds: timed rounds; every form runs once in each
        each: every convolution alone instead of the whole network
    """
    keep_freed_memory()
    each_convolution(rounds) if each else network(rounds)


if __name__ == "__main__":
    tyro.cli(main)
