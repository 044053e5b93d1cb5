"""The teacher of a call: its logits, or a few log-probabilities per token."""

from operator import index
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

# Logits whose cumulative distributions are made at a time, in float64.
_CHUNK = 2**22

# How far rounding to a dtype may move the sum of a row's probabilities from 1, as the native checks have it.
MASS_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}

# The most that K, or a number of draws, may be.
_MAX_TOP_K = 1024


def _integer(name: str, number: Any) -> int:
    try:
        return index(number)
    except TypeError:
        raise TypeError(f"{name} is {number!r}, but must be an integer") from None


class SparseTeacher(NamedTuple):
    """The teacher's log-probabilities of K tokens of the vocabulary at each position, and of the target: all that is known
    where its logits are not in memory. `sparse_atkd_loss` says what each is.
    """

    indices: Tensor
    """`[N, K]` or `[B, T, K]`, int64 or int32: tokens of the vocabulary, or -1 for none."""
    log_probs: Tensor
    """Of the same shape, float32, float16 or bfloat16: natural logarithms, at the temperature of the call."""
    target_log_prob: Optional[Tensor] = None
    """`[N]` or `[B, T]`, of a floating dtype: that of each position's target."""
    tail: str = "bucket"
    """What the teacher is taken for outside of the known tokens: `"zero"`, `"uniform"`, `"bucket"` or `"sampled"`."""

    def at(self, at: Any) -> "SparseTeacher":
        """The rows at these positions of the first dimension."""
        target = self.target_log_prob
        return SparseTeacher(
            self.indices[at], self.log_probs[at], None if target is None else target[at], self.tail
        )

    @staticmethod
    def sample(
        teacher_logits: Tensor,
        labels: Tensor,
        draws: int,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        vocab_size: Optional[int] = None,
        generator: Optional[torch.Generator] = None,
    ) -> "SparseTeacher":
        """Draws from a teacher, instead of its likeliest tokens, so that the gradient by forward KL has the expectation of the
        whole teacher's ("Sparse Logit Sampling", Anshumann et al., ACL 2025); its tail is `"sampled"`.

        The draws are with replacement, from what the teacher gives all tokens but the label, whose probability is exact. Each
        row has one random number, and draws that are evenly spaced in the cumulative distribution from there on: a token is
        drawn as often as its probability says, rounded down or up (systematic sampling). That has the expectation of
        independent draws, and a smaller variance.

        `target_log_prob` is float32. Where the label has more than 1 - 1.2e-38, a margin below -87, it is subnormal: it has
        less digits (at -103 the margin is off by 0.1), and is 0 in a process that flushes such numbers. Below -103.9 it is 0
        in any, and the margin -inf, where the logits' own margins go on.

        Args:
            teacher_logits: `[N, V]` or `[B, T, V]`, of a floating dtype; softmaxes are in float64, on their device.
            labels: `[N]` or `[B, T]`, int64 or int32: the token that the logits at each position are about.
            draws: of each row, from 1 to 1024: K of the result. A token that is drawn more than once has one entry; an index
                of -1 is left for the others.
            temperature: divides the logits, and is that of the loss: a number, or a tensor that holds one.
            ignore_index: rows of this label have no entries.
            vocab_size: columns from there on are padding.
            generator: of the random numbers.

        Raises:
            TypeError: for other dtypes and types.
            ValueError: for shapes that do not go together, numbers outside of their range, a label that names no token, and for
                logits that are NaN, +inf or all -inf, with the token counted over all positions.
        """
        if not isinstance(teacher_logits, Tensor) or not teacher_logits.is_floating_point():
            kind = getattr(teacher_logits, "dtype", type(teacher_logits).__name__)
            raise TypeError(f"teacher_logits are {kind}, but must be a tensor of a floating dtype")
        if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
            kind = getattr(labels, "dtype", type(labels).__name__)
            raise TypeError(f"labels are {kind}, but must be a tensor of int64 or int32")
        shape, columns = teacher_logits.shape[:-1], teacher_logits.shape[-1:].numel()
        if teacher_logits.dim() < 2 or labels.shape != shape:
            raise ValueError(
                f"teacher_logits are {list(teacher_logits.shape)} and labels {list(labels.shape)}, but must be [N, V] and [N], or "
                "[B, T, V] and [B, T]"
            )
        draws = _integer("draws", draws)
        vocab = columns if vocab_size is None else _integer("vocab_size", vocab_size)
        ignore_index = _integer("ignore_index", ignore_index)
        for name, number, most in [("draws", draws, _MAX_TOP_K), ("vocab_size", vocab, columns)]:
            if not 1 <= number <= most:
                raise ValueError(f"{name} is {number}, but must be from 1 to {most}")
        if isinstance(temperature, Tensor):
            if temperature.numel() != 1:
                raise ValueError(f"temperature is {list(temperature.shape)}, but must be one number")
            temperature = temperature.item()
        if not hasattr(temperature, "__float__"):
            raise TypeError(f"temperature is {temperature!r}, but must be a number")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}, but must be positive and finite")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator is {generator!r}, but must be a torch.Generator")
        flat = teacher_logits.detach()[..., :vocab].reshape(-1, vocab)
        of_rows = labels.reshape(-1).to(flat.device, torch.int64)
        valid = of_rows != ignore_index
        wrong = (valid & ((of_rows < 0) | (of_rows >= vocab))).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"the label of token {at} is {int(of_rows[at])}, but must be from 0 to {vocab - 1}, or the ignore_index"
            )
        source = flat.device if generator is None else generator.device
        wide = torch.float32 if flat.device.type == "mps" else torch.float64
        random = torch.rand(len(flat), generator=generator, device=source, dtype=wide)
        random = random.to(flat.device)
        parts = []
        tokens = max(1, _CHUNK // vocab)
        for start in range(0, max(len(flat), 1), tokens):
            rows = slice(start, start + tokens)
            logits = flat[rows].to(wide) / temperature
            bad = valid[rows] & (~(logits < torch.inf).all(-1) | (logits == -torch.inf).all(-1))
            if bad.any():
                raise ValueError(
                    f"teacher_logits of token {start + int(bad.nonzero()[0])} are NaN, +inf or all -inf"
                )
            parts.append(_drawn(logits, of_rows[rows], valid[rows], random[rows], draws))
        indices, log_probs, target = (torch.cat(each) for each in zip(*parts))
        return SparseTeacher(
            indices.view(*shape, draws), log_probs.view(*shape, draws), target.view(shape), "sampled"
        )


def _drawn(
    logits: Tensor, labels: Tensor, valid: Tensor, random: Tensor, draws: int
) -> Tuple[Tensor, Tensor, Tensor]:
    """Indices and logarithms of weights `[n, draws]`, and the labels' log-probabilities, of logits over the temperature."""
    at_label = labels.where(valid, 0).unsqueeze(-1)
    of_label = logits.gather(-1, at_label)
    others = logits.scatter(-1, at_label, -torch.inf)
    of_others = others.logsumexp(-1, keepdim=True)
    margin = of_others - of_label
    ends = (others - of_others).exp().cumsum(-1) * draws
    points = torch.arange(draws, device=logits.device) + random.unsqueeze(-1)
    # Rounding may leave the last end below the last point.
    points = points.minimum(ends[:, -1:].nextafter(torch.zeros_like(ends[:, -1:])))
    tokens = torch.searchsorted(ends, points, right=True).clamp(max=logits.shape[-1] - 1)
    is_first = tokens != torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=-1)
    place = is_first.cumsum(-1) - 1
    counts = torch.zeros_like(points).scatter_add_(-1, place, torch.ones_like(points))
    indices = torch.full_like(tokens, -1).scatter_(-1, place, tokens)
    log_probs = torch.nn.functional.logsigmoid(margin) + (counts / draws).log()
    # A label that has all of the mass leaves nothing to draw.
    empty = (counts == 0) | ~(valid.unsqueeze(-1) & (of_others > -torch.inf))
    return (
        indices.masked_fill(empty, -1).to(torch.int32),
        log_probs.masked_fill(empty, -torch.inf).float(),
        torch.nn.functional.logsigmoid(-margin).squeeze(-1).masked_fill(~valid, -torch.inf).float(),
    )


# Logits `[.., V]`, or a sparse teacher, of which operators and autograd's functions take the parts.
Teacher = Union[Tensor, SparseTeacher]


def parts(teacher: Teacher) -> Tuple[Any, ...]:
    return tuple(teacher) if isinstance(teacher, SparseTeacher) else (teacher,)


def of_parts(given: Sequence[Any]) -> Teacher:
    return SparseTeacher(*given) if len(given) > 1 else given[0]


def tensors(teacher: Teacher) -> List[Optional[Tensor]]:
    return [*teacher[:3]] if isinstance(teacher, SparseTeacher) else [teacher]
