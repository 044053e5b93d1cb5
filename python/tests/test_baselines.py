"""What the benchmarks compare with computes what they say it does."""

import sys
from pathlib import Path

import atkd
import definitions
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "python/benchmarks")]

import exact  # noqa: E402
import pytorch_baseline as eager  # noqa: E402

LOSSES = {
    "official": (eager.official_atkd, exact.official_atkd()),
    "se-kd": (eager.se_kd_atkd, exact.atkd()),
    "kl_div": (eager.kl, exact.plain("forward-kl")),
    "forward-kl": (eager.forward_kl, exact.plain("forward-kl")),
    "reverse-kl": (eager.reverse_kl, exact.plain("reverse-kl")),
    "jsd": (eager.jsd, exact.plain("jsd", 0.5)),
    "tvd": (eager.tvd, exact.plain("tvd")),
    "skew-kl": (eager.skew_kl, exact.plain("skew-kl", 0.1)),
    "skew-reverse-kl": (eager.skew_reverse_kl, exact.plain("skew-reverse-kl", 0.1)),
    "trl-0": (lambda *batch: eager.generalized_jsd(*batch, beta=0), exact.plain("forward-kl")),
    "trl-0.5": (eager.generalized_jsd, exact.plain("jsd", 0.5)),
    "trl-0.9": (lambda *batch: eager.generalized_jsd(*batch, beta=0.9), exact.plain("jsd", 0.9)),
    "trl-1": (lambda *batch: eager.generalized_jsd(*batch, beta=1), exact.plain("reverse-kl")),
}


def batch(tokens, vocab, dtype=torch.float32, spread=3.0):
    """Labels are drawn from the teacher: their uncertainties are told apart in float32."""
    random = torch.Generator().manual_seed(0)
    student, teacher = ((spread * torch.randn(tokens, vocab, generator=random)).to(dtype) for _ in range(2))
    labels = teacher.float().softmax(-1).multinomial(1, generator=random).squeeze(1)
    return student, teacher, labels


def value_and_gradient(loss, student, teacher, labels):
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, labels)
    value.backward()
    return value.item(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [24, 25])
@pytest.mark.parametrize("name", LOSSES)
def test_an_eager_loss_is_what_it_is_called(name, tokens, dtype):
    loss, definition = LOSSES[name]
    student, teacher, labels = batch(tokens, 300, dtype)
    value, gradient = value_and_gradient(loss, student, teacher, labels)
    expected, exact_gradient = value_and_gradient(definition, student.double(), teacher.double(), labels)
    assert abs(value / expected - 1) < 1e-5
    assert gradient.dtype == dtype and gradient.isfinite().all()
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    off = (gradient.double() - exact_gradient).abs().amax(-1) / exact_gradient.abs().amax(-1)
    assert off.max() < 1e-4 + rounding


def test_a_definition_is_checked_by_finite_differences():
    student, teacher, labels = batch(6, 9, torch.float64)
    student.requires_grad_()
    for _, definition in LOSSES.values():
        assert torch.autograd.gradcheck(lambda x: definition(x, teacher, labels), student)


def test_the_definition_of_atkd_is_the_one_of_the_other_tests():
    student, teacher, labels = batch(25, 300, torch.float64)
    assert torch.allclose(
        exact.atkd()(student, teacher, labels), definitions.atkd_loss(student, teacher, labels)[0]
    )


def test_the_official_loss_by_hand():
    """Four tokens, two classes, so that DKD is 0; uncertainties 1/2, 1/3, 1/4, 1/5, so that the lower median is 1/4 and
    three tokens are hard; the student says 1/2 everywhere.
    """
    rest = torch.tensor([1 / 2, 1 / 3, 1 / 4, 1 / 5], dtype=torch.float64)
    teacher = torch.stack([1 - rest, rest], -1).log()
    tkd = (1 - rest) * (2 * (1 - rest)).log() + rest * (2 * rest).log()
    for loss, logits in [(eager.official_atkd, teacher.float()), (exact.official_atkd(), teacher)]:
        value = loss(torch.zeros_like(logits), logits, torch.zeros(4, dtype=torch.int64))
        assert abs(value.item() - 0.8 * tkd[:3].mean().item()) < 1e-6


def test_the_official_loss_is_about_twice_the_mean_over_all_tokens():
    """Of an odd number of tokens both have the same hard ones, one more than easy ones."""
    student, teacher, labels = batch(25, 300, torch.float64)
    official, mean = exact.official_atkd(), exact.atkd()
    ratio = (official(student, teacher, labels) / mean(student, teacher, labels)).item()
    assert 25 / 13 < ratio < 25 / 12


def official(*batch):
    return atkd.atkd_loss(*batch, selection_rule="median", reduction="group-mean")


@pytest.mark.parametrize("tokens", [1, 24, 25])
def test_the_package_has_the_conventions_of_the_official_code(tokens):
    student, teacher, labels = batch(tokens, 300)
    value, gradient = value_and_gradient(official, student, teacher, labels)
    # The official code's mean over no easy token is NaN.
    of = exact.official_atkd() if tokens > 1 else lambda *x: exact.atkd()(*x)
    expected, exact_gradient = value_and_gradient(of, student.double(), teacher.double(), labels)
    assert abs(value / expected - 1) < 1e-6
    assert (gradient - exact_gradient).abs().max() < 1e-6 * exact_gradient.abs().max() + 1e-8
    if tokens > 1:
        theirs, _ = value_and_gradient(eager.official_atkd, student, teacher, labels)
        assert abs(value / theirs - 1) < 1e-5


def test_what_float32_leaves_to_chance_and_clamps_break():
    """Where the teacher may say the label, PyTorch's operations in float32 are right without clamps and wrong with
    them. Where it may not, the uncertainties are all 1, and neither is right.
    """
    student, teacher, labels = batch(64, 32000, spread=6.0)
    unlikely = torch.randint(32000, (64,), generator=torch.Generator().manual_seed(0))

    def wrong(loss, definition, labels):
        value, gradient = value_and_gradient(loss, student, teacher, labels)
        expected, exact_gradient = value_and_gradient(definition, student.double(), teacher.double(), labels)
        off = (gradient.double() - exact_gradient).abs().amax(-1) / exact_gradient.abs().amax(-1)
        return max(abs(value / expected - 1), off.max().item())

    official = eager.official_atkd, exact.official_atkd()
    assert wrong(*official, labels) < 1e-4 and wrong(*official, unlikely) > 0.1
    for which in [labels, unlikely]:
        assert wrong(eager.se_kd_atkd, exact.atkd(), which) > 0.1
        assert wrong(atkd.atkd_loss, exact.atkd(), which) < 1e-6


def test_a_package_that_is_missing_is_skipped_with_a_reason():
    import peers

    for of in [peers.liger, peers.speculators, peers.fast_llm, peers.fla_heads, peers.liger_heads]:
        losses, skipped = of()
        assert losses or skipped and all(len(why) > 20 for why in skipped.values())
