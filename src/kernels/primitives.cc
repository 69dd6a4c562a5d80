#include "kernels/primitives.h"

#include <algorithm>
#include <string>
#include <utility>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>
#include <mlx/utils.h>

#include "torpor/error.h"

namespace torpor::kernels {
namespace {

[[noreturn]] void invalid(const std::string& what) { throw Error(ErrorCode::kInvalidArgument, what); }

std::string shape_text(const mx::array& a) {
  std::string text = "[";
  for (size_t i = 0; i < a.ndim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(a.shape(int(i)));
  return text + "]";
}

/// A node with one output. Its task runs on MLX's stream thread, where MLX catches what it throws and rethrows it
/// from eval() as a std::runtime_error with the same text; or at once, on the calling thread (`compute`).
class Kernel : public mx::Primitive {
 public:
  explicit Kernel(mx::Stream stream) : Primitive(stream) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) final {
    for (const mx::array& in : inputs) {
      if (!in.flags().row_contiguous) invalid(std::string(name()) + ": an input is not contiguous.");
    }
    run(inputs, outputs[0]);
  }
  void compute(const std::vector<mx::array>& inputs, mx::array& out) {
    at_once_ = true;
    run(inputs, out);
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) final {
    throw Error(ErrorCode::kInternal, std::string(name()) + " runs on the CPU only.");
  }

 protected:
  virtual void run(const std::vector<mx::array>& inputs, mx::array& out) = 0;

  /// MLX keeps the buffers of a node's inputs and outputs until its tasks are done, so a task may hold plain pointers.
  template <class F>
  void dispatch(F&& task) {
    if (at_once_) {
      task();
    } else {
      mx::cpu::get_command_encoder(stream()).dispatch(std::forward<F>(task));
    }
  }

 private:
  bool at_once_ = false;
};

/// `kernel`'s node, or its result at once where all inputs are there: a decoded token is some two hundred kernels of a few
/// microseconds each, which neither a graph nor a walk to another thread should come between.
mx::array node(mx::Shape shape, std::shared_ptr<Kernel> kernel, std::vector<mx::array> inputs) {
  const bool ready = std::all_of(inputs.begin(), inputs.end(), [](const mx::array& in) {
    return in.is_available() && in.flags().row_contiguous;
  });
  if (!ready) return mx::array(std::move(shape), mx::float32, std::move(kernel), std::move(inputs));
  mx::array out(std::move(shape), mx::float32, nullptr, {});
  kernel->compute(inputs, out);
  out.set_status(mx::array::Status::available);
  return out;
}

float* allocate(mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  return out.data<float>();
}

/// `x` as row-major f32 (or i32). What another kernel made, or is evaluated and contiguous, is taken as it is.
mx::array prepared(mx::array x, mx::Dtype dtype, mx::Stream stream) {
  if (x.dtype() == dtype) {
    if (x.has_primitive() ? dynamic_cast<const Kernel*>(&x.primitive()) != nullptr
                          : x.is_available() && x.flags().row_contiguous) {
      return x;
    }
    return mx::contiguous(x, false, stream);
  }
  return mx::contiguous(mx::astype(x, dtype, stream), false, stream);
}

mx::Stream cpu_stream() { return mx::default_stream(mx::Device(mx::Device::cpu)); }

void check_matrix(const mx::array& x, const char* what) {
  if (x.ndim() != 2) invalid(std::string(what) + ": a matrix is expected, not an array of shape " + shape_text(x) + ".");
}

void check_columns(const mx::array& x, int k, const char* what) {
  check_matrix(x, what);
  if (x.shape(1) != k) {
    invalid(std::string(what) + ": " + std::to_string(k) + " columns are expected, not an array of shape " + shape_text(x) +
            ".");
  }
}

class Linear final : public Kernel {
 public:
  Linear(mx::Stream stream, std::shared_ptr<const PackedLinear> w) : Kernel(stream), w_(std::move(w)) {}
  const char* name() const override { return "TorporLinear"; }

  void run(const std::vector<mx::array>& inputs, mx::array& out) override {
    const float* x = inputs[0].data<float>();
    const float* residual = inputs.size() > 1 ? inputs[1].data<float>() : nullptr;
    // Each output is written after its residual was read: the sum may replace it.
    if (residual != nullptr && inputs[1].is_donatable()) {
      out.copy_shared_buffer(inputs[1]);
    } else {
      allocate(out);
    }
    dispatch([x, m = out.shape(0), w = w_, residual, y = out.data<float>()] { kernels::linear(x, m, *w, residual, y); });
  }

 private:
  std::shared_ptr<const PackedLinear> w_;
};

class GatedLinear final : public Kernel {
 public:
  GatedLinear(mx::Stream stream, std::shared_ptr<const PackedLinear> w, Activation activation)
      : Kernel(stream), w_(std::move(w)), activation_(activation) {}
  const char* name() const override { return "TorporGatedLinear"; }

  void run(const std::vector<mx::array>& inputs, mx::array& out) override {
    dispatch([x = inputs[0].data<float>(), m = out.shape(0), w = w_, activation = activation_, y = allocate(out)] {
      kernels::gated_linear(x, m, *w, activation, y);
    });
  }

 private:
  std::shared_ptr<const PackedLinear> w_;
  Activation activation_;
};

class MixtureOfExperts final : public Kernel {
 public:
  MixtureOfExperts(mx::Stream stream, std::shared_ptr<const Moe> w) : Kernel(stream), w_(std::move(w)) {}
  const char* name() const override { return "TorporMoe"; }

  void run(const std::vector<mx::array>& inputs, mx::array& out) override {
    dispatch([x = inputs[0].data<float>(), logits = inputs[1].data<float>(), m = out.shape(0), w = w_, y = allocate(out)] {
      kernels::moe(x, logits, m, *w, y);
    });
  }

 private:
  std::shared_ptr<const Moe> w_;
};

class HeadsLinear final : public Kernel {
 public:
  HeadsLinear(mx::Stream stream, std::shared_ptr<const HeadWeights> heads) : Kernel(stream), heads_(std::move(heads)) {}
  const char* name() const override { return "TorporHeadsLinear"; }

  void run(const std::vector<mx::array>& inputs, mx::array& out) override {
    dispatch([x = inputs[0].data<float>(), m = out.shape(0), heads = heads_, y = allocate(out)] {
      kernels::heads_linear(x, m, *heads, y);
    });
  }

 private:
  std::shared_ptr<const HeadWeights> heads_;
};

class RecurrentLayer final : public Kernel {
 public:
  RecurrentLayer(mx::Stream stream, std::shared_ptr<const Recurrent> w, std::vector<RecurrentSequence> sequences)
      : Kernel(stream), w_(std::move(w)), sequences_(std::move(sequences)) {}
  const char* name() const override { return "TorporRecurrent"; }

  void run(const std::vector<mx::array>& inputs, mx::array& out) override {
    dispatch([given = inputs[0].data<float>(), m = out.shape(0), w = w_, sequences = sequences_, y = allocate(out)] {
      kernels::recurrent(given, m, *w, sequences, y);
    });
  }

 private:
  std::shared_ptr<const Recurrent> w_;
  std::vector<RecurrentSequence> sequences_;
};

class Gate final : public Kernel {
 public:
  explicit Gate(mx::Stream stream) : Kernel(stream) {}
  const char* name() const override { return "TorporGate"; }

  void run(const std::vector<mx::array>& inputs, mx::array& out) override {
    dispatch([x = inputs[0].data<float>(), gates = inputs[1].data<float>(), n = out.size(), y = allocate(out)] {
      kernels::gate(x, gates, n, y);
    });
  }
};

class RmsNorm final : public Kernel {
 public:
  RmsNorm(mx::Stream stream, float eps) : Kernel(stream), eps_(eps) {}
  const char* name() const override { return "TorporRmsNorm"; }

  void run(const std::vector<mx::array>& inputs, mx::array& out) override {
    dispatch([x = inputs[0].data<float>(), m = out.shape(0), k = out.shape(1), weight = inputs[1].data<float>(), eps = eps_,
              y = allocate(out)] { kernels::rms_norm(x, m, k, weight, eps, y); });
  }

 private:
  float eps_;
};

class Embedding final : public Kernel {
 public:
  Embedding(mx::Stream stream, std::shared_ptr<const PackedLinear> w) : Kernel(stream), w_(std::move(w)) {}
  const char* name() const override { return "TorporEmbedding"; }

  void run(const std::vector<mx::array>& inputs, mx::array& out) override {
    dispatch([tokens = inputs[0].data<int32_t>(), m = out.shape(0), w = w_, y = allocate(out)] {
      kernels::embedding(tokens, m, *w, y);
    });
  }

 private:
  std::shared_ptr<const PackedLinear> w_;
};

/// Where a layer's tensors are in a run; null pointers if a window has left it behind.
KvRunView view_of(const KvBuffer& run, const SequenceRuns& at, bool quantized) {
  std::byte* data = run.data;
  if (data == nullptr) return {nullptr, nullptr};
  if (!quantized) return {data + at.key_offset, data + at.value_offset};
  return {data + at.key_offset,      data + at.value_offset,       data + at.key_scale_offset,
          data + at.key_bias_offset, data + at.value_scale_offset, data + at.value_bias_offset};
}

class Attention final : public Kernel {
 public:
  Attention(mx::Stream stream, std::shared_ptr<const AttentionSpec> spec, std::vector<SequenceRuns> sequences)
      : Kernel(stream), spec_(std::move(spec)), sequences_(std::move(sequences)) {}
  const char* name() const override { return "TorporAttention"; }

  void run(const std::vector<mx::array>& inputs, mx::array& out) override {
    const mx::array& qkv = inputs[0];
    // The kernel works in qkv; if others still need it, in a copy.
    const float* from = qkv.data<float>();
    float* scratch = const_cast<float*>(from);
    const size_t size = qkv.size();
    std::shared_ptr<mx::array> copy;
    if (!qkv.is_donatable()) {
      copy = std::make_shared<mx::array>(qkv.shape(), mx::float32, nullptr, std::vector<mx::array>{});
      scratch = allocate(*copy);
    }
    // A node is evaluated once: its share of the runs' memory moves on to the task that works on it.
    dispatch([copy, from, scratch, size, spec = spec_, given = std::move(sequences_), y = allocate(out)] {
      if (scratch != from) std::copy(from, from + size, scratch);
      std::vector<KvRunView> views;
      std::vector<AttentionSequence> sequences;
      size_t n_views = 0;
      for (const SequenceRuns& s : given) n_views += s.runs.size();
      views.reserve(n_views);  // sequences point into it
      for (const SequenceRuns& s : given) {
        const KvRunView* first = views.data() + views.size();
        for (const KvBuffer& run : s.runs) {
          views.push_back(view_of(run, s, spec->kv_bits != 0));
        }
        sequences.push_back({s.row, s.n, s.position, {first, s.runs.size()}});
      }
      kernels::attention(scratch, *spec, sequences, y);
    });
  }

 private:
  std::shared_ptr<const AttentionSpec> spec_;
  std::vector<SequenceRuns> sequences_;
};

}  // namespace

mx::array linear(const mx::array& x, std::shared_ptr<const PackedLinear> w) {
  check_columns(x, w->k(), "linear");
  const mx::Stream stream = cpu_stream();
  const mx::Shape shape{x.shape(0), w->n()};
  return node(shape, std::make_shared<Linear>(stream, std::move(w)), {prepared(x, mx::float32, stream)});
}

mx::array linear_add(const mx::array& x, std::shared_ptr<const PackedLinear> w, const mx::array& residual) {
  check_columns(x, w->k(), "linear_add");
  check_columns(residual, w->n(), "linear_add's residual");
  if (residual.shape(0) != x.shape(0)) invalid("linear_add: the residual has other rows than the input.");
  const mx::Stream stream = cpu_stream();
  const mx::Shape shape{x.shape(0), w->n()};
  return node(shape, std::make_shared<Linear>(stream, std::move(w)),
                   {prepared(x, mx::float32, stream), prepared(residual, mx::float32, stream)});
}

mx::array gated_linear(const mx::array& x, std::shared_ptr<const PackedLinear> w, Activation activation) {
  check_columns(x, w->k(), "gated_linear");
  const mx::Stream stream = cpu_stream();
  const mx::Shape shape{x.shape(0), w->n()};
  return node(shape, std::make_shared<GatedLinear>(stream, std::move(w), activation),
                   {prepared(x, mx::float32, stream)});
}

mx::array heads_linear(const mx::array& x, std::shared_ptr<const HeadWeights> heads) {
  if (heads->empty()) invalid("heads_linear: there are no heads.");
  check_columns(x, heads->front()->k() * int(heads->size()), "heads_linear");
  const mx::Stream stream = cpu_stream();
  const mx::Shape shape{x.shape(0), heads->front()->n() * int(heads->size())};
  return node(shape, std::make_shared<HeadsLinear>(stream, std::move(heads)), {prepared(x, mx::float32, stream)});
}

mx::array moe(const mx::array& x, const mx::array& logits, std::shared_ptr<const Moe> w) {
  if (w->experts.empty()) invalid("moe: there are no experts.");
  check_columns(x, w->experts[0].up->k(), "moe");
  check_columns(logits, int(w->experts.size()), "moe's logits");
  if (logits.shape(0) != x.shape(0)) invalid("moe: the logits have other rows than the input.");
  const mx::Stream stream = cpu_stream();
  const mx::Shape shape{x.shape(0), w->experts[0].down->n()};
  return node(shape, std::make_shared<MixtureOfExperts>(stream, std::move(w)),
              {prepared(x, mx::float32, stream), prepared(logits, mx::float32, stream)});
}

mx::array recurrent(const mx::array& given, std::shared_ptr<const Recurrent> w,
                    std::vector<RecurrentSequence> sequences) {
  check_columns(given, w->shape.given(), "recurrent");
  for (const RecurrentSequence& s : sequences) {
    if (s.row < 0 || s.n <= 0 || s.n > given.shape(0) - s.row || s.next == nullptr) {
      invalid("recurrent: a sequence lies outside the input's " + std::to_string(given.shape(0)) + " rows.");
    }
  }
  const mx::Stream stream = cpu_stream();
  const mx::Shape shape{given.shape(0), w->shape.output()};
  return node(shape, std::make_shared<RecurrentLayer>(stream, std::move(w), std::move(sequences)),
              {prepared(given, mx::float32, stream)});
}

mx::array gate(const mx::array& x, const mx::array& gates) {
  check_matrix(x, "gate");
  if (gates.shape() != x.shape()) invalid("gate: there is not one gate for each value.");
  const mx::Stream stream = cpu_stream();
  return node(x.shape(), std::make_shared<Gate>(stream),
              {prepared(x, mx::float32, stream), prepared(gates, mx::float32, stream)});
}

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  check_matrix(x, "rms_norm");
  if (weight.ndim() != 1 || weight.shape(0) != x.shape(1)) {
    invalid("rms_norm: a weight of shape " + shape_text(weight) + " doesn't fit an input of shape " + shape_text(x) + ".");
  }
  const mx::Stream stream = cpu_stream();
  return node(x.shape(), std::make_shared<RmsNorm>(stream, eps),
                   {prepared(x, mx::float32, stream), prepared(weight, mx::float32, stream)});
}

mx::array embedding(const mx::array& tokens, std::shared_ptr<const PackedLinear> w) {
  if (tokens.ndim() != 1) invalid("embedding: tokens have the shape [M], not " + shape_text(tokens) + ".");
  const mx::Stream stream = cpu_stream();
  const mx::Shape shape{tokens.shape(0), w->k()};
  return node(shape, std::make_shared<Embedding>(stream, std::move(w)),
                   {prepared(tokens, mx::int32, stream)});
}

mx::array attention(mx::array qkv, std::shared_ptr<const AttentionSpec> spec, std::vector<SequenceRuns> sequences) {
  const int latent = spec->latent, width = spec->head_dim, value_width = latent > 0 ? width - latent : width;
  check_columns(qkv, (spec->n_heads + (latent > 0 ? 1 : 2 * spec->n_kv_heads)) * width, "attention");
  const mx::Stream stream = cpu_stream();
  const bool quantized = spec->kv_bits != 0;
  if (quantized && (spec->kv_bits.keys <= 0 || spec->kv_bits.values <= 0 || spec->kv_group <= 0)) {
    invalid("attention: quantized KV needs its bits and group.");
  }
  const size_t rows = size_t(spec->n_kv_heads) * kSegmentTokens, element_size = kv_dtype_size(spec->kv_dtype);
  const size_t keys = rows * size_t(latent > 0 ? latent : width), values = rows * size_t(value_width);
  const auto row_bytes = [&](size_t elements, int bits) {
    return quantized ? elements * size_t(bits) / 8 : elements * element_size;
  };
  const auto scale_bytes = [&](size_t elements) {
    return quantized ? elements / size_t(spec->kv_group) * element_size : 0;
  };
  for (SequenceRuns& s : sequences) {
    if (s.row < 0 || s.n < 0 || s.position < 0 || s.n > qkv.shape(0) - s.row) {
      invalid("attention: a sequence lies outside the input's " + std::to_string(qkv.shape(0)) + " rows.");
    }
    const size_t needed = (size_t(s.position) + size_t(s.n) + kSegmentTokens - 1) / kSegmentTokens;
    if (s.runs.size() < needed) invalid("attention: the runs end before the sequence does.");
    const size_t end = std::max({s.key_offset + row_bytes(keys, spec->kv_bits.keys),
                                 s.value_offset + row_bytes(values, spec->kv_bits.values),
                                 std::max(s.key_scale_offset, s.key_bias_offset) + scale_bytes(keys),
                                 std::max(s.value_scale_offset, s.value_bias_offset) + scale_bytes(values)});
    for (size_t i = 0; i < s.runs.size(); ++i) {
      KvBuffer& run = s.runs[i];
      if (run.data == nullptr || run.size >= end) continue;
      if (spec->window == 0 || int64_t(i + 1) * kSegmentTokens > int64_t(s.position) - spec->window) {
        invalid("attention: a run of " + std::to_string(run.size) + " bytes is too small for its layer.");
      }
      run.data = nullptr;
    }
  }
  const mx::Shape shape{qkv.shape(0), spec->n_heads * (latent > 0 ? latent : width)};
  std::vector<mx::array> inputs;
  inputs.push_back(prepared(std::move(qkv), mx::float32, stream));
  return node(shape, std::make_shared<Attention>(stream, std::move(spec), std::move(sequences)), std::move(inputs));
}

}  // namespace torpor::kernels
