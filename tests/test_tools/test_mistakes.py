"""Every mistake in a command line or a config is one line; an exit status says what kind of end it was."""

from __future__ import annotations

import argparse

import pytest

from mmcpd.cli.common import guard, one_line, shortened, was_interrupted
from mmcpd.engine.stage import check_target
from mmcpd.errors import ProofError, TargetError

HOOK = 'default_hooks.prune'
LINES = [
    (f'{HOOK}.target=0.5', 'target names quantities'),
    (f'{HOOK}.target=macs', 'target names quantities'),
    (f'{HOOK}.target.macs=half', 'target names quantities'),
    (f'{HOOK}.target.flops=0.5', "unknown quantity 'flops'"),
    (f'{HOOK}.begin=early', 'begin is an iteration (int) or a share'),
    (f'{HOOK}.interval=2.5', 'interval counts iterations, at least 1: got 2.5'),
    (f'{HOOK}.curve=3', "unknown curve '3'"),
    (f'{HOOK}.importance=3', "unknown importance '3'"),
    (f'{HOOK}.round_to=eight', "round_to counts units, at least 1: got 'eight'"),
    (f'{HOOK}.heads=1', "unknown heads '1'"),
    (f'{HOOK}.strict=maybe', "strict is True or False: got 'maybe'"),
    (f'{HOOK}.ways=3', "PruneHook has no option 'ways'"),
    ('default_hooks=5', 'default_hooks is a dict of dicts'),
    ('custom_hooks=5', 'custom_hooks a list of dicts'),
    ('model.student.backbone.depht=18', "unexpected keyword argument 'depht'"),
    ('model.student.backbone.depth=19', '19'),
    ('model.student=5', 'student is the config of a model'),
    ('model.losses=5', 'losses is a list of dicts, got 5'),
    ('model.losses.0.tau=hot', "KDLoss: tau is a finite number: got 'hot'"),
    ('model.teacher=123', "teacher must be 'self'"),
    ('model.task_weight=much', 'task_weight is a number, 0 or more'),
    ('train_cfg.max_epochs=many', '; '),
    ('optim_wrapper.optimizer.lr=fast', '; '),
    ('train_dataloader.batch_size=-3', '; '),
    ('optim_wrapper.optimizer.type=Adamm', '(TypeError; '),
]


def only_line(err):
    lines = [line for line in err.splitlines() if line.strip() and 'Warning' not in line and 'warn' not in line]
    assert len(lines) == 1 and len(lines[0]) < 600, err
    return lines[0]


@pytest.mark.parametrize(('option', 'message'), LINES)
def test_a_wrong_option_on_the_command_line_is_one_line(tool, pruning, option, message):
    code, _, err = tool('train', pruning, '--cfg-options', option)
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    assert code == 1 and len(lines) == 1 and 'Traceback' not in err
    assert message in lines[0] and len(lines[0]) < 600


@pytest.mark.parametrize(
    'kind', [TypeError, RuntimeError, AssertionError, AttributeError, IndexError, ZeroDivisionError]
)
def test_whatever_a_config_s_own_code_raises_is_one_line(kind, capsys):
    def main(args):
        exec(compile(f'raise {kind.__name__}("no way")', 'theirs.py', 'exec'), {'__name__': 'theirs'})

    assert guard(main, argparse.Namespace(debug=False)) == 1
    assert capsys.readouterr().err == f'error: no way ({kind.__name__}; --debug shows where)\n'
    with pytest.raises(kind):
        guard(main, argparse.Namespace(debug=True))


def raised(error, module):
    try:
        exec(compile('raise error', 'code.py', 'exec'), {'__name__': module, 'error': error})
    except Exception as found:  # noqa: BLE001 - whatever was given
        return found
    raise AssertionError


def test_a_fault_of_our_own_is_told_from_a_mistake():
    assert one_line(raised(ValueError('interval is 0'), 'mmcpd.prune.schedule')) == 'interval is 0'
    fault = one_line(raised(TypeError('int + str'), 'mmcpd.prune.schedule'))
    assert (
        fault.startswith('int + str (TypeError in mmcpd.prune.schedule: --debug shows where') and 'report it' in fault
    )
    assert 'report' not in one_line(raised(TypeError('int + str'), 'theirs'))


def test_where_the_traceback_is_is_said():
    error = raised(RuntimeError('boom'), 'theirs')
    error.__notes__ = ['the traceback is in work/traceback.txt']
    assert one_line(error) == 'boom (RuntimeError; the traceback is in work/traceback.txt)'


def test_somebody_else_s_text_is_cut_to_its_first_sentences():
    text = 'Weights only load failed. ' + 'In PyTorch 2.6, we changed the default value.\n\t(1) Re-running it. ' * 13
    short = shortened(text)
    assert short.startswith('Weights only load failed. ') and len(short) <= 300 and '\n' not in short
    assert short.endswith('.')
    assert shortened('x' * 1000) == 'x' * 297 + '...'
    assert shortened('one\n  two') == 'one two' and shortened('') == ''
    assert one_line(raised(KeyError(), 'theirs')).startswith('KeyError (KeyError')


@pytest.mark.parametrize(
    ('error', 'status'), [(TargetError('short'), 3), (ProofError('differs'), 4), (ValueError('x'), 1), (None, 0)]
)
def test_the_exit_status_says_how_it_ended(error, status):
    def main(args):
        if error is not None:
            raise error

    assert guard(main, argparse.Namespace(debug=False)) == status


def test_a_checkpoint_that_is_not_at_its_target_is_slimmed_with_status_3(tool, pruning, tmp_path):
    code, _, err = tool('train', pruning)
    assert code == 0, err
    work = tmp_path / 'work_dirs' / 'prune'
    code, out, err = tool('slim', pruning, work / 'epoch_2.pth', '--out', tmp_path / 'partly.pth')
    assert code == 3 and (tmp_path / 'partly.pth').is_file()
    assert f'{work / "epoch_2.pth"} is partly pruned: ' in out
    assert f'error: {tmp_path / "partly.pth"} is written, and it is partly pruned: ' in only_line(err)
    code, out, err = tool('slim', pruning, work / 'epoch_4.pth', '--out', tmp_path / 'whole.pth')
    assert code == 0 and 'is pruned to the target: ' in out, err


def test_a_state_at_its_target_is_no_error():
    check_target({'left': {'macs': 0.5}, 'target': {'macs': 0.5}}, 'slim.pth')
    with pytest.raises(TargetError):
        check_target({'left': {'macs': 0.5, 'params': 0.7}, 'target': {'macs': 0.5, 'params': 0.6}}, 'slim.pth')


def test_causes_that_run_in_a_circle_are_followed_once():
    first, second = ValueError('a'), OSError('b')
    first.__cause__, second.__cause__ = second, first
    assert not was_interrupted(first)
    second.__cause__ = KeyboardInterrupt()
    assert was_interrupted(first)
