// The instances of the attention kernels, and the choice of the one that serves a call.
#pragma once

#include <initializer_list>
#include <string>

#include "../common/convert.h"
#include "../common/launch.h"
#include "../common/vector.h"
#include "rows.h"

namespace ldit {

template <int columns, bool whole_head>
struct Instance {
  static constexpr int width = columns;
  static constexpr bool head_in_smem = whole_head;
};

// Calls `use(T, Instance)`, as types. Where a block holds a whole head of a usual width, in aligned
// rows, a kernel for just that; else the narrowest that has room. No model multiplies
// wider heads than 72 in float32.
template <class Use>
void with_instance(DType dtype, std::int64_t width, bool head_in_smem, Use&& use) {
  dispatch(dtype, [&](auto tag) {
    constexpr bool is_16_bit = kIs16Bit<typename decltype(tag)::type>;
    if constexpr (is_16_bit) {
      if (width == 64 && head_in_smem) return use(tag, Instance<64, true>{});
      if (width == 72 && head_in_smem) return use(tag, Instance<72, true>{});
    }
    if (width <= 32) return use(tag, Instance<32, false>{});
    if (width <= 72) return use(tag, Instance<72, false>{});
    if constexpr (is_16_bit) {
      if (width <= kMaxHeadWidth) return use(tag, Instance<kMaxHeadWidth, false>{});
    }
    throw LaunchError("rope_attention: a head of " + std::to_string(width) + " columns");
  });
}

// Whether 16 bytes can be read at the start of every 8 columns of a head in all arrays, which start
// at 16 bytes.
inline bool rows_aligned(const AttentionSizes& sizes, std::initializer_list<const void*> arrays) {
  bool aligned = sizes.width % kChunk == 0;
  for (const void* array : arrays) aligned = aligned && is_aligned(array);
  return aligned;
}

inline void check(bool holds, const char* what) {
  if (!holds) throw LaunchError(std::string("rope_attention: ") + what);
}

}  // namespace ldit
