"""BatchEnsemble layers: an ensemble whose members share one weight and own a rank-1 scaling of it.

Member m has the weight `W o (gamma_m alpha_m^T)` (Wen, Tran and Ba 2020, arXiv:2002.06715, eq. 3 and 5):

    y_m = ((x_m o alpha_m) W^T) o gamma_m + bias_m

`weight` (slow) is shared by all members; `alpha` (r in the paper), `gamma` (s) and `bias` (fast) are each member's own.
A batch is member-major everywhere, `(ensemble_size * batch, ...)`: member 0's rows first, then member 1's. `repeat` makes
such a batch from one that every member sees; a batch split among the members is one already.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class IdenticalMembersWarning(UserWarning):
    """All members start equal; trained on the same batches they stay one network for ever."""


def repeat(x: Tensor, ensemble_size: int) -> Tensor:
    """Give every member the whole batch: `(batch, ...) -> (ensemble_size * batch, ...)`, member-major."""
    # unlike Tensor.repeat this keeps channels_last, which IVON's own weights don't bring back: 0.67 of its step on a CPU
    return x if ensemble_size == 1 else torch.cat([x] * ensemble_size)


def members(x: Tensor, ensemble_size: int) -> Tensor:
    """View a member-major batch by member: `(ensemble_size * batch, ...) -> (ensemble_size, batch, ...)`."""
    if x.shape[0] % ensemble_size:
        raise ValueError(
            f"the batch must be divisible by ensemble_size, however: batch={x.shape[0]}, ensemble_size={ensemble_size}; "
            "repeat it for every member with batchens.layers.repeat, or choose a batch size that divides"
        )
    return x.unflatten(0, (ensemble_size, x.shape[0] // ensemble_size))


@torch.no_grad()
def init_signed_scalar_(parameter: Tensor, value: float) -> Tensor:
    """Initialise fast weights in place by the field's signed scalar (`random_sign_init` in edward2).

    `value < 0`: N(1, |value|), |value| the standard deviation. `0 <= value <= 1`: +1 with probability `value`, else -1, so
    that 1 means all +1 and 0 means all -1 (in edward2, 0 means all +1).

    Raises:
        ValueError: `value` is above 1 or not finite.
    """
    check_signed_scalar(value)
    if value < 0:
        return parameter.normal_(1.0, -value)
    return parameter.bernoulli_(value).mul_(2).sub_(1)


def check_signed_scalar(value: float | None, name: str = "init") -> None:
    if value is not None and not (math.isfinite(value) and value <= 1):
        raise ValueError(
            f"{name} must be None (absent), negative (normal around 1 with that standard deviation) or between 0 and 1 "
            f"(the probability of +1, else -1), however: {value}"
        )


class _RankOne(nn.Module):
    """The fast weights of a layer, shared by the linear and the convolutional one."""

    weight: Tensor
    alpha: nn.Parameter | None
    gamma: nn.Parameter | None
    bias: nn.Parameter | None

    def _add_fast_weights(
        self,
        features: tuple[int, int],
        ensemble_size: int,
        alpha_init: float | None,
        gamma_init: float | None,
        bias: bool,
    ) -> None:
        if ensemble_size < 1:
            raise ValueError(f"ensemble_size must be at least 1, however: {ensemble_size}")
        check_signed_scalar(alpha_init, "alpha_init")
        check_signed_scalar(gamma_init, "gamma_init")
        self.ensemble_size, self.alpha_init, self.gamma_init = ensemble_size, alpha_init, gamma_init

        def parameter(present: bool, width: int) -> nn.Parameter | None:
            return nn.Parameter(self.weight.new_empty(ensemble_size, width)) if present else None

        del self.bias  # the plain layer's place for one bias, registered as None
        self.register_parameter("alpha", parameter(alpha_init is not None, features[0]))
        self.register_parameter("gamma", parameter(gamma_init is not None, features[1]))
        self.register_parameter("bias", parameter(bias, features[1]))
        self.reset_fast_weights()

    def reset_parameters(self) -> None:
        """Draw the slow weight anew as the plain layer does, and the fast weights by their inits."""
        super().reset_parameters()  # type: ignore[misc]
        if hasattr(self, "ensemble_size"):  # the plain layer's constructor calls this before there are fast weights
            self.reset_fast_weights()

    @torch.no_grad()
    def reset_fast_weights(self) -> None:
        """Draw alpha and gamma anew by their signed scalars and set the biases to 0, the same for every member."""
        for parameter, value in ((self.alpha, self.alpha_init), (self.gamma, self.gamma_init)):
            if parameter is not None and value is not None:
                init_signed_scalar_(parameter, value)
        if self.bias is not None:
            self.bias.zero_()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, ensemble_size={self.ensemble_size}, "
            f"alpha_init={self.alpha_init}, gamma_init={self.gamma_init}"
        )


class BatchEnsembleLinear(_RankOne, nn.Linear):  # type: ignore[misc]  # bias: one for each member
    """A linear layer for each member, over one shared weight.

    Parameters: `weight` (out_features, in_features), initialised as nn.Linear's; `alpha` (ensemble_size, in_features);
    `gamma` and `bias` (ensemble_size, out_features). `alpha_init=None` or `gamma_init=None` leaves the parameter out.

    Shape: `(ensemble_size * batch, *, in_features) -> (ensemble_size * batch, *, out_features)`.

    Raises:
        ValueError: ensemble_size < 1, an init out of range, or (forward) an input of another shape or
            a batch that does not divide.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        ensemble_size: int,
        alpha_init: float | None,
        gamma_init: float | None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self._add_fast_weights((in_features, out_features), ensemble_size, alpha_init, gamma_init, bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"the input must be (ensemble_size * batch, ..., in_features={self.in_features}), however: {tuple(x.shape)}"
            )
        x = _scale_and_shift(members(x, self.ensemble_size), self.alpha, None, dim=-1)
        y = F.linear(x, self.weight)
        return _scale_and_shift(y, self.gamma, self.bias, dim=-1).flatten(0, 1)


class BatchEnsembleConv2d(_RankOne, nn.Conv2d):  # type: ignore[misc]
    """A convolution for each member, over one shared weight: alpha scales input channels, gamma output channels.

    Parameters: `weight` (out_channels, in_channels // groups, *kernel_size), initialised as nn.Conv2d's; `alpha`
    (ensemble_size, in_channels); `gamma` and `bias` (ensemble_size, out_channels). The other arguments are nn.Conv2d's.

    Shape: `(ensemble_size * batch, in_channels, height, width) -> (ensemble_size * batch, out_channels, height', width')`.

    Raises:
        ValueError: ensemble_size < 1, an init out of range, or (forward) an input of another shape or
            a batch that does not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        ensemble_size: int,
        alpha_init: float | None,
        gamma_init: float | None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=False,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self._add_fast_weights((in_channels, out_channels), ensemble_size, alpha_init, gamma_init, bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"the input must be (ensemble_size * batch, in_channels={self.in_channels}, height, width), however: "
                f"{tuple(x.shape)}"
            )
        return self.forward_folded(x) if self.folds(x) else self.forward_scaled(x)

    def folds(self, x: Tensor) -> bool:
        """Say which of the two equal forms of this layer is the faster one for a batch of this shape.

        Folding costs a weight for each member, written and read; scaling costs passes over the input and the output.
        VGG11, 4 members of 64 images, forward and backward on one CPU thread, over the plain layer's time
        (`benchmarks/layers.py --each`):

            activations / weights    2541    43   5.3   3.6  0.67  0.44  0.11
            folded                   1.37  1.03  1.05  1.05  1.18  1.21  1.55
            scaled                   3.01  1.04  1.02  1.02  1.02  1.00  1.02

        On a GPU, where a convolution for each member is a kernel for each member, the layer scales.
        """
        if x.device.type != "cpu":
            return False
        y_pixels = x.shape[2] * x.shape[3] // (self.stride[0] * self.stride[1])
        activations = x.shape[0] * (self.in_channels * x.shape[2] * x.shape[3] + self.out_channels * y_pixels)
        return activations > 15 * self.ensemble_size * self.weight.numel()

    def forward_folded(self, x: Tensor) -> Tensor:
        """Fold alpha and gamma into a weight for each member and convolve each member's rows with its own."""
        parts = members(x, self.ensemble_size).unbind()
        weights = self.member_weights().unbind()
        biases = [None] * self.ensemble_size if self.bias is None else self.bias.unbind()
        return torch.cat(
            [self._conv_forward(part, weight, bias) for part, weight, bias in zip(parts, weights, biases, strict=True)]
        )

    def forward_scaled(self, x: Tensor) -> Tensor:
        """Scale the activations before and after one convolution of all rows with the shared weight."""
        x = _scale_and_shift(members(x, self.ensemble_size), self.alpha, None, dim=2)
        y = self._conv_forward(x.flatten(0, 1), self.weight, None)
        return _scale_and_shift(members(y, self.ensemble_size), self.gamma, self.bias, dim=2).flatten(0, 1)

    def member_weights(self) -> Tensor:
        """Return every member's weight, `W o (gamma_m alpha_m^T)`: (ensemble_size, *weight.shape)."""
        m, g = self.ensemble_size, self.groups
        weight = self.weight.unflatten(0, (g, -1)).unsqueeze(0)  # (1, groups, out/groups, in/groups, height, width)
        if self.gamma is not None:
            weight = weight * self.gamma.view(m, g, -1, 1, 1, 1)
        if self.alpha is not None:
            weight = weight * self.alpha.view(m, g, 1, -1, 1, 1)
        return weight.expand(m, *weight.shape[1:]).flatten(1, 2)


def _scale_and_shift(x: Tensor, scale: Tensor | None, shift: Tensor | None, dim: int) -> Tensor:
    """Return `x * scale + shift`, each member's rows with its own pair; either may be absent.

    Shape: x (ensemble_size, batch, ...) with features in dimension `dim`; scale and shift (ensemble_size, features).
    """
    if scale is not None and dim == 2 and x.device.type == "cpu" and x.dtype == scale.dtype:
        if not torch.compiler.is_compiling():
            return _ScaleAndShift.apply(x, scale, shift)

    def each(parameter: Tensor) -> Tensor:
        # in the activations' number format: under autocast a float32 factor would turn them into float32 from here on
        shape = [len(parameter)] + [1] * (x.ndim - 1)
        shape[dim] = -1
        return parameter.view(shape).to(x.dtype)

    if scale is not None and shift is not None:
        return torch.addcmul(each(shift), x, each(scale))  # one pass over x, not two
    if scale is not None:
        return x * each(scale)
    return x if shift is None else x + each(shift)


class _ScaleAndShift(torch.autograd.Function):
    """`x * scale + shift` for each member and channel of images on a CPU, with a backward pass of fewer passes.

    Autograd writes gradient * x out and sums it, then sums the gradient. Both sums are those that batch normalisation
    needs of its affine parameters (with mean 0 and variance 1), and its kernel makes them in one go: 1.0 ms instead of
    2.4 ms for 4 members of 64 images of 256 channels of 8x8. Can be differentiated once.

    Shape: x (ensemble_size, batch, channels, height, width), scale and shift (ensemble_size, channels).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, scale)
        factor = scale[:, None, :, None, None]
        return x * factor if shift is None else torch.addcmul(shift[:, None, :, None, None], x, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, scale = ctx.saved_tensors
        to_x = gradient * scale[:, None, :, None, None] if ctx.needs_input_grad[0] else None
        # the kernel misreads two layouts in one call where a batch of one makes them ambiguous
        layout = (
            torch.channels_last if x[0].is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
        zeros, ones = scale.new_zeros(scale.shape[1]), scale.new_ones(scale.shape[1])
        sums = [
            torch.ops.aten.native_batch_norm_backward(
                one.contiguous(memory_format=layout),
                other.contiguous(memory_format=layout),
                *(None, None, None, zeros, ones, True, 0.0),
                [False, True, ctx.needs_input_grad[2]],
            )
            for one, other in zip(gradient.unbind(), x.unbind(), strict=True)
        ]
        to_shift = torch.stack([one[2] for one in sums]) if ctx.needs_input_grad[2] else None
        return to_x, torch.stack([one[1] for one in sums]), to_shift


Statistics = Literal["shared", "member"]


class BatchEnsembleBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation of a member-major batch.

    `statistics="shared"` (default): mean and variance over all members' rows, one running pair, as the reference
    implementation of BatchEnsemble has it. `"member"`: each member's rows have their own, `running_mean` and
    `running_var` being (ensemble_size, num_features). They would undo any scale and shift of a member before them: gamma's
    magnitude and the bias of the layer below do nothing then.

    `affine="shared"` (default): one weight and bias, (num_features,). `"member"`: (ensemble_size, num_features). With shared
    statistics it adds nothing that the gamma and bias of the layer below can't express, and it costs a pass over the
    activations; with statistics of each member it is what lets members differ again.

    In training mode with shared statistics, a member's output depends on the other members' rows; in evaluation never.

    Shape: `(ensemble_size * batch, num_features, height, width)`, kept.

    Raises:
        ValueError: ensemble_size < 1, an unknown choice, or (forward) a batch that does not divide.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        ensemble_size: int,
        statistics: Statistics = "shared",
        affine: Statistics = "shared",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if ensemble_size < 1:
            raise ValueError(f"ensemble_size must be at least 1, however: {ensemble_size}")
        for name, choice in (("statistics", statistics), ("affine", affine)):
            if choice not in ("shared", "member"):
                raise ValueError(f'{name} must be "shared" or "member", however: {choice!r}')
        super().__init__(num_features, eps, momentum, device=device, dtype=dtype)
        self.ensemble_size, self.statistics, self.affine_of = ensemble_size, statistics, affine
        if affine == "member":
            self.weight = nn.Parameter(self.weight.detach().repeat(ensemble_size, 1))
            self.bias = nn.Parameter(self.bias.detach().repeat(ensemble_size, 1))
        if statistics == "member":
            self.running_mean = cast(Tensor, self.running_mean).repeat(ensemble_size, 1)
            self.running_var = cast(Tensor, self.running_var).repeat(ensemble_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            cast(Tensor, self.num_batches_tracked).add_(1)
        grouped = members(x, self.ensemble_size)
        mean, var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        if self.statistics == "member":
            rows = (self.ensemble_size, -1)  # a shared affine pair is the same one for every member
            each = (grouped, mean, var, self.weight.expand(rows), self.bias.expand(rows))
            return torch.cat([self._normalise(*one) for one in zip(*(part.unbind() for part in each), strict=True)])
        if self.affine_of == "shared":
            return self._normalise(x, mean, var, self.weight, self.bias)
        normalised = members(self._normalise(x, mean, var, None, None), self.ensemble_size)
        return _scale_and_shift(normalised, self.weight, self.bias, dim=2).flatten(0, 1)

    def _normalise(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, self.training, cast(float, self.momentum), self.eps)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, ensemble_size={self.ensemble_size}, "
            f"statistics={self.statistics}, affine={self.affine_of}"
        )


BatchNormKind = Literal["shared", "member_affine", "member"]


def batch_ensemble(
    module: nn.Module,
    *,
    ensemble_size: int,
    alpha_init: float | None,
    gamma_init: float | None,
    batchnorm: BatchNormKind = "shared",
) -> nn.Module:
    """Return a copy of `module` in which every linear and 2-d convolutional layer, however deep, is its BatchEnsemble form.

    Slow weights keep their values; a bias is copied to every member; alpha and gamma are drawn by their signed scalars.
    A module or a weight used in two places stays tied. Modules that read a layer's weight rather than call the layer, such as
    nn.TransformerEncoderLayer, can't be converted. `batchnorm` says what becomes of nn.BatchNorm2d:

    - `"shared"`: it stays what it is, over all members' rows. The default: it is the reference implementation's choice,
      costs nothing, and gamma and bias below it already give each member its own scale and shift;
    - `"member_affine"`: statistics shared, weight and bias for each member;
    - `"member"`: statistics, weight and bias for each member.

    Every other module (activations, pooling, other normalisations, subclasses of the three) stays and is shared.

    Warns:
        IdenticalMembersWarning: no init given here makes members differ.
    """
    if batchnorm not in ("shared", "member_affine", "member"):
        raise ValueError(f'batchnorm must be "shared", "member_affine" or "member", however: {batchnorm!r}')

    def convert(layer: nn.Module) -> nn.Module:
        if type(layer) is nn.Linear:
            return _linear_of(layer, ensemble_size, alpha_init, gamma_init)
        if type(layer) is nn.Conv2d:
            return _conv2d_of(layer, ensemble_size, alpha_init, gamma_init)
        if type(layer) is nn.BatchNorm2d and batchnorm != "shared":
            return _batchnorm2d_of(layer, ensemble_size, batchnorm)
        return layer

    root = nn.Sequential(copy.deepcopy(module))  # a parent, for a module that is itself a layer
    converted: dict[nn.Module, nn.Module] = {}  # a layer used in two places stays one layer
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                if child not in converted:
                    converted[child] = convert(child)
                parent._modules[name] = converted[child]
    if identical_members(root):
        warnings.warn(
            f"all {ensemble_size} members start identical (alpha_init={alpha_init}, gamma_init={gamma_init}, equal biases): "
            "trained on the same batches (repeat) they stay one network for ever; give alpha_init or gamma_init a negative "
            "value or one strictly between 0 and 1",
            IdenticalMembersWarning,
            stacklevel=2,
        )
    return root[0]


def identical_members(module: nn.Module) -> bool:
    """Say whether `module` has several members and all of them have the same parameters."""
    several = any(getattr(layer, "ensemble_size", 1) > 1 for layer in module.modules())
    return several and all(bool((parameter == parameter[:1]).all()) for parameter in member_parameters(module))


def member_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield each parameter whose first dimension is the member: alpha, gamma, biases, affine pairs of each member."""
    for layer in module.modules():
        if isinstance(layer, _RankOne):
            yield from (p for p in (layer.alpha, layer.gamma, layer.bias) if p is not None)
        elif isinstance(layer, BatchEnsembleBatchNorm2d) and layer.affine_of == "member":
            yield from (layer.weight, layer.bias)


def _linear_of(plain: nn.Linear, size: int, alpha_init: float | None, gamma_init: float | None) -> BatchEnsembleLinear:
    layer = BatchEnsembleLinear(
        plain.in_features,
        plain.out_features,
        ensemble_size=size,
        alpha_init=alpha_init,
        gamma_init=gamma_init,
        bias=plain.bias is not None,
        device=plain.weight.device,
        dtype=plain.weight.dtype,
    )
    return _take_over(layer, plain)


def _conv2d_of(plain: nn.Conv2d, size: int, alpha_init: float | None, gamma_init: float | None) -> BatchEnsembleConv2d:
    layer = BatchEnsembleConv2d(
        plain.in_channels,
        plain.out_channels,
        cast(tuple[int, int], plain.kernel_size),
        cast(tuple[int, int], plain.stride),
        cast(tuple[int, int], plain.padding),
        cast(tuple[int, int], plain.dilation),
        plain.groups,
        plain.padding_mode,
        ensemble_size=size,
        alpha_init=alpha_init,
        gamma_init=gamma_init,
        bias=plain.bias is not None,
        device=plain.weight.device,
        dtype=plain.weight.dtype,
    )
    return _take_over(layer, plain)


RankOne = TypeVar("RankOne", bound=_RankOne)


@torch.no_grad()
def _take_over(layer: RankOne, plain: nn.Linear | nn.Conv2d) -> RankOne:
    layer.weight = plain.weight  # the parameter itself, so that one that is used twice stays tied
    if layer.bias is not None:
        layer.bias.copy_(cast(Tensor, plain.bias)).requires_grad_(cast(Tensor, plain.bias).requires_grad)
    return layer.train(plain.training)


@torch.no_grad()
def _batchnorm2d_of(plain: nn.BatchNorm2d, size: int, kind: BatchNormKind) -> BatchEnsembleBatchNorm2d:
    if not plain.affine or not plain.track_running_stats or plain.momentum is None:
        raise ValueError(
            f'batchnorm="{kind}" needs nn.BatchNorm2d with affine parameters, running statistics and a momentum, however: '
            f'{plain}; batchnorm="shared" leaves it as it is'
        )
    layer = BatchEnsembleBatchNorm2d(
        plain.num_features,
        plain.eps,
        plain.momentum,
        ensemble_size=size,
        statistics="member" if kind == "member" else "shared",
        affine="member",
        device=plain.weight.device,
        dtype=plain.weight.dtype,
    )
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        getattr(layer, name).copy_(getattr(plain, name))
    return layer.train(plain.training)
