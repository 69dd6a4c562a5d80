"""Streams of Python in several threads at once, under ThreadSanitizer. A test of the preset tsan (ctest), which preloads
the sanitizer into an interpreter that has none. Whatever it reports, of the module or of Torpor, fails it."""

import asyncio
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_tiny_model  # noqa: E402

import torpor  # noqa: E402

failures = []


def guarded(work):
    def run():
        try:
            work()
        except BaseException as error:  # which would end nothing but its thread
            failures.append(f"{work.__name__}: {error!r}")
    return run


def main(scratch):
    model = make_tiny_model(scratch / "model")
    with torpor.Engine(model, scratch / "store") as engine:
        def to_the_end():
            stream = engine.agent("ada").stream("hello", raw=True, max_tokens=24)
            assert "".join(stream) == stream.result.text

        def left_early():
            for _ in range(3):
                stream = engine.agent("bob").stream("hello", raw=True, max_tokens=1000)
                next(stream)
                stream.close()

        def dropped():
            for _ in range(3):
                stream = engine.agent("eve").stream("hello", raw=True, max_tokens=1000)
                next(stream)
                del stream

        def closed_by_another():
            stream = engine.agent("kim").stream("hello", raw=True, max_tokens=1000)
            next(stream)
            other = threading.Thread(target=stream.close)
            other.start()
            other.join()

        def awaited():
            async def read():
                lee = torpor.AsyncTextStream(engine.agent("lee").stream("hello", raw=True, max_tokens=24))
                text = "".join([piece async for piece in lee])
                assert (await lee.result()).text == text
                async with torpor.AsyncTextStream(engine.agent("lee").stream(" on", raw=True, max_tokens=1000)) as lee:
                    await anext(lee)
            asyncio.run(read())

        def saved_behind():
            for _ in range(4):
                engine.turn("a prompt without an agent", raw=True, max_tokens=4, save="behind")
                engine.agent("zoe").turn("hello", raw=True, max_tokens=4, save="behind")

        def looks():
            for _ in range(8):
                engine.agents()
                engine.memory_usage()

        threads = [threading.Thread(target=guarded(work))
                   for work in (to_the_end, left_early, dropped, closed_by_another, awaited, saved_behind, looks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(Path(directory))
    sys.exit("\n".join(failures) or None)
