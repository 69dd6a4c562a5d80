// What llama.cpp computes, for goldens (scripts/make-goldens-gguf compiles it).
//
// llama_logits MODEL.gguf GREEDY: each line of standard input is a prompt's token ids. For each, standard output gets
// the logits of all its tokens [n, vocabulary], f32, and the GREEDY likeliest tokens that follow, i32. The cache is
// f32, flash attention off. GELU is computed in f32: llama.cpp takes it from a table for inputs and outputs in f16.
//
// llama_logits MODEL.gguf ids: standard input has texts, each with a NUL behind it. For each, standard output gets a
// line of token ids.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <numbers>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "llama_logits: %s\n", what);
  std::exit(1);
}

void print_ids(const llama_vocab* vocabulary) {
  std::string text;
  while (std::getline(std::cin, text, '\0')) {
    std::vector<llama_token> tokens(text.size() + 16);
    const int n = llama_tokenize(vocabulary, text.data(), int(text.size()), tokens.data(), int(tokens.size()),
                                 /*add_special=*/false, /*parse_special=*/true);
    if (n < 0) fail("a text has too many tokens");
    for (int i = 0; i < n; ++i) std::printf("%d ", tokens[size_t(i)]);
    std::putchar('\n');
  }
}

/// Computes a node of the graph again if it is GELU(x) * gate.
bool gelu_again(ggml_tensor* node, bool ask, void*) {
  const bool geglu = node->op == GGML_OP_GLU && ggml_get_glu_op(node) == GGML_GLU_OP_GEGLU;
  if (ask || !geglu) return geglu;
  const ggml_tensor *x = node->src[0], *gate = node->src[1];
  if (gate == nullptr || node->type != GGML_TYPE_F32) fail("a GELU has a form that is not known here");
  const auto row = [](const ggml_tensor* t, int64_t i) {
    const int64_t i1 = i % t->ne[1], i2 = i / t->ne[1] % t->ne[2], i3 = i / t->ne[1] / t->ne[2];
    return reinterpret_cast<float*>(static_cast<char*>(t->data) + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3]);
  };
  for (int64_t i = 0; i < ggml_nrows(node); ++i) {
    const float *from = row(x, i), *by = row(gate, i);
    float* to = row(node, i);
    for (int64_t j = 0; j < node->ne[0]; ++j) {
      const double v = from[j], inner = std::sqrt(2 / std::numbers::pi) * v * (1 + 0.044715 * v * v);
      to[j] = float(0.5 * v * (1 + std::tanh(inner)) * by[j]);
    }
  }
  return true;
}

void print_logits(llama_model* model, int vocabulary, int greedy) {
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    std::vector<llama_token> tokens;
    for (llama_token token; in >> token;) tokens.push_back(token);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = uint32_t(tokens.size()) + uint32_t(greedy);
    params.n_threads = params.n_threads_batch = 2;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.cb_eval = gelu_again;
    llama_context* context = llama_init_from_model(model, params);
    if (context == nullptr) fail("no context could be made");

    llama_batch batch = llama_batch_init(int(tokens.size()), 0, 1);
    const auto add = [&](llama_token token, int at) {
      batch.token[batch.n_tokens] = token;
      batch.pos[batch.n_tokens] = at;
      batch.n_seq_id[batch.n_tokens] = 1;
      batch.seq_id[batch.n_tokens][0] = 0;
      batch.logits[batch.n_tokens++] = 1;
    };
    for (size_t i = 0; i < tokens.size(); ++i) add(tokens[i], int(i));
    if (llama_decode(context, batch) != 0) fail("a prompt could not be computed");
    std::fwrite(llama_get_logits(context), sizeof(float) * size_t(vocabulary), tokens.size(), stdout);
    for (int i = 0; i < greedy; ++i) {
      const float* row = llama_get_logits_ith(context, -1);
      const llama_token next = llama_token(std::max_element(row, row + vocabulary) - row);
      std::fwrite(&next, sizeof(next), 1, stdout);
      batch.n_tokens = 0;
      add(next, int(tokens.size()) + i);
      if (llama_decode(context, batch) != 0) fail("a token could not be computed");
    }
    std::fflush(stdout);
    llama_batch_free(batch);
    llama_free(context);
  }
}

void print_errors(ggml_log_level level, const char* text, void*) {
  if (level >= GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) fail("usage: llama_logits MODEL.gguf GREEDY|ids");
  llama_log_set(print_errors, nullptr);
  llama_backend_init();
  llama_model_params params = llama_model_default_params();
  params.progress_callback = [](float, void*) { return true; };  // which would print dots
  llama_model* model = llama_model_load_from_file(argv[1], params);
  if (model == nullptr) fail("the model could not be loaded");
  const llama_vocab* vocabulary = llama_model_get_vocab(model);
  if (std::string(argv[2]) == "ids") {
    print_ids(vocabulary);
  } else {
    print_logits(model, llama_vocab_n_tokens(vocabulary), std::atoi(argv[2]));
  }
}
