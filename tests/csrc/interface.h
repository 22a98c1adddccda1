// The C interface of the test kernels, for ctypes: a function returns null, or the error of its
// launch.
#pragma once

#include <string>

#include "common/launch.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

template <class Run>
const char* caught(Run&& run) {
  static std::string message;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

#ifdef LDIT_EMULATED
EXPORT void set_order(int order, std::uint64_t seed) {
  emulation::set_order(static_cast<emulation::Order>(order), seed);
}
#endif
