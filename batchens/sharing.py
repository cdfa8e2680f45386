"""Which layers are one: tied within a network, shared between the members of an ensemble, or both.

A `Sharing` says it as data, by the names of layers; `plan` writes the usual ones down for any network; `share` makes it so, by
putting one parameter, or one module, in several places; `SharedEnsemble` runs the members so that what they share is
computed together. Since a parameter in several places is still one, `parameters()` and the optimizers take it once, a
step keeps it equal everywhere, and `.to(device)` and `state_dict` round trips leave it tied.

| of a layer                     | tied within a network                  | shared between members                           |
|--------------------------------|----------------------------------------|--------------------------------------------------|
| weight                         | one for all uses                       | one for all members                              |
| bias                           | one for all uses; scaled: one a use    | one for all members; scaled: one a member        |
| BatchNorm after it             | one for each use                       | "shared": one, over all members' rows;           |
| (affine pair and statistics)   |                                        | "member", or layer shared in part: one a member  |

*Scaled*: each use, of each member, has the weight `W o (gamma alpha^T)` with an alpha and gamma of its own: the tied layers
are BatchEnsemble layers (arXiv:2002.06715), also within one network, where there are uses instead of members. *In part*: a
`fraction` of a layer's output channels is tied, the others are each use's own.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchens.layers import batch_ensemble, members, repeat

SharingRegime = Literal["within", "between", "both"]
Intensity = Literal["none", "early", "deep", "all"]
BatchNormOf = Literal["shared", "member"]
Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Sharing:
    """Layers that are one, by their names in the network, such as "7" or "features.7".

    Raises:
        ValueError: a group of one layer, a layer in two groups, a group that is shared between members only in part, a
            fraction outside (0, 1], or a scale beside a fraction.
    """

    within: tuple[tuple[str, ...], ...] = ()
    """groups of layers that hold one weight and one bias"""
    between: tuple[str, ...] = ()
    """modules that are one for all members: layers, and BatchNorm where it is to be shared too"""
    fraction: float = 1.0
    """share of the output channels of these layers that is tied; the others are each use's own"""
    alpha_init: float | None = None
    """input factors of each use, in the code of BatchEnsemble layers; None leaves them out"""
    gamma_init: float | None = None
    """output factors of each use, in the same code"""

    def __post_init__(self) -> None:
        tied = [name for group in self.within for name in group]
        if len(set(tied)) < len(tied) or min(map(len, self.within), default=2) < 2:
            raise ValueError(
                f"groups must be of at least two layers and must not overlap, however within={self.within}"
            )
        for group in self.within:
            if self.between and len(set(group) & set(self.between)) not in (0, len(group)):
                raise ValueError(
                    f"a group must be shared between members as a whole or not at all, however: {group}, {self.between}"
                )
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, however: {self.fraction}")
        if self.scaled and self.fraction < 1:
            raise ValueError(f"a scale for each use must be of whole layers, however fraction={self.fraction}")

    @property
    def scaled(self) -> bool:
        return self.alpha_init is not None or self.gamma_init is not None


def plan(
    network: nn.Module,
    regime: SharingRegime,
    intensity: Intensity,
    *,
    early: int,
    batchnorm: BatchNormOf = "shared",
    fraction: float = 1.0,
    alpha_init: float | None = None,
    gamma_init: float | None = None,
) -> Sharing:
    """Say which layers of `network` are one in this regime at this intensity.

    Of its linear and convolutional layers the last, the head, is never shared, so members always have something of their own;
    the first `early` are early, those between are deep, and "all" is both. Within the network, early layers of one shape are
    tied, and deep ones; between members, every early or deep layer is shared, with the BatchNorm after it if `batchnorm` is
    "shared" and the whole layer is.

    Raises:
        ValueError: nothing would be tied: within the network no two of these layers have one shape, or there are none.
    """
    leaves = {name: leaf for name, leaf in network.named_modules() if not list(leaf.children())}
    layers = [name for name, leaf in leaves.items() if isinstance(leaf, Layer)][:-1]
    parts = {"none": [], "early": [layers[:early]], "deep": [layers[early:]], "all": [layers[:early], layers[early:]]}
    if intensity not in parts or regime not in ("within", "between", "both"):
        raise ValueError(
            'regime must be "within", "between" or "both" and intensity "none", "early", "deep" or "all", however: '
            f"{regime!r}, {intensity!r}"
        )
    within: list[tuple[str, ...]] = []
    between: list[str] = []
    for part in parts[intensity]:
        groups = _of_one_shape({name: cast(Layer, leaves[name]) for name in part})
        if not (part if regime == "between" else groups):
            raise ValueError(
                f'"{intensity}" must tie at least two layers, however there are no two of one shape to tie {regime} among: '
                + (", ".join(f"{name} {tuple(cast(Layer, leaves[name]).weight.shape)}" for name in part) or "no layers")
            )
        within += groups if regime != "between" else []
        between += part if regime != "within" else []
    if batchnorm == "shared" and fraction == 1:
        names = list(leaves)
        after = (names[names.index(name) + 1] for name in between)
        between += [name for name in after if isinstance(leaves[name], nn.BatchNorm2d)]
    return Sharing(tuple(within), tuple(between), fraction, alpha_init, gamma_init)


def _of_one_shape(layers: dict[str, Layer]) -> list[tuple[str, ...]]:
    """Return the names of layers that differ in nothing but their values, in groups of at least two."""
    groups: dict[str, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(repr(layer), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


Network = TypeVar("Network", bound=nn.Module)


def share(networks: Sequence[Network], sharing: Sharing) -> list[Network]:
    """Make the layers that `sharing` names one, in place, in these networks of one architecture; return them.

    A tied layer takes the values of its first use, in the first network. A list of one is tied within. With a scale, the
    layers that members share become BatchEnsemble layers, which take the rows of all of them: `SharedEnsemble` runs such
    networks, they do not run alone.

    Raises:
        ValueError: a name that is of no such layer, or layers of several shapes in one group.
    """
    networks = list(networks)
    for name in sharing.between:
        if not any(name == known for known, _ in networks[0].named_modules()):
            raise ValueError(f"a shared module must be one of the network, however there is no {name!r}")
    tied = {name for group in sharing.within for name in group}
    layers = [name for name in sharing.between if isinstance(networks[0].get_submodule(name), Layer)]
    for group in [*sharing.within, *((name,) for name in layers if name not in tied)]:
        if group[0] in sharing.between:
            _tie(networks, group, sharing)
        else:
            for network in networks:
                _tie([network], group, sharing)
    for name in sharing.between:
        if name not in layers:
            for network in networks[1:]:
                _put(network, name, networks[0].get_submodule(name))
    return networks


def _tie(networks: Sequence[nn.Module], names: tuple[str, ...], sharing: Sharing) -> None:
    """Make the layers of these names in these networks one."""
    first = networks[0].get_submodule(names[0])
    for network in networks:
        for name in names:
            layer = network.get_submodule(name)
            if not isinstance(layer, Layer) or repr(layer) != repr(first):
                raise ValueError(
                    f"layers can be tied that are linear or convolutional and of one shape, however {name!r} is {layer} and "
                    f"{names[0]!r} is {first}"
                )
    assert isinstance(first, Layer)
    if sharing.fraction < 1:
        count = _tied_outputs(first, sharing.fraction)
        tied = _part(first, slice(None, count))
        for network in networks:
            for name in names:
                own = _part(cast(Layer, network.get_submodule(name)), slice(count, None))
                _put(network, name, PartlyTied(tied, own))
        return
    weight = first.weight
    for name in names:
        layer = cast(Layer, networks[0].get_submodule(name))
        if sharing.scaled:
            size, alpha_init, gamma_init = len(networks), sharing.alpha_init, sharing.gamma_init
            layer = cast(Layer, batch_ensemble(layer, ensemble_size=size, alpha_init=alpha_init, gamma_init=gamma_init))
            layer.weight = weight
        else:
            layer.weight, layer.bias = first.weight, first.bias
        for network in networks:
            _put(network, name, layer)


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    network.get_submodule(parent)._modules[child] = module


class PartlyTied(nn.Module):
    """A linear or convolutional layer whose first output channels are those of `tied`, used elsewhere too, the others `own`.

    Weights are concatenated, which is cheap, and not activations. Shape: that of the whole layer.
    """

    def __init__(self, tied: Layer, own: Layer):
        super().__init__()
        self.tied, self.own = tied, own

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.tied.weight, self.own.weight])
        bias = None if self.own.bias is None else torch.cat([cast(Tensor, self.tied.bias), self.own.bias])
        if isinstance(self.own, nn.Conv2d):
            return self.own._conv_forward(x, weight, bias)
        return F.linear(x, weight, bias)


def _tied_outputs(layer: Layer, fraction: float) -> int:
    outputs = len(layer.weight)
    count = round(fraction * outputs)
    if not 0 < count < outputs or getattr(layer, "groups", 1) != 1:
        raise ValueError(
            f"a layer tied in part must have one group, and tied and own output channels, however: {count} of {outputs} "
            f"would be tied in {layer}"
        )
    return count


def _part(layer: Layer, rows: slice) -> Layer:
    """Return the layer that gives these output channels of `layer`."""
    part = copy.deepcopy(layer)
    part.weight = nn.Parameter(layer.weight.detach()[rows].clone())
    if layer.bias is not None:
        part.bias = nn.Parameter(layer.bias.detach()[rows].clone())
    if isinstance(part, nn.Conv2d):
        part.out_channels = len(part.weight)
    else:
        part.out_features = len(part.weight)
    return part


class SharedEnsemble(nn.Module):
    """An ensemble of networks, in some places of which stands one and the same module: what `share` returns.

    A module that all members share runs once, on the rows of all of them. Where all of them are given the same rows
    (`same_rows`: the batch was made by `layers.repeat`, as the suite's regime `repeat` and its predictions do), a
    shared trunk runs on one member's rows only: up to where members part their activations are equal. VGG11, 4 members of
    64 images, forward and backward on one CPU thread, took 1.93 s so and 2.25 s without where early layers are shared, and
    0.58 s and 2.18 s where all but the heads are.

    Trained on the mean of the members' losses, what is shared learns from that mean; a parameter that a single member owns
    has its gradient multiplied by the number of members, so that it is that of its member's loss, as in a DeepEnsemble:
    otherwise sharing less would also mean to train at a lower learning rate.

    A shared BatchNorm normalises with statistics of all members' rows, so that in training, but not in evaluation, a
    member's output depends on those of others. A shared module that draws at random, as dropout does, draws once in a trunk.

    Shape: member-major, `(ensemble_size * batch, ...) -> (ensemble_size * batch, out)`.

    Raises:
        ValueError: networks that are not nn.Sequential of one length, or (forward) a batch that does not divide.
    """

    def __init__(self, networks: Sequence[nn.Module], *, same_rows: bool = True):
        super().__init__()
        sequential = [one for one in networks if isinstance(one, nn.Sequential)]
        if not networks or len(sequential) < len(networks) or len(set(map(len, sequential))) > 1:
            raise ValueError(
                f"networks must be nn.Sequential of one length, however: {[type(one) for one in networks]}"
            )
        self.networks = nn.ModuleList(networks)
        self.same_rows = same_rows
        self._segments = _segments(sequential)
        self._scale_gradients()

    def _scale_gradients(self) -> None:
        size = len(self.networks)
        for parameter in _owned(self.networks):
            parameter.register_hook(lambda gradient: gradient * size)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scale_gradients()  # copy.deepcopy and pickle leave hooks behind

    def forward(self, x: Tensor) -> Tensor:
        size = len(self.networks)
        x = members(x, size)[0] if self.same_rows else members(x, size).flatten(0, 1)
        together = self.same_rows  # x is of one member, and would be the same for every other
        for kind, layers in self._segments:
            if kind == "own":
                parts = [x] * size if together else members(x, size).unbind()
                x = torch.cat([_run(own, part) for own, part in zip(layers, parts, strict=True)])
                together = False
                continue
            if kind == "rank-1" and together:
                x, together = repeat(x, size), False
            x = _run(layers[0], x)
        return repeat(x, size) if together else x


Kind = Literal["shared", "rank-1", "own"]


def _segments(networks: Sequence[nn.Sequential]) -> list[tuple[Kind, list[list[nn.Module]]]]:
    """Return runs of children of one kind: "shared", with the one list of modules; "own", with a list for each member.

    "rank-1": one list of modules too, which scale each member's rows with its own factors. A child without parameters, such as
    a ReLU, belongs to what comes before it: a member's rows are then still in the cache.
    """
    segments: list[tuple[Kind, list[list[nn.Module]]]] = []
    for places in zip(*networks, strict=True):
        kind: Kind
        if any(True for _ in places[0].parameters()):
            rank_1 = any(getattr(module, "ensemble_size", 1) > 1 for module in places[0].modules())
            kind = "own" if any(place is not places[0] for place in places) else "rank-1" if rank_1 else "shared"
        else:
            kind = segments[-1][0] if segments else "shared"
        if not segments or segments[-1][0] != kind:
            segments.append((kind, [[] for _ in (networks if kind == "own" else networks[:1])]))
        for layers, place in zip(segments[-1][1], places, strict=False):
            layers.append(place)
    return segments


def _run(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _owned(networks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that exactly one of several networks has."""
    owners: dict[nn.Parameter, int] = {}
    for network in networks:
        for parameter in network.parameters():
            owners[parameter] = owners.get(parameter, 0) + 1
    return [parameter for parameter, count in owners.items() if count == 1]
