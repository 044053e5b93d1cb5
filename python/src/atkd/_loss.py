"""The loss as a function and as a module."""

import inspect
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    Literal,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
    overload,
)

import torch
from torch import Tensor

from . import _autograd, _checks, _operator, _private, _settings, _teacher
from ._settings import DEFAULTS, Number, Settings
from ._teacher import SparseTeacher, Teacher
from ._token_losses import TokenLosses, TransformedTokenLosses
from ._transforms import Transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class Stats(NamedTuple):
    """The terms of each token, shaped as the labels; 0 for ignored ones, but for the margin. No gradient flows
    through. All are at the temperature; no weight is in them, nor the temperature's square, but in `loss`.
    """

    uncertainty: Tensor
    """1 - p(target) of the teacher, float32: exactly 1 above a margin of 17.4, so no number to select by."""
    tkd: Tensor
    """The target part of the divergence, float32. NaN, as is `dkd`, for `objective="plain"` with `"jsd"`, `"tvd"`,
    `"skew-kl"` and `"skew-reverse-kl"`, which are not computed from parts.
    """
    dkd: Tensor
    """The divergence of the renormalised rest, float32."""
    hard: Tensor
    """True for hard tokens, whatever the objective makes of them."""
    margin: Tensor
    """log((1 - p) / p) of the teacher's p(target), float32, by which hard tokens are selected; -inf for ignored
    ones.
    """
    loss: Tensor
    """The token's loss before the reduction, float32: its terms with the objective's weights and its own, cross entropy
    included. What the reduction divides by is not in it.
    """

    def summary(
        self,
        settings: Optional[Mapping[str, Any]] = None,
        *,
        token_weights: Optional[Tensor] = None,
        valid: Optional[Tensor] = None,
    ) -> Dict[str, float]:
        """Means for a log, over the tokens that are not ignored. On a GPU it waits for them, once.

        Args:
            settings: those of the call, such as `criterion.settings`, for `"kd"` and `"ce"`; what is not among them has its
                default. Without them these two are left out.
            token_weights: those of the call, which belong to the settings.
            valid: bool, shaped as the labels: which tokens count. Without it all whose margin is above -inf do, which leaves
                out a token of whose label the teacher is certain beyond float32 because the logits of all others are -inf.

        Returns:
            `"tokens"`, their number; `"hard"`, the share of hard ones; `"threshold"`, the least uncertainty of a hard one, NaN
            if there is none; the means of `"uncertainty"`, `"tkd"`, `"dkd"`, `"loss"`; `"easy_dkd"`, `"hard_tkd"`,
            `"hard_dkd"`, the means over easy and over hard tokens, of which the loss of `"atkd"` is made; `"kd"` and `"ce"`,
            the parts of `"loss"` that are distillation and cross entropy, with their weights, so that they add up to it. Means
            over no token are 0. `"kd"` and `"ce"` are NaN where the terms do not tell them apart: for `"plain"` with a
            divergence other than forward KL, if both weights are other than 0. With ranks, all are this rank's.
        """
        counts = self.margin != float("-inf") if valid is None else valid
        hard, easy = counts & self.hard, counts & ~self.hard

        def mean(values: Tensor, tokens: Tensor) -> Tensor:
            return values.double().where(tokens, 0).sum() / tokens.sum().clamp(min=1)

        infinity = self.uncertainty.new_full((1,), float("inf"))
        threshold = torch.cat([self.uncertainty.where(hard, infinity).flatten(), infinity]).amin()
        found = {
            "tokens": counts.sum(),
            "hard": mean(self.hard, counts),
            "threshold": threshold.where(hard.any(), float("nan")),
            "uncertainty": mean(self.uncertainty, counts),
            "tkd": mean(self.tkd, counts),
            "dkd": mean(self.dkd, counts),
            "easy_dkd": mean(self.dkd, easy),
            "hard_tkd": mean(self.tkd, hard),
            "hard_dkd": mean(self.dkd, hard),
            "loss": mean(self.loss, counts),
        }
        if settings is not None:
            found["kd"] = mean(self._distillation({**DEFAULTS, **settings}, token_weights), counts)
            found["ce"] = found["loss"] - found["kd"]
        values = torch.stack([value.double() for value in found.values()]).tolist()
        return dict(zip(found, values))

    def _distillation(self, settings: Dict[str, Any], token_weights: Optional[Tensor]) -> Tensor:
        """The part of each token's loss that is no cross entropy, float64."""
        if settings["ce_weight"] == 0:
            return self.loss.double()
        if settings["kd_weight"] == 0:
            return torch.zeros_like(self.loss, dtype=torch.float64)
        uncertainty, tkd, dkd = self.uncertainty.double(), self.tkd.double(), self.dkd.double()
        lam, objective = settings["lam"], settings["objective"]
        if objective == "atkd":
            kd: Tensor = ((1 - lam) * (tkd + dkd)).where(self.hard, lam * dkd)
        elif objective in ("tkd", "dkd"):
            kd = tkd if objective == "tkd" else dkd
        elif objective == "kl" or settings["divergence"] == "forward-kl":
            kd = tkd + uncertainty * dkd
        else:
            kd = torch.full_like(tkd, float("nan"))
        kd = kd * settings["kd_weight"]
        if settings["temperature_squared"]:
            kd = kd * settings["temperature"] ** 2
        return kd if token_weights is None else kd.mul(token_weights)


def check_tensor(
    name: str, value: object, is_or_are: str = "are", function: str = "atkd_loss"
) -> None:
    """Raises unless it is a dense tensor, and no DTensor: of these `function` has taken out what it takes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} {is_or_are} a {type(value).__name__}, but must be a torch.Tensor")
    if is_dtensor(value):
        taken = "is taken only beside student_logits that are one"
        if function != "atkd_loss":
            taken = f"{function} does not take"
        raise TypeError(f"{name} {is_or_are} a DTensor, which {taken}: {_instead_of_dtensor(name)}")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise ValueError(f"{name} {is_or_are} {layout}, but must be dense")


def _instead_of_dtensor(name: str) -> str:
    """What to give."""
    if name in ("student_weight", "student_bias"):
        return (
            f"where rows are split by tensor parallelism, give {name}.to_local() and the vocab_group; where FSDP2 has split "
            f'it, {name}.full_tensor(grad_placements=[Partial("avg")]), with one placement for each dimension of its mesh, or '
            "call the loss in the forward of the module that fully_shard has wrapped, where it is a whole tensor. (What "
            "full_tensor() alone gives has a wrong gradient.)"
        )
    return f"give {name}.full_tensor(), or {name}.to_local() if that is this rank's part"


def checked_sparse(teacher: SparseTeacher) -> SparseTeacher:
    """The teacher, as operators take it: nothing requires a gradient, and the target's log-probabilities are no float64."""
    indices, log_probs, target, tail = teacher
    check_tensor("indices", indices)
    check_tensor("log_probs", log_probs)
    if target is not None:
        check_tensor("target_log_prob", target, "is")
        if not target.is_floating_point():
            raise TypeError(f"target_log_prob is {target.dtype}, but must be of a floating dtype")
        target = target.detach()
        target = target.float() if target.dtype == torch.float64 else target
    if not isinstance(tail, str):
        raise TypeError(f'tail is {tail!r}, but must be "zero", "uniform", "bucket" or "sampled"')
    return SparseTeacher(indices, log_probs.detach(), target, tail)


def _check_number(name: str, number: object) -> None:
    """Raises for a tensor that is no number, or that somebody expects a gradient for."""
    if not isinstance(number, Tensor):
        return
    if is_dtensor(number):
        raise TypeError(f"{name} is a DTensor, but must be a number: give {name}.full_tensor()")
    check_tensor(name, number, "is")
    if number.numel() != 1:
        raise ValueError(f"{name} is {list(number.shape)}, but must be one number")
    if number.requires_grad or isinstance(number, torch.nn.Parameter):
        what = "a Parameter" if isinstance(number, torch.nn.Parameter) else "a tensor"
        raise TypeError(
            f"{name} is {what} that requires a gradient, but none flows to it: give {name}.detach()"
        )


def _check_real(name: str, number: object) -> None:
    """Raises for what is neither a number nor a tensor, of which `_check_number` knows more."""
    # Asked first: torch.compile need not look for an attribute of its numbers then.
    if isinstance(number, (int, float, torch.SymInt, torch.SymFloat, Tensor)):
        return
    if not hasattr(number, "__float__"):
        raise TypeError(f"{name} is {number!r}, but must be of type float")


def _own_temperatures(
    function: str, settings: Dict[str, Any], logits: Tensor
) -> Optional[Tensor]:
    """The temperatures of the tokens, if the setting is no number."""
    temperature = settings["temperature"]
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        return None
    # Asked first: torch.compile may know that shapes are equal where it does not know them.
    of_tokens = temperature.dtype == torch.float32 and temperature.shape == logits.shape[:-1]
    if not of_tokens and temperature.numel() == 1:
        return None
    check_tensor("temperature", temperature, "is", function)
    check_constant("temperature", temperature, "requires")
    settings["temperature"] = DEFAULTS["temperature"]
    return temperature


def _check_numbers(settings: Dict[str, Any]) -> None:
    for name in _settings.NUMBERS:
        number = settings[name]
        # Most are, and to ask further takes time.
        if type(number) is not float:
            _check_number(name, number)
            _check_real(name, number)


def check_shift_labels(shift_labels: object) -> None:
    if isinstance(shift_labels, Tensor):
        raise TypeError(
            "shift_labels is a Tensor, but must be True or False as a setting: give labels that are shifted already to "
            "the call"
        )
    _check_bool("shift_labels", shift_labels)


def _check_bool(name: str, value: object) -> None:
    if not _settings.is_bool(value):
        raise TypeError(f"{name} is {value!r}, but must be True or False")


def shifted_already(labels: Optional[Tensor], shift_labels: Any) -> Tuple[Optional[Tensor], bool]:
    """The labels, and whether they are to be shifted. By the name `shift_labels` Hugging Face gives labels that are shifted
    already, where a context is split over ranks, and looks at no others then.
    """
    if isinstance(shift_labels, Tensor):
        return shift_labels, False
    return labels, shift_labels


def _scale(num_items: Union[int, float, Tensor], device: torch.device) -> Tensor:
    """Its reciprocal as a float32 scalar on the device. NaN for a number that is none of those allowed
    where to find out would be to wait.
    """
    _check_number("num_items_in_batch", num_items)
    if isinstance(num_items, Tensor) and num_items.is_cpu and _autograd.runs_directly(num_items):
        num_items = num_items.item()
    if torch.compiler.is_compiling() and not isinstance(num_items, Tensor):
        # A product, which torch.compile does not compile again for another number.
        num_items = torch.ones((), dtype=torch.float64, device=device) * num_items
    if not isinstance(num_items, Tensor):
        try:
            allowed = num_items == 0 or 1e-38 <= num_items <= 1e38
        except TypeError:
            message = f"num_items_in_batch is a {type(num_items).__name__}, but must be a number"
            raise TypeError(message) from None
        if not allowed:
            raise ValueError(
                f"num_items_in_batch is {num_items}, but must be positive and finite, or 0 in a batch "
                "without valid tokens"
            )
        return torch.full((), 1 / (num_items or 1), dtype=torch.float32, device=device)
    items = num_items.detach().reshape(()).to(device, torch.float64, non_blocking=True)
    scale = items.where(items != 0, 1).reciprocal().to(torch.float32)
    return scale.where((scale > 0) & scale.isfinite(), float("nan"))


def _shifted(
    logits: Tensor,
    labels: Optional[Tensor],
    shift_labels: bool,
    target: str,
    ignore_index: int,
) -> Tuple[Optional[Tensor], int]:
    """The labels by the position of the logits that they are about, and the index of those that are ignored."""
    if not shift_labels:
        return labels, ignore_index
    if labels is None and target == "teacher":
        # Labels that only say which position is ignored.
        ignore_index = -100
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    if labels is not None and labels.dtype not in _checks.LABEL_DTYPES:
        # Others may not hold the ignore_index.
        raise TypeError(f"labels are {labels.dtype}, but must be int64 or int32")
    if labels is not None and labels.dim() > 0:
        labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return labels, ignore_index


def _check_per_token(num_items_in_batch: object, inplace: bool) -> None:
    if num_items_in_batch is not None:
        raise ValueError(
            f'num_items_in_batch is {num_items_in_batch}, but reduction="none" divides by nothing: leave it out'
        )
    if inplace:
        raise ValueError(
            'inplace=True overwrites the logits, which reduction="none" reads in backward: leave inplace out'
        )


def _is_per_sequence(selection: str) -> bool:
    if selection not in ("batch", "sequence"):
        raise ValueError(f'selection is "{selection}", but must be "batch" or "sequence"')
    return selection == "sequence"


class Prepared(NamedTuple):
    """The arguments that are about tokens and settings, checked but for what needs shapes."""

    labels: Optional[Tensor]
    scale: Optional[Tensor]
    temperatures: Optional[Tensor]
    per_sequence: bool
    per_token: bool
    settings: Dict[str, Any]


def prepare(
    function: str,
    states: Tensor,
    labels: Optional[Tensor],
    hard: Optional[Tensor],
    token_weights: Optional[Tensor],
    num_items_in_batch: Union[None, int, float, Tensor],
    shift_labels: bool,
    selection: str,
    inplace: bool,
    given: Dict[str, Any],
) -> Prepared:
    """`states` are the logits or the hidden states that the function is called with."""
    settings = {**DEFAULTS, **given}
    if len(settings) != len(DEFAULTS):
        unknown = next(name for name in settings if name not in DEFAULTS)
        if unknown == "cu_seqlens":
            where = "" if function == "linear_atkd_loss" else " beside groups of ranks or DTensors"
            raise ValueError(
                f"{function} takes no cu_seqlens{where}: give labels that are shifted already as shift_labels, and "
                "hard=select_hard(teacher_margins(..), .., cu_seqlens=cu_seqlens)"
            )
        raise TypeError(f"{function}() got an unexpected keyword argument '{unknown}'")
    if labels is not None:
        check_tensor("labels", labels, function=function)
    if hard is not None:
        check_tensor("hard", hard, "is", function)
    if token_weights is not None:
        check_tensor("token_weights", token_weights, function=function)
        check_constant("token_weights", token_weights)
    temperatures = _own_temperatures(function, settings, states)
    _check_numbers(settings)
    check_shift_labels(shift_labels)
    scale = None
    per_token = settings["reduction"] == "none"
    if per_token:
        _check_per_token(num_items_in_batch, inplace)
        settings["reduction"] = "sum"
    if num_items_in_batch is not None:
        if settings["reduction"] == "group-mean":
            raise ValueError(
                f'num_items_in_batch is {num_items_in_batch}, but reduction="group-mean" divides each group of tokens '
                "by its own count: leave num_items_in_batch out, or take the mean"
            )
        settings["reduction"] = "sum"
        scale = _scale(num_items_in_batch, states.device)
    labels, settings["ignore_index"] = _shifted(
        states, labels, shift_labels, settings["target"], settings["ignore_index"]
    )
    per_sequence = _is_per_sequence(selection)
    return Prepared(labels, scale, temperatures, per_sequence, per_token, settings)


def check_constant(name: str, tensor: Tensor, requires: str = "require") -> None:
    """Raises if somebody expects a gradient for it."""
    if tensor.requires_grad:
        raise TypeError(
            f"{name} {requires} a gradient, but none flows there: give {name}.detach()"
        )


class SharedKeywords(Settings, total=False):
    """The keywords of `atkd_loss` and `linear_atkd_loss` beside `return_stats`, for type checkers."""

    selection: str
    vocab_size: Optional[int]
    token_weights: Optional[Tensor]
    num_items_in_batch: Union[None, int, float, Tensor]
    shift_labels: Union[bool, Tensor]
    hard: Optional[Tensor]
    vocab_group: "Optional[ProcessGroup]"
    token_group: "Optional[ProcessGroup]"
    vocab_start: Optional[int]
    token_counts: Optional[Sequence[int]]


class Keywords(SharedKeywords, total=False):
    """Those of `atkd_loss`, which describes them."""

    cu_seqlens: Optional[Tensor]
    inplace: bool


@overload
def atkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    *,
    return_stats: Literal[False] = False,
    **keywords: "Unpack[Keywords]",
) -> Tensor: ...


@overload
def atkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    *,
    return_stats: Literal[True],
    **keywords: "Unpack[Keywords]",
) -> Tuple[Tensor, Stats]: ...


@overload
def atkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    *,
    return_stats: bool,
    **keywords: "Unpack[Keywords]",
) -> Union[Tensor, Tuple[Tensor, Stats]]: ...


def atkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Optional[Tensor] = None,
    *,
    selection: str = "batch",
    vocab_size: Optional[int] = None,
    token_weights: Optional[Tensor] = None,
    num_items_in_batch: Union[None, int, float, Tensor] = None,
    shift_labels: Union[bool, Tensor] = False,
    cu_seqlens: Optional[Tensor] = None,
    hard: Optional[Tensor] = None,
    inplace: bool = False,
    return_stats: bool = False,
    vocab_group: "Optional[ProcessGroup]" = None,
    token_group: "Optional[ProcessGroup]" = None,
    vocab_start: Optional[int] = None,
    token_counts: Optional[Sequence[int]] = None,
    **settings: Any,
) -> Union[Tensor, Tuple[Tensor, Stats]]:
    """The distillation loss of a batch of tokens, a float32 scalar that `backward` goes through.

    The gradient with respect to the student's logits is computed here, with the loss, if the student
    requires one and gradients are enabled; `backward` multiplies it by what arrives. Nothing flows back
    to the teacher, nor to a setting. A setting that is a number may be a tensor that holds one, which
    is read, so waited for if it is on a GPU; under torch.compile it may change without compiling again.

    Args:
        student_logits: `[N, V]` or `[B, T, V]`, or of more dimensions, of which the last is the vocabulary; float32, float16
            or bfloat16. Read where they lie if rows are contiguous and evenly spaced, else copied; so are the teacher's.
        teacher_logits: of the same shape, of any of these dtypes; with `vocab_size` the last dimension may differ.
        labels: `[N]` or `[B, T]`, the logits' shape without the last, int64 or int32. May be left out if `target="teacher"`, for which they only tell the
            ignored tokens.
        lam: easy tokens learn `lam * DKD`, hard ones `(1 - lam) * (TKD + DKD)`; of `"atkd"` alone.
        hard_ratio: the share of the valid tokens, those of which the teacher is least certain, that is
            hard. Not used with `hard`, nor by the median.
        temperature: divides both models' logits, but not for cross entropy. A number; or float32, one per position of
            the logits (with `shift_labels` too): the token's own, at which its margin is taken too. On a GPU, where
            raising would wait, a token whose own is outside [1e-30, 1e30] has the loss NaN.
        temperature_squared: multiplies the distillation terms by the temperature's square.
        objective: `"atkd"`, `"plain"` (the divergence over the whole vocabulary), `"kl"` (the plain forward
            one), `"tkd"` or `"dkd"` (one part alone).
        target: the token at which distributions are split, and cross entropy is taken: the `"label"`, or the `"teacher"`'s
            arg max.
        selection: hard tokens are those of the `"batch"`, which is the tokens of this call, or of each
            `"sequence"` of `[B, T, V]`. A micro-batch, or a rank's part of a batch, has hard tokens of its
            own, and the parts' gradients do not add up to the whole batch's: between two small random models they
            are 16 to 25% away from it in 2 to 16 micro-batches, 16 to 26% over 2 ranks. See `hard`, and for ranks
            `token_group`.
        reduction: `"mean"` over the valid tokens, or `"sum"`, or `"group-mean"`: the mean of the easy tokens plus the
            mean of the hard ones, each over its own count, and cross entropy's mean over all. The code of ATKD's
            authors computes the last, with `selection_rule="median"`; of groups of equal size, as `"top-k"` has them
            of an even number of tokens, it is twice the mean. It is of `"atkd"` alone, has no `num_items_in_batch`, and those of a batch's parts do not add up.
            `"none"` returns the loss of each token, shaped as the labels, 0 for ignored ones. What multiplies them is
            known in `backward` alone, which reads both models' logits again: 5 times the memory traffic of one
            model's logits instead of 3. Where it is known before, `token_weights` with a sum is the faster way.
            (PyTorch keeps no tensor of `torch.inference_mode` for that: `clone()` the teacher's logits, or run it
            under `torch.no_grad`.)
        ignore_index: tokens with this label are dropped.
        ce_weight: of the student's cross entropy at the target, which is added. (With `target="teacher"` that is not the
            label.)
        kd_weight: of the distillation terms.
        divergence: of the student's q from the teacher's p: `"forward-kl"`, sum p log(p / q); `"reverse-kl"`,
            sum q log(q / p); `"jsd"`, the generalised Jensen-Shannon divergence of GKD, beta KL(p, m) +
            (1 - beta) KL(q, m) with m = beta p + (1 - beta) q; `"tvd"`, total variation, sum |p - q| / 2;
            `"skew-kl"`, KL(p, beta p + (1 - beta) q), and `"skew-reverse-kl"`, KL(q, beta q + (1 - beta) p), of
            DistiLLM. Reverse KL is infinite, and its gradient NaN, where the teacher alone has a logit of -inf.
        beta: in [0, 1], and no nearer than 1e-9 to an end that it is not. At 0 `"jsd"` is forward KL and at 1 reverse KL, as
            in GKD, where the formula above would be 0. The skewed divergences, whose alpha it is, need it below 1; DistiLLM
            has 0.1. Other divergences have none.
        selection_rule: which tokens are hard: `"top-k"`, the `ceil(hard_ratio * valid tokens)` of the largest margin; or
            `"median"`, those whose margin is at least the lower median of the valid tokens', as the code of ATKD's
            authors has it: of an even number n without equals n / 2 + 1.
        vocab_size: the tokens of the vocabulary, where logits have more columns: those from there on are padding, which has
            no probability and gradient 0. The models may then have vocabularies padded to widths of their own.
            Nothing is copied.
        token_weights: float32, one per position of the logits (with `shift_labels` too), which multiplies the token's
            terms, cross entropy's too, and so its loss and gradient. A mean still divides by the number of valid tokens,
            and the selection takes no notice. No gradient flows to them. The loss of a token whose weight is infinite
            or NaN is NaN.
        num_items_in_batch: for gradient accumulation, the valid tokens of the whole batch: the loss is
            the sum over the valid tokens here, divided by it, which may be any positive number. 0, a
            batch without valid tokens, counts as 1. A tensor on a GPU is not waited for: one that is
            negative, NaN or infinite makes the loss NaN.
        shift_labels: logits at one position are about the label at the next, as in a causal model: the
            labels are shifted along their last dimension, and the last position is ignored. Or a tensor of labels that
            are shifted already, by the name that Hugging Face gives these: then `labels` are not looked at.
        cu_seqlens: where packed sequences start and end, `[sequences + 1]`, int32 or int64, offsets into the tokens of all
            rows, from 0 to their number: `selection="sequence"` is then of each of these, and `shift_labels=True` gives none
            the label of the next. Such a selection reads the teacher's logits once more, and is by `"top-k"` alone. On a GPU,
            where raising would wait, offsets out of order are not noticed. Not with groups of ranks.
        hard: which tokens are hard, bool, one per position of the logits (with `shift_labels` too), where that
            was selected elsewhere, such as over all parts of a batch: see `teacher_margins` and `select_hard`.
            Nothing is selected then. Ignored tokens stay ignored.
        inplace: the gradient overwrites the student's logits. `backward` raises if an operation before
            needs them for its derivative, and if one after, of theirs or of a view, sends a gradient
            back. It cannot know of a use that sends none (under `torch.no_grad`, or of
            `logits.detach()`): that one reads the gradient instead of the logits. The gradient is of
            their dtype: float16 loses those below 6e-8. No effect without a gradient, for one of the
            views that `chunk`, `split` or `unbind` make, for tensor subclasses, in a transform of
            torch.func, or under torch.compile, which plans memory itself.
        return_stats: returns `(loss, Stats)`.
        vocab_group: the `torch.distributed` group over whose ranks the vocabulary is split: both models' logits are this
            rank's columns, which follow those of the ranks before; the ranks may have unequal numbers of them, or none.
            Logits of whole rows take no such group: every column would count once per rank, unnoticed.
            Labels name tokens of the whole vocabulary, and `vocab_size` is a number of the whole vocabulary, beyond which
            the last columns are padding. Everything else is the same on all ranks of the group. Each of them returns the
            whole loss, with the same bits, and gets the gradient of its own columns.
        token_group: the group over whose ranks the tokens are split, as data and sequence parallelism do, unequally
            too. None is no group, not `WORLD`. Every rank calls, with an empty tensor where it has no tokens. The hard
            tokens are selected among those of all ranks (`selection="sequence"`: of each sequence, which one rank holds),
            and a mean divides by the number of all their valid tokens, or by `num_items_in_batch`. A rank returns its part: losses and gradients of the ranks add up to those of one
            process. Where gradients are averaged over ranks, as DDP and FSDP do, multiply the loss by their number.
        vocab_start: the first of this rank's columns. Where the caller gives it, with `vocab_size` and, if there is a
            `token_group`, with `token_counts`, the ranks exchange no header, the host waits for nothing, and a rank
            that raises leaves the others waiting. All ranks give it or none does, else they wait or crash.
        token_counts: the number of tokens, ignored ones too, that each rank of the `token_group` has. Without a
            `vocab_group` it is enough for a call without a header.

    With a group, or a DTensor of logits, each call begins with an exchange of headers, so that all ranks raise where one
    does, or where they do not go together; the README says what is sent. Under torch.compile such a call breaks the graph;
    the transforms of torch.func raise.

    Logits that are DTensors have found their groups: `Shard(-1)` splits the vocabulary, and a shard of another
    dimension the tokens. The loss is then a DTensor, replicated where the vocabulary is split and a partial sum where
    tokens are; `loss.full_tensor()` is the one to print. Labels and all other tensors of tokens are DTensors placed
    likewise, but replicated where the vocabulary is split, or this rank's part as a plain tensor. `Stats` are this rank's, as plain tensors.

    Raises:
        TypeError: for a dtype that is none of these, a DTensor whose placements are none of these, a setting that
            requires a gradient.
        ValueError: for shapes or devices that differ, a setting outside its domain, a label that names
            no token of the vocabulary; with `inplace`, for a leaf that requires a gradient; for ranks that do not go
            together.
        RuntimeError: on the other ranks, where one has raised.
    """
    labels, shift_labels = shifted_already(labels, shift_labels)
    # Its module is not imported, for that takes time.
    if (
        vocab_group is not None
        or token_group is not None
        or vocab_start is not None
        or token_counts is not None
        or is_dtensor(student_logits)
    ):
        from . import _shards

        if cu_seqlens is not None:
            # There all ranks raise.
            settings["cu_seqlens"] = cu_seqlens
        return _shards.atkd_loss(
            student_logits,
            teacher_logits,
            labels,
            selection=selection,
            vocab_size=vocab_size,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            shift_labels=shift_labels,
            hard=hard,
            inplace=inplace,
            return_stats=return_stats,
            vocab_group=vocab_group,
            token_group=token_group,
            vocab_start=vocab_start,
            token_counts=token_counts,
            settings=settings,
        )
    check_tensor("student_logits", student_logits)
    check_tensor("teacher_logits", teacher_logits)
    if teacher_logits.requires_grad:
        teacher_logits = teacher_logits.detach()
    return from_teacher(
        "atkd_loss",
        student_logits,
        teacher_logits,
        labels,
        selection,
        vocab_size,
        token_weights,
        num_items_in_batch,
        shift_labels,
        cu_seqlens,
        hard,
        inplace,
        return_stats,
        settings,
    )


def _packed(
    function: str,
    student: Tensor,
    teacher: Teacher,
    labels: Optional[Tensor],
    cu_seqlens: Tensor,
    shift_labels: bool,
    selects: bool,
    hard: Optional[Tensor],
    vocab_size: Optional[int],
    settings: Dict[str, Any],
) -> Tuple[Optional[Tensor], Optional[Tensor], Dict[str, Any]]:
    """The labels by the position of the logits that they are about, the hard tokens, and the settings for these."""
    settings = {**DEFAULTS, **settings}
    check_shift_labels(shift_labels)
    check_tensor("cu_seqlens", cu_seqlens, function=function)
    if labels is not None:
        check_tensor("labels", labels, function=function)
    _checks.check_offsets(cu_seqlens, "student_logits", student)
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        _checks.check_order(cu_seqlens, student.shape[:-1].numel())
    if shift_labels:
        shape = student.shape[:-1] if labels is None else labels.shape
        flat = None if labels is None else labels.flatten()
        flat, settings["ignore_index"] = _shifted(
            student.detach().flatten(0, -2), flat, True, settings["target"], settings["ignore_index"]
        )
        if flat is not None:
            # Position i is a sequence's last if one ends before i + 1.
            ends = torch.zeros(flat.numel() + 1, dtype=torch.bool, device=flat.device)
            ends[cu_seqlens[1:].long().clamp(0, flat.numel())] = True
            labels = flat.masked_fill(ends[1:], settings["ignore_index"]).view(shape)
    if selects:
        if settings["selection_rule"] != "top-k":
            raise ValueError(
                f'selection_rule is "{settings["selection_rule"]}", but selection="sequence" with cu_seqlens is by "top-k" '
                "alone: give hard, or the sequences in rows of their own"
            )
        of_margins = {name: settings[name] for name in ("temperature", "target", "ignore_index")}
        margins = teacher_margins(teacher, labels, vocab_size=vocab_size, **of_margins)
        valid = None if labels is None else labels != settings["ignore_index"]
        hard = select_hard(margins, settings["hard_ratio"], valid=valid, cu_seqlens=cu_seqlens)
    return labels, hard, settings


def from_teacher(
    function: str,
    student: Tensor,
    teacher: Teacher,
    labels: Optional[Tensor],
    selection: str,
    vocab_size: Optional[int],
    token_weights: Optional[Tensor],
    num_items_in_batch: Union[None, int, float, Tensor],
    shift_labels: bool,
    cu_seqlens: Optional[Tensor],
    hard: Optional[Tensor],
    inplace: bool,
    return_stats: bool,
    settings: Dict[str, Any],
) -> Union[Tensor, Tuple[Tensor, Stats]]:
    """The loss of `atkd_loss`, or of another function of its keywords, from tensors that require no gradient but the student's."""
    if cu_seqlens is not None:
        selects = _is_per_sequence(selection) and hard is None
        selects = selects and (return_stats or settings.get("objective", "atkd") == "atkd")
        labels, hard, settings = _packed(
            function, student, teacher, labels, cu_seqlens, shift_labels, selects, hard, vocab_size, settings
        )
        shift_labels, selection = False, "batch"
    labels, scale, temperatures, per_sequence, per_token, settings = prepare(
        function,
        student,
        labels,
        hard,
        token_weights,
        num_items_in_batch,
        shift_labels,
        selection,
        inplace,
        settings,
    )
    loss, *stats = of_whole_rows(
        student,
        teacher,
        labels,
        scale,
        hard,
        token_weights,
        temperatures,
        inplace,
        per_sequence,
        per_token,
        vocab_size,
        settings,
        return_stats,
    )
    return (loss, stats_of(*stats)) if return_stats else loss


def is_dtensor(value: object) -> bool:
    return type(value).__name__ == "DTensor"


def of_whole_rows(
    student: Tensor,
    teacher: Teacher,
    labels: Optional[Tensor],
    scale: Optional[Tensor],
    hard: Optional[Tensor],
    token_weights: Optional[Tensor],
    temperatures: Optional[Tensor],
    inplace: bool,
    per_sequence: bool,
    per_token: bool,
    vocab_size: Optional[int],
    settings: Dict[str, Any],
    with_stats: bool,
) -> Any:
    """The loss or the losses of the tokens, and what `stats_of` takes."""
    loss: Tensor
    with_gradient = student.requires_grad and torch.is_grad_enabled()
    of_tokens = labels, scale, hard, token_weights, temperatures
    parts = _teacher.parts(teacher)
    transformed = _private.derivatives_are_transformed()
    if per_token:
        losses = TransformedTokenLosses if transformed else TokenLosses
        loss, *stats = losses.apply(
            student,
            labels,
            hard,
            token_weights,
            temperatures,
            per_sequence,
            vocab_size,
            _settings.for_operator(settings),
            *parts,
        )
    elif transformed:
        loss, _, *stats = Transformed.apply(
            student, *of_tokens, per_sequence, vocab_size, _settings.for_operator(settings), *parts
        )
    elif _autograd.runs_directly(student, *_teacher.tensors(teacher), *of_tokens):
        loss, stats = _autograd.run_directly(
            student, teacher, *of_tokens, with_gradient, inplace, per_sequence, vocab_size, settings, with_stats
        )
    else:
        flags = with_gradient, per_sequence, vocab_size
        loss, _, *stats = _operator.loss_by(
            student, teacher, *of_tokens, *flags, *_settings.for_operator(settings)
        )
    return (loss, *(stats or ()))


def stats_of(terms: Tensor, chosen: Tensor) -> Stats:
    uncertainty, tkd, dkd, margin, token_loss = terms.unbind()
    return Stats(uncertainty, tkd, dkd, chosen, margin, token_loss)


def shown_with_settings(function: Any) -> inspect.Signature:
    """The function's signature with each setting in the place of `**settings`, for `help`."""
    signature = inspect.signature(function)
    *parameters, _ = signature.parameters.values()
    first = [each for each in parameters if each.kind != inspect.Parameter.KEYWORD_ONLY]
    settings = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Settings.__annotations__[name],
        )
        for name, default in DEFAULTS.items()
    ]
    return signature.replace(parameters=[*first, *settings, *parameters[len(first) :]])


atkd_loss.__signature__ = shown_with_settings(atkd_loss)  # type: ignore[attr-defined]


def teacher_margins(
    teacher_logits: Teacher,
    labels: Optional[Tensor] = None,
    *,
    temperature: Number = DEFAULTS["temperature"],
    target: str = DEFAULTS["target"],
    ignore_index: int = DEFAULTS["ignore_index"],
    vocab_size: Optional[int] = None,
    shift_labels: Union[bool, Tensor] = False,
    vocab_group: "Optional[ProcessGroup]" = None,
    vocab_start: Optional[int] = None,
) -> Tensor:
    """The teacher's margin of each token, log((1 - p) / p) of its p(target): what hard tokens are selected by.

    For `select_hard` over the tokens of several calls, as micro-batches are. On the CPU they are the `margin` of
    `atkd_loss(return_stats=True)`, bit for bit; on a GPU the last bit may differ. No gradient flows through.

    Args:
        teacher_logits: `[N, V]` or `[B, T, V]`, float32, float16 or bfloat16. Or a `SparseTeacher`, whose margins are at its
            own temperature, whatever is given here; `vocab_size`, which they do not depend on, checks its indices, and
            no `vocab_group` is needed.
        labels: as `atkd_loss` takes them, and so are the others. With a `vocab_group` every rank of it gets the same bits.

    Returns:
        float32, shaped as the labels; -inf for ignored tokens, of which `select_hard` must be told by `valid`. On a
        GPU NaN for a label out of range, or a token's own temperature, as raising would wait.

    Raises:
        NotImplementedError: for a `SparseTeacher` that is not on the CPU.
        TypeError: for a dtype that is none of these.
        ValueError: for shapes or devices that differ, a setting outside its domain, a label that names no token of
            the vocabulary.
    """
    given: Dict[str, Any] = {"temperature": temperature, "target": target}
    labels, shift_labels = shifted_already(labels, shift_labels)
    if vocab_group is not None or vocab_start is not None:
        from . import _shards

        given["ignore_index"] = ignore_index
        if isinstance(teacher_logits, SparseTeacher):
            raise ValueError(
                "the margins of a SparseTeacher follow from its log-probabilities, on each rank: leave vocab_group and "
                "vocab_start out"
            )
        of_group = vocab_group, vocab_start, vocab_size, shift_labels, given
        found: Tensor = _shards.teacher_margins(teacher_logits, labels, *of_group)
        return found
    if isinstance(teacher_logits, SparseTeacher):
        teacher: Teacher = checked_sparse(teacher_logits)
    else:
        check_tensor("teacher_logits", teacher_logits, function="teacher_margins")
        teacher = teacher_logits.detach()
    rows = _teacher.parts(teacher)[0]
    if labels is not None:
        check_tensor("labels", labels, function="teacher_margins")
    temperatures = _own_temperatures("teacher_margins", given, rows)
    _check_number("temperature", given["temperature"])
    _check_real("temperature", given["temperature"])
    check_shift_labels(shift_labels)
    labels, ignore_index = _shifted(rows, labels, shift_labels, target, ignore_index)
    settings = _settings.for_operator({**DEFAULTS, **given, "ignore_index": ignore_index})
    return _operator.margins_by(teacher, labels, temperatures, vocab_size, *settings)


def check_selection(
    margins: Tensor, valid: Optional[Tensor], cu_seqlens: Optional[Tensor], hard_ratio: Number
) -> None:
    """Raises unless these are tensors and a number."""
    check_tensor("margins", margins, function="select_hard")
    if valid is not None:
        check_tensor("valid", valid, "is", "select_hard")
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, function="select_hard")
    _check_number("hard_ratio", hard_ratio)
    _check_real("hard_ratio", hard_ratio)


def select_hard(
    margins: Tensor,
    hard_ratio: Number,
    *,
    valid: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    group: "Optional[ProcessGroup]" = None,
) -> Tensor:
    """Selects the hard tokens by `"top-k"`: the `ceil(hard_ratio * valid tokens)` of the largest margin, exactly.

    Among equals the lower index is hard; NaN ranks below every number. Over the margins of one call this is that
    call's own selection; over those of several, in whatever order they are put together, it is that of one call with
    all of their tokens, and `atkd_loss(..., hard=part)` takes each part.

    Args:
        margins: float32, of any shape: `teacher_margins` of each part, or `Stats.margin`.
        hard_ratio: in [0, 1].
        valid: bool, shaped as the margins: which tokens count, `labels != ignore_index`. Without it all do.
        cu_seqlens: `[sequences + 1]`, int32 or int64: selects within sequence `i` of the flattened margins,
            `cu_seqlens[i]` to `cu_seqlens[i + 1] - 1`. The first is 0, the last the number of margins. On a GPU,
            where raising would wait, sequences whose offsets are out of order get no hard tokens.
        group: the group over whose ranks the tokens are split, each of which has margins of its own, any number of them:
            the tokens of all are selected from, equals in the order of ranks. Each call begins with a header, as one of
            `atkd_loss` does. A rank's sequences are its own, so that with `cu_seqlens` nothing is sent.

    Returns:
        bool, shaped as the margins; with a group for this rank's tokens.

    Raises:
        TypeError: for other dtypes.
        ValueError: for shapes or devices that differ, a ratio outside [0, 1], offsets out of order.
    """
    if group is not None and cu_seqlens is None:
        from . import _shards

        found: Tensor = _shards.select_hard(margins, valid, hard_ratio, group)
        return found
    check_selection(margins, valid, cu_seqlens, hard_ratio)
    ratio, number = _settings.number_or_tensor(hard_ratio)
    hard: Tensor = _operator.select_hard(margins.detach(), valid, cu_seqlens, ratio, number)
    return hard


def token_entropies(
    logits: Tensor, *, temperature: Number = 1.0, vocab_size: Optional[int] = None
) -> Tensor:
    """The entropy of one model's distribution for each token, -sum p log p over the vocabulary, in nats.

    For selections by how sure a model is (`select_hard` takes entropies as it does margins), and for `token_weights` or a
    `temperature` made of them. Reads the logits once. No gradient flows through.

    Args:
        logits: `[N, V]` or `[B, T, V]`, float32, float16 or bfloat16.
        temperature: divides the logits.
        vocab_size: as `atkd_loss` takes it.

    Returns:
        float32, shaped as the tokens; NaN where the logits have a NaN or +inf, or are all -inf.

    Raises:
        TypeError: for a dtype that is none of these.
        ValueError: for a shape that is none of these, or a setting outside its domain.
    """
    check_tensor("logits", logits, function="token_entropies")
    _check_number("temperature", temperature)
    _check_real("temperature", temperature)
    used, number = _settings.number_or_tensor(temperature)
    entropies: Tensor = _operator.token_entropies(logits.detach(), used, vocab_size, number)
    return entropies


# The settings of all modules.
_ALL_SETTINGS: Set[str] = set()


def setting(name: str) -> Any:
    """A property of a module: one of its `settings`."""
    _ALL_SETTINGS.add(name)

    def get(module: Any) -> Any:
        return module.settings[name]

    def change(module: Any, value: Any) -> None:
        module.check({**module.settings, name: value})
        module.settings[name] = value

    return property(get, change, doc=f"The setting `{name}`. A wrong value raises when it is set.")


class Criterion(torch.nn.Module):
    """A loss with settings, which are attributes: `criterion.lam = 0.3` is checked, and counts from the next call on.
    `settings` has them all, for several that only go together.
    """

    settings: Dict[str, Any]

    lam = setting("lam")
    hard_ratio = setting("hard_ratio")
    temperature = setting("temperature")
    objective = setting("objective")
    target = setting("target")
    reduction = setting("reduction")
    ignore_index = setting("ignore_index")
    ce_weight = setting("ce_weight")
    kd_weight = setting("kd_weight")
    temperature_squared = setting("temperature_squared")
    divergence = setting("divergence")
    beta = setting("beta")
    selection_rule = setting("selection_rule")
    selection = setting("selection")
    vocab_size = setting("vocab_size")
    shift_labels = setting("shift_labels")
    return_stats = setting("return_stats")

    def check(self, settings: Dict[str, Any]) -> None:
        """Raises unless these are settings of this loss."""
        _is_per_sequence(settings["selection"])
        _check_numbers(settings)
        check_shift_labels(settings["shift_labels"])
        for name in ("inplace", "return_stats"):
            _check_bool(name, settings.get(name, False))
        for name in ("vocab_size", "vocab_start"):
            if settings[name] is not None:
                _checks.integer(name, settings[name])
        for name in ("vocab_group", "token_group"):
            if settings[name] is not None:
                from ._groups import Ranks

                Ranks(name, settings[name])
        checked = {name: settings[name] for name in DEFAULTS}
        if checked["reduction"] == "none":
            _check_per_token(None, settings.get("inplace", False))
            checked["reduction"] = "sum"
        _settings.native(checked)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _ALL_SETTINGS:
            super().__setattr__(name, value)
            return
        if not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no setting {name}")
        # A torch.nn.Module would register a parameter instead, which no setting may be.
        object.__setattr__(self, name, value)

    def given(self, **arguments: Any) -> Dict[str, Any]:
        """The settings, with what a call gives in their places, if it is not None."""
        return {**self.settings, **{name: value for name, value in arguments.items() if value is not None}}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class ATKDLoss(Criterion):
    """`atkd_loss` with its settings, which are checked here.

        criterion = atkd.ATKDLoss(lam=0.2, shift_labels=True)
        loss = criterion(student_logits, teacher_logits, labels)
        criterion.lam = 0.3

    `print(criterion)` shows the settings. Each is an attribute, which a schedule may set; a number may be a tensor that holds
    one. What is of the tokens of one batch goes into the call: see `forward`.

    Args:
        lam: easy tokens learn `lam * DKD`, hard ones `(1 - lam) * (TKD + DKD)`.
        hard_ratio: the share of the valid tokens that is hard, in [0, 1].
        temperature: divides both models' logits, a number above 0.
        objective: `"atkd"`, `"plain"`, `"kl"`, `"tkd"` or `"dkd"`.
        target: where distributions are split: at the `"label"`, or the `"teacher"`'s arg max.
        reduction: `"mean"`, `"sum"`, `"group-mean"` or `"none"`.
        ignore_index: tokens with this label are dropped.
        ce_weight: of the student's cross entropy at the target, which is added.
        kd_weight: of the distillation terms.
        temperature_squared: multiplies the distillation terms by the temperature's square.
        divergence: `"forward-kl"`, `"reverse-kl"`, `"jsd"`, `"tvd"`, `"skew-kl"` or `"skew-reverse-kl"`.
        beta: of `"jsd"`; the alpha of the skewed divergences.
        selection_rule: `"top-k"` or `"median"`.
        selection: hard tokens are those of the `"batch"`, which is the tokens of one call, or of each `"sequence"`.
        vocab_size: the tokens of the vocabulary, where logits have more columns.
        shift_labels: True if logits at one position are about the label at the next. (Labels that are shifted already go into
            the call.)
        inplace: the gradient overwrites the student's logits.
        return_stats: a call returns `(loss, Stats)`.
        vocab_group, token_group, vocab_start: of ranks that split the vocabulary or the tokens.

    `atkd_loss` says more of each.

    Raises:
        TypeError: for a setting of another type, or one that requires a gradient.
        ValueError: for one outside its domain, or settings that do not go together.
    """

    inplace = setting("inplace")
    vocab_group = setting("vocab_group")
    token_group = setting("token_group")
    vocab_start = setting("vocab_start")

    def __init__(
        self,
        lam: Number = DEFAULTS["lam"],
        hard_ratio: Number = DEFAULTS["hard_ratio"],
        temperature: Number = DEFAULTS["temperature"],
        objective: str = DEFAULTS["objective"],
        target: str = DEFAULTS["target"],
        reduction: str = DEFAULTS["reduction"],
        ignore_index: int = DEFAULTS["ignore_index"],
        ce_weight: Number = DEFAULTS["ce_weight"],
        kd_weight: Number = DEFAULTS["kd_weight"],
        *,
        temperature_squared: bool = DEFAULTS["temperature_squared"],
        divergence: str = DEFAULTS["divergence"],
        beta: Number = DEFAULTS["beta"],
        selection_rule: str = DEFAULTS["selection_rule"],
        selection: str = "batch",
        vocab_size: Optional[int] = None,
        shift_labels: bool = False,
        inplace: bool = False,
        return_stats: bool = False,
        vocab_group: "Optional[ProcessGroup]" = None,
        token_group: "Optional[ProcessGroup]" = None,
        vocab_start: Optional[int] = None,
    ) -> None:
        settings = dict(locals())
        del settings["self"], settings["__class__"]
        super().__init__()
        self.check(settings)
        self.settings = settings

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Optional[Tensor] = None,
        num_items_in_batch: Union[None, int, float, Tensor] = None,
        hard: Optional[Tensor] = None,
        token_weights: Optional[Tensor] = None,
        temperature: Union[None, float, Tensor] = None,
        token_counts: Optional[Sequence[int]] = None,
        shift_labels: Union[None, bool, Tensor] = None,
        cu_seqlens: Optional[Tensor] = None,
    ) -> Any:
        """The loss of `atkd_loss`, which says more of the arguments. What is None is left out, or has the module's setting.

        Args:
            student_logits: `[N, V]` or `[B, T, V]`, or of more dimensions, of which the last is the vocabulary; float32,
                float16 or bfloat16.
            teacher_logits: of the same shape, of any of these dtypes; with `vocab_size` the last dimension may differ.
            labels: `[N]` or `[B, T]`, int64 or int32. May be left out if `target="teacher"`.
            num_items_in_batch: a positive number, or a tensor that holds one: the sum is divided by it.
            hard: bool, shaped as the labels: which tokens are hard.
            token_weights: float32, shaped as the labels: multiplies each token's loss and gradient.
            temperature: a number, or float32, shaped as the labels: in the place of the setting.
            token_counts: the tokens of each rank of the `token_group`.
            shift_labels: labels that are shifted already, `[N]` or `[B, T]`, as Hugging Face's trainers pass them by this name
                where a context is split over ranks: then `labels` are not looked at. Or a bool, in the place of the setting.
            cu_seqlens: `[sequences + 1]`, int32 or int64: where packed sequences start and end.

        Returns:
            The loss, a float32 scalar; with `reduction="none"` float32, shaped as the labels. With `return_stats`
            `(loss, Stats)`.

        Raises:
            TypeError: for another dtype, or what is no tensor.
            ValueError: for shapes or devices that differ, a label that names no token of the vocabulary, a number outside
                its domain. The message has the numbers.
            RuntimeError: on the other ranks of a group, where one has raised.
        """
        return atkd_loss(
            student_logits,
            teacher_logits,
            labels,
            num_items_in_batch=num_items_in_batch,
            hard=hard,
            token_weights=token_weights,
            token_counts=token_counts,
            cu_seqlens=cu_seqlens,
            **self.given(temperature=temperature, shift_labels=shift_labels),
        )
