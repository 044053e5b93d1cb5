"""What the losses of `compare.py` are defined to be, in float64: errors are against autograd of these.

Each is a function of the student's and the teacher's logits `[N, V]` and of the labels `[N]`, none of them ignored.
Nothing here is clamped or has an epsilon.
"""

import functools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import definitions


def divergence(log_p, log_q, name, beta=None):
    """Of the last axis. `beta` is the share of the distribution that is named first in a skewed divergence, and the
    teacher's in the JSD.
    """
    kl = lambda log_x, log_y: (log_x.exp() * (log_x - log_y)).sum(-1)
    mixture = lambda log_x, log_y, share: torch.logaddexp(log_x + math.log(share), log_y + math.log1p(-share))
    if name == "forward-kl":
        return kl(log_p, log_q)
    if name == "reverse-kl":
        return kl(log_q, log_p)
    if name == "jsd":
        log_m = mixture(log_p, log_q, beta)
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    if name == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    if name == "skew-kl":
        return kl(log_p, mixture(log_p, log_q, beta))
    if name == "skew-reverse-kl":
        return kl(log_q, mixture(log_q, log_p, beta))
    raise ValueError(f"no divergence is called {name!r}")


def _plain(student, teacher, labels, name, beta):
    return divergence(teacher.log_softmax(-1), student.log_softmax(-1), name, beta).mean()


def _atkd(student, teacher, labels, name, beta, official, lam=0.2, hard_ratio=0.5):
    p, p_rest, p_hat = definitions.split(teacher, labels)
    q, q_rest, q_hat = definitions.split(student, labels)
    tkd = divergence(torch.stack([p, p_rest], -1), torch.stack([q, q_rest], -1), name, beta)
    dkd = divergence(p_hat, q_hat, name, beta)
    margin = p_rest - p
    if official:
        # The order of the margins is that of the uncertainties, and has digits where these are all 1.
        hard = margin >= margin.median()
        return lam * dkd[~hard].mean() + (1 - lam) * (tkd + dkd)[hard].mean()
    hard = definitions.select(margin, hard_ratio)
    return torch.where(hard, (1 - lam) * (tkd + dkd), lam * dkd).mean()


# One object for each loss, so that what was computed of one can be found again.
@functools.cache
def plain(name, beta=None):
    """The divergence over the whole vocabulary, its mean over the tokens."""
    return functools.partial(_plain, name=name, beta=beta)


@functools.cache
def atkd(name="forward-kl", beta=None):
    """ATKD over a divergence: ceil(k N) hard tokens, one mean over all tokens."""
    return functools.partial(_atkd, name=name, beta=beta, official=False)


def needs_labels(definition):
    return definition.func is _atkd


@functools.cache
def official_atkd():
    """ATKD with the official code's conventions: hard from the median on, a mean for each group."""
    return functools.partial(_atkd, name="forward-kl", beta=None, official=True)
