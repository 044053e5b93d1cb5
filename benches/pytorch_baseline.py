"""Times the eager PyTorch losses that this crate is compared with, forward and backward.

    pip install torch numpy
    python benches/pytorch_baseline.py [--tokens 256 --vocab 32000 --dtype float32 --threads 2]

Prints the median of 9 runs in milliseconds for ATKD, one operation a step, and for PyTorch's own
log_softmax + kl_div, which does less. `cargo bench --bench cpu` gives the crate's side.

This ATKD was written for the comparison of times. It adds 1e-8 inside every logarithm, which no public
implementation does, so that its loss is off by percents: compare no accuracy with it.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F


def atkd(student, teacher, labels, lam=0.2, hard_ratio=0.5):
    """ATKD in float32, one operation a step, with an epsilon in every logarithm and quotient."""
    p = F.softmax(teacher.float(), -1)
    q = F.softmax(student.float(), -1)
    p_target = p.gather(1, labels[:, None]).squeeze(1)
    q_target = q.gather(1, labels[:, None]).squeeze(1)
    uncertainty = 1 - p_target
    tkd = p_target * torch.log(p_target / (q_target + 1e-8) + 1e-8)
    tkd = tkd + uncertainty * torch.log(uncertainty / (1 - q_target + 1e-8) + 1e-8)
    others = torch.ones_like(p).scatter_(1, labels[:, None], 0.0)
    p_rest = p * others / (uncertainty[:, None] + 1e-8)
    q_rest = q * others / (1 - q_target[:, None] + 1e-8)
    dkd = (p_rest * (torch.log(p_rest + 1e-8) - torch.log(q_rest + 1e-8))).sum(-1)
    hard = torch.zeros_like(uncertainty, dtype=torch.bool)
    hard[uncertainty.topk(int(hard_ratio * len(labels))).indices] = True
    return torch.where(hard, (1 - lam) * (tkd + dkd), lam * dkd).mean()


def kl(student, teacher, labels):
    return F.kl_div(
        F.log_softmax(student.float(), -1),
        F.log_softmax(teacher.float(), -1),
        log_target=True,
        reduction="batchmean",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape, dtype = (args.tokens, args.vocab), getattr(torch, args.dtype)
    teacher = (3 * torch.randn(shape)).to(dtype)
    student = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    labels = torch.randint(args.vocab, (args.tokens,))
    print(f"torch {torch.__version__}, {args.threads} threads, {args.tokens} x {args.vocab} {args.dtype}")
    for name, loss in [("eager ATKD", atkd), ("log_softmax + kl_div", kl)]:
        times = []
        for _ in range(11):
            student.grad = None
            start = time.perf_counter()
            loss(student, teacher, labels).backward()
            times.append((time.perf_counter() - start) * 1e3)
        print(f"{name:22} {statistics.median(times[2:]):9.2f} ms")


if __name__ == "__main__":
    main()
