"""Agents of a model with recurrent layers, through the command line."""

import json

import numpy as np
import pytest

import conftest


def to_lfm2(config, weights):
    """Two short convolutions, two layers with rows."""
    random = np.random.default_rng(8)
    hidden, inner = 64, 96
    vocab = config["vocab_size"]
    config.clear()
    config.update({
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "hidden_size": hidden, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": vocab, "max_position_embeddings": 4096,
        "norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "eos_token_id": 2, "bos_token_id": 1,
        "conv_L_cache": 3, "conv_bias": False, "block_dim": hidden, "block_ff_dim": 128,
        "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 32, "block_auto_adjust_ff_dim": True,
        "intermediate_size": 128, "full_attn_idxs": [1, 3], "torch_dtype": "float16"})
    weights.clear()

    def linear(name, out, into):
        weights[name + ".weight"] = random.normal(0, into ** -0.5, (out, into)).astype(np.float16)

    weights["model.embed_tokens.weight"] = random.normal(0, 0.5, (vocab, hidden)).astype(np.float16)
    weights["model.embedding_norm.weight"] = np.ones(hidden, np.float16)
    for i in range(4):
        layer = f"model.layers.{i}."
        for norm in ("operator_norm", "ffn_norm"):
            weights[layer + norm + ".weight"] = np.ones(hidden, np.float16)
        if i % 2 == 0:
            weights[layer + "conv.conv.weight"] = random.normal(0, 0.6, (hidden, 3, 1)).astype(np.float16)
            linear(layer + "conv.in_proj", 3 * hidden, hidden)
            linear(layer + "conv.out_proj", hidden, hidden)
        else:
            for name, width in (("q_proj", hidden), ("k_proj", 32), ("v_proj", 32)):
                linear(layer + "self_attn." + name, width, hidden)
            linear(layer + "self_attn.out_proj", hidden, hidden)
            for norm in ("q_layernorm", "k_layernorm"):
                weights[layer + f"self_attn.{norm}.weight"] = np.ones(32, np.float16)
        linear(layer + "feed_forward.w1", inner, hidden)
        linear(layer + "feed_forward.w3", inner, hidden)
        linear(layer + "feed_forward.w2", hidden, inner)


@pytest.fixture(scope="module")
def hybrid_model(tmp_path_factory):
    return conftest.make_tiny_model(tmp_path_factory.mktemp("hybrid") / "model", to_lfm2)


@pytest.fixture
def make_store(tmp_path, hybrid_model, tiny):
    return lambda name: type(tiny)(tmp_path / name, hybrid_model)


def states_of(store, agent):
    return store("show", agent, "--json").ok().json["states"]


def test_processes_that_come_and_go_say_what_one_conversation_says(make_store, words):
    first, second = make_store("first"), make_store("second")
    for store in (first, second):
        store.run("ada", words(700), "--raw").ok()
    before = conftest.held_ids(first.store, "ada")
    first.run("ada", words(40), "--raw").ok()
    rewound = first("rewind", "ada", len(before), "--json").ok().json
    assert rewound["again"] == 0, "the end of a turn"
    first("rename", "ada", "eve").ok()
    first("fork", "eve", "bob").ok()
    answer = second.run("ada", words(60), "--raw").ok().json
    for agent in ("eve", "bob"):
        turn = first.run(agent, words(60), "--raw").ok().json
        assert turn["text"] == answer["text"] and turn["tokens"]["again"] == 0
        assert conftest.held_ids(first.store, agent) == conftest.held_ids(second.store, "ada")
    assert first("verify", "--json").ok()


def test_a_cut_between_states_is_computed_again_and_said(make_store, words, tmp_path):
    store = make_store("store")
    for n in (700, 60, 500):
        store.run("ada", words(n), "--raw").ok()
    positions = [state["position"] for state in states_of(store, "ada")]
    ids = conftest.held_ids(store.store, "ada")
    assert positions[-1] == len(ids)
    keep = (positions[-3] + positions[-2]) // 2
    nearest = max(position for position in positions if position <= keep)
    forked = store("fork", "ada", "eve", "--at", keep, "--json").ok().json
    assert forked["again"] == keep - nearest > 0
    assert f"no state between {nearest} and {keep}" in store("rewind", "ada", keep).ok().out
    found = store("why", "ada", "eve", "--json").ok().json
    assert (found["common_tokens"], found["resumable_tokens"]) == (keep, nearest)
    for agent in ("ada", "eve"):
        turn = store.run(agent, "and then", "--raw").ok().json
        assert turn["tokens"]["again"] == keep - nearest and turn["tokens"]["cached"] == nearest
        assert f"no state between {nearest} and {keep}" in turn["notices"][0]
        assert conftest.held_ids(store.store, agent)[:keep] == ids[:keep]
    assert conftest.held_ids(store.store, "ada") == conftest.held_ids(store.store, "eve")


def test_exports_and_the_disks_use_know_states(make_store, words, tmp_path):
    store, other = make_store("store"), make_store("other")
    store.run("ada", words(300), "--raw").ok()
    usage = store("du", "--json").ok().json
    assert usage["states"] == len(states_of(store, "ada")) and usage["state_bytes"] > 0 == usage["orphan_states"]
    store("export", "ada", tmp_path / "ada.safetensors").ok()
    other("import", tmp_path / "ada.safetensors", "ada").ok()
    assert other.run("ada", "more", "--raw").ok().json["text"] == store.run("ada", "more", "--raw").ok().json["text"]
    store("rm", "ada", "--force").ok()
    store("gc").ok()
    assert store("du", "--json").ok().json["states"] == 0


def test_a_damaged_state_costs_the_tokens_behind_the_one_before(make_store, words):
    store = make_store("store")
    for n in (300, 60):
        store.run("ada", words(n), "--raw").ok()
    last = states_of(store, "ada")[-1]
    path = store.store / "states" / last["file"][:2] / (last["file"] + ".safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert last["file"] in store("verify").out
    ids = conftest.held_ids(store.store, "ada")
    turn = store.run("ada", "more", "--raw").ok().json
    assert last["file"] in turn["damage"] and 0 < turn["tokens"]["again"] < len(ids)
    assert conftest.held_ids(store.store, "ada")[:len(ids)] == ids
    store("verify").ok()


def test_what_turns_no_longer_need_goes_with_each_of_them(make_store, words):
    store = make_store("store")
    for n in (300, 40, 40, 40, 40, 40):
        store.run("ada", words(n), "--raw").ok()
        usage = store("du", "--json").ok().json
        assert usage["orphan_states"] == 0 and usage["states"] == len(states_of(store, "ada"))
