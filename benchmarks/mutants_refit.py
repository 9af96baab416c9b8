"""Claims of the refit and of what absorbs its statistics."""

from __future__ import annotations

from .mutant import Mutant

_ABSORB, _API, _COLUMNS, _LAYER = (f'mmcpd/refit/{name}.py' for name in ('absorb', 'api', 'columns', 'layer'))
_MASKED, _TARGETS, _TRAILS = (f'mmcpd/refit/{name}.py' for name in ('masked_run', 'targets', 'trails'))
_REFIT, _SUMS = 'test_refit/test_refit.py', 'test_refit/test_trails.py'

# fmt: off
MUTANTS: tuple[Mutant, ...] = (
    # -- columns
    Mutant('refit-same-padding', _COLUMNS, 'test_refit/test_columns.py',
           'same padding puts the smaller half first',
           'left = dilation * (len(taps) - 1) // 2', 'left = (dilation * (len(taps) - 1) + 1) // 2'),
    Mutant('refit-outside', _COLUMNS, 'test_refit/test_columns.py',
           'what a tap reads outside the input is zero',
           'torch.where(inside[:, :, None].to(found.device), found, 0.0)', 'found'),
    Mutant('refit-transposed-stride', _COLUMNS, 'test_refit/test_columns.py',
           'a tap of a transposed convolution reads only what the stride reaches',
           'index % stride == 0', 'index == index'),
    Mutant('refit-sample-anew', _COLUMNS, 'test_refit/test_columns.py',
           'the sample is the same each time',
           '.manual_seed(seed)', ''),
    # -- one layer
    Mutant('refit-ridge-pulls', _LAYER, _REFIT,
           'the ridge is a share of the mean of the diagonal',
           'lam = ridge * _mean_diagonal(xx)', 'lam = ridge * xx.diagonal(dim1=1, dim2=2).sum(1)'),
    Mutant('refit-not-centred', _LAYER, _REFIT,
           'moments are centred where there is an intercept',
           'solve(moments, live, ridge, self.home is not None)', 'solve(moments, live, ridge, False)'),
    Mutant('refit-removed-rows', _LAYER, _REFIT,
           'removed rows of a weight stay zero',
           'torch.linalg.cholesky(damped)) * outputs[:, None]', 'torch.linalg.cholesky(damped))'),
    Mutant('refit-removed-bias', _LAYER, _REFIT,
           'removed rows of an intercept stay zero',
           '@ weight)[:, 0]) * outputs', '@ weight)[:, 0])'),
    Mutant('refit-mean-sign', _LAYER, _REFIT,
           'an intercept is taken from a running mean',
           'sign = 1 if self.mean is None else -1', 'sign = 1'),
    Mutant('refit-old-intercept', _LAYER, _REFIT,
           'the old intercept is remembered',
           'double(self.home).clone()', 'double(self.home)'),
    Mutant('refit-waits-for-calls', _LAYER, _REFIT,
           'a layer that is called twice is solved when both calls are in',
           'return self._added % self.form.calls == 0', 'return self._added % self.form.calls == 1'),
    # -- sums
    Mutant('refit-gain', _MASKED, _REFIT,
           'what a sum lacks is divided by the gain on the way there',
           'layer.shift + missing / gain', 'layer.shift + missing'),
    Mutant('refit-small-gain', _MASKED, _REFIT,
           'a gain near zero corrects nothing',
           'torch.where(gain.abs() < SMALL_GAIN,', 'torch.where(gain.abs() < 0,'),
    Mutant('refit-back', _TRAILS, _SUMS,
           'a sum is moved back to where it lies in the output',
           'return torch.autograd.grad(end, start, value)[0]', 'return value.reshape(self.origin.shape)'),
    Mutant('refit-version', _TRAILS, _SUMS,
           'what is overwritten through a view is no longer followed',
           'trail.version == tensor._version else None', 'trail.version >= 0 else None'),
    Mutant('refit-other-readers', _TRAILS, _SUMS,
           'an output that something else reads is not corrected',
           "': origin.reads != len(trail.steps),", "': origin.reads < len(trail.steps),"),
    Mutant('refit-last-layer', _TRAILS, _SUMS,
           'of two layers the one that runs last ends in the sum',
           'operand, trail = max(found', 'operand, trail = min(found'),
    Mutant('refit-only-reader', _TARGETS, _REFIT,
           'a running mean is changed only where its norm alone reads the output',
           'o.mean is None or o.output_reads != 1', 'o.mean is None'),
    Mutant('refit-shared-weight', _TARGETS, _REFIT,
           'a weight that something else reads is left alone',
           'if reader is not None:', 'if reader is None and False:'),
    # -- the whole
    Mutant('refit-undo', _API, _REFIT,
           'a refit that makes the outputs worse is undone',
           'if undone := not after <= before:', 'if undone := not after < torch.inf:'),
    Mutant('refit-masked', _API, 'test_refit/test_arguments.py',
           'a masked model is refused',
           'if teacher is None and _is_masked(', 'if teacher is not None and _is_masked('),
    Mutant('absorb-bias', _ABSORB, 'test_refit/test_absorb.py',
           'the bias takes up the new mean',
           'bias + scale * shift)', 'bias - scale * shift)'),
    Mutant('absorb-removed', _ABSORB, 'test_refit/test_absorb.py',
           'statistics of removed channels stay zero',
           'torch.where(removed, torch.zeros_like(value), value)', 'value + 1e-3 * removed'),
)
