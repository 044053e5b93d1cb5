"""The stages of a call on one rank's shard of the vocabulary, against a copy of as many bytes and the call on whole rows.

    python shards.py [--tokens 8192 --vocab 128256 --ranks 8 --dtype bfloat16 --runs 15 --device cuda]

No rank sends anything: one process has the states of one shard as often as there would be ranks. `states` and `terms` read
two volumes of the shard's logits, `gradient` reads two and writes one, `margins` and `loss` read what was exchanged alone;
`share` is the time of a copy of that many bytes over the stage's. Medians of runs in turn.
"""

import argparse
import statistics
import time

import atkd
import torch
from atkd import _native, _settings


def seconds(run, device):
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype, device, columns = getattr(torch, args.dtype), args.device, args.vocab // args.ranks

    def logits(width):
        return (3 * torch.randn((args.tokens, width), device=device)).to(dtype)

    teacher, student, gradient = logits(columns), logits(columns), logits(columns)
    whole_teacher, whole_student = logits(args.vocab), logits(args.vocab).requires_grad_()
    labels = torch.randint(columns, (args.tokens,), device=device)
    volume = student.numel() * student.element_size()
    words = torch.empty(3 * volume // 8, dtype=torch.int32, device=device)
    to = torch.empty_like(words)

    print(f"{args.tokens} tokens, {columns} of {args.vocab} columns, {args.dtype}, {device}\n")
    print("| divergence | stage | volumes | ms | share of a copy |\n|---|---|---|---|---|")
    for divergence in ("forward-kl", "reverse-kl", "jsd", "tvd"):
        objective = _settings.native({**_settings.DEFAULTS, "divergence": divergence})
        stages = _native.Stages(student, teacher, labels, None, None, 0, columns, args.vocab, objective)
        # The target is in one shard.
        others = _native.Stages(
            student, teacher, labels + columns, None, None, 0, columns, args.vocab, objective
        )
        states = torch.stack([stages.states(), *[others.states()] * (args.ranks - 1)])
        terms = None
        runs = {"states": lambda: stages.states()}
        volumes = {"states": 2, "gradient": 3}
        if objective.two_sweeps:
            terms = torch.stack([stages.terms(states)] * args.ranks)
            runs["terms"] = lambda: stages.terms(states)
            volumes["terms"] = 2
        hard = stages.margins(states) > 0
        runs["margins"] = lambda: stages.margins(states)
        runs["gradient"] = lambda: stages.gradient(states, terms, hard, None, None, gradient)
        runs["loss"] = lambda: stages.loss(states, terms, hard, None)
        for count in (2, 3):
            part = words[: count * volume // 8], to[: count * volume // 8]
            runs[f"copy of {count}"] = lambda part=part: part[1].copy_(part[0])
        runs["call on whole rows"] = lambda: atkd.atkd_loss(
            whole_student, whole_teacher, labels, divergence=divergence
        )
        times = {name: [] for name in runs}
        for turn in range(args.runs + 2):
            for name, run in runs.items():
                taken = seconds(run, device)
                if turn >= 2:
                    times[name].append(taken)
        medians = {name: statistics.median(each) for name, each in times.items()}
        for name, median in medians.items():
            share = ""
            if name in volumes:
                share = f"{medians[f'copy of {volumes[name]}'] / median:.0%}"
            print(f"| {divergence} | {name} | {volumes.get(name, '')} | {1e3 * median:.4g} | {share} |")


if __name__ == "__main__":
    main()
