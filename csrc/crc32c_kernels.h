// The kernels that may be part of a build; crc32c.cpp lists those of the architecture it is built for.
#pragma once

#include "crc32c.h"

namespace moc {

extern const Kernel kAvx512Kernel;
extern const Kernel kSse42Kernel;
extern const Kernel kArmv8Kernel;
extern const Kernel kPortableKernel;

}  // namespace moc
