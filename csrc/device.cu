// What binding.cpp asks of the CUDA runtime, here so that it needs none of its headers.
#include "common/launch.h"

namespace ldit {

int set_device([[maybe_unused]] int device) {
#ifdef LDIT_EMULATED
  return -1;
#else
  int before = -1;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess && before != device) status = cudaSetDevice(device);
  if (status != cudaSuccess)
    throw LaunchError(std::string("no such device: ") + cudaGetErrorString(status));
  return before == device ? -1 : before;
#endif
}

}  // namespace ldit
