"""Write the table of users' configs from the results of `user_configs.py`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

HEAD = """# Users' configs

Written by `benchmarks/user_configs.py`; do not edit. Configs as users have them go through the recipe of
[Prune your own model](your_model.md): its three statements (without `load_from`: the models are untrained), about 20
iterations in which pruning goes from the 4th to the 12th down to half of the MACs, then `mmcpd test` and `mmcpd deploy`
with the `slim.pth`, each in a process of its own. A row ends **right**, or is **refused** in one line that says the
cure; everything else is a **fault**.

The data are **synthetic**: coarse noise with a bright square, 20 pictures to train on and 4 to test on, which each
config reads through its own pipeline, two at a time. So this shows that whole runs end as they should; accuracies mean
nothing here. A shipped config keeps its model, losses, optimizer, schedule, hooks and transforms. What differs: shorter
runs (without schedulers that would begin later), fewer pixels (112 for classifiers, 128 for segmentors, with `img_size`
of the model) where a model takes fewer, no downloaded weights. A config that does not train so without mmcpd either is
**not set up**.
"""


def write_report(store: dict[str, Any], path: Path) -> None:
    """Write the table in Markdown."""
    rows = store['rows']
    lines = [HEAD, counts(rows), '', *drawn(store), '']
    lines += ['| config | what | groups | MACs left | train | test | deploy | seconds | end |', '|' + '---|' * 9]
    lines += [line(name, row) for name, row in sorted(rows.items(), key=lambda item: ('/' in item[0], item[0]))]
    notes = [(name, row) for name, row in rows.items() if row['verdict'] != 'right']
    if notes:
        lines += ['', '## What was refused, and what is a fault', '']
        lines += [f'- `{name}`, {row["verdict"]}: {why(row)}' for name, row in notes]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')


def counts(rows: dict[str, Any]) -> str:
    """Say how many rows ended how, with what, and when."""
    if not rows:
        return 'Nothing was run yet.'
    ends = Counter(row['verdict'] for row in rows.values())
    dates = sorted({row['date'] for row in rows.values()})
    versions = next(reversed(rows.values()))['versions']
    return (
        f'{len(rows)} rows: ' + ', '.join(f'{count} {end}' for end, count in ends.most_common()) + '. '
        f'{" to ".join(dict.fromkeys((dates[0], dates[-1])))}, on a share of one core, '
        + ', '.join(f'{name} {version}' for name, version in versions.items())
        + '.'
    )


def drawn(store: dict[str, Any]) -> list[str]:
    """Say what the shipped configs were drawn from."""
    lines = []
    for package, draw in store['drawn'].items():
        kinds = Counter(reason.split(':')[0] for reason in draw['passed_over'].values())
        passed = ', '.join(f'{count} by {kind}' for kind, count in kinds.most_common()) or 'none'
        lines.append(
            f'- {package}: {len(draw["names"])} configs of as many folders, drawn with seed {draw["seed"]} from all '
            f'that build without compiled operators, further packages or downloads and have at most 60 M parameters; '
            f'passed over on the way: {passed}.'
        )
        survey = store['survey'].get(package)
        if survey:
            every = survey['excluded']
            kinds = Counter()
            for reason, count in every.items():
                kinds[reason.split(':')[0]] += count
            lines.append(
                f'  Of its {survey["configs"]} configs {sum(every.values())} are excluded, tried one by one: '
                + ', '.join(f'{count} by {kind}' for kind, count in kinds.most_common())
                + '.'
            )
    kinds = 'size: more than 60 M parameters; building: an operator, a package or a download is missing; reading: '
    kinds += 'the file itself; no training: a config for testing alone; data: not of labelled pictures'
    return [*lines, f'- Reasons: {kinds}.'] if lines else []


def line(name: str, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    left = f'{row["left"]["macs"]:.1%}' if 'left' in row else '-'
    groups = row.get('coupling', '-').split(' ')[0]
    steps = [step(row.get(command)) for command in ('train', 'test', 'deploy')]
    seconds = sum(row[command]['seconds'] for command in ('train', 'test', 'deploy') if command in row)
    cells = [f'`{name}`', row.get('what', '-'), groups, left, *steps, f'{seconds:.0f}', row['verdict']]
    return f'| {" | ".join(cells)} |'


def step(ran: dict[str, Any] | None) -> str:
    """Say how a command ended: yes, no, or that it was not run."""
    if ran is None:
        return '-'
    return 'yes' if ran['status'] == 0 else f'no ({ran["status"]})'


def why(row: dict[str, Any]) -> str:
    """Return the line with which a row ended, and with which command."""
    ran = [(command, row[command]) for command in ('train', 'test', 'deploy') if command in row]
    if not ran:
        return row.get('why', '-')
    command, last = ran[-1]
    text = f'`mmcpd {command}`: {last.get("line", "-").removeprefix("error: ")}'
    without = row.get('without_mmcpd')
    if without is not None and without['status'] != 0:
        text += f' (the config itself, without mmcpd: {without["line"].removeprefix("error: ")})'
    return text
