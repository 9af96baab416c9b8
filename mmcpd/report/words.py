"""Say the result of a run in one sentence and four numbers, and its quantities as rows of a table."""

from __future__ import annotations

from mmcpd.report.data import Quantity, RunReport, Setting

FACTS = 4


def known(report: RunReport) -> list[Quantity]:
    """Return the quantities that are known of both models."""
    return [each for each in report.quantities if each.dense is not None and each.slim is not None]


def share(each: Quantity) -> float:
    """Return what remains of a cost that is known, as a share of the dense model's.

    Example:
        >>> share(Quantity('MACs', 'M', 8.0, 2.0))
        0.25
    """
    return (each.slim or 0.0) / each.dense if each.dense else 1.0


def change(each: Quantity) -> str:
    """Say how a quantity that is known changes: a cost as a share, another as a difference.

    Example:
        >>> change(Quantity('MACs', 'M', 8.0, 2.0)), change(Quantity('mIoU', '', 40.0, 39.25, is_cost=False))
        ('25.0 %', '−0.75')
    """
    return f'{share(each):.1%}'.replace('%', ' %') if each.is_cost else signed((each.slim or 0.0) - (each.dense or 0.0))


def signed(value: float) -> str:
    """Return a difference with its sign.

    Example:
        >>> signed(-0.5), signed(0.0), signed(1.25)
        ('−0.50', '±0.00', '+1.25')
    """
    text = f'{abs(value):,.2f}'
    sign = '±' if float(text.replace(',', '')) == 0 else '−' if value < 0 else '+'
    return sign + text


def number(value: float | None, unit: str = '') -> str:
    """Return a number with its unit, '–' for one that is not known.

    Example:
        >>> number(6.118, 'M'), number(None)
        ('6.12 M', '–')
    """
    return '–' if value is None else f'{value:,.2f} {unit}'.rstrip()


def answer(report: RunReport) -> str:
    """Say in one sentence what a run made of its model.

    Example:
        >>> macs, top1 = Quantity('MACs', 'M', 8.0, 2.0), Quantity('top1', '', 98.0, 97.5, is_cost=False)
        >>> answer(RunReport('run', 'ResNet', '', 'pruned to the target: ...', [macs, top1], 'top1'))
        'Pruned to the target: ResNet keeps 25.0 % of its MACs, and its top1 is 97.50 (dense 98.00).'
    """
    costs = [each for each in known(report) if each.is_cost][:2]
    remains = ' and '.join(f'{change(each)} of its {each.name}' for each in costs)
    stage = report.stage.partition(':')[0]
    text = f'{report.model} keeps {remains}' if remains else f'{report.model}: its costs are not known'
    text = f'{stage[:1].upper()}{stage[1:]}: {text}' if stage else text
    metric = next((each for each in report.quantities if each.name == report.metric and each.slim is not None), None)
    if metric is None:
        return f'{text}; it was not validated.'
    dense = '' if metric.dense is None else f' (dense {metric.dense:,.2f})'
    return f'{text}, and its {metric.name} is {metric.slim:,.2f}{dense}.'


def facts(report: RunReport) -> list[Setting]:
    """Return the four numbers that a report opens with: the metric, and the costs, latency before others.

    Example:
        >>> macs, top1 = Quantity('MACs', 'M', 8.0, 2.0), Quantity('top1', '', 98.0, 97.5, is_cost=False)
        >>> [fact.value for fact in facts(RunReport('run', 'ResNet', '', '', [macs, top1], 'top1'))]
        ['25.0 %', '97.50']
    """
    costs = [each for each in known(report) if each.is_cost]
    costs = [*costs[:2], *sorted(costs[2:], key=lambda each: each.name != 'latency')]
    metrics = [each for each in known(report) if each.name == report.metric]
    shown = [*costs[: FACTS - len(metrics)], *metrics]
    return [
        Setting(f'of the {each.name} ({number(each.slim, each.unit)})', change(each))
        if each.is_cost
        else Setting(f'{each.name} ({change(each)})', number(each.slim, each.unit))
        for each in shown
    ]


def compared(report: RunReport) -> list[list[str]]:
    """Return the rows of the table of quantities, the first of them the header."""
    rows = [['', 'dense', 'slim', 'remains or change']]
    for each in report.quantities:
        both = each.dense is not None and each.slim is not None
        rows.append([each.name, number(each.dense, each.unit), number(each.slim, each.unit),
                     change(each) if both else '–'])  # fmt: skip
    return rows
