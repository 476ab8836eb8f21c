#include "arguments.h"

#include <cerrno>
#include <climits>
#include <cstring>

namespace moc {
namespace {

std::string text_of(nb::handle value) { return nb::str(value).c_str(); }

}  // namespace

void throw_value_error(const std::string& message) {
  PyErr_SetString(PyExc_ValueError, message.c_str());
  throw nb::python_error();
}

void throw_overflow_error(const std::string& message) {
  PyErr_SetString(PyExc_OverflowError, message.c_str());
  throw nb::python_error();
}

void throw_os_error(int error) {
  errno = error;
  PyErr_SetFromErrno(PyExc_OSError);
  throw nb::python_error();
}

uint64_t to_unsigned(nb::handle value, const char* name, uint64_t limit) {
  const nb::object index = nb::steal(PyNumber_Index(value.ptr()));
  if (!index.is_valid()) throw nb::python_error();
  int overflow = 0;
  const long long narrow = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow < 0 || (overflow == 0 && narrow < 0)) {
    throw_value_error(std::string(name) + " is negative " + name + "=" + text_of(index) +
                      " allowed=0.." + std::to_string(limit));
  }
  const uint64_t wide = PyLong_AsUnsignedLongLong(index.ptr());
  const bool is_too_wide = wide == UINT64_MAX && PyErr_Occurred() != nullptr;
  if (is_too_wide) PyErr_Clear();  // replaced by a message that names the argument
  if (is_too_wide || wide > limit) {
    throw_overflow_error(std::string(name) + " is too large " + name + "=" + text_of(index) +
                         " allowed=0.." + std::to_string(limit));
  }
  return wide;
}

void check_range(uint64_t address, uint64_t length, const char* name) {
  if (length != 0 && address == 0) {
    throw_value_error(std::string(name) + " is null address=0 length=" + std::to_string(length));
  }
  if (length > UINT64_MAX - address) {
    throw_overflow_error(std::string(name) + " range wraps around address=" + std::to_string(address) +
                         " length=" + std::to_string(length));
  }
}

int to_descriptor(nb::handle value) { return static_cast<int>(to_unsigned(value, "fd", INT_MAX)); }

void check_file_range(uint64_t offset, uint64_t length) {
  if (length > static_cast<uint64_t>(INT64_MAX) - offset) {
    throw_overflow_error("file range is too large file_offset=" + std::to_string(offset) +
                         " length=" + std::to_string(length) + " allowed=0.." + std::to_string(INT64_MAX));
  }
}

Buffer::Buffer(nb::handle exporter, int flags) {
  if (PyObject_GetBuffer(exporter.ptr(), &view_, flags) != 0) throw nb::python_error();
}

template <class Word>
void Words<Word>::check_format(const char* name) const {
  const Py_buffer& view = buffer_.view();
  const char* format = view.format != nullptr ? view.format : "B";
  const bool is_native = *format == '@' || *format == '=' || *format == '<';  // only little-endian hosts are built for
  const char* code = is_native ? format + 1 : format;
  const bool is_unsigned = std::strlen(code) == 1 && std::strchr("ILQ", *code) != nullptr;
  if (is_unsigned && view.itemsize == static_cast<Py_ssize_t>(sizeof(Word))) return;
  throw_value_error(std::string(name) + " has the wrong item type format=" + format +
                    " item_bytes=" + std::to_string(view.itemsize) +
                    " allowed=uint" + std::to_string(8 * sizeof(Word)));
}

template class Words<uint32_t>;
template class Words<uint64_t>;

}  // namespace moc
