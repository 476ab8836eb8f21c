// CRC-32C by folding with 512-bit carry-less multiplication (Ice Lake, Zen 4 and later).
//
// The message is kept as a remainder of 4 x 512 bits. One step multiplies every 128-bit lane by x^2048 modulo the
// polynomial and adds the next 256 bytes (V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
// Instruction", Intel, 2009). The loaded registers are stored as they are, so the checksum is always that of the bytes
// that were written, and a copy costs hardly more than one without a checksum.
#include <immintrin.h>

#include "crc32c_kernels.h"
#include "crc32c_streams.h"

namespace moc {
namespace {

struct Crc32 {
  static uint32_t take8(uint32_t state, uint64_t word) { return static_cast<uint32_t>(_mm_crc32_u64(state, word)); }
  static uint32_t take1(uint32_t state, uint8_t byte) { return _mm_crc32_u8(state, byte); }
};

constexpr size_t kVector = 64;
constexpr size_t kStep = 4 * kVector;

// The multiplier that moves a 64-bit half by `bits`; the product of two reflected values is one bit short, hence << 1.
constexpr uint64_t fold_constant(uint64_t bits) { return uint64_t{power_of_x(bits)} << 1; }

// A lane moves by `Bits`: its low half stands 64 bits higher than its high half. The 32 comes from the reduction.
template <uint64_t Bits>
inline __m128i fold_constants() {
  constexpr uint64_t low = fold_constant(Bits + 32);
  constexpr uint64_t high = fold_constant(Bits - 32);
  return _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
}

inline __m512i fold(__m512i value, __m512i constants, __m512i next) {
  const __m512i low = _mm512_clmulepi64_epi128(value, constants, 0x00);
  const __m512i high = _mm512_clmulepi64_epi128(value, constants, 0x11);
  return _mm512_ternarylogic_epi64(low, high, next, 0x96);  // xor of three
}

inline __m128i fold(__m128i value, __m128i constants, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(value, constants, 0x00);
  const __m128i high = _mm_clmulepi64_si128(value, constants, 0x11);
  return _mm_ternarylogic_epi64(low, high, next, 0x96);
}

enum class Write { kNothing, kCached, kStreaming };

template <Write W>
inline __m512i take(uint8_t* target, const uint8_t* source) {
  const __m512i value = _mm512_loadu_si512(source);
  if (W == Write::kCached) _mm512_storeu_si512(target, value);
  if (W == Write::kStreaming) _mm512_stream_si512(reinterpret_cast<__m512i*>(target), value);
  return value;
}

inline uint32_t reduce(__m512i value) {
  __m128i lane = _mm512_extracti32x4_epi32(value, 0);
  const __m128i by_lane = fold_constants<128>();
  lane = fold(lane, by_lane, _mm512_extracti32x4_epi32(value, 1));
  lane = fold(lane, by_lane, _mm512_extracti32x4_epi32(value, 2));
  lane = fold(lane, by_lane, _mm512_extracti32x4_epi32(value, 3));
  const uint32_t state = Crc32::take8(0, static_cast<uint64_t>(_mm_extract_epi64(lane, 0)));
  return Crc32::take8(state, static_cast<uint64_t>(_mm_extract_epi64(lane, 1)));
}

// The length must be a positive multiple of kStep; a streamed target must be aligned to kVector.
template <Write W>
uint32_t extend_folding(uint32_t state, uint8_t* target, const uint8_t* source, size_t length) {
  __m512i a = take<W>(target, source);
  __m512i b = take<W>(target + 1 * kVector, source + 1 * kVector);
  __m512i c = take<W>(target + 2 * kVector, source + 2 * kVector);
  __m512i d = take<W>(target + 3 * kVector, source + 3 * kVector);
  a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
  const __m512i by_step = _mm512_broadcast_i32x4(fold_constants<8 * kStep>());
  for (size_t i = kStep; i < length; i += kStep) {
    a = fold(a, by_step, take<W>(target + i, source + i));
    b = fold(b, by_step, take<W>(target + i + 1 * kVector, source + i + 1 * kVector));
    c = fold(c, by_step, take<W>(target + i + 2 * kVector, source + i + 2 * kVector));
    d = fold(d, by_step, take<W>(target + i + 3 * kVector, source + i + 3 * kVector));
  }
  const __m512i by_vector = _mm512_broadcast_i32x4(fold_constants<8 * kVector>());
  return reduce(fold(fold(fold(a, by_vector, b), by_vector, c), by_vector, d));
}

bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.2");
}

uint32_t extend(uint32_t state, const uint8_t* source, size_t length) {
  const size_t whole = length - length % kStep;
  // Nothing is written, so the target is never read; the source stands in for it to keep the arithmetic defined.
  if (whole != 0) state = extend_folding<Write::kNothing>(state, const_cast<uint8_t*>(source), source, whole);
  return extend_streams<Crc32>(state, source + whole, length - whole);
}

// For the few bytes before the first and after the last whole step; reads what it wrote, as the folding does.
uint32_t copy_extend_short(uint32_t state, uint8_t* target, const uint8_t* source, size_t length) {
  std::memcpy(target, source, length);
  return extend_streams<Crc32>(state, target, length);
}

uint32_t copy_extend(uint32_t state, uint8_t* target, const uint8_t* source, size_t length, Stores stores) {
  const bool is_streaming = stores == Stores::kStreaming && length >= 2 * kStep;
  const size_t head = is_streaming ? -reinterpret_cast<uintptr_t>(target) % kVector : 0;
  state = copy_extend_short(state, target, source, head);
  const size_t whole = (length - head) - (length - head) % kStep;
  if (whole != 0) {
    state = is_streaming ? extend_folding<Write::kStreaming>(state, target + head, source + head, whole)
                         : extend_folding<Write::kCached>(state, target + head, source + head, whole);
  }
  return copy_extend_short(state, target + head + whole, source + head + whole, length - head - whole);
}

}  // namespace

const Kernel kAvx512Kernel = {"avx512", is_supported, extend, copy_extend};

}  // namespace moc
