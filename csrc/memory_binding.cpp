// Python signatures of what touches memory and files: arguments are checked with the GIL held, the work runs without it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "arguments.h"
#include "bindings.h"
#include "direct_io.h"
#include "finite.h"
#include "pages.h"

namespace moc {
namespace {

using namespace nb::literals;

struct Range {
  uint64_t address;
  uint64_t length;
};

Range to_range(nb::handle address, nb::handle length) {
  const Range range = {to_unsigned(address, "address"), to_unsigned(length, "length")};
  check_range(range.address, range.length, "address");
  return range;
}

bool all_finite(nb::handle address, nb::handle count, const std::string& kind) {
  const FloatKind* found = find_float_kind(kind.c_str());
  if (found == nullptr) throw_value_error("kind is unknown kind=" + kind + " allowed=F16,BF16,F32,F64");
  const uint64_t start = to_unsigned(address, "address");
  const uint64_t values = to_unsigned(count, "count", UINT64_MAX / found->width_bytes);
  check_range(start, values * found->width_bytes, "address");
  const nb::gil_scoped_release released;
  return found->all_finite(reinterpret_cast<const uint8_t*>(start), values);
}

uint64_t write_aligned(nb::handle fd, nb::handle file_offset, nb::handle addresses, nb::handle lengths) {
  const int descriptor = to_descriptor(fd);
  const uint64_t offset = to_unsigned(file_offset, "file_offset", INT64_MAX);
  const Words<uint64_t> from(addresses, "addresses");
  const Words<uint64_t> bytes(lengths, "lengths");
  if (from.size() != bytes.size()) {
    throw_value_error("addresses has the wrong number of items addresses=" + std::to_string(from.size()) +
                      " lengths=" + std::to_string(bytes.size()));
  }
  uint64_t total = 0;
  for (size_t i = 0; i < bytes.size(); ++i) {
    check_range(from.data()[i], bytes.data()[i], "address");
    check_file_range(offset + total, bytes.data()[i]);
    total += bytes.data()[i];
  }
  IoResult result;
  {
    const nb::gil_scoped_release released;
    result = write_segments(descriptor, offset, from.data(), bytes.data(), bytes.size());
  }
  if (result.error != 0) throw_os_error(result.error);
  return result.done_bytes;
}

uint64_t read_aligned(nb::handle fd, nb::handle file_offset, nb::handle address, nb::handle length) {
  const int descriptor = to_descriptor(fd);
  const uint64_t offset = to_unsigned(file_offset, "file_offset", INT64_MAX);
  const Range range = to_range(address, length);
  check_file_range(offset, range.length);
  IoResult result;
  {
    const nb::gil_scoped_release released;
    result = read_range(descriptor, offset, reinterpret_cast<uint8_t*>(range.address), range.length);
  }
  if (result.error != 0) throw_os_error(result.error);
  return result.done_bytes;
}

uint64_t* to_word(nb::handle address) {
  const uint64_t start = to_unsigned(address, "address");
  check_range(start, sizeof(uint64_t), "address");
  if (start % sizeof(uint64_t) != 0) {
    throw_value_error("address is not aligned address=" + std::to_string(start) + " allowed=multiples of 8");
  }
  return reinterpret_cast<uint64_t*>(start);
}

uint64_t load_acquire_u64(nb::handle address) { return __atomic_load_n(to_word(address), __ATOMIC_ACQUIRE); }

void store_release_u64(nb::handle address, nb::handle value) {
  uint64_t* word = to_word(address);
  __atomic_store_n(word, to_unsigned(value, "value"), __ATOMIC_RELEASE);
}

void populate(nb::handle address, nb::handle length) {
  const Range range = to_range(address, length);
  int error;
  {
    const nb::gil_scoped_release released;
    error = populate_pages(range.address, range.length);
  }
  if (error != 0) throw_os_error(error);
}

void touch(nb::handle address, nb::handle length) {
  const Range range = to_range(address, length);
  const nb::gil_scoped_release released;
  touch_pages(range.address, range.length);
}

void advise_dontfork(nb::handle address, nb::handle length) {
  const Range range = to_range(address, length);
  if (range.address % page_bytes() != 0) {
    throw_value_error("address is not that of a page address=" + std::to_string(range.address) +
                      " allowed=multiples of " + std::to_string(page_bytes()));
  }
  int error;
  {
    const nb::gil_scoped_release released;
    error = forbid_fork(range.address, range.length);
  }
  if (error != 0) throw_os_error(error);
}

}  // namespace

void bind_memory(nb::module_& module) {
  module.def("all_finite", &all_finite, "address"_a, "count"_a, "kind"_a);
  module.def("write_aligned", &write_aligned, "fd"_a, "file_offset"_a, "addresses"_a, "lengths"_a);
  module.def("read_aligned", &read_aligned, "fd"_a, "file_offset"_a, "address"_a, "length"_a);
  module.def("load_acquire_u64", &load_acquire_u64, "address"_a);
  module.def("store_release_u64", &store_release_u64, "address"_a, "value"_a);
  module.def("populate", &populate, "address"_a, "length"_a);
  module.def("touch", &touch, "address"_a, "length"_a);
  module.def("advise_dontfork", &advise_dontfork, "address"_a, "length"_a);
}

}  // namespace moc
