// rope_attention: softmax attention within each head, queries and keys normed and rotated on the way in. The products of
// 16-bit numbers run on tensor cores, those of float32 by FMA, in the same kernels (common/fragments.h).
#include "common/column_sums.h"
#include "rope_attention/backward.h"
#include "rope_attention/forward.h"

namespace ldit {
namespace {

template <int columns, bool of_whole>
struct Instance {
  static constexpr int width = columns;
  static constexpr bool whole = of_whole;
};

// Calls `use(T, Instance)`, as types. Where a block holds a whole head, of a usual width, and accesses are whole, a kernel for
// just that; else the least that has room.
template <class Use>
void with_instance(DType dtype, std::int64_t width, bool whole, Use&& use) {
  dispatch(dtype, [&](auto tag) {
    if constexpr (kNarrow<typename decltype(tag)::type>) {
      if (width == 64 && whole) return use(tag, Instance<64, true>{});
      if (width == 72 && whole) return use(tag, Instance<72, true>{});
    }
    if (width <= 32) return use(tag, Instance<32, false>{});
    if (width <= 72) return use(tag, Instance<72, false>{});
    if (width <= kMaxHeadWidth) return use(tag, Instance<kMaxHeadWidth, false>{});
    throw LaunchError("rope_attention: a head of " + std::to_string(width) + " columns");
  });
}

// Whether 16 bytes can be read at the start of every 8 columns of a head in all arrays, which start at 16 bytes.
bool whole_chunks(const AttentionSizes& sizes, std::initializer_list<const void*> arrays) {
  bool all = sizes.width % kChunk == 0;
  for (const void* array : arrays) all = all && aligned(array);
  return all;
}

void check(bool holds, const char* what) {
  if (!holds) throw LaunchError(std::string("rope_attention: ") + what);
}

}  // namespace

void launch_rope_attention_fwd(Floats qkv, const Turn& turn, void* out, float* lse, const AttentionSizes& sizes, Stream stream) {
  bool all = whole_chunks(sizes, {qkv.data, turn.table, out});
  bool whole = all && sizes.keys >= sizes.tokens && sizes.queries == sizes.keys;
  with_instance(qkv.dtype, sizes.width, whole, [&](auto tag, auto instance) {
    using T = typename decltype(tag)::type;
    using Chosen = decltype(instance);
    using Shape = ForwardShape<T, Chosen::width>;
    using Rows = Tile<T, Chosen::width>;
    constexpr const char* name = "rope_attention_fwd";
    check(sizes.queries % Shape::rows == 0 && sizes.keys % Shape::keys == 0, "queries or keys fill no tiles");
    check(Chosen::whole || sizes.queries <= sizes.warps * Shape::rows, "warps take turns while keys pass by");
    check(sizes.warps * kWarp <= Shape::threads, "too many warps");
    std::int64_t parts = (sizes.tokens + sizes.queries - 1) / sizes.queries;
    std::size_t shared = (Rows::size(sizes.queries) + 2 * Rows::size(sizes.keys)) * sizeof(T);
    launch({name, blocks(name, sizes.samples * sizes.heads * parts), unsigned(sizes.warps * kWarp), stream, shared},
           rope_attention_fwd<T, Chosen::width, Chosen::whole>, static_cast<const T*>(qkv.data), turn, static_cast<T*>(out), lse, sizes, all);
  });
}

void launch_rope_attention_bwd(const void* d_out, Floats qkv, const void* out, const float* lse, const Turn& turn, void* d_qkv,
                               float* scratch, float* partials, Floats d_q_weight, Floats d_k_weight,
                               const AttentionSizes& sizes, Stream stream) {
  bool all = whole_chunks(sizes, {d_out, qkv.data, out, turn.table, d_qkv});
  bool whole = all && sizes.keys >= sizes.tokens && sizes.queries == sizes.keys;
  with_instance(qkv.dtype, sizes.width, whole, [&](auto tag, auto instance) {
    using T = typename decltype(tag)::type;
    using Chosen = decltype(instance);
    using Shape = BackwardShape<T, Chosen::width, Chosen::whole>;
    constexpr const char* name = "rope_attention_bwd";
    check(sizes.keys == sizes.warps * Shape::rows, "keys are not those of the warps");
    check(sizes.queries % (8 * Shape::n) == 0 && (sizes.queries >= sizes.tokens || sizes.queries % Shape::block == 0), "queries fill no tiles");
    check(sizes.keys >= sizes.tokens || scratch != nullptr, "there is no scratch");
    check(sizes.warps * kWarp <= Shape::threads, "too many warps");
    launch({name, blocks(name, sizes.samples * sizes.heads), unsigned(sizes.warps * kWarp), stream, Shape::shared(sizes)},
           rope_attention_bwd<T, Chosen::width, Chosen::whole>, static_cast<const T*>(d_out), static_cast<const T*>(qkv.data),
           static_cast<const T*>(out), lse, turn, static_cast<T*>(d_qkv), scratch, partials, sizes, all);
  });
  if (partials == nullptr) return;
  std::int64_t heads = sizes.samples * sizes.heads;
  launch_column_sums(partials, d_q_weight, heads, sizes.width, stream);
  launch_column_sums(partials + heads * sizes.width, d_k_weight, heads, sizes.width, stream);
}

}  // namespace ldit
