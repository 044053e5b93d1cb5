"""Fused losses of other packages, for `compare.py`: what can run here, and why the rest cannot.

Each function gives `(losses, skipped)`. A loss is a name, a function, and its definition in float64; `skipped` has a
reason by name. A loss of logits is called with `(student, teacher, labels)`, one of heads with `(x, w, teacher_x,
teacher_w)`: the hidden states `[N, H]` and the weights `[V, H]` of both models' last layers.
"""

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

import exact
import torch


def reason(error):
    """In a line."""
    return f"{type(error).__name__}: {str(error).split(chr(10))[0][:200]}"


def imported(import_it):
    """What the function imports and None, or None and why it cannot run here."""
    # Triton's interpreter runs kernels on the CPU: enough for small shapes and errors, meaningless for times.
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return None, "Its kernels are Triton's, and this machine has no GPU"
    try:
        return import_it(), None
    except Exception as error:  # of other people's packages, of any kind
        return None, f"It cannot be imported: {reason(error)}"


def bare_packages(folder, *names):
    """Makes packages of a folder importable without their `__init__`, which imports more than the kernels need."""
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package


def divided(losses, why):
    """The losses, or their names with the reason."""
    return ([], {name: why for name, *_ in losses}) if why else (losses, {})


def liger():
    """Liger-Kernel, from PyPI. Its KL and JSD take logarithms of probabilities, its TVD probabilities: what makes them
    of logits is PyTorch's.
    """
    of, why = imported(lambda: importlib.import_module("liger_kernel.transformers"))
    logs = lambda s, t: (s.float().log_softmax(-1), t.float().log_softmax(-1))
    probabilities = lambda s, t: (s.float().softmax(-1), t.float().softmax(-1))
    kl = of and of.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    # By its own convention of beta, which is TRL's.
    jsd, reverse = of and of.LigerJSD(beta=0.5), of and of.LigerJSD(beta=1.0)
    tvd = of and importlib.import_module("liger_kernel.transformers.tvd").LigerTVDLoss()
    return divided(
        [
            ("Liger-Kernel KL", lambda s, t, labels: kl(*logs(s, t)), exact.plain("forward-kl")),
            ("Liger-Kernel reverse KL", lambda s, t, labels: reverse(*logs(s, t)), exact.plain("reverse-kl")),
            ("Liger-Kernel JSD", lambda s, t, labels: jsd(*logs(s, t)), exact.plain("jsd", 0.5)),
            ("Liger-Kernel TVD", lambda s, t, labels: tvd(*probabilities(s, t)), exact.plain("tvd")),
        ],
        why,
    )


def speculators(path=None):
    """vllm-project/speculators, from a checkout or from PyPI: its file of kernels and no more of it."""

    def import_it():
        found = importlib.util.find_spec("speculators")
        if path is None and found is None:
            raise ImportError("no package is called speculators, and --speculators names no checkout")
        folder = path / "src/speculators" if path else Path(found.submodule_search_locations[0])
        bare_packages(folder, "speculators", "speculators.losses", "speculators.utils")
        # The kernels ask this module one thing, and it imports transformers.
        util = types.ModuleType("speculators.utils.util")
        util.is_npu_available = lambda: False
        sys.modules[util.__name__] = util
        return importlib.import_module("speculators.losses.fused")

    fused, why = imported(import_it)
    # They give a loss for each position of [1, N].
    mean = lambda name: lambda s, t, labels: getattr(fused, name)(s[None], t[None]).mean()
    return divided(
        [
            ("speculators KL", mean("fused_kl_div_loss"), exact.plain("forward-kl")),
            ("speculators reverse KL", mean("fused_reverse_kl_div_loss"), exact.plain("reverse-kl")),
            ("speculators JSD", mean("fused_js_div_loss"), exact.plain("jsd", 0.5)),
            ("speculators TVD", mean("fused_tv_loss"), exact.plain("tvd")),
        ],
        why,
    )


def fast_llm(path=None):
    """ServiceNow/Fast-LLM, from a checkout: one kernel for loss and gradient, with no autograd of its own."""

    def import_it():
        if path is None:
            raise ImportError("it is on no registry, and --fast-llm names no checkout")
        sys.path.insert(0, str(path))
        config = importlib.import_module("fast_llm.functional.config")
        return config, importlib.import_module("fast_llm.functional.triton.entropy_loss")

    modules, why = imported(import_it)

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, student, teacher, kind):
            config, entropy = modules
            loss, *_, gradient = entropy.triton_entropy_loss_forward_backward(
                student,
                teacher,
                loss_mask=None,
                grad_output=1.0,
                target_format=config.TargetFormat.logits,
                entropy_loss_type=config.EntropyLossType(kind),
            )
            ctx.save_for_backward(gradient)
            return loss

        @staticmethod
        def backward(ctx, upstream):
            # It is 1, and was given to the kernel.
            return ctx.saved_tensors[0], None, None

    return divided(
        [
            ("Fast-LLM KL", lambda s, t, labels: Loss.apply(s, t, "forward_kl"), exact.plain("forward-kl")),
            (
                "Fast-LLM reverse KL",
                lambda s, t, labels: Loss.apply(s, t, "reverse_kl"),
                exact.plain("reverse-kl"),
            ),
        ],
        why,
    )


def fla_heads():
    """flash-linear-attention's `FusedKLDivLoss`, from PyPI (fla-core). It multiplies by both heads itself."""
    of, why = imported(lambda: importlib.import_module("fla.modules.fused_kl_div"))
    fused = of and of.FusedKLDivLoss()
    loss = lambda x, w, teacher_x, teacher_w: fused(x, teacher_x, w, teacher_w)
    return divided([("FLA FusedKLDivLoss", loss, exact.plain("forward-kl"))], why)


def liger_heads():
    """Liger-Kernel's `LigerFusedLinearJSD` and `LigerFusedLinearJSDLoss` of `chunked_loss`, from PyPI, which multiply by both
    heads too.
    """
    of, why = imported(
        lambda: (
            importlib.import_module("liger_kernel.transformers"),
            importlib.import_module("liger_kernel.chunked_loss"),
        )
    )
    fused = of and of[0].LigerFusedLinearJSD(jsd_beta=0.5)
    chunked = of and of[1].LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    jsd = exact.plain("jsd", 0.5)

    def of_chunks(x, w, teacher_x, teacher_w):
        # Labels only tell it which tokens count.
        return chunked(x, w, teacher_x, teacher_w, torch.zeros(len(x), dtype=torch.int64, device=x.device))

    return divided(
        [
            ("Liger-Kernel FusedLinearJSD", lambda *given: fused(*given, None), jsd),
            ("Liger-Kernel chunked JSD", of_chunks, jsd),
        ],
        why,
    )
