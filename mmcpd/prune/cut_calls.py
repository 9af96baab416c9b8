"""Find the cut's channels in a running forward: which calls of layers take them in or give them out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ..coupling import Role
from ..layer_calls import LayerCall, LayerKind, ParameterRows, storage
from .gates import Cut, Gates, never_prune


@dataclass(frozen=True)
class CutPlace:
    """Where one call of a layer shows rows `start` to `start + size` of a cut.

    Attributes:
        in_input: they are channels of what the call takes in, otherwise of what it gives out.
        channel: the dimension of the channels there, counted from the end; a grouped convolution shows each of the rows
            once in each of its groups.
    """

    cut: Cut
    start: int
    size: int
    in_input: bool
    channel: int


class CutCalls:
    """Recognise the calls of layers, and of norms, that read or make channels of a cut.

    A weight that was computed (standardised, parametrized) counts as the parameter of its shape that it came from.

    Attributes:
        seen: the tensors of the cut that calls have shown.
    """

    def __init__(self, gates: Gates, model: nn.Module) -> None:
        self.gates = gates
        self.seen: set[Cut] = set()
        self._biases: set[Cut] = set()  # of calls that gave out channels of the cut
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._storages = {storage(parameter) for parameter in model.parameters()}

    def places(self, call: LayerCall) -> Iterator[CutPlace]:
        """Yield where a call shows cuts, and note them as seen."""
        norm = call.kind is LayerKind.NORM
        rows = call.rows if norm else call.rows or self._source(call.weight)
        if rows is None or (norm and call.weight.dim() > 1):
            return
        for dim in (0, 1):
            cut = Cut(rows.tensor, dim)
            in_input = (dim == 0) == (call.kind is LayerKind.TRANSPOSED)
            # A transposed weight shows a dimension where its role says otherwise: nothing is known of such a call.
            if cut in self.gates.cuts and in_input == (self.gates.roles[cut] is Role.CONSUMER):
                self.seen.add(cut)
                if not in_input and call.bias_rows is not None:
                    self._biases.add(Cut(call.bias_rows.tensor, 0))
                start = rows.start if dim == 0 else 0
                yield CutPlace(cut, start, call.weight.shape[dim], in_input, call.channel)

    def offset(self, call: LayerCall) -> Tensor | None:
        """Return the part of a call's output that no gate multiplies: a bias that is no part of the cut."""
        if call.bias_rows is None or call.bias is None or Cut(call.bias_rows.tensor, 0) in self.gates.cuts:
            return None
        return call.bias.detach()

    def unseen(self) -> list[Cut]:
        """Return the tensors of the cut that no call has shown; a bias is seen with the weight of its call."""
        return [cut for cut in self.gates.cuts if cut not in self.seen | self._biases]

    def check(self, importance: str) -> None:
        """Refuse cuts that no call has shown.

        Raises:
            ValueError: with the tensor, its groups and what to do.
        """
        for cut in self.unseen():
            raise refusal(
                self.gates,
                cut,
                f"{importance} cannot score '{cut.tensor}': no linear layer and no convolution was called with rows of "
                'it (it is multiplied by another operation, or its layer did not run)',
            )

    def _source(self, weight: Tensor) -> ParameterRows | None:
        """Return the one parameter of the same shape that a weight was computed from, by autograd's graph."""
        if weight.grad_fn is None or storage(weight) in self._storages:
            return None
        found, nodes, visited = set(), [weight.grad_fn], {weight.grad_fn}
        while nodes:
            node = nodes.pop()
            leaf = getattr(node, 'variable', None)
            if leaf is not None and leaf.shape == weight.shape and leaf in self._names:
                found.add(self._names[leaf])
            nodes.extend(after for after, _ in node.next_functions if after is not None and after not in visited)
            visited.update(nodes)
        return ParameterRows(found.pop(), 0, len(weight)) if len(found) == 1 else None


def refusal(gates: Gates, cut: Cut, why: str) -> ValueError:
    """Return the error about a cut that cannot be scored sample by sample."""
    return ValueError(f"{why}: use importance='hessian', or {never_prune(gates.groups[cut])}")
