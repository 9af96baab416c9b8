"""Which groups a score says nothing of, because no gradient reached them: they keep their units."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..coupling import Coupling
from ..errors import PruneError
from ..names import in_short
from .importance import Importance
from .schedule import Schedule
from .selection import Floors, reachable


def reads_gradients(importance: Importance) -> bool:
    """Tell whether a score is made of the gradients that training computes.

    Example:
        >>> from mmcpd.prune import build_importance
        >>> reads_gradients(build_importance('hessian', coupling.groups))
        True
    """
    return importance.every_iteration and not importance.needs_outputs


def frozen_groups(importance: Importance, model: nn.Module) -> dict[str, str]:
    """Return the groups that a score cannot see now, because tensors of their cut need no gradient, and why.

    Example:
        >>> from mmcpd.prune import build_importance
        >>> _ = model.fc.weight.requires_grad_(False)
        >>> frozen_groups(build_importance('hessian', coupling.groups), model)
        {'conv2': 'requires_grad=False on fc.weight'}
    """
    found = importance.gates.frozen(model) if reads_gradients(importance) else {}
    return {group: f'requires_grad=False on {tensor}' for group, tensor in found.items()}


def unscored(importance: Importance, scores: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the groups of which no gradient said anything since the last event, and why.

    A branch that is detached, or dead behind a ReLU, or starts at zero, is no cheap one: nothing is known of it. A unit
    without a gradient among others that have one is, and goes.

    Example:
        >>> from mmcpd.prune import build_importance
        >>> unscored(build_importance('hessian', coupling.groups), {'conv1': torch.zeros(8), 'conv2': torch.ones(4)})
        {'conv1': 'no gradient arrived'}
    """
    if not importance.every_iteration:  # of the weights themselves
        return {}
    why = 'no gradient arrived' if reads_gradients(importance) else 'no output depends on it'
    silent = [name for name, score in scores.items() if not bool(score.any())]
    frozen = dict.fromkeys(sorted(importance.gates.left_alone), 'requires_grad=False')
    return dict.fromkeys(silent, why) | frozen


def check_gradients(coupling: Coupling, schedule: Schedule, left_alone: Mapping[str, str], floors: Floors) -> None:
    """Refuse a target that cannot be met without the groups that get no gradient, which are `left_alone`.

    Raises:
        PruneError: with what remains reachable, and the ways out.

    Example:
        >>> schedule = Schedule(target=dict(macs=0.5), end=10)
        >>> check_gradients(coupling, schedule, {}, {'min_units': 1, 'round_to': 8})
    """
    lowest = reachable(coupling, **floors, fixed=left_alone)
    for quantity, target in schedule.target.items():
        if left_alone and lowest[quantity] > target:
            why = next(iter(left_alone.values()))
            raise PruneError(
                f'{quantity} cannot go down to {target:.4f} of the dense model, only to {lowest[quantity]:.4f}: the '
                f'groups {in_short(left_alone)} get no gradient ({why}: frozen_stages, or a frozen trunk). Raise the '
                "target, train these layers from the start, or choose without their gradients: importance='magnitude' "
                "or 'gauss_newton', or at_once=True of PruneHook"
            )
