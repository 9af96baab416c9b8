"""The table itself: names of operations by kind, and the rules of the rest."""

from __future__ import annotations

from collections.abc import Callable

from ..trace import Call, Trace

Rule = Callable[[Trace, Call], None]
RULES: dict[str, Rule] = {}
COUNTED: set[str] = set()  # operations that cost something, with axes or without

# f(0) == 0, so a channel that is zero before is zero after.
ZERO_STAYS = set(
    'relu relu6 gelu silu hardswish mish tanh elu celu selu leaky_relu prelu _prelu_kernel neg abs sqrt sin sinh '
    'asinh atan erf sign floor ceil round trunc square expm1 log1p native_dropout dropout nan_to_num softsign'.split()
)
# Point-wise too, though the dispatcher does not tag them.
POINTWISE = set('hardswish hardsigmoid hardtanh prelu _prelu_kernel rrelu native_dropout softplus logit'.split())
# Where nothing else runs, slimming is slicing and needs no trial.
PLAIN = set(
    'convolution addmm mm t view _unsafe_view native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm '
    'relu hardtanh sigmoid silu hardswish hardsigmoid gelu add mul cat mean max_pool2d_with_indices avg_pool2d '
    '_adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d clone detach alias contiguous as_strided'.split()
)
# Axes pass through untouched.
SAME = set('clone contiguous detach alias _to_copy lift_fresh lift view_of positive fill_diagonal'.split())
MOVEMENT = set(
    'view _unsafe_view reshape _reshape_alias permute transpose t expand unsqueeze squeeze select slice narrow split '
    'split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk unbind roll flip repeat '
    'repeat_interleave constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d unfold '
    'diagonal movedim rot90 pixel_shuffle pixel_unshuffle unflatten '
    'flatten numpy_T swapaxes view_as expand_as squeeze_copy index index_select gather'.split()
)
VIEWS = set('view _unsafe_view _reshape_alias'.split())  # of labels with stride 0, which need a reshape
# No input axis matters: fresh tensors, sizes, and random numbers.
FRESH = set(
    'new_zeros new_ones new_empty new_full new_empty_strided empty zeros ones full arange linspace rand randn randint '
    'scalar_tensor sym_size sym_numel sym_stride eye randperm empty_strided is_same_size tril_indices'.split()
)
POOLS = {  # spatial operations: name -> number of trailing spatial dimensions
    'avg_pool1d': 1, 'avg_pool2d': 2, 'avg_pool3d': 3, 'max_pool1d': 1, 'max_pool2d': 2, 'max_pool2d_with_indices': 2,
    'max_pool3d_with_indices': 3, 'adaptive_avg_pool1d': 1, '_adaptive_avg_pool2d': 2, 'adaptive_avg_pool2d': 2,
    'adaptive_max_pool2d': 2, '_adaptive_avg_pool3d': 3, 'upsample_nearest1d': 1, 'upsample_nearest2d': 2,
    'upsample_linear1d': 1, 'upsample_bilinear2d': 2, 'upsample_bicubic2d': 2, '_upsample_bilinear2d_aa': 2,
    '_upsample_bicubic2d_aa': 2, '_upsample_nearest_exact2d': 2, 'upsample_trilinear3d': 3,
}  # fmt: skip


def rule(*names: str, counted: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule under each of its operations' names; `counted` ones run even where no axis goes in."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f'two rules for {name!r}')
            RULES[name] = function
        COUNTED.update(names if counted else ())
        return function

    return register


def unknown(trace: Trace, call: Call) -> None:
    """Freeze what goes through an operation without a rule, and report it."""
    trace.unsupported[(call.op, trace.where)] += 1
    for tensor in call.tensors():
        trace.freeze_all(tensor, f'no rule for {call.op} in {trace.where}')


def same(trace: Trace, call: Call) -> None:
    trace.set(call.out, trace.axes(call.tensors()[0]))
