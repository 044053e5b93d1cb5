"""The entropies of one model, and the selections that people make by them."""

import atkd
import pytest
import torch
from support import batch


def exact_entropies(logits, temperature=1.0):
    log_p = (logits.double() / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=-1e300)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, torch.tensor(3.0)], ids=str)
def test_entropies(dtype, temperature):
    logits, _, _ = batch(6, 7, 1000, dtype=dtype)
    logits[0, 0, 5:900] = -torch.inf
    logits[0, 1, 2:] = -torch.inf
    entropies = atkd.token_entropies(logits, temperature=temperature)
    assert entropies.shape == (6, 7) and entropies.dtype == torch.float32
    exact = exact_entropies(logits, float(temperature))
    assert ((entropies.double() - exact).abs() <= 2e-6 * (1 + exact)).all()
    flat = atkd.token_entropies(logits.flatten(0, 1), temperature=temperature)
    assert torch.equal(flat, entropies.flatten())


def test_padding_is_left_out():
    logits, _, _ = batch(4, 60)
    expected = atkd.token_entropies(logits[:, :50])
    assert torch.equal(atkd.token_entropies(logits, vocab_size=50), expected)
    assert not torch.equal(atkd.token_entropies(logits), expected)


def test_no_distribution():
    logits = torch.tensor([[0.0, torch.nan], [torch.inf, 0.0], [-torch.inf, -torch.inf], [1.0, 1.0]])
    found = atkd.token_entropies(logits)
    assert found[:3].isnan().all() and abs(found[3] - torch.tensor(2.0).log()) < 1e-6
    assert atkd.token_entropies(logits[:0]).shape == (0,)


def test_selection_by_the_students_entropy():
    """That of SE-KD: the tokens of which the student is least sure learn, the others do not."""
    student, teacher, labels = batch(4, 20, 50)
    valid = labels != -100
    chosen = atkd.select_hard(atkd.token_entropies(student), 0.2, valid=valid)
    exact = exact_entropies(student)
    assert chosen.sum() == -(-valid.sum() // 5)
    assert exact[chosen].min() > exact[valid & ~chosen].max()
    leaf = student.clone().requires_grad_()
    settings = {"objective": "plain", "divergence": "reverse-kl", "reduction": "sum"}
    atkd.atkd_loss(leaf, teacher, labels, token_weights=chosen.float(), **settings).backward()
    alone = student[chosen].requires_grad_()
    atkd.atkd_loss(alone, teacher[chosen], labels[chosen], **settings).backward()
    assert torch.equal(leaf.grad[chosen], alone.grad) and not leaf.grad[~chosen].any()


def test_operator():
    logits, _, _ = batch(4, 8, 30)
    torch.library.opcheck(torch.ops.atkd.token_entropies.default, (logits, 1.0, None))
    torch.library.opcheck(torch.ops.atkd.token_entropies.default, (logits, 0.0, 20, torch.tensor(2.0).double()))
    compiled = torch.compile(atkd.token_entropies, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, temperature=2.0), atkd.token_entropies(logits, temperature=2.0))
    by_row = torch.func.vmap(atkd.token_entropies)(logits)
    assert torch.equal(by_row, atkd.token_entropies(logits))


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"logits": torch.zeros(3, 4).long()}, TypeError, "logits are torch.int64"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits are \[3\]"),
        ({"logits": [0.0]}, TypeError, "logits are a list"),
        ({"temperature": 0.0}, ValueError, "temperature is 0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature is \[3\], but must be one number"),
        ({"vocab_size": 5}, ValueError, "vocab_size is 5, but must be from 1 to 4"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_wrong_arguments(arguments, kind, words):
    with pytest.raises(kind, match=words):
        atkd.token_entropies(**{"logits": torch.zeros(3, 4), **arguments})
