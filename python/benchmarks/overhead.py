"""What Python and PyTorch add to the native loss, whose memory traffic leaves their code out of the caches.

    python overhead.py [--rounds 7 --runs 40 --tokens 256 --vocab 32000]

Each run makes one call of each kind, the native one on addresses prepared beforehand; a round is their medians.
`around` is the time of a forward call outside its native part; `bare` is that of an autograd function which does
nothing, called as cold: PyTorch's own part of it. So is `backward of x * 1`, of one number. The last line is the
median round, as a share of the native call.
"""

import argparse
import statistics
import time

import atkd
import torch
from atkd import _atkd

KINDS = ["native", "forward", "around", "bare", "forward + backward", "backward", "backward of x * 1"]


class Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.empty(())

    @staticmethod
    def backward(ctx, upstream):
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    args = parser.parse_args()
    shape = args.tokens, args.vocab
    teacher, student = 3 * torch.randn(shape), (3 * torch.randn(shape)).requires_grad_()
    labels = torch.randint(args.vocab, (args.tokens,))
    one = torch.ones((), requires_grad=True)

    inside, prepared = [0.0], []
    native = _atkd.run

    def watched(*arguments):
        prepared[:] = arguments
        start = time.perf_counter()
        native(*arguments)
        inside[0] = time.perf_counter() - start

    _atkd.run = watched
    kept = atkd.atkd_loss(student, teacher, labels)  # And with it the memory at these addresses.
    direct = tuple(prepared)

    def run():
        student.grad = one.grad = None
        start = time.perf_counter()
        native(*direct)
        yield time.perf_counter() - start
        # As in a loop of such steps: one before it that does not count.
        atkd.atkd_loss(student, teacher, labels).backward()
        student.grad = None
        start = time.perf_counter()
        loss = atkd.atkd_loss(student, teacher, labels)
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        forward, backward, around = middle - start, end - middle, middle - start - inside[0]
        native(*direct)
        start = time.perf_counter()
        bare = Bare.apply(student)
        bare_time = time.perf_counter() - start
        del bare
        yield from [forward, around, bare_time, forward + backward, backward]
        native(*direct)
        scalar = one * 1
        start = time.perf_counter()
        scalar.backward()
        yield time.perf_counter() - start

    print("ms   " + "  ".join(KINDS))
    rounds = []
    for _ in range(args.rounds):
        times = list(zip(*[list(run()) for _ in range(args.runs + 2)][2:]))
        rounds.append([statistics.median(kind) for kind in times])
        print("     " + "  ".join(f"{1e3 * t:{len(name)}.3f}" for t, name in zip(rounds[-1], KINDS)))
    shares = [statistics.median(r[i] / r[0] for r in rounds) for i in range(len(KINDS))]
    print("     " + "  ".join(f"{share:{len(name)}.1%}" for share, name in zip(shares, KINDS)))
    assert kept.grad_fn is not None


if __name__ == "__main__":
    main()
