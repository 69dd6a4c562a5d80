// torpor._core: the engine's half, linked with the libmlx that mlx.core loads.

#include "bindings.h"

NB_MODULE(_core, module) {
  module.doc() = "The C++ half of torpor's engine; use the package's own names.";
  nanobind::module_::import_("mlx.core");  // its array type must be known before ours mention it
  torpor::python::bind_common(module);
  torpor::python::bind_turn(module);
  torpor::python::bind_engine(module);
  torpor::python::bind_team(module);
#ifdef TORPOR_WITH_SERVER
  torpor::python::bind_server(module);
#endif
}
