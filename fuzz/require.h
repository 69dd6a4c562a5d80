#pragma once
/// How a fuzz target says that a promise is broken.

#include <cstdio>
#include <cstdlib>

inline void require(bool ok, int line = __builtin_LINE()) {
  if (ok) return;
  std::fprintf(stderr, "line %d: what was promised does not hold\n", line);
  std::abort();
}
