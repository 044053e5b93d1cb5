"""Sparse teachers on disk."""

import math
import os
import pickle
import subprocess
import sys

import atkd
import pytest
import torch
from torch.utils.data import DataLoader


def teacher(*shape, seed=0, dtype=torch.float32, ignored=True):
    random = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(shape, generator=random)).to(dtype)
    labels = torch.randint(shape[-1], shape[:-1], generator=random)
    if ignored:
        labels[torch.rand(shape[:-1], generator=random) < 0.25] = -100
    return logits, labels


def assert_of(rows, logits, labels, top_k, temperature=1.0, error=1e-2):
    """The rows are those of the logits, from the definitions in float64."""
    log_p = (logits.double().flatten(0, -2) / temperature).log_softmax(-1)
    labels = labels.flatten()
    values, indices = log_p.topk(min(top_k, log_p.shape[-1]))
    assert torch.equal(rows.labels, labels) and rows.labels.dtype == torch.int64
    assert rows.indices.dtype == torch.int32 and rows.log_probs.dtype == torch.float32
    k = indices.shape[-1]
    assert torch.equal(rows.indices[:, :k].long().sort().values, indices.sort().values)
    assert (rows.indices[:, k:] == -1).all() and (rows.log_probs[:, k:] == -torch.inf).all()
    exact = log_p.gather(-1, rows.indices[:, :k].long())
    assert (rows.log_probs[:, :k] - exact).abs().max() <= error
    valid = labels >= 0
    target = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(rows.target_log_prob[valid].double(), target[valid], rtol=1e-6, atol=1e-9)
    assert (rows.target_log_prob[~valid] == -torch.inf).all()
    rest = log_p.exp().scatter(-1, indices, 0.0)
    rest[valid] = rest[valid].scatter(-1, labels[valid].unsqueeze(-1), 0.0)
    assert torch.allclose(rows.tail_mass.double(), rest.sum(-1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("encoding", ["f16", "u8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_was_written_is_read(tmp_path, encoding, dtype):
    logits, labels = teacher(3, 40, 700, dtype=dtype)
    settings = {"vocab_size": 700, "top_k": 20, "temperature": 2.0, "encoding": encoding}
    path = tmp_path / "cache"
    with atkd.TeacherCacheWriter(path, **settings, fingerprint="f", shard_tokens=50) as writer:
        assert writer.tokens == 0 and not writer.complete
        writer.write(logits[0], labels[0])
        writer.write(logits[1:], labels[1:].int())
        assert writer.tokens == 120
    cache = atkd.TeacherCache(path)
    assert len(cache) == 120 and cache.complete
    assert {name: getattr(cache, name) for name in settings} == settings
    assert cache.fingerprint == "f"
    entry = 2 if encoding == "f16" else 1
    assert cache.bytes_per_token == 12 + 25 + 20 * entry + (8 if encoding == "u8" else 0)
    rows = cache[:]
    assert isinstance(rows, atkd.TeacherRows)
    assert_of(rows, logits, labels, 20, 2.0, error=cache.largest_error + 1e-5)
    assert cache.largest_error < 0.03
    assert abs(cache.mean_tail_mass() - rows.tail_mass.double().mean()) < 1e-9
    mass = rows.log_probs.double().exp().sum(-1) + rows.tail_mass
    among = (rows.indices == rows.labels.unsqueeze(-1)).any(-1)
    mass += torch.where(among, 0.0, rows.target_log_prob.double().exp())
    assert (mass - 1).abs().max() < 4e-6
    assert "not complete" not in repr(cache) and "120 tokens" in repr(cache)


def test_ranges_and_single_tokens(tmp_path):
    logits, labels = teacher(30, 50)
    with atkd.TeacherCacheWriter(tmp_path, vocab_size=50, top_k=4, shard_tokens=8) as writer:
        writer.write(logits, labels)
    cache = atkd.TeacherCache(str(tmp_path))
    whole = cache[0:30]
    for part in (slice(7, 17), slice(-3, None), slice(20, 10), slice(25, 1000)):
        for column, expected in zip(cache[part], whole):
            assert torch.equal(column, expected[part])
    for token in (0, 8, 29, -1, -30, torch.tensor(5)):
        for column, expected in zip(cache[token], whole):
            assert torch.equal(column, expected[token])
    assert cache[3].indices.shape == (4,) and cache[3].labels.shape == ()
    for token in (30, -31, 2**70):
        with pytest.raises(IndexError, match=f"token {token} .* has 30"):
            cache[token]
    with pytest.raises(ValueError, match="step 2"):
        cache[::2]
    assert len(list(cache)) == 30


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("context", [None, "spawn"])
def test_a_data_loader_s_workers_read_it(tmp_path, monkeypatch, workers, context):
    if context and not workers:
        pytest.skip("no workers to spawn")
    logits, labels = teacher(32, 50)
    monkeypatch.chdir(tmp_path)
    with atkd.TeacherCacheWriter("cache", vocab_size=50, top_k=4, shard_tokens=10) as writer:
        writer.write(logits, labels)
    cache = atkd.TeacherCache("cache")
    monkeypatch.chdir("/")
    assert torch.equal(pickle.loads(pickle.dumps(cache))[3:9].indices, cache[3:9].indices)
    loader = DataLoader(cache, batch_size=8, num_workers=workers, multiprocessing_context=context)
    batches = list(loader)
    assert len(batches) == 4 and isinstance(batches[0], atkd.TeacherRows)
    for column, expected in zip(zip(*batches), cache[:]):
        assert torch.equal(torch.cat(column), expected)


def test_an_interrupted_run_goes_on(tmp_path):
    logits, labels = teacher(25, 50)
    settings = {"vocab_size": 50, "top_k": 4}
    with pytest.raises(KeyboardInterrupt):
        with atkd.TeacherCacheWriter(tmp_path, **settings) as writer:
            writer.write(logits[:7], labels[:7])
            raise KeyboardInterrupt
    cache = atkd.TeacherCache(tmp_path)
    assert len(cache) == 7 and not cache.complete and "not complete" in repr(cache)
    with pytest.raises(ValueError, match="top_k is 5.*begun with 4"):
        atkd.TeacherCacheWriter(tmp_path, vocab_size=50, top_k=5)
    with atkd.TeacherCacheWriter(tmp_path, **settings) as writer:
        assert writer.tokens == 7
        with pytest.raises(RuntimeError, match="another program writes"):
            atkd.TeacherCacheWriter(tmp_path, **settings)
        writer.write(logits[7:], labels[7:])
        writer.finish()
        with pytest.raises(ValueError, match="closed"):
            writer.write(logits, labels)
    cache = atkd.TeacherCache(tmp_path)
    assert cache.complete
    assert_of(cache[:], logits, labels, 4)
    with atkd.TeacherCacheWriter(tmp_path, **settings) as writer:
        assert writer.complete and writer.tokens == 25
        with pytest.raises(ValueError, match="complete with 25 tokens"):
            writer.write(logits, labels)


KILLED = """
import os, signal, sys
import atkd, torch
writer = atkd.TeacherCacheWriter(sys.argv[1], vocab_size=50, top_k=4, shard_tokens=10)
logits, labels = torch.load(sys.argv[2])
writer.write(logits[:27], labels[:27])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on(tmp_path):
    logits, labels = teacher(35, 50)
    torch.save((logits, labels), tmp_path / "logits")
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, cache, tmp_path / "logits"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment).returncode == -9
    assert len(os.listdir(cache)) == 3
    assert len(atkd.TeacherCache(cache)) == 20
    with atkd.TeacherCacheWriter(cache, vocab_size=50, top_k=4, shard_tokens=10) as writer:
        assert writer.tokens == 20
        writer.write(logits[20:], labels[20:])
    assert_of(atkd.TeacherCache(cache)[:], logits, labels, 4)
    assert len(os.listdir(cache)) == 4


def test_rows_of_an_inference_server(tmp_path):
    logits, labels = teacher(2, 9, 100)
    log_p = logits.double().log_softmax(-1)
    values, indices = log_p.topk(5)
    target = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    flipped = indices.flip(-1), values.flip(-1)
    rest = log_p.exp().scatter(-1, indices, 0.0)
    valid = labels >= 0
    rest[valid] = rest[valid].scatter(-1, labels[valid].unsqueeze(-1), 0.0)
    with atkd.TeacherCacheWriter(tmp_path / "a", vocab_size=100, top_k=8) as writer:
        writer.write_rows(*flipped, target, labels)
    with atkd.TeacherCacheWriter(tmp_path / "b", vocab_size=100, top_k=8) as writer:
        rows = (indices.int(), values.float(), target.float(), labels.int())
        writer.write_rows(*rows, tail_mass=rest.sum(-1))
    with atkd.TeacherCacheWriter(tmp_path / "c", vocab_size=100, top_k=5) as writer:
        writer.write(logits, labels)
    derived, given, expected = (atkd.TeacherCache(tmp_path / name)[:] for name in "abc")
    for rows in (derived, given):
        assert (rows.indices[:, 5:] == -1).all()
        assert torch.equal(rows.indices[:, :5], expected.indices)
        assert torch.allclose(rows.log_probs[:, :5], expected.log_probs, atol=1e-6)
        assert torch.allclose(rows.target_log_prob, expected.target_log_prob)
        assert torch.allclose(rows.tail_mass, expected.tail_mass, atol=1e-6)
        assert torch.equal(rows.labels, expected.labels)


def test_rows_without_targets(tmp_path):
    """The labels' log-probabilities are then those of the entries."""
    logits, labels = teacher(40, 100)
    log_p = logits.log_softmax(-1)
    values, indices = log_p.topk(6)
    labels[::3] = indices[::3, 4]
    labels[~(indices == labels[:, None]).any(-1)] = -100
    own = log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    assert 10 < (labels >= 0).sum() < 40
    for name, target in [("a", own), ("b", None)]:
        with atkd.TeacherCacheWriter(tmp_path / name, vocab_size=100, top_k=6) as writer:
            writer.write_rows(indices, values, target, labels)
    for one, other in zip(*(atkd.TeacherCache(tmp_path / name)[:] for name in "ab")):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("with_tail", [False, True])
def test_rows_in_half_precision(tmp_path, dtype, tolerance, with_tail):
    """What their rounding makes of the mass is divided out, though it is more than what is float32's rounding."""
    logits, labels = teacher(300, 20)
    log_p = logits.log_softmax(-1)
    values, indices = log_p.topk(20)
    target = log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    off = (values.to(dtype).double().exp().sum(-1) - 1).abs()
    assert off.max() > 1e-4
    tail = torch.zeros(300, dtype=dtype) if with_tail else None
    with atkd.TeacherCacheWriter(tmp_path / "a", vocab_size=20, top_k=20) as writer:
        writer.write_rows(indices, values.to(dtype), target.to(dtype), labels, tail)
    rows = atkd.TeacherCache(tmp_path / "a")[:]
    valid = labels >= 0
    assert ((rows.target_log_prob - target)[valid].abs() <= tolerance * target[valid].abs().clamp(min=1)).all()
    others = rows.log_probs.double().exp().masked_fill(rows.indices == rows.labels[:, None], 0).sum(-1)
    mass = others + rows.target_log_prob.double().exp() + rows.tail_mass
    # Entries are in float16.
    assert ((mass - 1)[valid].abs() < 2e-3).all()


def whole_rows(dtype, without_label, with_tail, with_target=True):
    """The arguments of `write_rows` for tokens of which the whole vocabulary is known, and the logits."""
    logits, labels = teacher(300, 20)
    labels[::7] = logits[::7].argmax(-1)
    indices = torch.arange(20).expand(300, 20)
    if without_label:
        labels = labels.where(labels >= 0, 3)
        others = (indices != labels[:, None]).nonzero()[:, 1].view(300, 19)
        indices = torch.cat([others, torch.full((300, 1), -1)], -1)
    log_p = logits.log_softmax(-1).to(dtype)
    target = log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0] if with_target else None
    tail = torch.zeros(300, dtype=dtype) if with_tail else None
    return [indices, log_p.gather(-1, indices.clamp(min=0)), target, labels, tail], logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("without_label, with_target", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("with_tail", [False, True])
def test_rows_of_the_whole_vocabulary(tmp_path, dtype, without_label, with_target, with_tail):
    """What rounding leaves of 1 goes to no tail, since there is no token left."""
    rows, logits = whole_rows(dtype, without_label, with_tail, with_target)
    if dtype in (torch.float32, torch.float64):
        # As far as they may be, which is less for float32's rounding in training.
        for column in rows[1:3]:
            if column is not None:
                column -= 9e-5
    with atkd.TeacherCacheWriter(tmp_path, vocab_size=20, top_k=20) as writer:
        writer.write_rows(*rows)
    cache = atkd.TeacherCache(tmp_path)
    read = cache[:]
    assert (read.tail_mass == 0).all()
    student = teacher(300, 20, seed=1)[0]
    loss = atkd.sparse_atkd_loss(
        student, read.indices, read.log_probs, read.labels, target_log_prob=read.target_log_prob
    )
    dense = atkd.atkd_loss(student, logits, read.labels)
    off = cache.largest_error + {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-4)
    assert abs(loss - dense) <= off * dense


def test_rows_of_the_whole_vocabulary_without_all_of_the_mass(tmp_path):
    (indices, log_probs, target, labels, _), _ = whole_rows(torch.float32, False, False)
    labels[4], labels[5] = -100, 2
    writer = atkd.TeacherCacheWriter(tmp_path, vocab_size=20, top_k=20)
    writer.write_rows(indices, log_probs, None, labels)
    for dtype, most, mass, shown in [
        (torch.float32, "0.0001", 0.9998, "0.9998"),
        (torch.float32, "0.0001", 0.5, "0.5"),
        (torch.float16, "0.01", 0.5, "0.(49|50)"),
        (torch.bfloat16, "0.03", 0.5, "0.(49|50)"),
        (torch.float32, "0.0001", 1.5, "1.5"),
    ]:
        changed = log_probs.clone()
        # An ignored token has no distribution.
        changed[4:6] += math.log(mass)
        words = f"token 305: its probabilities add up to {shown}.* vocabulary of 20.*but for the {most} that"
        with pytest.raises(ValueError, match=words):
            writer.write_rows(indices, changed.to(dtype), None, labels)
        if mass == 0.5:
            tail = torch.zeros(300)
            tail[5] = 0.5
            with pytest.raises(ValueError, match=words):
                writer.write_rows(indices, changed.to(dtype), None, labels, tail)
    with pytest.raises(ValueError, match="token 300: its probabilities add up to 1.5"):
        writer.write_rows(indices, log_probs, None, labels.clamp(min=0), torch.full((300,), 0.5))
    valid = labels.clamp(min=0)
    shifted = log_probs.gather(-1, valid.roll(1)[:, None])[:, 0]
    with pytest.raises(ValueError, match="token 30.: the target's log-probability is .* in the entry of its label"):
        writer.write_rows(indices, log_probs, shifted, valid)
    assert writer.tokens == 300


def test_rows_some_of_which_are_whole(tmp_path):
    """The others keep their tail."""
    rows, logits = whole_rows(torch.float32, False, False)
    indices, log_probs, target, labels, _ = rows
    indices = indices.clone()
    indices[::2, 5] = -1
    labels[::2] = labels[::2].where(labels[::2] != 5, 6)
    target = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    with atkd.TeacherCacheWriter(tmp_path, vocab_size=20, top_k=20) as writer:
        writer.write_rows(indices, log_probs, target, labels)
    tail = atkd.TeacherCache(tmp_path)[:].tail_mass
    assert (tail[1::2] == 0).all()
    torch.testing.assert_close(tail[::2], log_probs[::2, 5].exp(), rtol=1e-3, atol=1e-6)


def test_vocabularies_that_are_padded_or_small(tmp_path):
    logits, labels = teacher(11, 20)
    padded = torch.cat((logits, torch.full((11, 4), 99.0)), -1)
    with atkd.TeacherCacheWriter(tmp_path, vocab_size=20) as writer:
        writer.write(padded, labels)
    cache = atkd.TeacherCache(tmp_path)
    assert cache.top_k == 64
    assert_of(cache[:], logits, labels, 64)
    assert (cache[:].tail_mass == 0).all()


def test_a_teacher_that_is_sure(tmp_path):
    """Float32's 1 - p is 0 for all of these, but none is subnormal there, which a process may flush to 0."""
    logits = torch.tensor([[80.0, 0.0, 1.0, -5.0], [0.0, 20.0, -20.0, -30.0]])
    labels = torch.tensor([0, 1])
    with atkd.TeacherCacheWriter(tmp_path, vocab_size=4, top_k=2) as writer:
        writer.write(logits, labels)
    rows = atkd.TeacherCache(tmp_path)[:]
    z = logits.double()
    log_p = -torch.log1p((z[0, 1:] - 80).exp().sum()), -torch.log1p((z[1, [0, 2, 3]] - 20).exp().sum())
    assert torch.allclose(rows.target_log_prob.double(), torch.stack(log_p), rtol=1e-6, atol=0)
    tail = (torch.tensor([0.0, -20.0]) - torch.tensor([80.0, 20.0])).double().exp()
    tail += (torch.tensor([-85.0, -50.0])).double().exp()
    assert torch.allclose(rows.tail_mass.double(), tail, rtol=1e-6, atol=0)


def test_rows_without_a_distribution(tmp_path):
    logits, labels = teacher(4, 20, ignored=False)
    logits[1], labels[1] = torch.nan, -100
    logits[2], labels[2] = -torch.inf, -100
    logits[3, 5:] = -torch.inf
    labels[3] = 7
    writer = atkd.TeacherCacheWriter(tmp_path, vocab_size=20, top_k=8)
    writer.write(logits, labels)
    with pytest.raises(ValueError, match="token 5: .* NaN"):
        writer.write(logits, labels.clamp(min=0))
    for bad in (torch.inf, torch.nan):
        logits[0, 3] = bad
        with pytest.raises(ValueError, match="token 4: .* NaN"):
            writer.write(logits, labels)
    writer.finish()
    rows = atkd.TeacherCache(tmp_path)[:]
    assert len(rows.labels) == 4
    assert (rows.indices[1:3] == -1).all() and (rows.tail_mass[1:3] == 1).all()
    assert (rows.indices[3, :5] >= 0).all() and (rows.indices[3, 5:] == -1).all()
    assert rows.target_log_prob[3] == -torch.inf and rows.tail_mass[3] == 0


def test_what_does_not_fit_is_refused(tmp_path):
    logits, labels = teacher(6, 20)
    with pytest.raises(ValueError, match="vocab_size is 0"):
        atkd.TeacherCacheWriter(tmp_path, vocab_size=0)
    with pytest.raises(ValueError, match="top_k is 2000.*1024"):
        atkd.TeacherCacheWriter(tmp_path, vocab_size=20, top_k=2000)
    with pytest.raises(ValueError, match='encoding is "f8", but must be "f16" or "u8"'):
        atkd.TeacherCacheWriter(tmp_path, vocab_size=20, encoding="f8")
    with pytest.raises(ValueError, match="shard_tokens is 0"):
        atkd.TeacherCacheWriter(tmp_path, vocab_size=20, shard_tokens=0)
    writer = atkd.TeacherCacheWriter(tmp_path, vocab_size=20, top_k=3)
    with pytest.raises(ValueError, match=r"logits are .*\[6, 19\].* V = 20"):
        writer.write(logits[:, :19], labels)
    with pytest.raises(ValueError, match="logits are torch.int64"):
        writer.write(logits.long(), labels)
    with pytest.raises(ValueError, match=r"labels are \[5\], but must be \[6\]"):
        writer.write(logits, labels[:5])
    with pytest.raises(TypeError, match="labels are torch.float32"):
        writer.write(logits, labels.float())
    with pytest.raises(TypeError, match="labels are a NoneType"):
        writer.write(logits, None)
    with pytest.raises(TypeError, match="logits are a list"):
        writer.write(logits.tolist(), labels)
    labels[4] = 20
    with pytest.raises(ValueError, match="token 4: its label is 20, but must be below"):
        writer.write(logits, labels)
    assert writer.tokens == 0
    labels[4] = 1
    indices, log_probs = torch.zeros(6, 1).long(), torch.full((6, 1), -1.0)
    target = torch.full((6,), -2.0)
    rows = {"indices": indices, "log_probs": log_probs, "target_log_prob": target, "labels": labels}
    for changes, exception, words in [
        ({"indices": indices.float()}, TypeError, "indices are torch.float32"),
        ({"indices": [[0]]}, TypeError, "indices are a list, but must be a torch.Tensor of int32 or int64"),
        ({"labels": None}, TypeError, "labels are a NoneType, but must be a torch.Tensor of int64 or int32"),
        ({"labels": [1] * 6}, TypeError, "labels are a list"),
        ({"indices": indices[:, 0]}, ValueError, r"indices are \[6\]"),
        ({"indices": indices.expand(6, 4)}, ValueError, r"\[6, 4\].* 1 to 3"),
        ({"indices": indices + 2**40}, ValueError, "token 0: an index is 2147483647"),
        ({"indices": indices - 2**40}, ValueError, "token 0: an index is -2"),
        ({"log_probs": log_probs.long()}, TypeError, "log_probs is torch.int64"),
        ({"log_probs": None}, TypeError, "log_probs is NoneType"),
        ({"target_log_prob": None, "labels": labels + 1}, ValueError, "label of token 0, .* is not among its 1 indices"),
        ({"log_probs": log_probs.half() + 1}, ValueError, "probabilities add up to"),
        ({"log_probs": log_probs[:3]}, ValueError, r"log_probs is \[3, 1\].*\[6, 1\]"),
        ({"target_log_prob": log_probs}, ValueError, r"target_log_prob is \[6, 1\].*\[6\]"),
        ({"tail_mass": target[:1]}, ValueError, r"tail_mass is \[1\]"),
        ({"labels": labels[:2]}, ValueError, r"labels are \[2\]"),
        ({"log_probs": log_probs + 2}, ValueError, "log-probability of 0 is 1"),
    ]:
        with pytest.raises(exception, match=words):
            writer.write_rows(**{**rows, **changes})
    assert writer.tokens == 0


def test_folders_without_a_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        atkd.TeacherCache(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no teacher cache"):
        atkd.TeacherCache(tmp_path)
    (tmp_path / "teacher-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="teacher-00000.* no whole safetensors"):
        atkd.TeacherCache(tmp_path)


def test_a_progress_bar(tmp_path, capsys):
    pytest.importorskip("tqdm")
    logits, labels = teacher(6, 20)
    with atkd.TeacherCacheWriter(tmp_path, vocab_size=20, progress=12) as writer:
        writer.write(logits, labels)
        writer.write(logits, labels)
    assert "12.0/12.0" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_logits_on_a_device(tmp_path):
    logits, labels = teacher(30, 500)
    with atkd.TeacherCacheWriter(tmp_path, vocab_size=500, top_k=9) as writer:
        writer.write(logits.cuda(), labels.cuda())
    assert_of(atkd.TeacherCache(tmp_path)[:], logits, labels, 9)
