// CRC-32C (Castagnoli, RFC 3720): kernels for several instruction sets and the choice among them.
//
// A kernel works on the raw register ("state"), which is the complement of the checksum that callers see; so a state
// may be carried from one range to the next and complemented once at the end.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moc {

// How a copy leaves the bytes it wrote: in the caches, or past them by non-temporal stores.
enum class Stores { kCached, kStreaming };

struct Kernel {
  const char* name;
  bool (*is_supported)();
  uint32_t (*extend)(uint32_t state, const uint8_t* source, size_t length);
  // Copies and extends in one pass. The ranges must not overlap. Streaming stores need finish_streaming() afterwards.
  uint32_t (*copy_extend)(uint32_t state, uint8_t* target, const uint8_t* source, size_t length, Stores stores);
};

// The fastest kernel this CPU supports comes first; the portable one is always there and comes last.
extern const Kernel* const kKernels[];
extern const size_t kKernelCount;

const Kernel& fastest_kernel();

// Returns nullptr when no kernel has this name or the CPU does not support it.
const Kernel* find_kernel(const char* name);

// Orders all streaming stores of this thread before whatever it stores next.
void finish_streaming();

// Returns the checksum of A followed by B from the checksums of A and B.
uint32_t combine_crc32c(uint32_t crc_a, uint32_t crc_b, uint64_t length_b);

}  // namespace moc
