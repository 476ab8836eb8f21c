#include "direct_io.h"

#include <cerrno>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <climits>

namespace moc {
namespace {

constexpr size_t kBatch = 1024;                     // IOV_MAX of Linux
constexpr uint64_t kCallBytes = uint64_t{64} << 20;  // tens of milliseconds: a process that must die does so soon

// Where the next byte comes from: a segment, and how much of it is already written.
struct Cursor {
  size_t segment = 0;
  uint64_t offset = 0;
};

// Fills `vectors` from the cursor on, at most kCallBytes in all, and returns how many it filled.
size_t gather(const Cursor& cursor, const uint64_t* addresses, const uint64_t* lengths, size_t count, iovec* vectors) {
  size_t filled = 0;
  uint64_t total = 0;
  uint64_t offset = cursor.offset;
  for (size_t i = cursor.segment; i < count && filled < kBatch && total < kCallBytes; ++i, offset = 0) {
    const uint64_t length = std::min(lengths[i] - offset, kCallBytes - total);
    if (length == 0) continue;
    vectors[filled++] = {reinterpret_cast<void*>(addresses[i] + offset), length};
    total += length;
  }
  return filled;
}

void advance(Cursor& cursor, const uint64_t* lengths, uint64_t written) {
  while (written != 0) {
    const uint64_t left = lengths[cursor.segment] - cursor.offset;
    if (written < left) {
      cursor.offset += written;
      return;
    }
    written -= left;
    cursor = {cursor.segment + 1, 0};
  }
}

bool is_at_end(int fd, uint64_t offset) {
  struct stat status;
  if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) return false;
  return offset >= static_cast<uint64_t>(status.st_size);
}

}  // namespace

IoResult write_segments(int fd, uint64_t file_offset, const uint64_t* addresses, const uint64_t* lengths, size_t count) {
  iovec vectors[kBatch];
  Cursor cursor;
  uint64_t done = 0;
  while (const size_t filled = gather(cursor, addresses, lengths, count, vectors)) {
    const ssize_t written = pwritev(fd, vectors, static_cast<int>(filled), static_cast<off_t>(file_offset + done));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return {done, errno};
    if (written == 0) return {done, EIO};  // no progress and no reason given: going on could loop for ever
    advance(cursor, lengths, static_cast<uint64_t>(written));
    done += static_cast<uint64_t>(written);
  }
  return {done, 0};
}

IoResult read_range(int fd, uint64_t file_offset, uint8_t* target, uint64_t length) {
  uint64_t done = 0;
  while (done < length) {
    const uint64_t wanted = std::min(length - done, kCallBytes);
    const ssize_t taken = pread(fd, target + done, wanted, static_cast<off_t>(file_offset + done));
    if (taken < 0 && errno == EINTR) continue;
    if (taken < 0) return {done, errno};
    if (taken == 0) break;
    done += static_cast<uint64_t>(taken);
    // A direct read that stopped inside a block can not be continued there on every file system: ask for the size first.
    if (static_cast<uint64_t>(taken) < wanted && is_at_end(fd, file_offset + done)) break;
  }
  return {done, 0};
}

}  // namespace moc
