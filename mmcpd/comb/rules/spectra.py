"""Fourier transforms, and complex tensors as pairs of real ones."""

from __future__ import annotations

from ..trace import Call, Run


def fourier(run: Run, call: Call) -> None:
    # _fft_r2c(self, dim, normalization, onesided), _fft_c2r(...), _fft_c2c(...): zeros of the other dimensions stay
    source = call.named['self']
    dims = {d % source.dim() for d in call.named['dim']}
    axes = run.axes(source)
    run.freeze_each([axes[d] for d in sorted(dims)], 'a Fourier transform over channels')
    run.set(call.out, [None if d in dims else axis and axis.without_full() for d, axis in enumerate(axes)])


def as_complex(run: Run, call: Call) -> None:
    # view_as_complex(self (..., 2)): (...)
    *axes, pair = run.axes(call.named['self'])
    run.freeze(pair, f'real and imaginary parts in {run.where}')
    run.set(call.out, [axis and axis.without_full() for axis in axes])


def as_real(run: Run, call: Call) -> None:
    # view_as_real(self (...)): (..., 2)
    run.set(call.out, [*(axis and axis.without_full() for axis in run.axes(call.named['self'])), None])
