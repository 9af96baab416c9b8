"""Say what became of each layer, and which layers give out the same units, from what combing found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from mmcpd.coupling import Coupling, Group, Member, Role
from mmcpd.report.data import Frozen, Layer, Stream


def layers(coupling: Coupling, shapes: Mapping[str, Sequence[int]]) -> list[Layer]:
    """Return the layers of a model in the order of its state dict, given the shapes of the slim model's tensors.

    A layer is a weight that gives out channels. A tensor without a slim shape is as it was.

    Example:
        >>> layers(coupling, {'conv1.weight': (4, 3, 3, 3), 'conv2.weight': (4, 4, 3, 3)})[0]
        Layer(path='conv1', dense=8, kept=4, dense_params=224, slim_params=116, group='conv1', frozen='')
    """
    dims, groups, reasons = _outputs(coupling)
    owner = {name: name.rpartition('.')[0] or name for name in coupling.tensors}
    first = {owner[name]: name for name in reversed([name for name in coupling.tensors if name in dims])}
    dense_params, slim_params = Counter[str](), Counter[str]()
    for name, info in coupling.tensors.items():
        if info.is_parameter and owner[name] in first:
            dense_params[owner[name]] += prod(info.shape)
            slim_params[owner[name]] += prod(shapes.get(name, info.shape))
    found = []
    for name in (name for name in coupling.tensors if name in dims):
        is_first = first[owner[name]] == name  # of several weights of one module, as those of an attention
        path, dense = name.removesuffix('.weight'), coupling.tensors[name].shape
        found.append(
            Layer(
                path,
                dense[dims[name]],
                shapes.get(name, dense)[dims[name]],
                dense_params[owner[name]] if is_first else 0,
                slim_params[owner[name]] if is_first else 0,
                groups.get(name, ''),
                reasons.get(name, ''),
            )
        )
    return found


def weight_outputs(coupling: Coupling) -> Iterator[tuple[Group, Member]]:
    """Yield the members that are outputs of weights, biases apart, each with its group.

    Example:
        >>> [(group.name, member.tensor, member.dim) for group, member in weight_outputs(coupling)]
        [('conv1', 'conv1.weight', 0), ('conv2', 'conv2.weight', 0)]
    """
    for group in coupling.groups:
        for member in group.members:
            if member.role is Role.PRODUCER and len(coupling.tensors[member.tensor].shape) > 1:
                yield group, member


def _outputs(coupling: Coupling) -> tuple[dict[str, int], dict[str, str], dict[str, str]]:
    """Return the dimension of each weight that is its output, the group most of it is in, and why some is frozen."""
    dims: dict[str, int] = {}
    rows: dict[str, Counter[str]] = {}
    for group, member in weight_outputs(coupling):
        dims[member.tensor] = member.dim
        rows.setdefault(member.tensor, Counter())[group.name] += member.index.numel()
    reasons: dict[str, str] = {}
    for frozen in coupling.frozen:
        info = coupling.tensors[frozen.tensor]
        is_weight = info.is_parameter and len(info.shape) > 1 and frozen.tensor.endswith('weight')
        if is_weight and dims.get(frozen.tensor, 0) == frozen.dim:
            dims[frozen.tensor] = frozen.dim
            reasons.setdefault(frozen.tensor, frozen.reason)
    return dims, {name: count.most_common(1)[0][0] for name, count in rows.items()}, reasons


def streams(coupling: Coupling, shown: Sequence[Layer]) -> list[Stream]:
    """Return the groups whose units two or more layers give out, with the layers that write and read them.

    A depthwise convolution gives out what it takes in: it is no writer.

    Example:
        >>> streams(coupling, layers(coupling, {}))  # no two layers of this model are added
        []
    """
    number = {layer.path: place for place, layer in enumerate(shown)}
    kept = {layer.group: layer.kept / layer.dense for layer in reversed(shown)}
    found = []
    for group in coupling.groups:
        writers = _places(group, Role.PRODUCER, coupling, number)
        if len(writers) > 1:
            readers = _places(group, Role.CONSUMER, coupling, number)
            share = kept.get(group.name, 1.0)
            found.append(Stream(group.name, group.units, round(share * group.units), writers, readers))
    return found


def _places(group: Group, role: Role, coupling: Coupling, number: Mapping[str, int]) -> list[int]:
    """Return the numbers of the layers that have a role in a group; one that has both is none of its writers."""
    tensors = {member.tensor for member in group.members if member.role is role}
    if role is Role.PRODUCER:
        tensors = {name for name in tensors if not _is_depthwise(coupling.tensors[name].shape)}
    places = (number.get(name.removesuffix('.weight')) for name in tensors)
    return sorted(place for place in places if place is not None)


def _is_depthwise(shape: Sequence[int]) -> bool:
    return len(shape) > 2 and shape[1] == 1


def frozen_reasons(coupling: Coupling) -> list[Frozen]:
    """Return why rows of the model cannot be pruned, most rows first.

    Example:
        >>> frozen_reasons(coupling)[0]
        Frozen(reason='model output', rows=4)
    """
    return [Frozen(reason, rows) for reason, rows in coupling.merged_reasons()]
