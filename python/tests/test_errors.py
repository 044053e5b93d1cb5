"""Every error is a ValueError or TypeError that carries the numbers."""

import atkd
import pytest
import torch
from support import SETTINGS, batch

STUDENT, TEACHER, LABELS = batch(6, 50, ignored=False)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lam": 7.0}, "lambda is 7, but must be in \\[0, 1\\]"),
        ({"hard_ratio": -0.5}, "hard ratio is -0.5"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"ce_weight": -1.0}, "cross-entropy weight is -1"),
        ({"kd_weight": float("nan")}, "distillation weight is NaN"),
        ({"objective": "jsd"}, 'objective is "jsd"'),
        ({"divergence": "kl"}, 'divergence is "kl"'),
        ({"objective": "kl", "divergence": "jsd"}, 'divergence is "jsd", .* "plain" takes all'),
        ({"beta": 1.5}, "beta is 1.5, but must be in \\[0, 1\\]"),
        ({"divergence": "skew-kl", "beta": 1.0}, "beta elsewhere\\) is 1, but must be in \\[0, 1\\)"),
        ({"target": "student"}, 'target is "student"'),
        ({"reduction": "average"}, 'reduction is "average"'),
        ({"selection_rule": "mean"}, 'selection_rule is "mean"'),
        ({"reduction": "group-mean", "objective": "kl"}, "there are no groups: take the mean"),
        ({"selection": "token"}, 'selection is "token"'),
    ],
    ids=str,
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        atkd.atkd_loss(STUDENT, TEACHER, LABELS, **settings)
    with pytest.raises(ValueError, match=message):
        atkd.ATKDLoss(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"divergence": None}, "divergence is None, but must be of type str"),
        ({"lam": "x"}, "lam is 'x', but must be of type float"),
        ({"temperature_squared": "no"}, "temperature_squared is 'no', but must be of type bool"),
        ({"ignore_index": None}, "ignore_index is None, but must be of type int"),
    ],
    ids=str,
)
def test_types_of_settings(settings, message):
    with pytest.raises(TypeError, match=message):
        atkd.atkd_loss(STUDENT, TEACHER, LABELS, **settings)
    with pytest.raises(TypeError, match=message):
        atkd.ATKDLoss(**settings)


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_group_means_have_no_denominator(items):
    for loss in [atkd.ATKDLoss(reduction="group-mean"), lambda *x, **y: atkd.atkd_loss(*x, reduction="group-mean", **y)]:
        with pytest.raises(ValueError, match="num_items_in_batch is .*7.* leave num_items_in_batch out"):
            loss(STUDENT, TEACHER, LABELS, num_items_in_batch=items)


@pytest.mark.parametrize(
    "student, teacher, labels, settings, message",
    [
        (STUDENT, TEACHER[:5], LABELS, {}, r"\[6, 50\], but teacher_logits are \[5, 50\]"),
        (STUDENT, TEACHER, LABELS[:5], {}, r"labels are \[5\].* must be \[6\]"),
        (STUDENT[0], TEACHER[0], LABELS[0], {}, r"\[50\], but must be \[N, V\]"),
        (STUDENT[:, :0], TEACHER[:, :0], LABELS, {}, r"\[6, 0\]"),
        (STUDENT, TEACHER, None, {}, "labels are None"),
        (STUDENT, TEACHER, LABELS, {"selection": "sequence"}, r"\[B, T, V\], but they are \[6, 50\]"),
        (STUDENT, TEACHER.to("meta"), LABELS, {}, "on cpu, but teacher_logits on meta"),
        (STUDENT, TEACHER, LABELS.to("meta"), {}, "on cpu, but labels on meta"),
        (STUDENT, TEACHER, LABELS + 50, {}, "label of token 0 is .*vocabulary size 50"),
        (STUDENT, TEACHER, LABELS - 99, {}, "ignore_index -100"),
        (STUDENT, TEACHER[:, :40], LABELS, {}, "vocab_size, 40 or fewer"),
        (STUDENT[:, :40], TEACHER, LABELS, {}, "vocab_size, 40 or fewer"),
        (STUDENT, TEACHER, LABELS, {"num_items_in_batch": torch.ones(2)}, r"batch is \[2\]"),
        (STUDENT, TEACHER, LABELS, {"temperature": torch.ones(2)}, r"temperature is \[2\]"),
        (STUDENT, TEACHER, LABELS[0], {"shift_labels": True}, r"labels are \[\]"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_values(student, teacher, labels, settings, message, inplace):
    leaf = student.clone().requires_grad_()
    with pytest.raises(ValueError, match=message):
        atkd.atkd_loss(leaf * 1, teacher, labels, inplace=inplace, **settings)


@pytest.mark.parametrize(
    "student, teacher, labels, message",
    [
        (STUDENT.double(), TEACHER, LABELS, "student_logits are torch.float64"),
        (STUDENT, TEACHER.int(), LABELS, "teacher_logits are torch.int32"),
        (STUDENT, TEACHER, LABELS.float(), "labels are torch.float32"),
        (STUDENT.numpy(), TEACHER, LABELS, "student_logits are a ndarray"),
        (STUDENT, TEACHER, LABELS.tolist(), "labels are a list"),
    ],
)
def test_types(student, teacher, labels, message):
    with pytest.raises(TypeError, match=message):
        atkd.atkd_loss(student, teacher, labels)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("items", [-1, -3, -0.5, float("nan"), float("inf"), -float("inf"), 1e-46, 1e300])
def test_denominators(items, as_tensor):
    given = torch.tensor(items, dtype=torch.float64) if as_tensor else items
    for function in [atkd.atkd_loss, atkd.ATKDLoss()]:
        with pytest.raises(ValueError, match=f"num_items_in_batch is {items}".replace("+", "[+]")):
            function(STUDENT, TEACHER, LABELS, num_items_in_batch=given)
    if as_tensor:
        torch._dynamo.reset()
        compiled = torch.compile(atkd.atkd_loss, fullgraph=True, backend="aot_eager")
        with pytest.raises(ValueError, match="num_items_in_batch must be positive and finite"):
            compiled(STUDENT, TEACHER, LABELS, num_items_in_batch=given)


@pytest.mark.parametrize("items", ["3", [3], 1j, torch.tensor(1j)])
def test_types_of_denominators(items):
    with pytest.raises(TypeError, match="num_items_in_batch is a .*, but must be a number"):
        atkd.atkd_loss(STUDENT, TEACHER, LABELS, num_items_in_batch=items)


@pytest.mark.parametrize("name", ["lam", "hard_ratio", "temperature", "ce_weight", "kd_weight", "beta"])
@pytest.mark.parametrize(
    "number",
    [torch.nn.Parameter, lambda x: x.requires_grad_(), lambda x: x.requires_grad_() * 1],
)
def test_numbers_that_would_learn(name, number):
    settings = {name: number(torch.tensor(0.5))}
    for call in [
        lambda: atkd.atkd_loss(STUDENT, TEACHER, LABELS, **settings),
        lambda: atkd.ATKDLoss(**settings),
    ]:
        with pytest.raises(TypeError, match=f"{name} is .* requires a gradient.*{name}.detach"):
            call()
    with pytest.raises(TypeError, match="num_items_in_batch is a .* requires a gradient"):
        items = number(torch.tensor(6.0))
        atkd.atkd_loss(STUDENT, TEACHER, LABELS, num_items_in_batch=items)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_shift_labels_is_a_bool(value):
    calls = [
        lambda: atkd.atkd_loss(STUDENT, TEACHER, LABELS, shift_labels=value),
        lambda: atkd.ATKDLoss(shift_labels=value),
        lambda: atkd.teacher_margins(TEACHER, LABELS, shift_labels=value),
        lambda: atkd.linear_atkd_loss(STUDENT, STUDENT, TEACHER, TEACHER, LABELS, shift_labels=value),
        lambda: atkd.LinearATKDLoss(shift_labels=value),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"shift_labels is {value!r}, but must be True or False"):
            call()


def test_labels_as_a_setting():
    for module in [atkd.ATKDLoss, atkd.LinearATKDLoss, atkd.SparseATKDLoss]:
        with pytest.raises(TypeError, match="shift_labels is a Tensor.* give labels that are shifted already to the call"):
            module(shift_labels=LABELS)


def test_wrong_labels_as_shift_labels():
    with pytest.raises(ValueError, match=r"labels are \[5\].* must be \[6\]"):
        atkd.atkd_loss(STUDENT, TEACHER, shift_labels=LABELS[:5])
    with pytest.raises(TypeError, match="labels are torch.bool"):
        atkd.atkd_loss(STUDENT, TEACHER, LABELS, shift_labels=torch.tensor(True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [{}, {"cu_seqlens": torch.tensor([0, 2, 6])}], ids=["whole", "packed"])
def test_dtypes_of_labels_that_are_shifted(dtype, packed):
    labels = LABELS.to(dtype)
    with pytest.raises(TypeError, match=f"labels are {dtype}, but must be int64 or int32"):
        atkd.atkd_loss(STUDENT, TEACHER, labels, shift_labels=True, **packed)
    with pytest.raises(TypeError, match=f"labels are {dtype}, but must be int64 or int32"):
        atkd.teacher_margins(TEACHER, labels, shift_labels=True)


@pytest.mark.parametrize("settings", [{}, {"shift_labels": True}, {"selection": "sequence"}], ids=str)
def test_labels_of_packed_sequences_are_a_tensor(settings):
    offsets = torch.tensor([0, 2, 6])
    with pytest.raises(TypeError, match="labels are a list, but must be a torch.Tensor"):
        atkd.atkd_loss(STUDENT, TEACHER, LABELS.tolist(), cu_seqlens=offsets, **settings)


def test_the_fused_head_takes_no_packed_sequences():
    offsets = torch.tensor([0, 2, 6])
    for loss in [atkd.linear_atkd_loss, atkd.LinearATKDLoss()]:
        with pytest.raises(ValueError, match="linear_atkd_loss takes no cu_seqlens: give labels that are shifted"):
            loss(STUDENT, STUDENT, TEACHER, TEACHER, LABELS, cu_seqlens=offsets)


def test_a_failed_call_leaves_the_logits_alone():
    student = STUDENT.clone().requires_grad_() * 1
    labels = LABELS.clone()
    labels[5] = 50
    with pytest.raises(ValueError, match="token 5 is 50"):
        atkd.atkd_loss(student, TEACHER, labels, inplace=True)
    assert torch.equal(student.detach(), STUDENT)


def test_scale():
    for scale, error, message in [
        (torch.tensor(1.0, dtype=torch.float64), TypeError, "scale is torch.float64"),
        (torch.ones(2), ValueError, r"scale is \[2\]"),
    ]:
        with pytest.raises(error, match=message):
            torch.ops.atkd.loss(STUDENT, TEACHER, LABELS, scale, None, None, None, False, False, None, *SETTINGS)


@pytest.mark.parametrize("name, value, of", [("vocab_start", 3, "vocab_group"), ("token_counts", [6], "token_group")])
def test_what_is_told_without_ranks(name, value, of):
    message = rf"{name} is .*, but tells of a {of}, and none is given: leave it out, or give the {of}"
    with pytest.raises(ValueError, match=message):
        atkd.atkd_loss(STUDENT, TEACHER, LABELS, **{name: value})
    layers = torch.ones(6, 3), torch.ones(50, 3)
    with pytest.raises(ValueError, match=message):
        atkd.linear_atkd_loss(*layers, *layers, LABELS, **{name: value})
    if name == "vocab_start":
        with pytest.raises(ValueError, match=message):
            atkd.teacher_margins(TEACHER, LABELS, vocab_start=value)
