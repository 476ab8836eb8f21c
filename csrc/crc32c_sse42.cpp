// CRC-32C with the crc32 instruction of SSE 4.2 (Nehalem and later, all of AMD since Bulldozer).
#include <emmintrin.h>
#include <nmmintrin.h>

#include <algorithm>

#include "crc32c_kernels.h"
#include "crc32c_streams.h"

namespace moc {
namespace {

struct Crc32 {
  static uint32_t take8(uint32_t state, uint64_t word) { return static_cast<uint32_t>(_mm_crc32_u64(state, word)); }
  static uint32_t take1(uint32_t state, uint8_t byte) { return _mm_crc32_u8(state, byte); }
};

constexpr size_t kBlock = 3 * kLongStream;
constexpr size_t kLine = 64;

bool is_supported() { return __builtin_cpu_supports("sse4.2"); }

uint32_t extend(uint32_t state, const uint8_t* source, size_t length) {
  return extend_streams<Crc32>(state, source, length);
}

// The target must be aligned to a line; whole lines are streamed, so that no line is ever read for ownership.
void stream_block(uint8_t* target, const uint8_t* source, size_t length) {
  size_t i = 0;
  for (; i + kLine <= length; i += kLine) {
    for (size_t part = 0; part < kLine; part += 16) {
      const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i + part));
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + part), value);
    }
  }
  std::memcpy(target + i, source + i, length - i);
}

uint32_t copy_extend(uint32_t state, uint8_t* target, const uint8_t* source, size_t length, Stores stores) {
  const auto take = [&](size_t block, bool is_streaming) {
    state = extend_streams<Crc32>(state, source, block);
    if (is_streaming) {
      stream_block(target, source, block);
    } else {
      std::memcpy(target, source, block);
    }
    source += block;
    target += block;
    length -= block;
  };
  const bool is_streaming = stores == Stores::kStreaming;
  if (is_streaming) take(std::min(length, -reinterpret_cast<uintptr_t>(target) % kLine), false);
  while (length != 0) take(std::min(length, kBlock), is_streaming);
  return state;
}

}  // namespace

const Kernel kSse42Kernel = {"sse42", is_supported, extend, copy_extend};

}  // namespace moc
