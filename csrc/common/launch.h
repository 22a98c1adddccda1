// Starting a kernel, on a device or in the emulation, and the grids for it.
#pragma once

#include <string>

#include "../ops.h"
#include "platform.h"

namespace ldit {

struct LaunchConfig {
  const char* name;  // of the kernel, for errors
  dim3 grid;
  unsigned threads;
  Stream stream;
  std::size_t dynamic_shared = 0;  // bytes
};

// Runs `kernel<<<…>>>(arguments…)`; throws LaunchError if it could not be started.
template <class... Parameters, class... Arguments>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments... arguments) {
#ifdef LDIT_EMULATED
  auto thread = [&] { kernel(arguments...); };
  auto body = [](const void* closure) { (*static_cast<const decltype(thread)*>(closure))(); };
  try {
    emulation::run(config.name, config.grid, config.threads, config.dynamic_shared, body, &thread);
  } catch (const emulation::Error& error) {
    throw LaunchError(error.what());
  }
#else
  auto check = [&](cudaError_t status) {
    if (status != cudaSuccess) {
      cudaGetLastError();  // reported here, not by the next call of the runtime
      throw LaunchError(std::string(config.name) + ": " + cudaGetErrorString(status));
    }
  };
  constexpr std::size_t kWithoutAsking = 48 << 10;
  if (config.dynamic_shared > kWithoutAsking) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(config.dynamic_shared)));
  }
  cudaLaunchConfig_t native{};
  native.gridDim = config.grid;
  native.blockDim = dim3(config.threads);
  native.dynamicSmemBytes = config.dynamic_shared;
  native.stream = config.stream;
  check(cudaLaunchKernelEx(&native, kernel, static_cast<Parameters>(arguments)...));
#endif
}

// A grid of `count` blocks, times `rows`; throws LaunchError if no grid has so many.
inline dim3 blocks(const char* name, std::int64_t count, std::int64_t rows = 1) {
  if (count < 1 || count > 0x7fffffff || rows < 1 || rows > 0xffff) {
    throw LaunchError(std::string(name) + ": a grid of " + std::to_string(count) + " × " +
                      std::to_string(rows) + " blocks");
  }
  return dim3(static_cast<unsigned>(count), static_cast<unsigned>(rows));
}

}  // namespace ldit
