"""The operator as torch.library and torch.compile see them."""

import atkd
import pytest
import torch
from support import SETTINGS, assert_gradient, batch, exactly, weight
from torch.fx.experimental.proxy_tensor import make_fx

CASES = {
    "float32": batch(6, 40),
    "float16": batch(6, 40, dtype=torch.float16),
    "bfloat16": batch(2, 3, 40, dtype=torch.bfloat16),
    "rows apart": tuple(t[:, ::2] if t.dim() == 2 else t for t in batch(6, 80)),
    "empty": batch(0, 40),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck(case, scale, with_gradient):
    student, teacher, labels = CASES[case]
    scale = None if scale is None else torch.tensor(scale)
    student = student.clone().requires_grad_(with_gradient)
    arguments = (student, teacher, labels % 40, scale, None, None, None, with_gradient, False, None, *SETTINGS)
    torch.library.opcheck(torch.ops.atkd.loss.default, arguments)


def step(function, student, teacher, labels, **arguments):
    leaf = student.clone().requires_grad_()
    loss = function(leaf * 1, teacher, labels, **arguments)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_compile_gives_the_same_bits(backend, dtype, inplace):
    torch._dynamo.reset()
    student, teacher, labels = batch(2, 8, 100, dtype=dtype)
    module = atkd.ATKDLoss(shift_labels=True, inplace=inplace)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for actual, expected in zip(
        step(compiled, student, teacher, labels), step(module, student, teacher, labels)
    ):
        assert torch.equal(actual, expected)


def test_compile_around_a_model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    head, inputs = torch.nn.Linear(16, 100), torch.randn(12, 16)
    _, teacher, labels = batch(12, 100)

    def loss(inputs):
        value, stats = atkd.atkd_loss(
            head(inputs), teacher, labels, num_items_in_batch=(labels != -100).sum(), return_stats=True
        )
        return 3 * value + stats.tkd.mean()

    loss(inputs).backward()
    expected = head.weight.grad.clone()
    head.weight.grad = None
    torch.compile(loss, fullgraph=True)(inputs).backward()
    assert torch.allclose(head.weight.grad, expected, rtol=1e-5, atol=1e-8) and expected.any()


def test_compile_with_another_number_of_tokens():
    torch._dynamo.reset()
    compiled = torch.compile(atkd.atkd_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in [4, 9, 17]:
        data = batch(tokens, 60)
        for actual, expected in zip(step(compiled, *data), step(atkd.atkd_loss, *data)):
            assert torch.equal(actual, expected)


def test_compile_forward_alone():
    torch._dynamo.reset()
    data = batch(9, 60)
    with torch.no_grad():
        compiled = torch.compile(atkd.atkd_loss, fullgraph=True)(*data)
    assert torch.equal(compiled, atkd.atkd_loss(*data))


def test_traces_hold_for_other_logits():
    student, teacher, labels = batch(9, 60)
    other = batch(9, 60, seed=1)[0].requires_grad_()

    def gradient(logits):
        return torch.autograd.grad(2 * atkd.atkd_loss(logits, teacher, labels), logits)[0]

    for function in gradient, lambda logits: atkd.atkd_loss(logits, teacher, labels):
        traced = make_fx(function)(student.requires_grad_())
        assert torch.equal(traced(other), function(other))
    with torch.no_grad():
        traced = torch.jit.trace(lambda *data: atkd.atkd_loss(*data), (student, teacher, labels))
        assert torch.equal(traced(other, teacher, labels), atkd.atkd_loss(other, teacher, labels))


def test_vmap():
    data = batch(3, 9, 60)
    losses = torch.func.vmap(atkd.atkd_loss)(*data)
    assert torch.equal(losses, torch.stack([atkd.atkd_loss(*each) for each in zip(*data)]))


def test_torch_func_gives_the_gradient():
    student, teacher, labels = batch(9, 60)
    exact, gradient, _ = exactly(student, teacher, labels)

    def loss(student):
        return atkd.atkd_loss(student, teacher, labels)

    actual, value = torch.func.grad_and_value(loss)(student)
    assert abs(value.item() - exact) <= 1e-6 * exact + 2e-7
    assert_gradient(actual, gradient, weight(student, labels))
    assert torch.equal(torch.func.vjp(loss, student)[1](torch.tensor(1.0))[0], actual)
    assert torch.equal(torch.func.jacrev(loss)(student), actual)
    with_stats = torch.func.grad(
        lambda student: atkd.atkd_loss(student, teacher, labels, return_stats=True), has_aux=True
    )
    assert torch.equal(with_stats(student)[0], actual)
    to_teacher = torch.func.grad(lambda teacher: atkd.atkd_loss(student, teacher, labels))
    assert not to_teacher(teacher).any()


def test_torch_func_gives_directional_derivatives():
    (student, teacher, labels), (direction, *_) = batch(9, 60), batch(9, 60, seed=1)
    _, gradient, _ = exactly(student, teacher, labels)

    def loss_of(student):
        return atkd.atkd_loss(student, teacher, labels)

    loss, slope = torch.func.jvp(loss_of, (student,), (direction,))
    assert torch.equal(loss, atkd.atkd_loss(student, teacher, labels))
    terms = gradient * direction.double()
    assert abs(slope.item() - terms.sum()) <= 1e-6 * terms.abs().sum()
    assert torch.equal(torch.func.linearize(loss_of, student)[1](direction), slope)
    assert torch.equal(torch.func.jacfwd(loss_of)(student), torch.func.jacrev(loss_of)(student))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student, direction)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(loss_of(dual)).tangent, slope)
    compiled = torch.compile(
        lambda x: torch.func.jvp(loss_of, (x,), (direction,))[1], backend="aot_eager"
    )
    assert torch.equal(compiled(student), slope)
    # The teacher is a constant.
    _, slope = torch.func.jvp(
        lambda teacher: atkd.atkd_loss(student, teacher, labels), (teacher,), (direction,)
    )
    assert slope == 0


def test_torch_func_gives_a_gradient_for_each_batch():
    data = batch(3, 9, 60)
    gradients = torch.func.vmap(torch.func.grad(atkd.atkd_loss))(*data)
    for each, gradient in zip(zip(*data), gradients):
        assert torch.equal(gradient, torch.func.grad(atkd.atkd_loss)(*each))
    (students, teachers, labels), (directions, *_) = data, batch(3, 9, 60, seed=1)
    _, slopes = torch.func.jvp(
        lambda students: torch.func.vmap(atkd.atkd_loss)(students, teachers, labels),
        (students,),
        (directions,),
    )
    assert torch.allclose(slopes, (gradients * directions).sum((1, 2)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="at least one batch"):
        torch.func.vmap(atkd.atkd_loss)(*(each[:0] for each in data))


def test_functionalize():
    student, teacher, labels = batch(9, 60)
    loss = torch.func.functionalize(lambda student: atkd.atkd_loss(student, teacher, labels))
    assert torch.equal(loss(student), atkd.atkd_loss(student, teacher, labels))


@pytest.mark.parametrize(
    "twice",
    [
        lambda loss, x: torch.func.hessian(loss)(x),
        lambda loss, x: torch.func.grad(lambda x: torch.func.grad(loss)(x).pow(2).sum())(x),
        lambda loss, x: torch.func.jvp(torch.func.grad(loss), (x,), (x,)),
        lambda loss, x: torch.func.grad(lambda y: torch.func.jvp(loss, (y,), (x,))[1])(x),
    ],
)
def test_torch_func_twice_raises(twice):
    student, teacher, labels = batch(9, 60)
    with pytest.raises(RuntimeError, match="has no derivative"):
        twice(lambda student: atkd.atkd_loss(student, teacher, labels), student)


def test_tensors_without_data_have_results_without_data():
    data = [tensor.to("meta") for tensor in batch(2, 9, 60)]
    loss, stats = atkd.atkd_loss(*data, return_stats=True)
    assert loss.device.type == "meta" and loss.shape == () and stats.hard.shape == (2, 9)
