"""Sequences that lie one behind the other in a row, and labels that somebody else has shifted."""

import atkd
import pytest
import torch
from support import assert_equal_to_definitions, batch

LENGTHS = [5, 0, 9, 1, 7]
OFFSETS = torch.tensor([0, 5, 5, 14, 15, 22])


def packed(dtype=torch.float32):
    """Student, teacher, labels `[1, 22]` of sequences that OFFSETS tell."""
    student, teacher, labels = batch(1, sum(LENGTHS), 40, dtype=dtype)
    return student, teacher, labels


def loss_and_gradient(student, teacher, labels, **settings):
    leaf = student.clone().requires_grad_()
    loss = atkd.atkd_loss(leaf, teacher, labels, **settings)
    loss.backward()
    return loss.item(), leaf.grad


def by_itself(student, teacher, labels, **settings):
    """Loss and gradient of each sequence in a call of its own, added up in float64 and divided by the tokens."""
    valid, total, gradients = 0, 0.0, []
    for part in zip(*[each[0].split(LENGTHS) for each in (student, teacher, labels)]):
        if part[0].shape[0] == 0:
            continue
        loss, gradient = loss_and_gradient(*[each[None] for each in part], reduction="sum", **settings)
        total, gradients = total + loss, [*gradients, gradient[0].double()]
        counted = part[2][1:] if settings.get("shift_labels") else part[2]
        valid += int((counted != -100).sum())
    return total / valid, torch.cat(gradients)[None] / valid


@pytest.mark.parametrize("shift_labels", [False, True])
@pytest.mark.parametrize("settings", [{}, {"objective": "plain", "divergence": "jsd"}, {"ce_weight": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("flat", [False, True])
def test_packed_sequences_are_each_by_itself(shift_labels, settings, dtype, flat):
    data = packed()
    expected, exact = by_itself(*data, shift_labels=shift_labels, **settings)
    if flat:
        data, exact = [each[0] for each in data], exact[0]
    given = {"selection": "sequence", "cu_seqlens": OFFSETS.to(dtype), "shift_labels": shift_labels}
    loss, gradient = loss_and_gradient(*data, **given, **settings)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(gradient.double(), exact, rtol=1e-5, atol=1e-8)


def test_one_selection_over_packed_sequences():
    student, teacher, labels = packed()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    shifted[:, OFFSETS[1:].sub(1)] = -100
    given = {"shift_labels": True, "cu_seqlens": OFFSETS, "return_stats": True}
    loss, stats = atkd.atkd_loss(student, teacher, labels, **given)
    expected, of_shifted = atkd.atkd_loss(student, teacher, shifted, return_stats=True)
    assert loss == expected and torch.equal(stats.hard, of_shifted.hard)
    # The teacher's arg max needs no labels, which then say only which position has a next one.
    loss = atkd.atkd_loss(student, teacher, target="teacher", **given)[0]
    shifted = torch.zeros_like(labels)
    shifted[:, OFFSETS[1:].sub(1)] = -100
    assert loss == atkd.atkd_loss(student, teacher, shifted, target="teacher")


def test_packed_sequences_in_place_and_compiled_and_of_a_sparse_teacher():
    student, teacher, labels = packed()
    given = {"selection": "sequence", "cu_seqlens": OFFSETS, "shift_labels": True}
    expected, exact = loss_and_gradient(student, teacher, labels, **given)
    logits = student.clone().requires_grad_() * 1
    module = atkd.ATKDLoss(selection="sequence", shift_labels=True, inplace=True)
    assert module(logits, teacher, labels, cu_seqlens=OFFSETS).item() == expected
    assert torch.equal(logits.detach(), exact)
    log_probs, indices = teacher.log_softmax(-1).sort(descending=True)
    of_sparse = atkd.sparse_atkd_loss(student, indices, log_probs, labels, **given)
    assert of_sparse.item() == pytest.approx(expected, rel=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(atkd.atkd_loss, fullgraph=True, backend="aot_eager")
    assert compiled(student, teacher, labels, **given).item() == expected


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"cu_seqlens": torch.tensor([0, 5, 21])}, ValueError, "from 0 to 21, but must from 0 to the 22 tokens"),
        ({"cu_seqlens": torch.tensor([1, 22])}, ValueError, "from 1 to 22"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 22])}, ValueError, "sequence 1 .* from 9 to 5"),
        ({"cu_seqlens": OFFSETS.float()}, TypeError, "cu_seqlens are torch.float32"),
        ({"cu_seqlens": OFFSETS[None]}, ValueError, r"\[1, 6\], but must be \[sequences [+] 1\]"),
        ({"cu_seqlens": OFFSETS.tolist()}, TypeError, "cu_seqlens are a list"),
        ({"cu_seqlens": OFFSETS.to("meta")}, ValueError, "on cpu, but cu_seqlens on meta"),
        ({"cu_seqlens": OFFSETS, "selection_rule": "median"}, ValueError, 'by "top-k" alone: give hard'),
        ({"cu_seqlens": OFFSETS, "shift_labels": "yes"}, TypeError, "shift_labels is 'yes'"),
    ],
)
def test_wrong_offsets(given, error, message):
    with pytest.raises(error, match=message):
        atkd.atkd_loss(*packed(), selection="sequence", **given)


def test_labels_that_are_shifted_already():
    student, teacher, labels = batch(3, 8, 40)
    expected, exact = loss_and_gradient(student, teacher, labels, shift_labels=True)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    # As Hugging Face does, with the others or without.
    for others in [None, labels]:
        loss, gradient = loss_and_gradient(student, teacher, others, shift_labels=shifted)
        assert loss == expected and torch.equal(gradient, exact)
        module = atkd.ATKDLoss(shift_labels=True)
        assert module(student, teacher, others, shift_labels=shifted).item() == expected
    assert module(student, teacher, labels, shift_labels=None).item() == expected
    given = {"shift_labels": True, "ignore_index": -100}
    margins = atkd.teacher_margins(teacher, labels, **given)
    assert torch.equal(margins, atkd.teacher_margins(teacher, shift_labels=shifted))

    layers = torch.eye(40), teacher, torch.eye(40)
    of_hidden = atkd.LinearATKDLoss(shift_labels=True)(student, *layers, None, shift_labels=shifted)
    assert of_hidden.item() == pytest.approx(expected, rel=1e-5)
    log_probs, indices = teacher.log_softmax(-1).sort(descending=True)
    sparse = atkd.SparseATKDLoss(shift_labels=True)
    assert sparse(student, indices, log_probs, None, shift_labels=shifted).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_of_more_dimensions(inplace):
    student, teacher, labels = batch(2, 3, 4, 40)
    gradient = assert_equal_to_definitions(student, teacher, labels)
    logits = student.clone().requires_grad_() * 1
    logits.retain_grad()
    atkd.atkd_loss(logits, teacher, labels, inplace=inplace).backward()
    assert torch.equal(logits.detach() if inplace else logits.grad, gradient)
    with pytest.raises(ValueError, match=r'selection="sequence" needs logits \[B, T, V\]'):
        atkd.atkd_loss(student, teacher, labels, selection="sequence")
