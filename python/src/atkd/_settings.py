"""The settings of an objective. Their names, order and defaults are those of the native module."""

from typing import Any, Dict, Optional, Tuple, TypedDict, Union

import torch
from torch import Tensor
from torch.fx.experimental import symbolic_shapes

from . import _atkd

# A number, or a tensor that holds one.
Number = Union[float, Tensor]


class Settings(TypedDict, total=False):
    """The settings for type checkers; `atkd_loss` describes them."""

    lam: Number
    hard_ratio: Number
    temperature: Number
    objective: str
    target: str
    reduction: str
    ignore_index: int
    ce_weight: Number
    kd_weight: Number
    temperature_squared: bool
    divergence: str
    beta: Number
    selection_rule: str


DEFAULTS: Dict[str, Any] = _atkd.default_settings()

# The settings that schedules change.
NUMBERS: Tuple[str, ...] = tuple(
    name for name, default in DEFAULTS.items() if type(default) is float
)

# The settings in the schema of an operator. `numbers`, float64 `[len(NUMBERS)]` on the CPU, replaces the settings that
# `NUMBERS` names: a number in a tensor may change without torch.compile compiling again.
SCHEMA = ", ".join(f"{type(default).__name__} {name}" for name, default in DEFAULTS.items())
SCHEMA += ", Tensor? numbers=None"


def is_bool(value: object) -> bool:
    """True for True and False, NumPy's too."""
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")


def named(arguments: Tuple[Any, ...]) -> Dict[str, Any]:
    """The settings by name, as an operator gets them; `numbers` is one of them."""
    return {"numbers": None, **dict(zip([*DEFAULTS, "numbers"], arguments))}


def for_operator(settings: Dict[str, Any]) -> Tuple[Any, ...]:
    """The settings, in the order of `DEFAULTS`, as an operator takes them: with `numbers` if one of these may change."""
    if not any([_may_change(settings[name]) for name in NUMBERS]):
        return tuple(settings.values())
    numbers = torch.stack([_as_tensor(settings[name]) for name in NUMBERS])
    return (*[0.0 if name in NUMBERS else value for name, value in settings.items()], numbers)


def number_or_tensor(number: Any) -> Tuple[float, Optional[Tensor]]:
    """A number that stays, or a tensor with one that may change in its place."""
    return (0.0, _as_tensor(number)) if _may_change(number) else (number, None)


def check_numbers(settings: Dict[str, Any]) -> None:
    """Raises for `numbers` that are none. The other settings are checked natively."""
    numbers = settings["numbers"]
    if numbers is not None and (
        numbers.dtype != torch.float64 or numbers.shape != (len(NUMBERS),) or not numbers.is_cpu
    ):
        raise ValueError(
            f"numbers are {numbers.dtype} {list(numbers.shape)} on {numbers.device}, "
            f"but must be torch.float64 [{len(NUMBERS)}] on cpu"
        )


def resolved(settings: Dict[str, Any], tensor: Tensor) -> Dict[str, Any]:
    """The settings with `numbers` in the places of those that they replace, for a call on the device of the tensor."""
    given = dict(settings)
    numbers = given.pop("numbers", None)
    if numbers is not None:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph would keep the numbers that {', '.join(NUMBERS)} have while it is captured"
            )
        given.update(zip(NUMBERS, numbers.tolist()))
    return given


def objective(settings: Dict[str, Any], logits: Tensor) -> _atkd.Objective:
    """The objective of a call on these logits."""
    return native(resolved(settings, logits))


def native(settings: Dict[str, Any]) -> _atkd.Objective:
    """The objective of these settings, which are checked."""
    try:
        return _atkd.Objective(**settings)
    except TypeError:
        # Its message names no argument.
        for name, default in DEFAULTS.items():
            value, kind = settings.get(name, default), type(default)
            if not isinstance(value, (int, float) if kind is float else kind):
                raise TypeError(f"{name} is {value!r}, but must be of type {kind.__name__}") from None
        raise


# Not in every version of torch, the older of which compile each number anew.
_has_static_value = getattr(symbolic_shapes, "has_static_value", None)


def _may_change(number: Any) -> bool:
    """True if it is a tensor, or torch.compile compiles for other numbers in its place too."""
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
