"""A model as in training, which always computes the same: nothing that would draw random numbers does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.modes import as_trained
from mmcpd.slim import slim
from mmcpd.slim.mask import mask_
from mmcpd.slim.trial import random_keep
from tests.helpers import randomise_

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Drawing(nn.Module):
    """Draws in training, by a function."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.fc, self.draw = nn.Linear(8, 8), draw

    def forward(self, x):
        return self.draw(self.fc(x), self.training)


def whole(x, training):
    """Call the attention of torch that takes all its weights."""
    weight, bias = torch.eye(8).repeat(3, 1), torch.zeros(24)
    out = torch.eye(8), torch.zeros(8)
    first = x.transpose(0, 1)
    parts = (first, first, first, 8, 2, weight, bias, None, None, False)
    return F.multi_head_attention_forward(*parts, 0.5 if training else 0.0, *out, training=training)[0]


DRAWS = {
    'dropout': lambda x, training: F.dropout(x, 0.5, training),
    'dropout by name': lambda x, training: F.dropout(input=x, p=0.5, training=training),
    'attention': lambda x, training: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 * training),
    'attention by place': lambda x, training: F.scaled_dot_product_attention(x, x, x, None, 0.5 * training),
    'whole attention': whole,
    'slopes': lambda x, training: F.rrelu(x, training=training),
    'slopes by place': lambda x, training: F.rrelu(x, 0.1, 0.3, training),
}


@pytest.mark.parametrize('draw', DRAWS.values(), ids=DRAWS)
def test_functions_do_not_draw(draw):
    model = Drawing(draw).eval()
    expected = model(X)
    assert not torch.allclose(model.train()(X), model(X))
    with as_trained(model.eval()):
        assert model.training
        assert torch.equal(model(X), expected)
    assert not model.training


@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_do_not_draw(kind):
    model = kind(8, 8, num_layers=2, dropout=0.5, batch_first=True).eval()
    expected = model(X)[0]
    assert not torch.equal(model.train()(X)[0], model(X)[0])
    with as_trained(model.eval()):
        assert torch.equal(model(X)[0], expected)


def test_a_slim_encoder_trains_as_the_masked_one():
    """Its attention is another module than before, and may not drop where the one before does not."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    model = randomise_(nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))).double()
    x = X.double()
    found = comb(model, x)
    assert any('self_attn' in group.name for group in found.groups)
    keep = random_keep(found, 0.6, 0)
    small, other = slim(model, found, keep), slim(model, found, random_keep(found, 0.6, 1))
    mask_(model, found, keep)
    with as_trained(model), as_trained(small), as_trained(other):
        assert small.training
        assert torch.allclose(model(x), small(x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(model(x), other(x), rtol=1e-3)
