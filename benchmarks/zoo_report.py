"""The verdict on each family of the zoo, and the table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.zoo_checks import ONNX_TOLERANCE, Row
from benchmarks.zoo_models import FAMILIES
from benchmarks.zoo_uses import USES

TOLERANCE = {'float64': 1e-9, 'float32': 1e-4}
ROTATED_TOLERANCE = {'float64': 1e-10, 'float32': 1e-4}
GRADIENT_FACTOR = 10  # how much further than outputs gradients may be, as in a trial
GOAL = 0.95


def verdict(row: Row) -> str:
    """Say in one word or line what became of a family: `pass`, or what failed; `WRONG` is what nothing had reported."""
    ours, onnx = row.get('ours', {}), row.get('onnx', {})
    if 'error' in row.get('build', {}):
        return row['build']['error']
    if 'error' in ours:
        return ours['error']
    if not ours:
        return row.get('died', 'no result')
    if (fault := rotation_fault(row.get('rotate', {}))) is not None:
        return fault
    if not ours['groups']:
        return 'nothing can be pruned'
    if ours['error_masked_slim'] > tolerance(row):
        return f'WRONG: masked and slimmed differ by {ours["error_masked_slim"]:.1e}'
    if ours['error_control'] <= 100 * tolerance(row):
        return f'the control does not differ ({ours["error_control"]:.1e})'
    if ours['params_slim'] != ours['params_cost']:
        return f'WRONG: cost has {ours["params_cost"]} parameters, the slim model {ours["params_slim"]}'
    if ours['macs_slim'] != ours['macs_cost']:
        return f'WRONG: cost has {ours["macs_cost"]} MACs, the slim model {ours["macs_slim"]}'
    if (fault := uses_fault(row.get('uses', {}), tolerance(row))) is not None:
        return fault
    if not onnx:
        return row.get('died', 'no ONNX result')
    if 'error' in onnx:
        return f'ONNX: {onnx["error"]}' if not onnx['dense_error'] else 'pass (dense does not export either)'
    if onnx['error_parity'] > ONNX_TOLERANCE:
        dense = onnx['dense_parity'] or 0.0
        if dense > ONNX_TOLERANCE:
            return f'pass (in ONNX the dense model differs too, by {dense:.0e})'
        return f'ONNX differs by {onnx["error_parity"]:.1e}'
    return 'pass'


def rotation_fault(rotate: Row) -> str | None:
    """Say what went wrong in rotating, if anything."""
    if not rotate:
        return 'not rotated; --rotate does'
    if 'error' in rotate:
        return rotate['error']
    most = ROTATED_TOLERANCE[rotate['dtype']]
    if rotate['gap'] > most:
        return f'WRONG: rotated, the outputs differ by {rotate["gap"]:.1e}'
    if rotate.get('gap_control', 1.0) <= most:
        return f'the control of rotating does not differ ({rotate["gap_control"]:.1e})'
    return None


def uses_fault(uses: Row, most: float) -> str | None:
    """Say which use went wrong, if any; where the dense model does not run, there is none."""
    for name in USES:
        use = uses.get(name, {'error': f'{name}: not tried'})
        if 'error' in use:
            return use['error']
        if 'not_run' in use:
            continue
        if use['gap'] > most:
            return f'WRONG: {name}: masked and slimmed differ by {use["gap"]:.1e}'
        if use.get('gradient_gap', 0.0) > GRADIENT_FACTOR * most:
            return f'WRONG: {name}: gradients differ by {use["gradient_gap"]:.1e}'
        if min(use['control'], use.get('gradient_control', 1.0)) <= 100 * most:
            return f'the control of {name} does not differ ({use["control"]:.1e})'
    return None


def passed(row: Row) -> bool:
    return row['verdict'].startswith('pass')


def complete(row: Row) -> bool:
    """Say whether a row has all columns: those of an earlier sweep lack the uses."""
    return 'uses' in row or not passed(row)


def summary(rows: dict[str, Row]) -> dict[str, Any]:
    """Count what passed, and take the medians."""
    combed = [r['ours'] for r in rows.values() if 'comb_s' in r.get('ours', {})]
    units = [o['channels'] for o in combed if 'channels' in o]
    peers = [r.get('peer', {}) for r in rows.values()]
    return {
        'families': len(rows),
        'passed': sum(map(passed, rows.values())),
        'silently wrong': sum(r['verdict'].startswith('WRONG') for r in rows.values()),
        'median comb seconds': statistics.median(o['comb_s'] for o in combed) if combed else None,
        'median comb / forward': statistics.median(o['comb_s'] / o['forward_s'] for o in combed) if combed else None,
        'at least 95 % of the parameters prunable': sum(o['prunable'] >= 0.95 for o in combed),
        'median prunable': statistics.median(o['prunable'] for o in combed) if combed else None,
        'at least 95 % of the units prunable': f'{sum(share >= GOAL for share in units)} of {len(units)}',
        **{f'exact: {name}': used(rows, name) for name in USES},
        'families with heads that are rotated': sum(bool(r.get('rotate', {}).get('heads')) for r in rows.values()),
        'heads rotated': sum(r.get('rotate', {}).get('heads', 0) for r in rows.values()),
        'heads found': sum(r.get('rotate', {}).get('found', 0) for r in rows.values()),
        'Torch-Pruning runs': sum(bool(p.get('runs')) for p in peers),
        'Torch-Pruning runs, same shape': sum(bool(p.get('shape')) for p in peers),
    }


def used(rows: dict[str, Row], name: str) -> str:
    """Count the families in which a use was exact, of those whose dense model runs in it."""
    found = [(row, row['uses'][name]) for row in rows.values() if name in row.get('uses', {})]
    ran = [(row, use) for row, use in found if 'not_run' not in use]
    exact = [
        use for row, use in ran if uses_fault({n: {'not_run': ''} for n in USES} | {name: use}, tolerance(row)) is None
    ]
    return f'{len(exact)} of {len(ran)}'


def tolerance(row: Row) -> float:
    return TOLERANCE[row['ours']['dtype']]


def line(row: Row) -> str:
    """Write one family's line of the table."""
    ours, onnx, peer = row.get('ours', {}), row.get('onnx', {}), row.get('peer', {})
    cells = [row['family']]
    if 'comb_s' in ours:
        attention = '' if ours.get('attention') is None else f'{ours["attention"]:.1%}'
        reasons = ours['frozen'][: 2 if ours.get('channels', 1.0) >= GOAL else 4]
        cells += [
            str(ours['groups']),
            str(ours['units']),
            f'{ours["prunable"]:.1%}',
            f'{ours["channels"]:.1%}' if 'channels' in ours else '',
            attention,
        ]
        cells.append('; '.join(reasons))
        cells += [f'{ours["comb_s"]:.2f} / {ours["forward_s"]:.2f}']
    else:
        cells += [''] * 7
    gap = ours.get('error_masked_slim')
    cells.append('' if gap is None else f'{gap:.0e}' + ('' if ours['dtype'] == 'float64' else ' (float32)'))
    cells.append(uses_cell(row.get('uses', {})))
    turned = row.get('rotate', {})
    cells.append(f'{turned["heads"]} / {turned["found"]}' if turned.get('found') else '')
    cells.append(f'{onnx["error_parity"]:.0e}' if 'error_parity' in onnx else 'no')
    cells.append(row['verdict'].split('\n')[0][:120])
    cells.append(peer_cell(peer, row.get('died')))
    return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'


def uses_cell(uses: Row) -> str:
    """Say what is the largest difference in all uses, and in which the dense model does not run."""
    gaps = [max(use['gap'], use.get('gradient_gap', 0.0)) for use in uses.values() if 'gap' in use]
    missing = [name for name, use in uses.items() if 'not_run' in use]
    return (f'{max(gaps):.0e}' if gaps else '') + (f' (not run: {", ".join(missing)})' if missing else '')


def peer_cell(peer: Row, died: str | None) -> str:
    """Say how Torch-Pruning fared."""
    if not peer:
        return (died or 'not reached')[:80]
    if 'error' in peer:
        return peer['error'].split('\n')[0][:80]
    return f'runs, -{peer["removed"]:.0%}' + ('' if peer['shape'] else ', output shape changed')


LEGEND = """# The zoo

Written by `benchmarks/zoo.py`; do not edit. One model of each architecture family of the installed mmpretrain, mmseg,
mmdet and torchvision that needs nothing beyond them (what is out stands below), and our SeaFormer; random weights, a
random 70 % of each group kept. Of self-supervised methods and of the retriever what training runs, the loss, is the
output.

- **groups, units**: what combing found; a unit is a channel with everything that is coupled to it.
- **prunable parameters**: the share that lies in a row of some unit.
- **prunable units, of attention**: the share of the channels of all layers (of queries, keys and values) that can go,
  the model's outputs left out. Below 95 % more reasons stand beside it.
- **frozen, and why**: the largest reasons, with the number of rows (indices of a dimension of a parameter) of each.
- **comb / forward**: seconds for combing and for one forward pass, float32, one thread of a shared machine.
- **masked against slim**: largest difference of outputs, relative to the largest output, float64 unless noted. The
  same with each keep shifted by one unit must differ, or the family fails.
- **other uses**: the largest difference, of outputs or gradients, with twice as many pictures; with another size; with
  another keep, odd and uneven; in training mode with gradients (no dropout, norms with their own statistics; combed
  with this pass too where it computes anything else); after the weights were loaded into a newly built model in a fresh
  process; and after `torch.save` of the model. Each has its control that must differ. Where the dense model does not
  run in a use, it stands there.
- **heads rotated**: of the attention heads that were found, those of which queries and keys, or values and the
  projection, were rotated (`mmcpd.rotate`). Outputs change by at most 1e-10 of the largest, float64 (float32: 1e-4),
  or the family fails.
- **ONNX parity**: the same between torch and ONNX Runtime, float32.
- **Torch-Pruning**: asked for 30 % by magnitude on the same model, in the same run or with
  `--keep-peer` in an earlier one: does the pruned model run, and
  which share of its parameters went. That it runs does not say that the result is right.
"""


COLUMNS = (
    'family', 'groups', 'units', 'prunable parameters', 'prunable units', 'of attention', 'frozen, and why',
    'comb / forward (s)', 'masked against slim', 'other uses', 'heads rotated', 'ONNX parity', 'verdict',
    'Torch-Pruning',
)  # fmt: skip


def report(results: Path, table: Path) -> None:
    """Write the table in Markdown, and print the summary."""
    stored = json.loads(results.read_text())
    about, rows = stored['about'], stored['families']
    swept = sum(map(complete, rows.values()))
    totals = {k: f'{v:.3g}' if isinstance(v, float) else v for k, v in summary(rows).items()}
    head = ' | '.join(COLUMNS)
    lines = [
        *LEGEND.splitlines(),
        *([f'Swept: {swept} of {len(FAMILIES)}; `--resume` sweeps the rest.'] if swept < len(FAMILIES) else []),
        *([f'{before} rows are of an earlier sweep, without other uses.'] if (before := len(rows) - swept) else []),
        '',
        f'{about["date"]}, Python {about["python"]}, {about["machine"]}; '
        + ', '.join(f'{k} {v}' for k, v in about['versions'].items())
        + f'; `{about["command"]}`',
        '',
        *(f'- {k}: {v}' for k, v in totals.items()),
        '',
        f'| {head} |',
        '|' + '---|' * (head.count('|') + 1),
        *map(line, rows.values()),
        '',
        '## Folders that are out',
        '',
        '| folder | why |',
        '|---|---|',
        *(f'| {key} | {reason} |' for key, reason in stored['out'].items()),
        '',
    ]
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text('\n'.join(lines))
    for key, value in totals.items():
        print(f'{key}: {value}')
