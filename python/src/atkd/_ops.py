"""The loss as an operator, `torch.ops.atkd.loss`, and as an autograd function."""

import math
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.fx.experimental import symbolic_shapes

from . import _atkd

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_LABEL_DTYPES = {torch.int64: "int64", torch.int32: "int32"}
_PLAIN = (Tensor, torch.nn.Parameter)
_SCALAR = torch.empty((), dtype=torch.float32, device="cpu")

_NO_SECOND_DERIVATIVE = (
    "the gradient of atkd_loss has no derivative (create_graph=True, or a transform of torch.func twice)"
)

# Uncertainty, TKD, DKD, margin as `[4, *tokens]`; which tokens are hard.
Stats = Tuple[Tensor, Tensor]


# The settings that schedules change.
NUMBERS = ("lam", "hard_ratio", "temperature", "ce_weight", "kd_weight")


class Settings(NamedTuple):
    """What the operator takes after the tensors; the order is its and `_atkd.Objective`'s, which takes no
    `numbers`: these, float64 `[5]` on the CPU, replace the settings that `NUMBERS` names. A number in a
    tensor may change without torch.compile compiling again.
    """

    objective: str
    lam: float
    hard_ratio: float
    temperature: float
    temperature_squared: bool
    target: str
    reduction: str
    ignore_index: int
    ce_weight: float
    kd_weight: float
    numbers: Optional[Tensor] = None


# The same, as the operator's schema says it.
_SETTINGS = ", ".join(
    f"{kind.__name__} {name}" for name, kind in Settings.__annotations__.items() if name != "numbers"
)
_SETTINGS += ", Tensor? numbers=None"


def _objective(settings: Tuple[Any, ...], student: Tensor) -> _atkd.Objective:
    given = Settings(*settings)
    if given.numbers is not None:
        if student.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph would keep the numbers that {', '.join(NUMBERS)} have while it is captured"
            )
        given = given._replace(**dict(zip(NUMBERS, given.numbers.tolist())))
    return _atkd.Objective(*given[:-1])


def _are_apart(one: Tensor, other: Tensor) -> bool:
    """Whether their devices differ. On the CPU without asking for these, which is slow."""
    return not (one.is_cpu and other.is_cpu) and one.device != other.device


def _check_logits(name: str, logits: Tensor) -> None:
    if logits.dtype not in _DTYPES:
        raise TypeError(f"{name} are {logits.dtype}, but must be float32, float16 or bfloat16")
    if len(logits.shape) < 2 or logits.shape[-1] == 0:
        raise ValueError(f"{name} are {list(logits.shape)}, but must be [N, V] or [B, T, V]")


def _check_numbers(settings: Tuple[Any, ...]) -> None:
    numbers = settings[10] if len(settings) > 10 else None
    if numbers is not None and (
        numbers.dtype != torch.float64 or numbers.shape != (len(NUMBERS),) or not numbers.is_cpu
    ):
        raise ValueError(
            f"numbers are {numbers.dtype} {list(numbers.shape)} on {numbers.device}, "
            f"but must be torch.float64 [{len(NUMBERS)}] on cpu"
        )


def _check_labels(
    labels: Optional[Tensor], name: str, logits: Tensor, settings: Tuple[Any, ...]
) -> None:
    """`name` is of the logits that they belong to."""
    if labels is None:
        if Settings(*settings).target == "label":
            raise ValueError(
                'labels are None, but target="label" needs one a token; '
                'give labels, or target="teacher"'
            )
        return
    shape = logits.shape
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"labels are {labels.dtype}, but must be int64 or int32")
    if labels.shape != shape[:-1]:
        raise ValueError(
            f"labels are {list(labels.shape)}, but for logits {list(shape)} "
            f"must be {list(shape[:-1])}"
        )
    if _are_apart(labels, logits):
        raise ValueError(f"{name} are on {logits.device}, but labels on {labels.device}")


def _check_mask(name: str, mask: Tensor, beside: str, other: Tensor, shape: Any) -> None:
    """`shape` is what it must have, on the device of `other`, which is called `beside`."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} is {mask.dtype}, but must be torch.bool")
    if mask.shape != shape:
        raise ValueError(f"{name} is {list(mask.shape)}, but must be {list(shape)}")
    if _are_apart(mask, other):
        raise ValueError(f"{beside} are on {other.device}, but {name} on {mask.device}")


def check(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    per_sequence: bool,
    settings: Tuple[Any, ...],
) -> None:
    """Raises unless the tensors fit together. The settings themselves are checked natively."""
    shape = student.shape
    _check_logits("student_logits", student)
    _check_logits("teacher_logits", teacher)
    if teacher.shape != shape:
        message = f"student_logits are {list(shape)}, but teacher_logits are {list(teacher.shape)}"
        vocab = min(shape[-1], teacher.shape[-1])
        if shape[:-1] == teacher.shape[:-1]:
            wider = "teacher_logits" if teacher.shape[-1] > vocab else "student_logits"
            message += (
                f"; if the tokens that both vocabularies have come first, give {wider}[..., :{vocab}]"
            )
        raise ValueError(message)
    if _are_apart(teacher, student):
        raise ValueError(
            f"student_logits are on {student.device}, but teacher_logits on {teacher.device}"
        )
    if scale is not None:
        # The operator's alone: the function makes its own.
        if scale.dtype != torch.float32:
            raise TypeError(f"scale is {scale.dtype}, but must be float32")
        if scale.dim() != 0 or _are_apart(scale, student):
            raise ValueError(
                f"scale is {list(scale.shape)} on {scale.device}, "
                f"but must be a scalar on {student.device}"
            )
    _check_numbers(settings)
    if hard is not None:
        _check_mask("hard", hard, "student_logits", student, shape[:-1])
    if per_sequence and len(shape) != 3:
        raise ValueError(f'selection="sequence" needs logits [B, T, V], but they are {list(shape)}')
    _check_labels(labels, "student_logits", student, settings)


def _strides(logits: Tensor) -> Optional[Tuple[int, int, int]]:
    """The row stride of `[.., vocab]`; the number of rows of one outer index, and its stride, or 0 and 0 where
    all rows are evenly spaced. None unless rows are contiguous, apart, and a grid of two dimensions at most.
    """
    vocab = logits.shape[-1]
    if logits.is_contiguous():
        return vocab, 0, 0
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
    return (row_stride, grid[0][1], grid[1][0]) if len(grid) == 2 else (row_stride, 0, 0)


def _rows(logits: Tensor) -> Tensor:
    """The same logits where they lie, if the native side can read them there, or else a copy."""
    return logits if _strides(logits) is not None else logits.contiguous()


def _matrix(rows: Tensor) -> Tuple[int, str, int, int, int]:
    strides = _strides(rows)
    assert strides is not None
    return rows.data_ptr(), _DTYPES[rows.dtype], *strides


def _labels(flat: Optional[Tensor]) -> Optional[Tuple[int, str]]:
    return None if flat is None else (flat.data_ptr(), _LABEL_DTYPES[flat.dtype])


def _empty_stats(student: Tensor) -> Stats:
    tokens = student.shape[:-1]
    return (
        student.new_empty((4, *tokens), dtype=torch.float32),
        student.new_empty(tokens, dtype=torch.bool),
    )


def _empty_gradient(student: Tensor, with_gradient: bool = True) -> Tensor:
    # Gradients of a mean over many tokens are below what float16 holds, and a scaled loss could not
    # bring them back.
    dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
    if not with_gradient:
        return student.new_empty((0,), dtype=dtype)
    return torch.empty_like(student, dtype=dtype, memory_format=torch.contiguous_format)


def _queue() -> Tuple[int, int]:
    return torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def _check_device(name: str, tensor: Tensor) -> None:
    if not (tensor.is_cpu or tensor.is_cuda):
        raise ValueError(f"{name} are on {tensor.device}, but must be on the CPU or a CUDA device")


def _address(tensor: Optional[Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


def _run(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    gradient: Optional[Tensor],
    per_sequence: bool,
    settings: Tuple[Any, ...],
    with_stats: bool,
) -> Tuple[Tensor, Optional[Stats]]:
    """The loss, and the statistics if asked. In place if `gradient` is `student`."""
    _check_device("student_logits", student)
    if student.is_cpu and scale is not None and not math.isfinite(scale.item()):
        raise ValueError(
            f"scale, the reciprocal of num_items_in_batch, is {scale.item()}, but must be finite: "
            "num_items_in_batch must be positive and finite, or 0 in a batch without valid tokens"
        )
    if student.is_cpu:
        # The quickest of torch's ways.
        loss = torch.empty_like(_SCALAR)
    else:
        loss = student.new_empty((), dtype=torch.float32)
    stats = _empty_stats(teacher) if with_stats else None
    student_rows, teacher_rows = _rows(student), _rows(teacher)
    vocab = student.shape[-1]
    tokens = student.numel() // vocab
    flat_labels = None if labels is None else labels.contiguous()
    flat_hard = None if hard is None else hard.contiguous()
    offsets = None
    if per_sequence:
        batch, length = teacher.shape[:2]
        offsets = torch.arange(batch + 1, dtype=torch.int64, device=student.device) * length
    arguments = (
        _objective(settings, student),
        (tokens, vocab),
        _matrix(student_rows),
        _matrix(teacher_rows),
        _labels(flat_labels),
        _address(flat_hard),
        None if offsets is None else (offsets.data_ptr(), offsets.numel() - 1),
        _address(scale),
        None if gradient is None else _matrix(_rows(gradient)),
        loss.data_ptr(),
        None if stats is None else (stats[0].data_ptr(), stats[1].data_ptr()),
    )
    if student.is_cpu:
        _atkd.run_on_host(torch.get_num_threads(), *arguments)
    elif tokens == 0:
        loss.zero_()
    else:
        workspace = _workspace(tokens, student.device)
        with torch.cuda.device(student.device):
            _atkd.run_on_device(_queue(), workspace.data_ptr(), *arguments)
        if stats is not None:
            # It holds 0 for an ignored token, 1 for an easy one, 2 for a hard one.
            stats = stats[0], stats[1].view(torch.uint8) == 2
    if scale is not None:
        loss.mul_(scale)
    return loss, stats


@torch.library.custom_op(
    "atkd::loss",
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor? labels, Tensor? scale, Tensor? hard, bool with_gradient, "
    f"bool per_sequence, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def loss(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    with_gradient: bool,
    per_sequence: bool,
    *settings: Any,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss; the gradient (float32 for float16 logits; empty unless `with_gradient`);
    uncertainty, TKD, DKD, margin as `[4, *tokens]`; which tokens are hard: `hard`, if that is given, or
    selected. Loss and gradient are multiplied by
    `scale`, a float32 scalar on the logits' device.
    """
    check(student, teacher, labels, scale, hard, per_sequence, settings)
    gradient = _empty_gradient(student, with_gradient)
    to = gradient if with_gradient else None
    value, stats = _run(student, teacher, labels, scale, hard, to, per_sequence, settings, True)
    assert stats is not None
    return value, gradient, *stats


@loss.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    with_gradient: bool,
    per_sequence: bool,
    *settings: Any,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    check(student, teacher, labels, scale, hard, per_sequence, settings)
    value = student.new_empty((), dtype=torch.float32)
    return value, _empty_gradient(student, with_gradient), *_empty_stats(student)


def _one_by_one(
    function: Any, info: Any, in_dims: Tuple[Any, ...], arguments: Tuple[Any, ...]
) -> Any:
    """A rule for vmap: which tokens are hard is known a batch at a time."""
    if info.batch_size == 0:
        raise ValueError("vmap needs at least one batch, but there are 0")
    results = [
        function(
            *[
                x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
                for x, dim in zip(arguments, in_dims)
            ]
        )
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(each) for each in zip(*results)), (0, 0, 0, 0)


@torch.library.custom_op(
    "atkd::teacher_margins",
    mutates_args=(),
    schema=f"(Tensor teacher, Tensor? labels, {_SETTINGS}) -> Tensor",
)
def teacher_margins(teacher: Tensor, labels: Optional[Tensor], *settings: Any) -> Tensor:
    """The teacher's margins, float32, shaped as the labels. Of the settings, nothing but temperature, target and
    ignore_index is used.
    """
    margins: Tensor = _empty_margins(teacher, labels, *settings)
    _check_device("teacher_logits", teacher)
    rows, flat_labels = _rows(teacher), None if labels is None else labels.contiguous()
    tokens, vocab = teacher.shape[:-1].numel(), teacher.shape[-1]
    objective = _objective(settings, teacher)
    arguments = (tokens, vocab), _matrix(rows), _labels(flat_labels), margins.data_ptr()
    if teacher.is_cpu:
        _atkd.teacher_margins_on_host(torch.get_num_threads(), objective, *arguments)
    elif tokens > 0:
        workspace = _workspace(tokens, teacher.device)
        with torch.cuda.device(teacher.device):
            _atkd.teacher_margins_on_device(_queue(), workspace.data_ptr(), objective, *arguments)
    return margins


@teacher_margins.register_fake
def _empty_margins(teacher: Tensor, labels: Optional[Tensor], *settings: Any) -> Tensor:
    _check_logits("teacher_logits", teacher)
    _check_numbers(settings)
    _check_labels(labels, "teacher_logits", teacher, settings)
    return teacher.new_empty(teacher.shape[:-1], dtype=torch.float32)


@torch.library.custom_op(
    "atkd::select_hard",
    mutates_args=(),
    schema="(Tensor margins, Tensor? valid, Tensor? cu_seqlens, float hard_ratio, Tensor? number=None) -> Tensor",
)
def select_hard(
    margins: Tensor,
    valid: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    hard_ratio: float,
    number: Optional[Tensor] = None,
) -> Tensor:
    """Which tokens are hard, shaped as the margins. `number`, a scalar on the CPU, replaces the ratio: it may change
    without torch.compile compiling again.
    """
    hard: Tensor = _empty_selection(margins, valid, cu_seqlens, hard_ratio, number)
    _check_device("margins", margins)
    if number is not None:
        hard_ratio = number.item()
    flat_margins, flat_valid = margins.contiguous(), None if valid is None else valid.contiguous()
    offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    tokens, sequences = margins.numel(), 1 if offsets is None else offsets.numel() - 1
    arguments = (
        tokens,
        flat_margins.data_ptr(),
        _address(flat_valid),
        None if offsets is None else (offsets.data_ptr(), sequences),
        hard_ratio,
        hard.data_ptr(),
    )
    if margins.is_cpu:
        _atkd.select_hard_on_host(*arguments)
    else:
        workspace = _workspace(max(tokens, sequences), margins.device)
        with torch.cuda.device(margins.device):
            _atkd.select_hard_on_device(_queue(), workspace.data_ptr(), *arguments)
    return hard


@select_hard.register_fake
def _empty_selection(
    margins: Tensor,
    valid: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    hard_ratio: float,
    number: Optional[Tensor] = None,
) -> Tensor:
    if margins.dtype != torch.float32:
        raise TypeError(f"margins are {margins.dtype}, but must be torch.float32")
    if valid is not None:
        _check_mask("valid", valid, "margins", margins, margins.shape)
    if cu_seqlens is not None:
        if cu_seqlens.dtype not in _LABEL_DTYPES:
            raise TypeError(f"cu_seqlens are {cu_seqlens.dtype}, but must be int64 or int32")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"cu_seqlens are {list(cu_seqlens.shape)}, but must be [sequences + 1]")
        if _are_apart(cu_seqlens, margins):
            raise ValueError(f"margins are on {margins.device}, but cu_seqlens on {cu_seqlens.device}")
    if number is not None and (number.dim() != 0 or not number.is_cpu):
        raise ValueError(
            f"number is {list(number.shape)} on {number.device}, but must be a scalar on cpu"
        )
    return torch.empty_like(margins, dtype=torch.bool, memory_format=torch.contiguous_format)


def _register_vmap(operator: Any) -> None:
    if hasattr(operator, "register_vmap"):  # not before torch 2.5
        operator.register_vmap(
            lambda info, in_dims, *arguments: _one_by_one(operator, info, in_dims, arguments)
        )


for _operator in (loss, teacher_margins, select_hard):
    _register_vmap(_operator)


def _workspace(tokens: int, device: torch.device) -> Tensor:
    """torch's own memory: its allocator knows which stream, or captured graph, still uses it."""
    return torch.empty(_atkd.workspace_bytes(tokens), dtype=torch.uint8, device=device)


def _is_watched() -> bool:
    """Whether a tracer or a transform such as vmap wants to see each operation."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running may run again (`retain_graph=True`)."""
    # Not in every version of torch; where it is missing a copy is made.
    known = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return known is None or bool(known())


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """`gradient * upstream`, over the gradient's own memory if nobody needs it again. Autograd converts it
    to the logits' dtype.
    """
    # Of another type while torch.compile traces.
    if type(upstream) is not Tensor or _is_watched():
        return gradient * upstream
    if _graph_is_kept():
        gradient = gradient.clone()
    if upstream.is_cpu:
        return gradient if upstream.item() == 1.0 else gradient.mul_(upstream)
    # Looks at the number there; from here it would stop the queue.
    rows = _rows(gradient)
    vocab = rows.shape[-1]
    with torch.cuda.device(gradient.device):
        shape = (rows.numel() // vocab, vocab)
        _atkd.scale_on_device(_queue(), shape, _matrix(rows), upstream.data_ptr())
    # Autograd raises if anybody else goes by what it was.
    torch.autograd.graph.increment_version(rows)
    return rows


def _setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, ...]) -> None:
    _, gradient, stats, chosen = output
    ctx.mark_non_differentiable(gradient, stats, chosen)
    # Else backward gets zeros as large as the gradient, for the outputs that have none.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)
    ctx.with_gradient = inputs[5]
    ctx.others = len(inputs) - 1


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
    if not ctx.with_gradient:
        raise RuntimeError("atkd::loss was called with with_gradient=False, and has no gradient")
    if torch.is_grad_enabled():
        raise RuntimeError(_NO_SECOND_DERIVATIVE)
    (gradient,) = ctx.saved_tensors
    return (_scaled(gradient, upstream), *[None] * ctx.others)


loss.register_autograd(_backward, setup_context=_setup_context)


class Loss(torch.autograd.Function):
    """`loss` without an operator's overhead, and with the gradient in place if asked: the version counter
    of the student then tells autograd that its logits are gone, and backward raises if an operation
    before needs them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Optional[Tensor],
        scale: Optional[Tensor],
        hard: Optional[Tensor],
        with_gradient: bool,
        inplace: bool,
        per_sequence: bool,
        settings: Tuple[Any, ...],
        with_stats: bool,
    ) -> Tuple[Tensor, Optional[Stats]]:
        check(student, teacher, labels, scale, hard, per_sequence, settings)
        place = _rows(student.detach()) if inplace else student
        gradient = None
        if with_gradient:
            gradient = place if inplace else _empty_gradient(student)
        value, stats = _run(
            place, teacher, labels, scale, hard, gradient, per_sequence, settings, with_stats
        )
        if inplace:
            gradient = place
            if place.data_ptr() == student.data_ptr():
                torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(gradient)
        # In a tuple, where autograd leaves them alone.
        return value, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_NO_SECOND_DERIVATIVE)
        (gradient,) = ctx.saved_tensors
        return (_scaled(gradient, upstream), *[None] * 9)


class _Overwritten(torch.autograd.Function):
    """Stands in the graph for logits that their gradient has overwritten."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        return logits

    @staticmethod
    def backward(ctx: Any, upstream: Optional[Tensor]) -> Optional[Tensor]:
        # Zeros come from uses of other rows of the same memory.
        if upstream is not None and upstream.any():
            raise RuntimeError(
                "the student's logits were used after atkd_loss(inplace=True) had overwritten them with "
                "their gradient: use them before, or leave inplace out"
            )
        return upstream


def _may_be_overwritten(student: Tensor) -> bool:
    """Whether autograd allows that. It is an error for a leaf."""
    base = student._base if student._is_view() else None
    leaf = student if base is None else base
    if leaf.is_leaf and leaf.requires_grad:
        raise ValueError(
            "inplace=True would overwrite a leaf that requires a gradient (a parameter or an input) with "
            "that gradient: leave inplace out"
        )
    if base is None:
        return True
    how = torch._C._autograd._get_creation_meta(student)
    return bool(how == torch._C._autograd.CreationMeta.DEFAULT)


def run_directly(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    with_gradient: bool,
    inplace: bool,
    per_sequence: bool,
    settings: Tuple[Any, ...],
    with_stats: bool,
) -> Tuple[Tensor, Optional[Stats]]:
    """`Loss`, after which autograd knows of logits that are gone."""
    inplace = inplace and with_gradient and _may_be_overwritten(student)
    before = student._version if inplace else 0
    result: Tuple[Tensor, Optional[Stats]] = Loss.apply(
        student,
        teacher,
        labels,
        scale,
        hard,
        with_gradient,
        inplace,
        per_sequence,
        settings,
        with_stats,
    )
    if inplace and student._version != before:
        # The gradient that `Loss` has saved lies in the same memory, and must not seem modified.
        with torch.autograd.grad_mode._unsafe_preserve_version_counter(student):
            _Overwritten.apply(student)
    return result


class _Once(torch.autograd.Function):
    """`gradient`, whose derivatives in any direction raise: `student` is what it would depend on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, student: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tuple[Optional[Tensor], ...]:
        raise RuntimeError(_NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Optional[Tensor]) -> Tensor:
        raise RuntimeError(_NO_SECOND_DERIVATIVE)


class Transformed(torch.autograd.Function):
    """`loss` with its gradient, for the transforms of torch.func, which the operator's own derivative is
    not made for.
    """

    @staticmethod
    def vmap(
        info: Any, in_dims: Tuple[Any, ...], *arguments: Any
    ) -> Tuple[Tuple[Tensor, ...], Tuple[int, ...]]:
        result: Tuple[Tuple[Tensor, ...], Tuple[int, ...]] = _one_by_one(
            Transformed.apply, info, in_dims, arguments
        )
        return result

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        labels: Optional[Tensor],
        scale: Optional[Tensor],
        hard: Optional[Tensor],
        per_sequence: bool,
        settings: Tuple[Any, ...],
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        result: Tuple[Tensor, Tensor, Tensor, Tensor] = loss(
            student, teacher, labels, scale, hard, True, per_sequence, *settings
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, ...]) -> None:
        student, (_, gradient, stats, chosen) = inputs[0], output
        ctx.mark_non_differentiable(gradient, stats, chosen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, student)
        ctx.save_for_forward(gradient, student)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
        return (_Once.apply(*ctx.saved_tensors) * upstream, *[None] * 6)

    @staticmethod
    def jvp(ctx: Any, tangent: Optional[Tensor], *_: Any) -> Tuple[Optional[Tensor], ...]:
        # What else there are tangents of, the loss takes as constants.
        gradient, student = ctx.saved_tensors
        if tangent is None:
            tangent = torch.zeros_like(student)
        return (_Once.apply(gradient, student).float() * tangent).sum(), None, None, None


def derivatives_are_transformed() -> bool:
    """Whether forward-mode derivatives or a transform of torch.func want more of an operation than an
    operator's derivative.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        if torch.compiler.is_compiling():
            # The compiler would pass over the function's own derivative, and take it as 0.
            torch._dynamo.graph_break()
        return True
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    transform = torch._C._functorch.peek_interpreter_stack().key()
    return transform != torch._C._functorch.TransformType.Functionalize


def runs_directly(*tensors: Optional[Tensor]) -> bool:
    """Whether no compiler, tracer, transform or tensor subclass wants to see an operator, and the tensors'
    memory holds their values.
    """
    return (
        not torch.compiler.is_compiling()
        and not _is_watched()
        and all(tensor is None or _is_plain(tensor) for tensor in tensors)
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in _PLAIN
        and (tensor.is_cpu or tensor.is_cuda)
        # Negated, or zeros without memory: the dispatcher makes tensors of these before an operator runs.
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


_has_static_value = getattr(symbolic_shapes, "has_static_value", None)


def _may_change(number: Any) -> bool:
    """Whether it is a tensor, or torch.compile compiles for other numbers in its place too."""
    if isinstance(number, Tensor):
        return True
    if _has_static_value is None or not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
        return False
    return not _has_static_value(number)


def _as_tensor(number: Any) -> Tensor:
    if isinstance(number, Tensor):
        return number.detach().reshape(()).to("cpu", torch.float64)
    product: Tensor = torch.ones((), dtype=torch.float64, device="cpu") * number
    return product


def number_or_tensor(number: Any) -> Tuple[float, Optional[Tensor]]:
    """A number that stays, or a tensor with one that may change in its place."""
    return (0.0, _as_tensor(number)) if _may_change(number) else (number, None)


def with_numbers(settings: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """The settings as the operator takes them, with `numbers` if one of these may change."""
    objective, lam, hard_ratio, temperature, squared, target, reduction, ignored, ce, kd = settings
    given = lam, hard_ratio, temperature, ce, kd
    if not any([_may_change(number) for number in given]):
        return settings
    numbers = [_as_tensor(number) for number in given]
    # The numbers replace the zeros.
    zero = 0.0
    return (
        *(objective, zero, zero, zero, squared, target, reduction, ignored, zero, zero),
        torch.stack(numbers),
    )
