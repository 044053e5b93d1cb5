"""What float32 and bfloat16 cost an ATKD loss, and a loss of logits that were rounded before it: no times, only errors.

    pip install atkd numpy
    python rounding.py [--tokens 64 --vocab 32000]

Against float64 autograd of each code's own definition (`exact.py`), for teachers and students of independent random
logits N(0, 3) and N(0, 6), and labels drawn from the teacher or evenly, which the teacher thinks impossible. The first
table has public ATKD codes (`benches/pytorch_baseline.py`) and this package, in float32: how many tokens are hard that
should be easy or the other way round, the relative error of the loss, the largest error of a token's TKD, and errors of
gradients relative to the largest of their row, in the worst row and as a count of rows that are off by more than 1e-3.

The second has no code in it: the gradient of a divergence in float64 of logits that were rounded to bfloat16, against
that of the logits as they were, relative, by norm. The student's differ from the teacher's N(0, 3) by N(0, closeness).
"""

import argparse
import sys
from pathlib import Path

import atkd
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parents[1] / "benches")]

import definitions  # noqa: E402
import exact  # noqa: E402
import pytorch_baseline as eager  # noqa: E402


def target_mass(logits, labels):
    """Probabilities of the target, and of the others as their sum, by softmax in the logits' dtype."""
    probabilities = logits.softmax(-1)
    at_target = eager.one_hot(logits, labels)
    return (probabilities * at_target).sum(-1), (probabilities * ~at_target).sum(-1)


def tkd(p, q, smallest=0.0):
    """KL of two classes from their probabilities; each is clamped before its logarithm."""
    p, q = (torch.stack(classes, -1).clamp_min(smallest) for classes in (p, q))
    return (p * (p.log() - q.log())).sum(-1)


def official_terms(student, teacher, labels):
    """TKD and the hard tokens, as `eager.official_atkd` has them."""
    p, q = target_mass(teacher, labels), target_mass(student, labels)
    return tkd(p, q), p[1] >= p[1].median()


def se_kd_terms(student, teacher, labels):
    """TKD and the hard tokens, as `eager.se_kd_atkd` has them."""
    p, q = ((mass, 1 - mass) for mass in (target_mass(x, labels)[0] for x in (teacher, student)))
    hard = torch.zeros_like(p[0], dtype=torch.bool)
    hard[p[1].topk((len(hard) + 1) // 2).indices] = True
    return tkd(p, q, 1e-8), hard


def own_terms(student, teacher, labels):
    stats = atkd.atkd_loss(student, teacher, labels, return_stats=True)[1]
    return stats.tkd, stats.hard


CODES = [
    ("official", eager.official_atkd, exact.official_atkd(), official_terms),
    ("SE-KD", eager.se_kd_atkd, exact.atkd(), se_kd_terms),
    ("atkd", atkd.atkd_loss, exact.atkd(), own_terms),
]


def value_and_gradient(loss, student, teacher, labels):
    student = student.clone().requires_grad_()
    value = loss(student, teacher, labels)
    return value.item(), torch.autograd.grad(value, student)[0].double()


def score(student, teacher, labels, loss, definition, terms):
    wide = student.double(), teacher.double(), labels
    value, gradient = value_and_gradient(loss, student, teacher, labels)
    expected, exact_gradient = value_and_gradient(definition, *wide)
    off = (gradient - exact_gradient).abs().amax(-1) / exact_gradient.abs().amax(-1)

    p, p_rest, _ = definitions.split(wide[1], labels)
    q, q_rest, _ = definitions.split(wide[0], labels)
    exact_tkd = p.exp() * (p - q) + p_rest.exp() * (p_rest - q_rest)
    margin = p_rest - p
    official = definition is exact.official_atkd()
    exact_hard = margin >= margin.median() if official else definitions.select(margin, 0.5)
    of_tokens, hard = terms(student, teacher, labels)
    return (
        (hard != exact_hard).sum().item(),
        abs(value / expected - 1),
        (of_tokens.double() - exact_tkd).abs().max().item(),
        off.max().item(),
        (off > 1e-3).sum().item(),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=32000)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.tokens} x {args.vocab}\n")
    print("| logits | labels | code | wrongly hard or easy | loss | TKD | gradient | rows > 1e-3 |")
    print("|---|---|---|---|---|---|---|---|")
    shape = args.tokens, args.vocab
    for spread in [3, 6]:
        for drawn in ["from the teacher", "evenly"]:
            random = torch.Generator().manual_seed(0)
            student, teacher = (spread * torch.randn(shape, generator=random) for _ in range(2))
            weights = teacher.softmax(-1) if drawn == "from the teacher" else torch.ones(shape)
            labels = weights.multinomial(1, generator=random).squeeze(1)
            for name, *code in CODES:
                wrong, loss, of_tkd, gradient, rows = score(student, teacher, labels, *code)
                print(
                    f"| N(0, {spread}) | {drawn} | {name} | {wrong} | {loss:.1e} | {of_tkd:.1e} | "
                    f"{gradient:.1e} | {rows} |"
                )

    names = [("forward-kl", None), ("reverse-kl", None), ("jsd", 0.5), ("tvd", None)]
    print("\n| closeness |", *(f"{name} |" for name, _ in names))
    print("|---|" + "---|" * len(names))
    for closeness in [1, 0.3, 0.1]:
        random = torch.Generator().manual_seed(0)
        teacher = 3 * torch.randn(shape, generator=random)
        student = teacher + closeness * torch.randn(shape, generator=random)
        row = []
        for name in names:
            (_, whole), (_, rounded) = (
                value_and_gradient(exact.plain(*name), round_(student), round_(teacher), None)
                for round_ in (lambda x: x.double(), lambda x: x.bfloat16().double())
            )
            row.append(f"{(rounded - whole).norm() / whole.norm():.1%}")
        print(f"| {closeness} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
