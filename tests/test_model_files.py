"""Model directories as others write them: what AutoTokenizer, transformers and mlx-lm read of them counts here too."""

import json
import os
import shutil
import struct
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from conftest import BIN, ROOT, Torpor, make_tiny_model, preload

GEMMA = ROOT / "tests/goldens/model/tiny-gemma3-vision"
MISTRAL = ROOT / "tests/goldens/model/tiny-mistral3"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234\n"


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model that the test may spoil."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def cli(model, tmp_path):
    return Torpor(tmp_path / "store", model)


def edit(path, *gone, **fields):
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in gone} | fields
    path.write_text(json.dumps(content))


def says(model, token):
    """The model, with weights that make it say this token and nothing else."""
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 5
    weights["lm_head.weight"] = (weights["lm_head.weight"] * np.float16(0.001)).astype(np.float16)
    weights["lm_head.weight"][token, 0] = 100
    save_file(weights, model / "model.safetensors", metadata={"format": "mlx"})


def ids(cli, prompt, *args):
    """What the model reads of a prompt."""
    turn = cli("run", "--model", cli.model, "--agent", "ids", "--prompt", prompt, "--max-tokens", 1, "--json", *args).ok().json
    held = load_file(cli.agent_file("ids"))["tokens"].tolist()
    cli("rm", "ids").ok()
    return held[:turn["tokens"]["prompt"]]


# ---- the end of a turn

def no_eos(model):
    (model / "generation_config.json").unlink()
    edit(model / "config.json", "eos_token_id")


def another_eos(model):
    edit(model / "generation_config.json", eos_token_id=0)
    edit(model / "config.json", eos_token_id=0)


def only_in_the_old_files(model):
    no_eos(model)
    edit(model / "tokenizer_config.json", "added_tokens_decoder", "eos_token")
    (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}}))


def only_in_the_vocabulary(model):
    another_eos(model)
    edit(model / "tokenizer_config.json", "added_tokens_decoder")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<|im_end|>"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def only_in_generation_config(model):
    edit(model / "config.json", eos_token_id=0)
    edit(model / "tokenizer_config.json", eos_token="<|endoftext|>")


def only_in_config(model):
    edit(model / "generation_config.json", eos_token_id=[0, 1])
    edit(model / "tokenizer_config.json", eos_token="<|endoftext|>")


@pytest.mark.parametrize("spoil", [no_eos, another_eos, only_in_the_old_files, only_in_the_vocabulary, only_in_generation_config,
                                   only_in_config])
def test_a_turn_ends_at_the_token_that_any_of_the_files_names(cli, model, spoil):
    says(model, 2)
    spoil(model)
    turn = cli.run("ada", "Hello", max_tokens=4).ok().json
    assert turn["finish_reason"] == "stop" and turn["tokens"]["generated"] == 1


# ---- RoPE and context

def test_a_part_of_the_dims_rotates_wherever_the_config_says_it(cli, model):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    identities = []
    for name, fields in {"top": {"rope_parameters": rope, "partial_rotary_factor": 0.5},
                         "inside": {"rope_parameters": rope | {"partial_rotary_factor": 0.5}}}.items():
        edit(model / "config.json", "rope_theta", "partial_rotary_factor", **fields)
        cli.run(name, "Hello").ok()
        identities.append(cli("show", name, "--json").ok().json["identity"]["rope"])
    assert identities == ["default theta 10000 dims 32"] * 2


def test_longrope_of_a_part_of_the_dims_loads(cli, model):
    """As Phi-4-mini has it."""
    edit(model / "config.json", "rope_theta", rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "long_factor": [2.0] * 24,
        "short_factor": [1.0] * 24, "original_max_position_embeddings": 1024, "attention_factor": 1.25})
    cli.run("ada", "Hello").ok()
    rope = cli("show", "ada", "--json").ok().json["identity"]["rope"]
    assert "dims 48" in rope and "magnitude 1.25" in rope


def test_linear_scaling_multiplies_the_context(cli, model, words):
    edit(model / "config.json", max_position_embeddings=64, rope_scaling={"type": "linear", "factor": 4.0})
    cli.run("ada", words(200), "--raw").ok()
    cli.run("eve", words(256), "--raw").fails("exhausted", "256")


def test_gemma_3_without_a_context_has_that_of_transformers(tmp_path, words):
    model = shutil.copytree(GEMMA, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["text_config"].pop("max_position_embeddings", None)
    (model / "config.json").write_text(json.dumps(config))
    torpor = Torpor(tmp_path / "store", model)
    result = torpor("bench", "--model", model, "--prefill", 1, "--decode", 1, "--depth", 131072)
    assert result.code == 9 and "131072" in result.err, result.err


# ---- fields that change the computation

@pytest.mark.parametrize("fields", [
    {"use_bidirectional_attention": True}, {"is_causal": False}, {"num_local_experts": 8}, {"clip_qkv": 8.0},
    {"residual_multiplier": 0.22}, {"no_rope_layers": [1, 0]}, {"use_qk_norm": True}], ids=lambda fields: next(iter(fields)))
def test_a_field_that_nothing_computes_is_refused(cli, model, fields):
    edit(model / "config.json", **fields)
    cli.run("ada", "Hello").fails("invalid", next(iter(fields)))


def test_fields_that_say_what_is_computed_anyway_are_no_obstacle(cli, model):
    edit(model / "config.json", use_bidirectional_attention=False, is_causal=True, num_experts=None, clip_qkv=None, logit_scale=1.0,
         no_rope_layers=[1, 1], mlp_only_layers=[])
    cli.run("ada", "Hello").ok()


def test_mlx_in_the_name_of_the_quantization_is_mlx(tmp_path, words):
    model = shutil.copytree(ROOT / "tests/goldens/model/tiny-q4-g64", tmp_path / "model")
    spec = json.loads((model / "config.json").read_text())["quantization"]
    edit(model / "config.json", "quantization", quantization_config=spec | {"quant_method": "mlx"})
    Torpor(tmp_path / "store", model)("bench", "--model", model, "--prefill", 4, "--decode", 1, "--depth", 0, "--runs", 1).ok()
    edit(model / "config.json", quantization_config=spec | {"quant_method": "awq"})
    Torpor(tmp_path / "store", model)("bench", "--model", model, "--prefill", 4).fails("invalid", "awq")


# ---- files

def test_json_as_python_writes_it(cli, model):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        text = (model / name).read_text().rstrip().removesuffix("}")
        text += ', "odd": NaN, "high": Infinity, "low": [-Infinity], "text": "NaN \\" Infinity"}'
        (model / name).write_text("\ufeff" + text)
    cli.run("ada", "Hello").ok()


def test_an_index_of_other_files_is_nobodys(cli, model):
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors",
                                                "lm_head.weight": "model-00002-of-00002.safetensors"}}))
    cli.run("ada", "Hello").ok()
    # Of which some are here: a download that did not end.
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    cli.run("ada", "Hello").fails("not_found", "model-00002-of-00002.safetensors", "fetch")
    index.unlink()
    cli.run("ada", "Hello").fails("not_found", "there are 2", "fetch")
    (model / "model-00001-of-00002.safetensors").rename(model / "model-00001-of-00001.safetensors")
    cli.run("ada", "Hello").ok()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_called_one(cli, model, name):
    (model / name).write_text(LFS)
    cli.run("ada", "Hello").fails("not_found", name, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("other", [None, "tokenizer.model", "tekken.json", "vocab.json"])
def test_a_missing_tokenizer_is_told_before_the_weights_are_read(cli, model, other):
    (model / "tokenizer.json").unlink()
    (model / "model.safetensors").write_bytes(b"not read")
    if other:
        (model / other).touch()
    cli.run("ada", "Hello").fails("not_found", "tokenizer.json", *([other, "save_pretrained"] if other else ["fetch"]))


def test_a_file_is_no_model_directory(cli, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"GGML")
    cli.model = tmp_path / "x.bin"
    cli.run("ada", "Hello").fails("invalid", "is neither a GGUF file nor a model directory")


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "language_model.model."])
@pytest.mark.parametrize("source", [GEMMA, MISTRAL], ids=["gemma3", "mistral3"])
def test_a_model_with_vision_is_found_under_any_of_its_names(tmp_path, source, prefix):
    model = shutil.copytree(source, tmp_path / "model")
    data = (model / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]

    def renamed(name):
        if name.startswith("language_model.model."):
            return prefix + name.removeprefix("language_model.model.")
        return name if prefix == "language_model.model." else name.removeprefix("language_model.")

    header = json.dumps({renamed(name): entry for name, entry in json.loads(data[8:start]).items()}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[start:])
    Torpor(tmp_path / "store", model)("bench", "--model", model, "--prefill", 4, "--decode", 1, "--depth", 0, "--runs", 1).ok()


# ---- where models and stores are

@pytest.mark.parametrize("case", ["~", "$", "older name", "no HOME", "no organization"])
def test_a_model_is_found_where_hugging_face_keeps_it(tiny, tiny_model, tmp_path, case):
    name = "tiny" if case == "no organization" else "some/tiny"
    hub = {"~": "hf/hub", "$": "hf/hub", "older name": "cache", "no organization": "hf/hub"}.get(case, ".cache/huggingface/hub")
    home = tmp_path
    if case == "no HOME":
        home = tmp_path / "listed"
        home.mkdir()
    repo = home / hub / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("abc")
    (repo / "snapshots").mkdir()
    (repo / "snapshots/abc").symlink_to(tiny_model)
    env = {"HF_HOME": "", "HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": "", "XDG_CACHE_HOME": "", "HOME": str(tmp_path)}
    env |= {"~": {"HF_HOME": "~/hf"}, "$": {"HF_HOME": "$HOME/hf"}, "older name": {"HUGGINGFACE_HUB_CACHE": "~/cache"},
            "no organization": {"HF_HOME": "${HOME}/hf"}, "no HOME": {"HOME": ""}}[case]
    if case == "no HOME":
        env |= preload(tmp_path, f"""
            #include <pwd.h>
            #include <string.h>
            int getpwuid_r(uid_t uid, struct passwd* entry, char* memory, size_t size, struct passwd** found) {{
              memset(entry, 0, sizeof *entry);
              strcpy(memory, "{home}");
              entry->pw_dir = memory;
              *found = entry;
              return 0;
            }}""")
    tiny.model = name
    # A relative name: no directory of it is here.
    result = tiny("run", "--model", name, "--agent", "ada", "--prompt", "Hello", "--max-tokens", 1, "--json", env=env).ok()
    assert result.json["model"] == name


def test_a_tilde_is_a_home_directory(tiny, tiny_model, tmp_path):
    env = {"HOME": str(tmp_path), "TORPOR_STORE": "~/agents"}
    (tmp_path / "m").symlink_to(tiny_model)
    work = tmp_path / "work"
    work.mkdir()
    for store in ([], ["--store=~/others"]):
        subprocess.run([BIN, "run", "--model=~/m", "--agent", "ada", "--prompt", "Hello", "--max-tokens", "1", *store], check=True,
                       env={**os.environ, **env}, cwd=work, capture_output=True)
    assert (tmp_path / "agents/ada.safetensors").exists() and (tmp_path / "others/ada.safetensors").exists()
    assert not list(work.iterdir())


# ---- what AutoTokenizer reads beside tokenizer.json

def added(text, **flags):
    return {"content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} | flags


def named_token_that_is_not_added(model):
    """A word of the vocabulary becomes one token because the config says that it is special."""
    edit(model / "tokenizer_config.json", eos_token="lamp")


def token_of_the_decoder(model):
    config = json.loads((model / "tokenizer_config.json").read_text())
    edit(model / "tokenizer_config.json", added_tokens_decoder=config["added_tokens_decoder"] | {"49151": added("<|tool|>")})


def flags_of_the_decoder(model):
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["2"]["rstrip"] = True
    edit(model / "tokenizer_config.json", added_tokens_decoder=config["added_tokens_decoder"])


def extra_tokens(model):
    edit(model / "tokenizer_config.json", "additional_special_tokens", extra_special_tokens=["keeper", "<|tool|>"])


def additional_tokens(model):
    edit(model / "tokenizer_config.json", additional_special_tokens=["keeper"])


def named_extra_tokens(model):
    edit(model / "tokenizer_config.json", "additional_special_tokens", extra_special_tokens={"lamp_token": "keeper"},
         image_token="lamp")


def old_map(model):
    edit(model / "tokenizer_config.json", "added_tokens_decoder", "bos_token", "eos_token", "additional_special_tokens")
    (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": added("keeper"), "bos_token": "lamp"}))


def map_that_is_not_read(model):
    (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": "keeper"}))


def old_added_tokens(model):
    edit(model / "tokenizer_config.json", "added_tokens_decoder")
    (model / "added_tokens.json").write_text(json.dumps({"keeper lamp": 49152, "<|tool|>": 49153}))


def bos_that_is_dropped(model):
    """transformers 5 takes what tokenizer.json's post-processor says, and nothing else."""
    edit(model / "tokenizer_config.json", add_bos_token=True, bos_token="<|im_start|>")


def split_tokens(model):
    edit(model / "tokenizer_config.json", split_special_tokens=True)


KINDS = [named_token_that_is_not_added, token_of_the_decoder, flags_of_the_decoder, extra_tokens, additional_tokens,
         named_extra_tokens, old_map, map_that_is_not_read, old_added_tokens, bos_that_is_dropped, split_tokens]
TEXT = "The keeper<|tool|> of the lamp<|im_end|> keeper lamp, lampkeeper."


@pytest.mark.parametrize("spoil", KINDS)
def test_ids_are_auto_tokenizers(tmp_path, spoil):
    def room(config, weights):
        """Rows for tokens that are added."""
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = np.concatenate([weights[name], weights[name][:16]])
        config["vocab_size"] += 16

    cli = Torpor(tmp_path / "store", make_tiny_model(tmp_path / "model", room))
    spoil(cli.model)
    (cli.model / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ image_token }}{{ lamp_token }}"
        "{{ additional_special_tokens is defined }}")
    theirs = AutoTokenizer.from_pretrained(cli.model)
    assert ids(cli, TEXT, "--raw") == theirs(TEXT)["input_ids"]
    rendered = theirs.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False, add_generation_prompt=True)
    assert ids(cli, TEXT, "--special") == theirs(rendered, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_other_files_changed_is_another_one(tmp_path, model, cli):
    cli.run("ada", "Hello").ok()
    map_that_is_not_read(model)
    assert "notices" not in cli.run("ada", "Hello").ok().json
    token_of_the_decoder(model)
    assert "tokenizer" in cli.run("ada", "Hello").ok().json["notices"][0]


OWN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def in_a_processors_file(model):
    (model / "chat_template.json").write_text(json.dumps({"chat_template": OWN}))


def as_an_object(model):
    edit(model / "tokenizer_config.json", chat_template={"default": OWN, "tool_use": "{{ raise_exception('no tools') }}"})


def as_a_list(model):
    edit(model / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "no"}, {"name": "default", "template": OWN}])


def beside_a_template_for_tools(model):
    (model / "chat_template.jinja").write_text(OWN)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("no")


@pytest.mark.parametrize("template", ["{%}x", "{%}x{% endif %}", "{% if", "{{ a", "{%-%}"])
def test_a_template_that_breaks_off_is_refused_on_its_line(cli, model, template):
    (model / "chat_template.jinja").write_text("x\n" + template)
    cli.run("ada", "Hello").fails("invalid", "chat template", "line 2")


@pytest.mark.parametrize("put", [in_a_processors_file, as_an_object, as_a_list, beside_a_template_for_tools])
def test_a_chat_template_is_found_in_each_place_that_it_may_have(cli, model, tokenizer, put):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit(model / "tokenizer_config.json", "chat_template")
    put(model)
    assert ids(cli, "Hello") == tokenizer.encode("[user]Hello").ids
