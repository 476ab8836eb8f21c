// CRC-32C by tables, eight bytes at a time ("slicing by 8"): for CPUs without a checksum instruction, and the yardstick
// the other kernels are tested against.
#include <algorithm>
#include <array>
#include <cstring>

#include "crc32c_kernels.h"
#include "crc32c_polynomial.h"

namespace moc {
namespace {

using SliceTables = std::array<std::array<uint32_t, 256>, 8>;

constexpr SliceTables make_slice_tables() {
  SliceTables tables{};
  for (uint32_t value = 0; value < 256; ++value) {
    uint32_t state = value;
    for (int bit = 0; bit < 8; ++bit) state = multiply_by_x(state);
    tables[0][value] = state;
  }
  for (size_t slice = 1; slice < 8; ++slice) {
    for (uint32_t value = 0; value < 256; ++value) {
      const uint32_t previous = tables[slice - 1][value];
      tables[slice][value] = (previous >> 8) ^ tables[0][previous & 255];
    }
  }
  return tables;
}

constexpr SliceTables kSlices = make_slice_tables();
constexpr size_t kBlock = 8192;  // read once from memory, then copied from the first-level cache

bool always() { return true; }

uint32_t extend(uint32_t state, const uint8_t* source, size_t length) {
  for (; length >= 8; source += 8, length -= 8) {
    // Bytes are taken one by one, so that the result does not depend on the machine's byte order.
    const uint32_t low = state ^ (uint32_t{source[0]} | uint32_t{source[1]} << 8 | uint32_t{source[2]} << 16 |
                                  uint32_t{source[3]} << 24);
    state = kSlices[7][low & 255] ^ kSlices[6][(low >> 8) & 255] ^ kSlices[5][(low >> 16) & 255] ^
            kSlices[4][low >> 24] ^ kSlices[3][source[4]] ^ kSlices[2][source[5]] ^ kSlices[1][source[6]] ^
            kSlices[0][source[7]];
  }
  for (; length != 0; ++source, --length) state = (state >> 8) ^ kSlices[0][(state ^ *source) & 255];
  return state;
}

uint32_t copy_extend(uint32_t state, uint8_t* target, const uint8_t* source, size_t length, Stores) {
  while (length != 0) {
    const size_t block = std::min(length, kBlock);
    state = extend(state, source, block);
    std::memcpy(target, source, block);
    source += block;
    target += block;
    length -= block;
  }
  return state;
}

}  // namespace

const Kernel kPortableKernel = {"portable", always, extend, copy_extend};

}  // namespace moc
