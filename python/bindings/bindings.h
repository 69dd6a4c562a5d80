#pragma once
/// The parts of torpor._core, one file per concern. Whatever waits for a disk or a model gives the GIL back.

#include <nanobind/nanobind.h>

namespace torpor::python {

void bind_store(nanobind::module_& module);
void bind_engine(nanobind::module_& module);

}  // namespace torpor::python
