"""What quantized keys and values are, through the command line: docs/format.md's formats, computed again by numpy and
MLX, and what mlx-lm is given of such an agent."""

import numpy as np
import pytest

from conftest import Torpor, forge, make_tiny_model

mx = pytest.importorskip("mlx.core")
import mlx_lm.models.cache as mlx_cache  # noqa: E402

DIM, N = 64, 300
FORMATS = [("8", 64), ("8,4", 64), ("4,8", 32), ("4", 64), ("4", 32)]


def biased(config, weights):
    """A Qwen 2, whose keys have a bias as large beside the signal as Qwen2.5-Coder's."""
    config.update(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    random = np.random.default_rng(3)
    for i in range(2):
        for name, size, scale in (("q", 2 * DIM, 0.1), ("k", DIM, 30), ("v", DIM, 0.1)):
            weights[f"model.layers.{i}.self_attn.{name}_proj.bias"] = random.normal(0, scale, size).astype(np.float16)


def normed(config, weights):
    """A Qwen 3, whose heads have norms with weights that lie far apart."""
    config.update(model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    random = np.random.default_rng(4)
    for i in range(2):
        for name in "qk":
            norm = 2 ** random.normal(0, 1.5, DIM)
            weights[f"model.layers.{i}.self_attn.{name}_norm.weight"] = norm.astype(np.float16)


CHANGES = {"biased": biased, "plain": None}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: make_tiny_model(root / name, change) for name, change in {**CHANGES, "normed": normed}.items()}


@pytest.fixture(params=CHANGES)
def torpor(request, models, tmp_path):
    return Torpor(tmp_path / "store", models[request.param])


@pytest.fixture
def of_qwen(models, tmp_path):
    return Torpor(tmp_path / "store", models["biased"])


def options(bits, group):
    return "--kv-bits", bits, "--kv-group", group


def bits_of(bits):
    """(of keys, of values)"""
    both = [int(n) for n in bits.split(",")]
    return both[0], both[-1]


def hadamard(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return (h / n ** 0.5).astype(np.float32)


def rotated_bias(torpor, layer, n):
    """[n, DIM]: the bias of the layer's keys at each position."""
    weights = mx.load(str(torpor.model / "model.safetensors"))
    bias = weights.get(f"model.layers.{layer}.self_attn.k_proj.bias")
    if bias is None:
        return np.zeros((n, DIM), np.float32)
    a, b = np.split(np.array(bias.astype(mx.float32), np.float64), 2)
    angle = np.arange(n)[:, None] * 1e4 ** (-np.arange(0, DIM, 2) / DIM)
    rotated = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return np.concatenate(rotated, -1).astype(np.float32)


def pair_factors(torpor, layer):
    """[DIM]: what keys of heads with norms are divided by before they are rotated."""
    weights = mx.load(str(torpor.model / "model.safetensors"))
    q, k = (np.hypot(*np.split(np.array(weights[f"model.layers.{layer}.self_attn.{name}_norm.weight"], np.float64), 2))
            for name in "qk")
    return np.tile(2 ** np.round(np.log2((k + 1 / 16) / (q + 1 / 16)) / 2), 2).astype(np.float32)


def exported(torpor, agent, path):
    torpor("export", agent, path).ok()
    return mx.load(str(path))


def quantized_rows(tensors, name, bits, group):
    """[n, DIM] as they are kept, and the step of each."""
    words, scales, biases = (tensors[name + part] for part in ("", "_scales", "_biases"))
    assert scales.shape[-1] == DIM // group and words.shape[-1] == DIM * bits // 32
    scales, biases = (a.astype(mx.float32) for a in (scales, biases))
    rows = np.array(mx.dequantize(words, scales, biases, group, bits))
    return rows[0, 0], np.repeat(np.abs(np.array(scales)), group, -1)[0, 0]


def cost(error, group):
    """Of each group, the sum of squares."""
    return np.square(error.reshape(N, -1, group)).sum(-1)


def least_cost(rows, group):
    """Of the ranges that a group of rotated elements may be given, the cost of the best."""
    x = rows.reshape(N, -1, group)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    middle, reach = (high + low) / 2, (high - low) / 2
    costs = []
    for part in (1, 15 / 16, 14 / 16, 13 / 16, 12 / 16):
        kept = 2 * reach * part / 15, middle - reach * part
        scale, bias = (a.astype(np.float16).astype(np.float32) for a in kept)
        costs.append(cost(np.clip(np.rint((x - bias) / scale), 0, 15) * scale + bias - x, group))
    return np.min(costs, 0)


def assert_least_cost(rows, expected, group):
    # A few scales and biases round to the other neighbour: keys with their bias are exact to 1e-5 only.
    found, least = cost(rows - expected, group), least_cost(expected, group)
    assert np.isclose(found, least, rtol=2e-3).mean() > 0.97
    np.testing.assert_allclose(found, least, rtol=0.05)


@pytest.mark.parametrize("bits, group", FORMATS)
def test_rows_are_what_the_format_says(torpor, words, tmp_path, bits, group):
    torpor.run("exact", words(N), "--raw", "--kv-dtype", "f32", max_tokens=1).ok()
    torpor.run("ada", words(N), "--raw", *options(bits, group), max_tokens=1).ok()
    method = (" bias-free" if torpor.model.name == "biased" else "") + (" rotated" if "4" in bits else "")
    assert torpor("show", "ada", "--json").ok().json["identity"]["kv"] == f"q{bits} group {group} f16{method}"
    exact, kept = (exported(torpor, agent, tmp_path / f"{agent}.safetensors") for agent in ("exact", "ada"))
    # The first layer's rows don't depend on how others are kept.
    for side, n_bits, bias in zip(("keys", "values"), bits_of(bits), (rotated_bias(torpor, 0, N), 0)):
        expected = np.array(exact[f"layer_0_{side}"])[0, 0, :N] - bias
        if n_bits == 4:
            expected = expected @ hadamard(DIM)
        rows, step = quantized_rows(kept, f"layer_0_{side}", n_bits, group)
        if n_bits == 4:
            assert_least_cost(rows[:N], expected, group)
        else:
            error = np.abs(rows[:N] - expected) / step[:N]
            assert error.max() < 1.1 and error.mean() < 0.27, side  # rounding alone gives a mean of a quarter of a step


@pytest.mark.parametrize("bits, group", FORMATS)
def test_an_agent_that_slept_goes_on_as_one_that_did_not(torpor, words, bits, group):
    lines = [words(N), "and then", "What next?"]
    awake = torpor.chat("awake", lines, *options(bits, group))
    slept = [torpor.run("slept", line, *options(bits, group)).ok().json for line in lines]
    assert [turn["text"] for turn in slept] == [turn["text"] for turn in awake]
    # A fork, and an agent that begins with the same segments.
    torpor("fork", "slept", "bob").ok()
    assert torpor.run("bob", "Again?").ok().json["text"] == torpor.run("slept", "Again?").ok().json["text"]
    again = torpor.run("new", lines[0], *options(bits, group)).ok().json
    assert again["tokens"]["cached"] >= 256 and again["text"] == awake[0]["text"]


@pytest.mark.parametrize("dialect", ["mlx-lm", "mlx-lm-0.31"])
@pytest.mark.parametrize("bits, group", FORMATS)
def test_mlx_lm_is_given_keys_with_their_bias_and_nothing_rotated(torpor, words, tmp_path, bits, group, dialect):
    import torpor as module
    torpor.run("ada", words(N), "--raw", *options(bits, group), max_tokens=1).ok()
    kept = exported(torpor, "ada", tmp_path / "ada.safetensors")
    torpor("export", "--format", dialect, "ada", tmp_path / "cache.safetensors").ok()
    cache = module.load_prompt_cache(tmp_path / "cache.safetensors")[0]
    if torpor.model.name == "plain" and bits == "8":  # such rows mlx-lm has itself
        assert all(isinstance(layer, mlx_cache.QuantizedKVCache) for layer in cache)
        return
    assert all(type(layer) is mlx_cache.KVCache for layer in cache)
    for i, layer in enumerate(cache):
        n = layer.offset
        assert layer.keys.dtype == mx.float16 and n == kept["tokens"].size
        for side, n_bits, bias in zip(("keys", "values"), bits_of(bits), (rotated_bias(torpor, i, n), 0)):
            rows, _ = quantized_rows(kept, f"layer_{i}_{side}", n_bits, group)
            expected = (rows @ hadamard(DIM) if n_bits == 4 else rows) + bias
            found = np.array(getattr(layer, side))[0, 0, :n]
            np.testing.assert_allclose(found, expected, rtol=2 ** -11 + 1e-5, atol=1e-3)


@pytest.mark.parametrize("backend", ["kernels", "mlx"])
def test_keys_of_heads_with_norms_are_evened_out_before_they_are_rotated(models, words, tmp_path, backend):
    import torpor as module
    torpor = Torpor(tmp_path / "store", models["normed"])
    torpor.run("exact", words(N), "--raw", "--kv-dtype", "f32", max_tokens=1).ok()
    torpor.run("ada", words(N), "--raw", *options("4", 32), "--backend", backend, max_tokens=1).ok()
    exact, kept = (exported(torpor, agent, tmp_path / f"{agent}.safetensors") for agent in ("exact", "ada"))
    keys, factors = np.array(exact["layer_0_keys"])[0, 0, :N], pair_factors(torpor, 0)
    assert len(set(factors)) > 3
    rows, _ = quantized_rows(kept, "layer_0_keys", 4, 32)
    assert_least_cost(rows[:N], keys / factors @ hadamard(DIM), 32)
    # mlx-lm multiplies no query: its keys are those that the model computed.
    torpor("export", "--format", "mlx-lm", "ada", tmp_path / "cache.safetensors").ok()
    for i, layer in enumerate(module.load_prompt_cache(tmp_path / "cache.safetensors")[0]):
        rows, _ = quantized_rows(kept, f"layer_{i}_keys", 4, 32)
        expected = rows @ hadamard(DIM) * pair_factors(torpor, i)
        found = np.array(layer.keys)[0, 0, :len(expected)]
        np.testing.assert_allclose(found, expected, rtol=2 ** -11 + 1e-5, atol=1e-3)


def test_an_export_finds_its_model_where_it_is_said_to_be(of_qwen, models, words, tmp_path):
    of_qwen.run("ada", words(20), "--raw", "--kv-bits", 8).ok()
    moved = of_qwen.model.rename(tmp_path / "moved")
    try:
        export = "export", "--format", "mlx-lm", "ada", tmp_path / "x"
        of_qwen(*export).fails("not_found", str(of_qwen.model))
        of_qwen(*export, "--model", models["plain"]).fails("incompatible", "architecture")
        assert not (tmp_path / "x").exists()
        of_qwen(*export, "--model", moved).ok()
        of_qwen("export", "ada", tmp_path / "own.safetensors").ok()  # as it is kept: no model needed
        of_qwen("import", tmp_path / "own.safetensors", "bob").ok()
    finally:
        moved.rename(of_qwen.model)
    assert of_qwen.run("bob", "on", "--raw").ok().json["text"] == of_qwen.run("ada", "on", "--raw").ok().json["text"]


def test_rows_as_earlier_versions_kept_them_go_on_as_they_are(of_qwen, words, tmp_path):
    """An agent of a version without methods: its rows have the bias, and are not rotated. mlx-lm's are such rows."""
    cache = [mlx_cache.QuantizedKVCache(group_size=32, bits=4) for _ in range(2)]
    for layer in cache:
        layer.update_and_fetch(*mx.random.normal((2, 1, 1, N, DIM)).astype(mx.float16))
    mlx_cache.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    of_qwen("import", "--model", of_qwen.model, tmp_path / "cache.safetensors", "old").ok()
    kv = lambda agent: of_qwen("show", agent, "--json").ok().json["identity"]["kv"]  # noqa: E731
    assert kv("old") == "q4 group 32 f16"
    of_qwen("fork", "old", "bob").ok()
    said = of_qwen.run("old", "and then", "--raw").ok().json
    again = of_qwen.run("bob", "and then", "--raw", *options("4", 32)).ok().json
    assert again["text"] == said["text"] and again["tokens"]["cached"] == N
    assert kv("old") == kv("bob") == "q4 group 32 f16"
    for other in (options("4", 64), options("8", 32), options("8,4", 32), ("--kv-dtype", "f16")):
        of_qwen.run("old", "on", "--raw", *other).fails("incompatible", "kv")
    # Nobody takes rows of another method, though they are of one size.
    of_qwen.run("one", words(N), "--raw", *options("4", 32)).ok()
    assert kv("one") == "q4 group 32 f16 bias-free rotated"
    # Its own rows stay packed in a file for mlx-lm.
    of_qwen("export", "--format", "mlx-lm", "old", tmp_path / "again.safetensors").ok()
    again = mlx_cache.load_prompt_cache(str(tmp_path / "again.safetensors"))
    assert all(isinstance(layer, mlx_cache.QuantizedKVCache) for layer in again)


@pytest.mark.parametrize("name", ["q4 group 32 f16 bias-free rotated twice", "q4,2 group 32 f16",
                                  "q8 group 32 f16 rotated"])
def test_a_format_that_this_version_does_not_know_is_refused(of_qwen, words, name):
    of_qwen.run("ada", words(20), "--raw", *options("4", 32)).ok()
    path = of_qwen.agent_file("ada")
    forge(path, path, {"identity.kv": name})
    before = path.read_bytes()
    for asked in ((), options("4", 32)):
        of_qwen.run("ada", "on", "--raw", *asked).fails("incompatible", "kv", name)
    of_qwen("verify").ok()
    assert path.read_bytes() == before


def test_a_flipped_bit_of_rotated_rows_is_found(of_qwen, words):
    of_qwen.run("ada", words(N), "--raw", *options("8,4", 32)).ok()
    for path in (of_qwen.segments()[0], of_qwen.agent_file("ada")):
        whole = path.read_bytes()
        for at in range(len(whole) // 8, len(whole), len(whole) // 8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1:])
            assert not of_qwen("verify", "--json").json["ok"]
        path.write_bytes(whole)
    of_qwen("verify").ok()
