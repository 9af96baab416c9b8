"""The list of mutants cannot rot: each still applies, and the tests that must notice are there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks.mutant import Mutant
from benchmarks.mutants import MUTANTS, Outcome, Result, judge_all, table

ROOT = Path(__file__).resolve().parent.parent


def test_there_are_many_under_names_of_their_own():
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names)) >= 30
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize('mutant', MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_into_valid_code(mutant):
    text = (ROOT / mutant.file).read_text()
    changed = mutant.applied(text)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), 'nothing is changed'
    file, _, test = mutant.killer.partition('::')
    assert f'def {test.partition("[")[0]}' in (ROOT / 'tests' / file).read_text()


def test_a_fragment_that_is_not_there_once_is_an_error():
    mutant = Mutant('twice', 'some/file.py', 'some/test.py', 'a claim', 'x', 'y')
    assert mutant.applied('a x b') == 'a y b'
    for text, count in (('a b', 0), ('x x', 2)):
        with pytest.raises(ValueError, match=rf"'x' occurs {count} times in some/file.py, not once: mend the mutant"):
            mutant.applied(text)


def test_the_table_counts_what_became_of_them():
    results = [Result(mutant, kind, 'a test', 1.0) for mutant, kind in zip(MUTANTS[:3], Outcome, strict=True)]
    assert table(results).splitlines()[-1] == '3 mutants: 1 killed, 1 survived, 1 error'


@pytest.mark.slow
def test_a_failing_test_kills_and_a_broken_import_or_a_missing_test_does_not():
    cost = 'mmcpd/cost.py', 'test_comb/test_known_answers.py::test_the_cost_of_resnet50_is_the_published_one'
    killed = Mutant('killed', *cost, 'like terms add up', 'merged.get(key, 0) + term.constant', 'term.constant')
    broken = Mutant('broken', *cost, 'the library is imported', "COSTS = ('macs'", "COSTS = (macs'")
    missing = Mutant(
        'missing', 'mmcpd/cost.py', 'test_comb/test_api.py::test_nowhere', 'it is there', 'BYTES = 4', 'BYTES = 2'
    )
    results = judge_all([killed, broken, missing], jobs=1, limit=300.0, unchecked=True)
    assert [result.outcome for result in results] == [Outcome.KILLED, Outcome.ERROR, Outcome.ERROR]
    assert results[0].detail.startswith('test_comb/')
