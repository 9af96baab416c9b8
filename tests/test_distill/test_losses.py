"""Each loss against a naive loop written from its formula, and what all of them promise."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmcpd.distill import CIRKDLoss, CWDLoss, DISTLoss, FeatureLoss, KDLoss

N, C, H, W = 3, 5, 4, 6
IGNORED = 255


def cirkd(**kwargs):
    return CIRKDLoss(num_classes=C, student_channels=C, pixel_queue=32, region_queue=8, **kwargs)


LOSSES = {
    'kd': lambda **kw: KDLoss(tau=2.0, **kw),
    'cwd': lambda **kw: CWDLoss(tau=4.0, **kw),
    'dist': lambda **kw: DISTLoss(tau=2.0, **kw),
    'feature': lambda **kw: FeatureLoss(C, **kw),
    'cirkd': cirkd,
}
MAPS = pytest.mark.parametrize('name', LOSSES)


def pair(seed=0, dtype=torch.float64, shape=(N, C, H, W)):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) * 2 for _ in range(2)]


def labels(seed=1, size=(H, W)):
    return torch.randint(0, C, (N, *size), generator=torch.Generator().manual_seed(seed))


def softmax(values, tau):
    exps = [math.exp(v / tau) for v in values]
    return [e / sum(exps) for e in exps]


def kl(t, s):
    return sum(a * math.log(a / b) for a, b in zip(t, s, strict=True))


def test_kd_is_the_formula():
    s, t = pair(shape=(N, C))
    tau = 2.5
    naive = sum(kl(softmax(t[n].tolist(), tau), softmax(s[n].tolist(), tau)) for n in range(N)) / N * tau**2
    assert KDLoss(tau=tau, loss_weight=3)(s, t).item() == pytest.approx(3 * naive, rel=1e-12)


def test_kd_by_sigmoid_is_the_formula():
    s, t = pair(shape=(N, C))
    tau = 2.5
    naive = 0.0
    for n in range(N):
        for c in range(C):
            p, q = (1 / (1 + math.exp(-x[n, c].item() / tau)) for x in (t, s))
            naive += kl([p, 1 - p], [q, 1 - q]) / N * tau**2
    got = KDLoss(tau=tau, sigmoid=True)(s, t).item()
    assert got == pytest.approx(naive, rel=1e-12)
    assert got != pytest.approx(KDLoss(tau=tau)(s, t).item(), rel=1e-3)


def test_kd_of_one_channel_is_by_sigmoid_unless_told_otherwise():
    s, t = pair(shape=(N, 1, H, W))
    left_open, by_sigmoid, by_softmax = (KDLoss(sigmoid=each)(s, t).item() for each in (None, True, False))
    assert left_open == by_sigmoid > 1e-3 and by_softmax == 0
    valid = labels() != IGNORED
    valid[0] = False
    some = KDLoss(sigmoid=True, ignore_index=IGNORED)(s, t, torch.where(valid, labels(), IGNORED))
    assert some.item() == pytest.approx(KDLoss(sigmoid=True)(s[1:], t[1:]).item(), rel=1e-9)


def test_kd_takes_each_pixel_as_a_sample():
    s, t = pair()
    rows = [x.permute(0, 2, 3, 1).reshape(-1, C) for x in (s, t)]
    assert KDLoss(tau=2)(s, t).item() == pytest.approx(KDLoss(tau=2)(*rows).item(), rel=1e-12)


def test_kd_has_the_gradient_of_cross_entropy():
    s, t = pair(shape=(N, C))
    s.requires_grad_()
    (grad,) = torch.autograd.grad(KDLoss(tau=1)(s, t), s)
    torch.testing.assert_close(grad, (s.softmax(1) - t.softmax(1)).detach() / N)


def test_kd_is_at_temperature_4_times_its_square_by_default():
    s, t = pair(shape=(N, C))
    expected = 16 * sum(kl(softmax(t[n].tolist(), 4), softmax(s[n].tolist(), 4)) for n in range(N)) / N
    assert KDLoss()(s, t).item() == pytest.approx(expected, rel=1e-12)


def test_cwd_is_the_formula():
    s, t = pair()
    tau = 4.0
    naive = 0.0
    for n in range(N):
        for c in range(C):
            naive += kl(softmax(t[n, c].flatten().tolist(), tau), softmax(s[n, c].flatten().tolist(), tau))
    naive *= tau**2 / (N * C)
    assert CWDLoss(tau=tau, loss_weight=3)(s, t).item() == pytest.approx(3 * naive, rel=1e-12)


def test_dist_is_the_formula():
    s, t = pair(shape=(7, C))
    tau, beta, gamma = 2.0, 1.5, 0.5
    p = [softmax(row, tau) for row in s.tolist()]
    q = [softmax(row, tau) for row in t.tolist()]

    def corr(a, b):
        ma, mb = sum(a) / len(a), sum(b) / len(b)
        cov = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
        return cov / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))

    inter = sum(1 - corr(a, b) for a, b in zip(p, q, strict=True)) / len(p)
    columns = zip(zip(*p, strict=True), zip(*q, strict=True), strict=True)
    intra = sum(1 - corr(a, b) for a, b in columns) / C
    loss = DISTLoss(beta=beta, gamma=gamma, tau=tau)(s, t)
    assert loss.item() == pytest.approx(tau**2 * (beta * inter + gamma * intra), rel=1e-10)


def test_dist_knows_no_correlation_with_what_is_constant():
    one = torch.tensor([[1.0, 2.0, 3.0]])
    assert DISTLoss()(one, one).item() == pytest.approx(0, abs=1e-6)  # one row: no relation between samples
    constant = torch.zeros(4, 3, requires_grad=True)
    loss = DISTLoss()(constant, torch.randn(4, 3))
    loss.backward()
    assert loss.isfinite() and constant.grad.isfinite().all()


def test_feature_is_the_mean_squared_difference():
    s, t = pair()
    naive = sum((a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)) / s.numel()
    assert FeatureLoss(C)(s, t).item() == pytest.approx(naive, rel=1e-12)


@pytest.mark.parametrize('shape', [(N, 4), (N, 6, 4), (N, 4, 3, 3)])
def test_feature_projects_unlike_widths_as_a_1x1_convolution(shape):
    torch.manual_seed(0)
    loss = FeatureLoss(4, 7)
    wide = (*shape[:-1], 7) if len(shape) == 3 else (shape[0], 7, *shape[2:])
    s, t = torch.randn(shape), torch.randn(wide)
    flat = s.transpose(1, 2) if len(shape) == 3 else s  # (N, C, L)
    flat = flat.reshape(N, 4, -1, 1)
    conv = F.conv2d(flat, loss.projection.weight[:, :, None, None], loss.projection.bias)
    target = (t.transpose(1, 2) if len(shape) == 3 else t).reshape(N, 7, -1, 1)
    torch.testing.assert_close(loss(s, t), F.mse_loss(conv, target))
    loss(s, t).backward()
    assert loss.projection.weight.grad.abs().sum() > 0


@MAPS
def test_zero_where_teacher_equals_student(name):
    loss = LOSSES[name]()
    if name == 'cirkd':
        loss.projection = torch.nn.Identity()
    x = pair(dtype=torch.float32)[0]
    assert abs(loss(x, x.clone(), labels()).item()) < 1e-6
    assert loss(x, pair(5, torch.float32)[1], labels()).item() > 1e-3  # and only there


@MAPS
def test_gradient_reaches_the_student_and_never_the_teacher(name):
    s, t = (x.float().requires_grad_() for x in pair())
    LOSSES[name]()(s, t, labels()).backward()
    assert t.grad is None
    assert s.grad.isfinite().all() and s.grad.abs().sum() > 0


@MAPS
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_finite_in_half_precision(name, dtype, autocast):
    s, t = ((x * 500).to(dtype) for x in pair())  # exp overflows float16 long before
    s.requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        loss = LOSSES[name]()(s, t, labels())
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert s.grad.isfinite().all()


@MAPS
def test_ignored_positions_change_nothing(name):
    kwargs = {'alpha': 0.0} if name == 'cirkd' else {}  # its batch term has no labels
    s, t = pair(dtype=torch.float32)
    where = labels()
    where[:, 1:3, 2:] = IGNORED
    out = (where == IGNORED).unsqueeze(1)
    torch.manual_seed(0)
    losses = []
    for fill in (0.0, 30.0):
        torch.manual_seed(0)
        loss = LOSSES[name](ignore_index=IGNORED, **kwargs).eval()
        if name == 'cirkd':
            loss.enqueue(F.normalize(t, dim=1), where, where != IGNORED)
        x, y = s.masked_fill(out, fill).requires_grad_(), t.masked_fill(out, -fill)
        losses.append(loss(x, y, where))
        losses[-1].backward()
        assert x.grad.masked_select(out.expand_as(x)).abs().max() == 0
        assert x.grad.abs().max() > 0
    torch.testing.assert_close(*losses)


@MAPS
def test_all_ignored_is_a_zero_with_a_gradient(name):
    s, t = pair(dtype=torch.float32)
    kwargs = {'alpha': 0.0} if name == 'cirkd' else {}
    s.requires_grad_()
    loss = LOSSES[name](ignore_index=IGNORED, **kwargs)(s, t, torch.full((N, H, W), IGNORED))
    loss.backward()
    assert loss.item() == 0 and s.grad.abs().max() == 0


def test_kd_without_the_ignored_is_the_mean_over_the_rest():
    s, t = pair(shape=(N, C))
    some = torch.tensor([1, IGNORED, 0])
    rest = KDLoss()(s[[0, 2]], t[[0, 2]])
    torch.testing.assert_close(KDLoss(ignore_index=IGNORED)(s, t, some), rest)


def test_labels_of_another_resolution_are_taken_by_nearest():
    s, t = pair()
    small = labels()
    small[0, 0] = IGNORED
    large = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    loss = KDLoss(ignore_index=IGNORED)
    torch.testing.assert_close(loss(s, t, large), loss(s, t, small))
    torch.testing.assert_close(loss(s, t, large.unsqueeze(1)), loss(s, t, small))


def test_a_teacher_of_another_stride_is_resized():
    s, t = pair()
    big = F.interpolate(t, scale_factor=2, mode='bilinear')
    back = F.interpolate(big, (H, W), mode='bilinear')
    torch.testing.assert_close(CWDLoss()(s, big), CWDLoss()(s, back))


@pytest.mark.parametrize(
    ('call', 'says'),
    [
        (lambda: KDLoss(tau=0), 'tau must be > 0'),
        (lambda: CWDLoss(loss_weight=-1), 'loss_weight'),
        (lambda: KDLoss()(torch.zeros(2, 3), torch.zeros(2, 4)), 'FeatureLoss'),
        (lambda: CWDLoss()(torch.zeros(2, 3), torch.zeros(2, 3)), 'maps'),
        (lambda: KDLoss(ignore_index=0)(torch.zeros(2, 3), torch.zeros(2, 3)), 'needs labels'),
        (lambda: KDLoss(ignore_index=0)(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(5)), 'do not fit'),
        (lambda: FeatureLoss(3, 5)(torch.zeros(2, 3), torch.zeros(2, 6)), '6'),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
