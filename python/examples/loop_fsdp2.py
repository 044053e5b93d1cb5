"""A training loop under FSDP2 from hidden states: the loss and the weights of one process, on any number of them.

    pip install ./python && torchrun --nproc-per-node 2 python/examples/loop_fsdp2.py

The loss is called in the forward of the module that `fully_shard` has wrapped, where the head's weight is whole, and logits
exist for a chunk of tokens at a time. `token_group` has the hard tokens selected among those of all ranks, and the mean taken
over all; FSDP averages gradients over ranks, so that the loss is multiplied by their number. Needs torch 2.6 or later. Prints
the loss as it falls.
"""

import argparse
import os

import atkd
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

VOCAB, SEQUENCES, LENGTH = 128, 16, 24


class Model(torch.nn.Module):
    """From tokens `[B, T]` to hidden states; `head` makes logits of them."""

    def __init__(self, width, spread):
        super().__init__()
        layers = torch.nn.Embedding(VOCAB, width), torch.nn.Linear(width, width), torch.nn.Tanh()
        self.body = torch.nn.Sequential(*layers)
        self.head = torch.nn.Linear(width, VOCAB, bias=False)
        torch.nn.init.normal_(self.head.weight, std=spread)

    def forward(self, tokens):
        return self.body(tokens)


class Distilled(torch.nn.Module):
    """A student whose forward returns this rank's part of the loss."""

    def __init__(self, student, criterion):
        super().__init__()
        self.student, self.criterion = student, criterion

    def forward(self, tokens, labels, teacher_hidden, teacher_weight):
        hidden, weight = self.student(tokens), self.student.head.weight
        return self.criterion(hidden, weight, teacher_hidden, teacher_weight, labels)


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
    teacher, student = Model(64, 0.5).eval(), Model(32, 0.02)
    criterion = atkd.LinearATKDLoss(shift_labels=True, token_group=dist.group.WORLD)
    distilled = fully_shard(Distilled(student, criterion))
    optimizer = torch.optim.SGD(distilled.parameters(), learning_rate)
    losses = []
    for step in range(steps):
        tokens, labels = batch(step, rank, ranks)
        with torch.no_grad():
            teacher_hidden = teacher(tokens)
        loss = distilled(tokens, labels, teacher_hidden, teacher.head.weight)
        (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        # Each rank has its part of the whole.
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(whole.item())
    return losses, {name: weight.full_tensor() for name, weight in student.state_dict().items()}


if __name__ == "__main__":
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
            torch.save({"losses": losses, "student": student}, options.save)
    dist.destroy_process_group()
