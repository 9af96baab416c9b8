"""Claims of rotating."""

from __future__ import annotations

from .mutant import Mutant

_OBSERVE, _FOLLOW, _LEDGER = 'mmcpd/rotate/observe.py', 'mmcpd/rotate/follow.py', 'mmcpd/rotate/ledger.py'
_HEADS, _TRIAL, _API, _REPORT = (f'mmcpd/rotate/{name}.py' for name in ('heads', 'trial', 'api', 'report'))
_TEST, _KINDS, _ALONE = (f'test_rotate/test_{name}.py' for name in ('rotate', 'kinds', 'left_alone'))

# fmt: off
MUTANTS: tuple[Mutant, ...] = (
    # -- the change of basis
    Mutant('rotate-sorted', _HEADS, f'{_TEST}::test_dimensions_are_sorted_by_what_they_carry',
           'the first dimension carries most', '(basis * sign * s.sqrt()).T', '(basis * sign * s.sqrt()).T.flip(0)'),
    Mutant('rotate-balanced', _HEADS, f'{_TEST}::test_two_matrices_are_balanced_exactly_at_every_rank',
           'both sides take the square root of what a dimension carries', 's.sqrt()', 's'),
    Mutant('rotate-signs', _HEADS, f'{_TEST}::test_a_second_time_changes_nothing',
           'signs are chosen, so that a second rotation changes nothing',
           'sign = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))', 'sign = torch.ones_like(u[:1])'),
    Mutant('rotate-bias', _HEADS, _KINDS, 'a bias is one more column',
           'return flat if self.bias_index is None else', 'return flat if True else'),
    # -- what is observed
    Mutant('rotate-output', _OBSERVE, _ALONE, 'what the model gives out is not turned',
           "watch.read(tensor, 'it is an output of the model')", 'pass'),
    Mutant('rotate-mask', _OBSERVE, _ALONE, 'a mask is a reader of what it was made of',
           "self.read(other, 'it is added to scores')", 'pass'),
    Mutant('rotate-groups', _OBSERVE, _ALONE, 'a grouped convolution mixes no channels',
           'call.kind is LayerKind.TRANSPOSED or call.groups > 1', 'call.kind is LayerKind.TRANSPOSED'),
    Mutant('rotate-tokens', _OBSERVE, _ALONE, 'scores between channels are no attention between tokens',
           'if meeting[0] is not None and meeting[1] is not None and not', 'if not'),
    Mutant('rotate-factor', _FOLLOW, _ALONE, 'a factor for each channel forbids it',
           'if width is None or factor.broadcast_to(out.shape).stride(width) != 0:', 'if width is None:'),
    Mutant('rotate-shared', _LEDGER, _ALONE, 'keys that several heads share are left alone',
           'clash = table[numbers] != others', 'clash = table[numbers] == FREE'),
    Mutant('rotate-reader', _FOLLOW, _ALONE, 'an operation that is no movement forbids it',
           'self.read(tensor, reason)', 'self.rows(tensor)'),
    # -- the safety net
    Mutant('rotate-trial', _TRIAL, f'{_TEST}::test_a_wrong_pairing_is_found_and_left_alone_also_behind_a_dead_branch',
           'a wrong pairing is found', 'if gap <= min(', 'if gap is not None or gap <= min('),
    Mutant('rotate-random', _TRIAL, f'{_TEST}::test_a_wrong_pairing_is_found_and_left_alone_also_behind_a_dead_branch',
           'a wrong pairing is found behind a dead branch', 'for randomise in (False, True):',
           'for randomise in (False,):'),
    Mutant('rotate-finite', _API, _TEST, 'weights that are not finite are refused',
           'if not bool(tensors[name].isfinite().all()):', 'if False:'),
    # -- the report
    Mutant('rotate-found', _REPORT, _TEST, 'heads that are left alone count as found',
           'return _heads((*self.rotated, *self.skipped))', 'return _heads(self.rotated)'),
)
