"""The distillation studies and the teacher's cost in miniature: they run, go on where they were, and report truly."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

pytest.importorskip('mmseg')

from mmengine.structures import PixelData

from benchmarks import studies, study_all, study_report, study_sparsity, teacher_cost
from benchmarks.studies import Case, Scale

SCALE = Scale(iters=4, dense_iters=2, size=32, batch=2, scenes=4, val_scenes=4)
NAMES = ('distillers', 'classes', 'teachers', 'sparsity')


def made_up(case, miou):
    row = {'case': dict(seed=case.seed, kind=case.kind, teacher=case.teacher, target=case.target), 'scale': {}}
    row |= {'miou': miou, 'iou': [miou] * 11, 'params': 100_000 * studies.DENSE.get(case.kind, 1)}
    return row | ({} if case.kind in studies.DENSE else {'left': {'macs': case.target, 'params': 0.3, 'units': 0.4}})


def results(seeds, miou=lambda case: 60.0 + case.seed):
    return [made_up(case, miou(case)) for case in studies.plan(study_all.STUDIES, seeds)]


@pytest.fixture
def document(tmp_path):
    file = tmp_path / 'docs' / 'distillation.md'
    file.parent.mkdir()
    places = [f'<!-- begin {name} -->\nold\n<!-- end {name} -->\n' for name in (*NAMES, 'teacher_cost')]
    file.write_text('before\n' + ''.join(places) + 'after\n')
    return file


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """Four models really trained, of each kind: dense, larger, CIRKD, CWD under the larger one."""
    out = tmp_path_factory.mktemp('studies')
    cases = [Case(0, 'CIRKD'), Case(0, 'CWD', teacher='large')]
    study = studies.Study('few', lambda seed: cases, lambda rows: '', lambda rows, path: None)
    return out, studies.run_all(studies.plan([study], [0]), SCALE, out, out / 'results.json')


def test_each_case_is_planned_once_after_what_it_needs():
    cases = studies.plan(study_all.STUDIES, [0, 1])
    assert len(cases) == len(set(cases)) == 26
    assert len({case.name for case in cases}) == 26
    for at, case in enumerate(cases):
        assert all(need in cases[:at] for need in case.needs())
    assert {case.target for case in cases if case.kind == 'CWD'} == set(study_sparsity.TARGETS)


def test_pruned_models_are_small_and_scored_by_class(ran):
    out, (dense, cirkd, large, cwd) = ran
    assert large['params'] > 2 * dense['params']
    for row in (cirkd, cwd):
        assert row['left']['macs'] <= studies.TARGET
        assert row['params'] < dense['params']
    assert json.loads((out / 'results.json').read_text())[0]['scale'] == dense['scale']
    for row in (dense, large, cirkd, cwd):
        assert len(row['iou']) == 11
        assert row['miou'] == pytest.approx(np.mean([each for each in row['iou'] if each is not None]))
        assert row['versions']['torch']
        assert row['threads'] >= 1


def test_distillers_begin_with_the_dense_model_and_their_teacher(ran):
    out, _ = ran
    cwd = studies.config_of(Case(0, 'CWD', teacher='large'), SCALE, out)
    assert cwd.load_from == str(out / 's0_dense' / 'model.pth')
    assert cwd.model.teacher.checkpoint == str(out / 's0_large' / 'model.pth')
    assert [loss.type for loss in cwd.model.losses] == ['mmcpd.CWDLoss']
    none = studies.config_of(Case(0, 'none'), SCALE, out)
    assert none.model.teacher is None
    assert none.model.losses == []
    assert none.default_hooks == cwd.default_hooks
    assert cwd.default_hooks.prune.target == {'macs': studies.TARGET}
    assert 'prune' not in studies.config_of(Case(0, 'dense'), SCALE, out).default_hooks
    assert none.optim_wrapper == cwd.optim_wrapper


def test_what_is_finished_is_not_run_again_nor_mixed_with_another_scale(ran, monkeypatch):
    out, rows = ran
    monkeypatch.setattr(studies.Runner, 'from_cfg', lambda cfg: pytest.fail('trained again'))
    assert studies.run_case(Case(0, 'CIRKD'), SCALE, out) == rows[1]
    with pytest.raises(ValueError, match='choose another --out'):
        studies.run_case(Case(0, 'CIRKD'), Scale(iters=5), out)


def test_the_score_is_100_for_the_truth_and_falls_with_each_wrong_pixel():
    class Oracle:
        def test_step(self, data):
            for sample in data['data_samples']:
                said = sample.gt_sem_seg.data.clone()
                said[:, : self.rows] = 0
                sample.pred_sem_seg = PixelData(data=said)
            return data['data_samples']

    oracle = Oracle()
    oracle.rows = 0
    iou = studies.class_iou(oracle, SCALE)
    assert set(iou[~np.isnan(iou)]) == {100.0}
    oracle.rows = 16
    worse = studies.class_iou(oracle, SCALE)
    assert np.nanmean(worse) < 90
    assert worse[0] < 100


def test_results_of_one_scale_are_kept_and_others_go(tmp_path):
    file = tmp_path / 'results.json'
    old, new = results([0]), results([1])
    old[0]['scale'] = {'iters': 1}
    studies.save(old, file)
    studies.save(new, file)
    assert len(json.loads(file.read_text())) == len(old) - 1 + len(new)


def test_differences_are_called_what_they_are():
    def rows(*mious):
        return {seed: {'miou': miou} for seed, miou in enumerate(mious)}

    none = rows(60, 61, 62)
    assert study_report.paired(rows(65, 66.1, 66.9), none).endswith('ahead in 3 of 3: better')
    assert study_report.paired(rows(55, 56.1, 56.9), none).endswith('ahead in 0 of 3: worse')
    assert study_report.paired(rows(70, 61, 62.5), none).endswith('ahead in 2 of 3: within noise')
    assert study_report.paired(rows(70), none) == '+10.00 (one seed)'
    assert study_report.paired({}, none) == '-'
    # Student's t for 2 degrees of freedom is 4.303; the standard error of (1, 2, 3) is 1 / sqrt(3).
    assert study_report.interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)


def test_tables_and_plots_come_from_the_results_alone(tmp_path, document, capsys):
    better = {'none': 0, 'KD': 1, 'CWD': 2.5, 'CIRKD': 2, 'dense': 20, 'large': 22}
    rows = results([0, 1], lambda case: 40.0 + case.seed + better[case.kind] + 10 * case.target)
    file = tmp_path / 'results.json'
    file.write_text(json.dumps(rows))
    studies.main('', study_all.STUDIES, ['--report', '--results', str(file), '--docs', str(document)])
    text = document.read_text()
    assert text.count('old') == 1  # the teacher's cost is another script's
    assert text.startswith('before\n')
    assert text.endswith('after\n')
    assert text.count('SYNTHETIC') == len(NAMES)
    assert '| CWD | 35.0% | 2 | 46.50 ± 0.71 | +2.50 ± 0.00, ahead in 2 of 2: better |' in text
    for name in NAMES:
        assert (document.parent / 'images' / f'study_{name}.png').stat().st_size > 5000


def test_a_document_without_a_place_for_a_table_is_refused(document):
    with pytest.raises(ValueError, match='begin other'):
        study_report.write_table(document, 'other', '')


def test_the_cost_of_a_teacher_is_measured_in_pairs(tmp_path, document, capsys):
    arguments = '--only seaformer --rounds 2 --warm-up 0 --batch 2'.split()
    files = ['--results', str(tmp_path / 'cost.json'), '--docs', str(document)]
    teacher_cost.main(teacher_cost.parse_args([*arguments, *files]))
    rows = json.loads((tmp_path / 'cost.json').read_text())['results']
    assert [row['mode'] for row in rows] == ['none', 'self']
    assert rows[0]['ratio'] == 1
    assert rows[1]['seconds'] > 0
    assert '| seaformer, 2 | self |' in document.read_text()
