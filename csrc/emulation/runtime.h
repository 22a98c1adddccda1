// The interface of the emulation's runtime, which runs CUDA blocks on a CPU: one fiber for each
// CUDA thread, blocks one after another, in one host thread.
//
// Between two places where threads wait for each other each runs alone, and a warp gets as far
// ahead of the others as barriers let it; the order is ascending, descending or shuffled. So a
// missing barrier shows in some order. Waiting that cannot end, or that CUDA does not define, ends
// the launch with an Error which names the kernel, the block, the thread and the line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Index3 {
  unsigned x, y, z;
};

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// A place in the source; as a default argument `Site::here()` it is that of the caller.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// The thread and block that run at the moment, read through threadIdx, blockIdx, blockDim, gridDim.
struct Coordinates {
  Index3 thread, block;
  Dim3 block_size, grid_size;
};
extern Coordinates now;

enum class Order { ascending, descending, shuffled };

// The order in which the threads of a block run, and the blocks of a grid, from now on.
void set_order(Order order, std::uint64_t seed);

// Runs `body(closure)` once for each thread of the grid. Throws Error.
void run(const char* kernel, Dim3 grid, Dim3 block, std::size_t dynamic_shared,
         void (*body)(const void*), const void* closure);

// Ends the launch; called by code of a kernel that has found a mistake.
[[noreturn]] void fail(const std::string& what, Site site);

void block_barrier(Site site);

// Every lane of `mask` calls this with the same `what`, `mask` and place. The last to arrive runs
// `perform` on what the lanes brought (`lanes[i]` for lane i, null outside the mask) before any
// goes on. Memory is ordered only if `orders`.
using Perform = void (*)(void* const lanes[32], unsigned mask);
void collective(const char* what, unsigned mask, void* mine, Perform perform, bool orders,
                Site site);
unsigned lane();

// Shared memory of the running block, filled with NaN when the block starts. `key` tells
// declarations apart.
void* static_shared(const void* key, std::size_t bytes, Site site);
void* dynamic_shared(std::size_t& bytes);

// Asynchronous copies of the running thread, done by `copy` at the time they are waited for.
using Copy = void (*)(void* destination, const void* source, std::size_t bytes, std::size_t valid);
void copy_start(void* destination, const void* source, std::size_t bytes, std::size_t valid,
                Copy copy);
void copy_commit();
void copy_wait(unsigned pending_groups);

}  // namespace emulation
