// Advice to the kernel about ranges of memory. Each function returns 0 or an errno.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moc {

// Makes every page of the range present and writable; bytes keep their values.
int populate_pages(uint64_t address, uint64_t length);

// The same by an atomic write to each page, for kernels before 5.14.
void touch_pages(uint64_t address, uint64_t length);

// Keeps the range out of children made by fork. The address must be that of a page.
int forbid_fork(uint64_t address, uint64_t length);

uint64_t page_bytes();

}  // namespace moc
