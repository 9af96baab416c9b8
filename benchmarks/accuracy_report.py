"""Markdown from the results of the accuracy tables: means and deviations over seeds, and what the peer was lent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.accuracy_peers import HOW, LENT
from benchmarks.accuracy_recipes import RECIPES
from benchmarks.accuracy_store import Row, Store
from benchmarks.accuracy_variants import VARIANTS

BEGIN, END = '<!-- accuracy:begin -->', '<!-- accuracy:end -->'
SUMMARISED = ('dense', 'mmcpd', 'mmcpd, no refit', 'magnitude at once', 'random at once')  # and what the peer ships
EVERY = RECIPES | VARIANTS
TITLES = {
    'resnet20': 'ResNet-20 on CIFAR-10, accuracy on the 10,000 test pictures',
    'resnet56': 'ResNet-56 on CIFAR-10, accuracy on the 10,000 test pictures',
    'vit': 'A small ViT on CIFAR-10, accuracy on the 10,000 test pictures',
    'camvid': 'MobileNetV2 with a light head on CamVid at 180x240, mIoU on the 233 test pictures',
    'camvid_seaformer': 'SeaFormer-T with a light head on CamVid at 180x240, mIoU on the 233 test pictures',
}


def report(stores: Mapping[str, Store]) -> str:
    """Return a section with one table for each model and share of the MACs, and how it was measured."""
    found = {name: store.read('rows') for name, store in stores.items()}
    parts = [table(name, rows) for name, rows in found.items() if rows]
    latency = [latency_table(name, stores[name].read('latency')) for name in stores]
    every = [row for rows in found.values() for row in rows]
    if not every:
        return 'Nothing was measured yet: run `python benchmarks/accuracy.py resnet20`.\n'
    return '\n\n'.join([*parts, *(each for each in latency if each), setting(every)]) + '\n'


def summary(stores: Mapping[str, Store], share: float = 0.5) -> str:
    """Return one small table: every model pruned to a share of its MACs with nothing trained."""
    rows = {name: [r for r in store.read('rows') if not r['iterations']] for name, store in stores.items()}
    names = [name for name in stores if any(row['recipe'] != 'dense' for row in rows[name])]
    lines = [['', *(TITLES[name].split(',')[0] for name in names)], ['---'] * (len(names) + 1)]
    for recipe in (each for each in RECIPES.values() if each.name in SUMMARISED or each.shipped):
        wanted = 1.0 if recipe.name == 'dense' else share
        own = [[r for r in rows[name] if r['recipe'] == recipe.name and r['share'] == wanted] for name in names]
        if any(own):
            lines.append([recipe.name, *(cell(each) for each in own)])
    return '\n'.join(f'| {" | ".join(each)} |' for each in lines) + '\n'


def table(name: str, rows: Sequence[Row]) -> str:
    """Return the table of one model: recipes down; shares of the MACs with nothing trained, then iterations, across."""
    dense = [row['test'] for row in rows if row['recipe'] == 'dense' and 'test' in row]
    rows = [row for row in rows if row['recipe'] != 'dense']
    columns = sorted({(row['iterations'], row['share']) for row in rows}, key=lambda column: (column[0], -column[1]))
    names = [f'{share:.0%}' + (f', {count} iterations' if count else '') for count, share in columns]
    header = ['MACs that remain', *names, 'trained by']
    lines = [header, ['---'] * len(header)]
    for recipe in (each for each in EVERY if any(row['recipe'] == each for row in rows)):
        own = [row for row in rows if row['recipe'] == recipe]
        errors = sorted({row['error'] for row in own if 'error' in row})
        if errors and not any('test' in row for row in own):
            lines.append([recipe, f'does not run: {errors[0]}', *[''] * (len(header) - 2)])
            continue
        cells = [cell([row for row in own if (row['iterations'], row['share']) == column]) for column in columns]
        learning = EVERY[recipe].learning.words if any(row['iterations'] for row in own) else ''
        lines.append([recipe, *cells, learning])
    reference = f', dense {dense[0]:.2f}' if dense else ''
    text = '\n'.join(f'| {" | ".join(each)} |' for each in lines)
    return f'**{TITLES[name]}{reference}**\n\n{text}{other_rates(rows)}'


def other_rates(rows: Sequence[Row]) -> str:
    """Return a line of what recipes reach at rates that were not chosen, or nothing."""
    trained = [row for row in rows if row['iterations'] and 'test' in row]
    chosen = {(row['recipe'], row['iterations']) for row in trained if row.get('rate_chosen')}
    cases = sorted({(row['recipe'], row['iterations'], row['rate']) for row in trained if not row.get('rate_chosen')})
    found = [
        f'{recipe} at {rate:g}, {count} iterations: '
        + cell([row for row in trained if (row['recipe'], row['iterations'], row['rate']) == (recipe, count, rate)])
        for recipe, count, rate in cases
        if (recipe, count) in chosen
    ]
    return f'\n\nAt rates that were not chosen: {"; ".join(found)}.' if found else ''


def cell(rows: Sequence[Row]) -> str:
    """Return mean and standard deviation over seeds: '86.80 ± 0.14 (3)'; of one seed its value.

    Where a rate was chosen after rows were run with another, the chosen one counts.
    """
    chosen = [row for row in rows if row.get('rate_chosen')]
    values = {row['seed']: row['test'] for row in (chosen or rows) if 'test' in row}
    if not values:
        return '-'
    if len(values) == 1:
        return f'{next(iter(values.values())):.2f}'
    return f'{np.mean(list(values.values())):.2f} ± {np.std(list(values.values()), ddof=1):.2f} ({len(values)})'


def latency_table(name: str, rows: Sequence[Row]) -> str:
    """Return the medians of one model's pruned forms in ONNX Runtime, or nothing."""
    if not rows:
        return ''
    lines = [['', 'MACs', 'dense, ms', 'pruned, ms', 'ratio (median of paired runs)'], ['---'] * 5]
    for row in rows:
        dense, pruned = row['latency']
        times = [f'{each["median"]:.3f}' for each in (dense, pruned)]
        lines.append([row['recipe'], f'{row["share"]:.0%}', *times, f'{pruned["ratio"]:.3f}'])
    text = '\n'.join(f'| {" | ".join(each)} |' for each in lines)
    return f'**{name}: latency in ONNX Runtime, one picture, one thread**\n\n{text}'


def setting(rows: Sequence[Row]) -> str:
    """Say how the numbers came about, with versions, seeds and dates."""
    seeds = sorted({row['seed'] for row in rows})
    dates = sorted({row['date'] for row in rows})
    names = sorted({name for row in rows for name in row['versions']})
    found = {name: sorted({row['versions'][name] for row in rows if name in row['versions']}) for name in names}
    versions = ', '.join(f'{name} {" and ".join(each)}' for name, each in found.items())
    trained = [row for row in rows if row['iterations'] and 'error' not in row]
    chosen = {(row['recipe'], row['table']) for row in trained if row.get('rate_chosen')}
    rates: dict[tuple[str, str], set[str]] = {}
    for row in trained:
        if (key := (row['recipe'], row['table'])) not in chosen:
            rates.setdefault(key, set()).add(f'{row["rate"]:g}')
    given = [f'{recipe} ({table}: {" and ".join(sorted(each))})' for (recipe, table), each in sorted(rates.items())]
    words = 'Learning rates are chosen for each recipe by one run of as many iterations (3 epochs: 240, ResNet-56: '
    words += '80), on training pictures that nothing else here sees (the dense nets were trained on them too)'
    words += f', but these have one that was not tried beside others: {", ".join(given)}.' if given else '.'
    return (
        'Mean ± standard deviation over seeds (how many). Every recipe starts from the same dense weights and sees '
        'equally many training pictures in the same loop (SGD with momentum 0.9, or AdamW for the ViT; a rate that '
        'falls as a cosine; forward passes in bfloat16). One counter counts the MACs of all results: within 1 point of '
        'the target. '
        f'{words} Where nothing is trained and nothing refitted, batch norm is re-estimated on 1,000 augmented '
        f'training pictures. Torch-Pruning ranks globally and {HOW}. '
        f'It was lent: {"; ".join(LENT)}. '
        f'Seeds {", ".join(map(str, seeds))}; {" to ".join(dict.fromkeys((dates[0], dates[-1])))}; {where(rows)}; '
        f'{versions}. '
        'Command: `python benchmarks/accuracy.py TABLE --choose-lr`.'
    )


def where(rows: Sequence[Row]) -> str:
    """Say what the rows ran on: 'on cpu', and which of them did not."""
    others: dict[str, set[str]] = {}
    for row in rows:
        if (device := row.get('device', 'cpu')) != 'cpu':
            others.setdefault(device, set()).add(f'{row["table"]}, {row["iterations"]} iterations')
    return ', '.join(['on cpu', *(f'but {"; ".join(sorted(each))} on {name}' for name, each in others.items())])


def write_between(document: Path, text: str) -> None:
    """Replace what a document holds between `<!-- accuracy:begin -->` and `<!-- accuracy:end -->`.

    Raises:
        ValueError: it has no such place, or more than one.
    """
    before = document.read_text(encoding='utf-8')
    pattern = re.compile(f'{re.escape(BEGIN)}.*?{re.escape(END)}', re.DOTALL)
    if len(pattern.findall(before)) != 1:
        raise ValueError(f'{document} must have one place for the table: write {BEGIN} and {END} where it belongs')
    document.write_text(pattern.sub(lambda _: f'{BEGIN}\n{text}{END}', before), encoding='utf-8')
