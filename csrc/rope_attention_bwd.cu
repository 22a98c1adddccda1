// rope_attention, backward: the gradients of the packed projection, of its bias and of the weights
// of the norms.
#include "common/column_sums.h"
#include "rope_attention/backward.h"
#include "rope_attention/instances.h"

namespace ldit {

void launch_rope_attention_bwd(const void* d_out, Floats qkv, const void* out, const float* lse,
                               const QkvPrologue& prologue, void* d_qkv, float* scratch,
                               const VectorPartials& partials, const VectorGradients& gradients,
                               const AttentionSizes& sizes, Stream stream) {
  bool aligned = rows_aligned(sizes, {d_out, qkv.data, out, prologue.table, d_qkv});
  bool head_in_smem = aligned && sizes.keys >= sizes.tokens && sizes.queries == sizes.keys;
  with_instance(qkv.dtype, sizes.width, head_in_smem, [&](auto tag, auto instance) {
    using T = typename decltype(tag)::type;
    using Chosen = decltype(instance);
    using Shape = BackwardShape<T, Chosen::width, Chosen::head_in_smem>;
    constexpr const char* name = "rope_attention_bwd";
    check(sizes.keys == sizes.warps * Shape::rows, "keys are not those of the warps");
    check(sizes.queries % (8 * Shape::n) == 0 &&
              (sizes.queries >= sizes.tokens || sizes.queries % Shape::block == 0),
          "queries fill no tiles");
    check((sizes.keys >= sizes.tokens && !Shape::dq_in_scratch) || scratch != nullptr,
          "there is no scratch");
    check(sizes.warps * kWarp <= Shape::threads && sizes.queries <= Shape::max_queries,
          "too many warps or queries");
    launch({name, blocks(name, sizes.heads, sizes.samples), unsigned(sizes.warps * kWarp), stream,
            Shape::shared(sizes)},
           rope_attention_bwd<T, Chosen::width, Chosen::head_in_smem>, static_cast<const T*>(d_out),
           static_cast<const T*>(qkv.data), static_cast<const T*>(out), lse, prologue,
           static_cast<T*>(d_qkv), scratch, partials, sizes, aligned);
  });
  std::int64_t heads = sizes.samples * sizes.heads;
  if (partials.dw_partial != nullptr) {
    launch_column_sums(partials.dw_partial, gradients.d_q_weight, heads, sizes.width, stream);
    launch_column_sums(partials.dw_partial + heads * sizes.width, gradients.d_k_weight, heads,
                       sizes.width, stream);
  }
  if (partials.db_partial != nullptr) {
    launch_column_sums(partials.db_partial, gradients.d_bias, sizes.samples,
                       3 * sizes.heads * sizes.width, stream);
  }
}

}  // namespace ldit
