"""How long until the first token? Cold, woken and awake, against the length of what was said before; a table and a plot.

    pip install -r bench/requirements.txt
    python examples/plot_first_token.py .models/smollm2-135m --output first-token.png

Of each length an agent reads a text of so many tokens (cold). It sleeps, is asked a short question, and wakes for it
(woken). It is asked again (awake). Each figure is the median of --runs.

How to read the plot: both axes are logarithmic. The cold line rises with the text, faster than in proportion once attention
outweighs the rest. The awake line is the price of the question alone; what it rises by is attending to more rows. The gap between
woken and awake is what waking costs: reading and checking the files, in proportion to their bytes. The gap between cold and woken
is what Torpor saves. Files come from the page cache here; after a reboot waking waits for the disk besides.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torpor

TEXT = Path(__file__).with_name("lighthouse-log.txt").read_text()
QUESTION = " What happened then?"


def text_of(length: int, begin: str) -> str:
    """A text of so many characters that begins unlike any other, so that nobody's rows are reused."""
    return (begin + TEXT * (length // len(TEXT) + 1))[:length]


def first_token(agent: torpor.Agent, prompt: str) -> tuple[float, int]:
    result = agent.turn(prompt, raw=True, max_tokens=1)
    return result.timing_ms.ttft, result.tokens.prompt


def measure(engine: torpor.Engine, length: int, runs: int) -> list[float]:
    """Milliseconds cold, woken, awake; and the tokens read cold, of texts of so many characters."""
    rows = []
    for run in range(runs):
        agent = engine.agent(f"agent-{length}-{run}")
        cold, read = first_token(agent, text_of(length, f"{run} of {length}: "))
        agent.sleep()
        woken, _ = first_token(agent, QUESTION)
        awake, _ = first_token(agent, QUESTION)
        agent.remove()
        rows.append((cold, woken, awake, read))
    return [statistics.median(column) for column in zip(*rows)]


def plot(points: list[list[float]], output: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 5))
    lengths = [point[3] for point in points]
    for column, (name, marker) in enumerate([("cold", "o"), ("woken", "s"), ("awake", "^")]):
        axes.plot(lengths, [point[column] for point in points], marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens said before", ylabel="milliseconds to the first token",
             title="Time to the first token")
    axes.set_xticks(lengths, [f"{length:.0f}" for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, or a repo id in the local Hugging Face cache")
    parser.add_argument("--tokens", default="256,512,1024,2048,4096", help="lengths of the text (256,512,1024,2048,4096)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", default="first-token.png")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as store, torpor.Engine(options.model, store) as engine:
        text_tokens = engine.turn(TEXT, raw=True, max_tokens=1, save="no").tokens.prompt  # warms up, too
        print("  tokens      cold     woken     awake   cold/woken")
        points = []
        for tokens in map(int, options.tokens.split(",")):
            points.append(measure(engine, len(TEXT) * tokens // text_tokens, options.runs))
            cold, woken, awake, read = points[-1]
            print(f"{read:>8.0f} {cold:>6.0f} ms {woken:>6.1f} ms {awake:>6.1f} ms {cold / woken:>10.0f}x")
    plot(points, options.output)
    print(f"The plot is in {options.output}.")


if __name__ == "__main__":
    main()
