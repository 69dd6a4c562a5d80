#pragma once
/// What a layer is: plain data that a family's page fills in (family_pages.h) and that both backends compute by. A
/// layer is attention and an MLP, each a residual; which norms it has, its names say.

#include <cmath>
#include <memory>
#include <optional>
#include <string>

#include "kernels/moe.h"
#include "kernels/recurrent.h"
#include "model/rope.h"

namespace torpor::model {

/// Of the MLP, which is gated; but kRelu2 is down(relu(up(x))²).
enum class Activation { kSilu, kGeluTanh, kRelu2 };

/// RMS norms of queries and keys, before they rotate.
enum class QkNorm {
  kNone,
  kHeads,  ///< of each head, by one weight [key_dim]
  kWhole,  ///< of all heads at once, by a weight [heads * key_dim]
};

/// Queries are multiplied by 1 + beta * log(1 + floor(position / period)).
struct QueryScale {
  float beta = 0;
  int period = 0;

  float at(int position) const { return 1 + beta * std::log(1 + float(position / period)); }
};

/// Multi-head latent attention (DeepSeek's): all heads share one row of latents, which is key and value, and of dims
/// that rotate. The cache has the latents as keys and those dims as values, of one head; Attention's key_dim and
/// value_dim are their numbers. What would make keys and values of latents is absorbed into queries and outputs,
/// always.
struct Latent {
  int query_rank = 0;   ///< queries are projected to so many features first, and these normalised; 0: they are not
  int plain_dim = 0;    ///< dims of a projected query that meet the latents; value_dim more rotate
  int output_dim = 0;   ///< of a head
  float norm_eps = 0;   ///< of the norms of latents and of queries' features
  bool bias = false;    ///< of the projections to them
};

/// Causal attention with a KV cache.
struct Attention {
  int n_heads = 0, n_kv_heads = 0;
  int key_dim = 0, value_dim = 0;    ///< of a head; queries are as wide as keys
  int window = 0;                    ///< a token attends so many, itself included; 0 = all
  std::shared_ptr<const Rope> rope;  ///< never nullptr; layers share it
  float scale = 0;                   ///< of the scores q · k
  float softcap = 0;                 ///< scores become cap * tanh(score / cap); 0 = off
  std::optional<QueryScale> query_scale;
  QkNorm qk_norm = QkNorm::kNone;
  bool value_norm = false;           ///< of each head of v, an RMS norm without a weight
  bool keys_are_values = false;      ///< v is k as projected; there is no v_proj
  std::optional<int> reads_rows_of;  ///< a lower layer, whose keys and values it attends to; it has none of its own
  bool lends_rows = false;           ///< upper layers read its rows
  bool sinks = false;                ///< each head has a logit of its own in the softmax's denominator
  bool qkv_bias = false, output_bias = false;
  bool gated = false;                ///< q_proj gives each head a gate, too, whose sigmoid its output is multiplied by
  std::optional<Latent> latent;

  int query_size() const { return n_heads * key_dim; }
  int keys_size() const { return n_kv_heads * key_dim; }
  int values_size() const { return n_kv_heads * value_dim; }
  int output_size() const { return n_heads * (latent ? latent->output_dim : value_dim); }
  /// Rotated keys are divided by pair_factors: of what one layer knows alone.
  bool evens_keys() const { return qk_norm == QkNorm::kHeads && !reads_rows_of && !lends_rows; }
  /// Keys have a bias, and no norm after it.
  bool key_bias() const { return qkv_bias && qk_norm == QkNorm::kNone; }
};

/// A mixer in attention's place, which keeps a state instead of rows.
struct Recurrent {
  kernels::RecurrentShape shape;
  bool conv_bias = false, bias = false;  ///< of the convolution; of the projections
  bool interleaved = false;              ///< kGatedDelta: q, k, v, z are one projection, b, a another, head by head
  bool decay_is_made = false;            ///< kGatedDelta: -exp(A_log) stands under A_log's name, as llama.cpp has it
};

/// down(act(gate(x)) ⊙ up(x))
struct Mlp {
  int size = 0;  ///< features between
  Activation activation = Activation::kSilu;
  bool bias = false;
};

/// A mixture of experts: a router chooses some for each token. Its biases and scales are read with the weights.
struct Experts {
  int n = 0;            ///< experts
  int size = 0;         ///< features within one
  int shared_size = 0;  ///< features within an expert that every token goes through; 0: there is none
  kernels::Routing routing;
  kernels::ExpertActivation activation = kernels::ExpertActivation::kSilu;  ///< kClampedSwiGlu is gpt-oss's
  float limit = 7;               ///< of kClampedSwiGlu
  bool selection_bias = false;   ///< the router adds a bias to its scores for the choice
  bool expert_scale = false;     ///< each expert's weight is multiplied by a number
  bool shared_gate = false;      ///< the shared expert is multiplied by the sigmoid of a gate
  bool bias = false;             ///< of the router and of all projections
  bool beside_mlp = false;       ///< the layer has its MLP, too; each has norms of its own, and their sum another
};

struct LayerSpec {
  bool mixes = true, feeds = true;  ///< it has attention or what is in its place; it has an MLP or experts
  Attention attention;              ///< unless there is
  std::optional<Recurrent> recurrent;
  Mlp mlp;                          ///< unless there are experts alone
  std::optional<Experts> experts;
};

/// The tensors of a mixture, within the layer.
struct ExpertNames {
  std::string module = "mlp";
  std::string router = "gate";                                  ///< within `module`, as all that follow
  std::string selection_bias = "gate.e_score_correction_bias";
  std::string expert_scale = "router.per_expert_scale";
  std::string shared = "shared_experts", shared_gate = "shared_expert_gate";
  std::string stacked = "switch_mlp";           ///< mlx-lm's tensors of all experts, with these parts
  const char* stacked_parts[3] = {"gate_proj", "up_proj", "down_proj"};
  std::string each = "experts";                 ///< Hugging Face's, one module for each expert, ...
  const char* parts[3] = {"gate_proj", "up_proj", "down_proj"};  ///< ... with these
  /// ... or all in one, gate's rows and up's together. Empty: there is no such form.
  std::string fused_gate_up = "experts.gate_up_proj", fused_down = "experts.down_proj";
  /// Where the shared expert, or the MLP of a layer without experts, has gate and up in one; within the layer.
  std::string shared_gate_up, shared_down;
};

/// How a layer is put together, and how its tensors are called, within "model.layers.0.". An empty name is a norm
/// that it does not have.
struct LayerNames {
  std::string attention_norm = "input_layernorm";       ///< of what attention reads
  std::string attention_post_norm;                      ///< of what it adds to the residual
  std::string mlp_norm = "post_attention_layernorm";    ///< of what the MLP reads
  std::string mlp_post_norm;                            ///< of what it adds
  std::string scalar;     ///< a number that the layer's output is multiplied by; empty: there is none
  bool parallel = false;  ///< the MLP reads what attention reads
  std::string attention = "self_attn", recurrent;
  const char *output = "o_proj", *q_norm = "q_norm", *k_norm = "k_norm";  ///< attention's
  std::string mlp = "mlp";
  const char* mlp_parts[3] = {"gate_proj", "up_proj", "down_proj"};
  ExpertNames experts;
  bool fused = false;     ///< q, k and v are one tensor, qkv_proj, and so are gate and up, gate_up_proj
  bool neighbours = false;  ///< rows of q and k are in the order in which neighbours rotate, and packed in halves'
};

}  // namespace torpor::model
