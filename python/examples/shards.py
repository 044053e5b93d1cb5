"""Distillation over ranks that share the tokens, the vocabulary, or both: the same numbers on 1, 2 and 4 processes.

    pip install atkd
    python shards.py          # DDP; --fsdp for FSDP2, from torch 2.6 on

Prints the loss of each step side by side. The hard tokens of a step are those of all ranks, and the mean is over the valid
tokens of all, however unequally the sequences are split. So a rank's loss is its part of the whole, and the parts' gradients
add up. DDP and FSDP do not add but average: the loss is multiplied by the number of ranks that they average over. The ranks
that split the vocabulary average nothing, and each has the whole loss: nothing is multiplied for them. What makes the
hidden states is on all of them, and gets a gradient from each one's columns, which `SummedGradient` adds up.
"""

import argparse
import os
import tempfile

import atkd
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.multiprocessing as multiprocessing

VOCAB, WIDTH, SEQUENCES, LENGTH, STEPS = 101, 24, 8, 12, 20
# (ranks that split the tokens, ranks that split the vocabulary)
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


class SummedGradient(torch.autograd.Function):
    """Hidden states, whose gradient is summed up over the ranks that have columns of the head."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class Model(torch.nn.Module):
    """From tokens `[B, T]` to this rank's columns of the logits."""

    def __init__(self, spread, columns=slice(None), vocab_group=None):
        super().__init__()
        layers = torch.nn.Embedding(VOCAB, WIDTH), torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()
        self.body, self.vocab_group = torch.nn.Sequential(*layers), vocab_group
        self.head = torch.nn.Parameter(spread * torch.randn(VOCAB, WIDTH)[columns])

    def forward(self, tokens):
        hidden = self.body(tokens)
        if self.vocab_group is not None:
            hidden = SummedGradient.apply(hidden, self.vocab_group)
        return hidden @ self.head.T


def batch(step):
    """All sequences of a step, of uneven lengths."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH), generator=random)
    labels = torch.randint(VOCAB, (SEQUENCES, LENGTH), generator=random)
    ends = torch.randint(1, LENGTH + 1, (SEQUENCES, 1), generator=random)
    labels[torch.arange(LENGTH) >= ends] = -100
    return tokens, labels


def part(length, group):
    """What this rank has of so many: the first of two ranks has more."""
    cuts = [0, 5 * length // 8, length] if group else [0, length]
    rank = dist.get_rank(group) if group else 0
    return slice(cuts[rank], cuts[rank + 1])


def train(token_mesh=None, vocab_group=None, fsdp=False):
    """The loss of each step, summed up over the ranks that split the tokens."""
    token_group = token_mesh.get_group() if token_mesh else None
    ranks = dist.get_world_size(token_group) if token_group else 1
    columns, rows = part(VOCAB, vocab_group), part(SEQUENCES, token_group)
    torch.manual_seed(0)
    teacher, student = Model(1.0, columns), Model(0.1, columns, vocab_group)
    if token_mesh and fsdp:
        torch.distributed.fsdp.fully_shard(student, mesh=token_mesh)
    elif token_mesh:
        student = torch.nn.parallel.DistributedDataParallel(student, process_group=token_group)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    losses = []
    for step in range(STEPS):
        tokens, labels = (each[rows] for each in batch(step))
        with torch.no_grad():
            teacher_logits = teacher(tokens)
        groups = {"vocab_group": vocab_group, "token_group": token_group}
        loss = atkd.atkd_loss(student(tokens), teacher_logits, labels, **groups)
        # What averages gradients divides by the number of ranks.
        (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        if token_group:
            dist.all_reduce(whole, group=token_group)
        losses.append(whole.item())
    return losses


def process(rank, layout, fsdp, directory):
    """One of the processes: those of one row of the mesh split the vocabulary."""
    of_tokens, of_vocabulary = layout
    ranks = of_tokens * of_vocabulary
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(directory, f"store{layout}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    mesh = dist.init_device_mesh("cpu", layout, mesh_dim_names=("tokens", "vocabulary"))
    vocab_group = mesh["vocabulary"].get_group() if of_vocabulary > 1 else None
    losses = train(mesh["tokens"] if of_tokens > 1 else None, vocab_group, fsdp)
    if rank == 0:
        torch.save(losses, os.path.join(directory, str(layout)))
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fsdp", action="store_true")
    fsdp = parser.parse_args().fsdp
    with tempfile.TemporaryDirectory() as directory:
        for layout in LAYOUTS:
            multiprocessing.spawn(process, (layout, fsdp, directory), layout[0] * layout[1])
        results = [torch.load(os.path.join(directory, str(layout))) for layout in LAYOUTS]
    print("ranks of tokens x ranks of columns")
    print("step", *[f"{tokens} x {columns}".rjust(11) for tokens, columns in LAYOUTS])
    for step, losses in enumerate(zip(*results)):
        print(f"{step:4}", *[f"{loss:11.7f}" for loss in losses])


if __name__ == "__main__":
    main()
