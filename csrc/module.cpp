// The extension module moc._native. It knows addresses, lengths and enums, and nothing of torch: one build fits any.
#include "bindings.h"

NB_MODULE(_native, module) {
  module.doc() = "Copies, checksums and direct I/O on raw memory, with the GIL released.";
  moc::bind_checksums(module);
  moc::bind_memory(module);
}
