"""The table of operations: its rows are operators that reach the dispatcher, and its zero rules say the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmcpd.comb import comb
from mmcpd.comb.rules.pointwise import copied, never_zero, pointwise, power
from mmcpd.comb.rules.table import OPERATIONS
from tests.helpers import TORCH_2_5, Net, sample

RULES = (pointwise().__code__, never_zero('self').__code__, power.__code__, copied.__code__)
POINTWISE = {name for name, row in OPERATIONS.items() if row.rule.__code__ in RULES}
NEWER = {'_safe_softmax', '_scaled_dot_product_fused_attention_overrideable'}  # than torch 2.4
ELSEWHERE = {'linear'}  # composite on a CPU, with a kernel of its own on other devices


def name_of(operator: str) -> str:
    """Return an operator's name without its namespace, overload and the underscore of its in-place form."""
    name = operator.partition('::')[2].partition('.')[0]
    return name[:-1] if name.endswith('_') and not name.startswith('__') else name


def overloads() -> dict[str, list[str]]:
    """Return torch's own operators by name, those left out that write into an argument `out`."""
    found: dict[str, list[str]] = {}
    for operator in torch._C._dispatch_get_all_op_names():
        schema = torch._C._get_schema(*operator.partition('.')[::2]) if operator.startswith('aten::') else None
        if schema is not None and not any(argument.is_out for argument in schema.arguments):
            found.setdefault(name_of(operator), []).append(operator)
    return found


def test_each_row_is_an_operator_that_reaches_the_dispatcher():
    known = overloads()
    assert OPERATIONS.keys() - known.keys() == (set() if TORCH_2_5 else NEWER), 'no such operator'
    composite = torch._C._dispatch_has_kernel_for_dispatch_key
    rows = OPERATIONS.keys() & known.keys()
    unreached = {name for name in rows if all(composite(o, 'CompositeImplicitAutograd') for o in known[name])}
    assert unreached <= ELSEWHERE


@dataclass(frozen=True)
class Call:
    """One call of one operation.

    Attributes:
        op: its name in the table.
        operands: of each whether a removed channel of it is zero.
        function: makes the call.
        cautious: whether the rule may say less than what is true here.
    """

    op: str
    operands: tuple[bool, ...]
    function: Callable[..., Tensor]
    cautious: bool = False


def each(function: Callable[..., Tensor], op: str) -> list[Call]:
    """Return a function of one operand, called with one that is zero and one that is not."""
    return [Call(op, (zero,), function) for zero in (True, False)]


def pair(function: Callable[..., Tensor], op: str) -> list[Call]:
    """Return a function of two operands, called with all that they may be."""
    return [Call(op, (left, right), function) for left in (True, False) for right in (True, False)]


Z, ZZ, ZN, NZ, NN, ZZZ = (True,), (True, True), (True, False), (False, True), (False, False), (True, True, True)
UNARY = (
    'relu gelu silu hardswish mish tanh elu celu leaky_relu hardsigmoid softplus hardtanh'  # of torch.nn.functional
    ' neg abs sqrt sin sinh asinh atan erf sign floor ceil round trunc expm1 log1p nan_to_num'
    ' logit sigmoid exp log log2 log10 cos reciprocal rsqrt'
).split()
REMAINDERS = ('floor_divide', 'fmod', 'remainder')
CALLS = [
    *(call for name in UNARY for call in each(getattr(F, name, None) or getattr(torch, name), name)),
    *each(F.logsigmoid, 'log_sigmoid_forward'),
    *each(lambda x: F.prelu(x, torch.full((1,), 0.3, dtype=x.dtype)), '_prelu_kernel'),
    *each(lambda x: torch.native_dropout(x, 0.1, True)[0], 'native_dropout'),
    *pair(torch.mul, 'mul'),
    *each(lambda x: x * 2, 'mul'),
    *(Call('div', kind, torch.div) for kind in (ZN, NZ, NN)),  # of two that are zero the trial says what comes of it
    *each(lambda x: x / 2, 'div'),
    *(Call(name, kind, getattr(torch, name), kind is ZN) for name in REMAINDERS for kind in (ZN, NZ, NN)),
    *pair(torch.add, 'add'),
    *each(lambda x: x + 1, 'add'),
    *each(lambda x: x + 0, 'add'),
    *each(lambda x: x + torch.ones(1, dtype=x.dtype), 'add'),
    *pair(torch.sub, 'sub'),
    *each(lambda x: x - 1, 'sub'),
    *pair(torch.rsub, 'rsub'),
    *pair(lambda x, y: torch.complex(x, y).abs(), 'complex'),
    *each(torch.angle, 'angle'),
    *each(lambda x: 1 - x, 'rsub'),
    *pair(torch.maximum, 'maximum'),
    *pair(torch.minimum, 'minimum'),
    *pair(lambda x, y: torch.lerp(x, y, 0.3), 'lerp'),
    *(Call('addcmul', kind, torch.addcmul) for kind in (ZZZ, (False, True, True), (True, False, False))),
    *each(lambda x: x.clamp(-0.5, 0.7), 'clamp'),
    *each(lambda x: x.clamp(0.2, 0.7), 'clamp'),
    *each(lambda x: x.clamp(max=-0.2), 'clamp'),
    Call('clamp', Z, lambda x: x.clamp(min=torch.full((1,), 0.1, dtype=x.dtype))),
    *pair(lambda x, y: x.clamp(min=y), 'clamp'),
    *(Call('clamp', kind, torch.clamp) for kind in (ZZZ, (True, False, False), (False, True, False))),
    *each(lambda x: x.clamp_min(0.2), 'clamp_min'),
    *each(lambda x: x.clamp_min(-0.2), 'clamp_min'),
    Call('clamp_min', ZN, torch.clamp_min),
    Call('clamp_min', ZZ, torch.clamp_min, cautious=True),
    *each(lambda x: x.clamp_max(0.2), 'clamp_max'),
    *each(lambda x: x.clamp_max(-0.2), 'clamp_max'),
    Call('clamp_max', ZN, torch.clamp_max),
    *each(F.relu6, 'hardtanh'),
    *each(lambda x: F.hardtanh(x, 0.1, 0.9), 'hardtanh'),
    *each(lambda x: F.hardtanh(x, -0.9, -0.1), 'hardtanh'),
    *(call for power in (2, 1.5, 0, -1) for call in each(lambda x, p=power: torch.pow(x, p), 'pow')),
    *each(lambda x: 2**x, 'pow'),
    Call('pow', ZN, torch.pow),
    Call('pow', ZZ, torch.pow),
    Call('copy', Z, lambda x: torch.ones_like(x).copy_(x), cautious=True),
    *pair(lambda x, y: torch.where(x > 0.5, x, y), 'where'),
    *each(lambda x: torch.where(x > 0.5, x, 0.0), 'where'),
    *each(lambda x: torch.where(x > 0.5, x, 0.1), 'where'),
    Call('masked_fill', Z, lambda x: x.masked_fill(x < 0, 1.0), cautious=True),
    Call('masked_fill', Z, lambda x: x.masked_fill(x > -1, 1.0)),
    *each(lambda x: x.masked_fill(x > 0.5, 0.0), 'masked_fill'),
]


class Ran(TorchDispatchMode):
    """Collect the names of what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(name_of(func._schema.name))
        return func(*args, **(kwargs or {}))


def claimed(call: Call) -> bool:
    """Say whether combing takes a removed channel of the result for zero: only then a sum does not notice it."""

    def run(m, x):
        operands = (layer(x) if zero else layer(x).cos() for layer, zero in zip(m.layers, call.operands, strict=True))
        y = call.function(*operands)
        return m.fc(y) * y.sum(1, keepdim=True)

    layers = nn.ModuleList(nn.Linear(3, 6) for _ in call.operands)
    coupling = comb(Net(run, layers=layers, fc=nn.Linear(6, 2)).double(), sample((4, 3)), trial=False)
    assert [group.units for group in coupling.groups] == [6], coupling.reasons()
    return not coupling.fixes.statistics


@pytest.mark.parametrize('number', range(len(CALLS)), ids=lambda n: f'{CALLS[n].op}-{CALLS[n].operands}')
def test_a_result_is_taken_for_zero_where_it_is(number):
    call = CALLS[number]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in call.operands]
    operands = [x * 0 if zero else x for x, zero in zip(noise, call.operands, strict=True)]
    with torch.no_grad(), Ran() as ran:
        out = call.function(*operands)
    assert call.op in ran.names, ran.names
    truth = bool((out == 0).all())
    assert claimed(call) == (truth and not call.cautious)
    assert truth or not call.cautious, 'nothing to be cautious about'


def test_every_point_wise_row_is_called():
    assert {call.op for call in CALLS} == POINTWISE
