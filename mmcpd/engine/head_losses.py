"""Ask the loss modules of a head whether they take a softmax or sigmoids, where no labelled batch is at hand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmcpd.distill.observe import Compared, reads
from mmcpd.random_state import seeded


def read_by_losses(head: nn.Module, classes: int) -> Compared:
    """Tell whether the loss modules of a head take a softmax or sigmoids, by calling each on made-up logits.

    Its loss modules are its children with 'loss' or 'criterion' in their names. One that takes none of the usual
    logits and labels says nothing.

    Example:
        >>> head = nn.ModuleDict({'loss_module': nn.CrossEntropyLoss()})
        >>> read_by_losses(head, 5).softmax
        True
    """
    found = [_reads(loss, classes) for loss in _loss_modules(head)]
    return Compared((), any(each.softmax for each in found), any(each.sigmoid for each in found))


def read_near(model: nn.Module, path: str, classes: int) -> Compared:
    """Tell what the losses of the nearest module around `path` that has any take of its logits (see `read_by_losses`).

    Example:
        >>> net = nn.ModuleDict({'fc': nn.Linear(3, 5), 'loss_cls': nn.BCEWithLogitsLoss()})
        >>> read_near(net, 'fc', 5).sigmoid
        True
    """
    owner = model.get_submodule(path)
    if not path or any(True for _ in _loss_modules(owner)):
        return read_by_losses(owner, classes)
    return read_near(model, path.rpartition('.')[0], classes)


def _loss_modules(head: nn.Module) -> Iterator[nn.Module]:
    for name, child in head.named_children():
        if 'loss' in name or 'criterion' in name:
            yield from child if isinstance(child, nn.ModuleList) else [child]


def _reads(loss: nn.Module, classes: int) -> Compared:
    for logits, labels in _made_up(classes):
        with torch.enable_grad(), seeded(0):
            try:
                value = loss(logits.requires_grad_(), labels)
            except Exception:  # noqa: BLE001 - a loss of anyone, given labels that may not be its kind
                continue
        if isinstance(value, Tensor) and value.grad_fn is not None:
            return reads(value)
    return Compared(())


def _made_up(classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits and labels as losses take them: of pictures, of pictures with several labels, of pixels."""
    yield torch.zeros(2, classes), torch.zeros(2, dtype=torch.long)
    yield torch.zeros(2, classes), torch.zeros(2, classes)
    yield torch.zeros(2, classes, 2, 2), torch.zeros(2, 2, 2, dtype=torch.long)
    yield torch.zeros(2, classes, 2, 2), torch.zeros(2, classes, 2, 2)
