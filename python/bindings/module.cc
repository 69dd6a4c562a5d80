#include "bindings.h"

namespace nb = nanobind;

namespace torpor::python {

nb::object exception_of(const Error& error) {
  return nb::module_::import_("torpor.errors").attr(error_mapping(error.code()).python_name)(error.what());
}

}  // namespace torpor::python

NB_MODULE(_core, module) {
  module.doc() = "The C++ half of torpor; use the package's own names.";
  nb::module_::import_("mlx.core");  // its array type must be known before ours mention it

  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const torpor::Error& e) {
      const nb::object exception = torpor::python::exception_of(e);
      PyErr_SetObject(exception.type().ptr(), exception.ptr());
    }
  });
  torpor::python::bind_store(module);
  torpor::python::bind_model(module);
  torpor::python::bind_turn(module);
  torpor::python::bind_engine(module);
}
