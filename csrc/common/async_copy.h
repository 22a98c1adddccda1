// Asynchronous copies of 16 bytes from global to shared memory, past the registers.
//
//   for each stage: copy16(…) as often as needed, then commit_copies();
//   wait_copies<n>() returns when all but the last n committed groups of this thread have arrived;
//   a barrier then shows them to the other threads.
//
// The emulation copies when they are waited for, and holds NaN in the destination until then.
#pragma once

#include "shared.h"

namespace ldit {

// Copies the first `valid` of 16 bytes, 0 to 16, and fills the rest with zeros. Both addresses are
// multiples of 16; with `valid` 0 nothing is read, though `from` has to be an address within its
// array.
LDIT_DEVICE void copy16(void* to, const void* from, int valid = 16,
                        [[maybe_unused]] Site site = Site::here()) {
#ifdef LDIT_EMULATED
  if (reinterpret_cast<std::uintptr_t>(to) % 16 || reinterpret_cast<std::uintptr_t>(from) % 16) {
    emulation::fail("an asynchronous copy with a misaligned address", site);
  }
  if (valid < 0 || valid > 16)
    emulation::fail("an asynchronous copy of " + std::to_string(valid) + " bytes", site);
  // By elements, so that a sanitizer sees each.
  auto* bytes = static_cast<volatile unsigned char*>(to);
  for (int i = 0; i < 16; ++i) bytes[i] = 0xff;
  emulation::copy_start(to, from, 16, valid,
                        [](void* to, const void* from, std::size_t bytes, std::size_t valid) {
                          auto* destination = static_cast<volatile unsigned char*>(to);
                          auto* source = static_cast<const volatile unsigned char*>(from);
                          for (std::size_t i = 0; i < bytes; ++i)
                            destination[i] = i < valid ? source[i] : 0;
                        });
#else
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid)
               : "memory");
#endif
}

LDIT_DEVICE void commit_copies() {
#ifdef LDIT_EMULATED
  emulation::copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int pending_groups>
LDIT_DEVICE void wait_copies() {
#ifdef LDIT_EMULATED
  emulation::copy_wait(pending_groups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(pending_groups) : "memory");
#endif
}

}  // namespace ldit
