# Every option of combing and pruning, with the value that inheriting this file gives. To use it, a config of one's own
# needs this file among its bases, the model inside a Distiller, and the two hooks; what differs is overridden by name:
#
#     _base_ = ['mmpretrain::resnet/resnet50_8xb32_in1k.py', 'mmcpd::_base_/cpd.py']
#     model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='KDLoss')])
#     custom_hooks = [dict(type='mmcpd.CombHook'), dict(type='mmcpd.PruneHook')]
#     prune = dict(target=0.4, round_to=8)
#
# The same on the command line: --cfg-options prune.target=0.4. An argument of a hook wins over what stands here; the
# hooks stand in each config because MMEngine replaces lists, and many models' configs have hooks of their own.

comb = dict(
    heads='dim',  # what an attention gives up: 'dim', the same index in each head; 'head', whole heads
    ignore=[],  # groups that are never pruned, by name: ['backbone.conv1', 'backbone.layer1.*']
    strict=False,  # True: an operation without a rule is an error; False: what goes through it stays
    input_shape=None,  # (C, H, W) of the example that is combed with; None: from the pipelines
    save='comb.json',  # in the work dir; None: not at all
)

prune = dict(
    # When: iterations (int) or shares of the run (float); dense before `begin`, fine-tuning after `end`.
    begin=0,
    end=0.6,
    interval=10,  # iterations of scoring between two removals
    # How far: the share of the dense model's metric that remains.
    target=0.5,
    metric='macs',  # 'macs', 'params', 'memory' (bytes of activations) or 'units'
    curve='cubic',  # from 1 to target: 'cubic', 'linear', 'cosine'; 'paper': units_per_event each time until target
    units_per_event=None,
    # Which. An importance with options is a dict: dict(type='curvature', probes=2).
    importance='hessian',  # 'hessian', 'curvature', 'group_fisher', 'magnitude', 'random'
    normalize='memory',  # the score divided by: 'memory', 'channel_memory', 'macs', 'params' or 'none'
    seed=0,  # of importances that draw random numbers
    # What stays.
    min_units=1,  # in each group
    round_to=1,  # groups with more units than this keep a multiple of it: 8 suits most hardware
    ignore=[],  # groups that this run leaves alone, by name as above: those of frozen_stages, for one
)
