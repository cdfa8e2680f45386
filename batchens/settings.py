"""What the settings that every training on images has must be. Imports no torch: asked before anything is submitted."""

import math
from typing import Any

from batchens.data.catalog import DATASETS

LEAST = {"ensemble_size": 1, "epochs": 1, "batch_size": 1, "warmup_epochs": 0, "weight_decay": 0, "threads": 0}


def check(config: Any) -> None:
    """Check the fields of a Config that the experiments share, as in `scripts/parameter_testing.py`.

    Raises:
        ValueError: one is not possible; the message says which, what is allowed and what it was.
    """
    for name, least in LEAST.items():
        value = getattr(config, name)
        if not least <= value < math.inf:
            raise ValueError(
                f"{name} must be {'finite' if value == math.inf else f'at least {least}'}, however: {value}"
            )
    if not config.warmup_epochs < config.epochs:
        raise ValueError(
            f"warmup_epochs must be below epochs={config.epochs}, however: {config.warmup_epochs}; at 0 there is no warm-up"
        )
    if not 0 < config.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, however: {config.learning_rate}")
    if not 0 <= config.momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, however: {config.momentum}")
    for name in ("alpha_init", "gamma_init"):
        value = getattr(config, name, None)
        if value is not None and not value <= 1:
            raise ValueError(f"{name} must be negative, between 0 and 1, or None, however: {value}")
    if config.model.startswith("vgg") and DATASETS[config.dataset].shape[-1] < 28:
        raise ValueError(
            f"{config.model} takes images of 28x28 or 32x32, however {config.dataset} has smaller ones; use cnn or mlp"
        )
