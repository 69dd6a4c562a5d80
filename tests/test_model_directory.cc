/// Model directories: how they are found, what their identity depends on, and those that must be refused.

#include <gtest/gtest.h>

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>

#include "base/json.h"
#include "model/config.h"
#include "model/weights.h"
#include "torpor/error.h"
#include "torpor/model.h"

namespace torpor {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const fs::path kGoldens = fs::path(TORPOR_SOURCE_DIR) / "tests/goldens/model";

json read_json(const fs::path& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error("no " + path.string());
  return json::parse(in);
}

/// A copy of a tiny model to be spoilt.
class Directory : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "torpor-model-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    dir_ = fs::path(pattern) / "model";
    copy("tiny-q4-g64");
  }
  void TearDown() override { fs::remove_all(dir_.parent_path()); }

  void copy(const char* name) {
    fs::remove_all(dir_);
    fs::copy(kGoldens / name, dir_);
  }
  void edit(const std::function<void(json&)>& change, const char* file = "config.json") {
    json value = read_json(dir_ / file);
    change(value);
    std::ofstream(dir_ / file) << value;
  }
  std::unique_ptr<Model> load() { return Model::load(dir_.string(), {.backend = Backend::kKernels}); }
  void expect(ErrorCode code, const std::string& part) {
    try {
      load();
      ADD_FAILURE() << "loaded; expected: " << part;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), code) << e.what();
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  }

  fs::path dir_;
};

TEST_F(Directory, Missing) {
  fs::remove_all(dir_);
  expect(ErrorCode::kNotFound, "hf download");
  fs::create_directory(dir_);
  expect(ErrorCode::kNotFound, "config.json");
  copy("tiny-q4-g64");
  fs::remove(dir_ / "model.safetensors");
  expect(ErrorCode::kNotFound, "model*.safetensors");
  copy("tiny-f32-linear");
  fs::remove(dir_ / "model-00002-of-00002.safetensors");
  expect(ErrorCode::kNotFound, "model-00002-of-00002.safetensors");
}

TEST_F(Directory, BadConfig) {
  edit([](json& c) { c["model_type"] = "mamba"; });
  expect(ErrorCode::kInvalidArgument,
         "unsupported architecture mamba, supported: cohere2, deepseek_v2, deepseek_v3, gemma2, gemma3, gemma3_text, "
         "gemma4, gemma4_text, gemma4_unified, gemma4_unified_text, glm4_moe, glm4_moe_lite, gpt_oss, granite, "
         "granitemoe, granitemoehybrid, lfm2, lfm2_moe, llama, minimax_m2, ministral3, mistral, mistral3, mistral4, "
         "mixtral, nemotron_h, olmo3, olmoe, phi3, qwen2, qwen3, qwen3_5, qwen3_5_moe, qwen3_5_moe_text, "
         "qwen3_5_text, qwen3_moe, qwen3_next, seed_oss, smollm3.");
  copy("tiny-q4-g64");
  edit([](json& c) { c["rope_scaling"] = {{"rope_type", "dynamic"}, {"factor", 4}}; });
  expect(ErrorCode::kInvalidArgument, "unsupported RoPE type dynamic");
  copy("tiny-q4-g64");
  edit([](json& c) { c["hidden_size"] = "big"; });
  expect(ErrorCode::kInvalidArgument, "hidden_size must be a positive integer");
  copy("tiny-q4-g64");
  edit([](json& c) { c["hidden_size"] = 4'000'000'000; });
  expect(ErrorCode::kInvalidArgument, "hidden_size");
  copy("tiny-q4-g64");
  edit([](json& c) { c["num_attention_heads"] = 0; });
  expect(ErrorCode::kInvalidArgument, "num_attention_heads");
  copy("tiny-q4-g64");
  edit([](json& c) { c.erase("vocab_size"); });
  expect(ErrorCode::kInvalidArgument, "no vocab_size");
  copy("tiny-q4-g64");
  edit([](json& c) { c["quantization"]["mode"] = "nf4"; });
  expect(ErrorCode::kInvalidArgument, "nf4");
  copy("tiny-q4-g64");
  edit([](json& c) { c.erase("quantization"), c["quantization_config"] = {{"quant_method", "gptq"}}; });
  expect(ErrorCode::kInvalidArgument, "gptq");
  copy("tiny-q4-g64");
  std::ofstream(dir_ / "config.json") << "{\"model_type\": ";
  expect(ErrorCode::kCorruption, "config.json");
}

/// What shapes the computation is part of the identity; another way to write the same is not.
TEST_F(Directory, FamiliesConfigsAreTheIdentity) {
  const auto identity = [&](const char* name, const std::function<void(json&)>& change) {
    copy(name);
    edit(change);
    return load()->identity();
  };
  const auto same = [](json&) {};
  struct Change {
    const char* model;
    const char* key;
    json value;
  };
  for (const auto& [name, key, value] : {Change{"tiny-gemma2", "attn_logit_softcapping", 20}, {"tiny-gemma2", "attn_logit_softcapping", nullptr},
                                         {"tiny-gemma2", "final_logit_softcapping", nullptr}, {"tiny-gemma2", "query_pre_attn_scalar", 32},
                                         {"tiny-gemma2", "sliding_window", 9}, {"tiny-gemma2", "hidden_activation", "silu"},
                                         {"tiny-gemma3", "rope_local_base_freq", 20000}, {"tiny-gemma3", "sliding_window_pattern", 3},
                                         {"tiny-gemma3", "rope_scaling", nullptr}, {"tiny-phi4-mini", "partial_rotary_factor", 0.75},
                                         {"tiny-phi3", "sliding_window", nullptr}, {"tiny-phi3", "partial_rotary_factor", 0.5},
                                         {"tiny-phi4-mini", "max_position_embeddings", 8192}, {"tiny-qwen3", "rope_theta", 5e5},
                                         {"tiny-granite", "embedding_multiplier", 6}, {"tiny-granite", "residual_multiplier", 1},
                                         {"tiny-granite", "logits_scaling", 4}, {"tiny-granite", "attention_multiplier", 0.25},
                                         {"tiny-granite", "attention_multiplier", 0.1}, {"tiny-cohere2", "logit_scale", 1},
                                         {"tiny-cohere2", "layer_norm_eps", 1e-6}, {"tiny-cohere2", "rope_traditional", false},
                                         {"tiny-smollm3", "no_rope_layers", {1, 1, 0, 1}}, {"tiny-smollm3", "no_rope_layers", nullptr},
                                         {"tiny-gemma4", "use_bidirectional_attention", "vision"},
                                         {"tiny-gemma4", "final_logit_softcapping", nullptr}, {"tiny-gemma4", "sliding_window", 9},
                                         {"tiny-mixtral", "num_experts_per_tok", 1}, {"tiny-qwen3-moe", "num_experts_per_tok", 2},
                                         {"tiny-qwen3-moe", "norm_topk_prob", false},
                                         {"tiny-glm4-moe", "routed_scaling_factor", 1}, {"tiny-glm4-moe", "n_group", 2},
                                         {"tiny-glm4-moe", "norm_topk_prob", false},
                                         {"tiny-glm4-moe", "scoring_func", "sigmoid"},
                                         {"tiny-deepseek-v3", "first_k_dense_replace", 1},
                                         {"tiny-deepseek-v3", "rope_scaling", nullptr},
                                         {"tiny-deepseek-v3", "topk_method", "group_limited_greedy"},
                                         {"tiny-mistral4", "rope_interleave", false},
                                         {"tiny-minimax", "rotary_dim", 8}, {"tiny-gpt-oss", "swiglu_limit", 6},
                                         {"tiny-granitemoe", "num_experts_per_tok", 3},
                                         {"tiny-olmoe", "norm_topk_prob", true},
                                         {"tiny-lfm2", "norm_eps", 1e-6},
                                         {"tiny-qwen3-next", "partial_rotary_factor", 0.5},
                                         {"tiny-nemotron-h", "time_step_limit", {0, nullptr}},
                                         {"tiny-nemotron-h", "layer_norm_epsilon", 1e-6},
                                         {"tiny-granite-hybrid", "position_embedding_type", "rope"},
                                         {"tiny-lfm2-moe", "routed_scaling_factor", 1},
                                         {"tiny-nemotron-h-moe", "num_experts_per_tok", 3},
                                         {"tiny-olmo3", "rope_scaling", nullptr}, {"tiny-olmo3", "rope_theta", 1e6}}) {
    SCOPED_TRACE(std::string(name) + " " + key + " " + dump_json(value));
    // Every fourth layer of SmolLM3 has no RoPE anyway, and pictures can't be given.
    const bool equal = read_json(kGoldens / name / "config.json").value(key, json()) == value ||
                       (value.is_null() && std::string(key) == "no_rope_layers") || value == "vision" ||
                       value == "sigmoid";
    EXPECT_EQ(identity(name, same) == identity(name, [&](json& c) { c[key] = value; }), equal);
  }

  // As transformers 5 writes it.
  EXPECT_EQ(identity("tiny-gemma3", same), identity("tiny-gemma3", [](json& c) {
              c["layer_types"] = json::array();
              for (int i = 1; i <= 7; ++i) c["layer_types"].push_back(i % 6 == 0 ? "full_attention" : "sliding_attention");
              c["rope_parameters"] = {{"full_attention", {{"rope_type", "linear"}, {"factor", 8}, {"rope_theta", 1e6}}},
                                      {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 1e4}}}};
              for (const char* key : {"rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"}) c.erase(key);
            }));
  // The inner text model of a vision-language checkpoint, to the last field.
  EXPECT_NE(identity("tiny-mistral3", same),
            identity("tiny-mistral3", [](json& c) { c["text_config"]["rope_parameters"]["llama_4_scaling_beta"] = 0.2; }));
  EXPECT_NE(identity("tiny-mistral3", same),
            identity("tiny-mistral3", [](json& c) { c["text_config"]["rope_parameters"]["beta_fast"] = 16; }));
  // Defaults that published configs leave out.
  EXPECT_EQ(identity("tiny-gemma3", same), identity("tiny-gemma3", [](json& c) {
              for (const char* key : {"rope_theta", "rope_local_base_freq", "sliding_window_pattern", "rms_norm_eps"}) c.erase(key);
            }));
  EXPECT_EQ(identity("tiny-qwen2", same),
            identity("tiny-qwen2", [](json& c) { c.erase("rope_theta"), c.erase("tie_word_embeddings"); }));
}

/// Agents of these models are on disks: what their files call the model is what Torpor 0.1.0 called it.
TEST_F(Directory, IdentitiesOfTheFirstFamiliesNeverChange) {
  struct Kept {
    const char *model, *architecture, *config, *rope;
  };
  const std::string gemma3 = "linear theta 1e+06 factor 8; in sliding layers default theta 10000";
  for (const auto& [name, architecture, config, rope] : {
           Kept{"tiny-bf16-llama3", "llama", "1a21d809d59ec13faa17b68fd663a6f7",
                "llama3 theta 10000 factor 8 low 1 high 4 original 64"},
           {"tiny-f16", "llama", "4fb5203cecdcca5b48308119ca1596b1", "default theta 10000"},
           {"tiny-f32-linear", "llama", "bf0d064d814660e1f99a207ebbcd6726", "linear theta 10000 factor 2"},
           {"tiny-gemma2", "gemma2", "5b3afdeaec2bab1e08f73f4af12d0719", "default theta 10000"},
           {"tiny-gemma3", "gemma3", "148748b5919750ededa14cadb5c4d42e", gemma3.c_str()},
           {"tiny-gemma3-vision", "gemma3", "ae871cb4e9dd2b01f06c256c68ba616f", gemma3.c_str()},
           {"tiny-mistral", "llama", "5820e1db3a21036ed1a7006b93ef41af", "default theta 10000"},
           {"tiny-mixed-g128", "llama", "3dd729951bd004b4babd848327749059", "default theta 10000"},
           {"tiny-phi3", "phi3", "6d7e57505aa56b117a222abb82a1c766", "default theta 10000"},
           {"tiny-phi4-mini", "phi3", "daa98ef1399bb20e11ebbcfaed7fe2ec",
            "longrope theta 10000 dims 24 factors c36573377b1d575314718005c4f255c5 magnitude 1.190238118171692"},
           {"tiny-q4-g64", "llama", "4fb5203cecdcca5b48308119ca1596b1", "default theta 10000"},
           {"tiny-qwen2", "qwen2", "e367d7a138f398c45a67ba11b53cfb53", "default theta 1e+06"},
           {"tiny-qwen3", "qwen3", "17780b97f9e37e474149dfeac5d99232", "default theta 1e+06"},
           {"tiny-window", "llama", "850f2e82499132a324f214f7696c32fa", "default theta 10000"},
       }) {
    SCOPED_TRACE(name);
    const Identity identity = outline_model((kGoldens / name).string()).identity;
    EXPECT_EQ(identity.architecture, architecture);
    EXPECT_EQ(identity.config, config);
    EXPECT_EQ(identity.rope, rope);
  }
}

TEST_F(Directory, FamiliesConfigsThatMakeNoSense) {
  copy("tiny-phi4-mini");
  edit([](json& c) { c["rope_scaling"]["long_factor"].erase(0); });
  expect(ErrorCode::kInvalidArgument, "long_factor");
  copy("tiny-phi4-mini");
  edit([](json& c) { c["partial_rotary_factor"] = 1.5; });
  expect(ErrorCode::kInvalidArgument, "partial_rotary_factor");
  copy("tiny-gemma2");
  edit([](json& c) { c["attn_logit_softcapping"] = -1; });
  expect(ErrorCode::kInvalidArgument, "attn_logit_softcapping");
  copy("tiny-gemma2");
  edit([](json& c) { c["hidden_activation"] = "gelu"; });
  expect(ErrorCode::kInvalidArgument, "unsupported hidden_act gelu, supported: silu, gelu_pytorch_tanh");
  copy("tiny-smollm3");
  edit([](json& c) { c["no_rope_layers"] = {1, 1}; });
  expect(ErrorCode::kInvalidArgument, "no_rope_layers");
  copy("tiny-smollm3");
  edit([](json& c) { c["no_rope_layers"] = {1, 1, "no", 0}; });
  expect(ErrorCode::kInvalidArgument, "no_rope_layers");
  copy("tiny-gemma4");
  edit([](json& c) {
    c["rope_parameters"] = {{"full_attention", {{"rope_type", "proportional"}, {"rope_theta", 1e6}}},
                            {"sliding_attention", {{"rope_type", "linear"}, {"factor", 2}, {"rope_theta", 1e4}}}};
  });
  expect(ErrorCode::kInvalidArgument, "unsupported RoPE of sliding layers (type linear)");
  copy("tiny-q4-g64");
  edit([](json& c) { c["num_attention_heads"] = c["num_key_value_heads"] = 1 << 20, c["head_dim"] = 64; });
  expect(ErrorCode::kInvalidArgument, "num_attention_heads");
  for (const auto& [key, value] : {std::pair{"num_experts", 65536}, {"moe_intermediate_size", 1 << 25},
                                   {"num_experts_per_tok", 6}}) {
    copy("tiny-qwen3-moe");
    edit([&](json& c) { c[key] = value; });
    expect(ErrorCode::kInvalidArgument, std::string(key) == "moe_intermediate_size" ? key : "experts");
  }
  copy("tiny-qwen3-moe");
  edit([](json& c) { c["mlp_only_layers"] = {-1}; });
  expect(ErrorCode::kInvalidArgument, "mlp_only_layers");
  copy("tiny-granite");
  edit([](json& c) { c["logits_scaling"] = 0; });
  expect(ErrorCode::kInvalidArgument, "logits_scaling");
  struct Hybrid {
    const char *model, *key;
    json value;
    const char* says = nullptr;
  };
  for (const auto& [model, key, value, says] :
       {Hybrid{"tiny-lfm2", "conv_L_cache", 1}, {"tiny-lfm2", "conv_L_cache", 1 << 20},
        {"tiny-lfm2", "block_ff_dim", 1 << 30}, {"tiny-lfm2", "full_attn_idxs", {-1}},
        {"tiny-lfm2", "full_attn_idxs", {7}, "no layer attends"},
        {"tiny-lfm2-moe", "layer_types", {"conv", "conv", "full_attention", "rnn"}, "'rnn'"},
        {"tiny-lfm2-moe", "layer_types", {"conv"}}, {"tiny-qwen3-next", "linear_num_value_heads", 3},
        {"tiny-qwen3-next", "linear_key_head_dim", 1 << 20}, {"tiny-qwen3-next", "linear_num_key_heads", nullptr},
        {"tiny-qwen3-next", "full_attention_interval", 9, "no layer attends"},
        {"tiny-nemotron-h", "hybrid_override_pattern", "M-M"},
        {"tiny-nemotron-h", "hybrid_override_pattern", "M-MXXM-"},
        {"tiny-nemotron-h", "hybrid_override_pattern", "M-M-M-M"}, {"tiny-nemotron-h", "time_step_limit", {1, 0}},
        {"tiny-nemotron-h", "time_step_limit", {0, "x"}}, {"tiny-nemotron-h", "mlp_hidden_act", "silu"},
        {"tiny-nemotron-h-moe", "moe_latent_size", 64}, {"tiny-nemotron-h-moe", "mlp_bias", true},
        {"tiny-granite-hybrid", "mamba_n_groups", 3, "mamba_n_heads"},
        {"tiny-granite-hybrid", "layer_types", nullptr}}) {
    SCOPED_TRACE(std::string(model) + " " + key + " " + dump_json(value));
    copy(model);
    edit([&](json& c) { c[key] = value; });
    expect(ErrorCode::kInvalidArgument, says != nullptr ? says : key);
  }
  for (const int shared : {4, 5, 6, -1}) {  // two sliding layers are below, no global one
    copy("tiny-gemma4");
    edit([&](json& c) { c["num_kv_shared_layers"] = shared; });
    expect(ErrorCode::kInvalidArgument, "num_kv_shared_layers");
  }
  copy("tiny-gemma4");
  edit([](json& c) { c["enable_moe_block"] = true; });
  expect(ErrorCode::kInvalidArgument, "no num_experts");
  for (const auto& [key, value] : {std::pair{"n_group", 4}, {"topk_group", 2}, {"num_experts_per_tok", 7},
                                   {"n_shared_experts", 1 << 20}}) {
    copy("tiny-glm4-moe");
    edit([&](json& c) { c[key] = value; });
    const bool too_wide = std::string(key) == "n_shared_experts";
    expect(ErrorCode::kInvalidArgument, too_wide ? "moe_intermediate_size" : "which can't be");
  }
  for (const auto& [key, value] : {std::pair{"kv_lora_rank", 24}, {"kv_lora_rank", 1 << 20}, {"qk_rope_head_dim", 15},
                                   {"v_head_dim", 1 << 15}, {"qk_nope_head_dim", 0}}) {
    copy("tiny-deepseek-v3");
    edit([&](json& c) { c[key] = value; });
    expect(ErrorCode::kInvalidArgument, key);
  }
  copy("tiny-glm4-moe");
  edit([](json& c) { c["scoring_func"] = "sqrtsoftplus"; });
  expect(ErrorCode::kInvalidArgument, "scoring_func must be sigmoid or softmax");
  copy("tiny-gpt-oss-hf");
  edit([](json& c) { c["hidden_size"] = 48; });
  expect(ErrorCode::kCorruption, "with shape");
  copy("tiny-gemma4");
  edit([](json& c) { c["use_bidirectional_attention"] = "all"; });
  expect(ErrorCode::kInvalidArgument, "use_bidirectional_attention");
  copy("tiny-gemma4");
  edit([](json& c) { c["global_head_dim"] = 31; });
  expect(ErrorCode::kInvalidArgument, "global_head_dim");
  copy("tiny-olmo3");
  edit([](json& c) { c["rope_scaling"].erase("factor"); });
  expect(ErrorCode::kInvalidArgument, "factor");
  copy("tiny-gemma3-vision");
  edit([](json& c) { c["text_config"] = "none"; });
  expect(ErrorCode::kInvalidArgument, "text_config");
  copy("tiny-qwen2");
  edit([](json& c) { c["model_type"] = "qwen3", c["head_dim"] = 16; });
  expect(ErrorCode::kCorruption, "_norm.weight");
}

TEST_F(Directory, ConfigThatDoesNotFitTheWeights) {
  edit([](json& c) { c["num_hidden_layers"] = 3; });
  expect(ErrorCode::kCorruption, "model.layers.2.");
  copy("tiny-q4-g64");
  edit([](json& c) { c["intermediate_size"] = 256; });
  expect(ErrorCode::kCorruption, "_proj.weight with shape");
  copy("tiny-q4-g64");
  edit([](json& c) { c["quantization"]["model.layers.0.mlp.up_proj"] = {{"bits", 8}, {"group_size", 64}}; });
  expect(ErrorCode::kCorruption, "model.layers.0.mlp.up_proj is not packed as config.json says");
  copy("tiny-q4-g64");
  edit([](json& c) { c["tie_word_embeddings"] = false; });
  expect(ErrorCode::kCorruption, "lack the tensor lm_head.weight");
}

TEST_F(Directory, BiasesOfExpertsThatAreBytesAreRefused) {
  copy("tiny-gpt-oss-hf");
  const fs::path path = dir_ / "model.safetensors";
  std::ifstream in(path, std::ios::binary);
  std::string file((std::istreambuf_iterator<char>(in)), {});
  uint64_t size = 0;
  std::memcpy(&size, file.data(), sizeof(size));
  json header = parse_json<json>(file.substr(8, size));
  json& bias = header["model.layers.0.mlp.experts.gate_up_proj_bias"];
  const uint64_t begin = bias["data_offsets"][0], end = bias["data_offsets"][1], half = (end - begin) / 2;
  file.erase(8 + size + begin + half, half);
  for (auto& [name, tensor] : header.items()) {
    if (name == "__metadata__") continue;
    for (json& at : tensor["data_offsets"]) at = at > begin ? at.get<uint64_t>() - half : at.get<uint64_t>();
  }
  bias["dtype"] = "U8";
  const std::string text = dump_json(header);
  const uint64_t length = text.size();
  file.replace(0, 8 + size, std::string(reinterpret_cast<const char*>(&length), 8) + text);
  std::ofstream(path, std::ios::binary) << file;
  expect(ErrorCode::kInvalidArgument, "unsupported dtype U8 of model.layers.0.mlp.experts.gate_up_proj_bias");
}

TEST_F(Directory, DamagedWeights) {
  const fs::path file = dir_ / "model.safetensors";
  const auto size = fs::file_size(file);
  for (const uintmax_t length : {uintmax_t(0), uintmax_t(7), uintmax_t(8), uintmax_t(100), size / 2, size - 1}) {
    SCOPED_TRACE(length);
    fs::resize_file(file, length);
    expect(ErrorCode::kCorruption, "model.safetensors' is damaged");
    copy("tiny-q4-g64");
  }
  std::ofstream(file, std::ios::app) << "x";
  expect(ErrorCode::kCorruption, "model.safetensors' is damaged");
  copy("tiny-q4-g64");
  const std::string huge = "\xff\xff\xff\xff\xff\xff\xff\xff";
  std::fstream(file, std::ios::in | std::ios::out).write(huge.data(), 8);
  expect(ErrorCode::kCorruption, "header");
}

TEST_F(Directory, EveryWeightByteIsPartOfTheIdentity) {
  const Identity before = load()->identity();
  const fs::path file = dir_ / "model.safetensors";
  std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
  stream.seekg(-1, std::ios::end);
  const char byte = char(stream.get() ^ 1);
  stream.seekp(-1, std::ios::end);
  stream.put(byte);
  stream.close();
  EXPECT_EQ(load()->identity().first_difference(before), "weights");
  copy("tiny-q4-g64");
  edit([](json& c) { c["rope_theta"] = 20000; });
  EXPECT_EQ(load()->identity().first_difference(before), "rope");
  copy("tiny-q4-g64");
  edit([](json& c) { c["rms_norm_eps"] = 1e-6; });
  EXPECT_EQ(load()->identity().first_difference(before), "config");
  copy("tiny-q4-g64");
  edit([](json& c) { c["torch_dtype"] = "float64", c["max_position_embeddings"] = 99; });
  EXPECT_EQ(load()->identity(), before);
}

TEST_F(Directory, ShardsDoNotChangeTheDigest) {
  copy("tiny-f32-linear");
  const std::string digest = model::Weights::open(dir_).digest();
  fs::rename(dir_ / "model-00001-of-00002.safetensors", dir_ / "a.safetensors");
  edit([](json& index) {
    for (json& name : index["weight_map"]) if (name == "model-00001-of-00002.safetensors") name = "a.safetensors";
  }, "model.safetensors.index.json");
  EXPECT_EQ(model::Weights::open(dir_).digest(), digest);
  edit([](json& index) { index["weight_map"].front() = "../x"; }, "model.safetensors.index.json");
  expect(ErrorCode::kCorruption, "../x");
}

TEST_F(Directory, Config) {
  edit([](json& c) { c["model_type"] = "mistral", c["sliding_window"] = 6; });
  model::ModelConfig config = model::read_config(dir_);
  const auto windows = [](const model::ModelConfig& of) {
    std::vector<int> all;
    for (const model::LayerSpec& layer : of.layers) all.push_back(layer.attention.window);
    return all;
  };
  EXPECT_EQ(windows(config), (std::vector<int>{6, 6}));
  EXPECT_EQ(load()->kv_layout(KvDtype::kF16).tensors[3].window, 6);
  EXPECT_EQ(config.eos_token_ids, (std::vector<int32_t>{2, 3}));
  std::ofstream(dir_ / "generation_config.json") << R"({"eos_token_id": [7]})";
  EXPECT_EQ(model::read_config(dir_).eos_token_ids, (std::vector<int32_t>{2, 3, 7}));
  edit([](json& c) { c["sliding_window"] = nullptr; });
  EXPECT_EQ(windows(model::read_config(dir_)), (std::vector<int>{0, 0}));
  EXPECT_EQ(model::read_config(kGoldens / "tiny-olmo3").max_context, 65536);
  EXPECT_EQ(model::read_config(kGoldens / "tiny-mistral3").max_context, 262144);
  // As Qwen's cards say it: the field is the context that the model was trained with.
  edit([](json& c) {
    c["rope_scaling"] = {{"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 512}};
  });
  EXPECT_EQ(model::read_config(dir_).max_context, 2048);
  // What transformers 5 writes instead of rope_theta and rope_scaling.
  edit([](json& c) { c["rope_parameters"] = {{"rope_type", "linear"}, {"rope_theta", 500000.0}, {"factor", 4.0}}; });
  EXPECT_EQ(model::read_config(dir_).rope_description, "linear theta 500000 factor 4");
}

TEST_F(Directory, FoundInTheHuggingFaceCache) {
  const fs::path hub = dir_.parent_path();
  ::setenv("HF_HUB_CACHE", hub.c_str(), 1);
  const fs::path repo = hub / "models--some-org--Some.Model";
  fs::create_directories(repo / "refs");
  fs::create_directories(repo / "snapshots");
  fs::rename(dir_, repo / "snapshots/abc123");
  std::ofstream(repo / "refs/main") << "abc123";
  EXPECT_EQ(resolve_model("some-org/Some.Model"), repo / "snapshots/abc123");
  EXPECT_EQ(Model::load("some-org/Some.Model", {.backend = Backend::kKernels})->info().name, "some-org/Some.Model");
  for (const char* name : {"some-org/Other", "../Some.Model", "a/b/c", ""}) {
    SCOPED_TRACE(name);
    try {
      resolve_model(name);
      ADD_FAILURE();
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kNotFound);
      EXPECT_NE(std::string(e.what()).find("hf download"), std::string::npos) << e.what();
    }
  }
  ::unsetenv("HF_HUB_CACHE");
}

TEST(DefaultBackend, IsWhatModelsAreLoadedOn) {
  EXPECT_EQ(Model::load((kGoldens / "tiny-f16").string())->backend(), default_backend());
}

TEST(DefaultBackend, FollowsTheEnvironment) {
  const char* before = std::getenv("TORPOR_BACKEND");
  const std::string saved = before == nullptr ? "" : before;
  ::setenv("TORPOR_BACKEND", "mlx", 1);
  EXPECT_EQ(default_backend(), Backend::kMlx);
  ::setenv("TORPOR_BACKEND", "kernels", 1);
  EXPECT_EQ(default_backend(), Backend::kKernels);
  ::setenv("TORPOR_BACKEND", "tpu", 1);
  EXPECT_THROW(default_backend(), Error);
  ::setenv("TORPOR_BACKEND", saved.c_str(), 1);
  if (saved.empty()) ::unsetenv("TORPOR_BACKEND");
}

}  // namespace
}  // namespace torpor
