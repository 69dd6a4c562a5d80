#include "model/ops.h"

#include <mlx/ops.h>

namespace torpor::model {

mx::array Ops::add(const mx::array& x, const mx::array& y) const { return mx::add(x, y, device()); }

mx::array Ops::scale(const mx::array& x, float factor) const {
  return mx::multiply(x, mx::array(factor, x.dtype()), device());
}

mx::array Ops::soft_cap(const mx::array& x, float cap) const {
  return cap == 0 ? x : scale(mx::tanh(scale(x, 1 / cap), device()), cap);
}

}  // namespace torpor::model
