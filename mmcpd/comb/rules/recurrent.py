"""Recurrent layers: those parts that arrive as one kernel; the others are products and point-wise operations."""

from __future__ import annotations

from torch import Tensor

from ..atoms import Axis
from ..trace import Call, Run


def fused_cell(run: Run, call: Call) -> None:
    # _thnn_fused_lstm_cell(input_gates, hidden_gates, cx, input_bias, hidden_bias): hy, cy, workspace
    # _thnn_fused_gru_cell(input_gates, hidden_gates, hx, input_bias, hidden_bias): hy, workspace
    # A hidden unit is a row of each gate. Without its gates i = f = o = 0.5 and g = 0, or z = 0.5 and n = 0: it is zero
    # as long as it was zero before.
    state: Tensor = call.named['cx' if 'cx' in call.named else 'hx']
    axes = run.axes(state)
    unit = axes[-1]
    for name in ('input_gates', 'hidden_gates', 'input_bias', 'hidden_bias'):
        gates = call.named.get(name)
        axis = None if gates is None else run.axes(gates)[-1]
        if axis is None or gates is None:
            continue
        pieces = axis.atoms.reshape(-1, state.shape[-1])
        run.tie(pieces.T)
        unit = _unit(run, unit, Axis(pieces.max(axis=0), axis.zero))
    if axes[-1] is None:
        run.freeze(unit, f'a state with channels that no layer produces in {run.where}')
    for out in call.outputs():
        if out.shape == state.shape:
            run.set(out, (*axes[:-1], unit and unit.activation(unit.zero)))


def _unit(run: Run, unit: Axis | None, own: Axis) -> Axis:
    if unit is None:
        return own
    run.equate(unit, own, 'a recurrent cell')
    return Axis(unit.atoms, unit.zero and own.zero)


def packed(run: Run, call: Call) -> None:
    # _pack_padded_sequence(input (T, B, ...) or (B, T, ...), lengths, batch_first): (positions, ...), batch sizes
    axes = run.axes(call.named['input'])
    run.freeze_each(axes[:2], 'a batch or a time dimension')
    run.set(call.out[0], (None, *axes[2:]))
