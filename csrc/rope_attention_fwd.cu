// rope_attention, forward: softmax attention within each head, queries and keys normed and rotated
// on the way in. The products of 16-bit numbers run on tensor cores, those of float32 by FMA, in
// the same kernels (common/fragments.h).
#include "rope_attention/forward.h"
#include "rope_attention/instances.h"

namespace ldit {

void launch_rope_attention_fwd(Floats qkv, const QkvPrologue& prologue, void* out, float* lse,
                               const AttentionSizes& sizes, Stream stream) {
  bool aligned = rows_aligned(sizes, {qkv.data, prologue.table, out});
  bool head_in_smem = aligned && sizes.keys >= sizes.tokens && sizes.queries == sizes.keys;
  with_instance(qkv.dtype, sizes.width, head_in_smem, [&](auto tag, auto instance) {
    using T = typename decltype(tag)::type;
    using Chosen = decltype(instance);
    using Shape = ForwardShape<T, Chosen::width>;
    using Rows = Tile<T, Chosen::width>;
    constexpr const char* name = "rope_attention_fwd";
    check(sizes.queries % Shape::rows == 0 && sizes.keys % Shape::keys == 0,
          "queries or keys fill no tiles");
    check(Chosen::head_in_smem || sizes.queries <= sizes.warps * Shape::rows,
          "warps would need a second pass over the keys");
    check(sizes.warps * kWarp <= Shape::threads, "too many warps");
    std::int64_t parts = (sizes.tokens + sizes.queries - 1) / sizes.queries;
    std::size_t shared = (Rows::size(sizes.queries) + 2 * Rows::size(sizes.keys)) * sizeof(T);
    launch({name, blocks(name, sizes.heads * parts, sizes.samples), unsigned(sizes.warps * kWarp),
            stream, shared},
           rope_attention_fwd<T, Chosen::width, Chosen::head_in_smem>,
           static_cast<const T*>(qkv.data), prologue, static_cast<T*>(out), lse, sizes, aligned);
  });
}

}  // namespace ldit
