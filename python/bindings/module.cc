#include <memory>
#include <string_view>
#include <utility>

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "faces/error_table.h"
#include "model/weights.h"
#include "torpor/log.h"

namespace nb = nanobind;

namespace torpor::python {

nb::object exception_of(const Error& error) {
  nb::object exception =
      nb::module_::import_("torpor.errors").attr(faces::error_mapping(error.code()).python_name)(error.what());
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

namespace {

void set_log_handler(nb::object handler) {
  LogHandler next;
  if (!handler.is_none()) {
    // Whoever lets go of it last may not have the GIL, or come after the interpreter's end.
    const std::shared_ptr<PyObject> held(handler.release().ptr(), [](PyObject* object) {
      if (Py_IsInitialized() == 0) return;
      const nb::gil_scoped_acquire acquire;
      Py_DECREF(object);
    });
    next = [held](LogLevel level, std::string_view sentence) {
      const nb::gil_scoped_acquire acquire;
      try {
        nb::borrow(held.get())(log_level_name(level), nb::str(sentence.data(), sentence.size()));
      } catch (nb::python_error& error) {
        error.discard_as_unraisable(held.get());
      }
    };
  }
  const nb::gil_scoped_release release;  // it waits for threads that are in the handler before
  torpor::set_log_handler(std::move(next));
}

}  // namespace
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
  module.def("set_log_handler", &torpor::python::set_log_handler, nb::arg("handler").none(),
             nb::sig("def set_log_handler(handler: typing.Callable[[str, str], object] | None) -> None"));
  module.def(
      "weights_digest",
      [](const std::filesystem::path& directory) { return torpor::model::Weights::open(directory).digest(); },
      nb::arg("directory"), nb::call_guard<nb::gil_scoped_release>(),
      "Of every tensor of a model directory: names, dtypes, shapes, bytes. Reads all, on all cores, and keeps "
      "nothing.");
  torpor::python::bind_store(module);
  torpor::python::bind_turn(module);
  torpor::python::bind_engine(module);
  torpor::python::bind_team(module);
#ifdef TORPOR_WITH_SERVER
  torpor::python::bind_server(module);
#endif
}
