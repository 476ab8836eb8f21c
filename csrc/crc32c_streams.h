// CRC-32C by an instruction that takes eight bytes at a time, in three interleaved streams.
//
// The instruction has a latency of three cycles and a throughput of one, so three independent ranges keep it busy; the
// three states are joined by shifting (M. Adler, "crc32c.c", describes the method). Included by one file per instruction
// set; everything has internal linkage, so that no code built for one set can be linked into another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "crc32c_polynomial.h"

namespace moc {
namespace {

constexpr size_t kLongStream = 4096;  // three of these stay in a 32 KiB first-level cache beside their copy
constexpr size_t kShortStream = 256;  // keeps pieces of a few KiB off the single-stream path
constexpr ShiftTable kLongShift = make_shift_table<kLongStream>();
constexpr ShiftTable kShortShift = make_shift_table<kShortStream>();

inline uint64_t load_u64(const uint8_t* source) {
  uint64_t word;
  std::memcpy(&word, source, sizeof word);
  return word;
}

// Instruction: struct with static uint32_t take8(uint32_t, uint64_t) and take1(uint32_t, uint8_t).
template <class Instruction, size_t Stream>
inline uint32_t extend_three(uint32_t state, const uint8_t* source, const ShiftTable& table) {
  uint32_t second = 0;
  uint32_t third = 0;
  for (size_t i = 0; i < Stream; i += 8) {
    state = Instruction::take8(state, load_u64(source + i));
    second = Instruction::take8(second, load_u64(source + Stream + i));
    third = Instruction::take8(third, load_u64(source + 2 * Stream + i));
  }
  return shift(table, shift(table, state) ^ second) ^ third;
}

template <class Instruction>
inline uint32_t extend_streams(uint32_t state, const uint8_t* source, size_t length) {
  for (; length >= 3 * kLongStream; source += 3 * kLongStream, length -= 3 * kLongStream) {
    state = extend_three<Instruction, kLongStream>(state, source, kLongShift);
  }
  for (; length >= 3 * kShortStream; source += 3 * kShortStream, length -= 3 * kShortStream) {
    state = extend_three<Instruction, kShortStream>(state, source, kShortShift);
  }
  for (; length >= 8; source += 8, length -= 8) state = Instruction::take8(state, load_u64(source));
  for (; length != 0; ++source, --length) state = Instruction::take1(state, *source);
  return state;
}

}  // namespace
}  // namespace moc
