"""The loss behind the models' last layers, against float64 of the products and the definitions."""

import inspect
import subprocess
import sys

import atkd
import definitions
import pytest
import torch
from atkd import _head, _linear
from atkd._linear import LinearKeywords
from support import SETTINGS as SETTINGS_OF_OPERATORS
from torch.utils.checkpoint import checkpoint

# The errors that are allowed: of a gradient over its largest element, and of the loss.
GRADIENT, LOSS = 2e-5, 1e-5
# Tokens, vocabulary, the models' hidden sizes.
N, V, H, TEACHER_H = 60, 50, 16, 24

WITHOUT_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: its products were not tested"
)
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=WITHOUT_CUDA)])


def layers(shape=(N,), dtype=torch.float32, teacher_dtype=None, device="cpu"):
    """Hidden states, weights and biases of student and teacher, and labels, a fifth of them ignored."""
    random = torch.Generator().manual_seed(0)

    def normal(*size, of=dtype):
        return torch.randn(size, generator=random, dtype=torch.float64).to(device, of)

    student = [normal(*shape, H), 0.7 * normal(V, H), normal(V)]
    of = teacher_dtype or dtype
    teacher = [normal(*shape, TEACHER_H, of=of), 0.6 * normal(V, TEACHER_H, of=of), normal(V, of=of)]
    labels = torch.randint(V, shape, generator=random)
    labels.view(-1)[::5] = -100
    return student, teacher, labels.to(device)


def exactly(student, teacher, labels, upstream=1.0, **settings):
    """Loss, gradients and stats in float64."""
    wide = [each.detach().cpu().double().requires_grad_() for each in student]
    logits, of_teacher = (x @ w.T + b for x, w, b in (wide, [each.cpu().double() for each in teacher]))
    loss, stats = definitions.atkd_loss(logits, of_teacher, labels.cpu(), **settings)
    return loss.item(), torch.autograd.grad(upstream * loss, wide), stats


def ours(student, teacher, labels, upstream=1.0, **settings):
    """The same of the package."""
    leaves = [each.detach().clone().requires_grad_() for each in student]
    (x, w, b), (teacher_x, teacher_w, teacher_b) = leaves, teacher
    loss, stats = atkd.linear_atkd_loss(
        x, w, teacher_x, teacher_w, labels, student_bias=b, teacher_bias=teacher_b, return_stats=True, **settings
    )
    (upstream * loss).backward()
    return loss, [each.grad.cpu() for each in leaves], type(stats)(*[each.cpu() for each in stats])


def assert_close(found, exact, rounding=0.0):
    for one, other in zip(found, exact):
        largest = other.abs().max()
        assert (one.double() - other).abs().max() <= (GRADIENT + rounding) * largest


def assert_equal_to_definitions(student, teacher, labels, chunk_tokens=7, rounding=0.0, upstream=1.0, **settings):
    loss, gradients, stats = exactly(student, teacher, labels, upstream, **settings)
    found, of_ours, terms = ours(student, teacher, labels, upstream, chunk_tokens=chunk_tokens, **settings)
    assert abs(found.item() - loss) <= LOSS * abs(loss)
    assert_close(of_ours, gradients, rounding)
    for name, exact in zip(["uncertainty", "tkd", "dkd", "hard"], stats):
        column = getattr(terms, name)
        if settings.get("shift_labels"):
            column = column[..., :-1]
        if name == "hard":
            assert torch.equal(column, exact)
        else:
            error = (column.double() - exact).abs() - LOSS * (1 + exact.abs())
            assert ((error <= 0) | (column.isnan() & exact.isnan())).all(), name


SETTINGS = [
    {},
    {"divergence": "reverse-kl", "hard_ratio": 0.3},
    {"divergence": "jsd", "ce_weight": 0.3, "temperature": 2.0, "temperature_squared": True},
    {"divergence": "tvd", "objective": "plain"},
    {"objective": "kl", "ce_weight": 1.0, "kd_weight": 0.5},
    {"objective": "dkd", "reduction": "sum"},
    {"reduction": "sum", "lam": 0.4},
    {"reduction": "group-mean"},
    {"reduction": "group-mean", "ce_weight": 0.4},
    {"reduction": "group-mean", "selection_rule": "median", "ce_weight": 0.4},
    {"selection_rule": "median"},
    {"target": "teacher"},
    {"num_items_in_batch": 17},
    {"hard_ratio": 0.0},
    {"hard_ratio": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 7, N])
@on_devices
def test_settings(settings, chunk_tokens, device):
    assert_equal_to_definitions(*layers(device=device), chunk_tokens, **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@on_devices
def test_chunks_that_are_multiplied_together(settings, device, monkeypatch):
    monkeypatch.setattr(_linear, "chunk_tokens_of", lambda *_: (7, 20))
    assert_equal_to_definitions(*layers(device=device), **settings)


@pytest.mark.parametrize("settings", [{}, {"selection": "sequence"}, {"shift_labels": True}], ids=str)
@on_devices
def test_sequences(settings, device):
    data = layers((5, 12), device=device)
    assert_equal_to_definitions(*data, **settings, upstream=3.0)
    if settings.get("selection"):
        group_mean = {"reduction": "group-mean", "selection_rule": "median"}
        assert_equal_to_definitions(*data, **settings, **group_mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_tokens", [7, N])
@on_devices
def test_half_precision(dtype, chunk_tokens, device):
    # On a GPU the gradient of the logits is rounded too.
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype] * (1 if device == "cpu" else 2)
    for teacher_dtype in (dtype, torch.float32):
        data = layers(dtype=dtype, teacher_dtype=teacher_dtype, device=device)
        assert_equal_to_definitions(*data, chunk_tokens, rounding)


@on_devices
def test_half_precision_costs_one_rounding(device):
    random = torch.Generator().manual_seed(3)
    tokens, vocab = 300, 2000

    def normal(*shape):
        return torch.randn(shape, generator=random)

    x, of_teacher = normal(tokens, 64), 0.4 * normal(vocab, 64)
    of_student = of_teacher + 0.05 * normal(vocab, 64)
    x, teacher_w, w, nothing = (
        each.to(device, torch.bfloat16) for each in (x, of_teacher, of_student, torch.zeros(vocab))
    )
    labels = torch.randint(vocab, (tokens,), generator=random).to(device)
    student, teacher = [x, w, nothing], [x, teacher_w, nothing]
    _, exact, _ = exactly(student, teacher, labels)
    _, found, _ = ours(student, teacher, labels, chunk_tokens=64)
    wide = [each.cpu().float().requires_grad_() for each in student[:2]]
    of_teacher = x.cpu().float() @ teacher_w.cpu().float().T
    loss, _ = definitions.atkd_loss((wide[0] @ wide[1].T).double(), of_teacher.double(), labels.cpu())
    for one, eager, other in zip(found, torch.autograd.grad(loss, wide), exact):
        error, of_eager = ((each.double() - other).norm() for each in (one, eager.bfloat16()))
        assert error <= 1.7 * of_eager


@pytest.mark.parametrize("settings", [{}, {"ce_weight": 0.4, "reduction": "group-mean"}, {"selection": "sequence"}], ids=str)
@on_devices
def test_wrong_guesses_are_mended(settings, device, monkeypatch):
    right, wrong = _head.Selection.hard, []

    def mistaken(selection):
        hard = right(selection)
        if selection.known.equal(selection.valid):
            # The last chunk's guess too, but not the selection after it.
            wrong.append(hard)
            return hard if len(wrong) > 1 else ~hard
        return ~hard

    monkeypatch.setattr(_head.Selection, "hard", mistaken)
    assert_equal_to_definitions(*layers((5, 12), device=device), **settings)
    assert len(wrong) > 1


def test_known_margins_need_no_guess(monkeypatch):
    student, teacher, labels = layers()
    logits = teacher[0].double() @ teacher[1].double().T + teacher[2].double()
    log_prob = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(1).float()
    _, exact, stats = exactly(student, teacher, labels)

    def fail(*_):
        raise AssertionError("nothing was guessed")

    monkeypatch.setattr(_head.Call, "_repair", fail)
    monkeypatch.setattr(_head.Call, "_margins", fail)
    for known in ({"teacher_log_prob": log_prob}, {"hard": stats[3]}):
        _, found, terms = ours(student, teacher, labels, chunk_tokens=7, **known)
        assert_close(found, exact)
        assert torch.equal(terms.hard, stats[3])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_settings_of_tokens(reduction):
    (x, w, b), (teacher_x, teacher_w, teacher_b), labels = layers((5, 12))
    random = torch.Generator().manual_seed(4)
    own = {
        "token_weights": torch.rand(labels.shape, generator=random) * 3 - 1,
        "temperature": torch.rand(labels.shape, generator=random) + 0.5,
        "hard": torch.rand(labels.shape, generator=random) < 0.5,
    }
    upstream = torch.rand(labels.shape if reduction == "none" else (), generator=random)
    leaves = [each.clone().requires_grad_() for each in (x, w, b)]
    logits = leaves[0] @ leaves[1].T + leaves[2]
    of_logits = atkd.atkd_loss(logits, teacher_x @ teacher_w.T + teacher_b, labels, reduction=reduction, **own)
    exact = torch.autograd.grad((of_logits * upstream).sum(), leaves)
    loss = atkd.linear_atkd_loss(
        *leaves[:2], teacher_x, teacher_w, labels, student_bias=leaves[2], teacher_bias=teacher_b,
        reduction=reduction, chunk_tokens=7, **own,
    )  # fmt: skip
    assert torch.allclose(loss, of_logits, rtol=LOSS, atol=LOSS)
    assert_close(torch.autograd.grad((loss * upstream).sum(), leaves), exact)


def test_padded_vocabularies():
    (x, w, b), (teacher_x, teacher_w, teacher_b), labels = layers()
    _, exact, _ = exactly((x, w, b), (teacher_x, teacher_w, teacher_b), labels)

    def padded(tensor, rows):
        return torch.cat([tensor, tensor.new_full((rows, *tensor.shape[1:]), 9.0)])

    student = [x, padded(w, 3), padded(b, 3)]
    _, (of_x, of_w, of_b), _ = ours(
        student, [teacher_x, padded(teacher_w, 14), padded(teacher_b, 14)], labels, vocab_size=V, chunk_tokens=7
    )
    assert_close([of_x, of_w[:V], of_b[:V]], exact)
    assert not of_w[V:].any() and not of_b[V:].any()


def test_gradients_are_for_those_that_want_one():
    (x, w, _), (teacher_x, teacher_w, _), labels = layers()
    arguments = teacher_x.requires_grad_(), teacher_w.requires_grad_(), labels
    of_x = x.clone().requires_grad_()
    atkd.linear_atkd_loss(of_x, w, *arguments, chunk_tokens=7).backward()
    of_w = w.clone().requires_grad_()
    atkd.linear_atkd_loss(x, of_w, *arguments, chunk_tokens=7).backward()
    assert of_x.grad is not None and of_w.grad is not None
    assert teacher_x.grad is None and teacher_w.grad is None
    assert not atkd.linear_atkd_loss(x, w, *arguments).requires_grad
    with torch.no_grad():
        assert not atkd.linear_atkd_loss(of_x, of_w, *arguments).requires_grad
    # A weight that the model uses elsewhere too.
    tied = w.clone().requires_grad_()
    (atkd.linear_atkd_loss(of_x, tied, *arguments, chunk_tokens=7) + 3 * tied.sum()).backward()
    assert torch.allclose(tied.grad, of_w.grad + 3)


class Adapted(torch.nn.Module):
    """A frozen layer with an adapter, and the last step of Gemma, of whose result autograd keeps the value."""

    def __init__(self, weight):
        super().__init__()
        self.frozen = torch.nn.Parameter(weight, requires_grad=False)
        random = torch.Generator().manual_seed(5)
        self.down = torch.nn.Parameter(torch.randn(4, H, generator=random))
        self.up = torch.nn.Parameter(0.2 * torch.randn(V, 4, generator=random))
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return 5 * torch.tanh((x @ self.frozen.T + x @ self.down.T @ self.up.T) / 5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_modules(reduction):
    (x, w, _), (teacher_x, teacher_w, _), labels = layers((5, 12))
    head, x = Adapted(w), x.requires_grad_()
    wide, leaf = Adapted(w).double(), x.detach().double().requires_grad_()
    teacher = (teacher_x.double() @ teacher_w.double().T).float()
    weights = torch.arange(60.0).view(5, 12) if reduction == "none" else torch.ones(())
    of_logits = atkd.atkd_loss(wide(leaf).float(), teacher, labels, reduction=reduction)
    (of_logits * weights).sum().backward()
    loss = atkd.linear_atkd_loss(
        x, None, teacher_x, teacher_w, labels, student_head=head, chunk_tokens=7, reduction=reduction
    )
    (loss * weights).sum().backward()
    assert torch.allclose(loss, of_logits, rtol=LOSS)
    found = [x.grad, head.down.grad, head.up.grad]
    assert_close(found, [leaf.grad, wide.down.grad, wide.up.grad])
    assert head.frozen.grad is None and head.unused.grad is None


def test_compile():
    (x, w, b), (teacher_x, teacher_w, _), labels = layers((5, 12))

    def step(x, w, b):
        loss, stats = atkd.linear_atkd_loss(
            x, w, teacher_x, teacher_w, labels, student_bias=b, chunk_tokens=7, return_stats=True
        )
        return loss, stats.hard

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = [each.clone().requires_grad_() for each in (x, w, b)]
        loss, hard = function(*leaves)
        loss.backward()
        results.append([loss, hard, *[each.grad for each in leaves]])
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize("with_gradient", [True, False])
def test_opcheck(with_gradient):
    (x, w, b), (teacher_x, teacher_w, teacher_b), labels = layers()
    leaves = [each.requires_grad_(with_gradient) for each in (x.T.contiguous().T, w, b)]
    of_tokens = labels, None, None, None, None, None
    flags = [with_gradient] * 3
    sizes = None, 7, 1 << 20, None
    no_sparse_teacher = None, None, None, "bucket"
    layers_of_both = *leaves, teacher_x, teacher_w, teacher_b
    arguments = *layers_of_both, *of_tokens, *flags, False, *sizes, *no_sparse_teacher
    torch.library.opcheck(torch.ops.atkd.linear_loss.default, (*arguments, *SETTINGS_OF_OPERATORS))


def test_checkpoint_and_autocast():
    (x, w, _), (teacher_x, teacher_w, _), labels = layers()
    step = lambda x, w: atkd.linear_atkd_loss(x, w, teacher_x, teacher_w, labels, chunk_tokens=7)
    leaves = [[each.clone().requires_grad_() for each in (x, w)] for _ in range(3)]
    step(*leaves[0]).backward()
    checkpoint(step, *leaves[1], use_reentrant=False).backward()
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(*leaves[:2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = step(*leaves[2])
    loss.backward()
    halves = [each.bfloat16() for each in (x, w, teacher_x, teacher_w)]
    assert torch.equal(loss, atkd.linear_atkd_loss(*halves, labels, chunk_tokens=7))
    assert_close([each.grad for each in leaves[2]], [each.grad.double() for each in leaves[0]], 2e-2)


def test_no_tokens():
    student, teacher, labels = layers()
    loss, gradients, _ = ours(student, teacher, torch.full_like(labels, -100), chunk_tokens=7)
    assert loss == 0 and not any(each.any() for each in gradients)
    none = [[each[:0], *rest] for each, *rest in (student, teacher)]
    for rule in ("top-k", "median"):
        loss, gradients, stats = ours(*none, labels[:0], selection_rule=rule)
        assert loss == 0 and stats.hard.shape == (0,) and not gradients[1].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("by_module", [False, True])
def test_float16_neither_overflows_nor_vanishes(reduction, by_module):
    random = torch.Generator().manual_seed(6)
    tokens, vocab = 4096, 32
    x, w = (torch.randn(n, 16, generator=random).half() for n in (tokens, vocab))
    teacher_x, teacher_w = (torch.randn(n, 16, generator=random).half() for n in (tokens, vocab))
    labels = torch.randint(vocab, (tokens,), generator=random)
    upstream = torch.full((tokens,) if reduction == "none" else (), 1.0 if reduction != "none" else 1 / tokens)
    wide = [each.double().requires_grad_() for each in (x, w)]
    exact, _ = definitions.atkd_loss(
        wide[0] @ wide[1].T, teacher_x.double() @ teacher_w.double().T, labels, reduction="sum"
    )
    factor = 1.0 if reduction == "sum" else 1 / tokens
    exact = torch.autograd.grad(exact * factor, wide)
    head = torch.nn.Linear(16, vocab, bias=False, dtype=torch.float16)
    head.weight.data.copy_(w)
    leaves = x.requires_grad_(), head.weight
    loss = atkd.linear_atkd_loss(
        x, None if by_module else head.weight, teacher_x, teacher_w, labels, student_head=head if by_module else None,
        chunk_tokens=500, logits_dtype=torch.float16, reduction=reduction,
    )  # fmt: skip
    # A scaler of gradients multiplies the loss likewise; without it those of hidden states vanish in float16.
    times = 1.0 if reduction == "sum" else 1024.0
    found = torch.autograd.grad((loss * upstream).sum() * times, leaves)
    # The logits' own rounding aside.
    assert_close([each.double() / times for each in found], exact, 2e-2)


def test_tokens_that_are_equal():
    student, teacher, labels = layers()
    for each in (student[0], teacher[0], labels):
        each[10:40] = each[41].clone()
    exact, (_, *gradients), exact_stats = exactly(student, teacher, labels)
    loss, (_, *found), stats = ours(student, teacher, labels, chunk_tokens=4)
    # The last bits of their margins decide which of them are hard.
    assert torch.equal(stats.hard, atkd.select_hard(stats.margin, 0.5, valid=labels != -100))
    assert stats.hard.sum() == exact_stats[3].sum()
    assert abs(loss.item() - exact) <= LOSS * exact
    assert_close(found, gradients)


def test_modules_under_compile_and_autocast():
    (x, w, _), (teacher_x, teacher_w, _), labels = layers()

    def step(x, head, **settings):
        return atkd.linear_atkd_loss(
            x, None, teacher_x, teacher_w, labels, student_head=head, chunk_tokens=7, **settings
        )

    gradients = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        head, leaf = Adapted(w), x.clone().requires_grad_()
        function(leaf, head).backward()
        gradients.append([leaf.grad, head.up.grad, head.down.grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))

    gradients = []
    for inside in (True, False):
        head, leaf = Adapted(w), x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = step(leaf, head, reduction="none").sum()
            if inside:
                loss.backward()
            # The module was first called where gradients were off.
            assert head(leaf).requires_grad
        if not inside:
            loss.backward()
        gradients.append([leaf.grad, head.up.grad, head.down.grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_what_is_overwritten_is_missed():
    (x, w, _), (teacher_x, teacher_w, _), labels = layers()
    hidden = x.clone().requires_grad_() * 1
    losses = atkd.linear_atkd_loss(
        hidden, None, teacher_x, teacher_w, labels, student_head=Adapted(w), reduction="none"
    )
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_transforms_are_refused():
    (x, w, _), (teacher_x, teacher_w, _), labels = layers()
    loss = lambda x: atkd.linear_atkd_loss(x, w, teacher_x, teacher_w, labels)
    for transform in (torch.func.grad(loss), torch.func.vmap(loss), lambda x: torch.func.jvp(loss, (x,), (x,))):
        with pytest.raises(RuntimeError, match="take atkd_loss of the logits"):
            transform(x)


def test_module_of_settings():
    (x, w, _), (teacher_x, teacher_w, _), labels = layers()
    module = atkd.LinearATKDLoss(0.4, ce_weight=0.5, chunk_tokens=7)
    expected = atkd.linear_atkd_loss(x, w, teacher_x, teacher_w, labels, lam=0.4, ce_weight=0.5, chunk_tokens=7)
    assert torch.equal(module(x, w, teacher_x, teacher_w, labels), expected)
    assert "chunk_tokens=7" in repr(module) and "inplace" not in repr(module)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        atkd.LinearATKDLoss(chunk_tokens=0)


def test_keywords():
    parameters = inspect.signature(atkd.linear_atkd_loss).parameters
    keywords = {name for name in parameters if parameters[name].kind == inspect.Parameter.KEYWORD_ONLY}
    assert keywords == {*LinearKeywords.__annotations__, "return_stats"}
    of_logits = inspect.signature(atkd.atkd_loss).parameters
    assert of_logits.keys() - keywords == {"student_logits", "teacher_logits", "labels", "inplace", "cu_seqlens"}
    assert all(parameters[name].default == of_logits[name].default for name in keywords & of_logits.keys())


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"student_weight": torch.zeros(V, 5)}, ValueError, r"student_weight is \[50, 5\].*\[V, 16\]"),
        ({"teacher_weight": torch.zeros(40, 24)}, ValueError, r"\[40, 24\].*vocab_size, 40 or fewer"),
        ({"teacher_weight": torch.zeros(V)}, ValueError, r"teacher_weight is \[50\]"),
        ({"student_bias": torch.zeros(7)}, ValueError, r"student_bias is \[7\].*\[50\]"),
        ({"teacher_hidden": torch.zeros(3, 24)}, ValueError, r"\[60, 16\].*\[3, 24\]"),
        ({"teacher_hidden": torch.zeros(60, 24).half()}, TypeError, "float16, but teacher_weight is torch.float32"),
        ({"student_hidden": torch.zeros(60, 16).double()}, TypeError, "float64"),
        ({"labels": torch.full((60,), V)}, ValueError, r"labels\[0\] is 50.*0 to 49"),
        ({"labels": None}, ValueError, "labels are None"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens is 0"),
        ({"chunk_tokens": 2.5}, TypeError, "chunk_tokens is 2.5"),
        ({"labels": torch.full((60, 2), V)[:, 0]}, ValueError, r"labels\[0\] is 50"),
        ({"temperature": torch.ones(60).index_fill(0, torch.tensor(41), -1)}, ValueError, r"temperature\[41\] is -1"),
        ({"reduction": "total"}, ValueError, "total"),
        ({"reduction": "group-mean", "objective": "kl"}, ValueError, "group"),
        ({"memory_budget": 0}, ValueError, "memory_budget is 0"),
        ({"logits_dtype": torch.float16}, TypeError, "logits_dtype is torch.float16"),
        ({"vocab_size": 51}, ValueError, "vocab_size is 51.*1 to 50"),
        ({"teacher_log_prob": torch.ones(60)}, ValueError, r"teacher_log_prob\[1\] is 1.0"),
        ({"selection": "sequence"}, ValueError, r"needs hidden states \[B, T, H\]"),
        ({"student_weight": None}, TypeError, "student_weight is a NoneType"),
        ({"student_head": torch.nn.Identity()}, ValueError, "give None as student_weight"),
        ({"student_weight": None, "student_head": torch.nn.Identity()}, ValueError, r"made \[60, 16\]"),
        ({"student_weight": None, "student_head": torch.nn.Linear(H, V + 9)}, ValueError, r"made \[60, 59\]"),
        ({"student_weight": None, "student_head": torch.nn.Linear(H, V).double()}, RuntimeError, "dtype"),
        ({"student_weight": None, "student_head": torch.nn.LSTM(H, V)}, TypeError, "made a tuple"),
        ({"inplace": True}, TypeError, "inplace"),
        ({"hard_ratio": 2.0}, ValueError, "2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_errors(change, error, words):
    (x, w, _), (teacher_x, teacher_w, _), labels = layers()
    given = dict(student_hidden=x, student_weight=w, teacher_hidden=teacher_x, teacher_weight=teacher_w, labels=labels)
    with pytest.raises(error, match=words):
        atkd.linear_atkd_loss(**{**given, **change})


MEMORY = """
import torch, atkd
from pathlib import Path
def status(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
tokens, vocab, features = 2048, 64000, 64
x, teacher_x = (torch.randn(tokens, features).bfloat16() for _ in range(2))
w, teacher_w = (torch.randn(vocab, features).bfloat16() for _ in range(2))
x.requires_grad_(), w.requires_grad_()
labels = torch.randint(vocab, (tokens,))
step = lambda n: atkd.linear_atkd_loss(x[:n], w, teacher_x[:n], teacher_w, labels[:n], chunk_tokens=128).backward()
step(256)
x.grad = w.grad = None
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(tokens)
gradients = 4 * vocab * features + sum(each.grad.nbytes for each in (x, w))
print(status("VmHWM") * 1024 - before * 1024 - gradients)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_memory():
    # The logits of both models would take 1049 MB, in bfloat16 524. The allocator keeps more or less of what oneDNN's
    # threads have freed, as they come to be scheduled: from 100 to 172 MB were seen.
    ran = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 262e6, f"{int(ran.stdout) / 1e6:.0f} MB"
