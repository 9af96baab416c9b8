"""Torch-Pruning in the accuracy tables: its importances, its global ranking and its dependency graph, as it ships.

It removes units in 400 small steps until no more than the target's MACs remain, as its own scripts do, and takes its
gradients anew after every 3 % of them. What it is lent is in `LENT`, and in the report.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning as tp
from mmpretrain.models.utils import MultiheadAttention
from torch import Tensor, nn

from benchmarks.accuracy_tasks import Batch, Task
from benchmarks.accuracy_train import InLoop, InLoopFactory, macs
from mmcpd.coupling import Coupling, Keep
from mmcpd.prune import Schedule
from mmcpd.slim.mask import named_tensors

STEPS = 400  # of 0.25 % of all channels each, as in its own script: the target is met within a point
SCORED_AGAIN = 0.03  # share of the MACs that goes between two scorings: 17 of them on the way to a half
HOW = (
    f'removes units in {STEPS} steps of its own until the target is met, with gradients of the label loss in eval mode '
    f'(Taylor: on as many pictures as our score, Hessian: 128) taken anew after each {SCORED_AGAIN:.0%} of the MACs'
)
LENT = (
    'batch norm re-estimated on 1,000 augmented training pictures before it is scored without training '
    '(without that it is at chance)',
    "in the ViT, an attention whose forward splits queries, keys and values as timm does (of mmpretrain's it takes the "
    'wrong rows, and stops with an IndexError), with its width per head written anew after each step',
)


class PeerError(RuntimeError):
    """Torch-Pruning cannot prune a model, or not to the target."""


@dataclass(frozen=True)
class Kind:
    """One of its importances, and how its gradients are taken: not at all, of the mean loss, or picture by picture."""

    build: Callable[[], Any]
    gradients: Callable[[nn.Module, Any, Task, Sequence[Batch]], None] | None = None
    pictures: int = 1000  # at most; one backward pass for each picture takes too long for as many


def mean_gradients(model: nn.Module, importance: Any, task: Task, batches: Sequence[Batch]) -> None:
    """Add up the gradients of the label loss over some batches, in eval mode."""
    model.zero_grad()
    for images, labels in batches:
        task.losses(model(images), labels).mean().backward()


def picture_gradients(model: nn.Module, importance: Any, task: Task, batches: Sequence[Batch]) -> None:
    """Let the importance see the gradients of each picture's label loss, in eval mode."""
    importance.zero_grad()
    for images, labels in batches:
        losses = task.losses(model(images), labels)
        for number, loss in enumerate(losses):
            model.zero_grad()
            loss.backward(retain_graph=number + 1 < len(losses))
            importance.accumulate_grad(model)


def fisher_of_layers(model: nn.Module, importance: Any, task: Task, batches: Sequence[Batch]) -> None:
    """Let the importance watch its layers while gradients of sampled labels pass, in eval mode, as its script does."""
    importance._clear_buffer()
    importance._prepare_model(model, importance.pruner)
    for images, _ in batches:
        model.zero_grad()
        outputs = model(images)
        sampled = outputs.detach().softmax(1).multinomial(1).squeeze(1)
        task.losses(outputs, sampled).mean().backward()
        importance.step()
    importance._rm_hooks(model)


KINDS = {
    'group L2': Kind(tp.importance.GroupMagnitudeImportance),
    'Taylor': Kind(tp.importance.GroupTaylorImportance, mean_gradients),
    'Hessian': Kind(tp.importance.GroupHessianImportance, picture_gradients, 128),
    'OBDC': Kind(lambda: tp.importance.OBDCImportance(num_classes=10), fisher_of_layers),
}


class Peer:
    """One model under its pruner, and a copy whose elements hold their own numbers and that is pruned alike."""

    def __init__(self, model: nn.Module, importance: Any, task: Task) -> None:
        self.model, self.task, self.example = model, task, task.example()
        self.dense_macs = macs(model, self.example)
        self.attentions = [m for m in model.modules() if isinstance(m, MultiheadAttention)]
        options = {
            'global_pruning': True,
            'pruning_ratio': 1.0,
            'iterative_steps': STEPS,
            'ignored_layers': [model.get_submodule(task.classifier)],
            'num_heads': {m.qkv: m.num_heads for m in self.attentions},
        }
        for attention in self.attentions:
            attention.forward = MethodType(split_attention, attention)
        training = model.training
        model.eval()
        self.pruner = tp.pruner.BasePruner(model, self.example, importance, **options, **_positions(model))
        model.train(training)
        importance.pruner = self.pruner  # one of its importances asks for it
        self.pictures = 0  # seen to choose
        self.numbered = numbered(model)
        self.graph = tp.DependencyGraph().build_dependency(
            self.numbered, self.example.double(), **_positions(self.numbered)
        )
        self.replayed = 0

    def shrink_(self, share: float, before_step: Callable[[float], None] | None = None) -> None:
        """Remove units until no more than a share of the dense model's MACs remains.

        Raises:
            PeerError: its steps are used up.
        """
        while (now := macs(self.model, self.example) / self.dense_macs) > share:
            if self.pruner.current_step >= STEPS:
                raise PeerError(f'Torch-Pruning used up its {STEPS} steps before {share:.0%} of the MACs were reached')
            if before_step is not None:
                before_step(now)
            self.pruner.step()
            for attention in self.attentions:
                attention.head_dims = attention.qkv.out_features // (3 * attention.num_heads)
        history = self.pruner.pruning_history()
        self.graph.load_pruning_history(history[self.replayed :])
        self.replayed = len(history)

    def numbers(self) -> dict[str, Tensor]:
        """Return, for each tensor of the model, the numbers of the kept elements in the dense one, int64."""
        return {name: tensor.detach().long() for name, tensor in named_tensors(self.numbered).items()}


def split_attention(self: MultiheadAttention, x: Tensor) -> Tensor:
    """Run mmpretrain's attention on tokens (B, N, C) in operations that Torch-Pruning follows."""
    batch, tokens, _ = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dims)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, C / heads) each
    x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
    return self.out_drop(self.gamma1(self.proj_drop(self.proj(x))))


def _positions(model: nn.Module) -> dict[str, Any]:
    """Name the position embedding to the peer, as it asks for parameters that no layer holds."""
    found = [p for name, p in model.named_parameters() if name.endswith('pos_embed')]
    return {'unwrapped_parameters': [(p, 2) for p in found]} if found else {}


def numbered(model: nn.Module) -> nn.Module:
    """Return a copy in float64 whose tensors hold the number of each element."""
    found = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in named_tensors(found).values():
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    return found


def prune_by_peer(task: Task, kind: str, share: float, seed: int) -> Peer:
    """Prune the dense model to a share of its MACs, before any training.

    Raises:
        PeerError: with what Torch-Pruning, or torch under it, says.
    """
    chosen = KINDS[kind]
    importance = chosen.build()
    batches = task.plain(min(chosen.pictures, task.score_pictures), seed) if chosen.gradients else []
    try:
        peer = Peer(task.dense(), importance, task)
        peer.pictures = sum(len(batch.labels) for batch in batches)

        scored_at = [2.0]

        def before_step(now: float) -> None:
            if chosen.gradients and now <= scored_at[-1] - SCORED_AGAIN:
                chosen.gradients(peer.model, importance, task, batches)
                scored_at.append(now)

        peer.shrink_(share, before_step)
    except Exception as error:
        raise PeerError(f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}') from error
    peer.model.zero_grad()
    return peer


def keep_of(coupling: Coupling, numbers: dict[str, Tensor]) -> Keep:
    """Say the peer's choice as a keep of our groups; `numbers` are those of `Peer.numbers`.

    Raises:
        PeerError: it took some rows of a unit and left others.
    """
    rows: dict[str, list[set[int]]] = {}
    for name, kept in numbers.items():
        if kept.dim():
            places = np.unravel_index(kept.numpy().ravel(), coupling.tensors[name].shape)
            rows[name] = [set(np.unique(place).tolist()) for place in places]
    keep = {}
    for group in coupling.groups:
        kept_rows = [
            torch.tensor([[int(row) in rows[m.tensor][m.dim] for row in unit] for unit in m.index])
            for m in group.members
            if m.tensor in rows
        ]
        all_rows = torch.cat(kept_rows, 1)  # (units, rows of all members)
        if not torch.equal(all_rows.all(1), all_rows.any(1)):
            raise PeerError(f'Torch-Pruning takes some rows of a unit of {group.name!r} and leaves others')
        keep[group.name] = all_rows.all(1)
    return keep


class PeerInLoop(InLoop):
    """Let Torch-Pruning's Taylor importance choose units at the events of our schedule, while the model trains."""

    def __init__(self, task: Task, share: float, model: nn.Module, iterations: int) -> None:
        self.task, self.iterations = task, 0
        self.schedule = Schedule({'macs': share}, interval=interval(iterations)).resolve(iterations)
        self.peer = Peer(model, KINDS['Taylor'].build(), task)
        self.sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def step(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Add gradients up over an interval; at its end remove units, and carry the momentum of the others on."""
        self.iterations += 1
        parameters = dict(self.peer.model.named_parameters())
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                self.sums[name] += parameter.grad
        if not self.schedule.due(self.iterations):
            return optimizer
        for name, parameter in parameters.items():
            parameter.grad = self.sums[name]
        before = self.peer.numbers()
        self.peer.shrink_(self.schedule.ratios(self.iterations)['macs'])
        after, fresh = self.peer.numbers(), self.task.optimizer(self.peer.model, optimizer.param_groups[0]['lr'])
        kept = dict(self.peer.model.named_parameters())
        for name, old in parameters.items():
            fresh.state[kept[name]] = {
                key: _carried(value, before[name], after[name]) if isinstance(value, Tensor) and value.dim() else value
                for key, value in optimizer.state[old].items()
            }
        self.sums = {name: torch.zeros_like(p) for name, p in kept.items()}
        return fresh

    def finish(self) -> nn.Module:
        return self.peer.model


def _carried(value: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return the elements of a state whose numbers are still there, in their new shape."""
    whole = value.new_zeros(int(before.max()) + 1)
    whole[before.flatten()] = value.flatten()
    return whole[after.flatten()].view(after.shape)


def peer_in_loop(task: Task, share: float) -> InLoopFactory:
    """Return what makes a `PeerInLoop` when training begins."""
    return lambda model, optimizer, iterations: PeerInLoop(task, share, model, iterations)


def interval(iterations: int) -> int:
    """Return the iterations between two removals: 24 events in a run, as with 10 in a run of 240 over 0.6 of it."""
    return max(1, iterations // 24)
