"""Mixtures of experts of a real size, with random weights: how much memory one takes, and how fast it decodes.

    .venv/bin/python bench/experts.py memory [--dir DIR] [--torpor build/torpor]
    .venv/bin/python bench/experts.py speed [--dir DIR] [--torpor build/torpor] [--runs 5]

`memory` writes a model of Qwen3-30B-A3B's shape in 4 bits (17 GB; as much again is packed beside it, and packing wants
twice that free on the disk), lets `torpor run` answer 8 tokens, packed weights made and found, and prints the most
anonymous memory (RssAnon) that the process had: what the system can't drop. --keep leaves the files for the next run.

`speed` writes a model of 64 experts, of which a token takes 4 (2 GB), and prints decoded tokens per second (`torpor
bench`) over what reading the weights that a token needs allows: bytes of these over the machine's read bandwidth. The
bandwidth is the best of some runs in which threads of NumPy sum 1 GiB that no cache holds.

Tokenizer: the one of .models/qwen2.5-coder-0.5b. Weights are uniform in their 16 steps, scaled by 1/sqrt(columns).
"""

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from machine import cpu_name  # noqa: E402

GROUP, BITS = 64, 4
TOKENIZER = ROOT / ".models" / "qwen2.5-coder-0.5b"
COMMON = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "attention_bias": False,
    "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 40960,
    "vocab_size": 151936, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "bos_token_id": 151643, "eos_token_id": 151645,
    "quantization": {"group_size": GROUP, "bits": BITS},
}
SHAPES = {
    "memory": {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
               "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    "speed": {"hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4,
              "intermediate_size": 4096, "moe_intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 4},
}


class Tensors:
    """Names, dtypes and shapes first, then bytes: the file is written without ever being whole in memory."""

    def __init__(self):
        self.all = []
        self.seed = np.random.default_rng(1)
        self.codes = self.seed.integers(0, 256, 1 << 24, dtype=np.uint8)

    def add(self, name, dtype, shape, make):
        self.all.append((name, dtype, shape, make))

    def ones(self, name, size):
        self.add(name, "BF16", [size], lambda: np.full(size, 0x3F80, np.uint16))

    def linear(self, name, rows, columns, experts=None):
        lead = [experts] if experts else []
        scale = 1 / (4.6 * columns**0.5)  # the 16 steps deviate by 4.6
        groups = [*lead, rows, columns // GROUP]

        def codes():
            size = (experts or 1) * rows * columns * BITS // 8
            begin = int(self.seed.integers(0, self.codes.size))
            return np.resize(np.roll(self.codes, -begin), size)

        self.add(f"{name}.weight", "U32", [*lead, rows, columns * BITS // 32], codes)
        self.add(f"{name}.scales", "BF16", groups, lambda: filled(groups, scale))
        self.add(f"{name}.biases", "BF16", groups, lambda: filled(groups, -7.5 * scale))

    def floats(self, name, rows, columns):
        self.add(name, "BF16", [rows, columns],
                 lambda: bf16(self.seed.standard_normal((rows, columns)) / columns**0.5))

    def write(self, path):
        widths = {"U32": 4, "BF16": 2}
        header, at = {"__metadata__": {"format": "mlx"}}, 0
        for name, dtype, shape, _ in self.all:
            size = int(np.prod(shape)) * widths[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for _, _, _, make in self.all:
                out.write(make().tobytes())
        return at


def bf16(values):
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def filled(shape, value):
    return np.full(shape, bf16([value])[0], np.uint16)


def make_model(directory, shape):
    config = COMMON | shape
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    tensors = Tensors()
    tensors.linear("model.embed_tokens", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        tensors.ones(name + "input_layernorm.weight", hidden)
        tensors.ones(name + "post_attention_layernorm.weight", hidden)
        tensors.ones(name + "self_attn.q_norm.weight", head)
        tensors.ones(name + "self_attn.k_norm.weight", head)
        tensors.linear(name + "self_attn.q_proj", queries, hidden)
        tensors.linear(name + "self_attn.k_proj", keys, hidden)
        tensors.linear(name + "self_attn.v_proj", keys, hidden)
        tensors.linear(name + "self_attn.o_proj", hidden, queries)
        tensors.floats(name + "mlp.gate.weight", config["num_experts"], hidden)
        experts, inner = config["num_experts"], config["moe_intermediate_size"]
        tensors.linear(name + "mlp.switch_mlp.gate_proj", inner, hidden, experts)
        tensors.linear(name + "mlp.switch_mlp.up_proj", inner, hidden, experts)
        tensors.linear(name + "mlp.switch_mlp.down_proj", hidden, inner, experts)
    tensors.ones("model.norm.weight", hidden)
    tensors.linear("lm_head", config["vocab_size"], hidden)
    directory.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / file, directory)
    size = tensors.write(directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    print(f"{directory}: {size / 1e9:.1f} GB")


def anonymous_bytes(pid):
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def answer(torpor, model, environment):
    """The command's text, its seconds and the most anonymous memory that it had."""
    began, most = time.monotonic(), 0
    process = subprocess.Popen([torpor, "run", "--model", model, "--prompt", "Hi", "--raw", "--max-tokens", "8",
                                "--json"], stdout=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None:
        most = max(most, anonymous_bytes(process.pid))
        time.sleep(0.02)
    text = process.stdout.read()
    if process.returncode:
        sys.exit(f"torpor run failed with {process.returncode}")
    return json.loads(text), time.monotonic() - began, most


def memory(torpor, model, environment):
    for start in ("packing", "packed"):
        result, seconds, most = answer(torpor, model, environment)
        print(f"{start}: {result['tokens']['generated']} tokens in {seconds:.1f} s; "
              f"at most {most / 1e9:.2f} GB anonymous")


def read_bandwidth(threads):
    """Bytes per second that `threads` threads sum."""
    parts = [np.ones((1 << 30) // threads // 8, np.uint64) for _ in range(threads)]
    best = 0.0
    for _ in range(8):
        workers = [threading.Thread(target=part.sum) for part in parts]
        began = time.monotonic()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, (1 << 30) / (time.monotonic() - began))
    return best


def token_bytes(shape):
    """Bytes of the weights that one token reads."""
    config = COMMON | shape
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = 2 * hidden * queries + 2 * hidden * keys
    experts = 3 * config["num_experts_per_tok"] * hidden * config["moe_intermediate_size"]
    packed = config["num_hidden_layers"] * (attention + experts) + config["vocab_size"] * hidden
    router = config["num_hidden_layers"] * config["num_experts"] * hidden * 2
    return packed * (BITS + 32 / GROUP) / 8 + router


def speed(torpor, model, environment, runs):
    size = token_bytes(SHAPES["speed"])
    ratios = []
    for _ in range(runs):
        bandwidth = read_bandwidth(os.cpu_count())
        said = subprocess.run([torpor, "bench", "--model", model, "--prefill", "32", "--decode", "64", "--depth", "0",
                               "--runs", "1", "--json"], check=True, stdout=subprocess.PIPE, env=environment).stdout
        rate = json.loads(said)["decode"][0]["tokens_per_s"]
        ratios.append(rate * size / bandwidth)
        print(f"{rate:.1f} tokens/s of {size / 1e6:.0f} MB: {rate * size / 1e9:.1f} of {bandwidth / 1e9:.1f} GB/s")
    print(f"{cpu_name()}: median {statistics.median(ratios):.2f} of what reading allows "
          f"({min(ratios):.2f} to {max(ratios):.2f}; goal 0.7)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=SHAPES)
    parser.add_argument("--dir", type=Path, default=ROOT / "bench" / "out" / "experts")
    parser.add_argument("--torpor", default=str(ROOT / "build" / "torpor"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    model, cache = arguments.dir / arguments.what, arguments.dir / f"{arguments.what}-cache"
    environment = os.environ | {"TORPOR_CACHE": str(cache)}
    try:
        if not (model / "config.json").exists():
            shutil.rmtree(model, ignore_errors=True)
            make_model(model, SHAPES[arguments.what])
        if arguments.what == "memory":
            memory(arguments.torpor, model, environment)
        else:
            speed(arguments.torpor, model, environment, arguments.runs)
    finally:
        if not arguments.keep:
            shutil.rmtree(model, ignore_errors=True)
            shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    main()
