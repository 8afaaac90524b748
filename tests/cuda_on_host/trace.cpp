// Counts the memory transactions of kernels, without touching them: they are compiled with -fsanitize=thread,
// so that the compiler calls these functions at every access, but linked with this file in place of its
// runtime.
//
// A request is what the lanes of a warp ask for at one place in the code at one time: the n-th time that each
// of them comes there. Global memory answers in sectors of 32 bytes, counted for every request, also where a
// cache holds them. Shared memory answers 128 bytes at a time (8 lanes of 16 bytes, 16 of 8, 32 of less), one
// word of 4 bytes from each of 32 banks, in as many passes as the busiest bank has words. What lies in
// tensors is global: neither shared memory, nor a stack, nor this library's own data.
#include "trace.h"

#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "cuda_on_host.h"

namespace on_host {

int64_t traced_sectors = 0, traced_waves = 0, traced_least = 0;

namespace {

struct Range {
  uintptr_t begin, end;
  bool holds(uintptr_t at) const { return begin <= at && at < end; }
};

struct Access {
  uintptr_t place, at;
  unsigned turn;
  int warp, lane, bytes;
  bool shared;
};

std::vector<Range> elsewhere;  // stacks and this library's data
std::vector<Range> pieces;     // of the block's shared memory
std::vector<Access> accesses;
std::unordered_map<uint64_t, unsigned> turns;
bool busy = false;

void find_what_stays() {
  pthread_attr_t attributes;
  void* stack = nullptr;
  size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &bytes);
  pthread_attr_destroy(&attributes);
  elsewhere.push_back({uintptr_t(stack), uintptr_t(stack) + bytes});
  auto visit = [](dl_phdr_info* info, size_t, void*) {
    const auto here = uintptr_t(&traced_sectors);
    Range all{UINTPTR_MAX, 0};
    for (int i = 0; i < info->dlpi_phnum; ++i)
      if (info->dlpi_phdr[i].p_type == PT_LOAD) {
        const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
        all.begin = std::min(all.begin, begin);
        all.end = std::max<uintptr_t>(all.end, begin + info->dlpi_phdr[i].p_memsz);
      }
    if (all.holds(here)) elsewhere.push_back(all);
    return 0;
  };
  dl_iterate_phdr(visit, nullptr);
}

bool any_holds(const std::vector<Range>& ranges, uintptr_t at) {
  return std::any_of(ranges.begin(), ranges.end(), [at](const Range& range) { return range.holds(at); });
}

void note(void* address, int bytes, void* place) {
  const int thread = int(thread_index.x);
  if (busy || !inside_kernel()) return;
  const auto at = uintptr_t(address);
  const bool shared = any_holds(pieces, at);
  if (!shared && (any_holds(elsewhere, at) || on_fiber_stack(address))) return;
  busy = true;
  const unsigned turn = turns[uint64_t(thread) << 48 ^ uint64_t(uintptr_t(place))]++;
  accesses.push_back({uintptr_t(place), at, turn, thread / 32, thread % 32, bytes, shared});
  busy = false;
}

// The accesses [begin, end) of one request of shared memory.
void count_waves(const Access* begin, const Access* end) {
  const int lanes = begin->bytes >= 16 ? 8 : begin->bytes == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += lanes) {
    std::vector<uintptr_t> words;
    for (const Access* a = begin; a != end; ++a)
      if (first <= a->lane && a->lane < first + lanes)
        for (uintptr_t word = a->at / 4; word <= (a->at + a->bytes - 1) / 4; ++word) words.push_back(word);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int in_bank[32] = {}, most = 0;
    for (uintptr_t word : words) most = std::max(most, ++in_bank[word % 32]);
    traced_waves += most;
    traced_least += int64_t(words.size() + 31) / 32;
  }
}

}  // namespace

void trace_block_begins() {
  if (elsewhere.empty()) find_what_stays();
  pieces.clear();
  turns.clear();
  accesses.clear();
}

void trace_shared(int, const void* data, size_t bytes) {
  pieces.push_back({uintptr_t(data), uintptr_t(data) + bytes});
}

void trace_block_ends() {
  auto request = [](const Access& a) { return std::tie(a.warp, a.place, a.turn); };
  std::sort(accesses.begin(), accesses.end(),
            [&](const Access& a, const Access& b) { return request(a) < request(b); });
  std::vector<uintptr_t> sectors;
  for (size_t i = 0; i < accesses.size();) {
    size_t j = i;
    while (j < accesses.size() && request(accesses[j]) == request(accesses[i])) ++j;
    if (accesses[i].shared) {
      count_waves(&accesses[i], &accesses[i] + (j - i));
    } else {
      sectors.clear();
      for (size_t k = i; k < j; ++k)
        for (uintptr_t s = accesses[k].at / 32; s <= (accesses[k].at + accesses[k].bytes - 1) / 32; ++s)
          sectors.push_back(s);
      std::sort(sectors.begin(), sectors.end());
      traced_sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
    }
    i = j;
  }
}

}  // namespace on_host

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define ACCESS(name, bytes) \
  void __tsan_##name(void* p) { on_host::note(p, bytes, __builtin_return_address(0)); }
#define ACCESSES(bytes)                \
  ACCESS(read##bytes, bytes)           \
  ACCESS(write##bytes, bytes)          \
  ACCESS(unaligned_read##bytes, bytes) \
  ACCESS(unaligned_write##bytes, bytes)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t n) { on_host::note(p, int(n), __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { on_host::note(p, int(n), __builtin_return_address(0)); }
}
