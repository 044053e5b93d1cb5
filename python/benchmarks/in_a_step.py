"""Times loss and gradient where a training step has them, between the last layers of both models and the first product of
the backward pass, and alone. Needs a GPU.

    python in_a_step.py [--tokens 2048 8192 --vocab 32000 --features 4096 --runs 50]

In bfloat16. Beside them is what else could be slower there: a copy of the logits, and the GPU's clock right behind both, which
falls when products draw all the power that it may have (2% low, since the start of a kernel is in it). Each is the median of
the runs, of a queue that is never empty.
"""

import argparse
import statistics

import atkd
import torch

# Few: while they pass the GPU draws little power.
CYCLES = 200_000


def mark():
    """The time, at this place in the queue."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure(tokens, vocab, features, runs, in_a_step):
    """Microseconds of loss and gradient and of a copy, and the clock in MHz."""

    def random(*shape):
        return torch.randn(shape, device="cuda").to(torch.bfloat16)

    hidden, layers = random(tokens, features), [random(vocab, features) / features**0.5 for _ in range(2)]
    labels = torch.randint(vocab, (tokens,), device="cuda")
    teacher, student = [hidden @ layer.T for layer in layers]
    copy = torch.empty_like(student)
    marks = []
    torch.cuda._sleep(500 * CYCLES)  # meanwhile the host gets ahead
    for _ in range(runs + 10):
        if in_a_step:
            teacher, student = [hidden @ layer.T for layer in layers]
        student = student.detach().requires_grad_()
        marks.append([mark()])
        atkd.atkd_loss(student, teacher, labels).backward()
        marks[-1].append(mark())
        copy.copy_(student.detach())
        marks[-1].append(mark())
        torch.cuda._sleep(CYCLES)
        marks[-1].append(mark())
        if in_a_step:
            student.grad @ layers[1]
    torch.cuda.synchronize()
    # The first runs wait for memory and for kernels to be loaded.
    times = [[start.elapsed_time(end) * 1e3 for start, end in zip(run, run[1:])] for run in marks[10:]]
    loss, copying, spinning = [statistics.median(each) for each in zip(*times)]
    return loss, copying, CYCLES / spinning


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000])
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; compare.py measures on the CPU too")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("\n| N | V | where | loss and gradient, us | copy, us | clock, MHz |\n|---|---|---|---|---|---|")
    for vocab in args.vocab:
        for tokens in args.tokens:
            for where in ["alone", "in a step"]:
                measured = measure(tokens, vocab, args.features, args.runs, where == "in a step")
                loss, copying, clock = map(round, measured)
                print(f"| {tokens} | {vocab} | {where} | {loss} | {copying} | {clock} |", flush=True)


if __name__ == "__main__":
    main()
