"""A plain training loop under DDP: the loss and the weights of one process, on any number of them.

    pip install ./python && torchrun --nproc-per-node 2 python/examples/loop_ddp.py

`token_group` has the hard tokens selected among those of all ranks, and the mean taken over all; DDP averages gradients over
ranks, so that the loss is multiplied by their number. Runs without torchrun too, on one process. Prints the loss as it falls.
"""

import argparse
import os

import atkd
import torch
import torch.distributed as dist

VOCAB, SEQUENCES, LENGTH = 128, 16, 24


def model(width, spread):
    """From tokens `[B, T]` to logits `[B, T, VOCAB]`."""
    head = torch.nn.Linear(width, VOCAB, bias=False)
    torch.nn.init.normal_(head.weight, std=spread)
    return torch.nn.Sequential(torch.nn.Embedding(VOCAB, width), torch.nn.Linear(width, width), torch.nn.Tanh(), head)


def batch(step, rank, ranks):
    """This rank's sequences of a step, which end unevenly; label t + 1 is what the logits at t are about."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH), generator=random)
    ends = torch.randint(2, LENGTH + 1, (SEQUENCES, 1), generator=random)
    labels = tokens.masked_fill(torch.arange(LENGTH) >= ends, -100)
    return tokens[rank::ranks], labels[rank::ranks]


def train(steps, learning_rate=20.0):
    """The loss of each step over all ranks, and the student."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    teacher, student = model(64, 0.5).eval(), model(32, 0.02)
    student = torch.nn.parallel.DistributedDataParallel(student)
    optimizer = torch.optim.SGD(student.parameters(), learning_rate)
    criterion = atkd.ATKDLoss(shift_labels=True, token_group=dist.group.WORLD)
    losses = []
    for step in range(steps):
        tokens, labels = batch(step, rank, ranks)
        with torch.no_grad():
            teacher_logits = teacher(tokens)
        loss = criterion(student(tokens), teacher_logits, labels)
        (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        # Each rank has its part of the whole.
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(whole.item())
    return losses, student.module


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="of gradient descent")
    parser.add_argument("--save", help="where the losses and the student's weights go")
    options = parser.parse_args()
    # What torchrun tells, or one process.
    for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}.items():
        os.environ.setdefault(name, alone)
    dist.init_process_group("gloo")
    losses, student = train(options.steps)
    if dist.get_rank() == 0:
        print("loss:", *[f"{loss:.4f}" for loss in losses[:: max(options.steps // 10, 1)]])
        if options.save:
            torch.save({"losses": losses, "student": student.state_dict()}, options.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
