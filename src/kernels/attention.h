#pragma once
/// attention() on a pool of one's own: what the tests use to compare thread counts within one process.

#include <span>

#include "kernels/compute.h"
#include "kernels/thread_pool.h"

namespace torpor::kernels {

void attention_on(ThreadPool& pool, float* qkv, const AttentionSpec& spec, std::span<const AttentionSequence> sequences,
                  float* out);

}  // namespace torpor::kernels
