// What of a model is asked without loading it.

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "model/weights.h"

namespace nb = nanobind;

namespace torpor::python {

void bind_model(nb::module_& module) {
  using namespace nb::literals;
  module.def("weights_digest", [](const std::filesystem::path& directory) { return model::Weights::open(directory).digest(); },
             "directory"_a, nb::call_guard<nb::gil_scoped_release>(),
             "Of every tensor of a model directory: names, dtypes, shapes, bytes. Reads all, on all cores, and keeps nothing.");
}

}  // namespace torpor::python
