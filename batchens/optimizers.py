"""SGD, Adam and IVON over two groups of parameters: slow weights, which decay, and all others, which do not.

IVON comes from `ivon-opt` (Shen et al. 2024, arXiv:2402.17641); its traps are handled around it, here:

- gradients must be made inside `sampled_params(train=True)`: `step` does so, and nothing else in the suite steps;
- a parameter without a gradient, which the loss did not depend on, stops it with an AttributeError: `step` makes it a zero;
- `sampled_params` leaves the noisy weights in place when something is raised inside: `sampled` puts the means back;
- BatchNorm gathers its running statistics at samples, and at the mean they are used as they are: estimated anew on digits, they
  changed the NLL by less than 0.003;
- its state_dict forgets the step count, which its debiasing needs, and loads its buffers onto the device they were saved
  from: `state_of` and `load_state` see to both.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from ivon import IVON
from torch import Tensor, nn

from batchens.layers import BatchEnsembleBatchNorm2d, BatchEnsembleConv2d, BatchEnsembleLinear

Name = Literal["sgd", "adam", "ivon"]


def slow_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weight of every linear and convolutional layer, plain or BatchEnsemble, once each: what decays."""
    weights = (
        cast(nn.Parameter, layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    )
    return list({id(weight): weight for weight in weights}.values())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the slow weights, with `weight_decay`, and every other parameter, without: alpha, gamma, biases, BatchNorm."""
    slow = slow_weights(model)
    ids = {id(weight) for weight in slow}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    groups = [dict(params=slow, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    return [group for group in groups if group["params"]]


def build(
    name: Name,
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
    beta2: float | None = None,
    training_examples: int,
    hess_init: float = 0.5,
) -> torch.optim.Optimizer:
    """Return the optimizer of that name over `parameter_groups(model, weight_decay)`.

    For IVON what belongs to single members of a BatchEnsemble is a third group. The loss is the mean of the members', so a
    member's own parameters see 1 / ensemble_size of its gradient; an effective sample size of training_examples *
    ensemble_size makes their posterior that of the member's whole likelihood. Shared weights learn from the mean itself.

    Args:
        name: "sgd" (Nesterov; `momentum` > 0), "adam" (AdamW) or "ivon".
        weight_decay: for SGD and IVON in the gradient of the mean loss, for Adam decoupled.
        momentum: the decay of the first moment: SGD's momentum, Adam's and IVON's beta1.
        beta2: the decay of Adam's squared gradients, 0.999 if not given, and of IVON's Hessian, 0.99999.
        training_examples: IVON's effective sample size: with it the posterior is neither tempered nor cooled.
        hess_init: IVON's initial Hessian, 0.5 in its authors' image experiments.
    """
    groups = parameter_groups(model, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0)
    if name == "adam":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(momentum, 0.999 if beta2 is None else beta2))
    if name == "ivon":
        return IVON(
            _with_members_apart(model, groups, training_examples),
            lr=learning_rate,
            ess=training_examples,
            beta1=momentum,
            beta2=0.99999 if beta2 is None else beta2,
            hess_init=hess_init,
        )
    raise ValueError(f'an optimizer must be "sgd", "adam" or "ivon", however: {name!r}')


def _with_members_apart(model: nn.Module, groups: list[dict[str, Any]], training_examples: int) -> list[dict[str, Any]]:
    own: dict[int, int] = {}
    for layer in model.modules():
        if isinstance(layer, BatchEnsembleLinear | BatchEnsembleConv2d):
            own |= {id(p): layer.ensemble_size for p in (layer.alpha, layer.gamma, layer.bias) if p is not None}
        elif isinstance(layer, BatchEnsembleBatchNorm2d):
            own |= {id(p): layer.ensemble_size for p in layer.parameters() if p.dim() == 2}
    split = []
    for group in groups:
        for size in sorted({own.get(id(p), 1) for p in group["params"]}):
            mine = [p for p in group["params"] if own.get(id(p), 1) == size]
            split.append(group | {"params": mine, "ess": training_examples * size})
    return split


def step(
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[], Tensor],
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Make one step on the loss that `loss_of()` computes; for IVON, at parameters drawn from its posterior.

    `scaler` is for float16, where small gradients would vanish; IVON, which collects gradients before a step can be
    skipped for overflow, does not go with it (`training.autocast_dtype` refuses).
    """
    optimizer.zero_grad(set_to_none=True)
    if isinstance(optimizer, IVON):
        with sampled(optimizer, train=True):
            loss_of().backward()
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    elif scaler is not None:
        scaler.scale(loss_of()).backward()
        scaler.step(optimizer)
        scaler.update()
    else:
        loss_of().backward()
        optimizer.step()


@contextmanager
def sampled(optimizer: IVON, train: bool = False) -> Iterator[None]:
    """Hold a sample of IVON's posterior in the parameters; the means are back afterwards, whatever is raised inside."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    means = [parameter.data for parameter in parameters]  # IVON puts new tensors in their place, so no copy is needed
    try:
        with optimizer.sampled_params(train=train):
            yield
    except BaseException:
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.data = mean
        raise


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return all that `load_state` needs to go on as if never stopped."""
    return {
        "name": type(optimizer).__name__,
        "state": optimizer.state_dict(),
        "ivon_step": getattr(optimizer, "current_step", None),
    }


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put back what `state_of` returned, on the device of the parameters.

    Raises:
        ValueError: it is of another optimizer.
    """
    if saved["name"] != type(optimizer).__name__:
        raise ValueError(f"the state must be of {type(optimizer).__name__}, however it is of {saved['name']}")
    optimizer.load_state_dict(saved["state"])
    if isinstance(optimizer, IVON):
        optimizer.current_step = saved["ivon_step"]
        for group in optimizer.param_groups:  # it keeps its buffers in the groups, where torch does not move them
            for buffer in ("momentum", "hess"):
                group[buffer] = group[buffer].to(group["params"][0].device)
