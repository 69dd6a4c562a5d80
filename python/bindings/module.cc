#include "bindings.h"
#include "torpor/error.h"

namespace nb = nanobind;

NB_MODULE(_core, module) {
  module.doc() = "The C++ half of torpor; use the package's own names.";
  nb::module_::import_("mlx.core");  // its array type must be known before ours mention it

  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const torpor::Error& e) {
      const nb::object type = nb::module_::import_("torpor.errors").attr(torpor::error_mapping(e.code()).python_name);
      PyErr_SetString(type.ptr(), e.what());
    }
  });
  torpor::python::bind_store(module);
  torpor::python::bind_engine(module);
}
