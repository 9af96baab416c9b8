"""What the tests of combing, masking and slimming share: toy nets, and the checks that everything leans on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmcpd.compat import installed, release
from mmcpd.coupling import Coupling, Group, Keep
from mmcpd.nested import tensors_in
from mmcpd.slim import mask_, restructure_, slim, structure
from mmcpd.slim.compare import evaluating
from mmcpd.slim.copying import copied
from mmcpd.slim.trial import random_keep

aten = torch.ops.aten
TORCH_2_5, TORCH_2_10 = (release(torch.__version__) >= least for least in ((2, 5), (2, 10)))
not_beside_lite = pytest.mark.skipif(installed(('mmcv-lite',)) is not None, reason='mmseg imports mmcv.ops by itself')
EXACT = 1e-9  # float64, relative
CONTROL = 1e-5  # what a wrong index must exceed
DETECTORS = ('detr_', 'fcos_', 'retinanet_', 'rtmdet_')
SDPA = '_scaled_dot_product_flash_attention_for_cpu'
PRODUCTS = {'convolution', 'addmm', 'mm', 'bmm', 'baddbmm', 'linear', 'mv', 'dot', SDPA}


def config_params(names: Iterable[str]) -> list[Any]:
    """Return names of configs as parameters of a test; those of detectors are skipped where mmdet is not installed."""
    missing = pytest.mark.skipif(find_spec('mmdet') is None, reason='mmdet is not installed: pip install .[detection]')
    return [pytest.param(name, marks=missing) if name.startswith(DETECTORS) else name for name in names]


class Net(nn.Module):
    """A net in one line: `Net(lambda m, x: m.fc(m.conv(x).mean((2, 3))), conv=..., fc=...)`."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make the model float64 and every value matter: no zero bias, no unit variance, no equal scales."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        if 'var' in name:
            tensor.copy_(noise + 0.5)
        elif tensor.dim() > 1:
            tensor.copy_((noise - 0.5) * (12 / max(1, tensor[:1].numel())) ** 0.5)
        else:
            tensor.copy_(noise + 0.3)
    return model.eval()


def call(coupling: Coupling, model: nn.Module) -> Any:
    """Run a model as it was combed: eval mode, no gradients."""
    with evaluating(model):
        return coupling.example.run(model)


def masked(model: nn.Module, coupling: Coupling, keep: Keep) -> nn.Module:
    twin = copied(model)
    mask_(twin, coupling, keep)
    return twin


def gap(left: Any, right: Any) -> float:
    """Return the largest relative difference, NaN counted as infinite."""
    worst = 0.0
    ours, theirs = tensors_in(left), tensors_in(right)
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    assert ours
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach(), b.detach()
        if a.is_floating_point():
            assert bool(torch.isfinite(a).all()), 'the reference is not finite, so nothing is compared'
            worst = max(worst, float((a - b).abs().max() / a.abs().max()))
            worst = float('inf') if not bool(torch.isfinite(b).all()) else worst
    return worst


def rotated(coupling: Coupling, name: str, keep: Keep) -> Keep:
    """Rotate the keep of one group by one unit."""
    return {**keep, name: keep[name].roll(1)}


def misplaced(coupling: Coupling, group: Group) -> Coupling | None:
    """Rotate the rows of one consumer against those of the producer, as a wrong offset would; None without one."""
    reader = next((m for m in group.members if m.role == 'in'), None)
    if reader is None:
        return None
    wrong = replace(reader, index=reader.index.roll(1, 0))
    changed = replace(group, members=tuple(wrong if m is reader else m for m in group.members))
    return replace(coupling, groups=tuple(changed if g is group else g for g in coupling.groups))


def check_equal(model: nn.Module, coupling: Coupling, seeds: tuple[int, ...] = (0, 1), ratio: float = 0.6) -> nn.Module:
    """Check masked == slimmed for random keeps, with the controls that must fail; return the last slim model."""
    dense = call(coupling, model)
    assert gap(dense, call(coupling, slim(model, coupling, coupling.keep()))) <= 1e-12
    for seed in seeds:
        keep = random_keep(coupling, ratio, seed)
        small = slim(model, coupling, keep)
        out = call(coupling, masked(model, coupling, keep))
        assert gap(out, call(coupling, small)) <= EXACT
        assert gap(dense, out) > CONTROL, 'masking changed nothing'
        assert gap(dense, call(coupling, model)) == 0, 'masking a copy or slimming touched the model'
        for group in coupling.groups:
            other = rotated(coupling, group.name, keep)
            if bool((other[group.name] != keep[group.name]).any()):
                wrong = call(coupling, masked(model, coupling, other))
                assert gap(wrong, call(coupling, small)) > CONTROL, f'a rotated keep of {group.name} goes unnoticed'
                other_coupling = misplaced(coupling, group)
                if other_coupling is not None:
                    wrong = call(coupling, masked(model, other_coupling, keep))
                    assert gap(wrong, call(coupling, small)) > CONTROL, (
                        f'a rotated index of {group.name} goes unnoticed'
                    )
    return small


class Elements(TorchDispatchMode):
    """Count the elements that products put out in what a model really runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.split('::')[-1] in PRODUCTS:
            self.count += (out[0] if isinstance(out, tuple) else out).numel()
        return out


def vector_flops(left: torch.Size, right: torch.Size, **_: Any) -> int:
    return 2 * left.numel()


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


# What torch's counter misses, or misses in some releases: vectors, attention on the CPU.
FLOPS = {aten.mv: vector_flops, aten.dot: vector_flops, getattr(aten, SDPA): attention_flops}


def count(coupling: Coupling, model: nn.Module) -> tuple[int, int, int]:
    """Return (MACs, parameters, bytes in float32) of one forward pass as it happens."""
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as flops, Elements() as elements:
        call(coupling, model)
    macs, odd = divmod(flops.get_total_flops(), 2)
    assert not odd
    return macs, sum(p.numel() for p in model.parameters()), 4 * elements.count


def check_cost(model: nn.Module, coupling: Coupling, seeds: tuple[int, ...] = (0,), ratio: float = 0.6) -> None:
    """Check the closed formula against a count on the really slimmed model, exactly."""
    for keep in (coupling.keep(), *(random_keep(coupling, ratio, seed) for seed in seeds)):
        cost = coupling.cost(keep)
        assert (cost.macs, cost.params, cost.memory) == count(coupling, slim(model, coupling, keep))
    dense = coupling.cost(coupling.keep())
    assert cost.params < dense.params


def check_structure(
    model: nn.Module, coupling: Coupling, small: nn.Module, build: Callable[[], nn.Module]
) -> nn.Module:
    """Check that a fresh model, the structure as JSON text and the weights give the slim model back."""
    plan = json.loads(json.dumps(structure(model, small)))
    twin = restructure_(build().double(), plan)
    twin.load_state_dict(small.state_dict(), strict=True)
    assert gap(call(coupling, small), call(coupling, twin)) == 0
    assert [type(m).__name__ for m in twin.modules()] == [type(m).__name__ for m in small.modules()]
    assert str(twin) == str(small)
    return twin


def members(coupling: Coupling, name: str) -> dict[str, list[list[int]]]:
    """Return `{'tensor:dim': rows per unit}` of one group."""
    return {f'{m.tensor}:{m.dim}': m.index.tolist() for m in coupling.group(name).members}


def rows(units: int, k: int = 1, start: int = 0) -> list[list[int]]:
    """Return consecutive rows: unit i has `start + i * k ...`."""
    return (start + torch.arange(units * k).reshape(units, k)).tolist()


def strided(units: int, k: int, start: int = 0) -> list[list[int]]:
    """Return interleaved rows: unit i has `start + i, start + i + units, ...`."""
    return (start + torch.arange(units * k).reshape(k, units).T).tolist()


def sample(shape: tuple[int, ...]) -> Tensor:
    """Return a reproducible float64 input."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.3


def on_two_processes(work: Callable[..., None], folder: Path, *args: Any) -> None:
    """Call `work(rank, folder, *args)` on two processes in one gloo group; `work` stands at its module's top.

    They come from a fork server because its children end without Python's finalisation. A script of its own would
    sometimes abort there, after its work is done: one of gloo's threads asks for the interpreter to free a tensor, and
    a `DistributedDataParallel` keeps those threads alive even when the group is destroyed (seen with PyTorch 2.14).
    """
    start_processes(_join, (work, folder, args), nprocs=2, start_method='forkserver')


def _join(rank: int, work: Callable[..., None], folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    work(rank, folder, *args)


def without_old_warning(said: str) -> str:
    """Take the one warning out that MMEngine 0.10.0 gives when it is imported with torch 2.4."""
    return re.sub(
        r'\S+zero_optimizer\.py:\d+: DeprecationWarning: .*\n  from torch\.distributed\.optim import .*\n', '', said
    )
