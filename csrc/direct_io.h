// Positioned reads and writes that finish what the kernel leaves unfinished.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moc {

struct IoResult {
  uint64_t done_bytes;
  int error;  // errno, 0 when there was none
};

// Writes the segments one after the other from file_offset on.
IoResult write_segments(int fd, uint64_t file_offset, const uint64_t* addresses, const uint64_t* lengths, size_t count);

// Reads `length` bytes; fewer only where the file ends.
IoResult read_range(int fd, uint64_t file_offset, uint8_t* target, uint64_t length);

}  // namespace moc
