"""Models in GGUF files through the command line: against the directories that they were made of."""

import json
import shutil

import gguf
import mlx.core as mx
import numpy as np
import pytest

from conftest import ROOT, Torpor, make_tiny_model
from gguf_files import TEMPLATE, byte_tokenizer, write_gguf
from serving import Server

GOLDENS = ROOT / "tests/goldens/model"
TEXT = (GOLDENS / "long.txt").read_text()


@pytest.fixture
def tiny_of(tmp_path):
    """A copy of a golden model, with a tokenizer."""
    def made(name):
        directory = shutil.copytree(GOLDENS / f"tiny-{name}", tmp_path / name)
        byte_tokenizer(directory)
        config = json.loads((directory / "config.json").read_text())
        if "query_pre_attn_scalar" in config:  # GGUF says it of one size of models alone
            config["query_pre_attn_scalar"] = config["head_dim"]
        if name == "lfm2-moe":  # llama.cpp has neither
            config |= {"conv_bias": False, "routed_scaling_factor": 1.0}
            weights = mx.load(str(directory / "model.safetensors"))
            weights = {key: value for key, value in weights.items() if not key.endswith(".bias")}
            mx.eval(weights)  # of the file that is written now
            mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
        (directory / "config.json").write_text(json.dumps(config))
        return directory
    return made


def perplexity(tmp_path, model, backend="kernels", activations="f32", tokens=60, options=()):
    torpor = Torpor(tmp_path / "store", model)
    env = {"TORPOR_BACKEND": backend, "TORPOR_ACTIVATIONS": activations}
    return torpor("perplexity", "--model", model, "--file", "-", "--tokens", tokens, "--kv-dtype", "f32", "--json",
                  *options, stdin=TEXT, env=env).ok().json["perplexity"]


@pytest.mark.parametrize("name, close", [
    ("f16", 0), ("bf16-llama3", 1e-6), ("f32-linear", 0), ("mistral", 0), ("qwen2", 0), ("qwen3", 0), ("qwen3-moe", 0),
    ("gemma2", 0), ("gemma3", 1e-6), ("gemma4", 0), ("gemma4-moe", 0), ("gemma4-moe-hf", 0), ("gpt-oss", 1e-5),
    ("lfm2", 0), ("lfm2-moe", 1e-5), ("phi3", 0), ("qwen3-5", 1e-6), ("qwen3-5-moe", 1e-6),
    ("qwen3-next", 1e-5), ("smollm3", 0)])
def test_a_file_of_floats_computes_what_its_directory_does(tmp_path, tiny_of, name, close):
    directory = tiny_of(name)
    file = write_gguf(directory, tmp_path / "model.gguf")
    for backend in ("kernels", "mlx"):
        expected = perplexity(tmp_path, directory, backend)
        assert abs(perplexity(tmp_path, file, backend) / expected - 1) <= close, backend


def test_qwen3_next_is_read_as_its_first_converter_wrote_it(tmp_path, tiny_of):
    directory = tiny_of("qwen3-next")
    expected = perplexity(tmp_path, write_gguf(directory, tmp_path / "model.gguf"))
    assert perplexity(tmp_path, write_gguf(directory, tmp_path / "legacy.gguf", legacy=True)) == expected


def without(*keys, **floats):
    """Metadata without some keys of their architecture, and with numbers under others."""
    def change(writer):
        values = writer.kv_data[0]
        architecture = writer.arch
        for key in keys:
            del values[f"{architecture}.{key}"]
        for key, value in floats.items():
            values.pop(f"{architecture}.{key.replace('__', '.')}", None)
            writer.add_float32(f"{architecture}.{key.replace('__', '.')}", value)
    return change


def test_metadata_of_rope_count_as_they_do_in_llama_cpp(tmp_path, tiny_of):
    directory = tiny_of("f32-linear")
    expected = perplexity(tmp_path, directory)
    kind, factor = "rope.scaling.type", "rope.scaling.factor"
    for metadata in (without(kind), without(kind, factor, rope__scale_linear=2.0)):
        assert perplexity(tmp_path, write_gguf(directory, tmp_path / "m.gguf", metadata=metadata)) == expected
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    plain = perplexity(tmp_path, directory)
    assert plain != expected

    def none(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(2.0)
    assert perplexity(tmp_path, write_gguf(directory, tmp_path / "none.gguf", metadata=none)) == plain


def test_metadata_of_windows_count_as_they_do_in_llama_cpp(tmp_path, tiny_of):
    directory = tiny_of("gemma3")
    usual = perplexity(tmp_path, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"sliding_window_pattern": 2}))
    expected = perplexity(tmp_path, directory)
    assert abs(usual / expected - 1) > 1e-5
    slides = [i % 2 == 0 for i in range(config["num_hidden_layers"])]
    for metadata in (lambda writer: writer.add_sliding_window_pattern(slides),
                     lambda writer: writer.add_uint32("gemma3.attention.sliding_window_pattern", 2)):
        file = write_gguf(directory, tmp_path / "m.gguf", metadata=metadata)
        assert abs(perplexity(tmp_path, file) / expected - 1) <= 1e-6


def test_metadata_that_are_not_computed_are_refused_by_name(tmp_path, tiny_of):
    for name, metadata, says in (
            ("f16", without(rope__scaling__attn_factor=1.5), "llama.rope.scaling.attn_factor"),
            ("f16", without(rope__scaling__yarn_log_multiplier=0.5), "llama.rope.scaling.yarn_log_multiplier"),
            ("f16", lambda writer: writer.add_string("llama.rope.scaling.type", "longrope"), "llama.rope.scaling.type"),
            ("bf16-llama3", without(rope__scaling__factor=8.0), "rope_freqs.weight and a factor"),
            ("gemma4", without(rope__scaling__factor=8.0), "a factor of all RoPE's frequencies"),
            ("f16", lambda writer: writer.kv_data[0].update(
                {"llama.rope.dimension_count": gguf.GGUFValue(8, gguf.GGUFValueType.UINT32)}),
             "rotates 8 of the 16 dims of a head"),
            ("qwen3-moe", lambda writer: writer.kv_data[0].update(
                {"qwen3moe.block_count": gguf.GGUFValue(1 << 30, gguf.GGUFValueType.UINT32)}),
             "has 1073741824 layers, of which at most 4096 are supported")):
        file = write_gguf(tiny_of(name), tmp_path / "m.gguf", metadata=metadata)
        shutil.rmtree(tmp_path / name)
        Torpor(tmp_path / "store", file).run("ada", "Hello").fails("invalid", says)


def model_with_biases(directory, output_bias):
    def biased(config, weights):
        random = np.random.default_rng(11)
        config |= {"attention_bias": True, "vocab_size": 128}
        for name, value in weights.items():
            weights[name] = value[:128 if "embed" in name or "lm_head" in name else None].astype(np.float32)
        for name in [name for name in weights if "self_attn" in name]:
            rows = weights[name].shape[0]
            bias = random.normal(0, 2, rows) if output_bias or "o_proj" not in name else np.zeros(rows)
            weights[name.replace("weight", "bias")] = bias.astype(np.float32)

    make_tiny_model(directory, biased)
    byte_tokenizer(directory)
    return directory


@pytest.mark.parametrize("output_bias", [False, True])
def test_biases_of_rows_that_rotate_as_neighbours_are_found_in_every_format(tmp_path, output_bias):
    directory = model_with_biases(tmp_path / "model", output_bias)
    file = write_gguf(directory, tmp_path / "all.gguf")
    if not output_bias:
        whole = gguf.GGUFReader(file)
        assert any("attn_output.bias" in tensor.name for tensor in whole.tensors)
        file = write_gguf(directory, tmp_path / "some.gguf", leave_out="attn_output.bias")
    for backend in ("kernels", "mlx"):
        for bits in ((), ("--kv-bits", 8, "--kv-group", 32)):
            expected = perplexity(tmp_path, directory, backend, options=bits)
            assert abs(perplexity(tmp_path, file, backend, options=bits) / expected - 1) <= 1e-6, (backend, bits)


def test_quantized_keys_without_their_biases_are_exported_with_them(tmp_path):
    file = write_gguf(model_with_biases(tmp_path / "model", True), tmp_path / "model.gguf")
    torpor, exported = Torpor(tmp_path / "store", file), []
    for agent, bits in (("floats", ()), ("bits", ("--kv-bits", 8, "--kv-group", 32))):
        torpor.run(agent, "Hello", "--kv-dtype", "f32", *bits, max_tokens=1).ok()
        torpor("export", "--format", "mlx-lm", "--model", file, agent, tmp_path / f"{agent}.safetensors").ok()
        exported.append(mx.load(str(tmp_path / f"{agent}.safetensors")))
    floats, bits = exported
    names = [name for name, value in floats.items() if value.ndim == 4]
    assert len(names) == 4
    for name in names:
        rows = min(floats[name].shape[2], bits[name].shape[2])
        assert mx.abs(floats[name][:, :, :rows] - bits[name][:, :, :rows]).max() < 0.5, name


# Where in a block f16 numbers are, and what the second is of the first for weights around zero.
BLOCKS = {"Q2_K": ([80, 82], 1.5), "Q3_K": ([108], 0), "Q4_K": ([0, 2], 7.5), "Q5_K": ([0, 2], 15.5),
          "Q6_K": ([208], 0), "IQ4_NL": ([0], 0), "IQ4_XS": ([0], 0), "MXFP4": ([], 0)}


def random_blocks(rng, kind, rows, columns):
    """Bytes of weights whose deviation is about that of a trained model's."""
    width, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows * columns // width, size), dtype=np.uint8)
    places, second = BLOCKS[kind.name]

    def filled(d):
        for at, value in zip(places, (d, d * second)):
            data[:, at:at + 2] = np.array([value], dtype=np.float16).view(np.uint8)
        if kind.name == "MXFP4":
            data[:, 0] = 123
        return data.reshape(rows, -1)

    deviation = gguf.quants.dequantize(filled(1.0), kind).std()
    return filled(columns ** -0.5 / deviation)


def wide(config, weights):
    """Columns in whole blocks of 256."""
    config |= {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config["vocab_size"] = 128
    random = np.random.default_rng(5)
    shapes = {"q_proj": (256, 256), "k_proj": (128, 256), "v_proj": (128, 256), "o_proj": (256, 256),
              "gate_proj": (512, 256), "up_proj": (512, 256), "down_proj": (256, 512), "embed_tokens": (128, 256),
              "lm_head": (128, 256)}
    for name in weights:
        shape = next((shape for part, shape in shapes.items() if part in name), (256,))
        weights[name] = (random.normal(0, 0.06, shape) if len(shape) > 1 else np.ones(shape)).astype(np.float32)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *BLOCKS])
def test_blocks_of_a_type_compute_what_the_same_floats_do(tmp_path, kind):
    directory = make_tiny_model(tmp_path / "model", wide)
    byte_tokenizer(directory)
    kind = gguf.GGMLQuantizationType[kind]
    rng, raw = np.random.default_rng(9), {}

    def as_blocks(name, value):
        if value.ndim == 1:
            return value, None
        if kind.name in BLOCKS:
            raw[name] = random_blocks(rng, kind, *value.shape)
        else:
            raw[name] = gguf.quants.quantize(value, kind)
        return raw[name], kind

    def as_floats(name, value):
        return gguf.quants.dequantize(raw[name], kind) if name in raw else value, None

    blocks = write_gguf(directory, tmp_path / "blocks.gguf", as_blocks)
    floats = write_gguf(directory, tmp_path / "floats.gguf", as_floats)
    for backend in ("kernels", "mlx"):
        expected = perplexity(tmp_path, floats, backend)
        assert abs(perplexity(tmp_path, blocks, backend) / expected - 1) < 1e-5, backend
    assert abs(perplexity(tmp_path, blocks, activations="int16") / expected - 1) < 1e-3


def test_experts_of_blocks_compute_what_the_same_floats_do(tmp_path, tiny_of):
    directory = tiny_of("qwen3-moe")
    kind, raw = gguf.GGMLQuantizationType.Q5_0, {}

    def as_blocks(name, value):
        if value.ndim == 1 or value.shape[-1] % 32 != 0:
            return value, None
        raw[name] = gguf.quants.quantize(value, kind)
        return raw[name], kind

    def as_floats(name, value):
        return gguf.quants.dequantize(raw[name], kind) if name in raw else value, None

    blocks = write_gguf(directory, tmp_path / "blocks.gguf", as_blocks)
    floats = write_gguf(directory, tmp_path / "floats.gguf", as_floats)
    assert any("exps" in name for name in raw)
    for backend in ("kernels", "mlx"):
        expected = perplexity(tmp_path, floats, backend)
        assert abs(perplexity(tmp_path, blocks, backend) / expected - 1) < 1e-5, backend


def test_a_file_has_all_that_a_turn_needs(tmp_path, tiny_of):
    directory = tiny_of("f16")
    file = write_gguf(directory, tmp_path / "model.gguf")
    torpor = Torpor(tmp_path / "store", file)
    first = torpor.run("ada", "Hello", "--json").ok().json
    second = torpor.run("ada", "Go on", "--json").ok().json
    assert second["tokens"]["cached"] >= first["tokens"]["prompt"]
    # Another file of the same model is another model.
    def halves(name, value):
        return (gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0) \
            if value.ndim > 1 else (value, None)
    torpor.model = write_gguf(directory, tmp_path / "other.gguf", halves)
    torpor.run("ada", "Go on").fails("incompatible", "weights")


def test_ollamas_clients_are_told_that_a_file_is_gguf(tmp_path, tiny_of):
    directory = tiny_of("f16")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    file = write_gguf(directory, tmp_path / "m.gguf")
    for loaded, other, expected in ((directory, file, ["safetensors", "gguf"]),
                                    (file, directory, ["gguf", "safetensors"])):
        with Server(Torpor(tmp_path / "store", loaded), tmp_path, "--model", other) as server:
            listed = server.ask("GET", "/api/tags").json()["models"]
            assert [one["details"]["format"] for one in listed] == expected


def test_an_ollama_blob_and_a_file_in_the_hugging_face_cache_are_found(tmp_path, tiny_of):
    directory = tiny_of("f16")
    blob = write_gguf(directory, tmp_path / "sha256-0a1b")
    expected = perplexity(tmp_path, blob)
    repository = tmp_path / "hub/models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    (repository / "snapshots/abc/Q8").mkdir(parents=True)
    shutil.copy(blob, repository / "snapshots/abc/Q8/m.gguf")
    torpor = Torpor(tmp_path / "store", blob)
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "TORPOR_BACKEND": "kernels", "TORPOR_ACTIVATIONS": "f32"}
    arguments = ("--file", "-", "--tokens", 60, "--kv-dtype", "f32", "--json")
    found = torpor("perplexity", "--model", "org/name:Q8/m.gguf", *arguments, stdin=TEXT, env=env).ok().json
    assert found["perplexity"] == expected
    for name in ("org/name:other.gguf", "org/name:../../../../sha256-0a1b"):
        refused = torpor("perplexity", "--model", name, *arguments, stdin=TEXT, env=env)
        refused.fails("not_found", "There is no GGUF file")
    torpor("perplexity", "--model", "org/name", *arguments, stdin=TEXT, env=env).fails("not_found", "no config.json")


def test_a_split_model_is_read_whole(tmp_path, tiny_of):
    directory = tiny_of("f16")
    whole = write_gguf(directory, tmp_path / "whole.gguf")
    write_gguf(directory, tmp_path / "part.gguf", split_max_tensors=9)
    pieces = sorted(tmp_path.glob("part-*.gguf"))
    assert len(pieces) > 1
    assert perplexity(tmp_path, pieces[0]) == perplexity(tmp_path, whole)
    torpor = Torpor(tmp_path / "store", pieces[1])
    torpor.run("ada", "Hello").fails("invalid", "name the first")
    pieces[1].unlink()
    torpor.model = pieces[0]
    torpor.run("ada", "Hello").fails("not_found", pieces[1].name, "fetch the model again")


def test_what_is_not_read_is_one_sentence(tmp_path, tiny_of):
    directory = tiny_of("f16")
    file = write_gguf(directory, tmp_path / "model.gguf")
    torpor = Torpor(tmp_path / "store", tmp_path / "bad.gguf")

    def refused(data, name, *words):
        (tmp_path / "bad.gguf").write_bytes(data)
        torpor.run("ada", "Hello").fails(name, *words)

    data = file.read_bytes()
    refused(data[:len(data) // 2], "corruption", "is damaged", "ends past the end of the file")
    refused(data[:100], "corruption", "is damaged", "ends within its metadata")
    refused(data.replace(b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
                         b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0mamba"),
            "invalid", "unsupported architecture mamba, supported of GGUF: gemma2,")
    refused(data.replace(b"llama.embedding_length", b"llama.embedding_lengtX"), "invalid",
            "lacks llama.embedding_length")
    refused(data.replace(b"blk.1.attn_k.weight", b"blk.1.attn_X.weight"), "corruption",
            "lack the tensor model.layers.1.self_attn.k_proj.weight")
    refused(data.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenX"), "not_found", "has no tokenizer")
    refused(data.replace(b"gpt-2", b"gpt-9"), "invalid", "splits texts as gpt-9 does, supported: gpt-2,")
    refused(data.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.prX"), "invalid", "does not say how it splits texts")
    default = write_gguf(directory, tmp_path / "default.gguf", pre="default")
    refused(default.read_bytes(), "invalid", "does not say how it splits texts")


def test_smollm2_computes_bit_for_bit_what_its_mlx_directory_does(tmp_path):
    file = ROOT / ".models/smollm2-135m.gguf"
    if not file.exists():
        pytest.skip("no .models/smollm2-135m.gguf (scripts/fetch-model)")
    assert perplexity(tmp_path, file) == perplexity(tmp_path, ROOT / ".models/smollm2-135m")
