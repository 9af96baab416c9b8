"""Slim models whose source was rewritten: copied, pickled, traced, read by another process."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.errors import SlimError
from mmcpd.slim import restructure_, slim, structure
from mmcpd.slim.call_sites import rewrites_of
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep

from .rewritten_nets import NETS

EXACT = 1e-12
ROOT = Path(__file__).resolve().parents[2]


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def traced(model: nn.Module) -> torch.fx.GraphModule:
    graph = torch.fx.symbolic_trace(model)
    for node in graph.graph.nodes:
        node.type = None  # torch 2.4 pickles no annotation that is a text
    graph.recompile()
    return graph


COPIES: dict[str, Callable[[Any], nn.Module]] = {
    'deepcopy': copy.deepcopy,
    'pickle': lambda model: pickle.loads(pickle.dumps(model)),
    'an old pickle': lambda model: pickle.loads(pickle.dumps(model, 2)),
    'torch.save': saved,
    'twice': lambda model: copy.deepcopy(saved(copy.deepcopy(model))),
}
WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    'itself': lambda model: model,
    'a graph': traced,
    'a graph inside': lambda model: Holder(traced(model)),
}


def small_of(name: str, wrap: str = 'itself') -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model, x = NETS[name]()
    model = WRAPS[wrap](model)
    coupling = comb(model, x)
    assert len(coupling.groups) > 1, str(coupling)
    keep = random_keep(coupling, 0.5, 0, awkward=True)
    small = slim(model, coupling, keep)
    assert compare(model, coupling, keep, small) < EXACT
    assert any(map(rewrites_of, small.modules()))
    return small, x


@pytest.mark.parametrize('wrap', WRAPS)
@pytest.mark.parametrize('name', NETS)
def test_copies_compute_what_the_slim_model_computes(name: str, wrap: str) -> None:
    small, x = small_of(name, wrap)
    expected, classes = small(x), [type(module) for module in small.modules()]
    for how, copied in COPIES.items():
        twin = copied(small)
        assert torch.equal(twin(x), expected), how
        assert [rewrites_of(m) for m in twin.modules()] == [rewrites_of(m) for m in small.modules()], how
        with torch.no_grad():
            next(twin.parameters()).mul_(3)  # it is one of its own
        assert not torch.equal(twin(x), expected), how
    assert [type(module) for module in small.modules()] == classes and torch.equal(small(x), expected)


@pytest.mark.parametrize('wrap', WRAPS)
@pytest.mark.parametrize('name', NETS)
def test_a_graph_of_a_slim_model_has_its_sizes(name: str, wrap: str) -> None:
    small, x = small_of(name, wrap)
    graph = traced(small)
    expected = small(x)
    for twin in (graph, copy.deepcopy(graph), saved(graph), traced(copy.deepcopy(small))):
        assert torch.equal(twin(x), expected)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    assert torch.equal(graph(x), expected)


def test_without_the_rewrite_the_sizes_are_wrong() -> None:
    small, x = small_of('written')
    small.__class__ = type(small).__bases__[0]
    with pytest.raises(RuntimeError):
        small(x)


def test_a_graph_whose_source_was_changed_cannot_be_compiled_anew() -> None:
    small, x = small_of('transformer', 'a graph')
    with pytest.raises(SlimError, match='trace it anew'):
        small.recompile()
    assert torch.isfinite(small(x)).all()


def test_a_copy_can_be_slimmed_further_and_described() -> None:
    small, x = small_of('transformer')
    twin = saved(small)
    coupling = comb(twin, x)
    keep = random_keep(coupling, 0.7, 1)
    smaller = slim(twin, coupling, keep)
    assert compare(twin, coupling, keep, smaller) < EXACT
    fresh = restructure_(NETS['transformer']()[0], structure(NETS['transformer']()[0], copy.deepcopy(smaller)))
    fresh.load_state_dict(smaller.state_dict())
    assert torch.equal(fresh(x), smaller(x))


READ = """
import sys, torch
{before}
model, x, expected = torch.load('slim.pt', weights_only=False)
assert torch.equal(model(x), expected)
"""


def in_a_new_process(folder: Path, before: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-c', READ.format(before=before)], cwd=folder, capture_output=True, text=True,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip


@pytest.mark.parametrize('wrap', ['itself', 'a graph inside'])
def test_another_process_reads_it_where_mmcpd_is_installed(tmp_path: Path, wrap: str) -> None:
    small, x = small_of('transformer', wrap)
    torch.save((small, x, small(x).detach()), tmp_path / 'slim.pt')
    done = in_a_new_process(tmp_path, '')
    assert done.returncode == 0, done.stderr
    done = in_a_new_process(tmp_path, "sys.modules['mmcpd'] = None")
    assert done.returncode == 1 and 'mmcpd' in done.stderr.strip().splitlines()[-1]
