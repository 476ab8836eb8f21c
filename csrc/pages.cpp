#include "pages.h"

#include <cerrno>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older headers lack it
#endif

namespace moc {
namespace {

constexpr uint64_t kChunk = uint64_t{64} << 20;  // bounds the time the kernel holds the lock on the address space
constexpr int kAttemptLimit = 100;               // EAGAIN and EINTR are transient; a page that never comes is an error

int populate_chunk(uint64_t address, uint64_t length) {
  for (int attempt = 0; attempt < kAttemptLimit; ++attempt) {
    if (madvise(reinterpret_cast<void*>(address), length, MADV_POPULATE_WRITE) == 0) return 0;
    if (errno != EAGAIN && errno != EINTR) break;
  }
  return errno;
}

}  // namespace

uint64_t page_bytes() {
  static const uint64_t bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

void touch_pages(uint64_t address, uint64_t length) {
  const uint64_t end = address + length;
  for (uint64_t at = address; at < end; at = (at / page_bytes() + 1) * page_bytes()) {
    // An atomic "or" with 0 dirties the page and can not lose another process's write to the same byte.
    __atomic_fetch_or(reinterpret_cast<uint8_t*>(at), uint8_t{0}, __ATOMIC_RELAXED);
  }
}

int populate_pages(uint64_t address, uint64_t length) {
  if (length == 0) return 0;
  const uint64_t end = address + length;
  for (uint64_t at = address / page_bytes() * page_bytes(); at < end;) {
    const uint64_t next = std::min(end, at + kChunk);
    const int error = populate_chunk(at, next - at);
    if (error == EINVAL) {
      const uint64_t first = std::max(at, address);
      touch_pages(first, end - first);
      return 0;
    }
    if (error != 0) return error;
    at = next;
  }
  return 0;
}

int forbid_fork(uint64_t address, uint64_t length) {
  return madvise(reinterpret_cast<void*>(address), length, MADV_DONTFORK) == 0 ? 0 : errno;
}

}  // namespace moc
