#include "crc32c.h"

#include <cstring>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "crc32c_kernels.h"
#include "crc32c_polynomial.h"

namespace moc {

const Kernel* const kKernels[] = {
#if defined(__x86_64__)
    &kAvx512Kernel,
    &kSse42Kernel,
#elif defined(__aarch64__)
    &kArmv8Kernel,
#endif
    &kPortableKernel,
};
const size_t kKernelCount = sizeof kKernels / sizeof kKernels[0];

const Kernel& fastest_kernel() {
  static const Kernel* const chosen = [] {
    const Kernel* const* kernel = kKernels;
    while (!(*kernel)->is_supported()) ++kernel;  // ends: the last one always is
    return *kernel;
  }();
  return *chosen;
}

const Kernel* find_kernel(const char* name) {
  for (const Kernel* kernel : kKernels) {
    if (std::strcmp(kernel->name, name) == 0) return kernel->is_supported() ? kernel : nullptr;
  }
  return nullptr;
}

void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();  // non-temporal stores are not ordered by the release store that publishes a seal
#endif
}

uint32_t combine_crc32c(uint32_t crc_a, uint32_t crc_b, uint64_t length_b) {
  // 8 * length_b may exceed 64 bits, so x^8 is raised instead; the complements on both ends cancel out.
  uint32_t factor = kOne;
  for (uint32_t base = power_of_x(8); length_b != 0; length_b >>= 1) {
    if (length_b & 1) factor = multiply(factor, base);
    base = multiply(base, base);
  }
  return multiply(factor, crc_a) ^ crc_b;
}

}  // namespace moc
