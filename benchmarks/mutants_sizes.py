"""Claims of combing, of the sizes that a forward reads, asks for, compares and computes with."""

from __future__ import annotations

from .mutant import Mutant

_INT, _ARGUMENTS = 'mmcpd/comb/traced_int.py', 'mmcpd/comb/size_equations.py'
_FRESH, _ANOTHER = 'mmcpd/comb/fresh.py', 'mmcpd/comb/another_size.py'

# fmt: off
MUTANTS: tuple[Mutant, ...] = (
    Mutant('numbers-counted', 'mmcpd/comb/size_arguments.py',
           'test_slim/test_computed.py::test_numbers_that_are_counted_by_a_width_stay_as_many',
           'as many numbers are made as in the dense model',
           'value.as_number(argument(position))', 'pass'),
    Mutant('constant-width', _INT,
           'test_slim/test_computed_widths.py::test_a_width_that_became_a_factor_stays_what_it_was',
           'a width that became a factor stays what it was',
           'record.constants.append(Equation(self.expression, as_int(self), self.run.module, place))', 'pass'),
    Mutant('nothing-over', _INT, 'test_slim/test_nothing_over.py',
           'what a width has over, and is nothing, stays nothing',
           'for part in self.parts if not as_int(self) else ():', 'for part in ():'),
    Mutant('compared-width', _INT, 'test_slim/test_slimming.py::test_a_width_that_the_forward_checks_is_an_error',
           'a width that a forward compares with an attribute follows it',
           'self.run.record.equalities.append(found)', 'pass'),
    Mutant('ordered-width', _INT, 'test_slim/test_comparisons.py::test_what_cannot_be_written_stays',
           'a width that a forward compares in size stays',
           "run.record.table.freeze(run.atoms_of(width), COMPARED.format(run.where))", 'pass'),
    Mutant('another-size', _ANOTHER, 'test_comb/test_another_size.py',
           'what takes the size of another tensor goes with it',
           'run.equate(own[place], first, run.cursor.function)', 'pass'),
    Mutant('another-view', _ANOTHER, 'test_comb/test_another_size.py', 'so does a view of another size',
           'run.equate(axis, other, run.cursor.function)', 'pass'),
    Mutant('compared-branch', 'mmcpd/comb/comparing.py', 'test_slim/test_comparisons.py',
           'a branch that compares widths stays the one that it was',
           'record.constants += wide', 'pass'),
    Mutant('compared-twice', 'mmcpd/comb/comparing.py', 'test_slim/test_comparisons.py',
           'a line that compares with two answers freezes', 'if apart or any(', 'if any('),
    Mutant('compared-in-loops', 'mmcpd/slim/call_sites.py', 'test_slim/test_comparisons.py',
           'a comparison in a loop is not written', 'index != OUTCOME or _runs_once(tree, node)', 'True'),
    Mutant('described-width', 'mmcpd/comb/size_arguments.py', 'test_slim/test_comparisons.py',
           "a layer's own attributes are widths", 'vars(module)[name] = width', 'pass'),
    Mutant('squeezed-floor', _ARGUMENTS, 'test_slim/test_squeeze.py',
           'a width that is squeezed where it is one has a floor of two', 'run.record.squeezed += [', 'axes = ['),
    Mutant('equal-pieces', _ARGUMENTS, 'test_comb/test_pieces.py::test_pieces_of_the_channels',
           'equal pieces of the channels stay equally long',
           '    run.tie(pieces.T)\n', '    pass\n'),
    Mutant('slice-from-end', _ARGUMENTS, 'test_comb/test_pieces.py::test_pieces_of_the_channels',
           'a slice from the end counts the kept channels behind it',
           'equation(run, flipped, axis.atoms[place:], where)', 'pass'),
    Mutant('width-of-slice', _ARGUMENTS, 'test_comb/test_pieces.py::test_pieces_of_the_channels',
           'a bound of a slice is the number of kept channels before it',
           'equation(run, value, axis.atoms[:place], where)', 'pass'),
    Mutant('new-width', _FRESH, 'test_comb/test_recurrent.py',
           'a tensor that a forward makes is as wide as the channels that it meets',
           '    equation(run, value, axis.atoms, where)\n', ''),
    Mutant('projection-narrower', 'mmcpd/comb/size_arguments.py', 'test_comb/test_recurrent.py',
           'an LSTM has more hidden units than its projection',
           '            _keep_projected(self.run, args)\n', '            pass\n'),
)
# fmt: on
