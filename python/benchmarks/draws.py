"""How far the mean gradient by draws of the teacher is from the gradient by the teacher itself, for each divergence.

    python python/benchmarks/draws.py

Draws are an unbiased estimate for forward KL alone. The other divergences refuse them, so that here the same draws go in as
probabilities, by tail "zero". Beside it stands the gradient by as many of the likeliest tokens, renormalised.
"""

import argparse

import atkd
import torch

TOKENS, VOCAB = 4, 2000
HARD = torch.tensor([True, True, False, False])
DIVERGENCES = {
    "forward KL": {"objective": "kl"},
    "ATKD": {},
    "JSD": {"objective": "plain", "divergence": "jsd"},
    "TVD": {"objective": "plain", "divergence": "tvd"},
    "skew KL": {"objective": "plain", "divergence": "skew-kl", "beta": 0.1},
}


def gradient(loss, student):
    leaf = student.clone().requires_grad_()
    loss(leaf).backward()
    return leaf.grad


def by_teacher(student, labels, teacher, settings):
    """The gradient by some log-probabilities per token, renormalised."""
    hard = HARD.repeat(len(labels) // TOKENS)
    return gradient(
        lambda leaf: atkd.sparse_atkd_loss(
            leaf,
            teacher.indices,
            teacher.log_probs,
            labels,
            target_log_prob=teacher.target_log_prob,
            tail="zero",
            reduction="sum",
            hard=hard,
            **settings,
        ),
        student,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, nargs="+", default=[12, 50, 500], help="draws of each token")
    parser.add_argument("--runs", type=int, default=300, help="batches of draws that the mean is over")
    arguments = parser.parse_args()
    random = torch.Generator().manual_seed(0)
    logits = 2.5 * torch.randn(TOKENS, VOCAB, generator=random)
    student = logits + torch.randn(TOKENS, VOCAB, generator=random)
    labels = torch.randint(VOCAB, (TOKENS,), generator=random)
    runs = arguments.runs
    print("| draws | divergence | mean of draws | its noise | likeliest |\n|---|---|---|---|---|")
    for draws in arguments.draws:
        random = torch.Generator().manual_seed(1)
        drawn = atkd.SparseTeacher.sample(logits.repeat(runs, 1), labels.repeat(runs), draws, generator=random)
        log_probs = logits.log_softmax(-1)
        of_labels = log_probs.gather(1, labels[:, None])[:, 0]
        top = log_probs.topk(draws)
        likeliest = atkd.SparseTeacher(top.indices, top.values, of_labels, "zero")
        for name, settings in DIVERGENCES.items():
            dense = gradient(
                lambda leaf, settings=settings: atkd.atkd_loss(
                    leaf, logits, labels, reduction="sum", hard=HARD, **settings
                ),
                student,
            )
            of_runs = by_teacher(student.repeat(runs, 1), labels.repeat(runs), drawn, settings)
            of_runs = of_runs.view(runs, TOKENS, VOCAB)
            errors = [
                of_runs.mean(0) - dense,
                of_runs.std(0) / runs**0.5,
                by_teacher(student, labels, likeliest, settings) - dense,
            ]
            shares = [100 * float(error.norm() / dense.norm()) for error in errors]
            cells = " | ".join(f"{share:.{0 if share >= 10 else 1}f}%" for share in shares)
            print(f"| {draws} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
