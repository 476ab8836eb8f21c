// CRC-32C with the checksum instructions of ARMv8 (optional in 8.0, part of every 8.1 core).
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include <algorithm>

#include "crc32c_kernels.h"
#include "crc32c_streams.h"

namespace moc {
namespace {

struct Crc32 {
  static uint32_t take8(uint32_t state, uint64_t word) { return __crc32cd(state, word); }
  static uint32_t take1(uint32_t state, uint8_t byte) { return __crc32cb(state, byte); }
};

constexpr size_t kBlock = 3 * kLongStream;

bool is_supported() { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }

uint32_t extend(uint32_t state, const uint8_t* source, size_t length) {
  return extend_streams<Crc32>(state, source, length);
}

// These cores detect a stream of whole-line writes by themselves, so there is no separate streaming path.
uint32_t copy_extend(uint32_t state, uint8_t* target, const uint8_t* source, size_t length, Stores) {
  while (length != 0) {
    const size_t block = std::min(length, kBlock);
    state = extend_streams<Crc32>(state, source, block);
    std::memcpy(target, source, block);
    source += block;
    target += block;
    length -= block;
  }
  return state;
}

}  // namespace

const Kernel kArmv8Kernel = {"armv8", is_supported, extend, copy_extend};

}  // namespace moc
