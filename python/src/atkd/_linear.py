"""The loss from the hidden states and the last layers of both models: as an operator, a function and a module."""

from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    List,
    Literal,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
    overload,
)

import torch
from torch import Tensor

from . import _autograd, _checks, _head, _loss, _native, _operator, _private, _settings
from ._loss import ATKDLoss, SharedKeywords, Stats
from ._teacher import SparseTeacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

MEMORY_BUDGET = 512 << 20

# The loss; the gradients of hidden states, weight and bias, empty unless wanted; the terms; which tokens are hard.
Results = Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Given(NamedTuple):
    """The arguments of the operator before the settings."""

    student_hidden: Tensor
    student_weight: Any  # None behind a module
    student_bias: Optional[Tensor]
    teacher_hidden: Any  # None, as weight and bias, beside a sparse teacher
    teacher_weight: Any
    teacher_bias: Optional[Tensor]
    labels: Optional[Tensor]
    scale: Optional[Tensor]
    hard: Optional[Tensor]
    token_weights: Optional[Tensor]
    temperatures: Optional[Tensor]
    teacher_log_prob: Optional[Tensor]
    with_hidden: bool
    with_weight: bool
    with_bias: bool
    per_sequence: bool
    vocab_size: Optional[int]
    chunk_tokens: Optional[int]
    memory_budget: int
    logits_dtype: Optional[torch.dtype]
    # The parts of a sparse teacher.
    indices: Optional[Tensor] = None
    log_probs: Optional[Tensor] = None
    target_log_prob: Optional[Tensor] = None
    tail: str = "bucket"

    @property
    def sparse(self) -> Optional[SparseTeacher]:
        if self.indices is None or self.log_probs is None:
            return None
        return SparseTeacher(self.indices, self.log_probs, self.target_log_prob, self.tail)

    @property
    def shape(self) -> torch.Size:
        """The tokens'."""
        return self.student_hidden.shape[:-1]

    @property
    def wanted(self) -> Tuple[bool, bool, bool]:
        return self.with_hidden, self.with_weight, self.with_bias


def _split(arguments: Tuple[Any, ...]) -> Tuple[Given, Dict[str, Any]]:
    """The operator's arguments, its settings by name."""
    count = len(Given._fields)
    return Given(*arguments[:count]), _settings.named(arguments[count:])


def _check_layer(
    model: str, hidden: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], is_shard: bool
) -> None:
    name, shape = f"{model}_hidden", list(hidden.shape)
    if hidden.dtype not in _checks.DTYPES:
        raise TypeError(f"{name} are {hidden.dtype}, but must be float32, float16 or bfloat16")
    if len(shape) < 2 or shape[-1] == 0:
        raise ValueError(f"{name} are {shape}, but must be [N, H] or [B, T, H]")
    for what, tensor in [("weight", weight), ("bias", bias)]:
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} are {hidden.dtype}, but {model}_{what} is {tensor.dtype}")
        if tensor is not None and _checks.are_apart(tensor, hidden):
            raise ValueError(
                f"{name} are on {hidden.device}, but {model}_{what} is on {tensor.device}"
            )
    if weight is None:
        return
    if weight.dim() != 2 or weight.shape[1] != shape[-1] or (weight.shape[0] == 0 and not is_shard):
        raise ValueError(
            f"{model}_weight is {list(weight.shape)}, but for {name} {shape} must be [V, {shape[-1]}]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{model}_bias is {list(bias.shape)}, but for {model}_weight {list(weight.shape)} must be "
            f"[{weight.shape[0]}]"
        )


def _vocab(given: Given) -> int:
    """The number of the tokens, from the weights of both models."""
    student, teacher, vocab_size = given.student_weight, given.teacher_weight, given.vocab_size
    if vocab_size is None:
        if student is None and teacher is None:
            raise ValueError(
                "neither a student_head nor a sparse teacher tells how many tokens the vocabulary has: give vocab_size"
            )
        rows: int = (student if teacher is None else teacher).shape[0]
        if student is not None and teacher is not None and student.shape[0] != rows:
            raise ValueError(
                f"student_weight is {list(student.shape)}, but teacher_weight is {list(teacher.shape)}; if the tokens "
                "that both have come first, give their number as vocab_size, "
                f"{min(student.shape[0], rows)} or fewer"
            )
        return rows
    for name, weight in [("student_weight", student), ("teacher_weight", teacher)]:
        if weight is not None and not 1 <= vocab_size <= weight.shape[0]:
            raise ValueError(
                f"vocab_size is {vocab_size}, but must be from 1 to {weight.shape[0]}, the rows of {name}"
            )
    return vocab_size


def check(given: Given, settings: Dict[str, Any], is_shard: bool = False) -> None:
    """Raises unless these are what a loss follows from, or a rank's part of that: some rows of the weights, maybe none."""
    student, teacher, log_prob = given.student_hidden, given.teacher_hidden, given.teacher_log_prob
    _check_layer("student", student, given.student_weight, given.student_bias, is_shard)
    if given.sparse is None:
        _check_layer("teacher", teacher, given.teacher_weight, given.teacher_bias, is_shard)
    else:
        _checks.check_sparse(given.sparse, "student_hidden", student)
        if not student.is_cpu:
            what = "linear_atkd_loss takes a sparse teacher"
            instead = "give the logits to sparse_atkd_loss"
            _checks.refuse_sparse(what, "student_hidden", student, instead)
        teacher = student
    if not is_shard:
        _vocab(given)
    elif given.vocab_size is not None and given.vocab_size < 1:
        raise ValueError(f"vocab_size is {given.vocab_size}, but must be at least 1")
    if teacher.shape[:-1] != given.shape:
        raise ValueError(
            f"student_hidden are {list(student.shape)}, but teacher_hidden are {list(teacher.shape)}: "
            "they must be of the same tokens"
        )
    if _checks.are_apart(teacher, student):
        raise ValueError(
            f"student_hidden are on {student.device}, but teacher_hidden on {teacher.device}"
        )
    of_tokens = given.labels, given.scale, given.hard, given.token_weights, given.temperatures
    _checks.check_tokens("student_hidden", student, *of_tokens, settings)
    if log_prob is not None:
        like = "student_hidden", student, given.shape, torch.float32
        _checks.check_mask("teacher_log_prob", log_prob, *like)
    if given.per_sequence and len(given.shape) != 2:
        raise ValueError(
            f'selection="sequence" needs hidden states [B, T, H], but they are {list(student.shape)}'
        )
    check_sizes(given.chunk_tokens, given.memory_budget, given.logits_dtype)
    if given.logits_dtype not in (None, torch.float32, student.dtype):
        raise TypeError(
            f"logits_dtype is {given.logits_dtype}, but must be float32 or the {student.dtype} of the hidden states"
        )


def check_sizes(
    chunk_tokens: Optional[int], memory_budget: int, logits_dtype: Optional[torch.dtype]
) -> None:
    for name, number in [("chunk_tokens", chunk_tokens), ("memory_budget", memory_budget)]:
        if number is None and name == "chunk_tokens":
            continue
        if not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"{name} is {number!r}, but must be an integer")
        if number < 1:
            raise ValueError(f"{name} is {number}, but must be at least 1")
    if logits_dtype is not None and logits_dtype not in _checks.DTYPES:
        raise TypeError(f"logits_dtype is {logits_dtype}, but must be float32, float16 or bfloat16")


def logits_dtype_of(hidden: Tensor, given: Optional[torch.dtype]) -> torch.dtype:
    if given is not None:
        return given if given == torch.float32 else hidden.dtype
    if hidden.is_cpu or _head.multiplies_to_float32(hidden.device):
        return torch.float32
    return hidden.dtype


# Chunks of so many tokens keep a GPU busy; the largest is taken beside which so many chunks have room to wait.
_CHUNKS, _WAITING = (512, 384, 256), 2


def chunk_tokens_of(
    given: Given,
    vocab: int,
    logits_dtype: torch.dtype,
    teacher_dtype: Optional[torch.dtype],
    gradient_dtype: torch.dtype,
    waits: bool,
    settings: Dict[str, Any],
) -> Tuple[int, int]:
    """The tokens of a chunk, whose logits fit together with the gradient; and how many may wait, their gradients kept, to be
    multiplied at once: more than a chunk only if `waits`. A sparse teacher has no logits, and no dtype of them.
    """
    count = given.shape.numel()
    of_token = 0 if teacher_dtype is None else teacher_dtype.itemsize
    of_gradient = gradient_dtype.itemsize
    if logits_dtype != gradient_dtype:
        of_token += logits_dtype.itemsize
    if settings["reduction"] == "group-mean" and settings["ce_weight"] != 0:
        # Cross entropy has a gradient of its own.
        of_token += logits_dtype.itemsize
    columns = given.memory_budget // vocab

    def room(chunk: int) -> int:
        """Tokens that may wait beside a chunk."""
        return (columns - of_token * chunk) // of_gradient

    chunk = given.chunk_tokens
    if chunk is None:
        chunk = max(columns // (of_token + of_gradient), 1)
        if chunk < count and waits:
            fitting = [each for each in _CHUNKS if room(each) >= _WAITING * each]
            chunk = fitting[0] if fitting else chunk
    chunk = max(min(chunk, count), 1)
    waiting = max(room(chunk) // chunk, 1) * chunk if waits else chunk
    return chunk, min(waiting, max(count, 1))


def _call(
    student: Union[_head.Student, _head.Module],
    given: Given,
    vocab: int,
    chunk_tokens: int,
    settings: Dict[str, Any],
) -> Tuple[Tensor, Tensor, Tensor]:
    """The loss, the terms, and which tokens are hard. The gradients are the student's."""
    _settings.native(settings)
    own = given.labels, given.hard, given.token_weights, given.temperatures, given.teacher_log_prob
    *flat, log_prob = [None if each is None else each.reshape(-1) for each in own]
    tokens = _head.Tokens(*flat)
    of_values = tokens.labels, tokens.temperatures, log_prob
    _checks.check_values(*of_values, vocab, settings["ignore_index"])
    teacher: Union[_head.Linear, _head.Sparse]
    if given.sparse is None:
        hidden, bias = given.teacher_hidden, given.teacher_bias
        teacher = _head.Linear(
            hidden.reshape(-1, hidden.shape[-1]),
            given.teacher_weight[:vocab],
            None if bias is None else bias[:vocab],
            logits_dtype_of(hidden, given.logits_dtype),
        )
    else:
        indices, log_probs, target, tail = given.sparse
        target = None if target is None else target.reshape(-1)
        flat_rows = indices.flatten(0, -2), log_probs.flatten(0, -2)
        teacher = _head.Sparse(SparseTeacher(*flat_rows, target, tail), vocab)
    sequences = given.shape[0] if given.per_sequence else 1
    # Autocast would round what was chosen not to be rounded.
    with torch.no_grad(), torch.autocast(given.student_hidden.device.type, enabled=False):
        call = _head.Call(
            student, teacher, tokens, given.scale, log_prob, sequences, chunk_tokens, settings
        )
        loss, hard = call.run()
    return loss, call.terms.view(5, *given.shape), hard.view(given.shape)


def _fake_linear_loss(*arguments: Any) -> Results:
    given, settings = _split(arguments)
    check(given, settings)
    hidden = given.student_hidden
    layer = hidden, given.student_weight, given.student_bias
    return (
        hidden.new_empty((), dtype=torch.float32),
        *_head.empty_gradients(*layer, given.wanted),
        hidden.new_empty((5, *given.shape), dtype=torch.float32),
        hidden.new_empty(given.shape, dtype=torch.bool),
    )


@_operator.as_operator(
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? labels, Tensor? scale, Tensor? hard, Tensor? token_weights, Tensor? temperatures, "
    "Tensor? teacher_log_prob, bool with_hidden, bool with_weight, bool with_bias, bool per_sequence, "
    "SymInt? vocab_size, SymInt? chunk_tokens, SymInt memory_budget, ScalarType? logits_dtype, Tensor? indices, "
    f"Tensor? log_probs, Tensor? target_log_prob, str tail, {_settings.SCHEMA}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_linear_loss,
)
def linear_loss(*arguments: Any) -> Results:
    """The loss; the gradients of hidden states (float32 for float16), weight and bias (float32), each empty unless wanted;
    uncertainty, TKD, DKD, margin, loss as `[5, *tokens]`; which tokens are hard.
    """
    given, settings = _split(arguments)
    check(given, settings)
    hidden, weight, bias = given.student_hidden, given.student_weight, given.student_bias
    _checks.check_device("student_hidden", hidden)
    settings = _settings.resolved(settings, hidden)
    vocab = _vocab(given)
    student_dtype = logits_dtype_of(hidden, given.logits_dtype)
    teacher_dtype = None
    if given.sparse is None:
        teacher_dtype = logits_dtype_of(given.teacher_hidden, given.logits_dtype)
    gradient_dtype = _head.gradient_dtype(weight, student_dtype)
    dtypes = student_dtype, teacher_dtype, gradient_dtype
    # On the CPU memory is near; and a product of float32 copies would need those of all that wait.
    waits = hidden.is_cuda and (
        hidden.dtype == torch.float32 or _head.multiplies_to_float32(hidden.device)
    )
    chunk_tokens, waiting = chunk_tokens_of(given, vocab, *dtypes, waits, settings)
    gradients = _head.empty_gradients(hidden, weight, bias, given.wanted)
    student = _head.Student(
        hidden.reshape(-1, hidden.shape[-1]),
        weight[:vocab],
        None if bias is None else bias[:vocab],
        student_dtype,
        wanted=given.wanted,
        collected=gradients,
        waiting=waiting,
    )
    value, terms, chosen = _call(student, given, vocab, chunk_tokens, settings)
    return value, *gradients, terms, chosen


def _setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Results) -> None:
    _, *gradients, terms, chosen = output
    ctx.mark_non_differentiable(*gradients, terms, chosen)
    # Else backward gets zeros as large as the gradients, for the outputs that have none.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.wanted = _split(inputs)[0].wanted
    ctx.others = len(inputs) - 3


def _backward(ctx: Any, upstream: Optional[Tensor], *_: Any) -> Tuple[Optional[Tensor], ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(_autograd.NO_SECOND_DERIVATIVE)
    for name, wanted, needed in zip(["hidden", "weight", "bias"], ctx.wanted, ctx.needs_input_grad):
        if needed and not wanted:
            raise RuntimeError(
                f"atkd::linear_loss was called with with_{name}=False, and has no gradient for it"
            )
    gradients = [
        _autograd.scaled(gradient, upstream) if wanted and upstream is not None else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted)
    ]
    return (*gradients, *[None] * ctx.others)


linear_loss.register_autograd(_backward, setup_context=_setup_context)


class _TokenLosses(torch.autograd.Function):
    """The loss of each token, the terms, and which tokens are hard. The gradient that arrives is a weight of the tokens;
    `backward` computes all once more with it. `settings` are as the operator takes them, of a sum.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tuple[Tensor, Tensor, Tensor]:
        given, _ = _split(inputs)
        ctx.settings = inputs[len(given) :]
        without = given._replace(with_hidden=False, with_weight=False, with_bias=False)
        *_, terms, chosen = linear_loss(*without, *ctx.settings)
        ctx.mark_non_differentiable(terms, chosen)
        ctx.set_materialize_grads(False)
        ctx.rest = [None if isinstance(each, Tensor) else each for each in given]
        tensors = [each if isinstance(each, Tensor) else None for each in given]
        ctx.save_for_backward(*tensors, chosen)
        return terms[-1].clone(), terms, chosen

    @staticmethod
    def backward(ctx: Any, upstream: Optional[Tensor], *_: Any) -> Tuple[Optional[Tensor], ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_autograd.NO_SECOND_DERIVATIVE)
        others = [None] * (len(ctx.needs_input_grad) - 3)
        if upstream is None:
            return None, None, None, *others
        *tensors, chosen = ctx.saved_tensors
        given = Given(*[rest if each is None else each for each, rest in zip(tensors, ctx.rest)])
        weights = _native.product(upstream, given.token_weights)
        given = given._replace(hard=chosen, token_weights=weights)
        _, *gradients, _, _ = linear_loss(*given, *ctx.settings)
        return (*[g if wanted else None for g, wanted in zip(gradients, given.wanted)], *others)


class ByModule(torch.autograd.Function):
    """The loss, or the losses of the tokens, of which `run` computes all: behind a student's last layer that is a module, of
    whose parameters those that require a gradient come after the hidden states; or that is split over ranks. `wanted` says
    of which gradients are, and weights and hard tokens take the places of the caller's if they are given.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Any,
        per_token: bool,
        wanted: Tuple[bool, ...],
        *tensors: Optional[Tensor],
    ) -> Tuple[Tensor, Tensor, Tensor]:
        now = (False,) * len(wanted) if per_token else wanted
        student, value, terms, chosen = run(now, None, None)
        ctx.mark_non_differentiable(terms, chosen)
        ctx.set_materialize_grads(False)
        ctx.run, ctx.wanted, ctx.per_token, ctx.count = run, wanted, per_token, len(tensors)
        # The hidden states so that autograd knows if they are overwritten before they are read again.
        saved = [tensors[0], chosen] if per_token else student.gradients()
        ctx.save_for_backward(*saved)
        return terms[-1].clone() if per_token else value, terms, chosen

    @staticmethod
    def backward(ctx: Any, upstream: Optional[Tensor], *_: Any) -> Tuple[Optional[Tensor], ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_autograd.NO_SECOND_DERIVATIVE)
        gradients: List[Optional[Tensor]] = [None] * ctx.count
        if upstream is not None and ctx.per_token:
            _, chosen = ctx.saved_tensors
            student, *_ = ctx.run(ctx.wanted, upstream, chosen)
            gradients = student.gradients()
        elif upstream is not None:
            gradients = [
                None if each is None else _autograd.scaled(each, upstream)
                for each in ctx.saved_tensors
            ]
        return (None, None, None, *gradients)


def cast_for_autocast(hidden: Tensor, *others: Optional[Tensor]) -> List[Optional[Tensor]]:
    """The tensors as `torch.nn.functional.linear` would take them."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return [hidden, *others]
    dtype = torch.get_autocast_dtype(device)
    return [None if each is None else each.to(dtype) for each in (hidden, *others)]


class LinearKeywords(SharedKeywords, total=False):
    """Those of `linear_atkd_loss`, which describes them."""

    student_bias: Optional[Tensor]
    teacher_bias: Optional[Tensor]
    student_head: Optional[torch.nn.Module]
    teacher: Optional[SparseTeacher]
    teacher_log_prob: Optional[Tensor]
    chunk_tokens: Optional[int]
    memory_budget: int
    logits_dtype: Optional[torch.dtype]


@overload
def linear_atkd_loss(
    student_hidden: Tensor,
    student_weight: Optional[Tensor],
    teacher_hidden: Optional[Tensor],
    teacher_weight: Optional[Tensor],
    labels: Optional[Tensor] = None,
    *,
    return_stats: Literal[False] = False,
    **keywords: "Unpack[LinearKeywords]",
) -> Tensor: ...


@overload
def linear_atkd_loss(
    student_hidden: Tensor,
    student_weight: Optional[Tensor],
    teacher_hidden: Optional[Tensor],
    teacher_weight: Optional[Tensor],
    labels: Optional[Tensor] = None,
    *,
    return_stats: Literal[True],
    **keywords: "Unpack[LinearKeywords]",
) -> Tuple[Tensor, Stats]: ...


@overload
def linear_atkd_loss(
    student_hidden: Tensor,
    student_weight: Optional[Tensor],
    teacher_hidden: Optional[Tensor],
    teacher_weight: Optional[Tensor],
    labels: Optional[Tensor] = None,
    *,
    return_stats: bool,
    **keywords: "Unpack[LinearKeywords]",
) -> Union[Tensor, Tuple[Tensor, Stats]]: ...


def linear_atkd_loss(
    student_hidden: Tensor,
    student_weight: Optional[Tensor],
    teacher_hidden: Optional[Tensor],
    teacher_weight: Optional[Tensor],
    labels: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    teacher_bias: Optional[Tensor] = None,
    student_head: Optional[torch.nn.Module] = None,
    teacher: Optional[SparseTeacher] = None,
    teacher_log_prob: Optional[Tensor] = None,
    chunk_tokens: Optional[int] = None,
    memory_budget: int = MEMORY_BUDGET,
    logits_dtype: Optional[torch.dtype] = None,
    selection: str = "batch",
    vocab_size: Optional[int] = None,
    token_weights: Optional[Tensor] = None,
    num_items_in_batch: Union[None, int, float, Tensor] = None,
    shift_labels: Union[bool, Tensor] = False,
    hard: Optional[Tensor] = None,
    return_stats: bool = False,
    vocab_group: "Optional[ProcessGroup]" = None,
    token_group: "Optional[ProcessGroup]" = None,
    vocab_start: Optional[int] = None,
    token_counts: Optional[Sequence[int]] = None,
    **settings: Any,
) -> Union[Tensor, Tuple[Tensor, Stats]]:
    """`atkd_loss` of `student_hidden @ student_weight.T + student_bias` and the same of the teacher, whose logits exist for
    one chunk of tokens at a time: in float32, however the models compute.

    The gradients of the student's hidden states, weight and bias are computed here, with the loss, for those that require
    one; `backward` multiplies them by what arrives. Nothing flows back to the teacher. The weight's are summed up in
    float32, so that they take `4 V H` bytes until `backward`.

    The tokens are selected over the whole batch, exactly, though no chunk knows the others' margins: the set is guessed for
    each chunk, from the margins so far, and the tokens that were guessed wrongly, mostly some percent of the first
    chunks', are computed again. The guess, and so every bit, is the same for the same call and `chunk_tokens`. On a GPU the
    call waits once, to learn which tokens these are (so that no CUDA graph can capture it), and not at all if the hard
    tokens are known before (`hard`, `teacher_log_prob`), if one chunk holds all tokens, or for other objectives than
    `"atkd"`. The mean of each group, by the median or within sequences, needs their number before: then the teacher's
    logits are computed twice. Tokens that are equal may have margins that differ in the last bit, as products of different
    chunks are rounded otherwise: which of them is hard is then no matter of their index.

    Args:
        student_hidden: `[N, H]` or `[B, T, H]`, float32, float16 or bfloat16: what the last layer multiplies.
        student_weight: `[V, H]`, of the same dtype.
        teacher_hidden: of the same tokens as the student's, with a dtype and a last dimension of its own.
        teacher_weight: `[V, H of the teacher]`.
        labels: as `atkd_loss` takes them, and so are all keywords that are not described here.
        student_bias: `[V]`.
        teacher_bias: `[V]`.
        student_head: a module that makes logits of `[n, H]` in the place of the student's weight (which is then None) and
            bias: one with adapters, or quantised. Autograd finds its gradients, for the parameters that
            require one. It is called for each chunk, and again for tokens that were guessed wrongly (and for all by
            `backward` of `reduction="none"`): it must treat each row by itself, and always alike, without dropout.
        teacher: a `SparseTeacher` of the same tokens, in the place of the teacher's hidden states and weight, which are then
            None: see `sparse_atkd_loss`. The hard tokens are known from it, and the student's product is the only one;
            on the CPU. Beside a `student_head`, `vocab_size` is needed.
        teacher_log_prob: float32, one per token: the teacher's log p(label) at the temperature, where it is known, such as
            from a server. The hard tokens are selected by it.
        chunk_tokens: tokens of a chunk, instead of as many as `memory_budget` allows.
        memory_budget: bytes for the logits of a chunk, and for the logits' gradients that wait to be multiplied: on a GPU
            those of some chunks, since each product adds to all of the weight's gradient.
        logits_dtype: float32, or that of the hidden states, which is faster on a GPU and costs most of the digits. Left
            out, it is float32 wherever torch multiplies half precision to that: on the CPU (by float32 copies of a
            part of the weight at a time), and on CUDA from torch 2.8 on.
        vocab_size: the tokens of the vocabulary, where weights have more rows, which are padding. They may then be padded
            to numbers of rows of their own; nothing is computed there, and the gradient is 0.
        vocab_group: the group over whose ranks both weights are split by rows, and biases with them. Hidden states are
            the same on all of its ranks, and the gradient of the student's is the whole one, summed up over the ranks;
            those of weight and bias are of this rank's rows. (So what makes the hidden states must not sum it up again.)
        token_group: the group over whose ranks the tokens are split. With either group the margins of all chunks come
            first, from one product of the teacher's more, unless the hard tokens are known or one chunk has all
            tokens; nothing is guessed. With a `vocab_group` `backward` of `reduction="none"` has messages too, so that every
            rank of it must call that. A weight that FSDP2 has split is given as
            `weight.full_tensor(grad_placements=[Partial("avg")])`, or as it is in the forward of the module that `fully_shard`
            has wrapped, where it is whole.

    Under autocast hidden states, weights and biases are converted first, as those of `torch.nn.functional.linear` are.

    Raises:
        NotImplementedError: for a `SparseTeacher` that is not on the CPU.
        TypeError: for dtypes that do not go together, any DTensor, a setting that requires a gradient.
        ValueError: for shapes or devices that do not go together, a setting outside its domain, and, on the CPU, a label
            that names no token of the vocabulary.
    """
    labels, shift_labels = _loss.shifted_already(labels, shift_labels)
    tensors = {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "student_bias": student_bias,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
    }
    of_ranks = vocab_group, token_group, vocab_start, token_counts
    if any(each is not None for each in of_ranks):
        from . import _sharded_head

        result: Union[Tensor, Tuple[Tensor, Stats]] = _sharded_head.linear_atkd_loss(
            tensors,
            labels,
            vocab_group,
            token_group,
            {
                "student_head": student_head,
                "teacher": teacher,
                "teacher_log_prob": teacher_log_prob,
                "chunk_tokens": chunk_tokens,
                "memory_budget": memory_budget,
                "logits_dtype": logits_dtype,
                "selection": selection,
                "vocab_size": vocab_size,
                "token_weights": token_weights,
                "num_items_in_batch": num_items_in_batch,
                "shift_labels": shift_labels,
                "hard": hard,
                "return_stats": return_stats,
                "vocab_start": vocab_start,
                "token_counts": token_counts,
                "settings": settings,
            },
        )
        return result
    tensors["teacher_log_prob"] = teacher_log_prob
    if teacher is not None:
        teacher = checked_sparse(teacher, tensors)
    optional = {"student_bias", "teacher_bias", "teacher_log_prob"}
    if teacher is not None:
        optional |= {"teacher_hidden", "teacher_weight"}
    if student_head is not None:
        optional.add("student_weight")
        if student_weight is not None or student_bias is not None:
            raise ValueError(
                "student_head makes the student's logits: give None as student_weight, and no student_bias"
            )
        if not isinstance(student_head, torch.nn.Module):
            raise TypeError(
                f"student_head is a {type(student_head).__name__}, but must be a torch.nn.Module, whose parameters "
                "are known"
            )
    if _private.derivatives_are_transformed():
        raise RuntimeError(
            "linear_atkd_loss has no derivative for torch.func and forward mode: take atkd_loss of the logits"
        )
    for name, tensor in tensors.items():
        if tensor is not None or name not in optional:
            is_or_are = "are" if name.endswith("hidden") else "is"
            _loss.check_tensor(name, tensor, is_or_are, "linear_atkd_loss")
    if teacher_log_prob is not None:
        _loss.check_constant("teacher_log_prob", teacher_log_prob, "requires")
    check_sizes(chunk_tokens, memory_budget, logits_dtype)
    prepared = _loss.prepare(
        "linear_atkd_loss",
        student_hidden,
        labels,
        hard,
        token_weights,
        num_items_in_batch,
        shift_labels,
        selection,
        False,
        settings,
    )
    labels, scale, temperatures, per_sequence, per_token, settings = prepared
    dense: Any = [None, None, None]
    if teacher_hidden is not None:
        dense = cast_for_autocast(teacher_hidden, teacher_weight, teacher_bias)
        dense = [None if each is None else each.detach() for each in dense]
    student: Any = [student_hidden, None, None]
    if student_head is None:
        student = cast_for_autocast(student_hidden, student_weight, student_bias)
    wanted = [
        each is not None and each.requires_grad and torch.is_grad_enabled() for each in student
    ]
    of_tokens = labels, scale, hard, token_weights, temperatures, teacher_log_prob
    sizes = vocab_size, chunk_tokens, memory_budget, logits_dtype
    arguments: Any = (*student, *dense, *of_tokens, *wanted, per_sequence, *sizes)
    given = Given(*arguments, *(teacher or ()))
    loss: Tensor
    stats: Any
    if student_head is not None:
        loss, *stats = _outside_graphs(student_head, given, settings, per_token)
    elif per_token:
        loss, *stats = _TokenLosses.apply(*given, *_settings.for_operator(settings))
    else:
        loss, _, _, _, *stats = linear_loss(*given, *_settings.for_operator(settings))
    return (loss, _loss.stats_of(*stats)) if return_stats else loss


def checked_sparse(teacher: SparseTeacher, tensors: Dict[str, Optional[Tensor]]) -> SparseTeacher:
    """The teacher, if it is one, and no other is among the tensors."""
    if not isinstance(teacher, SparseTeacher):
        raise TypeError(f"teacher is a {type(teacher).__name__}, but must be an atkd.SparseTeacher")
    for name, tensor in tensors.items():
        if name.startswith("teacher") and tensor is not None:
            hint = ": its target_log_prob tells that" if name == "teacher_log_prob" else ""
            raise ValueError(f"{name} is given beside a sparse teacher{hint}: give None")
    return _loss.checked_sparse(teacher)


def _behind_module(
    module: torch.nn.Module, given: Given, settings: Dict[str, Any], per_token: bool
) -> Tuple[Tensor, Tensor, Tensor]:
    """The loss or the losses, the terms, and which tokens are hard."""
    check(given, {"numbers": None, **settings})
    settings = {
        name: value.item() if isinstance(value, Tensor) else value for name, value in settings.items()
    }
    vocab, has_padding = _vocab(given), given.vocab_size is not None
    # The student's logits, what autograd keeps of them, and their gradient.
    wide = torch.float32, torch.float32, torch.float32
    chunk_tokens, _ = chunk_tokens_of(given, 2 * vocab, *wide, False, settings)
    hidden, autocast = given.student_hidden, _head.Autocast(given.student_hidden.device)
    without_graph = given._replace(student_hidden=hidden.detach())

    def run(
        wanted: Tuple[bool, bool], upstream: Optional[Tensor], hard: Optional[Tensor]
    ) -> Tuple[_head.Module, Tensor, Tensor, Tensor]:
        now = without_graph._replace(
            token_weights=_native.product(upstream, given.token_weights),
            hard=given.hard if hard is None else hard,
        )
        student = _head.Module(now.student_hidden, module, vocab, has_padding, autocast, wanted)
        return (student, *_call(student, now, vocab, chunk_tokens, settings))

    parameters = [each for each in module.parameters() if each.requires_grad]
    wanted = given.with_hidden, torch.is_grad_enabled() and bool(parameters)
    result: Tuple[Tensor, Tensor, Tensor] = ByModule.apply(
        run, per_token, wanted, hidden, *parameters
    )
    return result


# The compiler would follow addresses of tensors that it has planned to be elsewhere.
_disable: Any = torch.compiler.disable
_outside_graphs = _disable(_behind_module)

linear_atkd_loss.__signature__ = _loss.shown_with_settings(linear_atkd_loss)  # type: ignore[attr-defined]


class LinearATKDLoss(_loss.Criterion):
    """`linear_atkd_loss` with its settings, which are checked here: those of `ATKDLoss` but for `inplace`, and these. Each is an
    attribute, which a schedule may set.

    Args:
        chunk_tokens: tokens of a chunk, instead of as many as `memory_budget` allows.
        memory_budget: bytes for the logits of a chunk.
        logits_dtype: float32, or that of the hidden states.
    """

    vocab_group = _loss.setting("vocab_group")
    token_group = _loss.setting("token_group")
    vocab_start = _loss.setting("vocab_start")
    chunk_tokens = _loss.setting("chunk_tokens")
    memory_budget = _loss.setting("memory_budget")
    logits_dtype = _loss.setting("logits_dtype")

    def __init__(
        self,
        *arguments: Any,
        chunk_tokens: Optional[int] = None,
        memory_budget: int = MEMORY_BUDGET,
        logits_dtype: Optional[torch.dtype] = None,
        **settings: Any,
    ) -> None:
        if "inplace" in settings:
            raise TypeError("LinearATKDLoss() has no logits that inplace could overwrite")
        super().__init__()
        settings = ATKDLoss(*arguments, **settings).settings
        del settings["inplace"]
        settings.update(chunk_tokens=chunk_tokens, memory_budget=memory_budget, logits_dtype=logits_dtype)
        self.check(settings)
        self.settings = settings

    def check(self, settings: Dict[str, Any]) -> None:
        super().check(settings)
        check_sizes(*[settings[name] for name in ("chunk_tokens", "memory_budget", "logits_dtype")])

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Optional[Tensor],
        teacher_hidden: Optional[Tensor],
        teacher_weight: Optional[Tensor],
        labels: Optional[Tensor] = None,
        num_items_in_batch: Union[None, int, float, Tensor] = None,
        temperature: Union[None, float, Tensor] = None,
        shift_labels: Union[None, bool, Tensor] = None,
        **keywords: Any,
    ) -> Any:
        """The loss of `linear_atkd_loss`, which describes the arguments and what raises; with `return_stats` `(loss, Stats)`.

        Args:
            student_hidden: `[N, H]` or `[B, T, H]`.
            student_weight: `[V, H]`, or None beside a `student_head`.
            teacher_hidden: `[N, H of the teacher]` or `[B, T, H of the teacher]`.
            teacher_weight: `[V, H of the teacher]`.
            labels: `[N]` or `[B, T]`.
            num_items_in_batch: a positive number, or a tensor that holds one: the sum is divided by it.
            temperature: a number, or float32, shaped as the labels: in the place of the setting.
            shift_labels: labels that are shifted already, as `ATKDLoss.forward` takes them; or a bool, in the place of the
                setting.
            keywords: `student_bias`, `teacher_bias`, `student_head`, `teacher`, `teacher_log_prob`, `hard`, `token_weights`,
                `token_counts`; or settings.
        """
        settings = self.given(temperature=temperature, shift_labels=shift_labels)
        return linear_atkd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            num_items_in_batch=num_items_in_batch,
            **{**settings, **keywords},
        )
