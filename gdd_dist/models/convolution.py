"""Layers for networks whose gradient is differentiated again by gradient penalties: torch's results with fewer operations.

torch computes the second derivative of a convolution by forward convolutions with kernels as large as the image, one for
each group. But a convolution is linear in images and in weights, so a derivative of any order is one of three maps: the
convolution, and its gradients in either argument. torch has fast kernels for these, and only they are used here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


class Conv2d(nn.Conv2d):
    """nn.Conv2d with a cheap second derivative. Only numeric zero padding is supported."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] float -> [B, outputs, H', W'], in the dtype of autocast where that is on."""
        inputs: tuple[Tensor | None, ...] = x, self.weight, self.bias
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)  # cast here, so that autograd also casts the gradients back
            inputs = tuple(None if t is None else t.to(dtype) for t in inputs)
        y: Tensor = _Convolution.apply(*inputs, _Geometry(self.stride, self.padding, self.dilation, self.groups))
        return y


class WholeMapConv2d(nn.Conv2d):
    """A depthwise nn.Conv2d without bias whose kernel covers the whole map, as product and sum: [B, C, H, W] -> [B, C, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted sum of each channel's map."""
        return (x * self.weight[:, 0]).sum((2, 3), keepdim=True)


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """F.leaky_relu, slope above 0. For the backward pass it keeps its result, which the next convolution keeps anyway, not ``x``."""
    y: Tensor = _LeakyReLU.apply(x, slope)
    return y


class _Geometry(NamedTuple):
    stride: Any
    padding: Any
    dilation: Any
    groups: int


class _Convolution(Function):
    """(x, weight, bias or None) -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        return (*_Gradients.apply(of_y, *ctx.saved_tensors, ctx.geometry, _asked_for(ctx)), None)


class _Gradients(Function):
    """(gradient of y, x, weight) -> gradients of x, weight and bias; None for those not in ``asked``.

    Linear in each of its three arguments.
    """

    @staticmethod
    def forward(
        ctx: Any, of_y: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, asked: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(of_y, x, weight)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        stride, padding, dilation, groups = geometry
        gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            of_y, x, weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups, asked
        )
        return gradients

    @staticmethod
    def backward(ctx: Any, x2: Tensor | None, weight2: Tensor | None, bias2: Tensor | None) -> tuple[Any, ...]:
        of_y, x, weight = ctx.saved_tensors
        y_asked, x_asked, weight_asked = _asked_for(ctx)
        terms = []
        if y_asked and x2 is not None:
            terms.append(_Convolution.apply(x2, weight, None, ctx.geometry))
        if y_asked and weight2 is not None:
            terms.append(_Convolution.apply(x, weight2, None, ctx.geometry))
        if y_asked and bias2 is not None:
            terms.append(bias2[:, None, None].expand_as(of_y))
        asked = x_asked and weight2 is not None, weight_asked and x2 is not None, False
        # If one is None, the corresponding input only gives the shape.
        pair = x if x2 is None else x2, weight if weight2 is None else weight2
        of_x, of_weight, _ = _Gradients.apply(of_y, *pair, ctx.geometry, asked) if any(asked) else (None,) * 3
        return sum(terms[1:], terms[0]) if terms else None, of_x, of_weight, None, None


class _LeakyReLU(Function):
    """x -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        y = F.leaky_relu(x, slope)
        ctx.save_for_backward(y)
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor, None]:
        return _LeakyGradient.apply(of_y, ctx.saved_tensors[0].detach(), ctx.slope), None


class _LeakyGradient(Function):
    """Gradient of y -> gradient of x: a product with slopes chosen by the sign of ``y``; its derivative in ``y`` is zero."""

    @staticmethod
    def forward(ctx: Any, of_y: Tensor, y: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(y)
        ctx.slope = slope
        of_x: Tensor = torch.ops.aten.leaky_relu_backward(of_y, y, slope, True)
        return of_x

    @staticmethod
    def backward(ctx: Any, of_x: Tensor) -> tuple[Tensor, None, None]:
        return _LeakyGradient.apply(of_x, ctx.saved_tensors[0], ctx.slope), None, None


def _asked_for(ctx: Any) -> tuple[bool, bool, bool]:
    """Return which of a node's first three inputs need a gradient in the current backward pass.

    ``needs_input_grad`` is always true for weights, but the first gradient of a penalty needs only that of the images.
    """
    asked = [node is not None and _runs(node) for node, _ in ctx.next_functions]
    return asked[0], asked[1], len(asked) > 2 and asked[2]


def _runs(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch raises this if ``node`` is a leaf that was passed to autograd.grad
        return True
