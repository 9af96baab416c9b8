"""The one training loop of the accuracy tables: the same pictures, optimizer and schedule for every recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy_tasks import Task
from mmcpd.distill import KDLoss

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Learning:
    """What is minimised: `label_weight` times the label loss, and where `tau` is given the distillation's loss.

    The latter is tau^2 * KL(teacher || student) at temperature `tau`, at weight 1.
    """

    label_weight: float = 1.0
    tau: float | None = None

    @property
    def words(self) -> str:
        parts = ['labels'] if self.label_weight else []
        return ' and '.join([*parts, *([f'distillation (tau {self.tau:g})'] if self.tau else [])])


class InLoop(Protocol):
    """Something that prunes a model while it trains."""

    def step(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Count an iteration, with its gradients still there; return the optimizer to go on with."""

    def finish(self) -> nn.Module:
        """Return the small model."""


InLoopFactory = Callable[[nn.Module, torch.optim.Optimizer, int], InLoop]


def train(
    model: nn.Module,
    teacher: nn.Module,
    task: Task,
    iterations: int,
    rate: float,
    seed: int,
    learning: Learning,
    in_loop: InLoopFactory | None = None,
) -> nn.Module:
    """Train a model in place with a rate that falls as a cosine to 0, and return it, small and in eval mode.

    Forward passes are in bfloat16 (half of the time on a CPU that has it), losses and optimizer in float32.
    """
    device = next(model.parameters()).device
    with own_stream(device):
        optimizer = task.optimizer(model, rate)
        pruner = in_loop(model, optimizer, iterations) if in_loop else None
        model.train()
        step: Callable[[Tensor, Tensor], None] = Step(model, teacher, task, learning)
        if device.type == 'cuda':
            step = Recorded(model, step)
        for iteration, (images, labels) in zip(range(iterations), task.stream(seed), strict=False):
            for group in optimizer.param_groups:
                group['lr'] = rate * (1 + math.cos(math.pi * iteration / iterations)) / 2
            step(images.contiguous(memory_format=torch.channels_last), labels)  # 1.6 times as fast on a CPU
            optimizer.step()
            if pruner is not None:
                optimizer = pruner.step(optimizer)
        model = pruner.finish() if pruner else model
    return model.eval()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run on another stream than the default one of a GPU: only that can be recorded."""
    if device.type != 'cuda':
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()


class Step:
    """Leave the gradients of a batch's loss on the parameters of a model, and no others."""

    def __init__(self, model: nn.Module, teacher: nn.Module, task: Task, learning: Learning) -> None:
        self.model, self.teacher, self.task = model, teacher, task
        self.label_weight = learning.label_weight
        self.distillation = KDLoss(tau=learning.tau) if learning.tau else None

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.model.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16):
            outputs = self.model(images).float()
        loss = self.label_weight * self.task.losses(outputs, labels).mean() if self.label_weight else 0
        if self.distillation is not None:
            with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
                targets = self.teacher(images).float()
            loss = loss + self.distillation(outputs, targets)
        loss.backward()


class Recorded:
    """Replay a step as one CUDA graph, recorded anew where the model got other parameters or forwards.

    The hundreds of kernels of a small net take longer to launch one by one than to run. All gradients of the model are
    to be taken on the current stream, which is not the default one: CUDA records no other.
    """

    def __init__(self, model: nn.Module, step: Callable[[Tensor, Tensor], None]) -> None:
        self.model, self.step = model, step
        self.key: list[int] = []

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        parameters = list(self.model.parameters())
        forwards = [vars(module).get('forward') for module in self.model.modules()]  # masked ones are others
        key = [id(each) for each in (*parameters, *forwards)]
        if key != self.key:
            self._record(images.clone(), labels.clone())
            self.key, self.held, self.gradients = key, forwards, [p.grad for p in parameters]
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.grad = gradient  # others may have put theirs there

    def _record(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        before = [buffer.clone() for buffer in self.model.buffers()]
        for _ in range(3):  # libraries choose their kernels, and make room
            self.step(images, labels)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self.step(images, labels)
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)


@torch.no_grad()
def reestimate_(model: nn.Module, batches: list[Tensor]) -> None:
    """Replace the statistics of all batch norms by the averages over some batches, in place."""
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
    model.train()
    for images in batches:
        model(images)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def macs(model: nn.Module, example: Tensor) -> int:
    """Count the multiply-accumulates of a forward, by torch's counter for ours and the peer's models alike."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(example)
    for module, training in modes:
        module.training = training
    return counter.get_total_flops() // 2
