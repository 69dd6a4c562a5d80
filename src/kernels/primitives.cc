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
/// from eval() as a std::runtime_error with the same text.
class Kernel : public mx::Primitive {
 public:
  explicit Kernel(mx::Stream stream) : Primitive(stream) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) final {
    for (const mx::array& in : inputs) {
      if (!in.flags().row_contiguous) invalid(std::string(name()) + ": an input is not contiguous.");
    }
    run(inputs, outputs[0]);
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) final {
    throw Error(ErrorCode::kInternal, std::string(name()) + " runs on the CPU only.");
  }

 protected:
  virtual void run(const std::vector<mx::array>& inputs, mx::array& out) = 0;

  /// MLX keeps the buffers of a node's inputs and outputs until its tasks are done, so a task may hold plain pointers.
  template <class F>
  void dispatch(F&& task) {
    mx::cpu::get_command_encoder(stream()).dispatch(std::forward<F>(task));
  }
};

float* allocate(mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  return out.data<float>();
}

/// `x` as row-major f32 (or i32). What another kernel made, or is evaluated and contiguous, is taken as it is.
mx::array prepared(const mx::array& x, mx::Dtype dtype, mx::Stream stream) {
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
      for (int i = 0; i < m; ++i) {
        if (tokens[i] < 0 || tokens[i] >= w->n()) {
          invalid("Token " + std::to_string(tokens[i]) + " is outside a vocabulary of " + std::to_string(w->n()) + ".");
        }
      }
      kernels::embedding(tokens, m, *w, y);
    });
  }

 private:
  std::shared_ptr<const PackedLinear> w_;
};

/// A SequenceRuns without its arrays, which are inputs of the node.
struct SequenceShape {
  int row = 0, n = 0, position = 0;
  size_t n_runs = 0, key_offset = 0, value_offset = 0;
};

class Attention final : public Kernel {
 public:
  Attention(mx::Stream stream, std::shared_ptr<const AttentionSpec> spec, std::vector<SequenceShape> sequences)
      : Kernel(stream), spec_(std::move(spec)), sequences_(std::move(sequences)) {}
  const char* name() const override { return "TorporAttention"; }

  void run(const std::vector<mx::array>& inputs, mx::array& out) override {
    const mx::array& qkv = inputs[0];
    std::vector<KvRunView> views;
    views.reserve(inputs.size() - 1);
    std::vector<AttentionSequence> sequences;
    size_t next = 1;
    for (const SequenceShape& s : sequences_) {
      for (size_t i = 0; i < s.n_runs; ++i, ++next) {
        // An empty array stands for a run that a window has left behind.
        auto* data = inputs[next].size() == 0 ? nullptr : const_cast<std::byte*>(
            reinterpret_cast<const std::byte*>(inputs[next].data<uint8_t>()));
        views.push_back(data == nullptr ? KvRunView{nullptr, nullptr} : KvRunView{data + s.key_offset, data + s.value_offset});
      }
      sequences.push_back({s.row, s.n, s.position, {}});
    }
    // The kernel works in qkv; if others still need it, in a copy.
    const float* from = qkv.data<float>();
    float* scratch = const_cast<float*>(from);
    const size_t size = qkv.size();
    if (!qkv.is_donatable()) {
      mx::array copy(qkv.shape(), mx::float32, nullptr, {});
      scratch = allocate(copy);
      mx::cpu::get_command_encoder(stream()).add_temporary(std::move(copy));
    }
    dispatch([from, scratch, size, spec = spec_, shapes = sequences_, views = std::move(views),
              sequences = std::move(sequences), y = allocate(out)]() mutable {
      if (scratch != from) std::copy(from, from + size, scratch);
      size_t first = 0;
      for (size_t i = 0; i < shapes.size(); ++i) {
        sequences[i].runs = {views.data() + first, shapes[i].n_runs};
        first += shapes[i].n_runs;
      }
      kernels::attention(scratch, *spec, sequences, y);
    });
  }

 private:
  std::shared_ptr<const AttentionSpec> spec_;
  std::vector<SequenceShape> sequences_;
};

}  // namespace

mx::array linear(const mx::array& x, std::shared_ptr<const PackedLinear> w) {
  check_columns(x, w->k(), "linear");
  const mx::Stream stream = cpu_stream();
  const mx::Shape shape{x.shape(0), w->n()};
  return mx::array(shape, mx::float32, std::make_shared<Linear>(stream, std::move(w)), {prepared(x, mx::float32, stream)});
}

mx::array linear_add(const mx::array& x, std::shared_ptr<const PackedLinear> w, const mx::array& residual) {
  check_columns(x, w->k(), "linear_add");
  check_columns(residual, w->n(), "linear_add's residual");
  if (residual.shape(0) != x.shape(0)) invalid("linear_add: the residual has other rows than the input.");
  const mx::Stream stream = cpu_stream();
  const mx::Shape shape{x.shape(0), w->n()};
  return mx::array(shape, mx::float32, std::make_shared<Linear>(stream, std::move(w)),
                   {prepared(x, mx::float32, stream), prepared(residual, mx::float32, stream)});
}

mx::array gated_linear(const mx::array& x, std::shared_ptr<const PackedLinear> w, Activation activation) {
  check_columns(x, w->k(), "gated_linear");
  const mx::Stream stream = cpu_stream();
  const mx::Shape shape{x.shape(0), w->n()};
  return mx::array(shape, mx::float32, std::make_shared<GatedLinear>(stream, std::move(w), activation),
                   {prepared(x, mx::float32, stream)});
}

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  check_matrix(x, "rms_norm");
  if (weight.ndim() != 1 || weight.shape(0) != x.shape(1)) {
    invalid("rms_norm: a weight of shape " + shape_text(weight) + " doesn't fit an input of shape " + shape_text(x) + ".");
  }
  const mx::Stream stream = cpu_stream();
  return mx::array(x.shape(), mx::float32, std::make_shared<RmsNorm>(stream, eps),
                   {prepared(x, mx::float32, stream), prepared(weight, mx::float32, stream)});
}

mx::array embedding(const mx::array& tokens, std::shared_ptr<const PackedLinear> w) {
  if (tokens.ndim() != 1) invalid("embedding: tokens have the shape [M], not " + shape_text(tokens) + ".");
  const mx::Stream stream = cpu_stream();
  const mx::Shape shape{tokens.shape(0), w->k()};
  return mx::array(shape, mx::float32, std::make_shared<Embedding>(stream, std::move(w)),
                   {prepared(tokens, mx::int32, stream)});
}

mx::array attention(const mx::array& qkv, std::shared_ptr<const AttentionSpec> spec, std::vector<SequenceRuns> sequences) {
  check_columns(qkv, (spec->n_heads + 2 * spec->n_kv_heads) * spec->head_dim, "attention");
  const mx::Stream stream = cpu_stream();
  std::vector<mx::array> inputs{prepared(qkv, mx::float32, stream)};
  std::vector<SequenceShape> shapes;
  const size_t run_bytes = size_t(spec->n_kv_heads) * kSegmentTokens * spec->head_dim * kv_dtype_size(spec->kv_dtype);
  for (SequenceRuns& s : sequences) {
    if (s.row < 0 || s.n < 0 || s.position < 0 || s.n > qkv.shape(0) - s.row) {
      invalid("attention: a sequence lies outside the input's " + std::to_string(qkv.shape(0)) + " rows.");
    }
    const size_t needed = (size_t(s.position) + size_t(s.n) + kSegmentTokens - 1) / kSegmentTokens;
    if (s.runs.size() < needed) invalid("attention: the runs end before the sequence does.");
    for (const mx::array& run : s.runs) {
      if (run.dtype() != mx::uint8) invalid("attention: a run is a buffer of bytes (u8).");
      if (run.size() != 0 && (run.nbytes() < s.key_offset + run_bytes || run.nbytes() < s.value_offset + run_bytes)) {
        invalid("attention: a run of " + std::to_string(run.nbytes()) + " bytes is too small for its layer.");
      }
    }
    shapes.push_back({s.row, s.n, s.position, s.runs.size(), s.key_offset, s.value_offset});
    inputs.insert(inputs.end(), s.runs.begin(), s.runs.end());
  }
  const mx::Shape shape{qkv.shape(0), spec->n_heads * spec->head_dim};
  return mx::array(shape, mx::float32, std::make_shared<Attention>(stream, std::move(spec), std::move(shapes)),
                   std::move(inputs));
}

}  // namespace torpor::kernels
