"""Tiny models as GGUF files: names by the package gguf, what is reordered or changed by llama.cpp's converter."""

import json
import math

import gguf
import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}")



def byte_tokenizer(directory):
    """A tokenizer.json of 128 tokens: the ASCII characters, as ByteLevel writes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)[:128]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return alphabet


def tensors_of(directory, config):
    """As f32."""
    given = {}
    for path in sorted(directory.glob("*.safetensors")):
        given |= mx.load(str(path))
    tensors, of_all = {}, config.get("quantization", {})
    quantization = {key: of_all[key] for key in ("group_size", "bits", "mode") if of_all}
    for name, value in given.items():
        module = name.removesuffix(".weight")
        if (scales := given.get(f"{module}.scales")) is not None:
            biases = given.get(f"{module}.biases")
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            value = mx.dequantize(value, scales, biases, **quantization)
        if not name.endswith((".scales", ".biases")):
            tensors[name] = np.array(value.astype(mx.float32))
    return tensors


def neighbours(rows, heads):
    """As llama.cpp's converter permutes Llama's q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(config):
    """As llama.cpp's converter computes them."""
    scaling, dim = config["rope_scaling"], config["hidden_size"] // config["num_attention_heads"]
    frequencies = 1.0 / config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for frequency in frequencies:
        length = 2 * math.pi / frequency
        if length < original / high:
            factors.append(1)
        elif length > original / low:
            factors.append(factor)
        else:
            smooth = (original / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
                 "qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "gemma4_text": "gemma4",
                 "gpt_oss": "gpt-oss", "lfm2": "lfm2", "lfm2_moe": "lfm2moe", "phi3": "phi3",
                 "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe", "qwen3_next": "qwen3next",
                 "smollm3": "smollm3"}


def write_gemma4_metadata(writer, config):
    """As llama.cpp's converter does, beyond what all have."""
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    shared, size, layers = config["num_kv_shared_layers"], config["intermediate_size"], len(slides)
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_sliding_window_pattern(slides)
    writer.add_key_length(config["global_head_dim"])
    writer.add_value_length(config["global_head_dim"])
    writer.add_key_length_swa(config["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    wide = config["use_double_wide_mlp"]
    writer.add_feed_forward_length([2 * size if wide and i >= layers - shared else size for i in range(layers)])
    heads, of_global = config["num_key_value_heads"], config["num_global_key_value_heads"]
    writer.add_head_count_kv([heads if slid else of_global for slid in slides] if of_global else heads)
    if config.get("enable_moe_block"):
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["top_k_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_rope_dimension_count(config["global_head_dim"])
    writer.add_rope_dimension_count_swa(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def write_lfm2_metadata(writer, config):
    layers = config["num_hidden_layers"]
    attends = ([kind == "full_attention" for kind in config["layer_types"]] if "layer_types" in config else
               [i in config["full_attn_idxs"] for i in range(layers)])
    writer.add_head_count_kv([config["num_key_value_heads"] if one else 0 for one in attends])
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    writer.add_rope_freq_base(config["rope_theta"])
    size = config.get("block_ff_dim", config["intermediate_size"])
    if config.get("block_auto_adjust_ff_dim"):
        multiple = config["block_multiple_of"]
        size = (int(config["block_ffn_dim_multiplier"] * int(2 * size / 3)) + multiple - 1) // multiple * multiple
    writer.add_feed_forward_length(size)
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def write_qwen35_metadata(writer, config):
    rope = config.get("rope_parameters", config)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    writer.add_full_attention_interval(config["full_attention_interval"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if "num_experts" not in config or config.get("mlp_only_layers"):
        writer.add_feed_forward_length(config["intermediate_size"])


def tiled(rows, config, size, first=0):
    """As llama.cpp's converter orders rows of Qwen 3.5's heads of values, `size` each, from row `first` on."""
    groups = config["linear_num_key_heads"]
    of_group = config["linear_num_value_heads"] // groups
    heads = rows[first:].reshape(groups, of_group, size, *rows.shape[1:]).swapaxes(0, 1)
    return np.concatenate([rows[:first], heads.reshape(rows[first:].shape)])


def qwen35_tensor(stem, value, config):
    """What llama.cpp's converter makes of a tensor."""
    size = config["linear_value_head_dim"]
    if "norm" in stem and "linear_attn" not in stem:
        return value + np.float32(1)
    if stem.endswith("A_log"):
        return -np.exp(tiled(value, config, 1))
    if stem.endswith(("dt_bias", "in_proj_a", "in_proj_b")):
        return tiled(value, config, 1)
    if stem.endswith("in_proj_z"):
        return tiled(value, config, size)
    if stem.endswith("out_proj"):
        return tiled(value.T, config, size).T
    if stem.endswith(("in_proj_qkv", "conv1d")):
        return tiled(value.squeeze(), config, size, 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"])
    return value


def qwen3next_parts(rows, config):
    """What llama.cpp's converter makes of q, k, v and z of one head of keys after another."""
    keys, groups = config["linear_key_head_dim"], config["linear_num_key_heads"]
    values = config["linear_num_value_heads"] // groups * config["linear_value_head_dim"]
    heads = rows.reshape(groups, 2 * keys + 2 * values, -1)
    parts = np.split(heads, [keys, 2 * keys, 2 * keys + values], axis=1)
    *qkv, z = (part.reshape(-1, rows.shape[1]) for part in parts)
    return np.concatenate(qkv), z


def write_metadata(writer, config):
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_context_length(config.get("max_position_embeddings", 512))
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(config.get("norm_eps", config["rms_norm_eps"]))
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    of_family = {"gemma4": write_gemma4_metadata, "lfm2": write_lfm2_metadata, "lfm2moe": write_lfm2_metadata,
                 "qwen35": write_qwen35_metadata, "qwen35moe": write_qwen35_metadata,
                 "qwen3next": write_qwen35_metadata}.get(writer.arch)
    if of_family:
        return of_family(writer, config)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta", 1e6 if config["model_type"] == "gemma3_text" else 10000.0))
    writer.add_rope_dimension_count(int(head_dim * config.get("partial_rotary_factor", 1)))
    if "final_logit_softcapping" in config:
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type", scaling.get("rope_type")) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if config["model_type"] == "gpt_oss":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


# Names that the converter gives itself.
SPECIAL = {"linear_attn.dt_bias": "ssm_dt.bias", "linear_attn.A_log": "ssm_a", "router.scale": "ffn_gate_inp.scale",
           "router.per_expert_scale": "ffn_down_exps.scale", "feed_forward.expert_bias": "exp_probs_b.bias"}


def write_gguf(directory, path, change=None, pre="gpt-2", metadata=None, leave_out=" ", legacy=False, **options):
    """The model of a directory of floats as GGUF: names by the package gguf, order of rows by llama.cpp's converter.
    `change(name, value)` may give another value and its type, `metadata(writer)` other metadata. Tensors named
    as `leave_out` are not written. `legacy`: as llama.cpp's converter wrote qwen3next at first."""
    config = json.loads((directory / "config.json").read_text())
    config |= config.get("text_config", {})
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture, **options)
    write_metadata(writer, config)
    if metadata:
        metadata(writer)
    vocabulary = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary))
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    of_dense = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = tensors_of(directory, config)
    if architecture == "gemma3":
        # Hugging Face's model multiplies embeddings by the root rounded to bf16, llama.cpp by the root.
        rounded = np.array(mx.array(config["hidden_size"] ** 0.5).astype(mx.bfloat16).astype(mx.float32))
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding
        tensors["model.embed_tokens.weight"] = embedding * np.float32(rounded / config["hidden_size"] ** 0.5)
    for part in [name.removesuffix("switch_glu.gate_proj.weight") for name in tensors if "glu.gate_proj" in name]:
        gate, up, down = (tensors.pop(f"{part}switch_glu.{kind}_proj.weight") for kind in ("gate", "up", "down"))
        tensors |= {f"{part}gate_up_proj": np.concatenate([gate, up], axis=1), f"{part}down_proj": down}
    for name, value in tensors.items():
        if name.startswith("vision_tower"):
            continue
        name = name.replace("language_model.", "").removeprefix("model.model.")
        bare = not name.endswith((".weight", ".bias"))
        stem, _, suffix = (f"{name}.weight" if bare else name).rpartition(".")
        stem = stem.replace("mlp.switch_mlp.", "mlp.experts.").replace("block_sparse_moe.switch_mlp.", "mlp.experts.")
        stem = stem.replace("feed_forward.switch_mlp.", "mlp.experts.")
        if architecture in ("llama", "smollm3") and stem.endswith(("q_proj", "k_proj")):
            value = neighbours(value, heads if stem.endswith("q_proj") else kv_heads)
        if architecture in ("gemma2", "gemma3") and stem.endswith("norm"):
            value = value + np.float32(1)
        if architecture.startswith("qwen35"):
            value = qwen35_tensor(stem, value, config)
        if architecture == "qwen3next" and stem.endswith("A_log"):
            value = -np.exp(value)
        value = value.squeeze(tuple(i for i, n in enumerate(value.shape[1:], 1) if n == 1)) if "conv" in stem else value
        if architecture.startswith("lfm2"):
            for dense, own in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                stem = stem.replace(f"feed_forward.{dense}", f"feed_forward.{own}")
        if stem.endswith("mlp.experts.gate_up_proj") and architecture == "qwen35moe":
            gate, up = np.split(value, 2, axis=1)
            parts = {stem.replace("gate_up_proj", "gate_proj"): gate, stem.replace("gate_up_proj", "up_proj"): up}
        elif stem.endswith("in_proj_qkvz") and not legacy:
            qkv, z = qwen3next_parts(value, config)
            parts = {stem.replace("qkvz", "qkv"): qkv, stem.replace("qkvz", "z"): z}
        else:
            parts = {stem: value}
        for part, of_part in parts.items():
            name = f"{names.get_name(part) or of_dense.get_name(part)}.{suffix}"
            if special := SPECIAL.get(part.split(".", 3)[-1]):
                name = f"blk.{part.split('.')[2]}.{special}"
            if leave_out in name:
                continue
            of_part, kind = change(name, of_part) if change else (of_part, None)
            writer.add_tensor(name, np.ascontiguousarray(of_part), raw_dtype=kind)
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    if architecture == "gemma4":
        pairs = config["global_head_dim"] // 2
        rotated = int(pairs * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
        writer.add_tensor("rope_freqs.weight", np.array([1.0] * rotated + [1e30] * (pairs - rotated), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
