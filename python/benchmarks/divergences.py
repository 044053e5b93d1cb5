"""Times plain losses of each divergence beside eager PyTorch's, each in a loop of its own, on the CPU.

    python divergences.py [--tokens 256 --vocab 32000] [--rounds 5]

A loop's gradient may have the memory that the one before gave back; `compare.py` makes all of it anew. Prints, for each
divergence, the median ratio of the rounds with its range, and the milliseconds of the round in the middle.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benches"))

import pytorch_baseline as eager
from compare import DIVERGENCES, own

# Eager PyTorch's, in the order of `DIVERGENCES`.
EAGER = [eager.forward_kl, eager.reverse_kl, eager.jsd, eager.tvd, eager.skew_kl, eager.skew_reverse_kl]


def milliseconds(loss, student, *constants, runs):
    """The median of so many steps, after three."""
    times = []
    for _ in range(runs + 3):
        student.grad = None
        start = time.perf_counter()
        loss(student, *constants).backward()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    random = torch.Generator().manual_seed(0)
    shape = args.tokens, args.vocab
    student, teacher = (3 * torch.randn(shape, generator=random) for _ in range(2))
    batch = student.requires_grad_(), teacher, torch.randint(args.vocab, shape[:1], generator=random)
    print("| divergence | eager over this | this, ms | eager, ms |\n|---|---|---|---|")
    for (name, *divergence), of_eager in zip(DIVERGENCES, EAGER):
        of_package = own("plain", *divergence)
        rounds = sorted(
            (b / a, a, b)
            for a, b in (
                (milliseconds(of_package, *batch, runs=30), milliseconds(of_eager, *batch, runs=8))
                for _ in range(args.rounds)
            )
        )
        ratio, a, b = rounds[len(rounds) // 2]
        span = f"{rounds[0][0]:.1f} to {rounds[-1][0]:.1f}"
        print(f"| {name} | {ratio:.1f} ({span}) | {a:.2f} | {b:.1f} |", flush=True)


if __name__ == "__main__":
    main()
