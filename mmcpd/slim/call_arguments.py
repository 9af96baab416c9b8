"""The arguments of torch's functions, by their numbers and by the names under which a call may give them."""

from __future__ import annotations

SOURCE = ('input', 'self', 'tensor')
_CONVOLUTION = tuple((name,) for name in ('input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups'))
_TRANSPOSED = (*_CONVOLUTION[:5], ('output_padding',), ('groups',), ('dilation',))
_RANGES: dict[str, tuple[tuple[str, ...], ...]] = {
    'arange': (('start',), ('end',), ('step',)),
    **dict.fromkeys(('linspace', 'logspace'), (('start',), ('end',), ('steps',))),
}
RANGES = tuple(_RANGES)  # functions that make numbers, never methods
# Of the functions whose arguments are read or written by their number, the names of each; a method's tensor is one too.
PARAMETERS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(('view', 'reshape', 'expand', 'broadcast_to'), (SOURCE, ('size', 'shape'))),
    **dict.fromkeys(('expand_as', 'view_as', 'reshape_as'), (SOURCE, ('other',))),
    'repeat': (SOURCE, ('repeats',)),
    **dict.fromkeys(('squeeze', 'squeeze_'), (SOURCE, ('dim',))),
    'unflatten': (SOURCE, ('dim',), ('sizes',)),
    **dict.fromkeys(('zeros', 'ones', 'empty', 'full', 'rand', 'randn'), (('size',),)),
    **dict.fromkeys(('new_zeros', 'new_ones', 'new_empty', 'new_full'), (SOURCE, ('size',))),
    'eye': (('n',), ('m',)),
    **_RANGES,
    'chunk': (SOURCE, ('chunks',), ('dim',)),
    'tensor_split': (SOURCE, ('indices_or_sections', 'sections', 'indices', 'tensor_indices_or_sections'), ('dim',)),
    **dict.fromkeys(('hsplit', 'vsplit', 'dsplit'), (SOURCE, ('sections', 'indices', 'indices_or_sections'))),
    'split': (SOURCE, ('split_size_or_sections', 'split_size', 'split_sizes'), ('dim',)),
    'split_with_sizes': (SOURCE, ('split_sizes',), ('dim',)),
    'narrow': (SOURCE, ('dim',), ('start',), ('length',)),
    **dict.fromkeys(('layer_norm', 'rms_norm'), (('input',), ('normalized_shape',))),
    'group_norm': (('input',), ('num_groups',)),
    **dict.fromkeys(('conv1d', 'conv2d', 'conv3d'), _CONVOLUTION),
    **dict.fromkeys(('conv_transpose1d', 'conv_transpose2d', 'conv_transpose3d'), _TRANSPOSED),
    'scaled_dot_product_attention': (('query',), ('key',), ('value',), ('attn_mask',)),
    'multi_head_attention_forward': tuple(
        (name,) for name in ('query', 'key', 'value', 'embed_dim_to_check', 'num_heads', 'in_proj_weight')
    ),
}


def names_of(function: str, position: int) -> tuple[str, ...]:
    """Return the names of an argument; of a function that may go by another name here, those of any.

    Example:
        >>> names_of('narrow', 3), names_of('expand', 2), 'groups' in names_of('my_conv', 6)
        (('length',), (), True)
    """
    if function in PARAMETERS:
        return next(iter(PARAMETERS[function][position : position + 1]), ())
    return tuple(name for names in PARAMETERS.values() for each in names[position : position + 1] for name in each)
