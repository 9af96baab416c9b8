"""The examples in docstrings run, and show what they say."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import mmpretrain.datasets  # noqa: F401 - it says at its first import that OneDL's hub is not there
import mmseg.datasets  # noqa: F401
import pytest
import torch
from torch import nn

import mmcpd
import mmcpd.comb
import mmcpd.distill
import mmcpd.prune
import mmcpd.refit
import mmcpd.rotate
import mmcpd.slim
from mmcpd.comb import comb
from mmcpd.slim import mask_, restructure_, slim, structure

ROOT = Path(__file__).resolve().parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SKIPPED = ('mmcpd.__main__',)
MODULES = [
    name for _, name, _ in pkgutil.walk_packages(mmcpd.__path__, 'mmcpd.') if name not in SKIPPED and '.mim' not in name
]


class Small(nn.Module):
    """Two convolutions and a classifier: conv1 has 8 units, conv2 has 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Small()


def namespace() -> dict[str, object]:
    """Return the names that every example may use."""
    model, images = build(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    coupling = comb(model, images)
    keep = coupling.keep()
    keep['conv1'][::2] = False
    return {
        'torch': torch, 'nn': nn, 'copy': copy, 'build': build, 'model': model, 'images': images,
        'comb': comb, 'coupling': coupling, 'keep': keep, 'mask_': mask_, 'slim': slim, 'structure': structure,
        'restructure_': restructure_, 'small': slim(model, coupling, keep),
        'optimizer': torch.optim.SGD(model.parameters(), lr=0.01),
    }  # fmt: skip


def run(test: doctest.DocTest) -> str:
    """Run one docstring's examples; return what went wrong."""
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    return ''.join(said)


@pytest.mark.parametrize('name', MODULES)
def test_examples_of_a_module(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    if hasattr(module, 'print_log'):  # it prints only where no test before made a logger
        monkeypatch.setattr(module, 'print_log', lambda *_, **__: None)
    for part in ('configs', 'tools'):
        (tmp_path / part).symlink_to(ROOT / part)
    faults = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        if test.examples:
            test.globs.update(vars(module))
            test.globs.update(namespace())
            faults.append(run(test))
    assert not ''.join(faults)


# What a function returns is shown where that function is.
RESULTS = (
    'Absorbed',
    'SkippedLayer',
    'RefitReport',
    'Refitted',
    'RefittedLayer',
    'HeadKind',
    'SkippedHeads',
    'Rotated',
    'Rotations',
)
PUBLIC = [
    (package.__name__, name)
    for package in (mmcpd.comb, mmcpd.slim, mmcpd.prune, mmcpd.rotate, mmcpd.refit, mmcpd.distill)
    for name in package.__all__
    if callable(getattr(package, name)) and name not in RESULTS
]


@pytest.mark.parametrize(('package', 'name'), PUBLIC)
def test_what_is_public_has_an_example(package, name):
    found = getattr(importlib.import_module(package), name)
    text = inspect.getdoc(found) or ''
    assert '>>>' in text, f'{package}.{name} has no example'
