"""One network out of several: averages of weights, after permutations that were found or matrices that were learned.

The hidden units of a layer can be put into any order, if the layers around it follow, and the network's outputs stay the
same. So weights of networks that were trained from different points can't be averaged unit by unit before it is known which
units belong together. All of it is here, for networks that are an `nn.Sequential` of linear and convolutional layers,
BatchNorm, and what acts on each channel alone:

| what                | how units are put together                                                                       |
|---------------------|--------------------------------------------------------------------------------------------------|
| `average`           | as they come, or by given permutations                                                           |
| `match`             | by permutations that make weights most alike (Git Re-Basin, Ainsworth et al., arXiv:2209.04836)  |
| `AveragedNetwork`   | by matrices that are learned by gradient from labels: doubly stochastic ones (PermAVG) or any    |

The average of M networks has layers `W = 1/M sum_m P_ml W_ml P_m,l-1^T` and `b = 1/M sum_m P_ml b_ml`, P of the inputs and
of the outputs being the identity: the same outputs as the mean over members of each permuted layer, from one network's
forward pass. A permutation of a layer is a vector of indices: unit i of the permuted network is unit `permutation[i]` of the
network. Where a linear layer follows flattened convolutions, a channel is a block of its inputs.
"""

import copy
import hashlib
import itertools
import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call

State = dict[str, Tensor]
Permutations = list[Tensor]
"""of one network: a vector of indices for each hidden layer"""

# exact types only: a subclass, as which a parametrization shows too, may compute anything
_WEIGHTED = (nn.Linear, nn.Conv2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# where units are not told apart by their place; all act on each channel alone
_CHANNELWISE = (nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
                nn.ZeroPad2d, nn.Flatten, nn.Dropout, nn.Identity)  # fmt: skip


@dataclass(frozen=True)
class Axes:
    """Which hidden layer's units the first two axes of a tensor count; None: inputs or outputs, which keep their order."""

    out: int | None
    into: int | None = None


@dataclass(frozen=True)
class Layout:
    """The hidden layers of a network, and where each shows in its state_dict."""

    sizes: tuple[int, ...]
    """units of each hidden layer"""
    axes: dict[str, Axes]
    """of every floating-point tensor of the state_dict, by name"""

    def of_parameters(self) -> list[tuple[str, Axes]]:
        """Return the tensors that are parameters: all but statistics of BatchNorm."""
        return [(n, axes) for n, axes in self.axes.items() if not n.endswith(("running_mean", "running_var"))]


def layout(network: nn.Module) -> Layout:
    """Find the hidden layers of a sequential network.

    Its structure is all that is looked at. Linear layers are taken to be given (batch, features): of inputs with more axes, of
    which BatchNorm1d or what follows may see another one, nothing is known here.

    Raises:
        ValueError: a layer whose units can't be put into another order, or too few of them.
    """
    leaves = list(_leaves(network))
    for _, leaf in leaves:
        flattens = not isinstance(leaf, nn.Flatten) or (leaf.start_dim, leaf.end_dim) == (1, -1)
        if type(leaf) not in (*_WEIGHTED, *_NORMS, *_CHANNELWISE) or not flattens:
            raise ValueError(
                f"layers must be linear, convolutional, BatchNorm or act on each channel alone, however: {leaf}"
            )
    weighted = [name for name, leaf in leaves if isinstance(leaf, _WEIGHTED)]
    if len(weighted) < 2:
        raise ValueError(f"a network must have a hidden layer for its units to be permuted, however: {network}")
    sizes: list[int] = []
    axes: dict[str, Axes] = {}
    layer: int | None = None  # whose units the activations here are
    form: Literal["images", "flattened images", "units"] | None = None  # None: not known of the inputs
    for name, leaf in leaves:
        if isinstance(leaf, _WEIGHTED):
            convolution = isinstance(leaf, nn.Conv2d)
            if form is not None and convolution != (form == "images"):
                raise ValueError(
                    "convolutions must come first, then a Flatten, then linear layers, "
                    f"however {name!r} is {leaf} and is given {form}"
                )
            inputs, before = leaf.weight.shape[1], layer
            blocks = before is not None and form == "flattened images" and inputs % sizes[before] == 0
            if getattr(leaf, "groups", 1) != 1 or (before is not None and inputs != sizes[before] and not blocks):
                raise ValueError(
                    f"a layer must be connected to all units of the one before, however {name!r} is {leaf}"
                )
            layer, form = None, "images" if convolution else "units"
            if name != weighted[-1]:
                layer = len(sizes)
                sizes.append(len(leaf.weight))
            axes[f"{name}.weight"] = Axes(layer, before)
            if leaf.bias is not None:
                axes[f"{name}.bias"] = Axes(layer)
        elif isinstance(leaf, _NORMS):
            axes |= {f"{name}.{key}": Axes(layer) for key, t in leaf.state_dict().items() if t.is_floating_point()}
        elif isinstance(leaf, nn.Flatten) and form == "images":
            form = "flattened images"
    first_names: dict[int, str] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if (first := first_names.setdefault(id(tensor), name)) != name:
            raise ValueError(f"a layer must be used once and share nothing with others, however {name} is {first}")
        if tensor.is_floating_point() != (name in axes):
            raise ValueError(
                "tensors must be the floating-point weights of plain layers, or BatchNorm's, "
                f"however {name} is {tensor.dtype}, {_shape(tensor.shape)}"
            )
        out = axes.get(name, Axes(None)).out
        if out is not None and len(tensor) != sizes[out]:
            raise ValueError(
                f"BatchNorm must stand where each of the {sizes[out]} units before is one channel, so not behind a Flatten of "
                f"images, however {name} is {_shape(tensor.shape)}"
            )
    return Layout(tuple(sizes), axes)


def _leaves(module: nn.Module, prefix: str = "") -> Iterable[tuple[str, nn.Module]]:
    """Return the layers of nested nn.Sequential in the order in which they act."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _leaves(child, f"{prefix}.{name}" if prefix else name)


def check_alike(networks: Sequence[nn.Module]) -> Layout:
    """Return the layout that these networks share.

    Raises:
        ValueError: fewer than two, or networks of different layers, shapes, dtypes or devices.
    """
    if len(networks) < 2:
        raise ValueError(f"an average must be of at least two networks, however: {len(networks)}")
    first = networks[0]
    shapes = {name: tensor.shape for name, tensor in first.state_dict().items()}
    for number, other in enumerate(networks[1:], 1):
        theirs = {name: tensor.shape for name, tensor in other.state_dict().items()}
        if shapes != theirs or repr(first) != repr(other):
            differing = [n for n in {**shapes, **theirs} if shapes.get(n) != theirs.get(n)]
            raise ValueError(
                f"networks must be of one architecture, however network {number} is not like network 0: "
                + (
                    ", ".join(f"{n} is {_shape(theirs.get(n))} and not {_shape(shapes.get(n))}" for n in differing[:3])
                    or "their layers differ"
                )
            )
    kinds = {(t.dtype, t.device) for one in networks for t in one.state_dict().values() if t.is_floating_point()}
    if len(kinds) > 1:
        found = sorted(f"{dtype} on {device}" for dtype, device in kinds)
        raise ValueError(f"networks must be of one dtype and on one device, however they are {' and '.join(found)}")
    return layout(first)


def _shape(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape)) or "a scalar"


# permutations


def permute(network: nn.Module, permutations: Permutations) -> nn.Module:
    """Return the network with the units of its hidden layers in another order; its outputs are the same.

    Raises:
        ValueError: the network can't be permuted, or there is not one permutation for each hidden layer.
    """
    permuted = copy.deepcopy(network)
    permuted.load_state_dict(_permuted(network.state_dict(), layout(network), permutations))
    return permuted


def _permuted(state: State, where: Layout, permutations: Permutations) -> State:
    indices = all(p.dim() == 1 and p.dtype in (torch.int32, torch.int64) for p in permutations)  # bool is a mask
    if not indices or [sorted(p.tolist()) for p in permutations] != [list(range(size)) for size in where.sizes]:
        raise ValueError(
            f"permutations must be integers, one vector for each hidden layer with each index of its {where.sizes} units once, "
            f"however of {[p.numel() for p in permutations]}: {reprlib.repr([p.tolist() for p in permutations])}"
        )
    return {name: _permute(tensor, where.axes.get(name), where, permutations) for name, tensor in state.items()}


def _permute(tensor: Tensor, axes: Axes | None, where: Layout, permutations: Permutations) -> Tensor:
    if axes is None:
        return tensor
    if axes.out is not None:
        tensor = tensor[permutations[axes.out].to(tensor.device)]
    if axes.into is not None:
        blocks = tensor.reshape(len(tensor), where.sizes[axes.into], -1)
        tensor = blocks[:, permutations[axes.into].to(tensor.device)].reshape(tensor.shape)
    return tensor


def average(networks: Sequence[nn.Module], permutations: Sequence[Permutations] | None = None) -> nn.Module:
    """Return the network of the mean weights, those of each network permuted before.

    Statistics of BatchNorm are averaged too, which is not what they would be: see `reestimate`.

    Raises:
        ValueError: fewer than two networks, or not of one architecture; permutations that are none.
    """
    where = check_alike(networks)
    states = [network.state_dict() for network in networks]
    if permutations is not None:
        if len(permutations) != len(networks):
            raise ValueError(
                f"permutations must be those of each of the {len(networks)} networks, however of {len(permutations)}"
            )
        states = [_permuted(state, where, own) for state, own in zip(states, permutations, strict=True)]
    return _with_state(networks[0], _mean(states))


def between(first: nn.Module, second: nn.Module, share: float) -> nn.Module:
    """Return the network on the line from `first` (share 0) to `second` (share 1)."""
    check_alike([first, second])
    start, end = first.state_dict(), second.state_dict()
    state = {n: t.lerp(end[n], share) if t.is_floating_point() else t for n, t in start.items()}
    return _with_state(first, state)


def _mean(states: Sequence[State]) -> State:
    return {
        name: sum((state[name] for state in states[1:]), tensor) / len(states) if tensor.is_floating_point() else tensor
        for name, tensor in states[0].items()
    }


def _with_state(like: nn.Module, state: State) -> nn.Module:
    network = copy.deepcopy(like)
    network.load_state_dict(state)
    return network


@torch.no_grad()
def reestimate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the statistics of BatchNorm to those of these inputs: means over batches, in place. Nothing without BatchNorm.

    Raises:
        ValueError: there are no batches.
    """
    norms = [layer for layer in network.modules() if isinstance(layer, _NORMS)]
    if not norms:
        return
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("statistics must be those of at least one batch, however there is none")
    momenta, training = [norm.momentum for norm in norms], network.training
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches, not an exponential one
        network.train()
        for batch in itertools.chain([first], batches):
            network(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        network.train(training)


# weight matching


@torch.no_grad()
def match(networks: Sequence[nn.Module], to: Literal["mean", "first"] = "mean", seed: int = 0) -> list[Permutations]:
    """Find permutations of the networks' hidden units that make their weights most alike; the first network keeps its order.

    "first" aligns each network with the first: layer by layer in random order, the permutation that makes the inner product of
    all weights around the layer largest, the other layers' given, until none gets better (algorithm 1 of the paper). That is
    done from two starts, the order as it is and the one found from the inputs on by incoming weights alone, which is exact
    for a permuted copy; the better end counts. "mean" goes on from there and aligns each network with the mean of all others
    (algorithm 3). Every step makes the norm of the average larger, so both end.

    Raises:
        ValueError: fewer than two networks, or not of one architecture; another `to`.
    """
    if to not in ("mean", "first"):
        raise ValueError(f"to must be 'mean' or 'first', however: {to!r}")
    where = check_alike(networks)
    states = [{name: t.detach().cpu() for name, t in network.state_dict().items()} for network in networks]
    order = torch.Generator().manual_seed(seed)
    identity = [torch.arange(size) for size in where.sizes]
    found = [identity]
    for state in states[1:]:
        likeness = _Likeness(states[0], state, where)
        ends = [_align(likeness, start, order) for start in (identity, _from_the_inputs(likeness))]
        found.append(max(ends, key=likeness.total))
    if to == "first" or len(networks) == 2:
        return found
    permuted = [_permuted(state, where, own) for state, own in zip(states, found, strict=True)]
    changed = True
    while changed:
        changed = False
        for m in torch.randperm(len(states), generator=order).tolist():
            others = _mean([state for n, state in enumerate(permuted) if n != m])
            new = _align(_Likeness(others, states[m], where), found[m], order)
            if any(not torch.equal(one, other) for one, other in zip(new, found[m], strict=True)):
                found[m], permuted[m], changed = new, _permuted(states[m], where, new), True
    back = [own.argsort() for own in found[0]]  # all in the order of the first network
    return [[own[reverse] for own, reverse in zip(one, back, strict=True)] for one in found]


@dataclass
class _Product:
    """Inner products of the units of a layer in two networks, over one tensor, given the order of a neighbouring layer."""

    one: Tensor
    """of the target: (units, the neighbour's units, other axes)"""
    other: Tensor
    neighbour: int | None
    incoming: bool
    value: Tensor | None = None
    order: Tensor | None = None
    """the neighbour's, that the value is of"""

    def at(self, found: Permutations) -> Tensor:
        order = torch.arange(self.one.shape[1]) if self.neighbour is None else found[self.neighbour]
        moved = torch.arange(len(order)) if self.order is None else (order != self.order).nonzero()[:, 0]
        if self.value is None or self.order is None or len(moved) > len(order) / 2:
            self.value = self.one.flatten(1) @ self.other[:, order].flatten(1).T
        elif len(moved):  # only what has changed is multiplied anew
            change = self.other[:, order[moved]] - self.other[:, self.order[moved]]
            self.value = self.value + self.one[:, moved].flatten(1) @ change.flatten(1).T
        self.order = order
        return self.value


class _Likeness:
    """Inner products of the units of two networks, over all weights around a layer, given the order of the other layers.

    Of VGG11 those of a layer are 5 billion multiplications, so they are kept until a neighbour changes.
    """

    def __init__(self, target: State, state: State, where: Layout):
        self.sizes = where.sizes
        self.products: list[list[_Product]] = [[] for _ in where.sizes]
        for name, axes in where.of_parameters():
            pair = target[name].float(), state[name].float()
            if axes.out is not None:
                units = 1 if axes.into is None else where.sizes[axes.into]
                one, other = (t.reshape(len(t), units, -1) for t in pair)
                self.products[axes.out].append(_Product(one, other, axes.into, incoming=True))
            if axes.into is not None:
                size = where.sizes[axes.into]
                one, other = (t.reshape(len(t), size, -1).transpose(0, 1).contiguous() for t in pair)
                self.products[axes.into].append(_Product(one, other, axes.out, incoming=False))

    def of(self, layer: int, found: Permutations, incoming: bool = False) -> Tensor:
        """Return the inner product of each of the target's units (rows) with each of the other's; or before the layer only."""
        products = [p for p in self.products[layer] if p.incoming or not incoming]
        return torch.stack([product.at(found) for product in products]).sum(0).double()

    def total(self, found: Permutations) -> float:
        """Return the inner product of all weights."""
        incoming = (self.of(layer, found, incoming=True) for layer in range(len(found)))
        last = [p.at(found).double() for p in self.products[-1] if p.neighbour is None and not p.incoming]
        every = [*zip(incoming, found, strict=True), *((value, found[-1]) for value in last)]
        return sum(value[torch.arange(len(order)), order].sum().item() for value, order in every)

    def neighbours(self, layer: int) -> set[int]:
        return {product.neighbour for product in self.products[layer] if product.neighbour is not None}


def _from_the_inputs(likeness: _Likeness) -> Permutations:
    found = [torch.arange(size) for size in likeness.sizes]
    for layer in range(len(found)):
        found[layer] = assignment(likeness.of(layer, found, incoming=True))
    return found


def _align(likeness: _Likeness, start: Permutations, order: torch.Generator) -> Permutations:
    """Return the permutations that coordinate descent from `start` ends with."""
    found = list(start)
    stale = set(range(len(found)))  # layers with a neighbour that changed since they were looked at
    while stale:
        for layer in torch.randperm(len(found), generator=order).tolist():
            if layer not in stale:
                continue
            stale.remove(layer)
            values = likeness.of(layer, found)
            new, rows = assignment(values), torch.arange(len(values))
            before, after = values[rows, found[layer]].sum(), values[rows, new].sum()
            if after > before + 1e-6 * before.abs():  # rounding must not keep this going
                found[layer] = new
                stale |= likeness.neighbours(layer)
    return found


# learned matrices

ITERATIONS, FLOOR = 100, 0.001  # the thesis'


def sinkhorn(matrices: Tensor, temperature: float, *, iterations: int = ITERATIONS, tolerance: float = 1e-5) -> Tensor:
    """Turn square matrices into doubly stochastic ones: exp(A / temperature) + 0.001, rows and columns normalised in turn.

    So many times at most: fewer where every row's sum is within `tolerance` of 1 before the columns are normalised. That comes
    last, so columns sum to 1, but for rounding, and rows nearly: how nearly after all of the iterations depends on the matrix.
    The same numbers as the normalisations one by one, and their gradient, however with none of them written down:
    after one step in logarithms the normalisations are products of a fixed matrix with two vectors, whose changes are put
    into the matrix again from time to time, and the backward pass is as many such products and one product of matrices.

    Shape: (..., n, n) -> (..., n, n).
    """
    log_kernel = torch.logaddexp(matrices / temperature, matrices.new_tensor(math.log(FLOOR)))
    flat = log_kernel.reshape(-1, *log_kernel.shape[-2:])
    # On a CPU large ones go one after the other: a matrix then stays in the cache for all its products (512 x 512: 20 us each
    # instead of 330, seven at once with torch.bmm), and each stops when it is done.
    parts = flat.split(1) if flat.device.type == "cpu" and flat.shape[-1] > 32 else [flat]
    done = [cast(Tensor, _Sinkhorn.apply(part, iterations, tolerance)) for part in parts]
    return torch.cat(done).view_as(log_kernel)


class _Sinkhorn(torch.autograd.Function):
    """Normalise rows and columns of exp(L) in turn: potentials `f = -logsumexp_j(L + g)`, `g = -logsumexp_i(L + f)`.

    The result is exp(L + f + g). Iterations go in blocks. A block begins at potentials F, G and goes on with scalings
    u = exp(f - F), v = exp(g - G) of the kernel exp(L + F + G). The first one, and any whose scalings leave the safe range, is
    a single iteration in logarithms.
    """

    SAFE = 1e10  # with which entries below 1e-30, made 0 in the kernel, are below 1e-10, and squares far from 3e38

    @staticmethod
    def forward(ctx: Any, log_kernel: Tensor, iterations: int, tolerance: float) -> Tensor:
        f, g = log_kernel.new_zeros(2, *log_kernel.shape[:-1])
        blocks: list[tuple[Tensor, ...]] = []
        left, length, in_logs = iterations, 5, True
        while left:
            if in_logs:
                g_before, f = g, -(log_kernel + g[:, None, :]).logsumexp(2)
                g = -(log_kernel + f[:, :, None]).logsumexp(1)
                blocks.append((f, g, g_before))
                left, length, in_logs = left - 1, 5, False
                continue
            kernel = _Sinkhorn.kernel(log_kernel, f, g)
            u, v = _Sinkhorn.scalings(kernel, min(length, left))
            least, most = torch.cat([u, v]).aminmax()
            if not (least > 1 / _Sinkhorn.SAFE and most < _Sinkhorn.SAFE):  # so for nan
                in_logs = True
                continue
            blocks.append((kernel, u, v))
            f, g, left, length = f + u[-1].log(), g + v[-1].log(), left - len(u), 2 * length
            if len(u) > 1 and (u[-2] / u[-1] - 1).abs().max() < tolerance:  # the rows' sums before the last iteration
                break
        ctx.blocks = blocks
        result = _Sinkhorn.kernel(log_kernel, f, g)
        ctx.save_for_backward(log_kernel, result)
        return result

    @staticmethod
    def kernel(log_kernel: Tensor, f: Tensor, g: Tensor) -> Tensor:
        kernel = (log_kernel + f[:, :, None]).add_(g[:, None, :]).exp_()
        return torch.threshold_(kernel, 1e-30, 0.0)  # products with denormal numbers take many times longer

    @staticmethod
    def scalings(kernel: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return u of each iteration, and v before the first and after each: (count, matrices, n), (count + 1, ...)."""
        transposed = kernel.transpose(1, 2)
        vs = [torch.ones_like(kernel[:, 0, :, None])]
        us: list[Tensor] = []
        for _ in range(count):
            us.append(torch.bmm(kernel, vs[-1]).reciprocal_())
            vs.append(torch.bmm(transposed, us[-1]).reciprocal_())
        return torch.stack(us)[..., 0], torch.stack(vs)[..., 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        log_kernel, result = ctx.saved_tensors
        of_log_kernel = gradients[0] * result
        of_f, of_g = of_log_kernel.sum(2), of_log_kernel.sum(1)
        for block in reversed(ctx.blocks):
            if block[0].dim() == 2:
                f, g, g_before = block
                columns = _Sinkhorn.kernel(log_kernel, f, g) * of_g[:, None, :]
                of_f -= columns.sum(2)
                rows = _Sinkhorn.kernel(log_kernel, f, g_before) * of_f[:, :, None]
                of_log_kernel -= columns + rows
                of_f, of_g = torch.zeros_like(of_f), -rows.sum(1)
                continue
            # The same with products of the kernel that made u and v. What an iteration adds to the gradient is the kernel
            # times two outer products, [u, of_f u] and [of_g v, v]; those of all iterations are one product of matrices.
            kernel, u, v = block
            transposed = kernel.transpose(1, 2)
            u_squared, v_squared = (-u * u)[..., None], (-v * v)[..., None]
            lefts: list[Tensor] = []
            rights = [(v[-1] * of_g)[..., None]]
            for t in reversed(range(len(u))):
                left = torch.bmm(kernel, rights[-1]).mul_(u_squared[t])
                lefts.append(left if lefts else left.add_((u[t] * of_f)[..., None]))
                rights.append(torch.bmm(transposed, lefts[-1]).mul_(v_squared[t]))
            of_f, of_g = torch.zeros_like(of_f), rights.pop()[..., 0]  # v before the first iteration is 1
            left, right = torch.cat(lefts[::-1], 2), torch.cat(rights[::-1], 2)
            outer = torch.bmm(torch.cat([u.movedim(0, 2), left], 2), torch.cat([right, v[:-1].movedim(0, 2)], 2).mT)
            of_log_kernel -= outer.mul_(kernel)
        return of_log_kernel, None, None


class AveragedNetwork(nn.Module):
    """One network whose weights are the average of those of others, their units put together by learned matrices.

    The networks' own weights stay as they are. What is learned is a matrix for each hidden layer of each network but the first
    (whose units keep their places): "doubly_stochastic" ones, by `sinkhorn` (PermAVG), or "free" ones, the control. They
    start as the identity. At a low temperature that is near the identity when made doubly stochastic (512 units: 0.977 on the
    diagonal at 0.1), while at 1, where the thesis had it, all entries are almost equal (0.005 on the diagonal, 0.002 beside).
    Columns of doubly stochastic matrices sum to 1 here, and their rows nearly (see `sinkhorn`).

    To start from matched networks, permute them before. The weights are averaged once a step, for one forward pass; once
    for all batches where no gradient is asked for. `export` returns them as an ordinary network.

    Matrices are float32, of float64 networks float64; weights are averaged in that and returned in the networks' dtype. It is
    in training mode at first, whatever mode the networks are in. Its state_dict holds temperature and kind too, and goes into
    no model of others. Without a gradient, changes of the networks' own weights through `.data` are not seen.

    Shape: that of one network.

    Raises:
        ValueError: fewer than two networks, not of one architecture; a temperature that is not positive; other `matrices`.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        temperature: float = 0.1,
        matrices: Literal["doubly_stochastic", "free"] = "doubly_stochastic",
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, however: {temperature}")
        if matrices not in ("doubly_stochastic", "free"):
            raise ValueError(f"matrices must be 'doubly_stochastic' or 'free', however: {matrices!r}")
        self.layout = check_alike(networks)
        self.temperature, self.kind, self.ensemble_size = temperature, matrices, len(networks)
        self._known: tuple[Any, list[Tensor], State] | None = None
        with torch.inference_mode(False):  # tensors that were made in it can't be learned from
            self._take(networks)
        self.train()

    def _take(self, networks: Sequence[nn.Module]) -> None:
        # only its structure is of use; as a plain attribute its parameters are none of ours
        self._template = (copy.deepcopy(networks[0]).to("meta"),)
        states = [network.state_dict() for network in networks]
        start = _mean(states)
        weight = start[next(iter(self.layout.axes))]
        # layers of one width are normalised together: (layers, networks but the first, n, n)
        counts = {size: self.layout.sizes.count(size) for size in sorted(set(self.layout.sizes))}
        identities = {size: torch.eye(size, device=weight.device, dtype=_full_precision(weight)) for size in counts}
        self.matrices = nn.ParameterDict(
            {
                str(size): nn.Parameter(identities[size].repeat(count, len(networks) - 1, 1, 1))
                for size, count in counts.items()
            }
        )
        norms = [name for name, leaf in _leaves(networks[0]) if isinstance(leaf, _NORMS)]
        self._statistics = [
            name for name in start if name.rpartition(".")[0] in norms and not name.endswith(("weight", "bias"))
        ]
        for name in self._statistics:  # its own, gathered as it trains
            self.register_buffer(_key("own", name), start[name].detach().clone())
        self._weights = [name for name in self.layout.axes if name not in self._statistics]
        for name in self._weights:
            self.register_buffer(_key("first", name), states[0][name].detach().clone())
            others = torch.stack([state[name].detach() for state in states[1:]])
            self.register_buffer(_key("others", name), self._arranged(name, others))

    def _arranged(self, name: str, others: Tensor) -> Tensor:
        """Bring the inputs' units last: (networks, out, units * block) -> (networks, block, out, units)."""
        into = self.layout.axes[name].into
        if into is None:
            return others.flatten(2).contiguous() if others.dim() > 2 else others
        blocks = others.reshape(*others.shape[:2], self.layout.sizes[into], -1)
        return blocks.permute(0, 3, 1, 2).contiguous()

    def by_layer(self) -> list[Tensor]:
        """Return for each hidden layer the matrices of the networks but the first: (networks - 1, n, n)."""
        full = {int(size): matrices.to(_full_precision(matrices)) for size, matrices in self.matrices.items()}
        of_size = {
            size: sinkhorn(matrices, self.temperature) if self.kind == "doubly_stochastic" else matrices
            for size, matrices in full.items()
        }
        parts = {size: iter(matrices.unbind()) for size, matrices in of_size.items()}
        return [next(parts[size]) for size in self.layout.sizes]

    def averaged(self) -> State:
        """Return the state_dict of the averaged network, less BatchNorm's statistics, as a function of the matrices."""
        device = next(self.buffers()).device.type
        with torch.autocast(
            "cpu" if device == "meta" else device, enabled=False
        ):  # 8 bits of precision are too few here
            matrices = self.by_layer()
            return {name: self._average(name, matrices) for name in self._weights}

    def _average(self, name: str, matrices: list[Tensor]) -> Tensor:
        axes = self.layout.axes[name]
        kept = self.get_buffer(_key("first", name))
        first, others = (t.to(matrices[0].dtype) for t in (kept, self.get_buffer(_key("others", name))))
        count = len(others)
        if axes.into is not None:  # (networks, block * out, units) times the transposed matrices
            block, out, units = others.shape[1:]
            others = torch.bmm(others.flatten(1, 2), matrices[axes.into].transpose(1, 2))
            others = others.view(count, block, out, units).permute(0, 2, 3, 1).reshape(count, out, -1)
        if axes.out is None:
            total = others.sum(0)
        else:  # the sum over networks is within one product
            matrix = matrices[axes.out].transpose(0, 1).flatten(1)
            total = matrix @ others.reshape(matrix.shape[1], -1)
        return ((first + total.view_as(first)) / self.ensemble_size).to(kept.dtype)

    def state(self) -> State:
        """Return `averaged` and the statistics, as `torch.func.functional_call` takes them."""
        return self.averaged() | {name: self.get_buffer(_key("own", name)) for name in self._statistics}

    def train(self, mode: bool = True) -> "AveragedNetwork":
        self._template[0].train(mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return cast(Tensor, functional_call(self._template[0], self.state(), (x,)))
        # Matrices are compared by content, as some optimizers write through .data, which no version counts: 0.3 ms beside a
        # forward pass of 8.8 (3 networks 784-512-10, a batch of 512, 1 thread). The networks' weights would take 0.8 more.
        matrices = [matrix.detach() for matrix in self.matrices.values()]
        now = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in self.buffers()]
        if (
            self._known is None
            or self._known[0] != now
            or not all(old.is_meta or torch.equal(old, new) for old, new in zip(self._known[1], matrices, strict=True))
        ):
            self._known = now, [matrix.clone() for matrix in matrices], self.averaged()
        statistics = {name: self.get_buffer(_key("own", name)) for name in self._statistics}
        return cast(Tensor, functional_call(self._template[0], self._known[2] | statistics, (x,)))

    def _apply(self, *args: Any, **options: Any) -> "AveragedNetwork":
        self._known = None  # what is moved may come to lie where the old was
        return super()._apply(*args, **options)

    def get_extra_state(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "matrices": self.kind}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state != self.get_extra_state():
            raise ValueError(f"a state_dict must be of a model of {self.get_extra_state()}, however: {state}")

    @torch.no_grad()
    def export(self) -> nn.Module:
        """Return the averaged network as one like those it was made of, on their device, in the mode of this module."""
        network = copy.deepcopy(self._template[0])
        network.load_state_dict({name: tensor.clone() for name, tensor in self.state().items()}, assign=True)
        return network

    @torch.no_grad()
    def project(self) -> list[Permutations]:
        """Return for each network the permutations nearest to the matrices: those of the largest sum of entries."""
        first = [torch.arange(size) for size in self.layout.sizes]
        by_layer = [matrices.cpu() for matrices in self.by_layer()]
        return [first, *([assignment(matrices[m]) for matrices in by_layer] for m in range(self.ensemble_size - 1))]


def assignment(matrix: Tensor) -> Tensor:
    """Return the permutation (row i takes column `assignment[i]`) for which a matrix has the largest sum (Hungarian method)."""
    return torch.from_numpy(linear_sum_assignment(matrix.detach().cpu().double().numpy(), maximize=True)[1])


def _key(whose: str, name: str) -> str:
    """Return a buffer's name, which must have no dots: a JSON pointer (RFC 6901), so that no two names become one."""
    return f"{whose}/{name.replace('~', '~0').replace('/', '~1').replace('.', '/')}"


def _full_precision(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# files


def digest(state: State) -> str:
    """Return the SHA-256 of the values, shapes and names of a state_dict."""
    total = hashlib.sha256()
    for name, tensor in state.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def load_weights(network: nn.Module, path: Path) -> None:
    """Put the weights of a state_dict that `torch.save` wrote into `network`.

    They go by name where the file has the network's names, those of `nn.DataParallel` or `torch.compile` stripped; else in
    the order of the file, and what both sides call weight, bias, running_mean or running_var must be the same thing.

    Raises:
        ValueError: the file can't be read or holds something else, or its weights are not those of the network.
    """
    ours = {name: t for name, t in network.state_dict().items() if t.is_floating_point()}
    theirs = _read(path)
    bare = {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in theirs.items()}
    if bare.keys() == ours.keys() and len(bare) == len(theirs):
        theirs = bare
    by_name = theirs.keys() == ours.keys()
    norms = [any(name.endswith("running_mean") for name in names) for names in (theirs, ours)]
    if len(theirs) != len(ours) and norms[0] != norms[1]:
        raise ValueError(
            f"the weights of {path} must fit the network, however only the {'file' if norms[0] else 'network'} has BatchNorm"
        )
    if theirs and theirs.keys() < ours.keys():
        absent = ", ".join(name for name in ours if name not in theirs)
        raise ValueError(f"the weights of {path} must fit the network, however the file has its names but for {absent}")
    pairs = list(zip(ours, ours if by_name else theirs, strict=False))
    for name, their_name in pairs:
        tensor, their_tensor = ours[name], theirs[their_name]
        if len({key.rpartition(".")[2] for key in (name, their_name)} & _ROLES) == 2:
            raise ValueError(
                f"the weights of {path} must be in the network's order, as they have other names, however {their_name} is "
                f"where {name} is"
            )
        if tensor.shape != their_tensor.shape:
            raise ValueError(
                f"the weights of {path} must fit the network, however {their_name} is {_shape(their_tensor.shape)} where "
                f"{name} is {_shape(tensor.shape)}"
            )
        if not their_tensor.to(tensor.dtype).isfinite().all():
            raise ValueError(f"weights must be finite numbers, however {their_name} of {path} is not")
    if len(ours) != len(theirs):
        raise ValueError(
            f"the weights of {path} must fit the network, however they are {len(theirs)} tensors where it has {len(ours)}"
        )
    network.load_state_dict({name: theirs[their_name] for name, their_name in pairs}, strict=False)


_ROLES = {"weight", "bias", "running_mean", "running_var"}


def _read(path: Path) -> State:
    """Return the floating-point tensors of a file; what else there may be counts BatchNorm's batches."""
    must = f"{path} must be a state_dict that torch.save wrote, however"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{must} it can't be read: {error.strerror}") from error
    except Exception as error:  # a damaged archive raises whatever the reader trips over first, OSError too
        if found := re.search(r"\bGLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{must} it holds a whole module or object, {found[1]}; save its state_dict()") from error
        raise ValueError(
            f"{must} it is no file that torch.save wrote, or it is cut short ({type(error).__name__})"
        ) from error
    if not _is_state(saved):
        states = [key for key, value in saved.items() if _is_state(value)] if isinstance(saved, dict) else []
        hint = f"; take its entry {states[0]!r}" if states else ""
        raise ValueError(f"{path} must be a state_dict, tensors by name, however it holds {_what(saved)}{hint}")
    for name, tensor in saved.items():
        count = not tensor.is_floating_point() and tensor.dim() == 0
        if not count and (
            not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta
        ):
            raise ValueError(
                f"weights must be floating point, dense and in the file, however {name} of {path} is {tensor.dtype}, "
                f"{tensor.layout}, {tensor.device}"
            )
    return {name: tensor for name, tensor in saved.items() if tensor.is_floating_point()}


def _is_state(saved: object) -> bool:
    return (
        isinstance(saved, dict)
        and bool(saved)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in saved.items())
    )


def _what(saved: object) -> str:
    if isinstance(saved, dict) and saved:
        others = {name: value for name, value in saved.items() if not isinstance(value, Tensor)} or saved
        return ", ".join(f"{name!r}: {type(value).__name__}" for name, value in list(others.items())[:4])
    return f"a {type(saved).__name__}"
