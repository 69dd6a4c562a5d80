"""Damage is found, never used: flips and cuts in every kind of store file, through the command line.

Every byte position of a small agent is covered by the store's own C++ test; here the whole program is in the loop, with
a sample: every place where the format changes meaning, and random ones between.
"""

import random
import struct

import pytest

from conftest import EXIT

KINDS = {"agent": lambda torpor: torpor.agent_file("ada"),
         "first segment": lambda torpor: sorted(torpor.segments(), key=str)[0],
         "last segment": lambda torpor: sorted(torpor.segments(), key=str)[-1]}


def positions(path, seed, n):
    """Boundaries of the header's parts and of the tensors, and `n` random places."""
    data = path.read_bytes()
    size = len(data)
    header = struct.unpack("<Q", data[:8])[0]
    start = 8 + header
    places = {0, 7, 8, 9, start - 1, start, size - 1}
    for mark in (b'"__metadata__"', b'"data_offsets"', b'"shape"', b'"dtype"', b'"tokens"'):
        found = data.find(mark, 0, start)
        if found >= 0:
            places.update((found, found + len(mark) + 1))
    places.update(random.Random(seed).randrange(size) for _ in range(n))
    return sorted(places)


def never_garbage(torpor, prompt=" more"):
    """The run answers from an intact prefix and says so, or stops with kCorruption."""
    turn = torpor.run("ada", prompt, "--raw", "--no-save")
    if turn.code == EXIT["corruption"]:
        turn.fails("corruption")
        return None
    turn.ok()
    assert turn.json["damage"] and turn.err.startswith("torpor: warning: "), turn.err
    assert turn.json["tokens"]["cached"] < 608
    return turn.json


def reported(torpor):
    result = torpor("verify", "ada", "--json")
    assert result.code == EXIT["corruption"], f"exit {result.code}: {result.out}{result.err}"
    [report] = result.json["agents"]
    assert report["problems"] and report["intact_tokens"] < 608
    return report


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_reported(ada, kind):
    path = KINDS[kind](ada)
    good = path.read_bytes()
    for i, place in enumerate(positions(path, kind, 12)):
        bad = bytearray(good)
        bad[place] ^= 1 << (i % 8)
        path.write_bytes(bad)
        reported(ada)
        if i % 6 == 0:
            never_garbage(ada)
    path.write_bytes(good)
    ada("verify").ok()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_reported(ada, kind):
    path = KINDS[kind](ada)
    good = path.read_bytes()
    for i, place in enumerate(positions(path, kind + " cut", 6)):
        path.write_bytes(good[:place])
        reported(ada)
        if i % 6 == 0:
            never_garbage(ada)
    path.write_bytes(good + b"\0")
    reported(ada)
    path.unlink()
    if kind != "agent":
        reported(ada)
        never_garbage(ada)


def test_a_huge_header_length_allocates_nothing(ada):
    path = ada.agent_file("ada")
    good = path.read_bytes()
    for length in (2**63, 2**64 - 1, 10**8 + 1, len(good), 0):
        path.write_bytes(struct.pack("<Q", length) + good[8:])
        reported(ada)
        never_garbage(ada)


def test_a_damaged_last_segment_leaves_the_first(ada):
    """The prefix that is intact is used, and the answer is that of an agent that ends there."""
    segments = ada("show", "ada", "--json").ok().json["segments"]
    path = next(path for path in ada.segments() if path.stem == segments[-1])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert reported(ada)["intact_tokens"] == 256
    turn = never_garbage(ada)
    assert turn["tokens"]["cached"] == 256
    # A saved turn heals the agent.
    ada.run("ada", " more", "--raw").ok()
    ada("verify").ok()


def test_a_damaged_agent_is_listed_and_can_be_removed(ada):
    ada.agent_file("ada").write_bytes(b"nonsense")
    [listed] = ada("ls", "--json").ok().json
    assert listed["damaged"]
    assert "damaged" in ada("ls").ok().out
    ada("show", "ada").fails("corruption")
    ada("rm", "ada").ok()
    assert ada("ls", "--json").ok().json == []
