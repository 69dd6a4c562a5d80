#include <memory>
#include <string_view>
#include <utility>

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "faces/error_table.h"
#include "torpor/log.h"
#include "torpor/version.h"

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

Durability parse_durability(const std::string& name) {
  if (name == "full") return Durability::kFull;
  if (name == "rename") return Durability::kRename;
  if (name == "none") return Durability::kNone;
  throw Error(ErrorCode::kInvalidArgument, "There is no durability '" + name + "'; use full, rename or none.");
}

void bind_common(nb::module_& module) {
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const Error& e) {
      const nb::object exception = exception_of(e);
      PyErr_SetObject(exception.type().ptr(), exception.ptr());
    }
  });
  module.attr("VERSION") = TORPOR_VERSION;
  module.def("set_log_handler", &set_log_handler, nb::arg("handler").none(),
             nb::sig("def set_log_handler(handler: typing.Callable[[str, str], object] | None) -> None"));
  module.def("default_store_root", &default_store_root);
  nb::class_<SaveResult>(module, "SaveResult")
      .def_ro("bytes_written", &SaveResult::bytes_written)
      .def_ro("segments_written", &SaveResult::segments_written)
      .def_ro("segments_shared", &SaveResult::segments_shared)
      .def_ro("segments", &SaveResult::segments);
}

}  // namespace torpor::python
