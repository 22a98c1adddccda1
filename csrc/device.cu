// The calls of the CUDA runtime that binding.cpp needs, in a file of their own so that it needs
// none of CUDA's headers.
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
