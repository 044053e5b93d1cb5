"""Times and scores this package beside what people use today: loss and gradient of one batch, forward and backward.

    pip install atkd matplotlib          (and liger-kernel, fla-core and speculators, on a machine with a GPU)
    python compare.py [--tokens 64 256 --vocab 32000 128256 --dtype float32 bfloat16] [--out DIR]
                      [--losses PART...] [--head H [H_TEACHER]] [--speculators PATH] [--fast-llm PATH]

Runs on the GPU if there is one, else on the CPU of a Linux. The others are eager PyTorch as public code writes it
(`benches/pytorch_baseline.py`) and the fused losses of other packages (`peers.py`): installed ones, or checkouts that
the options name. What cannot run is named with the reason. `--losses` takes those whose names contain one of the parts.

Prints a Markdown table, and writes it to DIR with the same numbers as JSON and a plot:

- time: the median of the runs, after two that do not count. `in place` includes no copy of the logits.
- GB/s: three volumes (both models' logits read, a gradient written) over the time, whatever was moved.
- memory: the most that was in use during a run beyond the inputs, the gradient included.
- errors: of the loss, relative, and of the gradient, relative to the largest of its row (the worst row), against
  float64 autograd of each loss's own definition (`exact.py`), on 64 tokens. Labels are drawn from the teacher; errors
  of losses that have labels also for labels drawn evenly, which the teacher thinks impossible: many uncertainties are
  then 1 in float32, and a token that is taken for hard or easy against the definition has a wrong gradient.

`--head H` adds a second table, of losses behind the last layers `[V, H]` of both models, since `linear_atkd_loss` and some
packages multiply by them too; `--head H H_TEACHER` if the teacher's is wider. The times are of both products and of the
gradients of hidden states and weights; the floor is the four products alone. Errors are of the loss, and of the gradients
of hidden states / weight, of 64 tokens, against products in float64 of the same inputs: so logits that are rounded between
the product and the loss count. Where the hidden sizes are equal the student's logits differ from the teacher's N(0, 3) by N(0, 0.3).
"""

import argparse
import ctypes
import functools
import gc
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import atkd
import torch
from torch.nn.functional import linear

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benches")]

import exact  # noqa: E402
import peers  # noqa: E402
import pytorch_baseline as eager  # noqa: E402

# Name, what the package calls it, and its beta.
DIVERGENCES = [
    ("KL", "forward-kl", None),
    ("reverse KL", "reverse-kl", None),
    ("JSD", "jsd", 0.5),
    ("TVD", "tvd", None),
    ("skew KL", "skew-kl", 0.1),
    ("skew reverse KL", "skew-reverse-kl", 0.1),
]


def own(objective, divergence, beta):
    settings = {} if beta is None else {"beta": beta}
    return functools.partial(atkd.atkd_loss, objective=objective, divergence=divergence, **settings)


def variants(paths):
    """Name, loss, the loss in float64; and those that cannot run here, with the reason."""
    compiled = functools.partial(torch.compile, dynamic=False)
    trl = lambda beta: functools.partial(eager.generalized_jsd, beta=beta)
    kl, reverse_kl, jsd, tvd, skew_kl, skew_reverse_kl = [exact.plain(*rest) for _, *rest in DIVERGENCES]
    losses = [
        ("atkd", atkd.atkd_loss, exact.atkd()),
        (
            "atkd by the official conventions",
            functools.partial(atkd.atkd_loss, selection_rule="median", reduction="group-mean"),
            exact.official_atkd(),
        ),
        ("atkd in place", functools.partial(atkd.atkd_loss, inplace=True), exact.atkd()),
        *((f"atkd over {name}", own("atkd", *rest), exact.atkd(*rest)) for name, *rest in DIVERGENCES[1:]),
        *((f"atkd {name}", own("plain", *rest), exact.plain(*rest)) for name, *rest in DIVERGENCES),
        ("PyTorch ATKD, official", eager.official_atkd, exact.official_atkd()),
        ("PyTorch ATKD, official, torch.compile", compiled(eager.official_atkd), exact.official_atkd()),
        ("PyTorch ATKD, SE-KD", eager.se_kd_atkd, exact.atkd()),
        ("PyTorch ATKD, SE-KD, torch.compile", compiled(eager.se_kd_atkd), exact.atkd()),
        ("PyTorch log_softmax + kl_div", eager.kl, kl),
        ("PyTorch KL", eager.forward_kl, kl),
        ("PyTorch reverse KL", eager.reverse_kl, reverse_kl),
        ("PyTorch reverse KL, torch.compile", compiled(eager.reverse_kl), reverse_kl),
        ("PyTorch JSD", eager.jsd, jsd),
        ("PyTorch TVD", eager.tvd, tvd),
        ("PyTorch skew KL", eager.skew_kl, skew_kl),
        ("PyTorch skew reverse KL", eager.skew_reverse_kl, skew_reverse_kl),
        ("TRL's JSD, beta 0 (KL)", trl(0), kl),
        ("TRL's JSD, beta 0.5", trl(0.5), jsd),
        ("TRL's JSD, beta 0.5, torch.compile", compiled(trl(0.5)), jsd),
        ("TRL's JSD, beta 1 (reverse KL)", trl(1), reverse_kl),
    ]
    skipped = {}
    for found, missing in [peers.liger(), peers.speculators(paths.speculators), peers.fast_llm(paths.fast_llm)]:
        losses += found
        skipped.update(missing)
    return losses, skipped


def head_variants():
    """The same for losses behind heads, of `(x, w, teacher_x, teacher_w)`."""

    def behind_heads(loss):
        return lambda x, w, teacher_x, teacher_w: loss(linear(x, w), linear(teacher_x, teacher_w))

    def fused(**settings):
        def loss(x, w, *teacher):
            labels = head_labels(len(x), len(w), x.device)
            return atkd.linear_atkd_loss(x, w, *teacher, labels, **settings)

        return loss

    def with_labels(definition):
        return lambda z, teacher, _: definition(z, teacher, head_labels(*z.shape, z.device))

    kl, jsd = exact.plain("forward-kl"), exact.plain("jsd", 0.5)
    own_kl, own_jsd = own("plain", "forward-kl", None), own("plain", "jsd", 0.5)
    losses = [
        ("heads, the four products alone", Products.apply, None),
        ("heads, atkd fused", fused(), with_labels(exact.atkd())),
        ("heads, atkd fused KL", fused(objective="plain"), kl),
        ("heads, atkd fused JSD", fused(objective="plain", divergence="jsd", beta=0.5), jsd),
        ("heads, atkd KL", behind_heads(functools.partial(own_kl, target="teacher")), kl),
        (
            "heads, atkd KL in place",
            behind_heads(functools.partial(own_kl, target="teacher", inplace=True)),
            kl,
        ),
        ("heads, PyTorch log_softmax + kl_div", behind_heads(eager.kl), kl),
        ("heads, atkd JSD", behind_heads(functools.partial(own_jsd, target="teacher")), jsd),
        ("heads, TRL's JSD", behind_heads(eager.generalized_jsd), jsd),
    ]
    skipped = {}
    for found, missing in [peers.fla_heads(), peers.liger_heads()]:
        losses += found
        skipped.update(missing)
    return losses, skipped


class Products(torch.autograd.Function):
    """Both models' logits, and the gradients of the student's layer from its logits in the place of their gradient."""

    @staticmethod
    def forward(ctx, x, w, teacher_x, teacher_w):
        logits = linear(x, w)
        linear(teacher_x, teacher_w)
        ctx.save_for_backward(x, w, logits)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        x, w, logits = ctx.saved_tensors
        return logits @ w, logits.T @ x, None, None


class Fresh(torch.autograd.Function):
    """A copy that is no leaf, since nothing may be overwritten that is one, and that keeps its gradient in a list."""

    @staticmethod
    def forward(ctx, anchor, logits, gradients):
        ctx.gradients = gradients
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.gradients.append(gradient)
        return None, None, None


def fresh(tensors):
    """Copies of the tensors, and a list that has a list for the gradient of each."""
    anchor = tensors[0].new_zeros(()).requires_grad_()
    gradients = [[] for _ in tensors]
    return [Fresh.apply(anchor, each, found) for each, found in zip(tensors, gradients)], gradients


class Memory:
    """Bytes in use at most since `start`, beyond those at `start`."""

    def __init__(self, device):
        self.device = device

    def start(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        ctypes.CDLL(None).malloc_trim(0)
        # Makes the high-water mark that of now.
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self.resident("VmRSS")

    def peak(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        return self.resident("VmHWM") - self.before

    @staticmethod
    def resident(field):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {field}")


def inputs(tokens, vocab, dtype, device, evenly=False):
    """Logits N(0, 3) of both, and labels that are drawn from the teacher, or evenly."""
    random = torch.Generator(device).manual_seed(0)
    shape = (tokens, vocab)
    student, teacher = (
        (3 * torch.randn(shape, generator=random, device=device)).to(dtype) for _ in range(2)
    )
    if evenly:
        return student, teacher, torch.randint(vocab, (tokens,), generator=random, device=device)
    return student, teacher, teacher.float().softmax(-1).multinomial(1, generator=random).squeeze(1)


def head_inputs(tokens, vocab, head, dtype, device):
    """Hidden states, of which the student has the teacher's first, and weights: x, w, teacher_x, teacher_w."""
    random = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=random, device=device)
    features, of_teacher = head[0], head[-1]
    teacher_x = normal(tokens, of_teacher).to(dtype)
    teacher_w = 3 / of_teacher**0.5 * normal(vocab, of_teacher)
    w = teacher_w[:, :features] + 0.3 / features**0.5 * normal(vocab, features)
    return teacher_x[:, :features].clone(), w.to(dtype), teacher_x, teacher_w.to(dtype)


def head_labels(tokens, vocab, device):
    return torch.arange(tokens, device=device) * 7919 % vocab


def measure(loss, tensors, constants, runs):
    """Median seconds of a loss and its gradients with respect to the tensors, and the peak of memory."""
    device = tensors[0].device
    memory = Memory(device)

    def run(before=lambda: None):
        copies, gradients = fresh(tensors)
        synchronize(device)
        before()
        # OpenMP's threads spin for a few milliseconds after the copy, on cores that are wanted. Busy, as a
        # training step is until the loss: after a sleep Linux may wake all threads on one core. A GPU that
        # waits presumably lowers its clocks.
        start = time.perf_counter() + (0.02 if device.type == "cpu" else 0)
        while time.perf_counter() < start:
            pass
        start = time.perf_counter()
        loss(*copies, *constants).backward()
        synchronize(device)
        seconds = time.perf_counter() - start
        assert all(len(found) == 1 for found in gradients)
        return seconds

    times = [run() for _ in range(runs + 2)]
    # Apart from the times: it gives memory back to the system, which then has to be had again.
    run(memory.start)
    return statistics.median(times[2:]), memory.peak()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


@functools.cache
def exactly(definition, vocab, dtype, device, evenly):
    """The loss and its gradient in float64, of `inputs`."""
    student, teacher, labels = (x.cpu() for x in inputs(64, vocab, dtype, device, evenly))
    wide = student.double().requires_grad_()
    value = definition(wide, teacher.double(), labels)
    return value.item(), torch.autograd.grad(value, wide)[0]


def off(value, gradient, expected, exact_gradient):
    """Relative errors of a loss, and of the gradient in the worst row."""
    off = (gradient.cpu().double() - exact_gradient).abs().amax(-1) / exact_gradient.abs().amax(-1)
    return abs(value.item() / expected - 1), off.max().item()


def errors(loss, definition, vocab, dtype, device, evenly):
    student, teacher, labels = inputs(64, vocab, dtype, device, evenly)
    (logits,), (found,) = fresh([student])
    value = loss(logits, teacher, labels)
    value.backward()
    return off(value, found[0], *exactly(definition, vocab, dtype, device, evenly))


def head_errors(loss, definition, given):
    """Of the loss, and of the gradients of hidden states and weight."""
    if definition is None:
        return [(math.nan, math.nan)] * 2
    x, w, teacher_x, teacher_w = [x.double() for x in given]
    leaves = x.requires_grad_(), w.requires_grad_()
    expected = definition(linear(x, w), linear(teacher_x, teacher_w), None)
    exact_gradients = torch.autograd.grad(expected, leaves)
    copies, found = fresh(given[:2])
    value = loss(*copies, *given[2:])
    value.backward()
    # A weight has rows without any gradient to speak of: relative to the largest of all.
    wholes = [(one.flatten()[None], of.flatten()[None]) for (one,), of in zip(found, exact_gradients)]
    return [off(value, one, expected.item(), of.cpu()) for one, of in wholes]


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def plot(results, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    # Losses behind heads have no rate: their times are the products'.
    results = [r for r in results if r["gb_per_s"]]
    if not results:
        return
    shapes = sorted({(r["dtype"], r["tokens"], r["vocab"]) for r in results})
    # A quarter of an inch for each bar.
    figure, rows = plt.subplots(
        len(shapes), 2, figsize=(14, len(shapes) + len(results) / 4), squeeze=False, layout="constrained"
    )
    for (dtype, tokens, vocab), (times, memories) in zip(shapes, rows):
        these = [
            r for r in results if (r["dtype"], r["tokens"], r["vocab"]) == (dtype, tokens, vocab)
        ][::-1]
        names = [r["variant"] for r in these]
        for axes, key, unit in [(times, "median_ms", "ms"), (memories, "peak_mb", "MB")]:
            colours = ["C1" if "atkd" in name else "C0" for name in names]
            bars = axes.barh(names, [r[key] for r in these], color=colours)
            axes.bar_label(bars, fmt=" {:.3g}")
            axes.set_xlabel(unit)
            axes.margins(x=0.15)
        times.set_title(f"time, {tokens} x {vocab} {dtype}", loc="left")
        memories.set_title("peak memory beyond the inputs", loc="left")
        memories.set_yticklabels([])
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--losses", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--head", type=int, nargs="+", help="hidden sizes of student and teacher, for losses behind heads")
    parser.add_argument("--speculators", type=Path, help="a checkout of vllm-project/speculators")
    parser.add_argument("--fast-llm", type=Path, help="a checkout of ServiceNow/Fast-LLM")
    parser.add_argument("--out", type=Path, default=Path("target/compare"))
    args = parser.parse_args()
    if args.head and (len(args.head) > 2 or args.head[0] > args.head[-1]):
        parser.error("--head takes the student's hidden size, and the teacher's, which may not be smaller")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    machine = f"{name}, {args.threads} threads, torch {torch.__version__}"

    wanted = lambda name: any(part in name for part in args.losses)
    losses, skipped = variants(args)
    heads, skipped_heads = head_variants() if args.head else ([], {})
    skipped = {name: why for name, why in {**skipped, **skipped_heads}.items() if wanted(name)}
    lines = []

    def say(*more):
        lines.extend(more)
        print("\n".join(more), flush=True)

    say(
        f"{machine}. Median of {args.runs} runs, forward and backward.",
        "Errors are with labels drawn from the teacher / evenly.",
        "",
        "| loss | N | V | dtype | ms | GB/s | peak MB | loss error | gradient error |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    results = []

    def report(name, tokens, vocab, dtype, volumes, measured, accuracy, second="evenly"):
        seconds, peak = measured
        rate = volumes / seconds / 1e9 if volumes else None
        results.append(
            {
                "variant": name,
                "tokens": tokens,
                "vocab": vocab,
                "dtype": dtype,
                "median_ms": seconds * 1e3,
                "gb_per_s": rate,
                "peak_mb": peak / 1e6,
                "loss_error": accuracy[0][0],
                "gradient_error": accuracy[0][1],
                f"loss_error_{second}": accuracy[-1][0],
                f"gradient_error_{second}": accuracy[-1][1],
            }
        )
        # The floor has none.
        both = [" / ".join(f"{pair[i]:.1e}" for pair in accuracy).replace("nan / nan", "") for i in range(2)]
        say(
            f"| {name} | {tokens} | {vocab} | {dtype} | {seconds * 1e3:.2f} | "
            f"{f'{rate:.2f}' if volumes else ''} | {peak / 1e6:.1f} | {both[0]} | {both[1]} |"
        )
        save()

    args.out.mkdir(parents=True, exist_ok=True)

    def save():
        (args.out / "compare.md").write_text("\n".join(lines) + "\n")
        report = {"machine": machine, "results": results, "skipped": skipped}
        (args.out / "compare.json").write_text(json.dumps(report, indent=1))

    for vocab in args.vocab:
        for dtype_name in args.dtype:
            dtype = getattr(torch, dtype_name)
            sizes = [(tokens, inputs(tokens, vocab, dtype, device)) for tokens in args.tokens]
            for name, loss, definition in losses:
                if not wanted(name):
                    continue
                try:
                    accuracy = [
                        errors(loss, definition, vocab, dtype, device, evenly)
                        for evenly in ([False, True] if exact.needs_labels(definition) else [False])
                    ]
                except Exception as error:  # of other people's kernels, of any kind
                    skipped[f"{name} at V = {vocab} {dtype_name}"] = peers.reason(error)
                    continue
                for tokens, (student, *constants) in sizes:
                    torch._dynamo.reset()
                    try:
                        measured = measure(loss, [student], constants, args.runs)
                    except Exception as error:  # memory, mostly
                        skipped[f"{name} at {tokens} x {vocab} {dtype_name}"] = peers.reason(error)
                        continue
                    volumes = 3 * student.numel() * student.element_size()
                    report(name, tokens, vocab, dtype_name, volumes, measured, accuracy)
            exactly.cache_clear()
            del sizes

    if heads:
        say("", f"Behind heads of {' and '.join(map(str, args.head))} features:", "", *lines[3:5])
    for vocab in args.vocab if heads else []:
        for dtype_name in args.dtype:
            dtype = getattr(torch, dtype_name)
            for tokens in args.tokens:
                for name, loss, definition in heads:
                    if not wanted(name):
                        continue
                    try:
                        few = head_inputs(64, vocab, args.head, dtype, device)
                        accuracy = head_errors(loss, definition, few)
                        given = head_inputs(tokens, vocab, args.head, dtype, device)
                        measured = measure(loss, given[:2], given[2:], args.runs)
                    except Exception as error:
                        skipped[f"{name} at {tokens} x {vocab} {dtype_name}"] = peers.reason(error)
                        continue
                    report(name, tokens, vocab, dtype_name, None, measured, accuracy, "of_weight")
    by_reason = {}
    for name, why in skipped.items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        say(f"\nSkipped: {'; '.join(names)}. {why}.")

    save()
    try:
        plot(results, args.out / "compare.svg")
    except ImportError as error:
        print(f"\nno plot: {error}")


if __name__ == "__main__":
    main()
