"""CIRKD: its three terms against loops, its queues, and the memory they may take."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmcpd.distill import CIRKDLoss, queues
from tests.helpers import on_two_processes

K, C, H, W = 3, 4, 3, 5
IGNORED = 255


def make(**kwargs):
    torch.manual_seed(0)
    options = {'num_classes': K, 'student_channels': C, 'pixel_queue': 20, 'region_queue': 6, **kwargs}
    return CIRKDLoss(**options)


def features(n=2, c=C, seed=0):
    return torch.randn(n, c, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n=2, seed=1):
    return torch.randint(0, K, (n, H, W), generator=torch.Generator().manual_seed(seed))


def kl_of_rows(s, t):
    """Mean over rows of KL(softmax(t) || softmax(s)), number by number."""
    total = 0.0
    for a, b in zip(s.tolist(), t.tolist(), strict=True):
        za, zb = (sum(math.exp(x) for x in row) for row in (a, b))
        total += sum(math.exp(y) / zb * ((y - math.log(zb)) - (x - math.log(za))) for x, y in zip(a, b, strict=True))
    return total / len(s)


def test_batch_term_is_the_formula_over_all_ordered_pairs():
    s, t = features(3, seed=0), features(3, c=7, seed=1)  # widths may differ
    tau = 0.3
    naive = 0.0
    for i in range(3):
        for j in range(3):
            maps = []
            for x in (s, t):
                a, b = (x[k].flatten(1) / x[k].flatten(1).norm(dim=0) for k in (i, j))
                maps.append(a.T @ b / tau)
            naive += kl_of_rows(*maps)
    loss = make(alpha=2.0, beta=0, gamma=0, tau=tau)
    assert loss(s, t).item() == pytest.approx(2 * naive / 9, rel=1e-10)


def test_batch_term_pools_large_maps():
    s, t = features(seed=0), features(seed=1)
    loss = make(beta=0, gamma=0, max_positions=6)  # (3, 5) -> (2, 3)
    pooled = [F.avg_pool2d(x, 2, ceil_mode=True) for x in (s, t)]
    assert pooled[0].shape[2:] == (2, 3)
    torch.testing.assert_close(loss(s, t), make(beta=0, gamma=0)(*pooled))


def test_memory_terms_are_the_formula():
    loss = make(alpha=0, beta=0.7, gamma=0.2, tau=0.3, temperature=2.0, pixel_keys=12, region_keys=6).double()
    s, t, y = features(seed=0), features(seed=1), labels()
    y[0, 1] = IGNORED
    loss.enqueue(F.normalize(features(seed=2), dim=1), labels(seed=3), torch.ones(2, H, W, dtype=torch.bool))
    loss.eval()  # keys as they are, and the head's batch norm fixed
    torch.manual_seed(5)
    got = loss(s, t, y)

    torch.manual_seed(5)
    pixel_slots = torch.randperm(int(loss.pixel_written.max()))[: 12 // K + 1].tolist()
    region_slots = torch.randperm(int(loss.region_written.max()))[: 6 // K + 1].tolist()
    naive = 0.0
    conv1, norm, _, conv2 = loss.projection
    for weight, queue, written, slots in (
        (0.7, loss.pixel_queue, loss.pixel_written, pixel_slots),
        (0.2, loss.region_queue, loss.region_written, region_slots),
    ):
        keys = torch.stack([queue[c, i] for c in range(K) for i in slots if i < written[c]])
        rows_s, rows_t = [], []
        for n in range(2):
            for i in range(H):
                for j in range(W):
                    if y[n, i, j] == IGNORED:
                        continue
                    x = s[n, :, i, j]
                    hidden = F.relu(norm.weight * (conv1.weight[:, :, 0, 0] @ x + conv1.bias) / (1 + norm.eps) ** 0.5)
                    x = conv2.weight[:, :, 0, 0] @ hidden + conv2.bias
                    rows_s.append(keys @ (x / x.norm()) / 0.3 / 2)
                    rows_t.append(keys @ (t[n, :, i, j] / t[n, :, i, j].norm()) / 0.3 / 2)
        naive += weight * 4 * kl_of_rows(torch.stack(rows_s), torch.stack(rows_t))
    assert got.item() == pytest.approx(naive, rel=1e-10)


def coloured(y):
    """Features that say their pixel's class: one-hot, and its place in the image behind."""
    x = torch.zeros(len(y), K + 1, H, W)
    x[:, :K] = F.one_hot(y, K).permute(0, 3, 1, 2).float()
    x[:, K] = torch.arange(H * W).view(H, W) / 100
    return F.normalize(x, dim=1)


def test_pixel_slots_hold_only_pixels_of_their_class():
    """The released code permutes all positions: a class that covers few of them gets pixels of others."""
    loss = make(student_channels=K + 1, pixels_per_image=4)
    y = torch.zeros(2, H, W, dtype=torch.long)  # class 0 nearly everywhere
    y[0, 0, :2], y[1, 2, 4] = 1, 2
    for _ in range(5):
        loss.enqueue(coloured(y), y, torch.ones_like(y, dtype=torch.bool))
    assert loss.pixel_written.tolist() == [5 * 8, 5 * 2, 5 * 1]
    for c in range(K):
        filled = min(int(loss.pixel_written[c]), 20)
        assert (loss.pixel_queue[c, :filled, :K].argmax(1) == c).all()
        assert (loss.pixel_queue[c, filled:] == 0).all()


def test_pixels_are_chosen_at_random_and_differ():
    loss = make(student_channels=K + 1, pixels_per_image=6)
    y = torch.zeros(1, H, W, dtype=torch.long)
    loss.enqueue(coloured(y), y, torch.ones_like(y, dtype=torch.bool))
    first = loss.pixel_queue[0, :6].clone()
    assert len(first.unique(dim=0)) == 6  # without replacement
    loss.enqueue(coloured(y), y, torch.ones_like(y, dtype=torch.bool))
    assert not torch.equal(first, loss.pixel_queue[0, 6:12])


def test_regions_are_the_normalised_mean_of_a_class_in_an_image():
    loss = make()
    t = F.normalize(features().float(), dim=1)
    y = labels()
    y[1] = 2
    y[0, 0] = IGNORED
    loss.enqueue(t, y, y != IGNORED)
    for c in range(K):
        means = []
        for n in range(2):
            of_class = [t[n, :, i, j] for i in range(H) for j in range(W) if y[n, i, j] == c]
            if of_class:
                means.append(F.normalize(torch.stack(of_class).mean(0), dim=0))
        torch.testing.assert_close(loss.region_queue[c, : len(means)], torch.stack(means))
        assert loss.region_written[c] == len(means)


def test_queue_is_a_ring():
    queue, written = torch.zeros(2, 4, 1), torch.zeros(2, dtype=torch.long)
    for start in (1, 4, 7):  # three rows at a time: 1..9
        queues.write(queue, written, torch.zeros(3, dtype=torch.long), torch.arange(start, start + 3.0).view(3, 1))
    assert queue[0].flatten().tolist() == [9, 6, 7, 8]
    assert queue[1].abs().max() == 0 and written.tolist() == [9, 0]
    queues.write(queue, written, torch.ones(6, dtype=torch.long), torch.arange(1, 7.0).view(6, 1))
    assert queue[1].flatten().tolist() == [5, 6, 3, 4]  # the last four of six, where they belong


def test_keys_come_only_from_slots_that_were_written():
    queue = torch.arange(6.0).view(2, 3, 1)
    assert sorted(queues.sample_keys(queue, torch.tensor([5, 1]), 9).flatten().tolist()) == [0, 1, 2, 3]
    assert queues.sample_keys(queue, torch.tensor([0, 0]), 9).shape == (0, 1)


def test_queues_are_written_before_use_in_training_only():
    loss = make()
    s, t, y = features(seed=0).float(), features(seed=1).float(), labels()
    loss.eval()(s, t, y)
    assert loss.pixel_written.sum() == 0 and loss.terms['pixel'] == 0
    loss.train()(s, t, y)
    assert loss.pixel_written.sum() > 0 and loss.terms['pixel'] > 0 and loss.terms['region'] > 0


def test_queues_live_in_the_state_dict():
    loss, other = make(), make()
    loss(features(seed=0).float(), features(seed=1).float(), labels())
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.pixel_queue, loss.pixel_queue) and other.pixel_queue.abs().sum() > 0
    assert torch.equal(other.pixel_written, loss.pixel_written)


def test_without_memory_terms_there_are_no_queues_and_no_labels():
    loss = make(beta=0, gamma=0)
    assert not loss.state_dict() and not loss.needs_labels
    assert loss(features(seed=0), features(seed=1)) > 0


def test_queues_that_do_not_fit_are_refused_before_they_are_made(monkeypatch):
    made = []
    monkeypatch.setattr(queues, 'available_memory', lambda: {'the CPU': 10**6})
    monkeypatch.setattr(CIRKDLoss, 'register_buffer', lambda *a, **k: made.append(a))
    with pytest.raises(MemoryError, match=r'6,758,400,000 bytes.*the CPU has 1,000,000.*pixel_queue') as error:
        CIRKDLoss(num_classes=150, student_channels=512, pixel_queue=20000, region_queue=2000)
    assert 'beta=gamma=0' in str(error.value) and not made


def test_available_memory_is_of_this_machine():
    free = queues.available_memory()['the CPU']
    assert 10**7 < free < 10**14


@pytest.mark.parametrize(
    ('call', 'says'),
    [
        (lambda: make(num_classes=0), 'num_classes must be at least 1'),
        (lambda: make(tau=0), 'tau'),
        (lambda: make()(features().float(), features().float()), 'needs labels'),
        (lambda: make()(features().float(), features(c=6).float(), labels()), 'teacher_channels=6'),
        (lambda: make()(features().float(), features().float(), labels() + 1), r'label 3 is not in \[0, 3\)'),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def _gather_on(rank, folder):
    """Write one process's share, for the test below."""
    loss = make(student_channels=K + 1)
    y = torch.full((1, H, W), 1 + rank, dtype=torch.long)
    y[:, 1:] = 0 if rank else IGNORED  # the processes have other numbers of rows
    loss.enqueue(coloured(y.clamp(max=K - 1)), y, y != IGNORED)
    torch.save(loss.state_dict(), f'{folder}/{rank}.pth')


def test_queues_are_gathered_over_processes(tmp_path):
    on_two_processes(_gather_on, tmp_path)
    first, second = (torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first if 'queue' in k or 'written' in k)
    assert first['pixel_written'].tolist() == [10, 5, 5] and first['region_written'].tolist() == [1, 1, 1]
