"""A client that is cancelled while it waits for an answer, until the scripted server has noticed that one has gone."""

import asyncio

import httpx


def gone(url):
    body = {"model": "scripted", "messages": [{"role": "user", "content": "how many gone"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    return int(answer["choices"][0]["message"]["content"])


async def cancel(url, ask):
    """`ask()` gives a coroutine that asks the server to wait. One that is cancelled before it is sent is made again."""
    before, patience = gone(url), 0.1
    while gone(url) == before:
        task = asyncio.create_task(ask())
        await asyncio.wait([task], timeout=patience)
        assert not task.done(), task.exception()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        patience *= 2
