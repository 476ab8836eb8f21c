#include "finite.h"

#include <algorithm>
#include <cstring>

// One clone per instruction set, chosen by the loader; elsewhere the compiler's baseline is good enough.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define MOC_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define MOC_CLONES
#endif

namespace moc {
namespace {

constexpr size_t kBlock = 4096;  // values between two looks at the result: long enough to vectorise, short to stop early

// A value is not finite iff all bits of its exponent are set. Written without early exit, so that it vectorises.
#define MOC_DEFINE_BLOCK(name, word)                                                     \
  MOC_CLONES bool name(const uint8_t* values, size_t count, uint64_t exponent_mask) {    \
    const word mask = static_cast<word>(exponent_mask);                                  \
    word found = 0;                                                                      \
    for (size_t i = 0; i < count; ++i) {                                                 \
      word value;                                                                        \
      std::memcpy(&value, values + i * sizeof(word), sizeof value);                      \
      found |= static_cast<word>((value & mask) == mask);                                \
    }                                                                                    \
    return found == 0;                                                                   \
  }

MOC_DEFINE_BLOCK(is_block_finite_u16, uint16_t)
MOC_DEFINE_BLOCK(is_block_finite_u32, uint32_t)
MOC_DEFINE_BLOCK(is_block_finite_u64, uint64_t)

using Block = bool (*)(const uint8_t*, size_t, uint64_t);

template <Block block, size_t Width, uint64_t ExponentMask>
bool all_finite(const uint8_t* values, size_t count) {
  while (count != 0) {
    const size_t taken = std::min(count, kBlock);
    if (!block(values, taken, ExponentMask)) return false;
    values += taken * Width;
    count -= taken;
  }
  return true;
}

constexpr FloatKind kKinds[] = {
    {"F16", 2, all_finite<is_block_finite_u16, 2, 0x7c00>},
    {"BF16", 2, all_finite<is_block_finite_u16, 2, 0x7f80>},
    {"F32", 4, all_finite<is_block_finite_u32, 4, 0x7f800000>},
    {"F64", 8, all_finite<is_block_finite_u64, 8, 0x7ff0000000000000>},
};

}  // namespace

const FloatKind* find_float_kind(const char* name) {
  for (const FloatKind& kind : kKinds) {
    if (std::strcmp(kind.name, name) == 0) return &kind;
  }
  return nullptr;
}

}  // namespace moc
