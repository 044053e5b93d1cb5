"""What a training loop does with the loss."""

import os
import signal
import threading
from collections.abc import Callable

import atkd
import definitions
import pytest
import torch
from support import SETTINGS, assert_gradient, batch, exactly, weight


def test_definitions_pass_gradcheck():
    student, teacher, labels = batch(5, 7)
    student = student.double().requires_grad_()
    for objective in ["atkd", "kl", "tkd", "dkd"]:
        settings = {"objective": objective, "temperature": 2.0, "ce_weight": 0.5}
        assert torch.autograd.gradcheck(
            lambda logits: definitions.atkd_loss(logits, teacher.double(), labels, **settings)[0],
            student,
        )


@pytest.mark.parametrize("objective", ["atkd", "kl", "tkd", "dkd"])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradcheck(objective, inplace):
    """Finite differences in float64 around the float32 loss: steps of 2^-6, so rounding stays small."""
    student, teacher, labels = batch(5, 7)
    student = (student * 64).round().div(64).double().requires_grad_()

    def loss(logits):
        # float32 holds the logits and the steps exactly.
        return atkd.atkd_loss(
            logits.float(), teacher, labels, objective=objective, ce_weight=0.5, inplace=inplace
        ).double()

    assert torch.autograd.gradcheck(loss, student, eps=2.0**-6, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 2.0, 0.125, 65536.0])
def test_upstream_gradient(dtype, inplace, upstream):
    student, teacher, labels = batch(12, 300, dtype=dtype)
    if inplace and dtype == torch.float16:
        # Rounded to float16 once more, which moves it where it is below float16's normal numbers.
        upstream = min(max(upstream, 1.0), 2.0)
    _, exact, _ = exactly(student, teacher, labels, upstream=upstream)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    (upstream * atkd.atkd_loss(logits, teacher, labels, inplace=inplace)).backward()
    assert_gradient(leaf.grad, exact, upstream * weight(student, labels))
    assert torch.equal(logits.detach(), student) != inplace


def test_float16_gradients_survive_a_scaled_loss():
    """Of a mean over 65536 tokens they are below float16; a GradScaler expects them back."""
    student, teacher, labels = batch(4, 1000, dtype=torch.float16)
    _, exact, _ = exactly(student, teacher, labels, num_items_in_batch=65536, upstream=65536.0)
    leaf = student.clone().requires_grad_()
    loss = atkd.atkd_loss(leaf, teacher, labels, num_items_in_batch=65536)
    (65536 * loss).backward()
    assert_gradient(leaf.grad, exact, weight(student, labels, num_items_in_batch=1))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_kept_graph_gives_the_same_gradient_again(inplace):
    student, teacher, labels = batch(8, 50)
    leaf = student.clone().requires_grad_()
    loss = 3 * atkd.atkd_loss(leaf * 1, teacher, labels, inplace=inplace)
    gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(3)]
    gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_kept_graphs_accumulate():
    student, teacher, labels = batch(8, 50)
    once, thrice = (student.clone().requires_grad_() for _ in range(2))
    atkd.atkd_loss(once, teacher, labels).backward()
    loss = atkd.atkd_loss(thrice, teacher, labels)
    for _ in range(3):
        loss.backward(retain_graph=True)
    assert torch.allclose(thrice.grad, 3 * once.grad, rtol=1e-6, atol=0)


def test_a_second_derivative_raises():
    student, teacher, labels = batch(8, 50)
    loss = atkd.atkd_loss(student.requires_grad_(), teacher, labels)
    with pytest.raises(RuntimeError, match="create_graph"):
        loss.backward(create_graph=True)
    loss, *_ = torch.ops.atkd.loss(student, teacher, labels, None, None, None, None, True, False, None, *SETTINGS)
    with pytest.raises(RuntimeError, match="create_graph"):
        loss.backward(create_graph=True)


def test_forward_alone():
    student, teacher, labels = batch(8, 50)
    expected = atkd.atkd_loss(student, teacher, labels)
    student.requires_grad_()
    before = student.detach().clone()
    for mode in [torch.no_grad, torch.inference_mode]:
        with mode():
            loss = atkd.atkd_loss(student, teacher, labels, inplace=True)
        assert torch.equal(loss, expected) and not loss.requires_grad
    assert torch.equal(student, before)
    op = torch.ops.atkd.loss.default(
        student, teacher, labels, None, None, None, None, False, False, None, *SETTINGS
    )
    assert op[1].numel() == 0
    with pytest.raises(RuntimeError, match="with_gradient=False"):
        op[0].backward()


def test_stats_carry_no_gradient():
    student, teacher, labels = batch(8, 50)
    _, stats = atkd.atkd_loss(student.requires_grad_(), teacher, labels, return_stats=True)
    assert not any(column.requires_grad for column in stats)


def test_the_teacher_gets_no_gradient():
    student, teacher, labels = batch(8, 50)
    atkd.atkd_loss(student.requires_grad_(), teacher.requires_grad_(), labels).backward()
    assert student.grad is not None and teacher.grad is None
    assert not atkd.atkd_loss(student.detach(), teacher, labels).requires_grad


@pytest.mark.parametrize("as_tensor", [False, True])
def test_gradient_accumulation_equals_one_batch(as_tensor):
    student, teacher, labels = batch(4, 6, 50)
    whole = student.clone().requires_grad_()
    expected = atkd.atkd_loss(whole, teacher, labels, selection="sequence")
    expected.backward()
    items = (labels != -100).sum()
    parts = student.clone().requires_grad_()
    total = 0.0
    for i in range(4):
        loss = atkd.atkd_loss(
            parts[i],
            teacher[i],
            labels[i],
            num_items_in_batch=items if as_tensor else int(items),
        )
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(parts.grad, whole.grad, rtol=1e-5, atol=1e-9)


def test_no_items_in_batch_give_zero():
    student, teacher, labels = batch(3, 50)
    labels.fill_(-100)
    for items in [0, torch.tensor(0)]:
        leaf = student.clone().requires_grad_()
        loss = atkd.atkd_loss(leaf, teacher, labels, num_items_in_batch=items)
        loss.backward()
        assert loss.item() == 0 and not leaf.grad.any()


def test_autocast():
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 300)
    inputs, (_, teacher, labels) = torch.randn(12, 16), batch(12, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs)
        logits.retain_grad()
        loss = atkd.ATKDLoss()(logits, teacher, labels)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    exact_loss, exact, _ = exactly(logits, teacher, labels)
    assert loss.item() == pytest.approx(exact_loss, rel=1e-6)
    assert_gradient(logits.grad, exact, weight(logits, labels))
    assert model.weight.grad.isfinite().all() and model.weight.grad.any()


def test_the_same_bits_for_any_number_of_threads():
    student, teacher, labels = batch(64, 5000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in [1, 2, 5]:
            torch.set_num_threads(threads)
            leaf = student.clone().requires_grad_()
            loss = atkd.atkd_loss(leaf, teacher, labels)
            loss.backward()
            results.append((loss, leaf.grad))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def holds_in_child(work: Callable[[], bool]) -> bool:
    """Whether it is true in a child, before its alarm."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        held = False
        try:
            held = work()
        finally:
            os._exit(0 if held else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_works_after_a_fork():
    """A fork copies the thread pool without its threads, and locks that those hold."""
    student, teacher, labels = batch(64, 1000)
    expected = atkd.atkd_loss(student, teacher, labels)

    def same() -> bool:
        return torch.equal(atkd.atkd_loss(student, teacher, labels), expected)

    assert holds_in_child(same)
    assert holds_in_child(lambda: same() and holds_in_child(same))
    stop = threading.Event()

    def call_until_stopped() -> None:
        while not stop.is_set():
            assert same()

    others = [threading.Thread(target=call_until_stopped) for _ in range(2)]
    for other in others:
        other.start()
    try:
        assert all(holds_in_child(same) for _ in range(50))
    finally:
        stop.set()
        for other in others:
            other.join()
