"""Loss, gradient and terms of every token against float64 autograd of the paper's definitions."""

import itertools
import subprocess
import sys

import atkd
import pytest
import torch
from support import assert_equal_to_definitions, assert_gradient, batch, exactly, weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_every_dtype(dtype, teacher_dtype):
    assert_equal_to_definitions(*batch(37, 1001, dtype=dtype, teacher_dtype=teacher_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 3, 50257, 128256])
def test_every_vocabulary(dtype, vocab):
    assert_equal_to_definitions(*batch(5, vocab, dtype=dtype))


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "kl"},
        {"objective": "tkd"},
        {"objective": "dkd"},
        {"lam": 0.7},
        {"hard_ratio": 0.0},
        {"hard_ratio": 0.3},
        {"hard_ratio": 1.0},
        {"temperature": 0.5},
        {"temperature": 4.0, "temperature_squared": True},
        {"target": "teacher"},
        {"reduction": "sum"},
        {"reduction": "group-mean"},
        {"reduction": "group-mean", "hard_ratio": 0.3, "ce_weight": 0.5, "kd_weight": 0.25},
        {"reduction": "group-mean", "hard_ratio": 0.0},
        {"reduction": "group-mean", "hard_ratio": 1.0},
        {"selection_rule": "median"},
        {"selection_rule": "median", "reduction": "group-mean"},
        {"selection_rule": "median", "reduction": "group-mean", "target": "teacher", "temperature": 2.0},
        {"num_items_in_batch": 100},
        {"num_items_in_batch": 0.25},
        {"num_items_in_batch": 1e-3},
        {"ce_weight": 0.5},
        {"ce_weight": 0.5, "kd_weight": 0.25, "temperature": 2.0},
        {"kd_weight": 3.0},
        {"ignore_index": 7},
    ],
    ids=str,
)
def test_every_setting(settings):
    student, teacher, labels = batch(24, 500)
    labels[labels == -100] = settings.get("ignore_index", -100)
    assert_equal_to_definitions(student, teacher, labels, **settings)


DIVERGENCES = [
    {"divergence": "reverse-kl"},
    {"divergence": "jsd"},
    {"divergence": "jsd", "beta": 0.1},
    {"divergence": "jsd", "beta": 0.0},
    {"divergence": "jsd", "beta": 1.0},
    {"divergence": "tvd"},
    {"divergence": "skew-kl", "beta": 0.1},
    {"divergence": "skew-reverse-kl", "beta": 0.1},
]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("objective", ["atkd", "plain", "tkd", "dkd"])
def test_every_divergence(divergence, objective):
    settings = {"objective": objective, **divergence}
    assert_equal_to_definitions(*batch(24, 500), **settings)
    assert_equal_to_definitions(*batch(6, 2), **settings)
    more = {"temperature": 2.0, "temperature_squared": True, "ce_weight": 0.5, "reduction": "sum"}
    assert_equal_to_definitions(*batch(9, 130), **settings, **more)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_every_divergence_and_dtype(divergence, dtype, teacher_dtype):
    data = batch(5, 1001, dtype=dtype, teacher_dtype=teacher_dtype)
    for objective in ["atkd", "plain"]:
        assert_equal_to_definitions(*data, objective=objective, **divergence)


def test_plain_divergences_of_two_kinds():
    data = batch(24, 500)
    one, other = (atkd.atkd_loss(*data, objective=name) for name in ["plain", "kl"])
    assert torch.equal(one, other)
    for name, beta, same in [("jsd", 0.0, "forward-kl"), ("jsd", 1.0, "reverse-kl")]:
        limit = atkd.atkd_loss(*data, divergence=name, beta=beta)
        assert torch.equal(limit, atkd.atkd_loss(*data, divergence=same))


@pytest.mark.parametrize("objective", ["atkd", "plain", "tkd", "dkd"])
def test_a_token_that_the_teacher_alone_rules_out(objective):
    """Reverse KL is infinite there and has no gradient; the bounded divergences do not mind."""
    student, teacher, labels = batch(3, 50, ignored=False)
    labels[1], teacher[1, 7] = 3, float("-inf")
    for divergence in ["reverse-kl", "jsd", "tvd", "skew-kl", "skew-reverse-kl"]:
        leaf = student.clone().requires_grad_()
        settings = {"objective": objective, "divergence": divergence, "reduction": "sum", "hard_ratio": 1.0}
        loss = atkd.atkd_loss(leaf, teacher, labels, **settings)
        loss.backward()
        infinite = divergence == "reverse-kl" and objective != "tkd"
        assert loss.isinf() if infinite else loss.isfinite(), divergence
        assert leaf.grad[1].isnan().all() if infinite else leaf.grad[1].isfinite().all(), divergence
        assert leaf.grad[[0, 2]].isfinite().all()


def test_sequences():
    student, teacher, labels = batch(4, 6, 300)
    whole = assert_equal_to_definitions(student, teacher, labels)
    each = assert_equal_to_definitions(student, teacher, labels, selection="sequence")
    assert not torch.equal(whole, each)


@pytest.mark.parametrize("shape", [(3, 7, 200), (9, 200)])
def test_shift_labels(shape):
    student, teacher, labels = batch(*shape)
    gradient = assert_equal_to_definitions(student, teacher, labels, shift_labels=True)
    assert not gradient[..., -1, :].any()


def test_labels_may_be_int32():
    student, teacher, labels = batch(9, 100)
    assert_equal_to_definitions(student, teacher, labels.int())


def test_no_labels():
    student, teacher, _ = batch(9, 100)
    assert_equal_to_definitions(student, teacher, None, target="teacher")


@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
@pytest.mark.parametrize("shape", [(3, 7, 50), (9, 50), (2, 1, 50), (3, 7, 1)])
def test_no_labels_to_shift(shape, ignore_index):
    student, teacher, _ = batch(*shape)
    settings = {"target": "teacher", "shift_labels": True, "ignore_index": ignore_index}
    expected = student.clone().requires_grad_()
    loss = atkd.atkd_loss(expected[..., :-1, :], teacher[..., :-1, :], target="teacher")
    loss.backward()
    actual = student.clone().requires_grad_()
    value, stats = atkd.atkd_loss(actual, teacher, return_stats=True, **settings)
    value.backward()
    assert torch.equal(value, loss) and torch.equal(actual.grad, expected.grad)
    assert all(not column[..., -1].any() for column in stats[:4])
    assert (stats.margin[..., -1] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("items", [0.25, 0.5, 3.0, 1024.0])
def test_any_positive_denominator(items, dtype):
    data = batch(6, 50)
    whole = atkd.atkd_loss(*data, reduction="sum").item()
    for given in [items, torch.tensor(items, dtype=dtype), torch.tensor([items], dtype=dtype)]:
        loss = atkd.atkd_loss(*data, num_items_in_batch=given).item()
        assert abs(loss - whole / items) <= 1e-6 * whole / items


def test_large_logits():
    student, teacher, labels = batch(16, 1000, spread=12.0)
    assert_equal_to_definitions(student, teacher, labels)
    # A confident teacher, and one that is sure of something else.
    rows = torch.arange(16)
    labels[labels == -100] = 5
    teacher[rows, labels] = torch.where(rows % 2 == 0, 60.0, -60.0)
    assert_equal_to_definitions(student, teacher, labels)


def rows_of_a_wider_tensor(logits):
    wide = torch.full((*logits.shape[:-1], logits.shape[-1] + 3), float("nan"), dtype=logits.dtype)
    wide[..., : logits.shape[-1]] = logits
    return wide[..., : logits.shape[-1]]


def every_second_row(logits):
    return logits.repeat_interleave(2, dim=-2)[..., ::2, :]


def time_first(logits):
    return logits.transpose(0, -2).contiguous().transpose(0, -2)


def all_but_the_last_position(logits):
    return torch.cat([logits, logits[..., -1:, :]], dim=-2)[..., :-1, :]


def vocabulary_first(logits):
    return logits.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(8, 101), (2, 4, 101)])
@pytest.mark.parametrize(
    "view",
    [
        rows_of_a_wider_tensor,
        every_second_row,
        time_first,
        all_but_the_last_position,
        vocabulary_first,
    ],
)
def test_strides(view, shape, inplace):
    student, teacher, labels = batch(*shape)
    exact_loss, exact_gradient, _ = exactly(student, teacher, labels)
    student.requires_grad_()
    loss = atkd.atkd_loss(view(student * 1), view(teacher), labels, inplace=inplace)
    loss.backward()
    assert abs(loss.item() - exact_loss) < 1e-6
    assert_gradient(student.grad, exact_gradient, weight(student, labels))


def test_expanded_teacher():
    student, teacher, labels = batch(8, 101)
    assert_equal_to_definitions(student, teacher[:1].expand(8, 101), labels)


@pytest.mark.parametrize("copies", [False, True])
def test_rows_of_two_strides_are_not_copied(copies):
    from atkd._native import rows

    wide, blocks = torch.zeros(4, 6, 110), torch.zeros(2, 3, 4, 5, 110)
    views = [wide[..., :100], wide[:, 1], wide[1:2, ::2], wide, wide[:, :3], wide[:, 1:, 3:70]]
    views += [wide.transpose(0, 1), wide[::2, ::3], blocks[:, :, :3], blocks[:, 0, :, ::2][0]]
    copied = [wide[:1, :1].expand(4, 6, 110), wide[:, :1].expand(4, 6, 110), wide[..., ::2]]
    copied += [blocks[:, :, :3, :4], wide.flatten().as_strided((4, 6, 110), (600, 100, 1))]
    for logits in copied if copies else views:
        assert (rows(logits).data_ptr() != logits.data_ptr()) == copies


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)))
def test_the_shift_by_slices_has_the_bits_of_a_copy(dtypes, inplace):
    student, teacher, labels = batch(3, 7, 513, dtype=dtypes[0], teacher_dtype=dtypes[1])
    results = []
    for shifted in [lambda z: z[:, :-1], lambda z: z[:, :-1].contiguous()]:
        leaf = student.clone().requires_grad_()
        loss = atkd.atkd_loss(
            shifted(leaf * 1), shifted(teacher), labels[:, 1:], inplace=inplace, ce_weight=0.3
        )
        (3 * loss).backward()
        assert leaf.grad[:, :-1].any() and not leaf.grad[:, -1].any()
        results.append((loss, leaf.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_in_place_leaves_the_rest_of_a_slice_alone():
    student, teacher, labels = batch(3, 7, 40, ignored=False)
    logits, part = student.clone().requires_grad_() * 1, (slice(None), slice(1, -1), slice(3, 20))
    atkd.atkd_loss(logits[part], teacher[part], labels[:, 1:-1] % 17, inplace=True)
    changed = logits.detach() != student
    assert changed[part].all() and changed.sum() == changed[part].numel()


@pytest.mark.parametrize("inplace", [False, True])
def test_the_shift_by_slices_needs_no_copy(inplace):
    """In volumes of logits: the student's, the gradient, and the one that slicing's own backward makes."""
    script = f"""
import resource, torch, atkd
B, T, V = 4, 65, 65536
teacher, labels = torch.randn(B, T, V), torch.randint(V, (B, T))
def step(leaf):
    z, tokens = leaf * 1, leaf.shape[1]
    loss = atkd.atkd_loss(z[:, :-1], teacher[:, :tokens - 1], labels[:, 1:tokens], inplace={inplace})
    if {inplace}:
        del z
    loss.backward()
step(torch.randn(B, 8, V).requires_grad_())
leaf = torch.randn(B, T, V).requires_grad_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(leaf)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (B * T * V * 4))
"""
    volumes = float(subprocess.check_output([sys.executable, "-c", script], text=True))
    assert volumes < (2.2 if inplace else 3.2), volumes


SETTINGS = [{}, {"reduction": "sum"}, {"reduction": "group-mean", "selection_rule": "median"}, {"num_items_in_batch": 12}, {"shift_labels": True}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(0, 50), (2, 0, 50), (3, 50)])
def test_no_valid_token_gives_exactly_zero(shape, settings, inplace):
    student, teacher, labels = batch(*shape)
    labels.fill_(-100)
    leaf = student.clone().requires_grad_()
    loss, stats = atkd.atkd_loss(
        leaf * 1, teacher, labels, inplace=inplace, return_stats=True, **settings
    )
    loss.backward()
    assert loss.item() == 0 and not leaf.grad.any() and leaf.grad.shape == shape
    assert all(column.shape == labels.shape and not column.any() for column in stats[:4])
    assert stats.margin.shape == labels.shape and (stats.margin == -torch.inf).all()


def test_non_finite_logits_stay_in_their_row():
    student, teacher, labels = batch(6, 50, ignored=False)
    student[1, 3] = float("nan")
    # A vocabulary padded in both models.
    student[:, 40:] = teacher[:, 40:] = float("-inf")
    labels %= 40
    leaf = student.clone().requires_grad_()
    loss, stats = atkd.atkd_loss(leaf, teacher, labels, return_stats=True)
    loss.backward()
    assert loss.isnan() and stats.tkd.isnan().tolist() == [False, True, False, False, False, False]
    finite = torch.tensor([0, 2, 3, 4, 5])
    assert leaf.grad[finite].isfinite().all() and not leaf.grad[finite, 40:].any()


def test_the_first_lines_of_the_readme():
    student, teacher, _ = batch(9, 100)
    expected = torch.nn.functional.kl_div(
        student.double().log_softmax(-1),
        teacher.double().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    ).item()
    loss = atkd.atkd_loss(student, teacher, objective="kl", target="teacher").item()
    assert abs(loss - expected) <= 1e-6 * expected


def test_tokens_are_ranked_where_float32_has_no_uncertainty_left():
    """By `1 - p(target)` most of these tokens are equal, and which of them are hard would be arbitrary."""
    student, teacher, labels = batch(64, 32000, ignored=False, spread=6.0)
    uncertainty = 1 - teacher.softmax(-1).gather(1, labels[:, None])
    assert (uncertainty == 1).sum() > 32
    stats = atkd.atkd_loss(student, teacher, labels, return_stats=True)[1]
    assert torch.equal(stats.hard, exactly(student, teacher, labels)[2][3])
