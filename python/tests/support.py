"""Batches, and the errors that are allowed."""

import atkd
import definitions
import torch
from atkd._settings import DEFAULTS

# What the operators take after the tensors.
SETTINGS = tuple(DEFAULTS.values())

EPS = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


def batch(*shape, dtype=torch.float32, teacher_dtype=None, seed=0, ignored=True, spread=3.0):
    """Random student, teacher and labels; a quarter of the tokens ignored."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(shape, generator=random) for _ in range(2))
    labels = torch.randint(shape[-1], shape[:-1], generator=random)
    if ignored:
        labels[torch.rand(shape[:-1], generator=random) < 0.25] = -100
    return student.to(dtype), teacher.to(teacher_dtype or dtype), labels


def exactly(student, teacher, labels, upstream=1.0, **settings):
    """Loss, gradient and stats in float64, from the definitions, on the CPU."""
    wide = student.detach().cpu().double().requires_grad_()
    labels = None if labels is None else labels.cpu()
    loss, stats = definitions.atkd_loss(wide, teacher.detach().cpu().double(), labels, **settings)
    (gradient,) = torch.autograd.grad(upstream * loss, wide)
    return loss.item(), gradient, stats


def assert_gradient(actual, exact, weight):
    """`weight` is (kd_weight + ce_weight) * scale / T, `scale` with the upstream gradient in it."""
    largest = exact.abs().amax(-1, keepdim=True)
    rounding = torch.clamp(exact.abs() * EPS[actual.dtype], min=TINY[actual.dtype])
    allowed = 1e-6 * largest + 5e-7 * weight + rounding
    error = (actual.cpu().double() - exact).abs()
    worst = (error / allowed).max().item() if error.numel() else 0.0
    assert worst <= 1, f"the gradient is off by {worst} times what is allowed"
    assert exact.abs().max() > 0 or not actual.any()


def weight(student, labels, **settings):
    """(kd_weight + ce_weight) * scale / T: what the allowed error of a gradient grows with."""
    temperature = settings.get("temperature", 1.0)
    kd_weight = settings.get("kd_weight", 1.0)
    if settings.get("temperature_squared"):
        kd_weight *= temperature**2
    if settings.get("shift_labels"):
        labels = labels[..., 1:]
    items = settings.get("num_items_in_batch")
    if items is None and settings.get("reduction") == "sum":
        items = 1
    elif items is None:
        valid = student[..., 0].numel()
        if labels is not None:
            valid = int((labels != settings.get("ignore_index", -100)).sum())
        items = max(valid, 1)
    if settings.get("reduction") == "group-mean":
        # No group is smaller, but for those that the settings of a test leave all but empty.
        items = 1
    return (kd_weight + settings.get("ce_weight", 0.0)) / float(items) / temperature


def assert_equal_to_definitions(student, teacher, labels, **settings):
    """Loss, gradient and stats of the package against float64 autograd of the definitions."""
    loss, gradient, stats = exactly(student, teacher, labels, **settings)
    logits = student.detach().clone().requires_grad_()
    actual, terms = atkd.atkd_loss(logits, teacher, labels, return_stats=True, **settings)
    actual.backward()

    assert actual.dtype == torch.float32 and actual.shape == ()
    assert abs(actual.item() - loss) <= 1e-6 * abs(loss) + 2e-7, (actual.item(), loss)
    assert logits.grad.dtype == student.dtype
    assert_gradient(logits.grad, gradient, weight(student, labels, **settings))
    for name, column, exact in zip(terms._fields, terms, stats):
        if settings.get("shift_labels"):
            assert not column[..., -1].any()
            column = column[..., :-1]
        column = column.cpu()
        if name == "hard":
            assert torch.equal(column, exact)
        else:
            error = (column.double() - exact).abs()
            both_nan = column.isnan() & exact.isnan()
            assert (both_nan | (error <= 2e-6 * (1 + exact.abs()))).all(), (name, error.max())
    return logits.grad
