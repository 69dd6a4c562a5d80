"""Python processes killed while they save, and two that save one agent at once."""

import fcntl
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import mlx.core as mx
import mlx_lm.models.cache as mlx_cache
import pytest

from conftest import BIN, ROOT

import torpor

KILLS = int(os.environ.get("TORPOR_KILLS", 60))


def numbered(i):
    """A cache whose every row says which one it is: 300 to 660 tokens, so that segments and tail change."""
    cache = [mlx_cache.KVCache() for _ in range(2)]
    for layer in cache:
        layer.keys = mx.full((1, 2, 768, 32), i, mx.float16)
        layer.values, layer.offset = layer.keys + 1, 300 + i % 7 * 60
    mx.eval([(layer.keys, layer.values) for layer in cache])
    return cache


def killed_over_and_over(root, kills, seed):
    """Forks a saver and kills it, again and again; runs in a process of its own, whose only thread computes nothing else."""
    chance = random.Random(seed)
    caches = [numbered(i) for i in range(14)]
    torpor.CachePersistence(root).save_agent_cache("ada", caches[0], {"i": "0"})
    acknowledged = 0
    for kill in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            store = torpor.CachePersistence(root, durability="rename")
            for i in range(acknowledged + 1, acknowledged + 1000):
                cache = caches[i % len(caches)]
                store.save_agent_cache("ada", cache, {"i": str(i)}, tokens=range(i, i + cache[0].offset) if kill % 2 else None)
                os.write(writer, b"%d\n" % i)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as acks:
            said = [int(acks.readline()) for _ in range(kill % 4)]  # so many saves came to their end, however slow they are
            time.sleep(chance.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            said += [int(line) for line in acks.read().split()]
        acknowledged = said[-1] if said else acknowledged
        cache, metadata = torpor.CachePersistence(root).load_agent_cache("ada")
        i = int(metadata["i"])
        assert acknowledged <= i <= acknowledged + 1, f"kill {kill}: saved {acknowledged}, found {i}"
        expected = caches[i % len(caches)]
        for ours, theirs in zip(expected, cache, strict=True):
            n = ours.offset
            assert theirs.offset == n and mx.array_equal(theirs.keys[..., :n, :], ours.keys[..., :n, :]), f"kill {kill}: mixed rows"
            assert mx.array_equal(theirs.values[..., :n, :], ours.values[..., :n, :]), f"kill {kill}: mixed rows"
        acknowledged = i


def test_a_process_killed_while_it_saves_leaves_the_old_or_the_new_cache_whole(tmp_path):
    seed = random.randrange(1 << 30)
    script = f"import test_python_crash as t; t.killed_over_and_over({str(tmp_path / 'store')!r}, {KILLS}, {seed})"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests", capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, f"seed {seed}: {ended.stderr}"
    store = torpor.CachePersistence(tmp_path / "store")
    cache, _ = store.load_agent_cache("ada")
    store.save_agent_cache("ada", cache)  # nothing that was left behind stands in the way
    assert subprocess.run([BIN, "verify", "--store", store.root], capture_output=True).returncode == 0


def test_of_two_processes_that_save_one_agent_one_is_told_that_it_is_busy(tmp_path):
    store = torpor.CachePersistence(tmp_path / "store")
    store.save_agent_cache("ada", numbered(1))
    locks = store.root / ".locks"
    script = (f"import test_python_crash as t; "
              f"t.torpor.CachePersistence({str(store.root)!r}).save_agent_cache('ada', t.numbered(2), {{'by': 'the other'}})")
    with open(locks / ".store.lock", "r+") as everything, open(locks / "ada.lock", "r+") as agent:
        fcntl.flock(everything, fcntl.LOCK_EX)  # as gc does: the other process takes the agent, then waits in the middle of its save
        with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT / "tests", stderr=subprocess.PIPE, text=True) as other:
            while other.poll() is None:
                try:
                    fcntl.flock(agent, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    break
                fcntl.flock(agent, fcntl.LOCK_UN)
                time.sleep(0.05)  # longer than it waits for whoever looks at the lock
            with pytest.raises(torpor.BusyError, match="ada"):
                store.save_agent_cache("ada", numbered(3))
            fcntl.flock(everything, fcntl.LOCK_UN)
            assert other.wait() == 0, other.stderr.read()
    cache, metadata = store.load_agent_cache("ada")
    assert metadata == {"by": "the other"} and cache[0].keys[0, 0, 0, 0].item() == 2
    store.save_agent_cache("ada", numbered(3))


def save_many(worker, cache):
    """In a forked process, through the store that the parent opened. MLX computes nothing there: its threads are the parent's."""
    for i in range(40):
        torpor.save_agent_cache(f"worker-{worker}", cache, {"i": str(i)})


def forked_savers(root):
    os.environ["TORPOR_STORE"] = root
    caches = [numbered(i) for i in range(5)]
    torpor.save_agent_cache("parent", caches[0])
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=save_many, args=(i, caches[i])) for i in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    for i in range(1, 5):
        cache, metadata = torpor.load_agent_cache(f"worker-{i}")
        assert metadata["i"] == "39" and cache[0].keys[0, 0, 0, 0].item() == i


def test_forked_workers_save_at_once_through_the_store_that_their_parent_opened(tmp_path):
    script = f"import test_python_crash as t; t.forked_savers({str(tmp_path / 'store')!r})"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests", capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert not list((tmp_path / "store").rglob(".torpor-tmp-*")), "a save left something behind"


def forked_loaders(root):
    store = torpor.CachePersistence(root)
    ends = []
    for computed in (False, True):
        if computed:
            store.save_agent_cache("ada", numbered(3))
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # else it would wait for ever
            if not computed:
                store.save_agent_cache("ada", numbered(3))
            try:
                cache, _ = store.load_agent_cache("ada")
                os._exit(int(cache[0].keys[0, 0, 0, 0].item()))
            except torpor.InvalidArgumentError as error:
                os._exit(100 if "forked" in str(error) and "spawn" in str(error) else 101)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert ends == [3, 100]
    assert store.load_agent_cache("ada")[0][0].keys[0, 0, 0, 0].item() == 3


def test_a_load_in_a_process_forked_from_one_that_computed_is_an_error_and_else_a_load(tmp_path):
    script = f"import test_python_crash as t; t.forked_loaders({str(tmp_path / 'store')!r})"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests", capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
