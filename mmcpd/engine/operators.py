"""mmcv's compiled operators by torchvision: where mmcv was installed without them, and everywhere while combing.

mmcv asks a module `mmcv._ext` for its operators and passes the outputs to fill. A module of that name stands in here:
it offers what detectors run, and for every other operator one line that says what is missing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from mmcpd.errors import first_line

NAME = 'mmcv._ext'
ADVICE = 'install mmcv with compiled operators for this version of torch, or choose a config that does not need it'
# The modules of mmcv whose operators combing can only follow through torchvision.
FOLLOWED = ('nms', 'roi_align', 'roi_pool', 'deform_conv', 'modulated_deform_conv', 'multi_scale_deform_attn', 'focal_loss', 'masked_conv')  # noqa: E501  # fmt: skip
Operator: TypeAlias = Callable[..., Tensor | None]
Kind = TypeVar('Kind', bound=Operator)
OPERATORS: dict[str, Operator] = {}


def operator(function: Kind) -> Kind:
    """Add a function to the table of operators, under its own name, which is the one that mmcv asks for."""
    OPERATORS[function.__name__] = function
    return function


# -- selection of boxes ------------------------------------------------------------------------------------------------
@operator
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices (K,) of the boxes (N, 4) that no box of a higher score covers, best first.

    With `offset` 1 a box counts its last pixel: its width is `x2 - x1 + 1`.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [5.0, 5.0, 9.0, 9.0]])
        >>> nms(boxes, torch.tensor([0.5, 0.9, 0.1]), iou_threshold=0.7, offset=0).tolist()
        [1, 2]
    """
    ends = boxes.new_tensor([0, 0, offset, offset])
    return vision().nms(boxes + ends if offset else boxes, scores.type_as(boxes), iou_threshold)


# -- pooling of regions ------------------------------------------------------------------------------------------------
def _aligned(
    picture: Tensor, rois: Tensor, size: Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    rois = rois.type_as(picture)
    return vision().roi_align(picture, rois, spatial_scale, size[0], size[1], sampling_ratio, aligned)


@operator
def roi_align_forward(
    picture: Tensor, rois: Tensor, output: Tensor, _argmax_y: Tensor, _argmax_x: Tensor, aligned_height: int,
    aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    if pool_mode == 0:
        raise NotImplementedError(missing("roi_align with pool_mode='max'"))
    output.copy_(_aligned(picture, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned))


@operator
def roi_align_backward(
    gradient: Tensor, rois: Tensor, _argmax_y: Tensor, _argmax_x: Tensor, grad_picture: Tensor, aligned_height: int,
    aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    size = (aligned_height, aligned_width)
    fill_gradients(lambda x: _aligned(x, rois, size, spatial_scale, sampling_ratio, aligned),
                   [grad_picture], gradient, [grad_picture])  # fmt: skip


@operator
def roi_pool_forward(
    picture: Tensor, rois: Tensor, output: Tensor, argmax: Tensor, pooled_height: int, pooled_width: int,
    spatial_scale: float,
) -> None:  # fmt: skip
    pooled, where = vision().roi_pool(picture, rois.type_as(picture), spatial_scale, pooled_height, pooled_width)
    output.copy_(pooled)
    argmax.copy_(where)


@operator
def roi_pool_backward(
    gradient: Tensor, rois: Tensor, argmax: Tensor, grad_picture: Tensor, pooled_height: int, pooled_width: int,
    spatial_scale: float,
) -> None:  # fmt: skip
    size = (pooled_height, pooled_width)
    rois = rois.type_as(gradient)
    grad_picture.copy_(vision()._roi_pool_backward(gradient, rois, argmax, spatial_scale, *size, *grad_picture.shape))


# -- deformable convolutions -------------------------------------------------------------------------------------------
def _deformed(
    x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *, given: dict[str, int]
) -> Tensor:
    """Run a deformable convolution; an empty mask or bias is none. `given` has the keys of either of mmcv's two."""
    pairs = [('stride_h', 'dH'), ('stride_w', 'dW'), ('pad_h', 'padH'), ('pad_w', 'padW'),
             ('dilation_h', 'dilationH'), ('dilation_w', 'dilationW')]  # fmt: skip
    numbers = [given[name] if name in given else given[other] for name, other in pairs]
    bias = bias if bias.numel() else x.new_zeros(weight.shape[0])
    groups = (given['group'], given['deformable_group'])
    factors = mask if mask.numel() else x.new_zeros(len(x), 1)
    offset = offset.nan_to_num(torch.inf, torch.inf, -torch.inf)  # at nan torchvision reads anywhere in memory
    return vision().deform_conv2d(x, weight, offset, factors, bias, *numbers, *groups, mask.numel() > 0)


@operator
def modulated_deform_conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, _ones: Tensor, offset: Tensor, mask: Tensor, output: Tensor,
    _columns: Tensor, **given: int,
) -> None:  # fmt: skip
    output.copy_(_deformed(x, weight, offset, mask, bias, given=given))


@operator
def modulated_deform_conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, _ones: Tensor, offset: Tensor, mask: Tensor, _columns: Tensor,
    grad_x: Tensor, grad_weight: Tensor, grad_bias: Tensor, grad_offset: Tensor, grad_mask: Tensor, gradient: Tensor,
    **given: int,
) -> None:  # fmt: skip
    fill_gradients(lambda *inputs: _deformed(*inputs, given=given), [x, weight, offset, mask, bias], gradient,
                   [grad_x, grad_weight, grad_offset, grad_mask, grad_bias])  # fmt: skip


@operator
def deform_conv_forward(
    x: Tensor, weight: Tensor, offset: Tensor, output: Tensor, _columns: Tensor, _ones: Tensor, **given: int
) -> None:
    none = x.new_zeros(0)
    output.copy_(_deformed(x, weight, offset, none, none, given=given))


@operator
def deform_conv_backward_input(
    x: Tensor, offset: Tensor, gradient: Tensor, grad_x: Tensor, grad_offset: Tensor, weight: Tensor,
    _columns: Tensor, **given: int,
) -> None:  # fmt: skip
    none = x.new_zeros(0)
    fill_gradients(lambda a, b: _deformed(a, weight, b, none, none, given=given), [x, offset], gradient,
                   [grad_x, grad_offset])  # fmt: skip


@operator
def deform_conv_backward_parameters(
    x: Tensor, offset: Tensor, gradient: Tensor, grad_weight: Tensor, _columns: Tensor, _ones: Tensor, **given: int
) -> None:
    none = x.new_zeros(0)
    fill_gradients(lambda w: _deformed(x, w, offset, none, none, given=given), [grad_weight], gradient, [grad_weight])


# -- masked convolutions: the places of one picture (1, C, H, W) that a mask names, with stride 1 ---------------------
@operator
def masked_im2col_forward(
    x: Tensor, rows: Tensor, columns: Tensor, patches: Tensor, *, kernel_h: int, kernel_w: int, pad_h: int, pad_w: int
) -> None:
    width = x.shape[3] + 2 * pad_w - kernel_w + 1
    found = F.unfold(x, (kernel_h, kernel_w), padding=(pad_h, pad_w))[0]
    patches.copy_(found.index_select(1, rows * width + columns))


@operator
def masked_col2im_forward(
    values: Tensor, rows: Tensor, columns: Tensor, output: Tensor, *, height: int, width: int, channels: int
) -> None:
    output[0][:, rows, columns] = values


# -- what mmcv computes by itself on the CPU only ----------------------------------------------------------------------
@operator
def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, _starts: Tensor, places: Tensor, weights: Tensor, im2col_step: int
) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, places, weights)


@operator
def ms_deform_attn_backward(
    value: Tensor, shapes: Tensor, starts: Tensor, places: Tensor, weights: Tensor, gradient: Tensor,
    grad_value: Tensor, grad_places: Tensor, grad_weights: Tensor, im2col_step: int,
) -> None:  # fmt: skip
    fill_gradients(lambda v, p, w: ms_deform_attn_forward(v, shapes, starts, p, w, im2col_step),
                   [value, places, weights], gradient, [grad_value, grad_places, grad_weights])  # fmt: skip


def _focal(x: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    """Return the focal loss (N, classes) of logits; a target of `classes` is the background."""
    hit = F.one_hot(target, x.shape[1] + 1)[:, :-1].to(x)
    missed = torch.where(hit > 0, 1 - x.sigmoid(), x.sigmoid())
    loss = F.binary_cross_entropy_with_logits(x, hit, reduction='none')
    loss = loss * missed**gamma * torch.where(hit > 0, alpha, 1 - alpha)
    return loss * weight[target.clamp(max=x.shape[1] - 1)][:, None] if weight.numel() else loss


@operator
def sigmoid_focal_loss_forward(
    x: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    output.copy_(_focal(x, target, weight, gamma, alpha))


@operator
def sigmoid_focal_loss_backward(
    x: Tensor, target: Tensor, weight: Tensor, grad_x: Tensor, gamma: float, alpha: float
) -> None:
    gradient = torch.ones_like(x)
    fill_gradients(lambda logits: _focal(logits, target, weight, gamma, alpha), [x], gradient, [grad_x])


def fill_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor, filled: Sequence[Tensor]
) -> None:
    """Write the gradients of a differentiable function into tensors, as mmcv's backward operators do."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        found = torch.autograd.grad(function(*leaves), leaves, gradient, allow_unused=True)
    for target, value in zip(filled, found, strict=True):
        if value is not None:
            target.copy_(value)


# -- the module that mmcv imports --------------------------------------------------------------------------------------
class StandIn(ModuleType):
    """`mmcv._ext` by torchvision; what it lacks is taken from the compiled module, or raises one line when called."""

    def __init__(self, compiled: ModuleType | None = None, cause: str = '') -> None:
        super().__init__(NAME)
        self.__spec__ = ModuleSpec(NAME, None, origin=__name__)
        self.compiled, self.cause, self.announced = compiled, cause, False
        for name, function in OPERATORS.items():
            setattr(self, name, self._announcing(function) if compiled is None else function)

    def __getattr__(self, name: str) -> Operator:
        if name.startswith('__'):
            raise AttributeError(name)
        if self.compiled is not None:
            return getattr(self.compiled, name)

        def unavailable(*_: object, **__: object) -> Tensor:
            raise NotImplementedError(missing(name))

        return unavailable

    def _announcing(self, function: Operator) -> Operator:
        @wraps(function)
        def announcing(*args: object, **options: object) -> Tensor | None:
            if not self.announced:
                self.announced = True
                print_log(f'{self.cause}: torchvision computes nms, pooling of regions and the like', 'current')
            return function(*args, **options)

        return announcing


def vision() -> Any:
    """Return torchvision's operators.

    Raises:
        ImportError: it is not installed.
    """
    importlib.import_module('torchvision')
    return torch.ops.torchvision


def missing(name: str) -> str:
    """Return what to say of an operator that only the compiled module has."""
    return f'{name} is one of the compiled operators of mmcv, which mmcv was installed without: {ADVICE}'


def stand_in() -> None:
    """Let `mmcv.ops` be imported where its compiled operators are not installed or cannot be loaded.

    Must run before mmpretrain, mmseg or mmdet are imported.
    """
    try:
        importlib.import_module(NAME)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == NAME
        why = 'are not installed' if absent else f'cannot be loaded ({first_line(error)})'
        sys.modules[NAME] = StandIn(cause=f'the compiled operators of mmcv {why}')


@contextmanager
def followed() -> Iterator[None]:
    """Run mmcv's operators by torchvision's, which combing has rules for and ONNX operators, whatever mmcv has."""
    loaded = [sys.modules[name] for name in (f'mmcv.ops.{part}' for part in FOLLOWED) if name in sys.modules]
    before = {module: module.ext_module for module in loaded if hasattr(module, 'ext_module')}
    try:
        for module, compiled in before.items():
            if not isinstance(compiled, StandIn):
                module.__dict__['ext_module'] = StandIn(compiled)
        yield
    finally:
        for module, compiled in before.items():
            module.__dict__['ext_module'] = compiled
