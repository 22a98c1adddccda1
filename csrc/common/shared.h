// Shared memory, static and dynamic: plain pointers on a device; the emulation checks the bounds.
#pragma once

#include "platform.h"

namespace ldit {

// An index that knows where it was written.
#ifdef LDIT_EMULATED
struct Index {
  std::int64_t value;
  Site site;
  constexpr Index(std::int64_t value, Site site = Site::here()) : value(value), site(site) {}
};
#else
using Index = std::int64_t;
#endif

template <class T>
struct Shared {
  T* base;
#ifdef LDIT_EMULATED
  std::int64_t size;
#endif

  LDIT_DEVICE T& operator[](Index i) const {
#ifdef LDIT_EMULATED
    return *span(i.value, 1, i.site);
#else
    return base[i];
#endif
  }

  // The address of `count` elements from element `first` on, for vector accesses, ldmatrix and
  // asynchronous copies.
  LDIT_DEVICE T* span(std::int64_t first, std::int64_t count,
                      [[maybe_unused]] Site site = Site::here()) const {
#ifdef LDIT_EMULATED
    if (first < 0 || first + count > size) {
      emulation::fail("shared memory out of bounds: elements " + std::to_string(first) + " to " +
                          std::to_string(first + count - 1) + " of " + std::to_string(size),
                      site);
    }
#endif
    return base + first;
  }

  LDIT_DEVICE Shared part(std::int64_t first, std::int64_t count, Site site = Site::here()) const {
#ifdef LDIT_EMULATED
    return {span(first, count, site), count};
#else
    return {base + first};
#endif
  }
};

// Declares `Shared<T> name` with `count` elements, a constant, aligned to 16 bytes.
#ifdef LDIT_EMULATED
#define LDIT_SHARED(T, name, count)                                                          \
  static const char name##_key = 0;                                                          \
  const ::ldit::Shared<T> name {                                                             \
    static_cast<T*>(                                                                         \
        ::emulation::static_shared(&name##_key, sizeof(T) * (count), ::ldit::Site::here())), \
        count                                                                                \
  }
#else
#define LDIT_SHARED(T, name, count)                \
  __shared__ __align__(16) T name##_memory[count]; \
  const ::ldit::Shared<T> name { name##_memory }
#endif

// Hands out the dynamic shared memory of a launch piece by piece, each aligned to 16 bytes.
class DynamicShared {
 public:
  LDIT_DEVICE DynamicShared() {
#ifdef LDIT_EMULATED
    std::size_t bytes;
    next_ = static_cast<char*>(emulation::dynamic_shared(bytes));
    remaining_ = bytes;
#else
    extern __shared__ __align__(16) char ldit_dynamic_shared[];
    next_ = ldit_dynamic_shared;
#endif
  }

  template <class T>
  LDIT_DEVICE Shared<T> take(std::int64_t count, [[maybe_unused]] Site site = Site::here()) {
    std::int64_t bytes = (count * std::int64_t(sizeof(T)) + 15) / 16 * 16;
    T* base = reinterpret_cast<T*>(next_);
    next_ += bytes;
#ifdef LDIT_EMULATED
    remaining_ -= bytes;
    if (remaining_ < 0)
      emulation::fail("more dynamic shared memory taken than the launch has", site);
    return {base, count};
#else
    return {base};
#endif
  }

 private:
  char* next_;
#ifdef LDIT_EMULATED
  std::int64_t remaining_;
#endif
};

}  // namespace ldit
