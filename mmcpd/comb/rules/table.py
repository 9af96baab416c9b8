"""The table of operations: what each one says about the axes of its inputs and outputs.

A rule takes the `Run` and the `Call`, and sets the axes of the call's outputs. To add one: an entry here, a function
in a file of this folder where no kind fits, and a toy net whose groups are written by hand (`docs/design.md`, "How to
add").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from .bilinear import trilinear
from .movement import cat, channel_shuffle, col2im, glu, im2col, movement, triangle
from .pointwise import (
    Rule,
    all_summands,
    any_factor,
    as_strided,
    compared,
    copied,
    filled,
    fresh,
    like,
    never_zero,
    numerator,
    pointwise,
    power,
    same,
    selected,
    stays,
    within_bounds,
)  # fmt: skip
from .products import (
    add_product,
    attention,
    convolution,
    distances,
    embedding,
    grid_sample,
    linear,
    pool,
    product,
    sparse_product,
)
from .recurrent import fused_cell, packed
from .regions import cell_pool, chosen, deformable, region_pool, unpool
from .scattering import index_put, scatter
from .spectra import as_complex, as_real, fourier
from .statistics import batch_norm, group_norm, layer_norm, norm, reduction, softmax, weight_norm


@dataclass(frozen=True)
class Operation:
    """One operation, by aten's name; in-place and out-of-place forms share it."""

    rule: Rule  # what it says about axes
    plain: bool = False  # where only such ones run, slimming is slicing and needs no trial
    counted: bool = False  # its rule always runs, with axes or without: it costs something, or may make axes


plain, op = partial(Operation, plain=True), Operation
OPERATIONS: dict[str, Operation] = {
    # -- point-wise, and where the result is zero; what else torch tags as point-wise is `pointwise()`, and needs no row
    'mul': plain(pointwise(any_factor)), 'div': op(never_zero('other', numerator)),
    'clamp': op(pointwise(within_bounds)), 'hardtanh': plain(pointwise(within_bounds)),
    'clamp_min': op(pointwise(within_bounds)), 'clamp_max': op(pointwise(within_bounds)), 'pow': op(power),
    'add': plain(pointwise(all_summands)), 'sub': op(pointwise(all_summands)),
    'rsub': op(pointwise(all_summands)), 'maximum': op(pointwise(all_summands)),
    'minimum': op(pointwise(all_summands)), 'lerp': op(pointwise(all_summands)),
    'addcmul': op(pointwise(all_summands)), 'relu': plain(pointwise(stays)), 'gelu': plain(pointwise(stays)),
    'silu': plain(pointwise(stays)), 'hardswish': plain(pointwise(stays)), 'mish': op(pointwise(stays)),
    'tanh': op(pointwise(stays)), 'elu': op(pointwise(stays)), 'celu': op(pointwise(stays)),
    'leaky_relu': op(pointwise(stays)), '_prelu_kernel': op(pointwise(stays)), 'neg': op(pointwise(stays)),
    'abs': op(pointwise(stays)), 'sqrt': op(pointwise(stays)), 'sin': op(pointwise(stays)),
    'sinh': op(pointwise(stays)), 'asinh': op(pointwise(stays)), 'atan': op(pointwise(stays)),
    'erf': op(pointwise(stays)), 'sign': op(pointwise(stays)), 'floor': op(pointwise(stays)),
    'ceil': op(pointwise(stays)), 'round': op(pointwise(stays)), 'trunc': op(pointwise(stays)),
    'expm1': op(pointwise(stays)), 'log1p': op(pointwise(stays)), 'native_dropout': op(pointwise(stays)),
    'nan_to_num': op(pointwise(stays)), 'hardsigmoid': plain(pointwise()), 'softplus': op(pointwise()),
    'logit': op(pointwise()), 'sigmoid': plain(pointwise()), 'exp': op(pointwise()), 'log': op(never_zero('self')),
    'log2': op(never_zero('self')), 'log10': op(never_zero('self')), 'floor_divide': op(never_zero('other')),
    'fmod': op(never_zero('other')), 'remainder': op(never_zero('other')),
    'cos': op(pointwise()), 'reciprocal': op(never_zero('self')), 'rsqrt': op(never_zero('self')),
    'log_sigmoid_forward': op(pointwise()), 'copy': op(copied), 'where': op(pointwise(selected)),
    'masked_fill': op(pointwise(filled)),
    # -- axes pass through
    'clone': plain(same), 'detach': plain(same), 'alias': plain(same), '_to_copy': op(same),
    'lift_fresh': op(same), 'lift': op(same),
    # -- data movement: the very same operation runs on the atoms
    'view': plain(movement), '_unsafe_view': plain(movement), '_reshape_alias': op(movement),
    'permute': op(movement), 'transpose': op(movement), 't': plain(movement), 'expand': op(movement),
    'unsqueeze': op(movement), 'squeeze': op(movement), 'select': op(movement), 'slice': op(movement),
    'split': op(movement), 'split_with_sizes': op(movement), 'unsafe_split': op(movement),
    'unsafe_split_with_sizes': op(movement), 'unbind': op(movement), 'roll': op(movement),
    'flip': op(movement), 'repeat': op(movement), 'repeat_interleave': op(movement),
    'constant_pad_nd': op(movement), 'reflection_pad1d': op(movement), 'reflection_pad2d': op(movement),
    'replication_pad1d': op(movement), 'replication_pad2d': op(movement), 'unfold': op(movement),
    'diagonal': op(movement), 'rot90': op(movement), 'pixel_shuffle': op(movement),
    'pixel_unshuffle': op(movement), 'squeeze_copy': op(movement), 'index': op(movement),
    'index_select': op(movement), 'gather': op(movement),
    'reflection_pad3d': op(movement), 'replication_pad3d': op(movement), '_unsafe_index': op(movement),
    # -- written to by an index, or chosen by values
    'scatter': op(scatter), 'scatter_add': op(scatter), 'scatter_reduce': op(scatter), 'index_add': op(scatter),
    'index_reduce': op(scatter), 'index_copy': op(scatter), 'index_fill': op(scatter), 'index_put': op(index_put),
    '_unsafe_index_put': op(index_put), '_index_put_impl': op(index_put), 'nonzero': op(chosen),
    'masked_select': op(chosen),
    # -- recurrent layers
    '_thnn_fused_lstm_cell': op(fused_cell), '_thnn_fused_gru_cell': op(fused_cell),
    '_pack_padded_sequence': op(packed),
    # -- data movement with a rule of its own
    'channel_shuffle': op(channel_shuffle), 'cat': plain(cat), 'stack': op(cat), 'tril': op(triangle),
    'triu': op(triangle), 'im2col': op(im2col), 'col2im': op(col2im), 'glu': op(glu),
    'as_strided': plain(as_strided),
    # -- spatial: positions are pooled or sampled, channels stay
    'avg_pool2d': plain(pool(2)), 'avg_pool3d': op(pool(3)), 'max_pool2d_with_indices': plain(pool(2)),
    'max_pool3d_with_indices': op(pool(3)), '_adaptive_avg_pool2d': plain(pool(2)), 'adaptive_max_pool2d': op(pool(2)),
    '_adaptive_avg_pool3d': op(pool(3)), 'upsample_nearest1d': op(pool(1)), 'upsample_nearest2d': plain(pool(2)),
    'upsample_linear1d': op(pool(1)), 'upsample_bilinear2d': plain(pool(2)), 'upsample_bicubic2d': op(pool(2)),
    '_upsample_bilinear2d_aa': op(pool(2)), '_upsample_bicubic2d_aa': op(pool(2)),
    '_upsample_nearest_exact2d': op(pool(2)), 'upsample_trilinear3d': op(pool(3)),
    'upsample_nearest3d': op(pool(3)), '_upsample_nearest_exact1d': op(pool(1)),
    '_upsample_nearest_exact3d': op(pool(3)), 'adaptive_max_pool3d': op(pool(3)),
    'fractional_max_pool2d': op(pool(2)), 'fractional_max_pool3d': op(pool(3)),
    'max_unpool2d': op(unpool), 'max_unpool3d': op(unpool),
    'grid_sampler_2d': op(grid_sample), 'grid_sampler_3d': op(grid_sample),
    # -- weights
    'convolution': plain(convolution, counted=True), '_convolution': op(convolution, counted=True),
    'cudnn_convolution': op(convolution, counted=True), 'mkldnn_convolution': op(convolution, counted=True),
    '_cdist_forward': op(distances), '_euclidean_dist': op(distances),
    'mm': plain(product, counted=True), 'bmm': op(product, counted=True), 'mv': op(product, counted=True),
    'dot': op(product, counted=True), 'vdot': op(product, counted=True), 'addmm': plain(add_product, counted=True),
    'baddbmm': op(add_product, counted=True), 'addmv': op(add_product, counted=True),
    'linear': op(linear, counted=True), 'embedding': op(embedding),
    '_sparse_addmm': op(sparse_product, counted=True), '_trilinear': op(trilinear, counted=True),
    # -- Fourier transforms and complex numbers
    '_fft_r2c': op(fourier), '_fft_c2r': op(fourier), '_fft_c2c': op(fourier), 'view_as_complex': op(as_complex),
    'view_as_real': op(as_real), '_conj': op(same), '_conj_physical': op(same), 'conj_physical': op(same),
    '_neg_view': op(same), 'complex': op(pointwise(all_summands)),
    'angle': op(pointwise(stays)),
    # -- attention
    '_scaled_dot_product_flash_attention_for_cpu': op(attention, counted=True),
    '_scaled_dot_product_flash_attention': op(attention, counted=True),
    '_scaled_dot_product_efficient_attention': op(attention, counted=True),
    '_scaled_dot_product_cudnn_attention': op(attention, counted=True),
    '_scaled_dot_product_fused_attention_overrideable': op(attention, counted=True),
    # -- statistics
    'sum': op(reduction(safe=True)), 'linalg_vector_norm': op(norm), 'norm': op(norm),
    'count_nonzero': op(reduction(safe=True)), 'mean': plain(reduction()),
    'amax': op(reduction()), 'amin': op(reduction()), 'max': op(reduction()), 'min': op(reduction()),
    'var': op(reduction()), 'std': op(reduction()), 'var_mean': op(reduction()),
    'std_mean': op(reduction()), 'cumsum': op(reduction()), 'median': op(reduction()),
    'cummax': op(reduction()), 'cummin': op(reduction()), 'kthvalue': op(reduction(last=True)),
    'mode': op(reduction(last=True)),
    'nanmedian': op(reduction()), 'aminmax': op(reduction()), 'nansum': op(reduction(safe=True)),
    'argmax': op(reduction(zero=False)), 'argmin': op(reduction(zero=False)),
    'logsumexp': op(reduction(zero=False)), 'prod': op(reduction(zero=False)),
    'any': op(reduction(zero=False)), 'all': op(reduction(zero=False)),
    'logcumsumexp': op(reduction(zero=False)), 'cumprod': op(reduction(zero=False)),
    'sort': op(reduction(zero=False, last=True)), 'topk': op(reduction(zero=False, last=True)),
    '_softmax': op(softmax), '_log_softmax': op(softmax), '_safe_softmax': op(softmax),
    # -- norms
    'native_batch_norm': plain(batch_norm), '_native_batch_norm_legit_no_training': plain(batch_norm),
    '_native_batch_norm_legit': op(batch_norm), 'cudnn_batch_norm': plain(batch_norm),
    'miopen_batch_norm': op(batch_norm), '_batch_norm_no_update': op(batch_norm),
    '_batch_norm_with_update': op(batch_norm), 'native_layer_norm': op(layer_norm),
    'native_group_norm': op(group_norm), '_weight_norm_interface': op(weight_norm),
    # -- losses
    'nll_loss_forward': op(compared), 'nll_loss2d_forward': op(compared), 'binary_cross_entropy': op(compared),
    'binary_cross_entropy_with_logits': op(compared), 'mse_loss': op(compared), 'smooth_l1_loss': op(compared),
    'huber_loss': op(compared), 'soft_margin_loss': op(compared), 'multi_margin_loss': op(compared),
    'multilabel_margin_loss_forward': op(compared), '_ctc_loss': op(compared),
    # -- fresh tensors, sizes and random numbers: no input axis matters
    'new_zeros': op(fresh), 'new_ones': op(fresh), 'new_empty': op(fresh), 'new_full': op(fresh, counted=True),
    'new_empty_strided': op(fresh), 'empty': op(fresh), 'zeros': op(fresh, counted=True), 'ones': op(fresh),
    'full': op(fresh, counted=True), 'arange': op(fresh), 'linspace': op(fresh), 'rand': op(fresh),
    'randn': op(fresh),
    'randint': op(fresh), 'scalar_tensor': op(fresh), 'eye': op(fresh), 'randperm': op(fresh),
    'empty_strided': op(fresh), 'is_same_size': op(fresh), 'tril_indices': op(fresh),
    'zeros_like': op(like(zero=True)), 'zero': op(like(zero=True)), 'ones_like': op(like(zero=False)),
    'full_like': op(like(zero=False)), 'empty_like': op(like(zero=False)), 'rand_like': op(like(zero=False)),
    'randn_like': op(like(zero=False)), 'bernoulli': op(like(zero=False)), 'fill': op(like(zero=False)),
}  # fmt: skip

# Operations of torchvision.
VISION: dict[str, Operation] = {
    'roi_align': op(region_pool), 'roi_pool': op(region_pool), 'ps_roi_align': op(cell_pool),
    'ps_roi_pool': op(cell_pool), 'deform_conv2d': op(deformable, counted=True), 'nms': op(chosen),
}  # fmt: skip

# Point-wise operations that some releases of torch do not tag as such.
UNTAGGED = frozenset(
    'acos acosh addcdiv asin atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor clip copysign cosh '
    'digamma eq erfc erfinv exp2 float_power fmax fmin frac ge gt hardshrink heaviside hypot '
    'i0 isfinite isinf isnan le lgamma logaddexp logaddexp2 logical_and logical_not logical_or '
    'logical_xor lt ne polygamma relu6 rrelu_with_noise selu sgn signbit sinc softshrink '
    'special_entr special_xlog1py square tan threshold xlogy'.split()
)
