"""Tensors as the native module takes them: by address, with strides and dtypes; and the calls of it."""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from . import _atkd, _settings
from ._checks import DTYPES, LABEL_DTYPES, check_device
from ._teacher import SparseTeacher, Teacher

_SCALAR = torch.empty((), dtype=torch.float32, device="cpu")

# Uncertainty, TKD, DKD, margin, loss as `[5, *tokens]`; which tokens are hard.
Stats = Tuple[Tensor, Tensor]


class Strides(NamedTuple):
    """The strides of logits `[.., vocab]`, in elements."""

    row_stride: int
    inner: int = 0
    """The number of rows that are `row_stride` apart, or 0 where all rows are evenly spaced."""
    outer_stride: int = 0
    """The distance of such groups."""


class Matrix(NamedTuple):
    """Logits `[tokens, vocab]`, or a gradient."""

    address: int
    dtype: _atkd.Dtype
    row_stride: int
    inner: int
    outer_stride: int


class Labels(NamedTuple):
    """Labels `[tokens]`."""

    address: int
    dtype: _atkd.LabelDtype


class Sparse(NamedTuple):
    """A sparse teacher, `[tokens, top_k]` without gaps."""

    top_k: int
    indices: Labels
    log_probs: int
    dtype: _atkd.Dtype
    target_log_prob: Optional[int]
    """float32 `[tokens]`."""
    target_dtype: _atkd.Dtype
    """What they were rounded to before."""
    tail: str


class Call(NamedTuple):
    """The addresses that a loss is computed from and written to."""

    tokens: int
    vocab: int
    """The columns that count, of which each matrix may have more."""
    student: Matrix
    teacher: Union[Matrix, Sparse]
    labels: Optional[Labels]
    hard: Optional[int]
    """Bool `[tokens]`: the hard tokens, which are then not selected."""
    token_weights: Optional[int]
    """float32 `[tokens]`, by which each token's terms are multiplied."""
    temperatures: Optional[int]
    """float32 `[tokens]`, each token's own, instead of the objective's."""
    sequences: Optional[Tuple[int, int]]
    """Offsets, int64 `[sequences + 1]`, and the number of sequences that hard tokens are selected within."""
    scale: Optional[int]
    """A float32 scalar that the gradient is multiplied by."""
    gradient: Optional[Matrix]
    gradient_padding: int
    """The gradient's columns beyond `vocab`, which become 0."""
    loss: int
    """A float32 scalar."""
    terms: Optional[int]
    """Uncertainty, TKD, DKD, margin, loss: float32 `[5, tokens]`."""
    groups: Optional[int]
    """A byte per token: on the CPU whether it is hard, on a device its group."""


class Shard(NamedTuple):
    """A rank's columns of both models' rows, by address."""

    tokens: int
    vocab: int
    """The columns of all ranks that count."""
    first_column: int
    columns: int
    """This rank's columns that count, maybe none."""
    student: Matrix
    teacher: Matrix
    labels: Optional[Labels]
    """Of the whole vocabulary."""
    hard: Optional[int]
    """Bool `[tokens]`."""
    token_weights: Optional[int]
    temperatures: Optional[int]
    scale: Optional[int]
    """A float32 scalar that the gradient is multiplied by."""
    counts: Optional[int]
    """int32 `[2]`, the tokens of all ranks that count and those that are hard; or those of this rank."""


def _strides(logits: Tensor) -> Optional[Strides]:
    """None unless rows are contiguous, apart, and a grid of two dimensions at most."""
    vocab = logits.shape[-1]
    if logits.is_contiguous():
        return Strides(vocab)
    *strides, step = logits.stride()
    if vocab > 1 and step != 1:
        return None
    # Dimensions of which one goes on where the other ends are one; the innermost comes first.
    grid: List[Tuple[int, int]] = []
    for stride, size in zip(reversed(strides), reversed(logits.shape[:-1])):
        if size != 1 and grid and stride == grid[-1][0] * grid[-1][1]:
            grid[-1] = grid[-1][0], grid[-1][1] * size
        elif size != 1:
            grid.append((stride, size))
    end = vocab
    for stride, size in sorted(grid):
        if stride < end:
            return None
        end += (size - 1) * stride
    if len(grid) > 2:
        return None
    row_stride = grid[0][0] if grid else vocab
    return Strides(row_stride, grid[0][1], grid[1][0]) if len(grid) == 2 else Strides(row_stride)


def rows(logits: Tensor) -> Tensor:
    """The same logits where they lie, if the native side can read them there, or else a copy."""
    return logits if _strides(logits) is not None else logits.contiguous()


def _contiguous(tensor: Optional[Tensor]) -> Optional[Tensor]:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Optional[Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


def _matrix(logits: Tensor) -> Matrix:
    strides = _strides(logits)
    assert strides is not None, "`rows` has been called"
    return Matrix(logits.data_ptr(), DTYPES[logits.dtype], *strides)


def _labels(flat: Optional[Tensor]) -> Optional[Labels]:
    return None if flat is None else Labels(flat.data_ptr(), LABEL_DTYPES[flat.dtype])


def _teacher(teacher: Teacher) -> Tuple[Union[Matrix, Sparse], Tuple[Optional[Tensor], ...]]:
    """The teacher by address, and what must live as long as that."""
    if not isinstance(teacher, SparseTeacher):
        teacher_rows = rows(teacher)
        return _matrix(teacher_rows), (teacher_rows,)
    indices, log_probs = teacher.indices.contiguous(), teacher.log_probs.contiguous()
    target_dtype, target = _atkd.Dtype.F32, teacher.target_log_prob
    if target is not None:
        target_dtype, target = DTYPES[target.dtype], target.float().contiguous()
    addresses = Sparse(
        top_k=indices.shape[-1],
        indices=Labels(indices.data_ptr(), LABEL_DTYPES[indices.dtype]),
        log_probs=log_probs.data_ptr(),
        dtype=DTYPES[log_probs.dtype],
        target_log_prob=_address(target),
        target_dtype=target_dtype,
        tail=teacher.tail,
    )
    return addresses, (indices, log_probs, target)


def _sequences(offsets: Optional[Tensor]) -> Optional[Tuple[int, int]]:
    return None if offsets is None else (offsets.data_ptr(), offsets.numel() - 1)


def product(one: Optional[Tensor], other: Optional[Tensor]) -> Optional[Tensor]:
    """The product, in which None counts as 1."""
    if one is None or other is None:
        return other if one is None else one
    return one * other


def offsets_of(sequences: int, length: int, device: torch.device) -> Tensor:
    """Where sequences of one length start and end, int64 `[sequences + 1]`."""
    return torch.arange(sequences + 1, dtype=torch.int64, device=device) * length


def _queue() -> Tuple[int, int]:
    """The current device and stream."""
    return torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def _run(function: Any, tensor: Tensor, entries: int, *arguments: Any) -> None:
    """Calls a function of the native module where `tensor` lies. `entries` are the tokens, or the sequences if these
    are more.
    """
    if tensor.is_cpu:
        function(torch.get_num_threads(), *arguments)
        return
    # torch's own memory: its allocator knows which stream, or captured graph, still uses it.
    workspace = torch.empty(
        _atkd.workspace_bytes(entries), dtype=torch.uint8, device=tensor.device
    )
    with torch.cuda.device(tensor.device):
        function((_queue(), workspace.data_ptr()), *arguments)


def empty_stats(logits: Tensor) -> Stats:
    tokens = logits.shape[:-1]
    return (
        logits.new_empty((5, *tokens), dtype=torch.float32),
        logits.new_empty(tokens, dtype=torch.bool),
    )


def empty_gradient(student: Tensor, with_gradient: bool = True) -> Tensor:
    # Gradients of a mean over many tokens are below what float16 holds, and a scaled loss could not
    # bring them back.
    dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
    if not with_gradient:
        return student.new_empty((0,), dtype=dtype)
    return torch.empty_like(student, dtype=dtype, memory_format=torch.contiguous_format)


def run_loss(
    student: Tensor,
    teacher: Teacher,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    token_weights: Optional[Tensor],
    temperatures: Optional[Tensor],
    gradient: Optional[Tensor],
    per_sequence: bool,
    vocab_size: Optional[int],
    settings: Dict[str, Any],
    with_stats: bool,
) -> Tuple[Tensor, Optional[Stats]]:
    """The loss, and the statistics if asked. In place if `gradient` is `student`."""
    check_device("student_logits", student)
    if student.is_cpu and scale is not None and not math.isfinite(scale.item()):
        raise ValueError(
            f"scale, the reciprocal of num_items_in_batch, is {scale.item()}, but must be finite: "
            "num_items_in_batch must be positive and finite, or 0 in a batch without valid tokens"
        )
    # `empty_like` is the quickest of torch's ways on the CPU.
    loss = torch.empty_like(_SCALAR) if student.is_cpu else student.new_empty((), dtype=torch.float32)
    terms, chosen = empty_stats(student) if with_stats else (None, None)
    columns = student.shape[-1]
    vocab = columns if vocab_size is None else vocab_size
    tokens = student.numel() // columns
    offsets = None
    if per_sequence:
        batch, length = student.shape[:2]
        offsets = offsets_of(batch, length, student.device)
    # Each has a name, and so lives until the call is over.
    student_rows, (of_teacher, _kept) = rows(student), _teacher(teacher)
    gradient_rows = None if gradient is None else rows(gradient)
    flat_labels, flat_hard = _contiguous(labels), _contiguous(hard)
    flat_weights, flat_temperatures = _contiguous(token_weights), _contiguous(temperatures)
    call = Call(
        tokens=tokens,
        vocab=vocab,
        student=_matrix(student_rows),
        teacher=of_teacher,
        labels=_labels(flat_labels),
        hard=_address(flat_hard),
        token_weights=_address(flat_weights),
        temperatures=_address(flat_temperatures),
        sequences=_sequences(offsets),
        scale=_address(scale),
        gradient=None if gradient_rows is None else _matrix(gradient_rows),
        gradient_padding=columns - vocab,
        loss=loss.data_ptr(),
        terms=_address(terms),
        groups=_address(chosen),
    )
    objective = _settings.objective(settings, student)
    if student.is_cpu or tokens > 0:
        _run(_atkd.run, student, tokens, objective, call)
    else:
        loss.zero_()
    if chosen is not None and not student.is_cpu:
        chosen = chosen.view(torch.uint8) == _atkd.HARD
    if scale is not None:
        loss.mul_(scale)
    return loss, None if terms is None or chosen is None else (terms, chosen)


def run_margins(
    teacher: Teacher,
    labels: Optional[Tensor],
    temperatures: Optional[Tensor],
    vocab_size: Optional[int],
    settings: Dict[str, Any],
    margins: Tensor,
) -> None:
    """The teacher's margins, to the tensor `margins`."""
    if isinstance(teacher, SparseTeacher):
        # Its margins are the same whatever the size of the vocabulary.
        columns = torch.iinfo(torch.int32).max
    else:
        check_device("teacher_logits", teacher)
        columns = teacher.shape[-1]
    (of_teacher, _kept), flat_labels = _teacher(teacher), _contiguous(labels)
    flat_temperatures = _contiguous(temperatures)
    tokens = margins.numel()
    vocab = columns if vocab_size is None else vocab_size
    objective = _settings.objective(settings, margins)
    if margins.is_cpu or tokens > 0:
        _run(
            _atkd.teacher_margins,
            margins,
            tokens,
            objective,
            tokens,
            vocab,
            of_teacher,
            _labels(flat_labels),
            _address(flat_temperatures),
            margins.data_ptr(),
        )


def run_entropies(
    logits: Tensor, temperature: float, vocab_size: Optional[int], entropies: Tensor
) -> None:
    """The entropies of the tokens, to the tensor `entropies`."""
    check_device("logits", logits)
    logits_rows = rows(logits)
    tokens = logits.shape[:-1].numel()
    shape = tokens, logits.shape[-1] if vocab_size is None else vocab_size
    _run(
        _atkd.token_entropies,
        logits,
        tokens,
        shape,
        _matrix(logits_rows),
        temperature,
        entropies.data_ptr(),
    )


def run_selection(
    margins: Tensor,
    valid: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    hard_ratio: float,
    hard: Tensor,
    selection_rule: str = "top-k",
) -> None:
    """Selects the hard tokens into the tensor `hard`."""
    check_device("margins", margins)
    flat_margins, flat_valid = margins.contiguous(), _contiguous(valid)
    offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    sequences = _sequences(offsets)
    tokens = margins.numel()
    _run(
        _atkd.select_hard,
        margins,
        max(tokens, 1 if sequences is None else sequences[1]),
        tokens,
        flat_margins.data_ptr(),
        _address(flat_valid),
        sequences,
        hard_ratio,
        hard.data_ptr(),
        selection_rule,
    )


class Stages:
    """A loss of rows that are split over ranks, stage by stage. Between the stages each rank gathers the states that all
    of them have made, in the order of their columns, `[ranks, ..]`.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Optional[Tensor],
        token_weights: Optional[Tensor],
        temperatures: Optional[Tensor],
        first_column: int,
        columns: int,
        vocab: int,
        objective: _atkd.Objective,
    ) -> None:
        self.objective = objective
        self.student, self.tokens = student, student.shape[:-1]
        self.count = self.tokens.numel()
        # They live as long as their addresses.
        self.rows = rows(student), rows(teacher)
        self.of_tokens = [_contiguous(each) for each in (labels, token_weights, temperatures)]
        flat_labels, flat_weights, flat_temperatures = self.of_tokens
        self.shard = Shard(
            tokens=self.count,
            vocab=vocab,
            first_column=first_column,
            columns=columns,
            student=_matrix(self.rows[0]),
            teacher=_matrix(self.rows[1]),
            labels=_labels(flat_labels),
            hard=None,
            token_weights=_address(flat_weights),
            temperatures=_address(flat_temperatures),
            scale=None,
            counts=None,
        )

    def rests(self, teacher: SparseTeacher) -> Tensor:
        """The student's sums over the tokens that a sparse teacher does not know, uint8 `[tokens, ROW_REST_BYTES]`."""
        rests = self._empty((self.count, _atkd.ROW_REST_BYTES), torch.uint8)
        of_teacher, _kept = _teacher(teacher)
        self._run(_atkd.shard_rests, self.shard, of_teacher, rests.data_ptr())
        return rests

    def teacher_logits(self, teacher: SparseTeacher, rests: Optional[Tensor]) -> Tensor:
        """Those of this rank's columns, float32 `[*tokens, columns]`, by the tail bucket from the sums of all ranks."""
        logits = self._empty((*self.tokens, self.shard.columns), torch.float32)
        (of_teacher, _kept), of_ranks = _teacher(teacher), None if rests is None else _of_ranks(rests)
        self._run(
            _atkd.shard_teacher_logits, self.shard, of_teacher, of_ranks, logits.data_ptr()
        )
        return logits

    def states(self) -> Tensor:
        """uint8 `[tokens, ROW_STATE_BYTES]`."""
        states = self._empty((self.count, _atkd.ROW_STATE_BYTES), torch.uint8)
        self._run(_atkd.shard_states, self.shard, states.data_ptr())
        return states

    def margins(self, states: Tensor) -> Tensor:
        """float32, shaped as the tokens; -inf for ignored ones."""
        margins = self._empty(self.tokens, torch.float32)
        self._run(_atkd.shard_margins, self.shard, _of_ranks(states), margins.data_ptr())
        return margins

    def terms(self, states: Tensor) -> Tensor:
        """uint8 `[tokens, SWEEP_TERMS_BYTES]`, of divergences that need two sweeps."""
        terms = self._empty((self.count, _atkd.SWEEP_TERMS_BYTES), torch.uint8)
        self._run(_atkd.shard_terms, self.shard, _of_ranks(states), terms.data_ptr())
        return terms

    def gradient(
        self,
        states: Tensor,
        terms: Optional[Tensor],
        hard: Tensor,
        scale: Optional[Tensor],
        counts: Optional[Tensor],
        to: Tensor,
    ) -> None:
        """This rank's columns of the gradient; in place if `to` is the student."""
        gradient = rows(to)
        shard, kept = self._with(hard, scale, counts)
        padding = to.shape[-1] - shard.columns
        of_gradient = _matrix(gradient), padding
        self._run(
            _atkd.shard_gradient, shard, _of_ranks(states), _address(terms), *of_gradient
        )
        del kept

    def loss(
        self,
        states: Tensor,
        terms: Optional[Tensor],
        hard: Tensor,
        counts: Optional[Tensor],
    ) -> Tuple[Tensor, Stats]:
        """These tokens' part of the loss, and their statistics."""
        loss = self._empty((), torch.float32)
        columns, groups = empty_stats(self.student)
        if self.count == 0:
            loss.zero_()
        shard, kept = self._with(hard, None, counts)
        to = loss.data_ptr(), columns.data_ptr(), groups.data_ptr()
        self._run(_atkd.shard_loss, shard, _of_ranks(states), _address(terms), *to)
        del kept
        if not self.student.is_cpu:
            groups = groups.view(torch.uint8) == _atkd.HARD
        return loss, (columns, groups)

    def _empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return self.student.new_empty(shape, dtype=dtype)

    def _with(
        self, hard: Tensor, scale: Optional[Tensor], counts: Optional[Tensor]
    ) -> Tuple[Shard, Tensor]:
        """What is known after the selection, and what must live as long as its address."""
        hard = hard.contiguous()
        return (
            self.shard._replace(
                hard=_address(hard), scale=_address(scale), counts=_address(counts)
            ),
            hard,
        )

    def _run(self, stage: Any, *arguments: Any) -> None:
        if self.count > 0:
            _run(stage, self.student, self.count, self.objective, *arguments)


def _of_ranks(states: Tensor) -> Tuple[int, int]:
    return states.data_ptr(), len(states)


def scale_on_device(gradient: Tensor, upstream: Tensor) -> Tensor:
    """`gradient * upstream`, over the gradient's own memory. The kernel looks at the number there; from here that
    would stop the queue.
    """
    gradient_rows = rows(gradient)
    vocab = gradient_rows.shape[-1]
    shape = gradient_rows.numel() // vocab, vocab
    with torch.cuda.device(gradient.device):
        _atkd.scale_on_device(_queue(), shape, _matrix(gradient_rows), upstream.data_ptr())
    # Autograd raises if anybody else goes by what it was.
    torch.autograd.graph.increment_version(gradient_rows)
    return gradient_rows
