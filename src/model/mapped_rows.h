#pragma once
/// A table of embeddings that stays in its file: rows are read as tokens ask for them.

#include <vector>

#include <mlx/array.h>

#include "model/projection.h"

namespace torpor::model {

namespace mx = mlx::core;

class MappedRows {
 public:
  /// Holds the files of `weights`, where `table` lies. kInvalidArgument for a quantization that is not affine.
  MappedRows(const Weights& weights, Projection table);

  /// [tokens, table's k], f32. A token that the table lacks is its first.
  mx::array rows(const std::vector<int32_t>& tokens) const;

 private:
  Weights weights_;
  Projection table_;
};

}  // namespace torpor::model
