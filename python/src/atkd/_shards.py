"""The loss over groups of ranks.

If only tokens are split, a rank has whole rows: what it lacks is which of its tokens are hard among all, and how many
tokens all ranks have. If the vocabulary is split, no rank can make a number of a row by itself. Each makes a state of its
columns, 40 bytes per token; every rank gathers those of all and merges them in the order of ranks, so that all have the
same bits: margins, selection, loss. Divergences whose sums need both log-sum-exps sweep the columns a second time, for 12
bytes more. The gradient of a rank's columns then follows from its logits and the states.
"""

import contextlib
import math
import operator
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from . import _autograd, _checks, _dtensor, _loss, _native, _private, _settings, _sparse
from ._atkd import Objective, __version__
from ._autograd import NO_SECOND_DERIVATIVE, for_student
from ._checks import DTYPES, integer
from ._groups import (
    ARGUMENTS,
    Header,
    Part,
    Ranks,
    check_apart,
    counting_columns,
    digest_of,
    hash_of,
    meet,
    selection_of,
    shown,
)
from ._loss import Stats
from ._teacher import MASS_TOLERANCES, SparseTeacher, Teacher


class Agreed(NamedTuple):
    """What ranks must agree on, beside the shapes of their tensors."""

    function: str
    settings: Dict[str, Any]
    """Resolved: numbers, no tensors."""
    objective: Objective
    flags: Dict[str, Any]
    """By the names that messages tell them by."""
    vocab_size: Optional[int]

    def shown(self, per_token: bool) -> str:
        """What is compared, as text."""
        first = {"the function": self.function, "the version of atkd": __version__}
        settings = {**self.settings, "reduction": "none"} if per_token else self.settings
        return shown({**first, **self.flags, "vocab_size": self.vocab_size, **settings})


def resolved(settings: Dict[str, Any]) -> Dict[str, Any]:
    """The settings as Python's own numbers and texts, so that equal ones look alike. What is none stays: it is refused
    natively.
    """
    found = {}
    for name, default in _settings.DEFAULTS.items():
        value, kind = settings[name], type(default)
        if isinstance(value, Tensor):
            value = value.item()
        if kind is float and not isinstance(value, str):
            with contextlib.suppress(TypeError, ValueError):
                value = float(value)
        elif kind is int:
            with contextlib.suppress(TypeError):
                value = operator.index(value)
        elif kind is str and isinstance(value, str):
            value = str(value)
        elif kind is bool and _settings.is_bool(value):
            value = bool(value)
        found[name] = value
    return found


def items_of(number: Any) -> Any:
    """`num_items_in_batch` as ranks compare it, by its value where to read it is not to wait."""
    if isinstance(number, Tensor) and not number.is_cpu:
        return "a tensor on a GPU"
    return None if number is None else float(number)


def plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor, of torch's own type; the result of a collective is waited for."""
    if not _autograd.is_plain(tensor):
        tensor = tensor.clone()
    if not _autograd.is_plain(tensor):
        raise TypeError(
            f"{name} are a {type(tensor).__name__} on {tensor.device}, but with groups of ranks must be a plain tensor on the "
            "CPU or a CUDA device"
        )
    return tensor


def check_scale(scale: Optional[Tensor]) -> None:
    """Raises where the number is on the CPU and is none."""
    if scale is None or not scale.is_cpu:
        return
    number = float(scale.item())
    if not math.isfinite(number):
        raise ValueError(
            f"the reciprocal of num_items_in_batch is {number}, but must be finite: num_items_in_batch must be positive and "
            "finite, or 0 in a batch without valid tokens"
        )


def valid_of(labels: Optional[Tensor], like: Tensor, ignore_index: int) -> Tensor:
    """Which tokens count, contiguous; `like` are logits or hidden states."""
    if labels is None:
        return torch.ones(like.shape[:-1], dtype=torch.bool, device=like.device)
    return (labels != ignore_index).contiguous()


def header_of(
    agreed: Agreed,
    student: Tensor,
    teacher: Teacher,
    tokens: int,
    length: int,
    columns: Tuple[int, int],
    of_tokens: Dict[str, Optional[Tensor]],
    vocab_start: Optional[int],
    settings: str,
    with_digests: bool,
) -> Header:
    """What this rank says. `length` is that of sequences that select by themselves, and `of_tokens` are optional arguments by
    the names in `ARGUMENTS`, of whose values the ranks of a vocabulary group compare digests.
    """
    largest_index = most_short = 0
    teacher_dtype = teacher.log_probs.dtype if isinstance(teacher, SparseTeacher) else teacher.dtype
    if isinstance(teacher, SparseTeacher):
        of_tokens = {**of_tokens, **teacher._asdict()}
        del of_tokens["tail"]
        if teacher.indices.numel() > 0:
            rows = teacher.indices.flatten(0, -2)
            if of_tokens["labels"] is not None:
                ignored = of_tokens["labels"].reshape(-1) == agreed.settings["ignore_index"]
                rows = rows.masked_fill(ignored.unsqueeze(-1), -1)
            largest_index = max(int(rows.max()), 0)
            if agreed.vocab_size is None and teacher.tail in ("bucket", "uniform"):
                most_short = _most_short(teacher, of_tokens["labels"], rows, agreed.settings)
    digests: Dict[str, Any] = {}
    if with_digests:
        digests = {
            name: digest_of(each) for name, each in of_tokens.items() if each is not None
        }
    labels = of_tokens["labels"]
    least = largest = 0
    if labels is not None and labels.is_cpu:
        counting = labels[labels != agreed.settings["ignore_index"]]
        if counting.numel() > 0:
            least, largest = int(counting.min()), int(counting.max())
    dtypes = list(DTYPES)
    return Header(
        rank=torch.distributed.get_rank(),
        tokens=tokens,
        length=length,
        student_columns=columns[0],
        teacher_columns=columns[1],
        student_dtype=1 + dtypes.index(student.dtype),
        teacher_dtype=1 + dtypes.index(teacher_dtype),
        settings=hash_of(settings),
        given=sum(1 << i for i, name in enumerate(ARGUMENTS) if of_tokens.get(name) is not None),
        vocab_start=-1 if vocab_start is None else vocab_start,
        vocab=agreed.vocab_size or 0,
        least_label=least,
        largest_label=largest,
        largest_index=largest_index,
        most_short=most_short,
        **digests,
    )


def _most_short(
    teacher: SparseTeacher, labels: Optional[Tensor], indices: Tensor, settings: Dict[str, Any]
) -> int:
    """Of the rows whose probabilities add up to too little for a whole vocabulary, the most tokens that one knows; 0 if there
    is none. The indices are -1 in ignored rows. How many tokens there are only all ranks know.
    """
    log_probs = teacher.log_probs.reshape(indices.shape).double().masked_fill(indices < 0, -torch.inf)
    known, tolerance = (indices >= 0).sum(-1), MASS_TOLERANCES[teacher.log_probs.dtype]
    if teacher.target_log_prob is not None and labels is not None and settings["target"] == "label":
        target = teacher.target_log_prob.reshape(-1)
        at_label = indices == labels.reshape(-1, 1)
        log_probs = torch.cat([log_probs.masked_fill(at_label, -torch.inf), target.double().unsqueeze(-1)], -1)
        known = known + ~at_label.any(-1)
        tolerance = max(tolerance, MASS_TOLERANCES.get(target.dtype, 0.0))
    # An ignored row knows its target alone.
    short = (log_probs.exp().sum(-1) < 1 - tolerance) & (known > 1)
    return int(known.where(short, 0).max()) if short.numel() > 0 else 0


def needs_header(
    vocabulary: Ranks,
    tokens: Ranks,
    vocab_start: Optional[int],
    vocab_size: Optional[int],
    token_counts: Optional[Sequence[int]],
) -> bool:
    """True unless the caller has told what the ranks would."""
    by_vocabulary = vocabulary.group is not None and (vocab_start is None or vocab_size is None)
    return by_vocabulary or (tokens.group is not None and token_counts is None)


def told_integers(
    given: Dict[str, Any],
) -> Tuple[Optional[int], Optional[int], Optional[List[int]]]:
    """`vocab_size`, `vocab_start` and `token_counts`, each None or of integers."""
    size, start = (
        None if given[name] is None else integer(name, given[name])
        for name in ("vocab_size", "vocab_start")
    )
    counts = given["token_counts"]
    if counts is not None:
        try:
            counts = list(counts)
        except TypeError:
            raise TypeError(
                f"token_counts is {counts!r}, but must be a sequence of integers, one for each rank of the token_group"
            ) from None
        counts = [integer(f"token_counts[{i}]", each) for i, each in enumerate(counts)]
    return size, start, counts


def check_told(
    vocabulary: Ranks,
    tokens: Ranks,
    vocab_start: Optional[int],
    token_counts: Optional[Sequence[int]],
    count: int,
) -> None:
    """Raises unless what the caller tells of the ranks can be so."""
    for name, given, ranks, of in [
        ("vocab_start", vocab_start, vocabulary, "vocab_group"),
        ("token_counts", token_counts, tokens, "token_group"),
    ]:
        if given is not None and ranks.group is None:
            raise ValueError(
                f"{name} is {given}, but tells of a {of}, and none is given: leave it out, or give the {of}"
            )
    if token_counts is not None and len(token_counts) != tokens.size:
        raise ValueError(
            f"token_counts are {len(token_counts)} numbers, but the token_group has {tokens.size} ranks"
        )
    if token_counts is not None and token_counts[tokens.rank] != count:
        raise ValueError(
            f"token_counts[{tokens.rank}] is {token_counts[tokens.rank]}, but this rank has {count} tokens"
        )


def told(
    vocabulary: Ranks,
    tokens: Ranks,
    header: Header,
    token_counts: Optional[Sequence[int]],
    agreed: Agreed,
) -> Part:
    """What this rank has of the whole, as the caller tells."""
    columns = header.student_columns, header.teacher_columns
    vocab = agreed.vocab_size or columns[0]
    start = max(header.vocab_start, 0)
    parts = [counting_columns([start, each], vocab)[1] for each in columns]
    if parts[0] != parts[1]:
        raise ValueError(
            f"of columns {start} to {vocab} the student's logits have {parts[0][1]}, but the teacher's {parts[1][1]}"
        )
    least, largest = header.least_label, header.largest_label
    if least < 0 or largest >= vocab:
        label = least if least < 0 else largest
        raise ValueError(
            f"there is a label {label}, but labels must be from 0 to {vocab - 1}, or the ignore_index"
        )
    widest = -(-vocab // vocabulary.size)
    counts = [header.tokens] if token_counts is None else [int(each) for each in token_counts]
    return Part(*parts[0], vocab, widest, counts)


class Selection:
    """Which tokens are hard, among those of all ranks of the token group."""

    def __init__(
        self,
        tokens: Ranks,
        part: Part,
        valid: Tensor,
        hard: Optional[Tensor],
        per_sequence: bool,
        wanted: bool,
        settings: Dict[str, Any],
    ) -> None:
        self.tokens, self.part, self.valid, self.settings = tokens, part, valid, settings
        # Those that the caller gives, or what needs no margins.
        self.known: Optional[Tensor] = None
        self.found: Optional[Tuple[Tensor, Optional[Tensor]]] = None
        if hard is not None:
            self.known = hard & valid
        elif not wanted:
            # No loss depends on margins, but some do on the set, where all tokens are hard or none is.
            all_are = settings["selection_rule"] == "top-k" and settings["hard_ratio"] == 1.0
            self.known = valid if all_are else torch.zeros_like(valid)
        self.per_sequence = per_sequence

    def hard(self, margins: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        """The hard ones among this rank's tokens, and int32 `[2]`: how many tokens of all ranks count, and are hard; None
        without a token group. The margins are needed unless the hard tokens are known. Once they are found they stay.
        """
        if self.found is None:
            self.found = self._find(margins)
        return self.found

    def _find(self, margins: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        hard = self.known
        if hard is None:
            assert margins is not None, "they are what tokens are selected by"
            if self.tokens.group is not None and not self.per_sequence:
                return self._among_all(margins)
            offsets = None
            if self.per_sequence:
                sequences, length = self.valid.shape
                offsets = _native.offsets_of(sequences, length, self.valid.device)
            hard = self._select(margins, self.valid, offsets)
        if self.tokens.group is None:
            return hard, None
        return hard, self.tokens.gather(counts_of(self.valid, hard)).sum(0, dtype=torch.int32)

    def _among_all(self, margins: Tensor) -> Tuple[Tensor, Tensor]:
        counts = self.part.token_counts
        all_margins, all_valid, own = selection_of(self.tokens, counts, margins, self.valid)
        hard = self._select(all_margins, all_valid, None)
        return hard[own].view(margins.shape), counts_of(all_valid, hard)

    def _select(self, margins: Tensor, valid: Tensor, offsets: Optional[Tensor]) -> Tensor:
        hard = torch.empty_like(valid)
        how = self.settings["hard_ratio"], hard, self.settings["selection_rule"]
        _native.run_selection(margins, valid, offsets, *how)
        return hard


def counts_of(valid: Tensor, hard: Tensor) -> Tensor:
    """int32 `[2]`: how many tokens count, and are hard."""
    return torch.stack([valid.sum(), hard.sum()]).to(torch.int32)


class Call(NamedTuple):
    """A loss of rows that are split over ranks."""

    vocabulary: Ranks
    part: Part
    objective: Objective
    selection: Selection
    teacher: Tensor
    labels: Optional[Tensor]
    temperatures: Optional[Tensor]
    scale: Optional[Tensor]

    def stages(self, student: Tensor, token_weights: Optional[Tensor]) -> _native.Stages:
        columns = self.part.first_column, self.part.columns, self.part.vocab
        of_tokens = self.labels, token_weights, self.temperatures
        return _native.Stages(student, self.teacher, *of_tokens, *columns, self.objective)


def exchange(
    vocabulary: Ranks, objective: Objective, stages: _native.Stages
) -> Tuple[Tensor, Optional[Tensor]]:
    """The states of all ranks, and what they make in a second sweep, if the divergence has one."""
    states = vocabulary.gather(stages.states())
    if not objective.two_sweeps:
        return states, None
    return states, vocabulary.gather(stages.terms(states))


class _Loss(torch.autograd.Function):
    """The loss, whose gradient is computed with it, and the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        token_weights: Optional[Tensor],
        call: Call,
        with_gradient: bool,
        inplace: bool,
    ) -> Tuple[Tensor, Any]:
        place = _native.rows(student.detach()) if inplace else student.detach()
        stages = call.stages(place, token_weights)
        states, terms = exchange(call.vocabulary, call.objective, stages)
        hard, counts = call.selection.hard(stages.margins(states))
        loss, stats = stages.loss(states, terms, hard, counts)
        if call.scale is not None:
            loss.mul_(call.scale)
        gradient = None
        if with_gradient:
            gradient = place if inplace else _native.empty_gradient(student)
            stages.gradient(states, terms, hard, call.scale, counts, gradient)
        if inplace and place.data_ptr() == student.data_ptr():
            torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(gradient)
        # In a tuple, where autograd leaves them alone.
        return loss, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
        return _autograd.first_derivative(ctx, upstream, len(ctx.needs_input_grad) - 1)


class _TokenLosses(torch.autograd.Function):
    """The loss of each token, and the statistics. The gradient that arrives is a weight of the tokens, and `backward`
    computes that of the columns from the logits and the states, by itself.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, token_weights: Optional[Tensor], call: Call
    ) -> Tuple[Tensor, Any]:
        stages = call.stages(student.detach(), token_weights)
        states, terms = exchange(call.vocabulary, call.objective, stages)
        hard, counts = call.selection.hard(stages.margins(states))
        _, stats = stages.loss(states, terms, hard, counts)
        # Without the tensors that autograd keeps.
        ctx.call = call._replace(teacher=states, labels=None, temperatures=None)
        of_call = call.teacher, call.labels, call.temperatures
        ctx.save_for_backward(student, token_weights, *of_call, hard, states, terms)
        ctx.set_materialize_grads(False)
        columns, _ = stats
        return columns[4].clone(), stats

    @staticmethod
    def backward(ctx: Any, upstream: Optional[Tensor], *_: Any) -> Tuple[Optional[Tensor], ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        if upstream is None:
            return for_student(None, 2)
        student, token_weights, teacher, labels, temperatures, *made = ctx.saved_tensors
        call = ctx.call._replace(teacher=teacher, labels=labels, temperatures=temperatures)
        hard, states, terms = made
        gradient = _native.empty_gradient(student)
        stages = call.stages(student, _native.product(upstream, token_weights))
        stages.gradient(states, terms, hard, None, None, gradient)
        return for_student(gradient, 2)


def refuse_transforms(function: str) -> None:
    """Raises within transforms, which the header's tensors would be of too. No other rank hears of it."""
    if _private.derivatives_are_transformed() or _private.is_traced_or_transformed():
        raise RuntimeError(
            f"{function} over groups of ranks has no rule for torch.func, forward mode and tracers: call it outside"
        )


class _Prepared(NamedTuple):
    """What a rank's arguments are, before it has heard of the others."""

    student: Tensor
    teacher: Teacher
    margins: Optional[Tensor]
    """Those of a sparse teacher."""
    hard: Optional[Tensor]
    token_weights: Optional[Tensor]
    prepared: _loss.Prepared
    agreed: Agreed
    with_gradient: bool
    inplace: bool
    header: Header
    shown: str


def _prepare(
    function: str,
    vocabulary: Ranks,
    tokens: Ranks,
    student: Tensor,
    teacher: Teacher,
    labels: Optional[Tensor],
    given: Dict[str, Any],
) -> _Prepared:
    """Raises for whatever can be found wrong here."""
    of_teacher = function == "teacher_margins"
    student_name = "teacher_logits" if of_teacher else "student_logits"
    if isinstance(teacher, SparseTeacher):
        logits = [(student_name, student)]
    else:
        logits = [(student_name, student), ("teacher_logits", teacher)]
    for name, tensor in logits:
        _loss.check_tensor(name, tensor, function=function)
        for ranks in (vocabulary, tokens):
            ranks.check_device(name, tensor)
    check_apart(vocabulary, tokens)
    hard, token_weights, inplace = given["hard"], given["token_weights"], given["inplace"]
    vocab_size, vocab_start, token_counts = told_integers(given)
    prepared = _loss.prepare(
        function,
        student,
        labels,
        hard,
        token_weights,
        given["num_items_in_batch"],
        given["shift_labels"],
        given["selection"],
        inplace,
        given["settings"],
    )
    inplace = inplace and _autograd.is_plain(student)
    student = plain(student_name, student)
    if isinstance(teacher, SparseTeacher):
        teacher = plain_sparse(teacher)
        if not student.is_cpu:
            what = "vocab_group and token_group go with a sparse teacher"
            instead = "leave both out: with hard= and num_items_in_batch= of all ranks the losses of their tokens add up"
            _checks.refuse_sparse(what, student_name, student, instead)
    else:
        teacher = plain("teacher_logits", teacher).detach()
    hard, token_weights, labels, temperatures, scale = (
        None if each is None else plain("tensors of tokens", each)
        for each in (hard, token_weights, prepared.labels, prepared.temperatures, prepared.scale)
    )
    settings = resolved(prepared.settings)
    prepared = prepared._replace(
        labels=labels, scale=scale, temperatures=temperatures, settings=settings
    )
    rows = labels, scale, hard, token_weights, temperatures, prepared.per_sequence
    numbered = {"numbers": None, **settings}
    if vocabulary.group is None:
        _checks.check_loss(student, teacher, *rows, vocab_size, numbered)
    else:
        _checks.check_shard(student, teacher, *rows, numbered, student_name)
        if vocab_size == 0:
            raise ValueError("vocab_size is 0, but must be at least 1")
    objective = _settings.native(settings)
    _checks.check_values(labels, temperatures, None, None, settings["ignore_index"])
    check_scale(scale)
    flags = {
        "selection": given["selection"],
        "shift_labels": bool(given["shift_labels"]),
        "return_stats": bool(given["return_stats"]),
        "num_items_in_batch": items_of(given["num_items_in_batch"]),
    }
    margins: Optional[Tensor] = None
    columns = student.shape[-1], student.shape[-1]
    if isinstance(teacher, SparseTeacher):
        flags["tail"] = teacher.tail
        known_vocab = columns[0] if vocabulary.group is None and vocab_size is None else vocab_size
        margins = sparse_margins(teacher, labels, known_vocab, settings)
    else:
        columns = student.shape[-1], teacher.shape[-1]
    agreed = Agreed(function, settings, objective, flags, vocab_size)
    with_gradient = student.requires_grad and torch.is_grad_enabled()
    inplace = inplace and with_gradient and _autograd.may_be_overwritten(student)
    count = student.shape[:-1].numel()
    check_told(vocabulary, tokens, vocab_start, token_counts, count)
    optional = {
        "labels": labels,
        "hard": hard,
        "token_weights": token_weights,
        "temperature": temperatures,
    }
    length = student.shape[1] if prepared.per_sequence else 0
    compares = vocabulary.group is not None and needs_header(
        vocabulary, tokens, vocab_start, vocab_size, token_counts
    )
    settings_shown = agreed.shown(prepared.per_token)
    of_rank = count, length, columns, optional, vocab_start, settings_shown, compares
    header = header_of(agreed, student, teacher, *of_rank)
    known = hard, token_weights, prepared, agreed, with_gradient, inplace
    return _Prepared(student, teacher, margins, *known, header, settings_shown)


def plain_sparse(teacher: SparseTeacher) -> SparseTeacher:
    """The teacher, of plain tensors that require no gradient."""
    indices, log_probs, target, tail = _loss.checked_sparse(teacher)
    name = "tensors of the teacher"
    target = None if target is None else plain(name, target)
    return SparseTeacher(plain(name, indices), plain(name, log_probs), target, tail)


def sparse_margins(
    teacher: SparseTeacher,
    labels: Optional[Tensor],
    vocab_size: Optional[int],
    settings: Dict[str, Any],
) -> Tensor:
    """The margins, for which all of the teacher's values are checked, before other ranks rely on this one."""
    margins = teacher.log_probs.new_empty(teacher.indices.shape[:-1], dtype=torch.float32)
    _native.run_margins(teacher, labels, None, vocab_size, settings, margins)
    return margins


def labelled(
    teacher: SparseTeacher, labels: Optional[Tensor], settings: Dict[str, Any]
) -> Tuple[SparseTeacher, Tensor, Dict[str, Any]]:
    """The same loss with each token's target, the likeliest of the teacher's K, as its label; the lowest among equals."""
    likelihood = teacher.log_probs.float().masked_fill(teacher.indices < 0, -torch.inf)
    is_likeliest = (likelihood == likelihood.amax(-1, keepdim=True)) & (teacher.indices >= 0)
    last = torch.iinfo(teacher.indices.dtype).max
    target = teacher.indices.masked_fill(~is_likeliest, last).amin(-1).to(torch.int64)
    if labels is not None:
        target = target.where(labels != settings["ignore_index"], -100)
    settings = {**settings, "target": "label", "ignore_index": -100}
    return teacher._replace(target_log_prob=None), target, settings


def logits_of(vocabulary: Ranks, stages: _native.Stages, teacher: SparseTeacher) -> Tensor:
    """The teacher's logits of this rank's columns, as its tail makes them. `stages` are those of the student alone."""
    rests = vocabulary.gather(stages.rests(teacher)) if teacher.tail == "bucket" else None
    return stages.teacher_logits(teacher, rests)


def agree(
    vocabulary: Ranks,
    tokens: Ranks,
    prepare: Any,
    device: Optional[torch.device],
    vocab_start: Optional[int],
    vocab_size: Optional[int],
    token_counts: Optional[Sequence[int]],
) -> Tuple[Any, Part]:
    """What `prepare` makes, and what this rank has of the whole. If one rank's raises, all ranks do."""
    if not needs_header(vocabulary, tokens, vocab_start, vocab_size, token_counts):
        prepared = prepare()
        return prepared, told(vocabulary, tokens, prepared.header, token_counts, prepared.agreed)
    try:
        prepared = prepare()
    except Exception:
        meet(vocabulary, tokens, None, device)
        raise
    return prepared, meet(vocabulary, tokens, prepared.header, device, prepared.shown)


def device_of(*tensors: object) -> Optional[torch.device]:
    return next((each.device for each in tensors if isinstance(each, Tensor)), None)


def _atkd_loss(
    vocabulary: Ranks,
    tokens: Ranks,
    parts: Callable[[], Any],
    device: Optional[torch.device],
    given: Dict[str, Any],
    function: str = "atkd_loss",
) -> Tuple[Tensor, Optional[Stats]]:
    known, part = agree(
        vocabulary,
        tokens,
        lambda: _prepare(function, vocabulary, tokens, *parts()),
        device,
        given["vocab_start"],
        given["vocab_size"],
        given["token_counts"],
    )
    labels, scale, temperatures, per_sequence, per_token, settings = known.prepared
    objective = known.agreed.objective
    wanted = objective.depends_on_selection or given["return_stats"]
    valid = valid_of(labels, known.student, settings["ignore_index"])
    chosen = known.hard, per_sequence, wanted, settings
    selection = Selection(tokens, part, valid, *chosen)
    stats: Any
    if vocabulary.group is None and settings["reduction"] != "group-mean":
        margins = known.margins
        if selection.known is None and margins is None:
            margins = valid.new_empty(valid.shape, dtype=torch.float32)
            of_tokens = labels, temperatures, known.agreed.vocab_size
            _native.run_margins(known.teacher, *of_tokens, settings, margins)
        hard, counts = selection.hard(margins)
        if counts is not None and settings["reduction"] == "mean":
            scale = counts[0].clamp(min=1).double().reciprocal().float()
            settings = {**settings, "reduction": "sum"}
        loss, *stats = _loss.of_whole_rows(
            known.student,
            known.teacher,
            labels,
            scale,
            hard,
            known.token_weights,
            temperatures,
            known.inplace,
            False,
            per_token,
            known.agreed.vocab_size,
            settings,
            given["return_stats"],
        )
        return loss, _loss.stats_of(*stats) if stats else None
    teacher = known.teacher
    if isinstance(teacher, SparseTeacher):
        selection.hard(known.margins)
        if settings["target"] == "teacher":
            teacher, labels, settings = labelled(teacher, labels, settings)
            objective = _settings.native(settings)
        columns = part.first_column, part.columns, part.vocab
        student = known.student.detach()
        stages = _native.Stages(student, student, labels, None, temperatures, *columns, objective)
        teacher = logits_of(vocabulary, stages, teacher)
    call = Call(vocabulary, part, objective, selection, teacher, labels, temperatures, scale)
    if per_token:
        loss, stats = _TokenLosses.apply(known.student, known.token_weights, call)
        return loss, _loss.stats_of(*stats)
    before = _private.version(known.student) if known.inplace else 0
    flags = known.with_gradient, known.inplace
    loss, stats = _Loss.apply(known.student, known.token_weights, call, *flags)
    if known.inplace:
        _autograd.tell_overwritten(known.student, before)
    return loss, _loss.stats_of(*stats)


def atkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor],
    *,
    vocab_group: Any,
    token_group: Any,
    **given: Any,
) -> Union[Tensor, Tuple[Tensor, Stats]]:
    """`_loss.atkd_loss` with a group, or with a DTensor of logits."""
    result: Union[Tensor, Tuple[Tensor, Stats]]
    result = _outside_graphs(student, teacher, labels, vocab_group, token_group, given)
    return result


def sparse_atkd_loss(
    student: Tensor,
    teacher: SparseTeacher,
    labels: Optional[Tensor],
    *,
    vocab_group: Any,
    token_group: Any,
    **given: Any,
) -> Union[Tensor, Tuple[Tensor, Stats]]:
    """`_sparse.sparse_atkd_loss` with a group."""
    result: Union[Tensor, Tuple[Tensor, Stats]]
    result = _sparse_outside_graphs(student, teacher, labels, vocab_group, token_group, given)
    return result


def _sparse_atkd_loss(
    student: Tensor,
    teacher: SparseTeacher,
    labels: Optional[Tensor],
    vocab_group: Any,
    token_group: Any,
    given: Dict[str, Any],
) -> Union[Tensor, Tuple[Tensor, Stats]]:
    refuse_transforms("sparse_atkd_loss")

    def parts() -> Tuple[Any, ...]:
        # Other ranks are told if this one raises.
        _sparse.check_kinds(student, teacher)
        return student, teacher, labels, given

    ranks = Ranks("vocab_group", vocab_group), Ranks("token_group", token_group)
    device = device_of(student, labels)
    loss, stats = _atkd_loss(*ranks, parts, device, given, "sparse_atkd_loss")
    if not given["return_stats"]:
        return loss
    assert stats is not None
    return loss, stats


def _local_or_distributed(
    student: Tensor,
    teacher: Tensor,
    labels: Optional[Tensor],
    vocab_group: Any,
    token_group: Any,
    given: Dict[str, Any],
) -> Union[Tensor, Tuple[Tensor, Stats]]:
    refuse_transforms("atkd_loss")
    parts = _dtensor.Parts(student, teacher, labels, given)
    device = device_of(student, teacher, labels)
    if not _loss.is_dtensor(student):
        ranks = Ranks("vocab_group", vocab_group), Ranks("token_group", token_group)
        loss, stats = _atkd_loss(*ranks, lambda: parts, device, given)
    else:
        placed = _dtensor.Placed(student, vocab_group, token_group)
        ranks = placed.vocabulary, placed.tokens
        loss, stats = _atkd_loss(*ranks, lambda: placed.local(*parts), device, given)
        loss = placed.distributed(loss)
    if not given["return_stats"]:
        return loss
    assert stats is not None
    return loss, stats


def _teacher_margins(
    teacher: Tensor,
    labels: Optional[Tensor],
    vocab_group: Any,
    vocab_start: Optional[int],
    vocab_size: Optional[int],
    shift_labels: bool,
    settings: Dict[str, Any],
) -> Tensor:
    refuse_transforms("teacher_margins")
    vocabulary, tokens = Ranks("vocab_group", vocab_group), Ranks("token_group", None)
    given = {
        "settings": settings,
        "vocab_size": vocab_size,
        "vocab_start": vocab_start,
        "shift_labels": shift_labels,
        "selection": "batch",
        **dict.fromkeys(["inplace", "return_stats"], False),
        **dict.fromkeys(["hard", "token_weights", "num_items_in_batch", "token_counts"]),
    }
    known, part = agree(
        vocabulary,
        tokens,
        lambda: _prepare("teacher_margins", vocabulary, tokens, teacher, teacher, labels, given),
        device_of(teacher, labels),
        vocab_start,
        vocab_size,
        None,
    )
    # The teacher is the student too: margins are the teacher's alone.
    assert isinstance(known.teacher, Tensor), "a sparse teacher's margins need no ranks"
    logits, of_tokens = known.teacher, (known.prepared.labels, None, known.prepared.temperatures)
    columns = part.first_column, part.columns, part.vocab
    stages = _native.Stages(logits, logits, *of_tokens, *columns, known.agreed.objective)
    return stages.margins(vocabulary.gather(stages.states()))


def _select_hard(
    margins: Tensor, valid: Optional[Tensor], hard_ratio: _settings.Number, group: Any
) -> Tensor:
    refuse_transforms("select_hard")
    tokens = Ranks("group", group)

    def prepare() -> Tuple[Header, Tensor, Tensor, float, str]:
        _loss.check_selection(margins, valid, None, hard_ratio)
        tokens.check_device("margins", margins)
        own = plain("margins", margins.detach())
        counting = torch.ones_like(own, dtype=torch.bool) if valid is None else plain("valid", valid)
        # The hard tokens' memory follows theirs.
        own, counting = own.contiguous(), counting.contiguous()
        _checks.check_selection(own, counting, None, None)
        ratio = float(hard_ratio)
        # Checked there.
        _settings.native({**_settings.DEFAULTS, "hard_ratio": ratio})
        first = {"the function": "select_hard", "the version of atkd": __version__}
        settings = shown({**first, "hard_ratio": ratio})
        header = Header(
            rank=torch.distributed.get_rank(),
            tokens=own.numel(),
            student_columns=1,
            teacher_columns=1,
            settings=hash_of(settings),
        )
        return header, own, counting, ratio, settings

    vocabulary = Ranks("vocab_group", None)
    try:
        header, own, counting, ratio, compared = prepare()
    except Exception:
        meet(vocabulary, tokens, None, device_of(margins, valid))
        raise
    part = meet(vocabulary, tokens, header, own.device, compared)
    settings = {**_settings.DEFAULTS, "hard_ratio": ratio}
    selection = Selection(tokens, part, counting, None, False, True, settings)
    hard, _ = selection.hard(own)
    return hard


# The host reads headers, which a graph cannot.
_disable: Any = torch.compiler.disable
_outside_graphs = _disable(_local_or_distributed)
_sparse_outside_graphs = _disable(_sparse_atkd_loss)
teacher_margins = _disable(_teacher_margins)
select_hard = _disable(_select_hard)
