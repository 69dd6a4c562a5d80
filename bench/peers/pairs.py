"""Alternating runs of Torpor and a peer: how disturbed each pair was, what the pairs say together, and their plot.

That runs alternate is not enough: llama.cpp's threads wait for each other by spinning, and lose far more than the share that
other processes take. So the share of all cores that went to others is measured with each pair, and those that were disturbed
least count, whatever their result.
"""

import os
import statistics
import sys
import time
from pathlib import Path

QUIET = 0.1  # a pair that lost more than this share of all cores to others is tried again


def busy_seconds():
    """CPU time that all processes have used since boot; None where that is not told."""
    try:
        user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8])
    except OSError:
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


class Others:
    """The share of all cores that processes other than the measured ones used since this was made; 0 where that is not told."""

    def __init__(self):
        self.busy, self.start = busy_seconds(), time.monotonic()

    def share(self, own_seconds):
        if self.busy is None:
            return 0.0
        others = busy_seconds() - self.busy - own_seconds
        return max(0.0, others / (time.monotonic() - self.start) / os.cpu_count())


def least_disturbed(attempt, runs):
    """Calls `attempt`, which gives {key: (ours, theirs)} and how disturbed it was, until `runs` were quiet, at most twice that
    often; keeps the `runs` least disturbed as (share, pairs). Ctrl-C ends it early; complete pairs count."""
    attempts = []
    try:
        while len(attempts) < 2 * runs and sum(share <= QUIET for share, _ in attempts) < runs:
            pairs, share = attempt()
            attempts.append((share, pairs))
            print(f"{len(attempts)}: " + ", ".join(f"{key if isinstance(key, str) else ' '.join(map(str, key))} {a:.4g} / {b:.4g} = {a / b:.2f}"
                                                   for key, (a, b) in pairs.items()) + f"; others {share:.0%}",
                  file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted: on to what comes next", file=sys.stderr)
    return sorted(attempts, key=lambda one: one[0])[:runs]


def by_key(attempts, results=None):
    """Per key a list of (ours, theirs, others' share), one of each run that counts; added to `results` if given."""
    results = {} if results is None else results
    for share, pairs in attempts:
        for key, pair in pairs.items():
            results.setdefault(key, []).append((*pair, share))
    return results


def summary(pairs, less_is_better=False):
    """Medians of both sides, how many times better Torpor is by them, and the lowest and highest of that in one pair."""
    ours, theirs, _ = (statistics.median(side) for side in zip(*pairs))
    better = (lambda a, b: b / a) if less_is_better else (lambda a, b: a / b)
    ratios = [better(a, b) for a, b, _ in pairs]
    return ours, theirs, better(ours, theirs), min(ratios), max(ratios)


def plot(bars, path, title, label, peer="llama.cpp", log=False):
    """`bars`: (label, ratio of the medians, lowest, highest, target) each."""
    try:
        import matplotlib
    except ImportError:
        print("No plot is drawn, for matplotlib is not installed; bench/peers/prepare brings it.", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 0.7 * len(bars) + 1.2), layout="constrained")
    for i, (name, ratio, low, high, target) in enumerate(bars):
        axes.barh(i, ratio, color="#3b6ea8", height=0.6, label=f"Torpor beside {peer}, medians" if i == 0 else None)
        axes.plot([low, high], [i, i], color="black", lw=1.2, label="lowest to highest pair" if i == 0 else None)
        axes.plot([target, target], [i - 0.38, i + 0.38], color="#c0392b", lw=2, label="target" if i == 0 else None)
        axes.annotate(f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x", (max(ratio, high, target), i), xytext=(4, 0),
                      textcoords="offset points", va="center")
    axes.axvline(1, color="gray", lw=0.8, ls=":")
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.invert_yaxis()
    if log:
        axes.set_xscale("log")
    axes.set_xlim(0.5 if log else 0, max(max(bar[1], bar[3], bar[4]) for bar in bars) * (1.6 if log else 1.15))
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)
