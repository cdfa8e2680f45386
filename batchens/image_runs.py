"""A run that trains a network on a data set of images: what is the same for every experiment that does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchens import optimizers
from batchens.data import images as data
from batchens.data.images import Images
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
) -> Path:
    """Train what `build` returns for these images, with checkpoints, and write the result; return its path.

    `config` has the fields dataset, device, threads, optimizer, learning_rate, weight_decay, momentum, epochs, warmup_epochs,
    batch_size, augment, seed, precision and compile, as in `scripts/parameter_testing.py`; `hess_init` is IVON's.

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
        checkpoint=run.checkpoint,
        on_epoch=lambda new: run.after_epoch(new, config.epochs),
    )
    path = run.write(
        rows,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        **device_facts(device, config.precision, optimizer, config.compile),
        data_source=images.source,
    )
    print(f"written: {path}")
    return path
