// The runtime of the emulation: fibers, the order of threads, barriers, collectives of a warp,
// shared memory and asynchronous copies. Compiled without sanitizers, and tells them of its
// switches between stacks, which they cannot follow by themselves.
#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <sstream>
#include <unordered_map>
#include <vector>

#if !defined(__x86_64__) || defined(LDIT_UCONTEXT)
#define LDIT_PORTABLE_FIBERS
#include <ucontext.h>
#endif

// Present in a process that runs under the sanitizer, else null.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* bottom,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* save, const void** bottom,
                                                           size_t* size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* start, size_t bytes);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* start, size_t bytes);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
}

namespace emulation {

Coordinates now;

namespace {

constexpr std::size_t kStack = 256 << 10, kPage = 4096, kSharedLimit = 227 << 10, kRedzone = 64;
constexpr unsigned kThreads = 1024, kNoSync = 1;

// --- One stack that can be left and entered again.

struct Fiber {
  void* stack = nullptr;         // lowest usable byte
  void* sanitizer = nullptr;     // of ThreadSanitizer
  const void* bottom = nullptr;  // as AddressSanitizer wants to know it
  std::size_t size = 0;
  void* fake_stack = nullptr;
#ifdef LDIT_PORTABLE_FIBERS
  ucontext_t context;
#else
  void* top = nullptr;
#endif
};

#ifndef LDIT_PORTABLE_FIBERS
// Saves what a called function must preserve, and the stack pointer with it.
extern "C" void ldit_switch_stack(void** save, void* load);
asm(R"(
.text
.type ldit_switch_stack, @function
ldit_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ldit_switch_stack, .-ldit_switch_stack
)");
#endif

void enter_thread();

void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    void* pages = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    // An overflow ends the process instead of damaging a neighbour.
    mprotect(pages, kPage, PROT_NONE);
    fiber.stack = static_cast<char*>(pages) + kPage;
    fiber.bottom = fiber.stack;
    fiber.size = kStack;
  }
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fiber.stack, kStack);
  if (__tsan_create_fiber && !fiber.sanitizer) fiber.sanitizer = __tsan_create_fiber(0);
  fiber.fake_stack = nullptr;
#ifdef LDIT_PORTABLE_FIBERS
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter_thread, 0);
#else
  auto** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + kStack);
  *--top = nullptr;  // a function finds its stack eight bytes off a multiple of 16, as after a call
  *--top = reinterpret_cast<void*>(enter_thread);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.top = top;
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
  if (__tsan_switch_to_fiber && to.sanitizer) __tsan_switch_to_fiber(to.sanitizer, kNoSync);
#ifdef LDIT_PORTABLE_FIBERS
  swapcontext(&from.context, &to.context);
#else
  ldit_switch_stack(&from.top, to.top);
#endif
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

// --- Threads of a block.

enum class State { ready, at_barrier, in_collective, done };

struct Copying {
  void* destination;
  const void* source;
  std::size_t bytes, valid;
  unsigned group;
  Copy copy;
};

struct Thread {
  Fiber fiber;
  unsigned number;
  Index3 index;
  State state;
  Site site;
  const char* what;
  unsigned mask;
  void* brought;
  void* sync;  // where ThreadSanitizer is told what has been waited for
  std::vector<Copying> copies;
  unsigned groups;
};

struct Shared {
  char* memory;
  std::size_t bytes;
  Site site;
};

struct Machine {
  std::mutex one_launch;
  Order order = Order::shuffled;
  std::mt19937_64 random{0};
  Fiber scheduler;
  std::vector<Thread> threads{kThreads};
  unsigned count = 0;
  Thread* running = nullptr;
  const char* kernel = nullptr;
  void (*body)(const void*) = nullptr;
  const void* closure = nullptr;
  std::string failure;
  bool failed = false;
  std::unordered_map<const void*, Shared> shared;
  Shared dynamic{};
  std::size_t shared_bytes = 0;
  char sync_slots[1 << 16];  // a fresh one for each time that threads wait for each other
  unsigned next_slot = 0;
  char launch_start, launch_end;
  void* fresh_slot() { return &sync_slots[(next_slot += 8) % sizeof sync_slots]; }
};

Machine& machine() {
  // Never destroyed: fibers hold no resources worth an order of destruction.
  static auto* one = new Machine;
  return *one;
}

void acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}

void release(void* address) {
  if (__tsan_release) __tsan_release(address);
}

std::string text(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

template <class I>
std::string text(I index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

void record(const std::string& what, const Thread& thread, Site site) {
  Machine& m = machine();
  if (m.failed) return;
  m.failed = true;
  m.failure = std::string(m.kernel) + ": " + what + "; block " + text(now.block) + ", thread " +
              text(thread.index) + ", " + text(site);
}

void yield() {
  Machine& m = machine();
  Thread& self = *m.running;
  switch_fiber(self.fiber, m.scheduler);
}

void enter_thread() {
  Machine& m = machine();
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  acquire(&m.launch_start);
  m.body(m.closure);
  release(&m.launch_end);
  m.running->state = State::done;
  yield();
  std::abort();  // nobody switches to a thread that is done
}

// --- What is wrong when no thread of a block can go on.

std::string lanes_of(unsigned mask) {
  std::ostringstream out;
  for (unsigned lane = 0, some = 0; lane < 32; ++lane)
    if (mask >> lane & 1) out << (some++ ? " " : "") << lane;
  return out.str();
}

void explain_standstill() {
  Machine& m = machine();
  Thread *waiting = nullptr, *done = nullptr;
  for (unsigned i = 0; i < m.count; ++i) {
    Thread& thread = m.threads[i];
    if (thread.state == State::in_collective) {
      unsigned absent = 0, first = thread.number / 32 * 32;
      for (unsigned lane = 0; lane < 32; ++lane) {
        Thread* other = first + lane < m.count ? &m.threads[first + lane] : nullptr;
        bool here = other && other->state == State::in_collective && other->what == thread.what;
        if ((thread.mask >> lane & 1) && !here) absent |= 1u << lane;
      }
      return record(
          std::string(thread.what) + " waits for lanes that never come: " + lanes_of(absent),
          thread, thread.site);
    }
    if (thread.state == State::at_barrier && !waiting) waiting = &thread;
    if (thread.state == State::done && !done) done = &thread;
  }
  record("thread " + text(done->index) + " returned before a barrier that others wait at", *waiting,
         waiting->site);
}

// All threads stand at a barrier: lets them go on if it is the same.
void pass_barrier() {
  Machine& m = machine();
  Thread& first = m.threads[0];
  for (unsigned i = 1; i < m.count; ++i) {
    Thread& other = m.threads[i];
    if (other.site.line != first.site.line || std::strcmp(other.site.file, first.site.file)) {
      return record("a thread waits at another barrier, " + text(first.site), other, other.site);
    }
  }
  for (unsigned i = 0; i < m.count; ++i) m.threads[i].state = State::ready;
}

// --- Shared memory.

// NaN in every width, −1 as an integer.
void fill_with_nan(void* memory, std::size_t bytes) { std::memset(memory, 0xff, bytes); }

Shared allocate_shared(std::size_t bytes, Site site) {
  Machine& m = machine();
  m.shared_bytes += bytes;
  // From the heap each time, so that sanitizers see each block's shared memory as new.
  std::size_t whole = (bytes + 2 * kRedzone + 127) / 128 * 128;
  char* memory = static_cast<char*>(std::aligned_alloc(128, whole)) + kRedzone;
  fill_with_nan(memory - kRedzone, whole);
  if (__asan_poison_memory_region) {
    __asan_poison_memory_region(memory - kRedzone, kRedzone);
    __asan_poison_memory_region(memory + bytes, whole - kRedzone - bytes);
  }
  return {memory, bytes, site};
}

void free_shared(Shared& shared) {
  if (!shared.memory) return;
  if (__asan_unpoison_memory_region) {
    __asan_unpoison_memory_region(shared.memory - kRedzone,
                                  (shared.bytes + 2 * kRedzone + 127) / 128 * 128);
  }
  std::free(shared.memory - kRedzone);
  shared.memory = nullptr;
}

void free_all_shared() {
  Machine& m = machine();
  for (auto& [key, one] : m.shared) free_shared(one);
  m.shared.clear();
  free_shared(m.dynamic);
  m.shared_bytes = 0;
}

// --- A block from its first thread to its last.

void arrange(std::vector<unsigned>& sequence) {
  Machine& m = machine();
  if (m.order == Order::shuffled) std::shuffle(sequence.begin(), sequence.end(), m.random);
}

std::vector<unsigned> numbers(std::size_t count) {
  std::vector<unsigned> sequence(count);
  bool down = machine().order == Order::descending;
  for (std::size_t i = 0; i < count; ++i) sequence[i] = down ? count - 1 - i : i;
  arrange(sequence);
  return sequence;
}

void start_threads() {
  Machine& m = machine();
  Dim3 size = now.block_size;
  for (unsigned i = 0; i < m.count; ++i) {
    Thread& thread = m.threads[i];
    prepare(thread.fiber);
    thread.number = i;
    thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.state = State::ready;
    thread.copies.clear();
    thread.groups = 0;
  }
}

// Lets each thread of a warp run to the next place where it waits, again and again until none can
// go on. So one warp gets as far ahead of the others as barriers let it. Returns whether any thread
// has moved.
bool run_warp(unsigned warp) {
  Machine& m = machine();
  unsigned first = 32 * warp, count = std::min(32u, m.count - first);
  std::vector<unsigned> sequence = numbers(count);
  bool moved = false, again = true;
  while (again) {
    again = false;
    arrange(sequence);
    for (unsigned lane : sequence) {
      Thread& thread = m.threads[first + lane];
      if (thread.state != State::ready) continue;
      moved = again = true;
      m.running = &thread;
      now.thread = thread.index;
      switch_fiber(m.scheduler, thread.fiber);
      if (m.failed) return true;
    }
  }
  return moved;
}

void run_block(std::size_t dynamic_bytes) {
  Machine& m = machine();
  start_threads();
  m.dynamic = allocate_shared(dynamic_bytes, Site::here());
  std::vector<unsigned> sequence = numbers((m.count + 31) / 32);
  while (!m.failed) {
    bool moved = false;
    arrange(sequence);
    for (unsigned warp : sequence) {
      moved |= run_warp(warp);
      if (m.failed) break;
    }
    if (moved) continue;
    auto all = [&](State state) {
      return std::all_of(&m.threads[0], &m.threads[0] + m.count,
                         [&](Thread& t) { return t.state == state; });
    };
    if (all(State::done)) break;
    if (all(State::at_barrier)) pass_barrier();
    else explain_standstill();
  }
  free_all_shared();
}

void forget_threads() {
  // Left in the middle: ThreadSanitizer would take what their stacks hold for still alive.
  for (Thread& thread : machine().threads) {
    if (thread.fiber.sanitizer && thread.state != State::done)
      __tsan_destroy_fiber(thread.fiber.sanitizer);
    if (thread.state != State::done) thread.fiber.sanitizer = nullptr;
  }
}

void know_this_stack(Fiber& scheduler) {
  pthread_attr_t attributes;
  void* bottom;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &scheduler.size);
  pthread_attr_destroy(&attributes);
  scheduler.bottom = bottom;
  if (__tsan_get_current_fiber) scheduler.sanitizer = __tsan_get_current_fiber();
}

void check_launch(const char* kernel, Dim3 grid, Dim3 block, std::size_t dynamic_bytes) {
  std::size_t threads = std::size_t(block.x) * block.y * block.z;
  bool fits = threads > 0 && threads <= kThreads && grid.x > 0 && grid.x < 1u << 31 && grid.y > 0 &&
              grid.y < 65536 && grid.z > 0 && grid.z < 65536 && dynamic_bytes <= kSharedLimit;
  if (!fits) {
    throw Error(std::string(kernel) + ": no such launch: grid " + text(grid) + ", block " +
                text(block) + ", " + std::to_string(dynamic_bytes) + " bytes of shared memory");
  }
}

}  // namespace

void set_order(Order order, std::uint64_t seed) {
  std::lock_guard lock(machine().one_launch);
  machine().order = order;
  machine().random.seed(seed);
}

void run(const char* kernel, Dim3 grid, Dim3 block, std::size_t dynamic_bytes,
         void (*body)(const void*), const void* closure) {
  check_launch(kernel, grid, block, dynamic_bytes);
  Machine& m = machine();
  std::lock_guard lock(m.one_launch);
  m.kernel = kernel, m.body = body, m.closure = closure, m.failed = false;
  m.count = block.x * block.y * block.z;
  now.block_size = block, now.grid_size = grid;
  know_this_stack(m.scheduler);
  release(&m.launch_start);
  for (unsigned number : numbers(std::size_t(grid.x) * grid.y * grid.z)) {
    now.block = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    run_block(dynamic_bytes);
    if (m.failed) break;
  }
  acquire(&m.launch_end);
  if (m.failed) {
    forget_threads();
    throw Error(m.failure);
  }
}

void fail(const std::string& what, Site site) {
  record(what, *machine().running, site);
  yield();
  std::abort();  // the scheduler does not come back to a launch that failed
}

unsigned lane() { return machine().running->number % 32; }

void block_barrier(Site site) {
  Machine& m = machine();
  Thread& self = *m.running;
  self.state = State::at_barrier;
  self.site = site;
  bool first = true;
  for (unsigned i = 0; i < m.count && first; ++i)
    first = i == self.number || m.threads[i].state != State::at_barrier;
  static void* slot;
  if (first) slot = m.fresh_slot();
  void* mine = slot;
  release(mine);
  yield();
  acquire(mine);
}

void collective(const char* what, unsigned mask, void* mine, Perform perform, bool orders,
                Site site) {
  Machine& m = machine();
  Thread& self = *m.running;
  unsigned my_lane = self.number % 32, first = self.number - my_lane, arrived = 1u << my_lane;
  if (!(mask >> my_lane & 1))
    fail(std::string(what) + " by lane " + std::to_string(my_lane) + ", which is not in its mask",
         site);
  unsigned existing = m.count - first >= 32 ? ~0u : (1u << (m.count - first)) - 1;
  if (mask & ~existing)
    fail(std::string(what) + " names lanes the warp does not have: " + lanes_of(mask & ~existing),
         site);
  self.sync = nullptr;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1) || i == my_lane) continue;
    Thread& other = m.threads[first + i];
    if (other.state == State::done)
      fail(std::string(what) + " names lane " + std::to_string(i) + ", which has returned", site);
    if (other.state != State::in_collective) continue;
    bool same = other.mask == mask && !std::strcmp(other.what, what) &&
                other.site.line == site.line && !std::strcmp(other.site.file, site.file);
    if (!same) {
      fail(std::string(what) + " with mask lanes " + lanes_of(mask) + " while lane " +
               std::to_string(i) + " waits in " + other.what + " with mask lanes " +
               lanes_of(other.mask) + " at " + text(other.site),
           site);
    }
    arrived |= 1u << i;
    self.sync = other.sync;
  }
  if (!self.sync) self.sync = m.fresh_slot();
  self.what = what, self.mask = mask, self.brought = mine, self.site = site;
  void* sync = self.sync;
  if (orders) release(sync);
  if (arrived != mask) {
    self.state = State::in_collective;
    yield();
  } else {
    void* lanes[32] = {};
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1) lanes[i] = m.threads[first + i].brought;
    if (perform) perform(lanes, mask);
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1) m.threads[first + i].state = State::ready;
  }
  if (orders) acquire(sync);
}

void* static_shared(const void* key, std::size_t bytes, Site site) {
  Machine& m = machine();
  auto found = m.shared.find(key);
  if (found == m.shared.end()) {
    if (m.shared_bytes + bytes > kSharedLimit)
      fail("more shared memory than a block can have", site);
    found = m.shared.emplace(key, allocate_shared(bytes, site)).first;
  }
  return found->second.memory;
}

void* dynamic_shared(std::size_t& bytes) {
  bytes = machine().dynamic.bytes;
  return machine().dynamic.memory;
}

void copy_start(void* destination, const void* source, std::size_t bytes, std::size_t valid,
                Copy copy) {
  Thread& self = *machine().running;
  self.copies.push_back({destination, source, bytes, valid, self.groups, copy});
}

void copy_commit() { ++machine().running->groups; }

void copy_wait(unsigned pending_groups) {
  Thread& self = *machine().running;
  auto finished = [&](const Copying& copy) { return copy.group + pending_groups < self.groups; };
  for (const Copying& one : self.copies)
    if (finished(one)) one.copy(one.destination, one.source, one.bytes, one.valid);
  self.copies.erase(std::remove_if(self.copies.begin(), self.copies.end(), finished),
                    self.copies.end());
}

}  // namespace emulation
