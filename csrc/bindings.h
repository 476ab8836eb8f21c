// Each file that binds functions adds them to the module through one of these.
#pragma once

#include <nanobind/nanobind.h>

namespace moc {

void bind_checksums(nanobind::module_& module);
void bind_memory(nanobind::module_& module);

}  // namespace moc
