"""mlx-lm's batch generator with a memory: several conversations in one batch, each kept. Torpor's five lines are
marked.

    python examples/mlx_lm_batch.py MODEL "I am Ada." "I am Bob. I live in a lighthouse."
    python examples/mlx_lm_batch.py MODEL " And I like" " And I like"

MODEL is a model directory. The caches are kept in $TORPOR_STORE, else ~/.agent_caches. Each prompt is a conversation of
its own, by its place; $MAX_TOKENS is the number of tokens (32).
"""

import os
import sys

import mlx_lm
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

import torpor  # 1

model, tokenizer = mlx_lm.load(sys.argv[1])
store = torpor.CachePersistence(model=sys.argv[1])  # 2
kept = {agent["agent_id"] for agent in store.list_cached_agents()}  # 3
names = [f"batch{i}" for i in range(len(sys.argv) - 2)]
caches = [store.load_agent_cache(name)[0] if name in kept else make_prompt_cache(model) for name in names]  # 4
held = [torpor.get_cache_size(cache) for cache in caches]
prompts = [tokenizer.encode(text, add_special_tokens=n == 0) for text, n in zip(sys.argv[2:], held)]

batch = BatchGenerator(model, stop_tokens=[[token] for token in tokenizer.eos_token_ids])
uids = batch.insert(prompts, [int(os.environ.get("MAX_TOKENS", 32))] * len(prompts), caches=caches)
answers: dict[int, list[int]] = {uid: [] for uid in uids}
while responses := batch.next_generated():
    for response in responses:
        answers[response.uid].append(response.token)
        if response.finish_reason:
            store.save_agent_cache(names[uids.index(response.uid)], response.prompt_cache)  # 5
batch.close()
for name, uid, n, prompt in zip(names, uids, held, prompts):
    print(f"{name}: {tokenizer.decode(answers[uid])}")
    print(f"[{n} tokens held before, {len(prompt)} read]", file=sys.stderr)
