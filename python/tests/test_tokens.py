"""Weights and losses of single tokens, and vocabularies that are padded."""

import atkd
import pytest
import torch
from support import assert_gradient, batch, exactly

DIVERGENCES = ["forward-kl", "reverse-kl", "jsd"]


def gradient(student, *arguments, **keywords):
    """The loss and its gradient."""
    leaf = student.clone().requires_grad_()
    loss = atkd.atkd_loss(leaf * 1, *arguments, **keywords)
    loss.backward()
    return loss.detach(), leaf.grad


def weights_for(labels):
    random = torch.Generator().manual_seed(7)
    weights = torch.rand(labels.shape, generator=random) * 3 - 1
    weights.view(-1)[0] = 0
    return weights


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(40, 50), (4, 10, 50)])
def test_token_weights(shape, inplace, divergence):
    student, teacher, labels = batch(*shape)
    weights = weights_for(labels)
    settings = {"divergence": divergence, "ce_weight": 0.3, "reduction": "sum"}
    _, unweighted, stats = exactly(student, teacher, labels, **settings)
    hard = stats[3]
    loss, actual = gradient(student, teacher, labels, token_weights=weights, inplace=inplace, **settings)
    exact = weights.double()[..., None] * unweighted
    assert_gradient(actual, exact, 1.3 * 3)
    token_losses = atkd.atkd_loss(student, teacher, labels, **{**settings, "reduction": "none"})
    assert (loss.double() - (weights * token_losses).double().sum()).abs() < 1e-5
    mean, of_mean = gradient(student, teacher, labels, token_weights=weights, **{**settings, "reduction": "mean"})
    valid = int((labels != -100).sum())
    assert_gradient(of_mean, exact / valid, 1.3 * 3 / valid)
    _, after = atkd.atkd_loss(student, teacher, labels, token_weights=weights, return_stats=True, **settings)
    assert torch.equal(after.hard, hard)
    assert torch.allclose(after.loss, weights * token_losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_token_temperatures(divergence, squared):
    student, teacher, labels = batch(4, 10, 50)
    temperature = torch.tensor([0.5, 1.0, 2.0, 4.0, 7.0]).repeat(4, 2)
    margins = atkd.teacher_margins(teacher, labels, temperature=temperature)
    hard = atkd.select_hard(margins, 0.5, valid=labels != -100)
    settings = {"divergence": divergence, "temperature_squared": squared, "ce_weight": 0.3, "reduction": "sum"}
    loss, actual = gradient(student, teacher, labels, temperature=temperature, **settings)
    total, exact = 0.0, torch.zeros_like(student, dtype=torch.float64)
    for t in temperature.unique():
        of_t = (temperature == t) & (labels != -100)
        part = (student[of_t], teacher[of_t], labels[of_t])
        expected, of_part = gradient(*part, temperature=t.item(), hard=hard[of_t], **settings)
        total += expected.item()
        exact[of_t] = of_part.double()
    assert abs(loss.item() - total) < 1e-5 * (1 + abs(total))
    assert_gradient(actual, exact, 1.3 * 49)
    _, stats = atkd.atkd_loss(student, teacher, labels, temperature=temperature, return_stats=True, **settings)
    assert torch.equal(stats.hard, hard) and torch.equal(stats.margin, margins)
    module = atkd.ATKDLoss(**settings)
    assert torch.equal(module(student, teacher, labels, temperature=temperature), loss)
    none = {**settings, "reduction": "none"}
    leaf = student.clone().requires_grad_()
    atkd.atkd_loss(leaf, teacher, labels, temperature=temperature, **none).sum().backward()
    assert torch.equal(leaf.grad, actual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_of_tokens(dtype, weighted):
    student, teacher, labels = batch(4, 10, 50, dtype=dtype)
    weights = weights_for(labels) if weighted else None
    upstream = torch.rand(labels.shape, generator=torch.Generator().manual_seed(8)) - 0.5
    leaf = student.clone().requires_grad_()
    losses, stats = atkd.atkd_loss(
        leaf, teacher, labels, reduction="none", token_weights=weights, ce_weight=0.3, return_stats=True
    )
    assert losses.shape == labels.shape and losses.dtype == torch.float32
    assert torch.equal(losses, stats.loss) and not stats.loss.requires_grad
    assert not losses[labels == -100].any()
    losses.backward(upstream)
    both = upstream if weights is None else upstream * weights
    loss, expected = gradient(
        student, teacher, labels, token_weights=both, ce_weight=0.3, reduction="sum", hard=stats.hard
    )
    assert torch.equal(leaf.grad, expected)
    total = losses.detach() @ upstream.T if losses.dim() == 1 else (losses.detach() * upstream).sum()
    assert (total - loss).abs() < 1e-4
    shifted = atkd.atkd_loss(student, teacher, labels, reduction="none", shift_labels=True)
    assert not shifted[:, -1].any()
    assert torch.equal(
        shifted[:, :-1], atkd.atkd_loss(student[:, :-1], teacher[:, :-1], labels[:, 1:], reduction="none")
    )


def test_losses_of_tokens_under_transforms():
    student, teacher, labels = batch(12, 50)

    def focal(logits):
        losses = atkd.atkd_loss(logits, teacher, labels, reduction="none")
        return (losses**2).sum()

    leaf = student.clone().requires_grad_()
    focal(leaf).backward()
    assert torch.equal(torch.func.grad(focal)(student), leaf.grad)
    compiled = student.clone().requires_grad_()
    torch.compile(focal, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(compiled.grad, leaf.grad)
    # A token's own loss twice over: d(l^2) = 2 l dl.
    losses = atkd.atkd_loss(student, teacher, labels, reduction="none")
    _, expected = gradient(student, teacher, labels, reduction="sum", token_weights=2 * losses)
    assert torch.equal(leaf.grad, expected)
    tangent = torch.randn(student.shape, generator=torch.Generator().manual_seed(9))
    value, directional = torch.func.jvp(focal, (student,), (tangent,))
    assert torch.equal(value, focal(student))
    assert (directional - (leaf.grad * tangent).sum()).abs() < 1e-5 * leaf.grad.abs().sum()
    weights = torch.ones(12)
    for constant in [
        lambda w: atkd.atkd_loss(student, teacher, labels, reduction="none", token_weights=w),
        lambda w: atkd.atkd_loss(student, teacher * w[:, None], labels, reduction="none"),
    ]:
        _, none = torch.func.jvp(constant, (weights,), (weights,))
        assert none.shape == (12,) and not none.any()
    each = torch.func.vmap(lambda *data: atkd.atkd_loss(*data, reduction="none"))(*batch(3, 12, 50))
    assert torch.equal(each, torch.stack([atkd.atkd_loss(*x, reduction="none") for x in zip(*batch(3, 12, 50))]))
    for twice in [
        lambda: torch.autograd.grad(focal(leaf), leaf, create_graph=True),
        lambda: torch.func.grad(lambda x: torch.func.grad(focal)(x).sum())(student),
    ]:
        with pytest.raises(RuntimeError, match="no derivative"):
            twice()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("columns", [(152, 160), (160, 152), (151, 151)])
def test_padded_vocabularies(columns, inplace, dtype):
    vocab = 151
    student, teacher, labels = batch(4, 10, vocab, dtype=dtype)
    widths = [torch.nn.functional.pad(x, (0, n - vocab), value=90.0) for x, n in zip((student, teacher), columns)]
    expected = gradient(student, teacher, labels, inplace=inplace)
    loss, actual = gradient(*widths, labels, vocab_size=vocab, inplace=inplace)
    assert torch.equal(loss, expected[0])
    assert torch.equal(actual[..., :vocab], expected[1]) and not actual[..., vocab:].any()
    margins = atkd.teacher_margins(widths[1], labels, vocab_size=vocab)
    assert torch.equal(margins, atkd.teacher_margins(teacher, labels))
    own = atkd.atkd_loss(*widths, target="teacher", vocab_size=vocab)
    assert torch.equal(own, atkd.atkd_loss(student, teacher, target="teacher"))


@pytest.mark.parametrize("shape", [(1, 11), (0, 11), (1, 1, 11), (2, 0, 11), (1, 3, 11)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_padded_vocabularies_of_few_tokens(shape, reduction):
    student, teacher, labels = batch(*shape, ignored=False)
    labels = labels % 8
    for inplace in [False, True] if reduction == "mean" else [False]:
        leaf = student.clone().requires_grad_()
        loss = atkd.atkd_loss(leaf * 1, teacher, labels, vocab_size=8, reduction=reduction, inplace=inplace)
        loss.sum().backward()
        narrow = student[..., :8].clone().requires_grad_()
        atkd.atkd_loss(narrow, teacher[..., :8], labels, reduction=reduction).sum().backward()
        assert torch.equal(leaf.grad[..., :8], narrow.grad) and not leaf.grad[..., 8:].any()


def test_padded_vocabularies_compiled():
    student, teacher, labels = batch(12, 160)
    labels = labels % 151
    expected = gradient(student, teacher, labels, vocab_size=151)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(student):
        return atkd.atkd_loss(student, teacher, labels, vocab_size=151)

    leaf = student.clone().requires_grad_()
    loss = compiled(leaf)
    loss.backward()
    assert torch.equal(loss, expected[0]) and torch.equal(leaf.grad, expected[1])
    by_grad = torch.func.grad(lambda x: atkd.atkd_loss(x, teacher, labels, vocab_size=151))(student)
    assert torch.equal(by_grad, expected[1])


def test_module():
    student, teacher, labels = batch(12, 160)
    labels = labels % 151
    weights = weights_for(labels)
    module = atkd.ATKDLoss(vocab_size=151, reduction="none", divergence="jsd")
    losses = module(student, teacher, labels, token_weights=weights)
    expected = atkd.atkd_loss(
        student[:, :151], teacher[:, :151], labels, divergence="jsd", reduction="none", token_weights=weights
    )
    assert torch.equal(losses, expected)


@pytest.mark.parametrize(
    "keywords, error, message",
    [
        ({"vocab_size": 0}, ValueError, "vocab_size is 0, but must be from 1 to 50"),
        ({"vocab_size": 51}, ValueError, "vocab_size is 51, but must be from 1 to 50, the columns of student_logits"),
        ({"vocab_size": 20}, ValueError, "vocabulary size 20"),
        ({"token_weights": torch.ones(5)}, ValueError, r"token_weights is \[5\], but must be \[6\]"),
        ({"token_weights": torch.ones(6).double()}, TypeError, "token_weights is torch.float64, but must be torch.float32"),
        ({"token_weights": torch.ones(6, requires_grad=True)}, TypeError, r"give token_weights.detach\(\)"),
        ({"temperature": torch.ones(5)}, ValueError, r"temperature is \[5\], but must be \[6\]"),
        ({"temperature": torch.zeros(6)}, ValueError, "temperature of token 0 is 0"),
        ({"temperature": torch.ones(6, requires_grad=True)}, TypeError, r"give temperature.detach\(\)"),
        ({"token_weights": [1.0] * 6}, TypeError, "token_weights are a list"),
        ({"reduction": "none", "num_items_in_batch": 3}, ValueError, "num_items_in_batch is 3"),
        ({"reduction": "none", "inplace": True}, ValueError, "inplace=True"),
        ({"reduction": "nothing"}, ValueError, '"mean", "sum", "group-mean" or "none"'),
    ],
)
def test_errors(keywords, error, message):
    student, teacher, _ = batch(6, 50)
    labels = torch.full((6,), 49)
    with pytest.raises(error, match=message):
        atkd.atkd_loss(student, teacher, labels, **keywords)


@pytest.mark.parametrize("distance", [0, 1])
def test_infinite_losses_times_weights(distance):
    student, teacher, labels = batch(3, 11, ignored=False)
    for token in [0, 1]:
        teacher[token, (labels[token] + distance) % 11] = -float("inf")
    keywords = {"objective": "plain", "divergence": "reverse-kl", "reduction": "sum"}
    inf = float("inf")
    for weights, expected in [([2.0, 0.0, 1.0], inf), ([-2.0, 0.0, 1.0], -inf), ([1.0, -1.0, 1.0], float("nan"))]:
        loss, actual = gradient(student, teacher, labels, token_weights=torch.tensor(weights), **keywords)
        assert torch.equal(loss, torch.tensor(expected)) or (loss.isnan() and expected != expected)
        assert actual[2].isfinite().all() and (weights[1] != 0 or not actual[1].any())


@pytest.mark.parametrize("weight", [float("inf"), float("nan"), -float("inf")])
def test_weights_that_are_no_numbers(weight):
    student, teacher, labels = batch(6, 50, ignored=False)
    weights = torch.tensor([1.0, weight, 1.0, 0.0, 1.0, 1.0])
    loss, actual = gradient(student, teacher, labels, token_weights=weights)
    assert loss.isnan() and actual[1].isnan().all()
    assert actual[[0, 2, 3, 4, 5]].isfinite().all() and not actual[3].any()
