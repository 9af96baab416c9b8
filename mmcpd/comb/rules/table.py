"""The table of operations: what each one says about the axes of its inputs and outputs.

A rule takes the `Run` and the `Call`, and sets the axes of the call's outputs. To add one: its name in a row here, a
function in a file of this folder where no kind fits, and a toy net whose groups are written by hand (`docs/design.md`,
"How to add").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from .movement import cat, channel_shuffle, col2im, glu, im2col, movement, triangle
from .pointwise import (
    Rule,
    all_summands,
    any_factor,
    as_strided,
    fresh,
    like,
    numerator,
    pointwise,
    positive_power,
    same,
    stays,
    within_bounds,
)  # fmt: skip
from .products import add_product, attention, convolution, embedding, grid_sample, linear, pool, product
from .statistics import batch_norm, group_norm, layer_norm, reduction, softmax


@dataclass(frozen=True)
class Operation:
    """One operation, by aten's name; in-place and out-of-place forms share it."""

    rule: Rule  # what it says about axes
    plain: bool = False  # where only such ones run, slimming is slicing and needs no trial
    counted: bool = False  # it costs something, with axes or without, so that its rule always runs


plain, op = partial(Operation, plain=True), Operation
_KINDS: list[tuple[Operation, str]] = [
    # -- point-wise, and where the result is zero; what else torch tags as point-wise is `pointwise()`, and needs no row
    (plain(pointwise(any_factor)), 'mul'),
    (op(pointwise(numerator)), 'div'),
    (op(pointwise(within_bounds)), 'clamp clamp_min clamp_max'),
    (plain(pointwise(within_bounds)), 'hardtanh'),
    (op(pointwise(positive_power)), 'pow'),
    (plain(pointwise(all_summands)), 'add'),
    (op(pointwise(all_summands)), 'sub rsub maximum minimum lerp addcmul'),
    (plain(pointwise(stays)), 'relu gelu silu hardswish'),
    (op(pointwise(stays)),
     'mish tanh elu celu leaky_relu _prelu_kernel neg abs sqrt sin sinh asinh atan erf sign floor ceil round '
     'trunc expm1 log1p native_dropout nan_to_num'),
    (plain(pointwise()), 'hardsigmoid sigmoid'),
    (op(pointwise()), 'softplus logit exp log cos reciprocal rsqrt log_sigmoid_forward copy where masked_fill'),
    # -- axes pass through
    (plain(same), 'clone detach alias'),
    (op(same), '_to_copy lift_fresh lift view_of'),
    # -- data movement: the very same operation runs on the atoms
    (plain(movement), 'view _unsafe_view t'),
    (op(movement),
     '_reshape_alias permute transpose expand unsqueeze squeeze select slice split split_with_sizes '
     'unsafe_split unsafe_split_with_sizes unbind roll flip repeat repeat_interleave constant_pad_nd '
     'reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d unfold diagonal rot90 '
     'pixel_shuffle pixel_unshuffle squeeze_copy index index_select gather'),
    # -- data movement with a rule of its own
    (op(channel_shuffle), 'channel_shuffle'),
    (plain(cat), 'cat'),
    (op(cat), 'stack'),
    (op(triangle), 'tril triu'),
    (op(im2col), 'im2col'),
    (op(col2im), 'col2im'),
    (op(glu), 'glu'),
    (plain(as_strided), 'as_strided'),
    # -- spatial: positions are pooled or sampled, channels stay
    (op(pool(1)), 'avg_pool1d adaptive_avg_pool1d upsample_nearest1d upsample_linear1d'),
    (plain(pool(2)), 'avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d'),
    (op(pool(3)), 'avg_pool3d max_pool3d_with_indices _adaptive_avg_pool3d upsample_trilinear3d'),
    (op(pool(2)),
     'adaptive_avg_pool2d adaptive_max_pool2d upsample_bicubic2d _upsample_bilinear2d_aa '
     '_upsample_bicubic2d_aa _upsample_nearest_exact2d'),
    (op(grid_sample), 'grid_sampler_2d grid_sampler_3d'),
    # -- weights
    (plain(convolution, counted=True), 'convolution'),
    (op(convolution, counted=True), '_convolution cudnn_convolution mkldnn_convolution'),
    (plain(product, counted=True), 'mm'),
    (op(product, counted=True), 'bmm mv dot'),
    (plain(add_product, counted=True), 'addmm'),
    (op(add_product, counted=True), 'baddbmm addmv'),
    (op(linear, counted=True), 'linear'),
    (op(embedding), 'embedding'),
    # -- attention
    (op(attention, counted=True),
     '_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention '
     '_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention '
     '_scaled_dot_product_fused_attention_overrideable'),
    # -- statistics
    (op(reduction(safe=True)), 'sum linalg_vector_norm norm count_nonzero'),
    (plain(reduction()), 'mean'),
    (op(reduction()), 'amax amin max min var std var_mean std_mean cumsum median'),
    (op(reduction(zero=False)), 'argmax argmin logsumexp prod any all logcumsumexp cumprod'),
    (op(reduction(zero=False, last=True)), 'sort topk'),
    (op(softmax), '_softmax _log_softmax softmax log_softmax _safe_softmax'),
    # -- norms
    (plain(batch_norm), 'native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm'),
    (op(batch_norm), '_native_batch_norm_legit miopen_batch_norm _batch_norm_no_update _batch_norm_with_update'),
    (op(layer_norm), 'native_layer_norm'),
    (op(group_norm), 'native_group_norm'),
    # -- fresh tensors, sizes and random numbers: no input axis matters
    (op(fresh),
     'new_zeros new_ones new_empty new_full new_empty_strided empty zeros ones full arange linspace rand randn '
     'randint scalar_tensor eye randperm empty_strided is_same_size tril_indices'),
    (op(like(zero=True)), 'zeros_like zero'),
    (op(like(zero=False)), 'ones_like full_like empty_like rand_like randn_like bernoulli fill'),
]  # fmt: skip
OPERATIONS: dict[str, Operation] = {name: kind for kind, names in _KINDS for name in names.split()}
assert len(OPERATIONS) == sum(len(names.split()) for _, names in _KINDS), 'an operation stands in two rows'
