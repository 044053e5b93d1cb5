"""The loss of hidden states behind the models' last layers, a chunk of tokens at a time, so that logits of all tokens never
exist.

The hard tokens are known when all margins are, and margins need the teacher's logits. Their set is therefore guessed for
each chunk, from the margins so far; when it is known, the tokens that were guessed wrongly, some percent of the first
chunks, are computed again, and their part of the weight's gradient is exchanged. A chunk takes every so many-th token,
because neighbours are alike, and a guess from them would be worse.
"""

import functools
import math
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from . import _native
from ._checks import DTYPES
from ._teacher import SparseTeacher, Teacher

# The float32 copy of a weight in half precision has so many bytes on the CPU, where it is made of a part of its rows at a time.
_TILE_BYTES = 16 << 20

# The tokens of a chunk: every so many-th, or those at indices.
At = Union[slice, Tensor]


@functools.cache
def multiplies_to_float32(device: torch.device) -> bool:
    """True if torch can multiply in half precision there and keep the float32 sums, also to add them to others: tried, for
    versions have products of both kinds, one, or none.
    """
    if device.type != "cuda":
        return False
    one, to = (torch.zeros((8, 8), dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.ops.aten.mm.dtype_out(one, one, torch.float32, out=to)
        torch.ops.aten.addmm.dtype_out(to, one, one, torch.float32, out=to)
    except (AttributeError, RuntimeError):
        return False
    return True


class Autocast:
    """The autocast that a caller is in, for a module that is called where it is off, or later."""

    def __init__(self, device: torch.device) -> None:
        kind = device.type
        self.state = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def context(self) -> torch.autocast:
        # A cache would hand out what was cast where gradients are off to where they are on.
        return torch.autocast(*self.state, cache_enabled=False)


def empty_rows(count: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for so many tokens' logits, `[count, V]`. Each row starts at a multiple of 16 bytes, by which kernels go, whatever
    the vocabulary and wherever a chunk's rows start.
    """
    vocab = len(weight)
    return weight.new_empty((count, -(-vocab // 8) * 8), dtype=dtype)[:, :vocab]


class Linear:
    """A model's last layer, `hidden @ weight.T + bias`, of hidden states `[N, H]` and a weight `[V, H]`."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], logits_dtype: torch.dtype
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.logits_dtype = logits_dtype
        # Both factors are made float32, where nothing multiplies to that.
        self.upcasts = weight.dtype != logits_dtype and not multiplies_to_float32(weight.device)

    def tiles(self) -> Iterator[slice]:
        """The rows of the weight that are multiplied at once."""
        vocab, features = self.weight.shape
        rows = max(_TILE_BYTES // (4 * max(features, 1)), 1) if self.upcasts else vocab
        return (slice(start, min(start + rows, vocab)) for start in range(0, vocab, max(rows, 1)))

    def logits(self, at: At) -> Tensor:
        return self.multiply_to(empty_rows(len(self.hidden[at]), self.weight, self.logits_dtype), at)

    def multiply_to(self, logits: Tensor, at: At) -> Tensor:
        hidden = self.hidden[at]
        if self.upcasts:
            hidden = hidden.float()
            for tile in self.tiles():
                torch.mm(hidden, self.weight[tile].float().T, out=logits[:, tile])
        elif self.weight.dtype != self.logits_dtype:
            torch.ops.aten.mm.dtype_out(hidden, self.weight.T, self.logits_dtype, out=logits)
        else:
            torch.mm(hidden, self.weight.T, out=logits)
        return logits if self.bias is None else logits.add_(self.bias)


class Sparse:
    """A sparse teacher, in the place of a last layer. Its margins, of all tokens, need no product."""

    def __init__(self, teacher: SparseTeacher, vocab: int) -> None:
        self.teacher, self.vocab = teacher, vocab

    def logits(self, at: At) -> SparseTeacher:
        return self.teacher.at(at)


def gradient_dtype(weight: Tensor, logits_dtype: torch.dtype) -> torch.dtype:
    """That of the logits' gradient: the weight's, by which it is multiplied, where that is not made float32."""
    return weight.dtype if multiplies_to_float32(weight.device) else logits_dtype


# The gradients of the student's hidden states, weight and bias; those that nobody asked for have no elements.
Gradients = Tuple[Tensor, Tensor, Tensor]


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], wanted: Tuple[bool, bool, bool]
) -> Gradients:
    """Memory for them."""
    of_hidden, of_weight, of_bias = wanted
    of_rows = weight.shape[:1] if bias is None else bias.shape
    return (
        _native.empty_gradient(hidden, of_hidden),
        weight.new_empty(weight.shape if of_weight else 0, dtype=torch.float32),
        weight.new_empty(of_rows if of_bias else 0, dtype=torch.float32),
    )


class Student(Linear):
    """The student's last layer, which collects the gradients that are wanted. Those of weight and bias have rows for the
    columns that are no tokens too.

    The gradients of the logits of up to `waiting` tokens, some chunks', wait to be multiplied at once: each product for
    the weight's gradient reads and writes all of that.
    """

    def __init__(
        self, *layer: Any, wanted: Tuple[bool, bool, bool], collected: Gradients, waiting: int
    ) -> None:
        super().__init__(*layer)
        self.wanted, self.with_gradient = wanted, any(wanted)
        # Gradients that are sums over the tokens are wanted.
        self.adds_up = any(wanted[1:])
        of_hidden, of_weight, of_bias = collected
        of_weight[len(self.weight) :].zero_()
        self.collected = of_hidden.view(-1, self.hidden.shape[1]), of_weight, of_bias.zero_()
        # float16 loses what is below 6e-8, and the gradient of a mean is about one over the number of tokens.
        self.scales_last = self.hidden.dtype == torch.float16 and not self.upcasts
        # Those whose gradients are the first of the rows; False for those that only the weight's and the bias's gradients
        # follow from.
        self.waiting: List[Tuple[At, bool]] = []
        self.used = 0
        self.rows = empty_rows(
            waiting if self.with_gradient else 0,
            self.weight,
            gradient_dtype(self.weight, self.logits_dtype),
        )
        # The next product is the first for the weight's gradient, and overwrites it.
        self.is_first = True

    def logits(self, at: At) -> Tensor:
        if self.with_gradient and self.logits_dtype == self.rows.dtype:
            return self.multiply_to(self._free_rows(at), at)
        return super().logits(at)

    def gradient_of(self, logits: Tensor, at: At) -> Tensor:
        """Memory for the gradient of a chunk's logits: theirs, if it has their dtype."""
        return logits if logits.dtype == self.rows.dtype else self._free_rows(at)

    def _free_rows(self, at: At) -> Tensor:
        count = len(self.hidden[at])
        if self.used + count > len(self.rows):
            self._multiply_waiting()
        return self.rows[self.used : self.used + count]

    def add(self, gradient: Tensor, at: At) -> None:
        """Adds what follows from the gradient of the logits of a chunk, which has the free rows."""
        self.waiting.append((at, True))
        self.used += len(gradient)

    def take(self, gradient: Tensor, at: At) -> None:
        """Takes from the gradients of weight and bias what was added to them."""
        torch.neg(gradient, out=self._free_rows(at))
        self.waiting.append((at, False))
        self.used += len(gradient)

    def gradients(self) -> List[Optional[Tensor]]:
        self._multiply_waiting()
        if self.is_first:
            self.collected[1].zero_()
        return [*self.collected]

    def _multiply_waiting(self) -> None:
        if not self.waiting:
            return
        gradient, hidden = self.rows[: self.used], [self.hidden[at] for at, _ in self.waiting]
        by_hidden, by_weight, by_bias = self.collected
        of_hidden, of_weight, of_bias = self.wanted
        if of_hidden:
            if self.upcasts:
                products = gradient.new_zeros((self.used, self.weight.shape[1]))
                for tile in self.tiles():
                    products.addmm_(gradient[:, tile], self.weight[tile].float())
            else:
                products = torch.mm(gradient, self.weight)
            end = 0
            for (at, counts), each in zip(self.waiting, hidden):
                start, end = end, end + len(each)
                if counts:
                    by_hidden[at] = products[start:end].to(by_hidden.dtype)
        if of_bias:
            by_bias[: len(self.weight)].add_(gradient.sum(0, dtype=torch.float32))
        if of_weight:
            of_all = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
            of_all = of_all.float() if self.upcasts else of_all
            for tile in self.tiles():
                _add_product(by_weight[tile], gradient[:, tile].T, of_all, self.is_first)
        self.waiting, self.used, self.is_first = [], 0, False


def _add_product(to: Tensor, one: Tensor, other: Tensor, is_first: bool) -> None:
    """`to += one @ other`, `to` in float32; the first one overwrites it."""
    widens = one.dtype != torch.float32 and multiplies_to_float32(to.device)
    if not widens:
        one, other = one.float(), other.float()
    if widens and is_first:
        torch.ops.aten.mm.dtype_out(one, other, torch.float32, out=to)
    elif widens:
        torch.ops.aten.addmm.dtype_out(to, one, other, torch.float32, out=to)
    elif is_first:
        torch.mm(one, other, out=to)
    else:
        to.addmm_(one, other)


class Module:
    """A student's last layer that is a module: its gradients are those of autograd."""

    def __init__(
        self,
        hidden: Tensor,
        module: torch.nn.Module,
        vocab: int,
        has_padding: bool,
        autocast: Autocast,
        wanted: Tuple[bool, bool],
    ) -> None:
        self.hidden, self.shape = hidden.reshape(-1, hidden.shape[-1]), hidden.shape
        self.module, self.vocab, self.has_padding = module, vocab, has_padding
        self.autocast = autocast
        self.parameters = [each for each in module.parameters() if each.requires_grad]
        self.with_gradient = any(wanted)
        hidden_too, self.adds_up = wanted
        self.scales_last = self.hidden.dtype == torch.float16
        self.by_hidden = (
            self.hidden.new_zeros(self.hidden.shape, dtype=torch.float32) if hidden_too else None
        )
        self.by_parameters: List[Optional[Tensor]] = [None] * len(self.parameters)
        self.graph: Tuple[Tensor, Tensor]

    def logits(self, at: At) -> Tensor:
        hidden = self.hidden[at].detach()
        with torch.set_grad_enabled(self.with_gradient), self.autocast.context():
            made: Any = self.module(hidden.requires_grad_(self.with_gradient))
            if not isinstance(made, Tensor) or made.dtype not in DTYPES:
                kind = made.dtype if isinstance(made, Tensor) else type(made).__name__
                raise TypeError(
                    f"student_head made a {kind}, but must make a tensor of float32, float16 or bfloat16"
                )
            shape = list(made.shape)
            columns = shape[-1] if shape else 0
            if shape[:-1] != [len(hidden)] or columns < self.vocab or (columns > self.vocab and not self.has_padding):
                raise ValueError(
                    f"student_head made {shape} of {list(hidden.shape)}, but must make [{len(hidden)}, {self.vocab}], "
                    "or more columns with vocab_size"
                )
            self.graph = hidden, made[:, : self.vocab]
        return self.graph[1].detach()

    def gradient_of(self, logits: Tensor, at: At) -> Tensor:
        # Autograd may need the logits.
        return torch.empty_like(logits)

    def gradients(self) -> List[Optional[Tensor]]:
        """Those of hidden states and parameters."""
        by_hidden = None if self.by_hidden is None else self.by_hidden.view(self.shape)
        return [by_hidden, *self.by_parameters]

    def take(self, gradient: Tensor, at: At) -> None:
        self.add(gradient, at, -1.0)

    def add(self, gradient: Tensor, at: At, sign: float = 1.0) -> None:
        hidden, logits = self.graph
        to = [hidden, *(self.parameters if self.adds_up else [])]
        found = torch.autograd.grad(logits, to, gradient.to(logits.dtype), retain_graph=True, allow_unused=True)
        by_hidden, *by_parameters = found
        if self.by_hidden is not None and sign > 0 and by_hidden is not None:
            self.by_hidden[at] = by_hidden.float()
        for i, part in enumerate(by_parameters):
            if part is not None:
                total = self.by_parameters[i]
                if total is None:
                    total = self.by_parameters[i] = torch.zeros_like(part, dtype=torch.float32)
                total.add_(part, alpha=sign)


class Tokens(NamedTuple):
    """What is known of the tokens: each `[N]`, or None."""

    labels: Optional[Tensor]
    hard: Optional[Tensor]
    weights: Optional[Tensor]
    temperatures: Optional[Tensor]

    def at(self, at: At) -> "Tokens":
        return Tokens(*[None if each is None else each[at] for each in self])


class Selection:
    """The hard tokens by the margins of the tokens that have one."""

    def __init__(self, valid: Tensor, sequences: int, settings: Dict[str, Any]) -> None:
        self.valid, self.sequences = valid, sequences
        self.rule: str = settings["selection_rule"]
        self.ratio: float = settings["hard_ratio"]
        self.margins = torch.full(valid.shape, -math.inf, dtype=torch.float32, device=valid.device)
        self.known = torch.zeros_like(valid)
        self.offsets: Optional[Tensor] = None
        if sequences > 1:
            self.offsets = _native.offsets_of(sequences, len(valid) // sequences, valid.device)

    def add(self, margins: Tensor, at: At) -> None:
        self.margins[at] = margins.where(self.valid[at], -math.inf)
        self.known[at] = self.valid[at]

    def hard(self) -> Tensor:
        """bool `[N]`."""
        if len(self.valid) == 0:
            return self.known.clone()
        hard = torch.empty_like(self.known)
        how = self.ratio, hard, self.rule
        _native.run_selection(self.margins, self.known, self.offsets, *how)
        return hard


def margins_of(log_prob: Tensor) -> Tensor:
    """log((1 - p) / p) of log p, in float32."""
    log_prob = log_prob.double().clamp(max=0)
    rest = torch.where(
        log_prob > -math.log(2), (-torch.expm1(log_prob)).log(), torch.log1p(-log_prob.exp())
    )
    return (rest - log_prob).float()


class Call:
    """One loss."""

    def __init__(
        self,
        student: Union[Student, Module],
        teacher: Union[Linear, Sparse],
        tokens: Tokens,
        scale: Optional[Tensor],
        teacher_log_prob: Optional[Tensor],
        sequences: int,
        chunk_tokens: int,
        settings: Dict[str, Any],
    ) -> None:
        self.student, self.teacher, self.tokens = student, teacher, tokens
        self.settings = {**settings, "reduction": "sum"}
        count = len(student.hidden)
        device = student.hidden.device
        labels = tokens.labels
        self.valid = torch.ones(count, dtype=torch.bool, device=device)
        if labels is not None:
            self.valid = labels != settings["ignore_index"]
        number = self.valid.sum().clamp(min=1)
        self.scale = number.new_ones((), dtype=torch.float64) if scale is None else scale.double()
        if settings["reduction"] != "sum":
            self.scale = 1 / number.double()
        chunks = -(-count // chunk_tokens)
        self.chunks = [slice(first, None, chunks) for first in range(chunks)]
        self.selection = Selection(self.valid, sequences, settings)
        self.hard = None if tokens.hard is None else tokens.hard & self.valid
        if self.hard is None and teacher_log_prob is not None:
            self.selection.add(margins_of(teacher_log_prob), slice(None))
            self.hard = self.selection.hard()
        if isinstance(teacher, Sparse):
            everywhere = slice(None)
            # Here what is wrong with a value is told with the batch's token; a chunk would tell its own.
            margins = self._margins(teacher.logits(everywhere), everywhere)
            if self.hard is None:
                self.selection.add(margins, everywhere)
                self.hard = self.selection.hard()
        self.of_groups: Optional[Tuple[Tensor, Tensor]] = None
        if settings["reduction"] == "group-mean":
            self.of_groups = self._group_factors(number)
        # The unit in which the tokens' weights are given to the native side, if it is not 1.
        self.unit: Optional[Tensor] = None
        if student.scales_last and tokens.weights is not None:
            # They may be the small factors that a mean has.
            largest = tokens.weights.abs().amax() if count > 0 else self.scale
            largest = largest.where(largest > 0, 1.0).where(largest.isfinite(), 1.0)
            self.tokens = tokens._replace(weights=tokens.weights / largest)
            self.scale = self.scale * largest.double()
            self.unit = largest
        self.terms = torch.zeros((5, count), dtype=torch.float32, device=device)
        self.losses = torch.zeros(count, dtype=torch.float64, device=device)

    def _group_factors(self, number: Tensor) -> Tuple[Tensor, Tensor]:
        """One over how many tokens are easy, and hard, times the number of all."""
        top_k = self.selection.rule == "top-k" and self.selection.sequences == 1
        if self.hard is None and not top_k:
            # How many are hard only their selection tells.
            for at in self.chunks:
                self.selection.add(self._margins(self.teacher.logits(at), at), at)
            self.hard = self.selection.hard()
        valid = self.valid.sum().double()
        hard = (self.selection.ratio * valid).ceil() if self.hard is None else self.hard.sum().double()
        easy, hard = (each.clamp(min=1) for each in (valid - hard, hard))
        return (number / easy).float(), (number / hard).float()

    def _margins(self, logits: Teacher, at: At) -> Tensor:
        margins = torch.empty_like(self.valid[at], dtype=torch.float32)
        labels, _, _, temperatures = self.tokens.at(at)
        vocab = self.teacher.vocab if isinstance(self.teacher, Sparse) else None
        _native.run_margins(logits, labels, temperatures, vocab, self.settings, margins)
        return margins

    def run(self) -> Tuple[Tensor, Tensor]:
        """The loss, and the hard tokens; the terms are `terms`, the gradients the student's."""
        selects = self.hard is None
        # Else the set is a statistic alone.
        matters = self.settings["objective"] == "atkd"
        hard = torch.zeros_like(self.valid) if self.hard is None else self.hard
        for at in self.chunks:
            teacher = self.teacher.logits(at)
            if selects and matters:
                self.selection.add(self._margins(teacher, at), at)
                hard[at] = self.selection.hard()[at]
            self._rows(teacher, self.student.logits(at), at, hard[at])
            # Before the next ones.
            del teacher
            if selects and not matters:
                self.selection.add(self.terms[3, at], at)
        if self.hard is None:
            self.hard = self.selection.hard()
            if matters and len(self.chunks) > 1:
                self._repair(((hard != self.hard) & self.valid).nonzero().squeeze(1), self.hard)
        gradients = self.student.gradients()
        if self.student.scales_last:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(self.scale.float())
        if self.unit is not None:
            self.terms[4] *= self.unit
        if self.tokens.hard is None:
            # The terms may have other last bits.
            self.terms[3] = self.selection.margins
        return (self.losses.sum() * self.scale).float(), self.hard

    def _repair(self, wrong: Tensor, hard: Tensor) -> None:
        """Computes the tokens again whose group was guessed wrongly."""
        # Two gradients, not one, beside the logits.
        at_once = max(len(range(*self.chunks[0].indices(len(hard)))) // 2, 1)
        for first in range(0, len(wrong), at_once):
            at = wrong[first : first + at_once]
            teacher = self.teacher.logits(at)
            logits = self.student.logits(at)
            copy: Optional[Tensor] = None
            if self.student.adds_up:
                # The gradient may replace them.
                copy = logits.new_empty_strided(logits.shape, logits.stride()).copy_(logits)
            self._rows(teacher, logits, at, hard[at])
            if copy is not None:
                self._rows(teacher, copy, at, ~hard[at], taken=True)

    def _rows(
        self, teacher: Teacher, student: Tensor, at: At, hard: Tensor, taken: bool = False
    ) -> None:
        """The terms of a chunk, and its part of the gradients; or that part alone, taken from the weight's and the bias's."""
        labels, _, weights, temperatures = self.tokens.at(at)
        terms: Optional[Tensor] = None
        losses: Any = 0.0
        gradient: Optional[Tensor] = None
        parts = self._parts(hard)
        for settings, factors in parts:
            to = None
            if self.student.with_gradient:
                is_last = settings is parts[-1][0]
                to = self.student.gradient_of(student, at) if is_last else torch.empty_like(student)
            scale = None if self.student.scales_last else self.scale.float()
            given = labels, scale, hard, _native.product(weights, factors), temperatures, to
            _, stats = _native.run_loss(student, teacher, *given, False, None, settings, True)
            assert stats is not None
            found, _ = stats
            losses = losses + found[4].double()
            if factors is not None:
                found[4] /= factors
            if terms is None:
                terms, gradient = found, to
            else:
                terms[4] += found[4]
                gradient = to if gradient is None or to is None else to.add_(gradient)
        assert terms is not None
        if not taken:
            self.terms[:, at], self.losses[at] = terms, losses
        if gradient is not None:
            (self.student.take if taken else self.student.add)(gradient, at)

    def _parts(self, hard: Tensor) -> List[Tuple[Dict[str, Any], Optional[Tensor]]]:
        """The settings of the sums that a loss is made of, with factors of their tokens."""
        if self.of_groups is None:
            return [(self.settings, None)]
        easy, of_hard = self.of_groups
        parts: List[Tuple[Dict[str, Any], Optional[Tensor]]] = [
            ({**self.settings, "ce_weight": 0.0}, torch.where(hard, of_hard, easy))
        ]
        if self.settings["ce_weight"] != 0:
            # Its mean is over all tokens.
            parts.append(({**self.settings, "kd_weight": 0.0}, None))
        return parts
