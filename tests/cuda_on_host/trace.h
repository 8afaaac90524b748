// Counting memory transactions: what trace.cpp does in the build for it, and nothing in all others.
#pragma once
#include <cstddef>
#include <cstdint>

namespace on_host {
#if defined(ON_HOST_TRACE)
extern int64_t traced_sectors, traced_waves, traced_least;
void trace_block_begins();
void trace_block_ends();
void trace_shared(int index, const void* data, size_t bytes);
#else
constexpr int64_t traced_sectors = 0, traced_waves = 0, traced_least = 0;
inline void trace_block_begins() {}
inline void trace_block_ends() {}
inline void trace_shared(int, const void*, size_t) {}
#endif
}  // namespace on_host
