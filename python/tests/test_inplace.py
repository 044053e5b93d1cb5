"""`inplace=True`: the gradient lies where the logits were, and autograd knows."""

import atkd
import pytest
import torch
from support import assert_gradient, batch, exactly, weight
from torch.utils.checkpoint import checkpoint

STUDENT, TEACHER, LABELS = batch(3, 4, 50, ignored=False)


def cross_entropy(logits):
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), LABELS.flatten())


def z_loss(logits):
    return 1e-2 * logits.logsumexp(-1).square().mean()


def negative_entropy(logits):
    return 0.1 * (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def mean_squared_error(logits):
    return torch.nn.functional.mse_loss(logits.reshape(TEACHER.shape), TEACHER)


def the_loss_again(logits):
    teacher = TEACHER.view(logits.shape)
    return atkd.atkd_loss(logits, teacher, LABELS.view(logits.shape[:-1]), objective="kl")


def itself(logits):
    return logits, logits


def flat_view_and_its_base(logits):
    return logits.view(-1, 50), logits


def base_and_its_flat_view(logits):
    return logits, logits.view(-1, 50)


def two_views(logits):
    return logits.view(-1, 50), logits.view(12, 50)


def slice_and_its_base(logits):
    return logits[:, :, :], logits


USES = [cross_entropy, z_loss, negative_entropy, mean_squared_error, the_loss_again]
VIEWS = [itself, flat_view_and_its_base, base_and_its_flat_view, two_views, slice_and_its_base]


def in_place(logits):
    return atkd.atkd_loss(
        logits, TEACHER.view(logits.shape), LABELS.view(logits.shape[:-1]), inplace=True
    )


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("views", VIEWS)
def test_a_use_after_raises(views, use):
    overwritten, used = views(STUDENT.clone().requires_grad_() * 1)
    loss = in_place(overwritten) + use(used)
    with pytest.raises(RuntimeError, match="used after atkd_loss\\(inplace=True\\)"):
        loss.backward()


@pytest.mark.parametrize("use", USES)
def test_a_use_after_raises_for_a_model(use):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 50))
    logits = model(torch.randn(3, 4, 8))
    loss = in_place(logits) + use(logits)
    with pytest.raises(RuntimeError, match="used after atkd_loss\\(inplace=True\\)"):
        loss.backward()
    assert model[0].weight.grad is None


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("views", VIEWS)
def test_a_use_before_is_right_or_raises(views, use):
    """Right where its derivative does not need the logits, and else autograd's own error."""
    gradients = []
    for inplace in [False, True]:
        leaf = STUDENT.clone().requires_grad_()
        overwritten, used = views(leaf * 1)
        loss = use(used)
        loss = loss + atkd.atkd_loss(
            overwritten,
            TEACHER.view(overwritten.shape),
            LABELS.view(overwritten.shape[:-1]),
            inplace=inplace,
        )
        try:
            loss.backward()
        except RuntimeError as error:
            assert inplace and "modified by an inplace operation" in str(error)
            assert use not in (cross_entropy, the_loss_again)
            return
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-9)


def test_an_operation_before_that_needs_the_logits_raises():
    logits = STUDENT.clone().requires_grad_().tanh()
    loss = in_place(logits)
    # The derivative of tanh is computed from its result.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("views", VIEWS)
def test_the_gradient_is_right(views):
    exact, gradient, _ = exactly(STUDENT, TEACHER, LABELS)
    leaf = STUDENT.clone().requires_grad_()
    loss = in_place(views(leaf * 1)[0])
    loss.backward()
    assert abs(loss.item() - exact) <= 1e-6 * exact + 2e-7
    assert_gradient(leaf.grad, gradient, weight(STUDENT, LABELS))


def test_a_use_of_other_rows_is_right():
    leaf = STUDENT.clone().requires_grad_()
    logits = leaf * 1
    loss = atkd.atkd_loss(logits[0], TEACHER[0], LABELS[0], inplace=True)
    (loss + torch.nn.functional.cross_entropy(logits[1], LABELS[1])).backward()
    expected = STUDENT.clone().requires_grad_()
    loss = atkd.atkd_loss(expected[0], TEACHER[0], LABELS[0])
    (loss + torch.nn.functional.cross_entropy(expected[1], LABELS[1])).backward()
    assert torch.equal(leaf.grad, expected.grad) and leaf.grad[0].any() and leaf.grad[1].any()


@pytest.mark.parametrize(
    "leaf",
    [
        lambda: STUDENT.clone().requires_grad_(),
        lambda: torch.nn.Parameter(STUDENT.clone()),
        lambda: (STUDENT.clone().requires_grad_() * 1).detach().requires_grad_(),
        lambda: STUDENT.clone().requires_grad_().view(-1, 50),
        lambda: STUDENT.clone().requires_grad_()[1:],
    ],
)
def test_a_leaf_is_refused(leaf):
    logits = leaf()
    before = logits.detach().clone()
    with pytest.raises(ValueError, match="inplace=True would overwrite a leaf that requires a gradient"):
        atkd.atkd_loss(
            logits,
            TEACHER.view(-1, 50)[: logits[..., 0].numel()].view(logits.shape),
            LABELS.view(-1)[: logits[..., 0].numel()].view(logits.shape[:-1]),
            inplace=True,
        )
    assert torch.equal(logits, before)
    with torch.no_grad():
        assert in_place(STUDENT.clone().requires_grad_()).isfinite()


@pytest.mark.parametrize("views", [torch.unbind, lambda logits: torch.chunk(logits, 3)])
def test_one_of_several_views_is_left_alone(views):
    """Autograd does not know of their common memory."""
    leaf = STUDENT.clone().requires_grad_()
    logits = leaf * 1
    for i, each in enumerate(views(logits)):
        shape = each.shape
        loss = atkd.atkd_loss(
            each, TEACHER[i].view(shape), LABELS[i].view(shape[:-1]), reduction="sum", inplace=True
        )
        loss.backward(retain_graph=True)
    assert torch.equal(logits, STUDENT)
    _, gradient, _ = exactly(STUDENT, TEACHER, LABELS, selection="sequence", reduction="sum")
    assert_gradient(leaf.grad, gradient, 1.0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant):
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 50), torch.randn(3, 4, 8)
    gradients = []
    for inplace in [False, True]:

        def loss(hidden):
            return atkd.atkd_loss(head(hidden), TEACHER, LABELS, inplace=inplace)

        inputs = hidden.clone().requires_grad_()
        head.weight.grad = None
        checkpoint(loss, inputs, use_reentrant=use_reentrant).backward()
        gradients += [head.weight.grad, inputs.grad]
    assert torch.equal(gradients[0], gradients[2]) and torch.equal(gradients[1], gradients[3])
