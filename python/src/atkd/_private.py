"""Every private or experimental part of torch that the package uses, each with the reason why no public one does. An
attribute of a tensor is behind a function too, so that this list is whole.

`symbolic_shapes.has_static_value` is the one exception: `_settings.py` imports it for torch.compile, and does without
where it is missing.
"""

from typing import ContextManager, Optional

import torch
from torch import Tensor


def is_traced_or_transformed() -> bool:
    """True if a tracer or a transform such as vmap wants to see each operation. torch tells its own Python code alone:
    a public operator goes through the dispatcher, whose overhead this avoids where nobody looks.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


def derivatives_are_transformed() -> bool:
    """True if forward-mode derivatives or a transform of torch.func want more of an operation than an operator's
    derivative. A custom operator cannot register a rule for forward mode, nor one for torch.func.grad of itself.
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


def graph_is_kept() -> bool:
    """True if the backward pass that is running may run again (`retain_graph=True`), which nothing public tells: the
    saved gradient must then survive. Not in every version of torch; where it is missing the answer is yes.
    """
    known = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return known is None or bool(known())


def holds_its_values(tensor: Tensor) -> bool:
    """True unless it is negated, or zeros without memory, which only a private method tells. The dispatcher makes
    tensors of these before an operator runs.
    """
    return not tensor.is_neg() and not tensor._is_zerotensor()


def version(tensor: Tensor) -> int:
    """The count of writes in place, from which autograd knows that a saved tensor has been overwritten."""
    return tensor._version


def preserve_version(tensor: Tensor) -> ContextManager[None]:
    """Writes in place within are not counted. The one way to tell autograd that logits are gone while the gradient in
    their memory stays good.
    """
    kept: ContextManager[None] = torch.autograd.grad_mode._unsafe_preserve_version_counter(tensor)
    return kept


def base(tensor: Tensor) -> Optional[Tensor]:
    """The tensor that this one is a view of, if it is one."""
    return tensor._base if tensor._is_view() else None


def view_may_be_overwritten(view: Tensor) -> bool:
    """True if autograd allows it. It does not for views that `chunk`, `split` or `unbind` make, which only a
    private function tells before it raises.
    """
    how = torch._C._autograd._get_creation_meta(view)
    return bool(how == torch._C._autograd.CreationMeta.DEFAULT)
