"""Times this package beside what people use today: loss and gradient of one batch, forward and backward.

    pip install atkd matplotlib          (and liger-kernel, on a machine with a GPU)
    python compare.py [--tokens 64 256 --vocab 32000 128256 --dtype float32 bfloat16] [--out DIR]

Runs on the GPU if there is one, else on the CPU of a Linux. Prints a Markdown table, and writes it to DIR with the
same numbers as JSON and a plot:

- time: the median of the runs, after two that do not count. `in place` includes no copy of the logits.
- GB/s: three volumes (both models' logits read, a gradient written) over the time, whatever was moved.
- memory: the most that was in use during a run beyond the inputs, the gradient included.
- errors: of the loss, relative, and of the gradient, relative to the largest of its row (the worst row),
  against float64 autograd of each loss's definition, on 64 tokens.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import atkd
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "benches"), str(HERE.parent / "tests")]

import definitions  # noqa: E402
import pytorch_baseline as eager  # noqa: E402


def exact_atkd(student, teacher, labels):
    return definitions.atkd_loss(student, teacher, labels)[0]


def exact_kl(student, teacher, labels):
    return definitions.atkd_loss(student, teacher, labels, objective="kl")[0]


def exact_jsd(student, teacher, labels):
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    kl = [(x.exp() * (x - log_m)).sum(-1).mean() for x in (log_p, log_q)]
    return (kl[0] + kl[1]) / 2


def liger():
    """Liger-Kernel's losses, or why they cannot run."""
    names = ["Liger-Kernel KL", "Liger-Kernel JSD"]
    try:
        from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss
    except ImportError as error:
        return [], dict.fromkeys(names, f"liger-kernel cannot be imported: {error}")
    if not torch.cuda.is_available():
        return [], dict.fromkeys(names, "its kernels are Triton's, and this machine has no GPU")
    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    jsd = LigerJSD()
    logs = lambda s, t: (s.float().log_softmax(-1), t.float().log_softmax(-1))
    return [
        (names[0], lambda s, t, labels: kl(*logs(s, t)), exact_kl),
        (names[1], lambda s, t, labels: jsd(*logs(s, t)), exact_jsd),
    ], {}


def variants():
    """Name, loss, the loss in float64; and those that cannot run here, with the reason."""
    compiled = torch.compile(eager.atkd, dynamic=False)
    in_place = atkd.ATKDLoss(inplace=True)
    losses, skipped = liger()
    return [
        ("atkd", atkd.atkd_loss, exact_atkd),
        ("atkd in place", in_place, exact_atkd),
        ("atkd KL", atkd.ATKDLoss(objective="kl"), exact_kl),
        ("PyTorch ATKD, eager", eager.atkd, exact_atkd),
        ("PyTorch ATKD, torch.compile", compiled, exact_atkd),
        ("PyTorch log_softmax + kl_div", eager.kl, exact_kl),
        *losses,
    ], skipped


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


def inputs(tokens, vocab, dtype, device):
    random = torch.Generator(device).manual_seed(0)
    shape = (tokens, vocab)
    student, teacher = (
        (3 * torch.randn(shape, generator=random, device=device)).to(dtype) for _ in range(2)
    )
    return student, teacher, torch.randint(vocab, (tokens,), generator=random, device=device)


def measure(loss, student, teacher, labels, runs):
    """Median seconds, and the peak of memory."""
    device, memory = student.device, Memory(student.device)

    def run(before=lambda: None):
        # The in-place loss overwrites them.
        logits = student.clone().requires_grad_()
        synchronize(device)
        before()
        # OpenMP's threads spin for a few milliseconds after the copy, on cores that are wanted. Busy, as a
        # training step is until the loss: after a sleep Linux may wake all threads on one core. A GPU that
        # waits presumably lowers its clocks.
        start = time.perf_counter() + (0.02 if device.type == "cpu" else 0)
        while time.perf_counter() < start:
            pass
        start = time.perf_counter()
        loss(logits, teacher, labels).backward()
        synchronize(device)
        return time.perf_counter() - start

    times = [run() for _ in range(runs + 2)]
    # Apart from the times: it gives memory back to the system, which then has to be had again.
    run(memory.start)
    return statistics.median(times[2:]), memory.peak()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def errors(loss, exact, vocab, dtype, device):
    """Relative errors of the loss and of the worst row's gradient."""
    student, teacher, labels = inputs(64, vocab, dtype, device)
    wide = student.cpu().double().requires_grad_()
    expected = exact(wide, teacher.cpu().double(), labels.cpu())
    (gradient,) = torch.autograd.grad(expected, wide)
    logits = student.clone().requires_grad_()
    actual = loss(logits, teacher, labels)
    actual.backward()
    off = (logits.grad.cpu().double() - gradient).abs().amax(-1) / gradient.abs().amax(-1)
    return abs(actual.item() / expected.item() - 1), off.max().item()


def reason(error):
    """In a line."""
    return f"{type(error).__name__}: {str(error).split(chr(10))[0][:200]}"


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def plot(results, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shapes = sorted({(r["dtype"], r["tokens"], r["vocab"]) for r in results})
    figure, rows = plt.subplots(
        len(shapes), 2, figsize=(12, 2.6 * len(shapes)), squeeze=False, layout="constrained"
    )
    for (dtype, tokens, vocab), (times, memories) in zip(shapes, rows):
        these = [
            r for r in results if (r["dtype"], r["tokens"], r["vocab"]) == (dtype, tokens, vocab)
        ][::-1]
        names = [r["variant"] for r in these]
        for axes, key, unit in [(times, "median_ms", "ms"), (memories, "peak_mb", "MB")]:
            colours = ["C1" if name.startswith("atkd") else "C0" for name in names]
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
    parser.add_argument("--out", type=Path, default=Path("target/compare"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    machine = f"{name}, {args.threads} threads, torch {torch.__version__}"

    losses, skipped = variants()
    lines = [
        f"{machine}. Median of {args.runs} runs, forward and backward.",
        "",
        "| loss | N | V | dtype | ms | GB/s | peak MB | loss error | gradient error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    results = []
    for vocab in args.vocab:
        for dtype_name in args.dtype:
            dtype = getattr(torch, dtype_name)
            accuracy = {}
            for name, loss, exact in losses:
                try:
                    accuracy[name] = errors(loss, exact, vocab, dtype, device)
                except Exception as error:  # of other people's kernels, of any kind
                    skipped[f"{name} at V = {vocab} {dtype_name}"] = reason(error)
            for tokens in args.tokens:
                student, teacher, labels = inputs(tokens, vocab, dtype, device)
                for name, loss, _ in losses:
                    if name not in accuracy:
                        continue
                    torch._dynamo.reset()
                    try:
                        seconds, peak = measure(loss, student, teacher, labels, args.runs)
                    except torch.OutOfMemoryError as error:
                        skipped[f"{name} at {tokens} x {vocab} {dtype_name}"] = reason(error)
                        continue
                    volume = student.numel() * student.element_size()
                    result = {
                        "variant": name,
                        "tokens": tokens,
                        "vocab": vocab,
                        "dtype": dtype_name,
                        "median_ms": seconds * 1e3,
                        "gb_per_s": 3 * volume / seconds / 1e9,
                        "peak_mb": peak / 1e6,
                        "loss_error": accuracy[name][0],
                        "gradient_error": accuracy[name][1],
                    }
                    results.append(result)
                    lines.append(
                        f"| {name} | {tokens} | {vocab} | {dtype_name} | {result['median_ms']:.2f} | "
                        f"{result['gb_per_s']:.2f} | {result['peak_mb']:.1f} | "
                        f"{result['loss_error']:.1e} | {result['gradient_error']:.1e} |"
                    )
                    print(lines[-1], flush=True)
    for name, why in skipped.items():
        lines.append(f"\n{name}: skipped, {why}.")
        print(lines[-1])

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "compare.md").write_text("\n".join(lines) + "\n")
    report = {"machine": machine, "results": results, "skipped": skipped}
    (args.out / "compare.json").write_text(json.dumps(report, indent=1))
    try:
        plot(results, args.out / "compare.svg")
    except ImportError as error:
        print(f"\nno plot: {error}")


if __name__ == "__main__":
    main()
