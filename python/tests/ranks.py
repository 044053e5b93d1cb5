"""Four processes of one gloo group that wait for tasks, so that many tests share what it takes to start them.

A task is a function of `shard_tasks.py`, which each rank calls with `Here`, what it is told of the groups, and arguments.
"""

import contextlib
import datetime
import io
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

WORLD = 4
EXAMPLES = Path(__file__).parents[1] / "examples"
# (ranks that split the vocabulary, ranks that split the tokens). Rank `tp * d + t` has columns t and tokens d.
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)]


class Group(NamedTuple):
    vocabulary: object
    tokens: object
    columns_at: int
    tokens_at: int


class Here(NamedTuple):
    rank: int
    groups: dict
    """By layout: this rank's, or None if it has no part in it."""


def _groups(rank):
    import torch.distributed as dist

    groups = {}
    for tp, dp in LAYOUTS:
        of_columns = [dist.new_group([d * tp + t for t in range(tp)]) for d in range(dp)]
        of_tokens = [dist.new_group([d * tp + t for d in range(dp)]) for t in range(tp)]
        if rank < tp * dp:
            d, t = divmod(rank, tp)
            # One rank has groups of its own alone.
            alone = tp == dp == 1
            groups[tp, dp] = Group(
                of_columns[d] if tp > 1 or alone else None, of_tokens[t] if dp > 1 or alone else None, t, d
            )
    return groups


def _work(rank, store, connection):
    # First, because the parent's path, which a spawned process inherits, may hold the benchmarks, where another
    # `shards` lies.
    sys.path.insert(0, str(EXAMPLES))
    import shard_tasks
    import torch.distributed as dist

    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(WORLD)
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD, timeout=wait)
    here = Here(rank, _groups(rank))
    while True:
        try:
            task = connection.recv_bytes()
        except (EOFError, OSError):
            task = b""
        if not task:
            return
        name, arguments = torch.load(io.BytesIO(task), weights_only=False)
        try:
            result = True, getattr(shard_tasks, name)(here, **arguments)
        except BaseException:
            result = False, traceback.format_exc()
        to = io.BytesIO()
        torch.save(result, to)
        connection.send_bytes(to.getvalue())


class Ranks:
    """The processes. One that dies or hangs fails the test, and the next one gets new processes."""

    def __init__(self, directory):
        self.directory, self.started = directory, 0
        self.children, self.connections = [], []

    def start(self):
        self.started += 1
        context = multiprocessing.get_context("spawn")
        store = str(self.directory / f"store{self.started}")
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            child = context.Process(target=_work, args=(rank, store, theirs), daemon=True)
            child.start()
            theirs.close()
            self.children.append(child)
            self.connections.append(ours)

    def stop(self):
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")
            connection.close()
        for child in self.children:
            child.join(5)
            if child.is_alive():
                child.kill()
        self.children, self.connections = [], []

    def __call__(self, task, seconds=120, **arguments):
        """What the task returns on each rank."""
        if not self.children:
            self.start()
        to = io.BytesIO()
        torch.save((task, arguments), to)
        for connection in self.connections:
            connection.send_bytes(to.getvalue())
        results = []
        try:
            for rank, connection in enumerate(self.connections):
                assert connection.poll(seconds), f"rank {rank} has not answered in {seconds} s: the ranks hang"
                results.append(torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False))
        except BaseException:
            self.stop()
            raise
        for rank, (done, result) in enumerate(results):
            if not done:
                self.stop()
                raise AssertionError(f"rank {rank} raised\n{result}")
        return [result for _, result in results]
