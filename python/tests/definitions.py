"""The paper's definitions in float64, for torch.autograd to differentiate.

Nothing here knows the fused form: softmax, split at the target, renormalise, two divergences.
"""

import math

import torch


def split(logits, target):
    """log p_g, log(1 - p_g), and the log of the renormalised others, of logits `[N, V]`."""
    at_target = torch.nn.functional.one_hot(target, logits.shape[-1]).bool()
    log_p = torch.log_softmax(logits, -1)
    others = log_p[~at_target].view(len(log_p), -1)
    # 1 - p_g as the sum of the others: near p_g = 1 the difference has no digits.
    log_rest = others.logsumexp(-1)
    return log_p[at_target], log_rest, others - log_rest[:, None]


def select(margin, hard_ratio):
    """The `ceil(k * N)` of largest margin, equal ones by lower index."""
    hard = torch.zeros_like(margin, dtype=torch.bool)
    order = margin.argsort(descending=True, stable=True)
    hard[order[: math.ceil(hard_ratio * len(margin))]] = True
    return hard


def from_median(margin):
    """From element (N - 1) // 2 in ascending order on."""
    return margin >= margin.sort().values[(len(margin) - 1) // 2] if len(margin) else margin.bool()


def is_kl(name, beta):
    """True for the divergences of which a plain one is a sum of parts."""
    ends = [("jsd", 0), ("jsd", 1), ("skew-kl", 0), ("skew-reverse-kl", 0)]
    return name in ("forward-kl", "reverse-kl") or (name, beta) in ends


def diverge(name, beta, log_p, log_q):
    """The divergence of the student's q from the teacher's p over the last dimension."""

    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    def mixed(log_a, log_b):
        return torch.logaddexp(log_a + math.log(beta), log_b + math.log(1 - beta))

    if name == "forward-kl" or beta == 0 and name in ("jsd", "skew-kl"):
        return kl(log_p, log_q)
    if name == "reverse-kl" or (name, beta) in [("jsd", 1), ("skew-reverse-kl", 0)]:
        return kl(log_q, log_p)
    if name == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    if name == "jsd":
        log_m = mixed(log_p, log_q)
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return {
        "skew-kl": lambda: kl(log_p, mixed(log_p, log_q)),
        "skew-reverse-kl": lambda: kl(log_q, mixed(log_q, log_p)),
    }[name]()


def atkd_loss(
    student,
    teacher,
    labels=None,
    lam=0.2,
    hard_ratio=0.5,
    temperature=1.0,
    temperature_squared=False,
    objective="atkd",
    target="label",
    selection="batch",
    reduction="mean",
    ignore_index=-100,
    ce_weight=0.0,
    kd_weight=1.0,
    num_items_in_batch=None,
    shift_labels=False,
    divergence="forward-kl",
    beta=0.5,
    selection_rule="top-k",
):
    """The loss, and `(uncertainty, tkd, dkd, hard)` shaped as the labels."""
    if shift_labels:
        student, teacher, labels = student[..., :-1, :], teacher[..., :-1, :], labels[..., 1:]
    assert student.dtype == teacher.dtype == torch.float64
    shape = student.shape[:-1]
    if labels is None:
        labels = torch.zeros(shape, dtype=torch.int64)
    valid = labels != ignore_index
    sequence = torch.zeros(shape, dtype=torch.int64)
    if selection == "sequence":
        sequence += torch.arange(shape[0])[:, None]
    student, teacher, labels, sequence = student[valid], teacher[valid], labels[valid], sequence[valid]
    g = teacher.argmax(-1) if target == "teacher" else labels.long()

    p, p_rest, p_hat = split(teacher / temperature, g)
    q, q_rest, q_hat = split(student / temperature, g)
    uncertainty = p_rest.exp()
    tkd = diverge(divergence, beta, torch.stack([p, p_rest], -1), torch.stack([q, q_rest], -1))
    dkd = diverge(divergence, beta, p_hat, q_hat)
    whole = [torch.log_softmax(logits / temperature, -1) for logits in (teacher, student)]
    plain = diverge(divergence, beta, *whole)
    ce = -split(student, g)[0]

    hard = torch.zeros_like(g, dtype=torch.bool)
    for i in sequence.unique():
        margin = (p_rest - p)[sequence == i]
        hard[sequence == i] = from_median(margin) if selection_rule == "median" else select(margin, hard_ratio)
    kd = {
        "atkd": torch.where(hard, (1 - lam) * (tkd + dkd), lam * dkd),
        "plain": plain,
        "kl": tkd + uncertainty * dkd,
        "tkd": tkd,
        "dkd": dkd,
    }[objective]
    if temperature_squared:
        kd = kd * temperature**2
    loss = (kd_weight * kd + ce_weight * ce).sum()
    if reduction == "group-mean":
        groups = [kd[group].sum() / max(int(group.sum()), 1) for group in (hard, ~hard)]
        loss = kd_weight * sum(groups) + ce_weight * ce.sum() / max(len(g), 1)
    if num_items_in_batch is not None:
        loss = loss / num_items_in_batch
    elif reduction == "mean":
        loss = loss / max(len(g), 1)

    if objective == "plain" and not is_kl(divergence, beta):
        # Not computed, and said so.
        tkd = dkd = torch.full_like(ce, math.nan)

    def put_back(values):
        return torch.zeros(shape, dtype=values.dtype).masked_scatter(valid, values.detach())

    return loss, [put_back(values) for values in (uncertainty, tkd, dkd, hard)]
