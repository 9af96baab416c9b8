"""What the digest of tensors tells apart, and what it does not."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from mmcpd.engine.hashing import digest, digest_nested

VALUES = [
    torch.arange(6.0).reshape(2, 3), torch.tensor(2.5), torch.arange(4).bool(), torch.ones(3).bfloat16(),
    torch.ones(2, dtype=torch.complex64), torch.zeros(0, 3), torch.arange(6.0).reshape(2, 3).T,
    torch.tensor([1 + 2j, 3j]).conj(), torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
]  # fmt: skip


@pytest.mark.parametrize('value', VALUES, ids=lambda value: f'{value.dtype}{list(value.shape)}')
def test_a_copy_has_the_same_digest_and_a_changed_one_has_not(value):
    plain = value.clone(memory_format=torch.contiguous_format).resolve_conj()
    assert digest({'a': value}) == digest({'a': plain})
    if plain.numel():
        plain.view(-1).view(torch.uint8)[0] ^= 1
        assert digest({'a': value}) != digest({'a': plain})
    assert digest({'a': value}) != digest({'b': value})
    assert digest({'a': value}) != digest({'a': value[None]})


def test_dtypes_and_names_count():
    zero = torch.zeros(4, dtype=torch.int32)
    assert digest({'a': zero}) != digest({'a': zero.float()})
    both = {'a': torch.ones(2), 'b': torch.zeros(2)}
    assert digest(both) == digest(dict(reversed(both.items())))
    assert digest(both) != digest({'b': both['a'], 'a': both['b']})


def test_views_of_one_storage_are_told_apart():
    base = torch.arange(4.0)
    assert digest({'a': base[:2], 'b': base[2:]}) != digest({'a': base[:2], 'b': base[:2]})


def test_nested_values():
    content = {'a': [torch.ones(2), None, 1, 'x', 2.5, b'x', {3, 4}, torch.float32], 'b': OrderedDict(c=(1, 2))}
    assert digest_nested(content) == digest_nested(dict(content))
    for other in (1.0, True, '1', [1], (1,), torch.tensor(1)):
        assert digest_nested([1]) != digest_nested([other])
    with pytest.raises(ValueError, match='a builtin_function_or_method has no checksum'):
        digest_nested({'a': print})
