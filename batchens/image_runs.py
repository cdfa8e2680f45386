"""A run that trains a network on a data set of images: what is the same for every experiment that does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchens import optimizers
from batchens.data import images as data
from batchens.data.images import Images
from batchens.results import CURVE, METRICS, numbers
from batchens.run import Run
from batchens.training import Regime, choose_device, device_facts, fit, keep_freed_memory


def train_on_images(
    run: Run,
    config: Any,
    build: Callable[[Images], nn.Module],
    *,
    ensemble_size: int,
    regime: Regime,
    hess_init: float = 0.5,
    beta2: float | None = None,
    posterior_samples: int = 0,
) -> Path:
    """Train what `build` returns for these images, with checkpoints, and write the result; return its path.

    `config` has the fields dataset, device, threads, optimizer, learning_rate, weight_decay, momentum, epochs, warmup_epochs,
    batch_size, augment, seed, precision and compile, as in `scripts/parameter_testing.py`; `hess_init` and
    `posterior_samples` are IVON's, `beta2` is Adam's and IVON's.

    Raises: what `batchens.training.fit` does.
    """
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    images = data.load(config.dataset, run.folders.data, device)
    model = build(images)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack it
    optimizer = optimizers.build(
        config.optimizer,
        model,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        beta2=beta2,
        training_examples=len(images.train),
        hess_init=hess_init,
    )
    torch.manual_seed(config.seed)  # of IVON's samples
    rows = fit(
        model,
        images,
        optimizer,
        ensemble_size=ensemble_size,
        regime=regime,
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        batch_size=config.batch_size,
        augmented=config.augment,
        seed=config.seed,
        precision=config.precision,
        compiled=config.compile,
        posterior_samples=posterior_samples,
        checkpoint=run.checkpoint,
        on_epoch=lambda new: run.after_epoch(new, config.epochs),
    )
    path = run.write(
        [*rows, weights_row(model, config.epochs)],
        measured=(*METRICS, *CURVE),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        **device_facts(device, config.precision, optimizer, config.compile),
        data_source=images.source,
    )
    print(f"written: {path}")
    return path


def weights_row(model: nn.Module, epoch: int) -> dict[str, Any]:
    """Return the row of split weights: the density of the slow weights in 81 bins, up to 5 standard deviations."""
    weights = torch.cat([weight.detach().flatten() for weight in optimizers.slow_weights(model)]).float().cpu()
    reach = 5 * weights.std().item() or 1.0  # of weights that are all equal too
    counts, edges = weights.histogram(81, range=(-reach, reach))
    density = counts / len(weights) / (edges[1] - edges[0])
    return {
        "epoch": epoch,
        "split": "weights",
        "member": None,
        "x": numbers((edges[1:] + edges[:-1]) / 2),
        "y": numbers(density),
    }
