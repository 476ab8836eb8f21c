// Tests whether all values of an array are finite, by the exponent bits alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moc {

struct FloatKind {
  const char* name;
  size_t width_bytes;
  bool (*all_finite)(const uint8_t* values, size_t count);
};

// Returns nullptr when the name is not one of "F16", "BF16", "F32", "F64".
const FloatKind* find_float_kind(const char* name);

}  // namespace moc
