// Arithmetic of polynomials over GF(2) modulo the Castagnoli polynomial, bits reflected (bit 31 is x^0), at compile time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace moc {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // 0x1edc6f41 reflected
constexpr uint32_t kOne = 0x80000000;         // x^0

constexpr uint32_t multiply_by_x(uint32_t value) { return (value >> 1) ^ ((value & 1) ? kPolynomial : 0); }

constexpr uint32_t multiply(uint32_t left, uint32_t right) {
  uint32_t product = 0;
  for (uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if (left & bit) product ^= right;
    right = multiply_by_x(right);
  }
  return product;
}

constexpr uint32_t power_of_x(uint64_t exponent) {
  uint32_t result = kOne;
  for (uint32_t base = kOne >> 1; exponent != 0; exponent >>= 1) {
    if (exponent & 1) result = multiply(result, base);
    base = multiply(base, base);
  }
  return result;
}

// Four tables, one per byte of the state: the state after `Bytes` zero bytes is the xor of the four entries.
using ShiftTable = std::array<std::array<uint32_t, 256>, 4>;

template <size_t Bytes>
constexpr ShiftTable make_shift_table() {
  ShiftTable table{};
  const uint32_t factor = power_of_x(8 * Bytes);
  for (uint32_t byte = 0; byte < 4; ++byte) {
    // A product is linear in its bits: 8 multiplications give all 256 entries, which keeps compile time low.
    std::array<uint32_t, 8> bits{};
    for (uint32_t bit = 0; bit < 8; ++bit) bits[bit] = multiply(factor, uint32_t{1} << (8 * byte + bit));
    for (uint32_t value = 0; value < 256; ++value) {
      uint32_t entry = 0;
      for (uint32_t bit = 0; bit < 8; ++bit) entry ^= ((value >> bit) & 1) ? bits[bit] : 0;
      table[byte][value] = entry;
    }
  }
  return table;
}

inline uint32_t shift(const ShiftTable& table, uint32_t state) {
  return table[0][state & 255] ^ table[1][(state >> 8) & 255] ^ table[2][(state >> 16) & 255] ^ table[3][state >> 24];
}

}  // namespace
}  // namespace moc
