#include "model/recurrent_mlx.h"

#include <cmath>
#include <cstring>

#include <mlx/fast.h>
#include <mlx/ops.h>

#include "model/mlx_linear.h"

namespace torpor::model {
namespace {

using kernels::Recurrence;
using kernels::RecurrentShape;
using on_mlx::silu;

mx::array to_array(const std::vector<float>& values, mx::Shape shape) {
  return mx::array(values.data(), std::move(shape), mx::float32);
}

/// A copy: the state is written while arrays may still be read.
mx::array from_state(const std::byte* state, mx::Shape shape) {
  if (state == nullptr) return mx::zeros(std::move(shape), mx::float32);
  return mx::array(reinterpret_cast<const float*>(state), std::move(shape), mx::float32);
}

mx::array columns(const mx::array& rows, int first, int n) {
  return mx::slice(rows, {0, 0, first}, {rows.shape(0), rows.shape(1), first + n});
}

/// Of every sequence.
mx::array row(const mx::array& rows, int i) { return mx::take(rows, i, 1); }

mx::array softplus(const mx::array& x) { return mx::logaddexp(x, mx::array(0.0f)); }

/// What all heads do with a token: S [B, H, K, V] is multiplied, and added to.
struct Steps {
  mx::array decay, strength;  // [B, n, H, 1, 1]
  mx::array keys, queries;    // [B, n, H, K, 1]
  mx::array values;           // [B, n, H, 1, V]
};

/// Rows of B sequences, n of each: given [B, n, given()].
class Rows {
 public:
  Rows(const kernels::Recurrent& cell, mx::array given) : cell_(cell), shape_(cell.shape), given_(std::move(given)) {}

  /// y [B, n, output()]. `tail` and `heads` become those of the next state.
  mx::array run(mx::array& tail, mx::array& heads) const {
    const int width = shape_.channels(), output = shape_.output();
    if (shape_.kind == Recurrence::kShortConv) {
      const mx::array inputs = mx::multiply(columns(given_, 0, width), columns(given_, 2 * width, width));
      return mx::multiply(columns(given_, width, width), convolved(inputs, tail));
    }
    const bool delta = shape_.kind == Recurrence::kGatedDelta;
    const mx::array mixed = silu(convolved(columns(given_, delta ? 0 : output, width), tail));
    const mx::array gates = silu(columns(given_, delta ? width : 0, output));
    mx::array y = delta ? through(delta_steps(mixed), heads) : through(mamba_steps(mixed), heads);
    if (shape_.tiled) y = mx::swapaxes(mx::unflatten(y, 2, {shape_.n_groups, -1}), 2, 3);
    y = mx::reshape(y, {given_.shape(0), given_.shape(1), output});
    return shape_.norm.gate_before ? normed(mx::multiply(y, gates)) : mx::multiply(normed(y), gates);
  }

 private:
  mx::array convolved(const mx::array& inputs, mx::array& tail) const {
    const int sequences = inputs.shape(0), n = inputs.shape(1), width = inputs.shape(2), kept = shape_.taps - 1;
    const mx::array all = mx::concatenate({tail, inputs}, 1), taps = to_array(cell_.conv, {1, shape_.taps, width});
    const bool biased = !cell_.conv_bias.empty();
    mx::array sum = biased ? to_array(cell_.conv_bias, {1, width}) : mx::zeros({1, width}, mx::float32);
    for (int t = 0; t < shape_.taps; ++t) {
      sum = mx::add(sum, mx::multiply(mx::slice(all, {0, t, 0}, {sequences, t + n, width}), row(taps, t)));
    }
    tail = mx::slice(all, {0, n, 0}, {sequences, n + kept, width});
    return sum;
  }
  /// Columns [first, first + n) as heads, those of a group repeated: [B, n, H, -1].
  mx::array heads_of(const mx::array& rows, int first, int n, int own) const {
    const mx::array heads = mx::reshape(columns(rows, first, n), {rows.shape(0), rows.shape(1), own, -1});
    return mx::repeat(heads, shape_.n_heads / own, 2);
  }
  mx::array scalars(int which) const {
    return columns(given_, shape_.channels() + shape_.output() + which * shape_.n_heads, shape_.n_heads);
  }
  mx::array of_heads(const std::vector<float>& values) const { return to_array(values, {1, shape_.n_heads}); }
  static mx::array expanded(const mx::array& x, std::vector<int> axes) { return mx::expand_dims(x, std::move(axes)); }
  /// exp(-exp(A_log) step)
  mx::array decay(const mx::array& step) const {
    return mx::exp(mx::negative(mx::multiply(mx::exp(of_heads(cell_.log_decay)), step)));
  }

  Steps delta_steps(const mx::array& mixed) const {
    const int keys = shape_.n_groups * shape_.key_dim;
    const float inverse = 1 / float(shape_.key_dim);
    const auto unit = [&](int part, float scale) {
      const mx::array heads = heads_of(mixed, part * keys, keys, shape_.n_groups);
      const mx::array rms = mx::fast::rms_norm(heads, std::nullopt, 1e-6f * inverse);
      return expanded(mx::multiply(rms, mx::array(scale)), {-1});
    };
    const mx::array step = softplus(mx::add(scalars(1), of_heads(cell_.step_bias)));
    return {.decay = expanded(decay(step), {-1, -2}), .strength = expanded(mx::sigmoid(scalars(0)), {-1, -2}),
            .keys = unit(1, std::sqrt(inverse)), .queries = unit(0, inverse),
            .values = expanded(heads_of(mixed, 2 * keys, shape_.output(), shape_.n_heads), {-2})};
  }
  Steps mamba_steps(const mx::array& mixed) const {
    const int keys = shape_.n_groups * shape_.key_dim, output = shape_.output();
    const mx::array step = mx::clip(softplus(mx::add(scalars(0), of_heads(cell_.step_bias))),
                                    mx::array(shape_.min_step), mx::array(shape_.max_step));
    return {.decay = expanded(decay(step), {-1, -2}), .strength = expanded(step, {-1, -2}),
            .keys = expanded(heads_of(mixed, output, keys, shape_.n_groups), {-1}),
            .queries = expanded(heads_of(mixed, output + keys, keys, shape_.n_groups), {-1}),
            .values = expanded(heads_of(mixed, 0, output, shape_.n_heads), {-2})};
  }

  /// Token after token. [B, n, H, V]
  mx::array through(const Steps& steps, mx::array& state) const {
    const bool delta = shape_.kind == Recurrence::kGatedDelta;
    std::vector<mx::array> outputs;
    for (int t = 0; t < given_.shape(1); ++t) {
      const mx::array key = row(steps.keys, t), value = row(steps.values, t);
      state = mx::multiply(state, row(steps.decay, t));
      mx::array added = value;
      if (delta) added = mx::subtract(value, mx::sum(mx::multiply(state, key), 2, /*keepdims=*/true));
      state = mx::add(state, mx::multiply(key, mx::multiply(added, row(steps.strength, t))));
      mx::array y = mx::sum(mx::multiply(state, row(steps.queries, t)), 2);
      if (!delta) y = mx::add(y, mx::multiply(mx::squeeze(value, 2), to_array(cell_.skip, {shape_.n_heads, 1})));
      outputs.push_back(std::move(y));
    }
    return mx::stack(outputs, 1);
  }
  mx::array normed(const mx::array& y) const {
    const mx::array parts = mx::reshape(y, {y.shape(0), y.shape(1), -1, shape_.norm.size});
    const mx::array weight = to_array(cell_.norm, {1, int(cell_.norm.size()) / shape_.norm.size, shape_.norm.size});
    return mx::reshape(mx::multiply(mx::fast::rms_norm(parts, std::nullopt, shape_.norm.eps), weight), y.shape());
  }

  const kernels::Recurrent& cell_;
  const RecurrentShape& shape_;
  const mx::array given_;
};

}  // namespace

mx::array recurrent_on_mlx(const mx::array& given, const kernels::Recurrent& cell, size_t offset, Batch& batch) {
  const RecurrentShape& shape = cell.shape;
  const mx::Shape of_tail{1, shape.taps - 1, shape.channels()};
  const mx::Shape of_heads{1, shape.n_heads, shape.key_dim, shape.value_dim};
  const size_t tail_bytes = shape.tail() * sizeof(float);
  const mx::array floats = mx::astype(given, mx::float32);
  std::vector<mx::array> outputs;
  for (const std::span<const BatchSequence> block : blocks_of(batch)) {
    const int first = block.front().row, n = block.front().n, sequences = int(block.size());
    const auto read = [&](size_t bytes, const mx::Shape& of_one) {
      std::vector<mx::array> all;
      for (const BatchSequence& s : block) {
        all.push_back(from_state(s.state == nullptr ? nullptr : s.state + offset + bytes, of_one));
      }
      return mx::concatenate(all, 0);
    };
    const auto write = [&](size_t bytes, const mx::array& state) {
      const std::vector<mx::array> all = mx::split(state, sequences, 0);
      for (size_t i = 0; i < block.size(); ++i) {
        batch.states.emplace_back(block[i].next_state + offset + bytes, mx::contiguous(all[i]));
      }
    };
    mx::array tail = read(0, of_tail), heads = read(tail_bytes, of_heads);
    const mx::array rows = mx::slice(floats, {first, 0}, {first + sequences * n, given.shape(1)});
    const mx::array y = Rows(cell, mx::reshape(rows, {sequences, n, given.shape(1)})).run(tail, heads);
    outputs.push_back(mx::reshape(y, {sequences * n, shape.output()}));
    write(0, tail);
    if (shape.n_heads > 0) write(tail_bytes, heads);
  }
  return outputs.size() == 1 ? outputs[0] : mx::concatenate(outputs, 0);
}

}  // namespace torpor::model
