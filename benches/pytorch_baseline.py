"""The losses as they are written in PyTorch today, one operation a step; run, it times them on a CPU.

    pip install torch numpy
    python benches/pytorch_baseline.py [--tokens 256 --vocab 32000 --dtype float32 --threads 2] [--losses ATKD KL]

Prints the median of 9 runs in milliseconds, forward and backward, of each loss whose name contains one of those given.
`cargo bench --bench cpu` gives the crate's side, `python/benchmarks/compare.py` both, with memory and errors.

All take the student's and the teacher's logits `[N, V]` and the labels `[N]`, of which none is ignored, and give the
loss of temperature 1 in float32, whatever the logits are in. They are what public code computes, in this repository's
words: with its epsilons where it has some, and with none where it has none.
"""

import argparse
import math
import statistics
import time

import torch
import torch.nn.functional as F


def log_softmaxes(student, teacher):
    """log q and log p."""
    return student.float().log_softmax(-1), teacher.float().log_softmax(-1)


def one_hot(logits, labels):
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], True)


def official_atkd(student, teacher, labels, lam=0.2):
    """ATKD by the paper's authors (WHU-ZQH/ATKD): each group has a mean of its own, and tokens are hard from the median
    of the uncertainties on. Probabilities come from softmax, without an epsilon. NaN where no token is easy.
    """
    student, teacher = student.float(), teacher.float()
    p, q = teacher.softmax(-1), student.softmax(-1)
    at_target = one_hot(q, labels)
    two_classes = lambda x: torch.stack([(x * at_target).sum(-1), (x * ~at_target).sum(-1)], -1)
    p_classes, q_classes = two_classes(p), two_classes(q)
    uncertainty = p_classes[:, 1]
    hard = uncertainty >= uncertainty.median()

    def mean_tkd(group):
        return F.kl_div(q_classes[group].log(), p_classes[group], reduction="batchmean")

    def mean_dkd(group):
        others = ~at_target[group]
        rest = lambda logits: logits[group].masked_select(others).view(len(others), -1)
        return F.kl_div(rest(student).log_softmax(-1), rest(teacher).softmax(-1), reduction="batchmean")

    return lam * mean_dkd(~hard) + (1 - lam) * (mean_tkd(hard) + mean_dkd(hard))


def se_kd_atkd(student, teacher, labels, lam=0.2, hard_ratio=0.5):
    """ATKD by SE-KD (almogtavor/SE-KD3x): one mean over all tokens, the ceil(k N) of most uncertainty are hard, and
    probabilities are clamped before each logarithm, at 1e-8 those of the two classes and at 1e-12 the others.
    """
    log_q, log_p = log_softmaxes(student, teacher)
    q_target, p_target = (x.gather(1, labels[:, None]).squeeze(1).exp() for x in (log_q, log_p))
    uncertainty = (1 - p_target).clamp_min(0)
    p_classes = torch.stack([p_target, uncertainty], -1).clamp_min(1e-8)
    q_classes = torch.stack([q_target, 1 - q_target], -1).clamp_min(1e-8)
    tkd = (p_classes * (p_classes.log() - q_classes.log())).sum(-1)

    at_target = one_hot(log_q, labels)
    q, p = (x.exp().masked_fill(at_target, 0) for x in (log_q, log_p))
    p_rest, q_rest = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
    q, p = q / q_rest.clamp_min(1e-12), p / p_rest.clamp_min(1e-12)
    dkd = (p * (p.clamp_min(1e-12).log() - q.clamp_min(1e-12).log())).sum(-1)
    dkd = dkd.where(p_rest[:, 0] > 1e-12, 0)

    hard = torch.zeros_like(uncertainty, dtype=torch.bool)
    hard[uncertainty.topk(math.ceil(hard_ratio * len(labels))).indices] = True
    return torch.where(hard, (1 - lam) * (tkd + dkd), lam * dkd).mean()


def generalized_jsd(student, teacher, labels=None, beta=0.5):
    """The generalised Jensen-Shannon divergence as TRL has it: logarithms throughout, kl_div element by element; 0 and
    1 mean forward and reverse KL.
    """
    log_q, log_p = log_softmaxes(student, teacher)
    kl = lambda of, to: F.kl_div(to, of, reduction="none", log_target=True)
    if beta == 0:
        elements = kl(log_p, log_q)
    elif beta == 1:
        elements = kl(log_q, log_p)
    else:
        log_m = torch.stack([log_q + math.log(1 - beta), log_p + math.log(beta)]).logsumexp(0)
        elements = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return elements.sum() / len(log_q)


def kl(student, teacher, labels=None):
    """Forward KL by PyTorch's own function."""
    return F.kl_div(*log_softmaxes(student, teacher), log_target=True, reduction="batchmean")


def forward_kl(student, teacher, labels=None):
    log_q, log_p = log_softmaxes(student, teacher)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def reverse_kl(student, teacher, labels=None):
    log_q, log_p = log_softmaxes(student, teacher)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def jsd(student, teacher, labels=None):
    """The symmetric one, by the logarithm of the mixture's probabilities."""
    log_q, log_p = log_softmaxes(student, teacher)
    q, p = log_q.exp(), log_p.exp()
    log_m = ((p + q) / 2).log()
    return (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1).mean() / 2


def tvd(student, teacher, labels=None):
    return (teacher.float().softmax(-1) - student.float().softmax(-1)).abs().sum(-1).mean() / 2


def skew_kl(student, teacher, labels=None, alpha=0.1):
    """KL(p, alpha p + (1 - alpha) q), as DistiLLM defines it."""
    log_q, log_p = log_softmaxes(student, teacher)
    p = log_p.exp()
    return (p * (log_p - (alpha * p + (1 - alpha) * log_q.exp()).log())).sum(-1).mean()


def skew_reverse_kl(student, teacher, labels=None, alpha=0.1):
    """KL(q, alpha q + (1 - alpha) p), as DistiLLM defines it."""
    log_q, log_p = log_softmaxes(student, teacher)
    q = log_q.exp()
    return (q * (log_q - (alpha * q + (1 - alpha) * log_p.exp()).log())).sum(-1).mean()


LOSSES = {
    "ATKD, official": official_atkd,
    "ATKD, SE-KD": se_kd_atkd,
    "log_softmax + kl_div": kl,
    "forward KL": forward_kl,
    "reverse KL": reverse_kl,
    "JSD": jsd,
    "JSD, TRL": generalized_jsd,
    "TVD": tvd,
    "skew KL": skew_kl,
    "skew reverse KL": skew_reverse_kl,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--losses", nargs="+", default=[""])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape, dtype = (args.tokens, args.vocab), getattr(torch, args.dtype)
    teacher = (3 * torch.randn(shape)).to(dtype)
    student = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    labels = teacher.float().softmax(-1).multinomial(1).squeeze(1)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.tokens} x {args.vocab} {args.dtype}")
    for name, loss in LOSSES.items():
        if not any(part in name for part in args.losses):
            continue
        times = []
        for _ in range(11):
            student.grad = None
            start = time.perf_counter()
            loss(student, teacher, labels).backward()
            times.append((time.perf_counter() - start) * 1e3)
        print(f"{name:22} {statistics.median(times[2:]):9.2f} ms")


if __name__ == "__main__":
    main()
