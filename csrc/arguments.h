// Checked conversions of Python arguments. All of them need the GIL and throw a Python exception that names the value.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace moc {

namespace nb = nanobind;

[[noreturn]] void throw_value_error(const std::string& message);
[[noreturn]] void throw_overflow_error(const std::string& message);
[[noreturn]] void throw_os_error(int error);

// 0 <= value <= limit: ValueError when it is negative, OverflowError when it is above.
uint64_t to_unsigned(nb::handle value, const char* name, uint64_t limit = UINT64_MAX);

// A range that can exist: address + length does not wrap, and only an empty range may start at 0.
void check_range(uint64_t address, uint64_t length, const char* name);

// A file descriptor; whether it is open is left to the system call.
int to_descriptor(nb::handle value);

// A range of a file: offset + length fits off_t.
void check_file_range(uint64_t offset, uint64_t length);

// A view on a Python buffer, held for the lifetime of this object.
class Buffer {
 public:
  Buffer(nb::handle exporter, int flags);
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { PyBuffer_Release(&view_); }

  const Py_buffer& view() const { return view_; }

 private:
  Py_buffer view_;
};

// A C-contiguous buffer of unsigned 32- or 64-bit integers: a numpy array, array.array("I" or "Q"), a cast memoryview.
template <class Word>
class Words {
 public:
  Words(nb::handle exporter, const char* name, bool is_writable = false)
      : buffer_(exporter, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (is_writable ? PyBUF_WRITABLE : 0)) {
    check_format(name);
  }

  size_t size() const { return static_cast<size_t>(buffer_.view().len) / sizeof(Word); }
  Word* data() const { return static_cast<Word*>(buffer_.view().buf); }

 private:
  void check_format(const char* name) const;

  Buffer buffer_;
};

extern template class Words<uint32_t>;
extern template class Words<uint64_t>;

}  // namespace moc
