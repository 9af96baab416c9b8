"""Whether a slim model is exact where it was not combed: other inputs, another keep, training, another process."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_checks import MARK, ROOT, Row, Slimmed, called, gap, slimmed, stage
from benchmarks.zoo_family import Family
from mmcpd.comb import comb
from mmcpd.errors import first_line
from mmcpd.example import Example
from mmcpd.modes import InDouble, as_trained
from mmcpd.nested import map_tensors, tensors_in
from mmcpd.slim import restructure_, structure
from mmcpd.slim.compare import compare_gradients, evaluating
from mmcpd.slim.trial import FAILURES, random_keep

SECOND_KEEP = 0.45
SAVED = ('reload', 'pickle')
USES = ('batch', 'size', 'keep', 'training', *SAVED)


class NotRun(Exception):
    """Say why a use cannot be compared: the dense model does not run in it."""


def sweep_uses(family: Family, done: Slimmed, seed: int) -> Row:
    """Compare in every use; each has the gap, that of its control, or why there is none."""
    row: Row = {}
    with use(row, 'batch') as result, torch.no_grad():
        result |= elsewhere(done, family.inputs(batch=2 * family.batch, seed=seed + 1)).gaps()
    with use(row, 'size') as result, torch.no_grad():
        result |= other_size(family, done, seed).gaps()
    with use(row, 'keep') as result, torch.no_grad():
        keep = random_keep(done.coupling, SECOND_KEEP, seed + 1, awkward=True)
        result |= slimmed(done.model, done.coupling, keep).gaps()
    with use(row, 'training') as result:
        result |= in_training(done)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for how in SAVED:
            with use(row, how):
                files.append(write(family, done, how, Path(folder) / how))
        for how, result in reopened(family, files).items():
            row[how] |= result
    return row


@contextmanager
def use(row: Row, name: str) -> Iterator[Row]:
    """Fill in what one use shows, or why it does not run."""
    row[name] = {}
    with stage(row[name], name):
        try:
            yield row[name]
        except NotRun as error:
            row[name]['not_run'] = str(error)[:200]


def elsewhere(done: Slimmed, inputs: tuple[Any, ...], run: Callable[..., object] | None = None) -> Slimmed:
    """Return the models with other inputs, or with another way to run them.

    Raises:
        NotRun: the dense model does not run like that.
    """
    like = tensors_in(done.coupling.example.inputs)[0]
    moved = map_tensors(inputs, lambda t: t.to(like.dtype) if t.is_floating_point() else t)
    example = Example(moved, done.coupling.example.forward if run is None else as_combed(done, run))
    try:
        with evaluating(done.model):
            example.run(copy.deepcopy(done.model))
    except FAILURES as error:
        if 'allocate memory' in str(error):
            raise
        raise NotRun(f'{type(error).__name__}: {first_line(error)}') from error
    return done.on(example)


def as_combed(done: Slimmed, run: Callable[..., object]) -> Callable[..., object]:
    """Return another forward, in float64 if that of the models is."""
    return InDouble(run) if isinstance(done.coupling.example.forward, InDouble) else run


def other_size(family: Family, done: Slimmed, seed: int) -> Slimmed:
    """Return the models with the first other size that the dense one takes."""
    why = ''
    for size in family.other_sizes():
        try:
            return elsewhere(done, family.inputs(size=size, seed=seed + 1))
        except NotRun as error:
            why = str(error)
    raise NotRun(why)


# -- training ----------------------------------------------------------------------------------------------------------
def trained(model: nn.Module, *inputs: Any) -> Any:
    """Run a model as in training, but without dropout and with the norms' own statistics."""
    with as_trained(model):
        return model(*inputs)


class Louder:
    """Run a model as in training; each run gives out 1 % more than the one before."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, model: nn.Module, *inputs: Any) -> Any:
        self.runs += 1
        factor = 1.01**self.runs
        return map_tensors(trained(model, *inputs), lambda t: t * factor if t.is_floating_point() else t)


def in_training(done: Slimmed) -> Row:
    """Compare outputs and gradients in training; combed with this pass too where it computes anything else."""
    example = done.coupling.example
    run = elsewhere(done, example.inputs, trained)
    with evaluating(done.model):
        same = gap(example.run(copy.deepcopy(done.model)), run.coupling.example.run(copy.deepcopy(done.model))) == 0
    if not same:
        found = comb(done.model, example.inputs, forward=example.forward, also=(as_combed(done, trained),))
        again = slimmed(done.model, found, random_keep(found, SECOND_KEEP, 2))
        run = again.on(run.coupling.example)
    row: Row = {'combed_again': not same}
    with torch.no_grad():
        row |= run.gaps()
    gc.collect()
    row['gradient_gap'] = compare_gradients(run.model, run.coupling, run.keep)
    gc.collect()
    louder = run.on(replace(run.coupling.example, forward=as_combed(done, Louder())))
    row['gradient_control'] = compare_gradients(louder.model, louder.coupling, louder.keep)
    return row


# -- another process ---------------------------------------------------------------------------------------------------
def reopened(family: Family, files: Sequence[Path]) -> Row:
    """Open saved models in a fresh process and compare what they give out there: a result, or an error, for each."""
    script = str(ROOT / 'benchmarks' / 'zoo.py')
    command = [sys.executable, script, '--reopen', family.key, *(f'--file={file}' for file in files)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    lines = [json.loads(line.removeprefix(MARK)) for line in ran.stdout.splitlines() if line.startswith(MARK)]
    found = {how: result for line in lines for how, result in line.items() if how in SAVED}
    why = (ran.stderr.strip().splitlines() or ['no message'])[-1][:400]
    return {file.name: found.get(file.name, {'error': f'{file.name}: the process died: {why}'}) for file in files}


@torch.no_grad()
def write(family: Family, done: Slimmed, how: str, file: Path) -> Path:
    """Save a slim model, whole (`pickle`) or as structure and values (`reload`), with what it gives out.

    Returns:
        The file, whose name says how.

    Raises:
        NotRun: the dense model cannot be saved so either.
    """
    example = done.coupling.example
    small, turned = copy.deepcopy(done.small), copy.deepcopy(done.turned)
    with evaluating(small), evaluating(turned):
        expected, control = tensors_in(example.run(small)), tensors_in(example.run(turned))
    saved: Row = {
        'inputs': example.inputs,
        'expected': expected,
        'control': control,
        'dtype': tensors_in(example.inputs)[0].dtype,
    }
    if how == 'reload':
        dense = family.net().to(saved['dtype'])
        saved |= {'plan': json.loads(json.dumps(structure(dense, done.small))), 'state': done.small.state_dict()}
    else:
        try:
            torch.save(done.model, file)
        except Exception as error:
            raise NotRun(f'the dense model neither: {first_line(error)}') from error
        saved['model'] = done.small
    torch.save(saved, file)
    return file


@torch.no_grad()
def reopen(family: Family, files: Sequence[Path]) -> None:
    """Open what another process saved, and print how far its outputs are from those that the slim model had there."""
    torch.set_num_threads(1)
    family.prepare()
    for file in files:
        result: Row = {}
        with stage(result, file.name):
            saved = torch.load(file, weights_only=False)
            model = saved['model'] if file.name == 'pickle' else rebuilt(family, saved)
            with evaluating(model):
                forward = InDouble(called) if saved['dtype'] == torch.float64 else called
                found = tensors_in(Example(saved['inputs'], forward).run(model))
            result |= {'gap': gap(saved['expected'], found), 'control': gap(saved['control'], found)}
        print(MARK + json.dumps({file.name: result}))


def rebuilt(family: Family, saved: Row) -> nn.Module:
    """Build the dense model anew, and give it the structure and the values of the slim one.

    Raises:
        RuntimeError: other keys are missing than the dense model misses in its own state dict.
    """
    dense = family.net().to(saved['dtype'])
    recomputed = dense.load_state_dict(dense.state_dict(), strict=False)  # some drop buffers that they compute
    model = restructure_(dense, saved['plan'])
    loaded = model.load_state_dict(saved['state'], strict=False)
    if loaded != recomputed:
        raise RuntimeError(f'missing and unexpected keys: {loaded}, of the dense model: {recomputed}')
    return model
