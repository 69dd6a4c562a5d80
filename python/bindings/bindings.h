#pragma once
/// The parts of torpor._store (mlx-lm's caches; nothing of MLX) and of torpor._core (the engine), one file per concern.
/// Each has a copy of the store's code; they meet in files. Whatever waits for a disk or a model gives the GIL back.

#include <string>

#include <nanobind/nanobind.h>

#include "torpor/error.h"
#include "torpor/store.h"

namespace torpor::python {

/// What both modules have: errors, the log, what a save wrote.
void bind_common(nanobind::module_& module);
void bind_store(nanobind::module_& module);
void bind_turn(nanobind::module_& module);
void bind_engine(nanobind::module_& module);
void bind_team(nanobind::module_& module);
void bind_server(nanobind::module_& module);

/// The exception of torpor.errors that stands for `error`.
nanobind::object exception_of(const Error& error);

/// "full", "rename" or "none"; anything else is kInvalidArgument.
Durability parse_durability(const std::string& name);

}  // namespace torpor::python
