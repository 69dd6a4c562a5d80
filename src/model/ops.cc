#include "model/ops.h"

#include <mlx/ops.h>

namespace torpor::model {

mx::array Ops::add(const mx::array& x, const mx::array& y) const {
  if (x.dtype() != mx::float16) return mx::add(x, y, device());
  // Gemma's residuals outgrow f16; as in mlx-lm they stay at its largest number.
  const auto wide = [&](const mx::array& a) { return mx::astype(a, mx::float32, device()); };
  const mx::array bound(65504.0f);
  const mx::array sum = mx::clip(mx::add(wide(x), wide(y), device()), mx::negative(bound, device()), bound, device());
  return mx::astype(sum, mx::float16, device());
}

mx::array Ops::scale(const mx::array& x, float factor) const {
  return mx::multiply(x, mx::array(factor, x.dtype()), device());
}

mx::array Ops::soft_cap(const mx::array& x, float cap) const {
  return cap == 0 ? x : scale(mx::tanh(scale(x, 1 / cap), device()), cap);
}

}  // namespace torpor::model
