#include <nanobind/stl/string.h>

#include "bindings.h"
#include "faces/error_table.h"

namespace nb = nanobind;

namespace torpor::python {

nb::object exception_of(const Error& error) {
  nb::object exception = nb::module_::import_("torpor.errors").attr(faces::error_mapping(error.code()).python_name)(error.what());
  const auto add = [&](const char* name, const std::string& value) {
    if (!value.empty()) exception.attr(name) = nb::str(value.c_str(), value.size());
  };
  add("agent", error.agent());
  add("path", error.path());
  add("field", error.field());
  add("expected", error.expected());
  add("found", error.found());
  return exception;
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
