"""Numbers that change at each step."""

import atkd
import pytest
import torch
from support import SETTINGS, batch
from torch.fx.experimental import symbolic_shapes

STEPS = 20
DATA = batch(6, 40)
# Through 0 and 1, which torch.compile likes to take for constants.
SCHEDULES = {
    "temperature": [4 - 3 * step / (STEPS - 1) for step in range(STEPS)],
    "lam": [step / (STEPS - 1) for step in range(STEPS)],
    "hard_ratio": [1 - step / (STEPS - 1) for step in range(STEPS)],
    "ce_weight": [0.1 * step for step in range(STEPS)],
    "kd_weight": [2 - 0.1 * step for step in range(STEPS)],
    "beta": [step / (STEPS - 1) for step in range(STEPS)],
    "num_items_in_batch": [0.25 + 0.7 * step for step in range(STEPS)],
}

needs_symbols = pytest.mark.skipif(
    not hasattr(symbolic_shapes, "has_static_value"),
    reason=f"torch {torch.__version__} compiles for each float: only schedules in tensors were tested",
)


def as_tensors(number):
    return torch.tensor(number, dtype=torch.float64)


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("form", [pytest.param(float, marks=needs_symbols), as_tensors])
def test_compiled_steps_have_the_same_bits(name, form):
    torch._dynamo.reset()
    compiled = torch.compile(atkd.atkd_loss, fullgraph=True, backend="aot_eager")
    for number in SCHEDULES[name]:
        settings = {"ce_weight": 0.5, "divergence": "jsd", name: form(number)}
        leaf = DATA[0].clone().requires_grad_()
        actual = compiled(leaf, *DATA[1:], **settings)
        expected = atkd.atkd_loss(leaf, *DATA[1:], **{**settings, name: number})
        assert torch.equal(actual, expected), (name, number)
        assert torch.equal(gradient(actual, leaf), gradient(expected, leaf)), (name, number)


@pytest.mark.parametrize("form", [pytest.param(float, marks=needs_symbols), as_tensors])
def test_a_compiled_module_with_every_setting_scheduled(form):
    torch._dynamo.reset()
    schedules = {name: SCHEDULES[name] for name in SCHEDULES if name != "num_items_in_batch"}
    module = atkd.ATKDLoss(shift_labels=True, divergence="jsd", **{name: form(0.5) for name in schedules})
    compiled = torch.compile(module, fullgraph=True)
    for step in range(STEPS):
        for name, numbers in schedules.items():
            if form is as_tensors:
                module.settings[name].fill_(numbers[step])
            else:
                module.settings[name] = numbers[step]
        leaf = DATA[0].clone().requires_grad_()
        actual, expected = compiled(leaf, *DATA[1:], 30 + step), module(leaf, *DATA[1:], 30 + step)
        assert torch.equal(actual, expected), step
        assert torch.equal(gradient(actual, leaf), gradient(expected, leaf)), step


def test_wrong_numbers_raise_when_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(atkd.atkd_loss, fullgraph=True, backend="aot_eager")
    for number in [2.0, 3.0, 4.0]:
        compiled(*DATA, temperature=torch.tensor(number))
    with pytest.raises(ValueError, match="temperature is -1"):
        compiled(*DATA, temperature=torch.tensor(-1.0))


def test_tensors_are_numbers():
    for name in ["temperature", "lam", "hard_ratio", "ce_weight", "kd_weight", "beta"]:
        for tensor in [torch.tensor(0.75), torch.tensor([0.75], dtype=torch.float16)]:
            settings, expected_settings = ({"divergence": "jsd", name: x} for x in [tensor, 0.75])
            actual = atkd.atkd_loss(*DATA, **settings)
            assert torch.equal(actual, atkd.atkd_loss(*DATA, **expected_settings))
            traced = torch.func.grad(lambda x: atkd.atkd_loss(x, *DATA[1:], **settings))
            leaf = DATA[0].clone().requires_grad_()
            expected = gradient(atkd.atkd_loss(leaf, *DATA[1:], **expected_settings), leaf)
            assert torch.equal(traced(DATA[0]), expected)


def test_numbers_of_the_operator():
    numbers = torch.tensor([0.3, 0.4, 2.0, 0.5, 0.6, 0.1], dtype=torch.float64)
    arguments = (*DATA, None, None, None, None, True, False, None, *SETTINGS)
    loss, *_ = torch.ops.atkd.loss(*arguments, numbers)
    expected = atkd.atkd_loss(
        *DATA, lam=0.3, hard_ratio=0.4, temperature=2.0, ce_weight=0.5, kd_weight=0.6
    )
    assert torch.equal(loss, expected)
    student = DATA[0].clone().requires_grad_()
    torch.library.opcheck(torch.ops.atkd.loss.default, (student, *arguments[1:], numbers))
    for wrong in [numbers.float(), numbers[:4]]:
        with pytest.raises(ValueError, match="numbers are .* must be torch.float64 \\[6\\]"):
            torch.ops.atkd.loss(*arguments, wrong)
