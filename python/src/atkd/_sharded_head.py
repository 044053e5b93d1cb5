"""The loss of hidden states over groups of ranks, each of which has some rows of both models' last layers.

The hidden states are those of all columns, so the ranks of a vocabulary group share them, and their chunks. Each chunk's
logits become states, which the ranks gather. No chunk's gradient is known before all ranks' margins are. They come first,
from products of the teacher's alone: one product more than the four of a loss whose hard tokens are known, by its objective,
`hard` or `teacher_log_prob`, or whose tokens are one chunk.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from . import _checks, _head, _linear, _loss, _native, _settings
from ._groups import Header, Part, Ranks, check_apart
from ._loss import Stats
from ._shards import (
    Agreed,
    Selection,
    agree,
    check_scale,
    check_told,
    counts_of,
    device_of,
    exchange,
    header_of,
    items_of,
    labelled,
    logits_of,
    needs_header,
    plain,
    plain_sparse,
    refuse_transforms,
    resolved,
    sparse_margins,
    told_integers,
    valid_of,
)
from ._teacher import SparseTeacher, Teacher


class _Prepared(NamedTuple):
    """A rank's arguments before it has heard of the others."""

    given: _linear.Given
    margins: Optional[Tensor]
    """Those of a sparse teacher."""
    agreed: Agreed
    per_token: bool
    header: Header
    shown: str


def _prepare(
    vocabulary: Ranks, tokens: Ranks, layers: Dict[str, Any], labels: Any, given: Dict[str, Any]
) -> _Prepared:
    """Raises for whatever can be found wrong here."""
    if given["student_head"] is not None:
        raise ValueError(
            "student_head makes logits of the whole vocabulary on one rank: with groups of ranks give student_weight"
        )
    check_apart(vocabulary, tokens)
    vocab_size, vocab_start, token_counts = told_integers(given)
    log_prob = given["teacher_log_prob"]
    sparse: Optional[SparseTeacher] = given["teacher"]
    if sparse is not None:
        sparse = plain_sparse(_linear.checked_sparse(sparse, {**layers, "teacher_log_prob": log_prob}))
    for name, tensor in {**layers, "teacher_log_prob": log_prob}.items():
        is_needed = name.endswith(("hidden", "weight")) and not (sparse and name.startswith("teacher"))
        if tensor is not None or is_needed:
            is_or_are = "are" if name.endswith("hidden") else "is"
            _loss.check_tensor(name, tensor, is_or_are, "linear_atkd_loss")
            for ranks in (vocabulary, tokens):
                ranks.check_device(name, tensor)
    if log_prob is not None:
        _loss.check_constant("teacher_log_prob", log_prob, "requires")
    sizes = given["chunk_tokens"], given["memory_budget"], given["logits_dtype"]
    _linear.check_sizes(*sizes)
    prepared = _loss.prepare(
        "linear_atkd_loss",
        layers["student_hidden"],
        labels,
        given["hard"],
        given["token_weights"],
        given["num_items_in_batch"],
        given["shift_labels"],
        given["selection"],
        False,
        given["settings"],
    )
    settings = resolved(prepared.settings)
    layers = {name: None if each is None else plain(name, each) for name, each in layers.items()}
    student: List[Any] = _linear.cast_for_autocast(
        *[layers[f"student_{each}"] for each in ("hidden", "weight", "bias")]
    )
    teacher: List[Any] = [layers[f"teacher_{each}"] for each in ("hidden", "weight", "bias")]
    if sparse is None:
        teacher = _linear.cast_for_autocast(*teacher)
    teacher = [None if each is None else each.detach() for each in teacher]
    optional = given["hard"], given["token_weights"], prepared.temperatures, log_prob
    hard, token_weights, temperatures, log_prob, labels, scale = (
        None if each is None else plain("tensors of tokens", each)
        for each in (*optional, prepared.labels, prepared.scale)
    )
    wanted = [
        each is not None and each.requires_grad and torch.is_grad_enabled() for each in student
    ]
    of_tokens = labels, scale, hard, token_weights, temperatures, log_prob
    arguments: Any = (
        *student,
        *teacher,
        *of_tokens,
        *wanted,
        prepared.per_sequence,
        vocab_size,
        *sizes,
        *(sparse or ()),
    )
    call = _linear.Given(*arguments)
    _linear.check(call, {"numbers": None, **settings}, is_shard=vocabulary.group is not None)
    _checks.check_values(labels, temperatures, log_prob, None, settings["ignore_index"])
    of_teacher: Teacher = teacher[0] if sparse is None else sparse
    count, rows = call.shape.numel(), len(student[1])
    columns = rows, rows if sparse is not None else len(teacher[1])
    check_told(vocabulary, tokens, vocab_start, token_counts, count)
    check_scale(scale)
    flags = {
        "selection": given["selection"],
        "shift_labels": bool(given["shift_labels"]),
        "return_stats": bool(given["return_stats"]),
        "num_items_in_batch": items_of(given["num_items_in_batch"]),
        "chunk_tokens": given["chunk_tokens"],
        "memory_budget": given["memory_budget"],
        "logits_dtype": given["logits_dtype"],
        # Its gradient is summed up over the ranks.
        "student_hidden's requires_grad": wanted[0],
        "student_hidden's last dimension": student[0].shape[-1],
        "tail": None if sparse is None else sparse.tail,
    }
    margins: Optional[Tensor] = None
    if sparse is not None:
        known_vocab = rows if vocabulary.group is None and vocab_size is None else vocab_size
        margins = sparse_margins(sparse, labels, known_vocab, settings)
    objective = _settings.native(settings)
    agreed = Agreed("linear_atkd_loss", settings, objective, flags, vocab_size)
    compares = vocabulary.group is not None and needs_header(
        vocabulary, tokens, vocab_start, vocab_size, token_counts
    )
    shown = agreed.shown(prepared.per_token)
    header = header_of(
        agreed,
        student[0],
        of_teacher,
        count,
        call.shape[1] if prepared.per_sequence else 0,
        columns,
        {
            "labels": labels,
            "hard": hard,
            "token_weights": token_weights,
            "temperature": temperatures,
            "teacher_log_prob": log_prob,
        },
        vocab_start,
        shown,
        compares,
    )
    return _Prepared(call, margins, agreed, prepared.per_token, header, shown)


class _Found(NamedTuple):
    """The gradients of hidden states, weight and bias, None where nobody wants one."""

    found: List[Optional[Tensor]]

    def gradients(self) -> List[Optional[Tensor]]:
        return self.found


class _Call:
    """One loss."""

    def __init__(
        self,
        vocabulary: Ranks,
        tokens: Ranks,
        part: Part,
        given: _linear.Given,
        margins: Optional[Tensor],
        agreed: Agreed,
        with_stats: bool,
    ) -> None:
        self.vocabulary, self.tokens, self.part = vocabulary, tokens, part
        self.given, self.settings, self.objective = given, agreed.settings, agreed.objective
        self.wants_hard = self.objective.depends_on_selection or with_stats
        self.valid = valid_of(given.labels, given.student_hidden, self.settings["ignore_index"])
        columns = part.columns
        self.labels, self.sparse_margins = given.labels, margins
        self.sparse, self.teacher = given.sparse, None
        if self.sparse is not None:
            sparse = self.sparse
            if self.settings["target"] == "teacher":
                sparse, self.labels, self.settings = labelled(sparse, self.labels, self.settings)
                self.objective = _settings.native(self.settings)
            target = sparse.target_log_prob
            self.sparse = sparse._replace(
                indices=sparse.indices.flatten(0, -2),
                log_probs=sparse.log_probs.flatten(0, -2),
                target_log_prob=None if target is None else target.reshape(-1),
            )
        else:
            hidden, weight, bias = given.teacher_hidden, given.teacher_weight, given.teacher_bias
            self.teacher = _head.Linear(
                hidden.reshape(-1, hidden.shape[-1]),
                weight[:columns],
                None if bias is None else bias[:columns],
                _linear.logits_dtype_of(hidden, given.logits_dtype),
            )
        layer: List[Any] = [given.student_hidden, given.student_weight, given.student_bias]
        if layer[0].is_cuda and layer[0].dtype == torch.float16:
            # A gradient in float16 loses what is below 6e-8.
            layer = [None if each is None else each.float() for each in layer]
        self.layer = layer[0].detach(), layer[1].detach(), None if layer[2] is None else layer[2].detach()

    def _student(self, wanted: Tuple[bool, ...], chunk: int, waiting: int) -> _head.Student:
        hidden, weight, bias = self.layer
        columns = self.part.columns
        wanted_of: Any = wanted
        by_hidden, *by_others = _head.empty_gradients(hidden, weight, bias, wanted_of)
        # Rounded once, after the sum over the ranks.
        collected: Any = (by_hidden.float(), *by_others)
        return _head.Student(
            hidden.reshape(-1, hidden.shape[-1]),
            weight[:columns],
            None if bias is None else bias[:columns],
            _linear.logits_dtype_of(hidden, self.given.logits_dtype),
            wanted=wanted_of,
            collected=collected,
            waiting=waiting,
        )

    def _chunks(self) -> Tuple[int, int]:
        """The tokens of a chunk, the same on all ranks of the vocabulary group; and how many may wait."""
        hidden, weight, _ = self.layer
        dtype = _linear.logits_dtype_of(hidden, self.given.logits_dtype)
        of_teacher = torch.float32 if self.teacher is None else self.teacher.logits_dtype
        dtypes = dtype, of_teacher, _head.gradient_dtype(weight, dtype)
        waits = hidden.is_cuda and (
            hidden.dtype == torch.float32 or _head.multiplies_to_float32(hidden.device)
        )
        widest = max(self.part.widest, 1)
        return _linear.chunk_tokens_of(self.given, widest, *dtypes, waits, self.settings)

    def run(
        self, wanted: Tuple[bool, ...], upstream: Optional[Tensor], known: Optional[Tensor]
    ) -> Tuple[_Found, Tensor, Tensor, Tensor]:
        """The gradients, the loss, the terms, and which tokens are hard. `upstream` multiplies the tokens' weights; `known`
        are the hard ones.
        """
        given = self.given
        # In `backward` the tokens' losses, which are divided by no count, need nothing of other tokens' ranks.
        tokens = self.tokens if known is None else Ranks("token_group", None)
        chunk_tokens, waiting = self._chunks()
        with torch.no_grad(), torch.autocast(given.student_hidden.device.type, enabled=False):
            return self._run(
                chunk_tokens,
                self._student(wanted, chunk_tokens, waiting),
                _head.Tokens(
                    *[
                        None if each is None else each.reshape(-1)
                        for each in (
                            self.labels,
                            None,
                            _native.product(upstream, given.token_weights),
                            given.temperatures,
                        )
                    ]
                ),
                Selection(
                    tokens,
                    self.part,
                    self.valid,
                    given.hard if known is None else known,
                    given.per_sequence,
                    self.wants_hard,
                    self.settings,
                ),
            )

    def _run(
        self,
        chunk_tokens: int,
        student: _head.Student,
        tokens: _head.Tokens,
        selection: Selection,
    ) -> Tuple[_Found, Tensor, Tensor, Tensor]:
        count, shape = len(student.hidden), self.given.shape
        number = -(-count // chunk_tokens)
        chunks = [slice(first, None, number) for first in range(number)]
        terms = torch.zeros((5, count), dtype=torch.float32, device=self.valid.device)
        margins = self._margins(chunks, tokens, selection)
        hard: Optional[Tensor] = None
        if margins is not None or selection.known is not None or number != 1:
            hard, counts = self._selected(selection, margins)
        loss = terms.new_zeros((), dtype=torch.float64)
        for at in chunks:
            logits = student.logits(at)
            teacher = self._teacher_logits(logits, at, tokens)
            stages = self._stages(logits, teacher, tokens.at(at))
            states, sums = exchange(self.vocabulary, self.objective, stages)
            if hard is None:
                hard, counts = self._selected(selection, stages.margins(states).view(shape))
            value, (terms[:, at], _) = stages.loss(states, sums, hard[at], counts)
            loss += value
            if student.with_gradient:
                to = student.gradient_of(logits, at)
                stages.gradient(states, sums, hard[at], self.given.scale, counts, to)
                student.add(to, at)
            # Before the next ones.
            del teacher, logits, stages
        assert hard is not None, "there were chunks, or no token"
        if self.given.scale is not None:
            loss *= self.given.scale
        tells = self.given.teacher_log_prob is not None or self.sparse is not None
        if tells and margins is not None:
            terms[3] = margins.reshape(-1).where(self.valid.reshape(-1), -torch.inf)
        found = [
            gradient if wanted else None
            for gradient, wanted in zip(student.gradients(), student.wanted)
        ]
        if found[0] is not None:
            # Each rank's columns have a part of it.
            found[0] = self.vocabulary.sum(found[0]).view(self.given.student_hidden.shape)
        return _Found(found), loss.float(), terms.view(5, *shape), hard.view(shape)

    def _selected(
        self, selection: Selection, margins: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        """The hard tokens `[N]`, and the counts of all ranks' tokens."""
        hard, counts = selection.hard(margins)
        if counts is None:
            # Natively they would be those of a chunk.
            counts = counts_of(self.valid, hard)
        return hard.reshape(-1), counts

    def _margins(
        self, chunks: List[slice], tokens: _head.Tokens, selection: Selection
    ) -> Optional[Tensor]:
        """The margins, where they must be known before the gradient."""
        if selection.known is not None:
            return None
        log_prob = self.given.teacher_log_prob
        if log_prob is not None:
            return _head.margins_of(log_prob)
        if self.sparse_margins is not None:
            return self.sparse_margins
        if len(chunks) == 1:
            return None
        assert self.teacher is not None, "there is one or the other"
        margins = torch.zeros(self.valid.numel(), dtype=torch.float32, device=self.valid.device)
        for at in chunks:
            teacher = self.teacher.logits(at)
            stages = self._stages(teacher, teacher, tokens.at(at))
            margins[at] = stages.margins(self.vocabulary.gather(stages.states()))
            del teacher, stages
        return margins.view(self.valid.shape)

    def _teacher_logits(self, student: Tensor, at: slice, tokens: _head.Tokens) -> Tensor:
        if self.sparse is None:
            assert self.teacher is not None, "there is one or the other"
            return self.teacher.logits(at)
        stages = self._stages(student, student, tokens.at(at))
        return logits_of(self.vocabulary, stages, self.sparse.at(at))

    def _stages(
        self, student: Tensor, teacher: Tensor, tokens: _head.Tokens
    ) -> _native.Stages:
        columns = self.part.first_column, self.part.columns, self.part.vocab
        of_tokens = tokens.labels, tokens.weights, tokens.temperatures
        return _native.Stages(student, teacher, *of_tokens, *columns, self.objective)


def _linear_atkd_loss(
    layers: Dict[str, Any], labels: Any, vocab_group: Any, token_group: Any, given: Dict[str, Any]
) -> Union[Tensor, Tuple[Tensor, Stats]]:
    refuse_transforms("linear_atkd_loss")
    vocabulary, tokens = Ranks("vocab_group", vocab_group), Ranks("token_group", token_group)
    known, part = agree(
        vocabulary,
        tokens,
        lambda: _prepare(vocabulary, tokens, layers, labels, given),
        device_of(*layers.values()),
        given["vocab_start"],
        given["vocab_size"],
        given["token_counts"],
    )
    own = known.given
    call = _Call(vocabulary, tokens, part, own, known.margins, known.agreed, given["return_stats"])
    inputs = own.student_hidden, own.student_weight, own.student_bias
    loss, *stats = _linear.ByModule.apply(call.run, known.per_token, own.wanted, *inputs)
    return (loss, _loss.stats_of(*stats)) if given["return_stats"] else loss


# The host reads headers, which a graph cannot.
_disable: Any = torch.compiler.disable
linear_atkd_loss = _disable(_linear_atkd_loss)
