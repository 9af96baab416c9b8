"""What Torch-Pruning makes of a family of the zoo, as its high-level pruner is documented."""

from __future__ import annotations

import signal
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_checks import KEEP, Row, stage
from benchmarks.zoo_family import Deployed

PEER_SECONDS = 90


def sweep_peer(model: Deployed, inputs: tuple[Any, ...]) -> Row:
    """Prune 30 % with Torch-Pruning by magnitude, as its high-level pruner is documented, within `PEER_SECONDS`."""
    import torch_pruning

    def late(*_: Any) -> None:
        raise TimeoutError(f'no end within {PEER_SECONDS} s')

    signal.signal(signal.SIGALRM, late)
    signal.alarm(PEER_SECONDS)

    before = [t.shape for t in model(*inputs)]
    row: Row = {'params': sum(p.numel() for p in model.parameters()), 'graph': False, 'runs': False}
    with stage(row, 'graph'):
        pruner = torch_pruning.pruner.BasePruner(
            model,
            inputs,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=1 - KEEP,
            global_pruning=False,
            ignored_layers=classifiers(model, inputs),
        )
        row['graph'] = True
    if 'error' not in row:
        with stage(row, 'prune'):
            pruner.step()
    if 'error' not in row:
        with stage(row, 'forward'), torch.no_grad():
            after = [t.shape for t in model(*inputs)]
            row |= {'runs': True, 'shape': after == before}
    signal.alarm(0)
    row['removed'] = 1 - sum(p.numel() for p in model.parameters()) / row['params']
    return row


@torch.no_grad()
def classifiers(model: Deployed, inputs: tuple[Any, ...]) -> list[nn.Module]:
    """List the convolutions and linear layers that make the outputs: the last to run, and those in heads as wide."""
    ran: list[nn.Module] = []
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    handles = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in layers.values()]
    try:
        widths = {t.shape[min(1, t.dim() - 1)] for t in model(*inputs)}
    finally:
        for handle in handles:
            handle.remove()
    return [m for n, m in layers.items() if m is ran[-1] or ('head' in n and m.weight.shape[0] in widths)]
