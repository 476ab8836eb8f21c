// Python signatures of the checksum functions: arguments are checked with the GIL held, the work runs without it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "arguments.h"
#include "bindings.h"
#include "crc32c.h"

namespace moc {
namespace {

using namespace nb::literals;
using KernelName = std::optional<std::string>;

// Below this many bytes a call's target is likely to be read again soon, so it is left in the caches.
constexpr uint64_t kStreamingBytes = uint64_t{1} << 20;

const Kernel& kernel_named(const KernelName& name) {
  if (!name) return fastest_kernel();
  if (const Kernel* kernel = find_kernel(name->c_str())) return *kernel;
  std::string allowed;
  for (size_t i = 0; i < kKernelCount; ++i) {
    if (kKernels[i]->is_supported()) allowed += (allowed.empty() ? "" : ",") + std::string(kKernels[i]->name);
  }
  throw_value_error("kernel is not supported here kernel=" + *name + " allowed=" + allowed);
}

uint32_t to_crc(nb::handle value, const char* name) {
  return static_cast<uint32_t>(to_unsigned(value, name, UINT32_MAX));
}

const uint8_t* to_bytes(uint64_t address) { return reinterpret_cast<const uint8_t*>(address); }

uint32_t crc32c(nb::handle buffer, nb::handle initial, const KernelName& kernel_name) {
  const Kernel& kernel = kernel_named(kernel_name);
  const uint32_t state = ~to_crc(initial, "initial");
  const Buffer held(buffer, PyBUF_CONTIG_RO);
  const nb::gil_scoped_release released;
  return ~kernel.extend(state, static_cast<const uint8_t*>(held.view().buf), static_cast<size_t>(held.view().len));
}

uint32_t crc32c_at(nb::handle address, nb::handle length, nb::handle initial, const KernelName& kernel_name) {
  const Kernel& kernel = kernel_named(kernel_name);
  const uint64_t start = to_unsigned(address, "address");
  const uint64_t bytes = to_unsigned(length, "length");
  check_range(start, bytes, "address");
  const uint32_t state = ~to_crc(initial, "initial");
  const nb::gil_scoped_release released;
  return ~kernel.extend(state, to_bytes(start), bytes);
}

uint32_t crc32c_combine(nb::handle crc_a, nb::handle crc_b, nb::handle length_b) {
  return combine_crc32c(to_crc(crc_a, "crc_a"), to_crc(crc_b, "crc_b"), to_unsigned(length_b, "length_b"));
}

template <class Word>
void check_count(const Words<Word>& words, const char* name, size_t count) {
  if (words.size() == count) return;
  throw_value_error(std::string(name) + " has the wrong number of items " + name + "=" + std::to_string(words.size()) +
                    " lengths=" + std::to_string(count));
}

// Checks every range and returns the sum of the lengths.
uint64_t check_ranges(const Words<uint64_t>& addresses, const Words<uint64_t>& lengths, const char* name) {
  uint64_t total = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    check_range(addresses.data()[i], lengths.data()[i], name);
    total += lengths.data()[i];
  }
  return total;
}

void copy_crc32c(nb::handle sources, nb::handle targets, nb::handle lengths, nb::handle crcs,
                 const KernelName& kernel_name) {
  const Kernel& kernel = kernel_named(kernel_name);
  const Words<uint64_t> from(sources, "sources");
  const Words<uint64_t> to(targets, "targets");
  const Words<uint64_t> bytes(lengths, "lengths");
  const Words<uint32_t> results(crcs, "crcs", true);
  const size_t count = bytes.size();
  check_count(from, "sources", count);
  check_count(to, "targets", count);
  check_count(results, "crcs", count);
  check_ranges(from, bytes, "source");
  const uint64_t total = check_ranges(to, bytes, "target");
  const Stores stores = total >= kStreamingBytes ? Stores::kStreaming : Stores::kCached;
  const nb::gil_scoped_release released;
  for (size_t i = 0; i < count; ++i) {
    uint8_t* target = reinterpret_cast<uint8_t*>(to.data()[i]);
    results.data()[i] = ~kernel.copy_extend(UINT32_MAX, target, to_bytes(from.data()[i]), bytes.data()[i], stores);
  }
  finish_streaming();
}

void crc32c_gather(nb::handle addresses, nb::handle lengths, nb::handle crcs, const KernelName& kernel_name) {
  const Kernel& kernel = kernel_named(kernel_name);
  const Words<uint64_t> from(addresses, "addresses");
  const Words<uint64_t> bytes(lengths, "lengths");
  const Words<uint32_t> results(crcs, "crcs", true);
  const size_t count = bytes.size();
  check_count(from, "addresses", count);
  check_count(results, "crcs", count);
  check_ranges(from, bytes, "address");
  const nb::gil_scoped_release released;
  for (size_t i = 0; i < count; ++i) {
    results.data()[i] = ~kernel.extend(UINT32_MAX, to_bytes(from.data()[i]), bytes.data()[i]);
  }
}

nb::tuple supported_kernels() {
  nb::list names;
  for (size_t i = 0; i < kKernelCount; ++i) {
    if (kKernels[i]->is_supported()) names.append(kKernels[i]->name);
  }
  return nb::tuple(names);
}

}  // namespace

void bind_checksums(nb::module_& module) {
  module.attr("KERNELS") = supported_kernels();
  module.def("crc32c", &crc32c, "buffer"_a, "initial"_a = 0, nb::kw_only(), "kernel"_a = nb::none());
  module.def("crc32c_at", &crc32c_at, "address"_a, "length"_a, "initial"_a = 0, nb::kw_only(), "kernel"_a = nb::none());
  module.def("crc32c_combine", &crc32c_combine, "crc_a"_a, "crc_b"_a, "length_b"_a);
  module.def("crc32c_gather", &crc32c_gather, "addresses"_a, "lengths"_a, "crcs"_a, nb::kw_only(),
             "kernel"_a = nb::none());
  module.def("copy_crc32c", &copy_crc32c, "sources"_a, "targets"_a, "lengths"_a, "crcs"_a, nb::kw_only(),
             "kernel"_a = nb::none());
}

}  // namespace moc
