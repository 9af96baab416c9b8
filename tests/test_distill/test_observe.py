"""What autograd's graph tells about a loss: which module output it compares with the labels, by softmax or sigmoid."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.distill import Observer, Tap, Taps
from mmcpd.distill.observe import reads

LABELS = torch.tensor([0, 2])
HOT = F.one_hot(LABELS, 3).float()


def net(*after):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), *after)


SOFTMAX, SIGMOID, NEITHER = (True, False), (False, True), (False, False)


@pytest.mark.parametrize(
    ('loss', 'reading'),
    [
        (lambda x: F.cross_entropy(x, LABELS), SOFTMAX),
        (lambda x: F.cross_entropy(x, HOT, label_smoothing=0.1), SOFTMAX),
        (lambda x: F.nll_loss(x.log_softmax(1), LABELS), SOFTMAX),
        (lambda x: (x.logsumexp(1) - x[range(2), LABELS]).mean(), SOFTMAX),
        (lambda x: 1 - 2 * (x.softmax(1) * HOT).sum() / (x.softmax(1) + HOT).sum(), SOFTMAX),  # Dice
        (lambda x: F.binary_cross_entropy_with_logits(x, HOT), SIGMOID),
        (lambda x: F.binary_cross_entropy(x.sigmoid(), HOT), SIGMOID),
        (lambda x: -(HOT * F.logsigmoid(x) + (1 - HOT) * F.logsigmoid(-x)).sum(), SIGMOID),
        (lambda x: (F.softplus(x) - HOT * x).mean(), SIGMOID),
        (lambda x: ((1 - x.sigmoid()) ** 2 * F.binary_cross_entropy_with_logits(x, HOT)).mean(), SIGMOID),  # focal
        (lambda x: F.multilabel_soft_margin_loss(x, HOT), SIGMOID),
        (lambda x: F.mse_loss(x, HOT), NEITHER),
        (lambda x: (x - HOT).abs().mean(), NEITHER),
        (lambda x: F.cross_entropy(x, LABELS) + F.binary_cross_entropy_with_logits(x, HOT), (True, True)),
    ],
)  # fmt: skip
def test_a_loss_tells_what_it_compares(loss, reading):
    model = net()
    with Observer(model) as observer:
        out = model(torch.randn(2, 5))
    [found] = observer.compared([loss(out)])
    assert [str(output) for output in found.outputs] == ['2']
    assert (found.softmax, found.sigmoid) == reading
    read = reads(loss(torch.randn(2, 3, requires_grad=True)))
    assert (read.softmax, read.sigmoid) == reading


@pytest.mark.parametrize(
    ('after', 'tap'),
    [
        ([], '2'),
        ([nn.Softmax(1)], '2'),
        ([nn.Unflatten(1, (3, 1, 1)), nn.Upsample(scale_factor=2), nn.Identity()], '3'),  # before it is resized
        ([nn.Unflatten(1, (3, 1, 1)), nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(1)], '5'),  # pooled
        ([nn.BatchNorm1d(3)], '3'),
    ],
)
def test_what_comes_after_the_last_layer(after, tap):
    model = net(*after)
    with Observer(model) as observer:
        out = model(torch.randn(2, 5))
    [found] = observer.compared([F.cross_entropy(out.flatten(2).mean(2) if out.ndim > 2 else out, LABELS)])
    assert str(found.outputs[0]) == tap


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.both = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3), Both()

    def forward(self, x):
        x = self.stem(x)
        return self.a(x), self.b(x)


class Both(nn.Module):
    def forward(self, a, b):
        return [a - b, {'c': a}]


def names(found):
    return [[str(output) for output in each.outputs] for each in found]


def test_two_outputs_a_sum_and_a_part_of_an_output():
    model = Heads()
    with Observer(model) as observer:
        a, b = model(torch.randn(2, 5))
        apart = model.both.forward(a, b)[0]
    assert names(observer.compared([F.cross_entropy(a, LABELS) + F.cross_entropy(b, LABELS)])) == [['a'], ['b']]
    assert names(observer.compared([F.cross_entropy(a, LABELS), F.mse_loss(a, HOT)])) == [['a']], 'once'
    assert names(observer.compared([F.cross_entropy(a + b, LABELS)])) == [], 'no module gave out the sum'
    assert names(observer.compared([F.cross_entropy(apart, LABELS)])) == [['both:0']]
    assert names(observer.compared([model.stem.weight.square().sum()])) == [], 'weight decay'
    assert {str(output) for output in observer.behind([a + b])} == {'a', 'b'}
    with Taps(model, ['both:0']) as taps:
        model.both.forward(a, b)
    assert torch.equal(taps['both:0'][0], a - b)


def test_a_module_that_is_given_labels_is_no_tap():
    class Margin(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x, labels=None):
            return self.fc(x) - (0 if labels is None else F.one_hot(labels, 3))

    model = nn.ModuleDict({'head': Margin()})
    for labels, taps in ((LABELS, ['head.fc']), (None, ['head', 'head.fc'])):
        with Observer(model) as observer:
            out = model['head'](torch.randn(2, 5), labels)
        assert names(observer.compared([F.cross_entropy(out, LABELS)])) == [taps]


def test_forwards_that_are_called_directly_are_seen_and_put_back():
    model = nn.Sequential(nn.Linear(2, 2))
    own = lambda x: x  # noqa: E731
    model[0].forward = own
    with Taps(model, ['0']) as taps:
        model[0].forward(torch.ones(1, 2))
    assert torch.equal(taps['0'][0], torch.ones(1, 2)) and model[0].forward is own
    with pytest.raises(RuntimeError), Observer(net()) as observer:
        observer.modules['0'](torch.ones(1, 1))
    assert not any('forward' in module.__dict__ for module in observer.modules.values())


def test_a_module_at_two_paths_is_tapped_by_either():
    fc = nn.Linear(2, 2)
    model = nn.ModuleDict({'a': fc, 'b': fc})
    assert [Tap.parse(name, model).module for name in 'ab'] == ['a', 'b']
    with Taps(model, ['a', 'b:in']) as taps:
        out = fc(torch.ones(1, 2))
    assert torch.equal(taps['a'][0], out) and torch.equal(taps['b:in'][0], torch.ones(1, 2))
