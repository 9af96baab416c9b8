"""Recurrent layers: hidden units go over all gates, and the first state that a forward makes is as wide as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mmcpd.comb import comb
from mmcpd.comb.rules.recurrent import fused_cell
from mmcpd.comb.trace import Call, Cursor, Policy, Run
from mmcpd.comb.unused import Ran
from mmcpd.coupling import KERNEL
from mmcpd.slim import mask_, slim
from tests.exact import exact
from tests.helpers import Net, members, randomise_, sample, strided

TOKENS = sample((2, 5, 3))
LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
OPTIONS = ({}, {'bidirectional': True}, {'num_layers': 2, 'batch_first': True}, {'bias': False}, {'dropout': 0.1})


def net(layer: nn.Module, width: int = 8) -> Net:
    return Net(lambda m, x: m.fc(m.rnn(m.a(x))[0].cos()), a=nn.Linear(3, 6), rnn=layer, fc=nn.Linear(width, 2))


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('options', OPTIONS, ids=lambda o: ' '.join(o))
def test_hidden_units_of_a_layer(kind, options):
    width = 16 if options.get('bidirectional') else 8
    model = net(kind(6, 8, **options), width)
    found = exact(model, TOKENS, {'a': 6, 'rnn': 8})
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    assert members(found, 'rnn')['rnn.weight_ih_l0:0'] == strided(8, gates)
    assert members(found, 'rnn')['rnn.weight_hh_l0:1'] == strided(8, 1)
    keep = found.keep()
    keep['rnn'][:3] = False
    keep['a'][1] = False
    small = slim(model, found, keep).rnn
    assert (small.hidden_size, small.input_size) == (5, 5)


def test_a_layer_is_seen_in_float32_as_well():
    # There it arrives as one kernel on a CPU, which a trial would not make right.
    assert {g.name: g.units for g in comb(net(nn.LSTM(6, 8)).eval(), TOKENS.float(), trial=False).groups} == {
        'a': 6,
        'rnn': 8,
    }


def test_a_removed_hidden_unit_is_zero_over_time():
    model = net(nn.LSTM(6, 8))
    found = exact(model, TOKENS, {'a': 6, 'rnn': 8})
    keep = found.keep()
    keep['rnn'][2] = False
    twin = copy.deepcopy(model)
    mask_(twin, found, keep)
    out, (last, cell) = twin.rnn(twin.a(TOKENS))
    assert float(out[..., 2].detach().abs().max()) == float(cell[..., 2].detach().abs().max()) == 0
    assert float(last[..., 3].detach().abs().min()) > 0


def test_the_projection_of_a_layer_stays_narrower_than_its_hidden_units():
    found = exact(net(nn.LSTM(6, 8, proj_size=4), 4), TOKENS, {'a': 6, 'rnn': 4})
    assert any('more hidden units than its projection' in reason for reason in found.reasons())


class Cells(nn.Module):
    """A loop over time by hand."""

    def __init__(self, kind: type[nn.Module], hidden: int = 8) -> None:
        super().__init__()
        self.hidden = hidden
        self.cell, self.fc = kind(3, hidden), nn.Linear(hidden, 2)

    def forward(self, x):
        state = x.new_zeros(x.shape[0], self.hidden)
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.fc(state[0] if isinstance(state, tuple) else state)


class Default(Cells):
    """A loop over time whose first state is the cell's own."""

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.fc(state[0] if isinstance(state, tuple) else state)


class ByHand(nn.Module):
    """Long short-term memory over a picture's rows: convolutions, four gates in one, states by `torch.zeros`."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.gates, self.head = nn.Conv2d(3 + width, 4 * width, 3, padding=1), nn.Conv2d(width, 2, 1)

    def forward(self, x):
        batch, frames, _, *size = x.shape
        h = c = torch.zeros(batch, self.width, *size, dtype=x.dtype)
        for t in range(frames):
            i, f, o, g = self.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


@pytest.mark.parametrize('kind', [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize('loop', [Cells, Default])
def test_cells(kind, loop):
    exact(loop(kind), TOKENS, {'cell': 8})


def test_a_recurrence_by_hand():
    exact(ByHand(), sample((2, 3, 3, 5, 5)), {'gates': 6})


def test_packed_sequences():
    def run(m, x):
        packed = pack_padded_sequence(m.a(x), torch.tensor([5, 3]), batch_first=True)
        return m.fc(pad_packed_sequence(m.rnn(packed)[0], batch_first=True)[0])

    layer = nn.GRU(6, 8, batch_first=True)
    exact(Net(run, a=nn.Linear(3, 6), rnn=layer, fc=nn.Linear(8, 2)), TOKENS, {'a': 6, 'rnn': 8})


def test_a_state_that_follows_another_layer():
    def run(m, x):
        first = m.b(x.mean(1))[None]
        return m.fc(m.rnn(m.a(x).transpose(0, 1), first)[0].cos())

    model = Net(run, a=nn.Linear(3, 6), b=nn.Linear(3, 8), rnn=nn.GRU(6, 8), fc=nn.Linear(8, 2))
    exact(model, TOKENS, {'b': 8, 'a': 6})


@pytest.mark.parametrize('gates', [4, 3])
def test_the_kernel_of_a_cell_ties_its_gates(gates):
    # It runs on other devices alone, so that the rule is called as the dispatcher would call it there.
    run = Run(Policy(), Cursor({}), Ran(nn.Module()))
    table = run.record.table
    shapes = {'input_gates': (2, 6 * gates), 'hidden_gates': (2, 6 * gates), 'cx' if gates == 4 else 'hx': (2, 6)}
    named = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, tensor in named.items():
        run.set(tensor, (None, table.add(name, tensor)[1]))
    out = (torch.zeros(2, 6), torch.zeros(2, 6)) if gates == 4 else (torch.zeros(2, 6),)
    fused_cell(run, Call('cell', None, (), {}, named, out))
    component, why = table.solve()
    units = {frozenset(component[run.axes(t)[1].atoms].tolist()) for t in out}
    assert len(units) == 1 and len(next(iter(units))) == 6
    rows = [r for r in table.rows if r.dim == 1]
    first = component[rows[2].start : rows[2].start + 6]
    for row in rows[:2]:
        assert (component[row.start : row.start + row.size].reshape(gates, 6) == first).all()
    assert (why < 0)[first].all()
    assert KERNEL not in table.reasons


def test_without_widths_of_their_own_states_would_freeze_the_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmcpd.comb.size_arguments.FACTORIES', {})
    assert not comb(randomise_(Cells(nn.GRUCell)), TOKENS, trial=False).groups
