"""Times loss and gradient where a training step has them, between the last layers of both models and the first product of
the backward pass, and alone.

    python in_a_step.py [--tokens 2048 8192 --vocab 32000 --features 4096 --runs 50]

In bfloat16, on the GPU if there is one. Beside them is what else could be slower there: a copy of the logits, and the GPU's
clock, which falls when products draw all the power that it may have. Each is the median of the runs, of a queue that is never
empty.
"""

import argparse
import statistics
import time

import torch

import atkd

CYCLES = 1_000_000


def mark(device):
    """The time, at this place in the queue."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def microseconds(start, end):
    if isinstance(start, float):
        return (end - start) * 1e6
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def measure(tokens, vocab, features, runs, device, in_a_step):
    """Microseconds of loss and gradient and of a copy, and the clock in MHz."""

    def random(*shape):
        return torch.randn(shape, device=device).to(torch.bfloat16)

    hidden, layers = random(tokens, features), [random(vocab, features) / features**0.5 for _ in range(2)]
    labels = torch.randint(vocab, (tokens,), device=device)
    teacher, student = [hidden @ layer.T for layer in layers]
    copy = torch.empty_like(student)
    marks = []
    for _ in range(runs + 10):
        if in_a_step:
            teacher, student = [hidden @ layer.T for layer in layers]
        student = student.detach().requires_grad_()
        marks.append([mark(device)])
        atkd.atkd_loss(student, teacher, labels).backward()
        marks[-1].append(mark(device))
        copy.copy_(student.detach())
        marks[-1].append(mark(device))
        if device.type == "cuda":
            torch.cuda._sleep(CYCLES)
        marks[-1].append(mark(device))
        if in_a_step:
            student.grad @ layers[1]
    # The first runs wait for memory and for kernels to be loaded.
    times = [[microseconds(*pair) for pair in zip(run, run[1:])] for run in marks[10:]]
    loss, copying, spinning = [statistics.median(each) for each in zip(*times)]
    return loss, copying, CYCLES / spinning


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000])
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    print(torch.cuda.get_device_name() if on_gpu else "CPU", f"torch {torch.__version__}", sep=", ")
    print("\n| N | V | where | loss and gradient, us | copy, us | clock, MHz |\n|---|---|---|---|---|---|")
    for vocab in args.vocab:
        for tokens in args.tokens:
            for where in ["alone", "in a step"]:
                loss, copying, clock = measure(
                    tokens, vocab, args.features, args.runs, device, where == "in a step"
                )
                speed = f"{clock:.0f}" if on_gpu else ""
                print(f"| {tokens} | {vocab} | {where} | {loss:.0f} | {copying:.0f} | {speed} |", flush=True)


if __name__ == "__main__":
    main()
