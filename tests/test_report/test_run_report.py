"""The report of real, tiny runs: what the hook and `mmcpd report` write, and what they say is missing."""

from __future__ import annotations

import argparse
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import VISBACKENDS
from mmengine.runner import Runner
from mmengine.visualization import BaseVisBackend

from mmcpd.cli import report as command
from mmcpd.cli.common import UserError
from mmcpd.engine import run_report
from mmcpd.engine.build import build_dense
from mmcpd.engine.class_scores import Boxes, confusion, overlaps, precisions
from mmcpd.engine.course import course
from mmcpd.engine.drawings import as_picture, boxed, colours, readable_on
from mmcpd.engine.predicted import Classifying, Detecting, Segmenting, compare_predictions
from mmcpd.errors import SlimError
from tests.helpers import on_two_processes

torch.set_num_threads(1)
SEEN: list[tuple[int, dict[str, float]]] = []


@VISBACKENDS.register_module()
class Remembering(BaseVisBackend):
    """Another backend than MMEngine's own file."""

    experiment = None

    def _init_env(self):
        pass

    def add_scalars(self, scalar_dict, step=0, file_path=None, **kwargs):
        SEEN.append((step, dict(scalar_dict)))


def config(work_dir):
    """A run of 12 iterations that prunes from the 4th to the 8th."""
    dataset = {'type': 'mmcpd.DigitsDataset', 'split': 'train', 'indices': 48, 'pipeline': [{'type': 'PackInputs'}]}
    loader = {'batch_size': 16, 'num_workers': 0, 'sampler': {'type': 'DefaultSampler', 'shuffle': False}}
    backbone = {'type': 'ResNet', 'depth': 18, 'base_channels': 8, 'stem_channels': 8}
    head = {'type': 'LinearClsHead', 'num_classes': 10, 'in_channels': 64, 'loss': {'type': 'CrossEntropyLoss'}}
    prune = {'type': 'mmcpd.PruneHook', 'begin': 4, 'end': 8, 'interval': 2, 'target': {'macs': 0.6}}
    backends = [{'type': 'LocalVisBackend'}, {'type': 'Remembering'}]
    return Config(
        {
            'default_scope': 'mmpretrain', 'work_dir': str(work_dir),
            'model': {'type': 'ImageClassifier', 'backbone': backbone, 'neck': {'type': 'GlobalAveragePooling'},
                      'head': {**head, 'topk': (1,)}},
            'data_preprocessor': {'num_classes': 10, 'mean': [79.5] * 3, 'std': [90.7] * 3},
            'train_dataloader': {**loader, 'dataset': dataset}, 'val_dataloader': {**loader, 'dataset': dataset},
            'val_evaluator': {'type': 'Accuracy', 'topk': (1,)}, 'val_cfg': {},
            'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.02, 'momentum': 0.9}},
            'train_cfg': {'by_epoch': True, 'max_epochs': 4, 'val_interval': 2},
            'default_hooks': {'prune': prune, 'logger': {'type': 'LoggerHook', 'interval': 1}},
            'randomness': {'seed': 0}, 'visualizer': {'type': 'Visualizer', 'vis_backends': backends},
        }
    )  # fmt: skip


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'tiny'
    SEEN.clear()
    Runner.from_cfg(config(folder)).train()
    return folder


def again(folder, **options):
    given = {'config': None, 'pictures': 0, 'device': 'cpu', 'json': None, 'cfg_options': None}
    command.main(argparse.Namespace(work_dir=str(folder), **{**given, **options}))


def test_training_writes_the_page_and_the_card(run):
    page, card = (run / 'report.html').read_text(), (run / 'card.md').read_text()
    for title in ('The model', 'The training', 'Predictions', 'Layer by layer', 'What is frozen, and why', 'Settings'):
        assert f'<h2>{title}</h2>' in page
    assert page.count('class="chart"') >= 3 and 'accuracy, %' in page and 'Latency: it was not measured' in page
    assert 'Pruned to the target: ImageClassifier (ResNet) keeps' in card and '## Licence\n\nunknown' in card


def test_an_older_run_gets_the_same_report(run, tmp_path):
    before = (run / 'report.html').read_text()
    (run / 'report.html').unlink()
    again(run, pictures=500, json=str(tmp_path / 'run.json'))
    assert (run / 'report.html').read_text() == before
    report = json.loads((tmp_path / 'run.json').read_text())
    assert report['events'] == [6, 8] and report['costs'][0]['iterations'] == list(range(1, 13))
    assert sum(each['count'] for each in report['predictions']['classes']) == 48
    dense, slim = (next(w[key] for w in report['quantities'] if w['name'] == 'weights') for key in ('dense', 'slim'))
    assert dense > slim > 0


def test_the_class_table_agrees_with_the_metric(run, tmp_path):
    again(run, pictures=500, json=str(tmp_path / 'run.json'))
    report = json.loads((tmp_path / 'run.json').read_text())
    top1 = next(each for each in report['quantities'] if 'top1' in each['name'])
    for model in ('dense', 'slim'):
        right = sum(each['count'] * (each[model] or 0) for each in report['predictions']['classes']) / 48
        assert right == pytest.approx(top1[model], abs=1e-3)


def on_the_main_process(rank, folder):
    if rank == 0:
        model = build_dense(config(folder)).eval()
        counts = [each.count for each in compare_predictions(model, model, config(folder)).classes]
        (folder / 'counted').write_text(str(sum(counts)))


def test_one_of_two_processes_compares_all_pictures_and_waits_for_nobody(tmp_path):
    on_two_processes(on_the_main_process, tmp_path)
    assert (tmp_path / 'counted').read_text() == '48'


def test_latency_that_deploy_measured_is_shown(run):
    (run / 'latency.json').write_text(json.dumps({'latency': [{'name': n, 'median': m} for n, m in
                                                              (('dense', 4.0), ('slim', 3.0))]}))  # fmt: skip
    again(run)
    page = (run / 'report.html').read_text()
    (run / 'latency.json').unlink()
    assert '75.0 %</b> of the latency (3.00 ms)' in page and 'it was not measured' not in page
    assert 'no pictures were asked for' in page


def test_latency_of_an_older_slim_file_or_of_something_else_is_not_shown(run):
    foreign, old = run / 'x' / 'latency.json', run / 'latency.json'
    foreign.parent.mkdir()
    foreign.write_text('{"latency": [3]}')
    old.write_text(json.dumps({'latency': [{'name': n, 'median': 1.0} for n in ('dense', 'slim')]}))
    os.utime(old, (1, 1))
    again(run)
    foreign.unlink()
    foreign.parent.rmdir()
    old.unlink()
    assert 'Latency: it was not measured' in (run / 'report.html').read_text()


def test_the_card_names_no_folder_of_the_machine(run, tmp_path, monkeypatch):
    again(run)
    text = (run / 'card.md').read_text()
    assert str(run.parent) not in text and 'mmcpd report tiny`' in text
    (run / '0_first.py').touch()  # another run's
    monkeypatch.chdir(run.parent)
    again(run, config=str(next(each for each in run.glob('*.py') if each.name != '0_first.py')))
    (run / '0_first.py').unlink()
    text = (run / 'card.md').read_text()
    assert '0_first' not in text and 'mmcpd train tiny/' in text


def test_a_damaged_file_is_one_line(run):
    (run / 'prune.json').write_text('{"settings":')
    with pytest.raises(SlimError, match=r'prune\.json is damaged'):
        again(run)
    (run / 'prune.json').unlink()


def test_a_folder_without_a_slim_file_or_a_config_is_refused_in_one_line(run, tmp_path):
    with pytest.raises(UserError, match=r'has no slim\.pth'):
        again(tmp_path)
    (tmp_path / 'slim.pth').write_bytes((run / 'slim.pth').read_bytes())
    with pytest.raises(UserError, match='has no config'):
        again(tmp_path)


def test_a_report_that_fails_costs_no_run_anything(run, monkeypatch):
    monkeypatch.setattr(run_report, 'write_run_report', lambda *_, **__: 1 / 0)
    line = run_report.report_line(run, config(run), None)
    assert line.startswith('there is no report.html (ZeroDivisionError: ')


def test_other_backends_get_what_remains(run):
    left = {step: scalars['prune_macs'] for step, scalars in SEEN if 'prune_macs' in scalars}
    assert left[4] == 1.0 and left[12] <= 0.6 and left[6] < 1.0


# -- the course of a training ------------------------------------------------------------------------------------------
def test_a_validation_stands_at_its_iteration_and_a_resumed_run_replaces(tmp_path):
    def write(name, lines):
        file = tmp_path / name / 'vis_data' / 'scalars.json'
        file.parent.mkdir(parents=True)
        file.write_text('\n'.join(lines))

    row = [
        json.dumps({'loss': 9.0 - n, 'prune_macs': 1.0, 'epoch': n, 'iter': 22 * n, 'step': 22 * n}) for n in (1, 2, 3)
    ]
    write(
        '1', [row[0], json.dumps({'top1': 50.0, 'step': 1}), row[1], row[2], '{"iter": 67, "loss": NaN}', '{"loss": 1']
    )
    write('2', [row[1].replace('7.0', '5.0'), json.dumps({'top1': 60.0, 'step': 2})])
    found = {curve.name: (curve.iterations, curve.values) for curve in course(tmp_path, ['top1']).curves}
    assert found == {'loss': ([22, 44], [8.0, 5.0]), 'top1': ([22, 44], [50.0, 60.0])}


# -- scores by class ---------------------------------------------------------------------------------------------------
def boxes(*rows):
    values = np.array(rows, float).reshape(-1, 6)
    return Boxes(values[:, :4], values[:, 4].astype(int), values[:, 5])


def test_precision_of_boxes_by_hand():
    truth = [boxes((0, 0, 10, 10, 0, 1), (20, 20, 30, 30, 0, 1)), boxes((0, 0, 8, 8, 0, 1))]
    # Sure first: a hit, the same box once more (a miss), a hit of just a half, and nothing for the third.
    found = [boxes((0, 0, 10, 10, 0, 0.9), (0, 0, 10, 9, 0, 0.8), (20, 20, 30, 25, 0, 0.7)), boxes()]
    assert precisions(truth, found, 1).scores[0] == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert precisions(truth, truth, 1).scores[0] == 100 and precisions(truth, truth, 1).counts[0] == 3


def test_pixels_that_are_ignored_count_nowhere():
    truth, guess = np.array([0, 0, 1, 255]), np.array([0, 1, 1, 1])
    assert overlaps(confusion(truth, guess, 2)).scores.tolist() == [50.0, 50.0]


def samples():
    pixels = [SimpleNamespace(data=torch.tensor([[[0, label], [1, 1]]])) for label in (0, 1, 0)]
    there = {'bboxes': torch.tensor([[1.0, 1, 6, 6]]), 'labels': torch.tensor([0]), 'scores': torch.tensor([0.9])}

    class Instances(dict):
        __getattr__ = dict.__getitem__

    segmented = [SimpleNamespace(gt_sem_seg=pixels[0], pred_sem_seg=pixels[n]) for n in (1, 2)]
    detected = [SimpleNamespace(gt_instances=Instances(there), pred_instances=Instances(there)) for _ in range(2)]
    return segmented, detected


def test_pixels_and_boxes_are_scored_and_drawn():
    segmented, detected = samples()
    task = Segmenting()
    task.classes = 2
    assert Segmenting.suits(segmented[0]) and not Segmenting.suits(detected[0]) and not Classifying.suits(detected[0])
    task.add(*segmented)
    dense, slim = task.scores(2)
    assert dense.scores.round(1).tolist() == [50.0, 66.7] and slim.scores.tolist() == [100.0, 100.0]
    views = task.draw(np.zeros((2, 2, 3), np.uint8), ['a', 'b'], *segmented)
    assert [view.label for view in views] == ['picture', 'labels', 'dense', 'slim']
    assert views[1].source == views[3].source != views[2].source
    boxed = Detecting()
    boxed.add(*detected)
    assert boxed.scores(1)[1].scores.tolist() == [100.0]
    views = boxed.draw(np.zeros((8, 8, 3), np.uint8), ['cat'], *detected)
    assert views[0].source != views[2].source == views[3].source


def test_the_class_of_a_box_is_read_on_a_plate_inside_of_the_picture():
    palette = colours(2)
    paper = np.broadcast_to(palette[:1], (80, 120, 3)).astype(np.uint8)  # as bright as the box itself
    corners = np.array([[30.0, 30, 60, 60], [100.0, 5, 119, 40]])
    drawn = boxed(paper, Boxes(corners, np.array([0, 1]), np.array([0.9, 0.8])), ['cat', 'elephant'], palette)
    over, inside = drawn[15:29, 30:60], drawn[5:20, 60:120]
    letters = [(part != palette[which]).any(2) for part, which in ((over, 0), (inside, 1))]
    assert all(0.05 < each.mean() < 0.6 for each in letters), 'letters that are not of the colour of their plate'
    for which in (0, 1):
        dark = readable_on(palette[which]) == 'black'
        part = over if which == 0 else inside
        assert part[letters[which]].astype(int).mean() < 160 if dark else part[letters[which]].mean() > 95
    alone = boxed(paper, Boxes(corners[:1], np.array([0]), np.array([0.1])), ['cat'], palette)
    assert np.array_equal(alone, paper), 'one that is not sure'


@pytest.mark.parametrize('colour', [tuple(each) for each in colours(40).tolist()])
def test_letters_have_a_contrast_of_four_and_a_half(colour):
    def luminance(rgb):
        parts = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
        return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))

    ratio = (luminance(colour) + 0.05) / 0.05
    assert max(ratio, 21 / ratio) == (ratio if readable_on(colour) == 'black' else 21 / ratio) > 4.5


def test_boxes_of_people_have_no_classes_and_turned_ones_no_corners():
    _, (one, _) = samples()
    assert Detecting.suits(one)
    del one.pred_instances['labels']  # as a pose estimator's
    assert not Detecting.suits(one)
    _, (one, _) = samples()
    one.gt_instances['bboxes'] = torch.zeros(1, 5)  # and an angle
    assert not Detecting.suits(one)


def test_a_class_without_a_name_is_its_number():
    sample = SimpleNamespace(gt_label=torch.tensor([0]), pred_label=torch.tensor([9]))
    (view,) = Classifying().draw(np.zeros((8, 8, 3), np.uint8), ['cat'], sample, sample)
    assert view.label == 'label: cat, dense: 9, slim: 9'


def test_a_picture_is_blue_first_and_any_number_of_bands():
    blue_first = np.stack([np.full((2, 2), value, np.uint8) for value in (1, 2, 3)])
    assert as_picture(blue_first, (2, 2))[0, 0].tolist() == [3, 2, 1]
    assert as_picture(np.linspace(-1, 1, 20).reshape(5, 2, 2), (4, 4)).shape == (4, 4, 3)
