"""What is wrong in a slim file is one SlimError, whatever it is: tables, and damage at random."""

from __future__ import annotations

import io
import json
import time
import zipfile
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks import chaos_damage, chaos_files
from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.slim_file import checksum, read_slim, save_slim
from mmcpd.engine.slim_model import cut_to_
from mmcpd.errors import SlimError
from mmcpd.slim.check_structure import KEYS
from mmcpd.slim.weights import weights

FUZZ = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp('slim') / 'slim.pth'
    return chaos_files.write(path, 8)[0], path


@pytest.fixture
def content(original):
    return torch.load(original[1], weights_only=True)


def save(content, path):
    """Write a content with the checksum that fits, where it can have one."""
    with suppress(RuntimeError, NotImplementedError):
        content = content | {'checksum': checksum(content)}
    torch.save(content, path)
    return path


ONES, SCALAR, LARGE = torch.ones(3), torch.ones(()), torch.ones(2**16)
WRONG = {
    'an entry more': (lambda c: c.update(extra=1), 'extra is missing or unknown'),
    'an entry less': (lambda c: c.pop('buffers'), 'buffers is missing or unknown'),
    'weights as list': (lambda c: c.update(state_dict=[ONES]), 'state_dict is no table'),
    'numbers as names': (lambda c: c['state_dict'].update({1: ONES}), 'state_dict is no table'),
    'a number as weight': (lambda c: c['state_dict'].update({'fc.bias': 3}), r'fc\.bias of its state_dict'),
    'a parameter': (lambda c: c['state_dict'].update({'fc.bias': nn.Parameter(ONES)}), r'fc\.bias of'),
    'sparse': (lambda c: c['state_dict'].update({'fc.bias': ONES.to_sparse()}), r'fc\.bias of'),
    'on no device': (lambda c: c['buffers'].update(gains=torch.ones(3, device='meta')), 'gains of its buffers'),
    'one value, many times': (lambda c: c['state_dict'].update({'fc.bias': SCALAR.expand(10**7)}), r'fc\.bias of'),
    'overlapping': (
        lambda c: c['state_dict'].update({f'b{n}': part for n, part in enumerate(LARGE.unfold(0, 2**15, 2**10))}),
        'its tensors are larger than the file'),
    'structure as dict': (lambda c: c.update(structure={}), 'its structure is not JSON'),
    'structure as list': (lambda c: c.update(structure='[]'), 'its structure is a list'),
    'nested structure': (lambda c: c.update(structure='[' * 10**5 + ']' * 10**5), 'its structure is not JSON'),
    'not a number': (lambda c: c.update(structure='{"tensors": NaN}'), 'not JSON .NaN is no size'),
    'long structure': (lambda c: c.update(structure=' ' * 2**23), 'its structure is not JSON|larger than it says'),
    'meta as list': (lambda c: c.update(meta=[]), 'its meta is no table'),
    'a tensor in meta': (lambda c: c['meta'].update(x=[ONES]), 'its meta holds a tensor'),
    'a huge input': (lambda c: c['meta'].update(input_shape=[3, 10**6, 10**6]), 'input_shape in its meta'),
    'an input of text': (lambda c: c['meta'].update(input_shape='3'), 'input_shape in its meta'),
    'costs as text': (lambda c: c['meta'].update(slim={'macs': '1'}), r'slim\.macs in its meta'),
    'no costs': (lambda c: c['meta'].update(dense=3), 'dense in its meta'),
    'classes without names': (lambda c: c['meta'].update(dataset_meta=['a']), 'dataset_meta in its meta'),
    'another name': (lambda c: c['state_dict'].update({'fc.other': ONES}), r'it has fc\.other, which Chaos has not'),
    'a weight less': (lambda c: c['state_dict'].pop('bn.weight'), r'bn\.weight'),
    'another buffer': (lambda c: c['buffers'].update({'no.where': ONES}), r'it has no\.where'),
    'an extra state': (lambda c: c['state_dict'].update(_extra_state=3), '_extra_state'),
    'complex': (lambda c: c['state_dict'].update({'fc.bias': ONES.cfloat()}), r'fc\.bias is torch\.complex64'),
    'sizes that differ': (lambda c: c['state_dict'].update({'bn.bias': torch.ones(1)}), r'bn\.bias is'),
}  # fmt: skip


@pytest.mark.parametrize('fault', WRONG)
@pytest.mark.filterwarnings('ignore:.*parse:UserWarning')
def test_each_entry_is_of_its_type(original, content, tmp_path, fault):
    change, message = WRONG[fault]
    change(content)
    path = save(content, tmp_path / 'slim.pth')
    with pytest.raises(SlimError, match=message) as error:
        load_slim(original[0], path)
    assert str(error.value).isprintable() and str(path) in str(error.value)


def test_a_checksum_finds_what_was_changed(original, content, tmp_path):
    read_slim(save(content, tmp_path / 'same.pth'))
    want = content['checksum']
    assert checksum(content) == want
    content['state_dict']['fc.bias'][0] += 1e-6
    torch.save(content, tmp_path / 'slim.pth')
    with pytest.raises(SlimError, match=r'slim\.pth is damaged: its checksum does not match'):
        read_slim(tmp_path / 'slim.pth')


@pytest.mark.parametrize('value', [chaos_damage.doubled(60), chaos_damage.cyclic(), list(range(2 * 10**6))], ids='dcl')
def test_values_without_an_end_are_refused_at_once(content, tmp_path, value):
    content['meta']['x'] = value
    torch.save(content, tmp_path / 'slim.pth')
    start = time.perf_counter()
    with pytest.raises(SlimError, match=r'meta holds more than|larger than it says'):
        read_slim(tmp_path / 'slim.pth')
    assert time.perf_counter() - start < 10


def test_a_packed_archive_is_refused_before_it_is_unpacked(original, tmp_path):
    path = tmp_path / 'slim.pth'
    with zipfile.ZipFile(original[1]) as old, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + bytes(10**7))
    assert path.stat().st_size < 10**6
    with pytest.raises(SlimError, match=r'slim\.pth is no archive that torch\.save wrote'):
        read_slim(path)


@pytest.mark.parametrize('length', range(1, 60))
def test_a_pickle_that_ends_too_soon_is_one_line(original, tmp_path, length):
    path = tmp_path / 'slim.pth'
    with zipfile.ZipFile(original[1]) as old, zipfile.ZipFile(path, 'w') as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:length] if name.endswith('data.pkl') else old.read(name))
    with pytest.raises(SlimError, match=r'slim\.pth is (truncated or not a checkpoint|not a slim)') as error:
        read_slim(path)
    assert str(error.value).isprintable()


def test_an_error_that_quotes_the_file_is_one_line(original, tmp_path):
    path = tmp_path / 'slim.pth'
    with zipfile.ZipFile(original[1]) as old, zipfile.ZipFile(path, 'w') as new:
        for name in old.namelist():
            value = old.read(name)
            new.writestr(name, value.replace(b'X\x01\x00\x00\x000', b'X\x01\x00\x00\x00\x12', 1))
    with pytest.raises(SlimError, match=r'slim\.pth is truncated or not a checkpoint') as error:
        read_slim(path)
    assert str(error.value).isprintable()


class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def get_extra_state(self):
        return {'steps': 3}

    def set_extra_state(self, state):
        self.steps = state['steps'] + 0


def test_what_a_model_raises_at_an_extra_state_is_one_line(tmp_path):
    plan = {key: {} for key in KEYS}
    save_slim(tmp_path / 'slim.pth', Picky(), plan, {})
    content = torch.load(tmp_path / 'slim.pth', weights_only=True)
    assert cut_to_(Picky(), read_slim(tmp_path / 'slim.pth'), 'slim.pth').steps == 3
    for state in ([], {'steps': 'x'}, None):
        content['state_dict']['_extra_state'] = state
        with pytest.raises(SlimError, match=r'slim\.pth cannot be loaded into Picky'):
            cut_to_(Picky(), read_slim(save(content, tmp_path / 'other.pth')), 'slim.pth')


# -- at random ---------------------------------------------------------------------------------------------------------
def check_ends(original, data, same):
    cfg, path = original
    damaged, want = path.with_name('damaged.pth'), weights(load_slim(cfg, path))
    damaged.write_bytes(data)
    for end, values in chaos_files.attempt(cfg, damaged):
        assert end in ('loaded', 'SlimError'), end
        assert end == 'SlimError' or not same or chaos_files.same(values, want), 'it went unnoticed'


@settings(max_examples=150, **FUZZ)
@given(rng=st.randoms(use_true_random=False))
def test_a_damaged_structure_ends_in_a_model_or_in_a_slim_error(original, rng):
    check_ends(original, chaos_damage.damage_structure(original[1].read_bytes(), rng), True)


@pytest.mark.filterwarnings('ignore::UserWarning')
@settings(max_examples=60, **FUZZ)
@given(rng=st.randoms(use_true_random=False), name=st.sampled_from(sorted(chaos_files.FILES)))
def test_a_damaged_file_ends_in_a_model_or_in_a_slim_error(original, rng, name):
    damage = chaos_files.FILES[name]
    check_ends(original, damage.change(original[1].read_bytes(), rng), damage.same)


def test_the_fuzz_would_see_another_exception_and_changed_values(original, content, monkeypatch):
    content['state_dict']['fc.bias'] += 1
    out = io.BytesIO()
    torch.save(content | {'checksum': checksum(content)}, out)
    with pytest.raises(AssertionError, match='it went unnoticed'):
        check_ends(original, out.getvalue(), True)
    monkeypatch.setattr(json, 'loads', lambda *_, **__: {}['x'])
    with pytest.raises(AssertionError, match='KeyError'):
        chaos = chaos_files.attempt(original[0], original[1])
        assert all(end in ('loaded', 'SlimError') for end, _ in chaos), chaos


def test_a_version_that_names_more_values_than_there_are_is_not_written_out(tmp_path):
    value = [1]
    for _ in range(60):
        value = [value, value]
    torch.save({'state_dict': {}, 'structure': '{}', 'version': value}, tmp_path / 'slim.pth')
    with pytest.raises(SlimError, match='of version list'):
        read_slim(tmp_path / 'slim.pth')
