"""Channels that no weight has, as of encodings of positions: the module gives out those that are kept."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.deploy import deploy
from mmcpd.errors import SlimError
from mmcpd.fixes import ComputedChannels
from mmcpd.prune import Pruner, Schedule
from mmcpd.slim import mask_, restructure_, slim, structure
from mmcpd.slim.computed import computed_channels
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import randomise_

other = torch  # another name of it
WIDTH = 8
TOKENS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
PICTURES = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(0)).double()


class Waves(nn.Module):
    """Sines (1, tokens, width) of the places of tokens (N, tokens, ...)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        places, rates = torch.arange(x.shape[1]).double(), torch.arange(self.width) + 1
        return (places[:, None] / rates.double()).sin()[None].to(x.dtype)


class Sine2d(nn.Module):
    """Sines and cosines (N, width, H, W) of the places that a mask (N, H, W) leaves, as DETR's are."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.features = width // 2

    def forward(self, mask: Tensor) -> Tensor:
        rates = 20 ** (2 * (torch.arange(self.features).double() // 2) / self.features)
        both = []
        for dim in (1, 2):
            angles = (~mask).cumsum(dim).double()[..., None] / rates
            waves = torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], 4)
            both.append(waves.flatten(3))
        return torch.cat(both, 3).permute(0, 3, 1, 2)


class Around(nn.Module):
    """A module without a tensor around another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


class Tokens(nn.Module):
    """A stem, positions and a mixing layer; the positions are added for the mixing alone."""

    def __init__(self, waves: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.mix, self.norm, self.fc = nn.Linear(3, 8), nn.Linear(8, 6), nn.LayerNorm(8), nn.Linear(8, 2)
        self.back, self.waves = nn.Linear(6, 8), waves or Waves()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        positions = self.waves(x)
        x = self.norm(x + self.back(self.mix(x + positions).relu()))
        return self.fc(x + positions)


class Added(Tokens):
    """A module without a tensor adds what one inside it computes."""

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Waves()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    def __init__(self) -> None:
        super().__init__(self.Add())

    def forward(self, x: Tensor) -> Tensor:
        x = self.waves(self.stem(x))
        return self.fc(self.norm(x + self.back(self.mix(x).relu())))


class Levels(nn.Module):
    """Features of two levels under one encoding, each with an embedding of its level, as in Deformable DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 3, 2, 1)
        self.positions, self.levels = Sine2d(), nn.Embedding(2, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        maps = [first, self.down(first)]
        where = []
        for level, each in enumerate(maps):
            mask = torch.zeros(len(x), *each.shape[2:], dtype=torch.bool)
            positions = self.positions(mask).to(x.dtype).flatten(2).transpose(1, 2)
            where.append(positions + self.levels.weight[level].view(1, 1, -1))
        tokens, positions = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1), torch.cat(where, 1)
        query = tokens + positions
        out, _ = self.attention(query, query, tokens, need_weights=False)
        return self.fc(self.norm(tokens + out)).mean(1)


GROUPS = {'stem': 8, 'mix': 6}


@pytest.mark.parametrize('waves', [Waves, lambda: Around(Waves()), lambda: nn.Sequential(Waves(), nn.Tanh())])
def test_the_channels_of_an_encoding_go_with_those_of_layers(waves):
    model = Tokens(waves()).double()
    before = model(TOKENS)
    found = exact(model, TOKENS, GROUPS)
    assert before.shape == model(TOKENS).shape
    (computed,) = found.fixes.computed
    assert computed.dim == 2 and computed.width == WIDTH
    assert f'{computed.module}.kept_channels' not in model.state_dict()
    small = slim(model, found, random_keep(found, 0.5, 0))
    assert small.stem.out_features == 4 and small.get_submodule(computed.module)(small.stem(TOKENS)).shape[2] == 4


def test_the_dense_model_computes_what_it_did():
    model = randomise_(Tokens())
    before = model(TOKENS)
    comb(model, TOKENS)
    assert computed_channels(model) and torch.equal(model(TOKENS), before)


def test_the_module_that_computes_may_be_inside_one_that_adds():
    assert exact(Added(), TOKENS, GROUPS).fixes.computed == (ComputedChannels('waves.inner', 2, WIDTH),)


def test_levels_under_one_encoding():
    found = exact(Levels(), PICTURES, {'stem': 8, 'attention.in_proj': 4, 'attention.in_proj#2': 4})
    assert found.fixes.computed == (ComputedChannels('positions', 1, WIDTH),)


# -- as many numbers as before -----------------------------------------------------------------------------------------
def encoded(x: Tensor, width: int) -> Tensor:
    rates = torch.arange(width).double()
    return torch.stack([(x / (rates[0::2] + 1)).sin(), (x / (rates[1::2] + 1)).cos()], -1).flatten(-2)


class Counted(nn.Module):
    """A layer reads numbers that a width of its neighbour counts: its columns are no channels of that width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.read, self.norm, self.fc = nn.Linear(3, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def numbers(self, x: Tensor, y: Tensor) -> Tensor:
        return encoded(x[..., :1], y.shape[2])

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.fc(self.norm(y + self.read(self.numbers(x, y)).relu()))


class Keyword(Counted):
    def numbers(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., :1] * torch.linspace(0, 1, steps=y.shape[-1]).to(x.dtype)


class End(Counted):
    def numbers(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., :1] * torch.arange(0, y.shape[-1]).to(x.dtype)


class Named(Counted):
    def numbers(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., :1] * torch.arange(start=0, end=y.shape[-1]).to(x.dtype)


class Backward(Counted):
    def numbers(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., :1] * torch.linspace(start=y.shape[-1], end=0, steps=8).to(x.dtype)


class AllNamed(Counted):
    def numbers(self, x: Tensor, y: Tensor) -> Tensor:
        w = y.shape[-1]
        return x[..., :1] * torch.linspace(start=0, end=w, steps=w).to(x.dtype)


class Behind(Counted):
    def numbers(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., :1] * torch.arange(start=y.shape[-1], end=2 * y.shape[-1]).to(x.dtype)


class Step(Counted):
    def numbers(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., :1] * torch.arange(0, 64, step=y.shape[-1]).to(x.dtype)


class Aliased(Counted):
    def numbers(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., :1] * other.arange(0, y.shape[-1]).to(x.dtype)


@pytest.mark.parametrize('kind', [Counted, Keyword, End, Named, Backward, AllNamed, Behind, Step, Aliased])
def test_numbers_that_are_counted_by_a_width_stay_as_many(kind):
    model = kind()
    found = exact(model, TOKENS, {'stem': 8})
    assert slim(model, found, random_keep(found, 0.5, 0)).read.in_features == 8


# -- files and copies --------------------------------------------------------------------------------------------------
def slimmed(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    model = randomise_(Tokens())
    found = comb(model, TOKENS)
    return model, slim(model, found, random_keep(found, 0.5, seed))


def test_a_file_says_which_are_kept():
    _, small = slimmed()
    plan = structure(Tokens().double(), small)
    assert plan['computed'] == {'waves': {'dim': 2, 'width': 8}} and plan['tensors']['waves.kept_channels'] == [4]
    twin = restructure_(Tokens().double(), plan)
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(TOKENS), small(TOKENS))
    turned = copy.deepcopy(plan)
    kept = plan['rows']['waves.kept_channels'][0]
    turned['rows']['waves.kept_channels'] = [[row for row in range(8) if row not in kept]]
    other = restructure_(Tokens().double(), turned)
    other.load_state_dict(small.state_dict())
    assert not torch.allclose(other(TOKENS), small(TOKENS))

    again = comb(small, TOKENS)
    assert {g.name: g.units for g in again.groups} == {'stem': 4, 'mix': 3}
    smaller = slim(small, again, random_keep(again, 0.5, 1))
    twin = restructure_(Tokens().double(), structure(Tokens().double(), smaller))
    twin.load_state_dict(smaller.state_dict())
    assert torch.equal(twin(TOKENS), smaller(TOKENS)) and len(twin.waves.kept_channels) == 2


WRONG = {
    'no module': ({'nowhere': {'dim': 2, 'width': 8}}, "no module 'nowhere' that computes"),
    'a layer': ({'stem': {'dim': 2, 'width': 8}}, "no module 'stem' that computes"),
    'no width': ({'waves': {'dim': 2}}, 'waves computes the channels'),
    'a text': ({'waves': {'dim': '2', 'width': 8}}, 'waves computes the channels'),
    'too many': ({'waves': {'dim': 2, 'width': 2**40}}, 'waves computes the channels'),
    'fewer than are kept': ({'waves': {'dim': 2, 'width': 3}}, r'waves.kept_channels is \(3,\) in this model'),
    'none': ({}, 'waves.kept_channels is missing in this model'),
}


@pytest.mark.parametrize('name', WRONG)
def test_what_a_file_may_not_say(name):
    entries, message = WRONG[name]
    _, small = slimmed()
    plan = {**structure(Tokens().double(), small), 'computed': entries}
    model = Tokens().double()
    with pytest.raises(SlimError, match=message):
        restructure_(model, plan)
    assert not computed_channels(model) and not dict(model.named_buffers())


def test_copies_that_were_made_before_follow():
    model = randomise_(Tokens())
    before, average = copy.deepcopy(model), copy.deepcopy(model)
    found = comb(model, TOKENS)
    keep = random_keep(found, 0.5, 0)
    small = slim(before, found, keep)
    assert not computed_channels(before), 'it stays as it is'
    assert torch.equal(small(TOKENS), slim(model, found, keep)(TOKENS))
    mask_(before, found, keep)
    assert torch.allclose(small(TOKENS), before(TOKENS), rtol=1e-12, atol=1e-12)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruner(model, found, optimizer, Schedule({'macs': 0.5}, begin=0, end=2, interval=1), round_to=1)
    pruner.also_mask(average)
    pruner.choose(keep)
    assert torch.allclose(average(TOKENS), before(TOKENS), rtol=1e-12, atol=1e-12)


def test_a_slim_model_is_pickled_and_exported(tmp_path):
    _, small = slimmed()
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(TOKENS), small(TOKENS))
    report = deploy({'slim': small.float()}, [(TOKENS.float(),)], tmp_path, runs=1, threads=1)
    assert report.models[0].parity.max_rel < 1e-5 and not report.models[0].parity.constant


# -- what stays as it is -----------------------------------------------------------------------------------------------
class Outputs(Tokens):
    """The positions are added to what the model puts out."""

    def __init__(self) -> None:
        super().__init__(Waves(4))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stem(x)) + self.waves(x)


class Many(Tokens):
    """There are as many tokens as channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.repeat(1, 2, 1)[:, :WIDTH])


class Apart(Tokens):
    """The positions meet no channels."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stem(x)).mean() + self.waves(x).mean()


def test_a_module_that_has_something_of_that_name_is_left_alone():
    model = Tokens().double()
    model.waves.kept_channels = 'all'
    found = comb(model, TOKENS)
    assert [group.name for group in found.groups] == ['mix'] and model.waves.kept_channels == 'all'


@pytest.mark.parametrize('kind', [Outputs, Many, Apart])
def test_a_module_whose_channels_cannot_go_is_left_alone(kind):
    model = kind().double()
    found = comb(model, TOKENS)
    assert not computed_channels(model) and not found.fixes.computed and not dict(model.named_buffers())
    assert not model.waves._forward_hooks
