// The Python module: for each launcher of ops.h a function that takes tensors, checks them and
// passes their pointers on.
//
// Results are tensors that the caller has allocated. A ValueError names the op and the argument; a
// RuntimeError is a launch that CUDA, or the emulation, refused.
#include "binding.h"
#ifdef LDIT_EMULATED
#include "emulation/runtime.h"
#endif

namespace ldit {
namespace {

// An array of that shape, or null where None is given.
Floats floats_or_none(Call& call, const char* name, py::handle object, const Shape& shape) {
  auto tensor = optional(call, name, object);
  return tensor ? tensor->shaped(shape).floats() : Floats{};
}

float* partial_sums(Call& call, py::handle object, const Shape& shape,
                    const char* name = "partials") {
  Floats sums = floats_or_none(call, name, object, shape);
  call.require(sums.dtype == DType::float32, name, "is not float32");
  return static_cast<float*>(sums.data);
}

SwigluSizes swiglu_sizes(Call& call, const Tensor& gate_up, std::int64_t rows_per_block) {
  call.require(gate_up.elements() > 0 && gate_up.size(-1) % 2 == 0, "gate_up",
               "is empty, or its last dimension is odd");
  call.require(rows_per_block > 0, "rows_per_block", "is not positive");
  std::int64_t packed = gate_up.size(-1);
  return {gate_up.elements() / packed, packed / 2, rows_per_block};
}

void swiglu_fwd(py::handle gate_up, py::handle bias, py::handle out, std::int64_t rows_per_block) {
  Call call("swiglu_fwd");
  Tensor packed(call, "gate_up", gate_up), result(call, "out", out);
  SwigluSizes sizes = swiglu_sizes(call, packed, rows_per_block);
  Floats input = packed.floats();
  launch_swiglu_fwd(input, floats_or_none(call, "bias", bias, {2 * sizes.width}),
                    result.counted(sizes.rows * sizes.width).typed(input.dtype).data(), sizes,
                    call.stream());
}

void swiglu_bwd(py::handle gate_up, py::handle bias, py::handle d_out, py::handle d_gate_up,
                py::handle partials, py::handle d_bias, std::int64_t rows_per_block) {
  Call call("swiglu_bwd");
  Tensor packed(call, "gate_up", gate_up), upstream(call, "d_out", d_out),
      result(call, "d_gate_up", d_gate_up);
  SwigluSizes sizes = swiglu_sizes(call, packed, rows_per_block);
  Floats input = packed.floats();
  Shape bias_shape = {2 * sizes.width};
  launch_swiglu_bwd(input, floats_or_none(call, "bias", bias, bias_shape),
                    upstream.counted(sizes.rows * sizes.width).typed(input.dtype).data(),
                    result.counted(packed.elements()).typed(input.dtype).data(),
                    partial_sums(call, partials, {sizes.parts(), 2 * sizes.width}),
                    floats_or_none(call, "d_bias", d_bias, bias_shape), sizes, call.stream());
}

NormSizes norm_sizes(Call& call, const Tensor& x, std::int64_t tokens_per_block, double eps) {
  x.ranked(3);
  call.require(x.size(2) <= kMaxNormWidth, "x",
               "has more than " + std::to_string(kMaxNormWidth) + " columns");
  call.require(tokens_per_block > 0, "tokens_per_block", "is not positive");
  return {x.size(0), x.size(1), x.size(2), tokens_per_block, static_cast<float>(eps)};
}

Rows modulation_rows(const std::optional<Tensor>& tensor, const NormSizes& sizes) {
  return tensor ? tensor->shaped({sizes.samples, sizes.width}).rows() : Rows{};
}

Modulation modulation(Call& call, py::handle weight, py::handle scale, py::handle shift,
                      const NormSizes& sizes) {
  Tensor weights(call, "weight", weight), scales(call, "scale", scale);
  return {weights.shaped({sizes.width}).floats(), modulation_rows(scales, sizes),
          modulation_rows(optional(call, "shift", shift), sizes)};
}

void adaln_rms_norm_fwd(py::handle x, py::handle weight, py::handle shift, py::handle scale,
                        py::handle y, double eps, std::int64_t tokens_per_block) {
  Call call("adaln_rms_norm_fwd");
  Tensor input(call, "x", x), result(call, "y", y);
  NormSizes sizes = norm_sizes(call, input, tokens_per_block, eps);
  result.shaped({sizes.samples, sizes.tokens, sizes.width});
  launch_adaln_rms_norm_fwd(input.floats(), modulation(call, weight, scale, shift, sizes),
                            result.floats(), sizes, call.stream());
}

void adaln_rms_norm_bwd(py::handle x, py::handle weight, py::handle scale, py::handle d_y,
                        py::handle d_x, py::handle partials, py::handle d_weight,
                        py::handle d_scale, py::handle d_shift, double eps,
                        std::int64_t tokens_per_block) {
  Call call("adaln_rms_norm_bwd");
  Tensor input(call, "x", x), upstream(call, "d_y", d_y);
  NormSizes sizes = norm_sizes(call, input, tokens_per_block, eps);
  Shape x_shape = {sizes.samples, sizes.tokens, sizes.width},
        sample_shape = {sizes.samples, sizes.width};
  Floats d_input = floats_or_none(call, "d_x", d_x, x_shape);
  call.require(d_input.data == nullptr || d_input.dtype == input.dtype(), "d_x",
               "has another dtype than x");
  launch_adaln_rms_norm_bwd(
      input.floats(), modulation(call, weight, scale, py::none(), sizes),
      upstream.shaped(x_shape).floats(), d_input,
      partial_sums(call, partials, {sizes.samples, sizes.chunks(), 2, sizes.width}),
      floats_or_none(call, "d_weight", d_weight, {sizes.width}),
      floats_or_none(call, "d_scale", d_scale, sample_shape),
      floats_or_none(call, "d_shift", d_shift, sample_shape), sizes, call.stream());
}

Residual residual(Call& call, py::handle gate, py::handle branch_bias, const NormSizes& sizes) {
  return {modulation_rows(Tensor(call, "gate", gate), sizes),
          floats_or_none(call, "branch_bias", branch_bias, {sizes.width})};
}

// An array [samples, tokens, width] of that dtype, or null where None is given.
void* tokens_or_none(Call& call, const char* name, py::handle object, const NormSizes& sizes,
                     DType dtype) {
  auto tensor = optional(call, name, object);
  return tensor ? tensor->shaped({sizes.samples, sizes.tokens, sizes.width}).typed(dtype).data()
                : nullptr;
}

void* tokens(Call& call, const char* name, py::handle object, const NormSizes& sizes, DType dtype) {
  call.require(!object.is_none(), name, "is not a tensor");
  return tokens_or_none(call, name, object, sizes, dtype);
}

// The branch, whose dtype is that of the stream unless the stream is float32.
Floats branch_floats(Call& call, const Tensor& branch, const NormSizes& sizes, DType stream) {
  Floats floats = branch.shaped({sizes.samples, sizes.tokens, sizes.width}).floats();
  call.require(stream == DType::float32 || stream == floats.dtype, "branch",
               "has another dtype than a stream that is not float32");
  return floats;
}

void gated_residual_adaln_rms_norm_fwd(py::handle x, py::handle branch, py::handle gate,
                                       py::handle weight, py::handle shift, py::handle scale,
                                       py::handle branch_bias, py::handle x_new, py::handle y,
                                       double eps, std::int64_t tokens_per_block) {
  Call call("gated_residual_adaln_rms_norm_fwd");
  Tensor input(call, "x", x);
  NormSizes sizes = norm_sizes(call, input, tokens_per_block, eps);
  Floats stream = input.floats(),
         added = branch_floats(call, Tensor(call, "branch", branch), sizes, stream.dtype);
  launch_gated_residual_adaln_rms_norm_fwd(stream, added, residual(call, gate, branch_bias, sizes),
                                           modulation(call, weight, scale, shift, sizes),
                                           tokens(call, "x_new", x_new, sizes, stream.dtype),
                                           tokens(call, "y", y, sizes, added.dtype), sizes,
                                           call.stream());
}

void gated_residual_adaln_rms_norm_bwd(py::handle x_new, py::handle branch, py::handle gate,
                                       py::handle weight, py::handle scale, py::handle branch_bias,
                                       py::handle d_x_new, py::handle d_y, py::handle d_x,
                                       py::handle d_branch, py::handle partials, py::handle d_gate,
                                       py::handle d_weight, py::handle d_shift, py::handle d_scale,
                                       py::handle d_bias, double eps,
                                       std::int64_t tokens_per_block) {
  Call call("gated_residual_adaln_rms_norm_bwd");
  Tensor input(call, "x_new", x_new);
  NormSizes sizes = norm_sizes(call, input, tokens_per_block, eps);
  Floats stream = input.floats(),
         added = branch_floats(call, Tensor(call, "branch", branch), sizes, stream.dtype);
  Residual residual_params = residual(call, gate, branch_bias, sizes);
  Shape sample_shape = {sizes.samples, sizes.width}, column_shape = {sizes.width};
  ModulationGradients gradients{floats_or_none(call, "d_weight", d_weight, column_shape),
                                floats_or_none(call, "d_scale", d_scale, sample_shape),
                                floats_or_none(call, "d_shift", d_shift, sample_shape),
                                floats_or_none(call, "d_gate", d_gate, sample_shape),
                                floats_or_none(call, "d_bias", d_bias, column_shape)};
  std::int64_t num_sums = residual_params.bias.data == nullptr ? 3 : 4;
  launch_gated_residual_adaln_rms_norm_bwd(
      stream, added, residual_params, modulation(call, weight, scale, py::none(), sizes),
      tokens_or_none(call, "d_x_new", d_x_new, sizes, stream.dtype),
      tokens_or_none(call, "d_y", d_y, sizes, added.dtype),
      tokens(call, "d_x", d_x, sizes, stream.dtype),
      tokens(call, "d_branch", d_branch, sizes, added.dtype),
      partial_sums(call, partials, {sizes.samples, sizes.chunks(), num_sums, sizes.width}),
      gradients, sizes, call.stream());
}

AttentionSizes attention_sizes(Call& call, const Tensor& qkv, int queries, int keys, int warps) {
  qkv.ranked(5);
  call.require(qkv.size(2) == 3, "qkv", "is not [samples, tokens, 3, heads, width]");
  call.require(qkv.size(4) <= kMaxHeadWidth, "qkv",
               "has heads wider than " + std::to_string(kMaxHeadWidth));
  call.require(qkv.size(1) * 3 * qkv.size(3) * qkv.size(4) < std::int64_t(1) << 31, "qkv",
               "has samples of 2^31 elements or more");
  call.require(queries > 0 && keys > 0 && warps > 0, "queries, keys or warps", "is not positive");
  return {qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4), queries, keys, warps};
}

QkvPrologue qkv_prologue(Call& call, py::handle bias, py::handle table, py::handle q_weight,
                         py::handle k_weight, double eps, const AttentionSizes& sizes) {
  Floats angles = floats_or_none(call, "table", table, {sizes.tokens, sizes.width / 2, 2});
  call.require(angles.dtype == DType::float32, "table", "is not float32");
  call.require(angles.data == nullptr || sizes.width % 2 == 0, "table",
               "is given for heads of an odd width");
  call.require(q_weight.is_none() == k_weight.is_none(), "k_weight",
               "is given or missing without q_weight");
  return {static_cast<const float*>(angles.data),
          floats_or_none(call, "q_weight", q_weight, {sizes.width}),
          floats_or_none(call, "k_weight", k_weight, {sizes.width}),
          floats_or_none(call, "bias", bias, {3 * sizes.heads * sizes.width}),
          static_cast<float>(eps)};
}

void rope_attention_fwd(py::handle qkv, py::handle bias, py::handle table, py::handle q_weight,
                        py::handle k_weight, py::handle out, py::handle lse, double eps,
                        int queries, int keys, int warps) {
  Call call("rope_attention_fwd");
  Tensor packed(call, "qkv", qkv), result(call, "out", out), sums(call, "lse", lse);
  AttentionSizes sizes = attention_sizes(call, packed, queries, keys, warps);
  Floats input = packed.floats();
  launch_rope_attention_fwd(
      input, qkv_prologue(call, bias, table, q_weight, k_weight, eps, sizes),
      result.shaped({sizes.samples, sizes.tokens, sizes.heads * sizes.width})
          .typed(input.dtype)
          .data(),
      sums.shaped({sizes.samples, sizes.heads, sizes.tokens}).as<float>(DType::float32), sizes,
      call.stream());
}

void rope_attention_bwd(py::handle d_out, py::handle qkv, py::handle bias, py::handle table,
                        py::handle q_weight, py::handle k_weight, py::handle out, py::handle lse,
                        py::handle d_qkv, py::handle scratch, py::handle dw_partial,
                        py::handle db_partial, py::handle d_q_weight, py::handle d_k_weight,
                        py::handle d_bias, double eps, int queries, int keys, int warps) {
  Call call("rope_attention_bwd");
  Tensor upstream(call, "d_out", d_out), packed(call, "qkv", qkv), result(call, "out", out),
      sums(call, "lse", lse), gradient(call, "d_qkv", d_qkv);
  AttentionSizes sizes = attention_sizes(call, packed, queries, keys, warps);
  Floats input = packed.floats();
  Shape flat = {sizes.samples, sizes.tokens, sizes.heads * sizes.width},
        weight_shape = {sizes.width};
  Floats scratch_floats = floats_or_none(call, "scratch", scratch,
                                         {sizes.samples, sizes.heads, sizes.tokens, sizes.width});
  call.require(scratch_floats.dtype == DType::float32, "scratch", "is not float32");
  launch_rope_attention_bwd(
      upstream.shaped(flat).typed(input.dtype).data(), input,
      result.shaped(flat).typed(input.dtype).data(),
      sums.shaped({sizes.samples, sizes.heads, sizes.tokens}).as<float>(DType::float32),
      qkv_prologue(call, bias, table, q_weight, k_weight, eps, sizes),
      gradient.shaped({sizes.samples, sizes.tokens, 3, sizes.heads, sizes.width})
          .typed(input.dtype)
          .data(),
      static_cast<float*>(scratch_floats.data),
      {partial_sums(call, dw_partial, {2, sizes.samples * sizes.heads, sizes.width}, "dw_partial"),
       partial_sums(call, db_partial, {sizes.samples, 3, sizes.heads, sizes.width}, "db_partial")},
      {floats_or_none(call, "d_q_weight", d_q_weight, weight_shape),
       floats_or_none(call, "d_k_weight", d_k_weight, weight_shape),
       floats_or_none(call, "d_bias", d_bias, {3 * sizes.heads * sizes.width})},
      sizes, call.stream());
}

void adamw_ema_(py::handle param, py::handle grad, py::handle exp_avg, py::handle exp_avg_sq,
                py::handle ema, py::handle bf16_param, py::handle step, py::handle lr,
                py::handle grad_scale, py::handle skip, double beta1, double beta2, double eps,
                double weight_decay, double ema_decay, std::int64_t elements_per_block) {
  Call call("adamw_ema_");
  Tensor param_tensor(call, "param", param), gradient(call, "grad", grad);
  std::int64_t numbers = param_tensor.elements();
  call.require(numbers > 0, "param", "is empty");
  call.require(elements_per_block > 0, "elements_per_block", "is not positive");
  auto state = [&](const char* name, py::handle object) {
    return Tensor(call, name, object).counted(numbers).as<float>(DType::float32);
  };
  auto scalar = [&](const char* name, py::handle object) {
    return Tensor(call, name, object).scalar();
  };
  Floats grad_floats = gradient.counted(numbers).floats();
  call.require(grad_floats.dtype != DType::float16, "grad",
               "is float16; allowed: float32, bfloat16");
  auto copy = optional(call, "bf16_param", bf16_param);
  AdamWArrays arrays{state("param", param),
                     state("exp_avg", exp_avg),
                     state("exp_avg_sq", exp_avg_sq),
                     state("ema", ema),
                     grad_floats,
                     copy ? copy->counted(numbers).typed(DType::bfloat16).data() : nullptr};
  AdamWScalars scalars{scalar("step", step), scalar("lr", lr), scalar("grad_scale", grad_scale),
                       scalar("skip", skip)};
  launch_adamw_ema(arrays, scalars, {beta1, beta2, eps, weight_decay, ema_decay}, numbers,
                   elements_per_block, call.stream());
}

VfSizes vf_sizes(Call& call, const Tensor& z, double distmat_margin, double cos_margin) {
  z.ranked(3);
  return {z.size(0), z.size(1), z.size(2), static_cast<float>(distmat_margin),
          static_cast<float>(cos_margin)};
}

void vf_loss_fwd(py::handle z, py::handle f, py::handle kept, py::handle cos_sums,
                 py::handle tile_sums, py::handle distmat, py::handle cos, double distmat_margin,
                 double cos_margin) {
  Call call("vf_loss_fwd");
  Tensor first(call, "z", z), second(call, "f", f);
  VfSizes sizes = vf_sizes(call, first, distmat_margin, cos_margin);
  Floats input = first.floats();
  auto numbers = [&](const char* name, py::handle object, const Shape& shape) {
    return Tensor(call, name, object).shaped(shape).as<float>(DType::float32);
  };
  launch_vf_loss_fwd(
      input,
      second.shaped({sizes.samples, sizes.channels, sizes.positions}).typed(input.dtype).data(),
      numbers("kept", kept, {3, sizes.samples, sizes.positions}),
      numbers("cos_sums", cos_sums, {sizes.most_cos_parts()}),
      numbers("tile_sums", tile_sums, {sizes.tile_parts()}), numbers("distmat", distmat, {}),
      numbers("cos", cos, {}), sizes, call.stream());
}

void vf_loss_bwd(py::handle z, py::handle f, py::handle z_norms, py::handle f_norms,
                 py::handle inner, py::handle d_distmat, py::handle d_cos, py::handle partial,
                 py::handle d_z, double distmat_margin, double cos_margin) {
  Call call("vf_loss_bwd");
  Tensor first(call, "z", z), second(call, "f", f), result(call, "d_z", d_z);
  VfSizes sizes = vf_sizes(call, first, distmat_margin, cos_margin);
  Floats input = first.floats();
  Shape z_shape = {sizes.samples, sizes.channels, sizes.positions};
  auto numbers = [&](const char* name, py::handle object, const Shape& shape) {
    return Tensor(call, name, object).shaped(shape).as<float>(DType::float32);
  };
  Shape norms_shape = {sizes.samples, sizes.positions};
  Floats sums = floats_or_none(call, "partial", partial, z_shape);
  call.require(sums.dtype == DType::float32, "partial", "is not float32");
  call.require(sums.data != nullptr || sizes.positions <= kVfPanel, "partial",
               "is needed for so many positions");
  launch_vf_loss_bwd(input, second.shaped(z_shape).typed(input.dtype).data(),
                     numbers("z_norms", z_norms, norms_shape),
                     numbers("f_norms", f_norms, norms_shape), numbers("inner", inner, norms_shape),
                     numbers("d_distmat", d_distmat, {}), numbers("d_cos", d_cos, {}),
                     static_cast<float*>(sums.data),
                     result.shaped(z_shape).typed(input.dtype).data(), sizes, call.stream());
}

}  // namespace

PYBIND11_MODULE(LDIT_MODULE, m) {
  m.doc() = "Launchers of the CUDA kernels; see ops.h.";
  m.def("swiglu_fwd", &swiglu_fwd);
  m.def("swiglu_bwd", &swiglu_bwd);
  m.def("adaln_rms_norm_fwd", &adaln_rms_norm_fwd);
  m.def("adaln_rms_norm_bwd", &adaln_rms_norm_bwd);
  m.def("gated_residual_adaln_rms_norm_fwd", &gated_residual_adaln_rms_norm_fwd);
  m.def("gated_residual_adaln_rms_norm_bwd", &gated_residual_adaln_rms_norm_bwd);
  m.def("adamw_ema_", &adamw_ema_);
  m.def("vf_loss_fwd", &vf_loss_fwd);
  m.def("vf_loss_bwd", &vf_loss_bwd);
  m.def("rope_attention_fwd", &rope_attention_fwd);
  m.def("rope_attention_bwd", &rope_attention_bwd);
#ifdef LDIT_EMULATED
  m.def(
      "set_order",
      [](const std::string& order, std::uint64_t seed) {
        if (order == "ascending") emulation::set_order(emulation::Order::ascending, seed);
        else if (order == "descending") emulation::set_order(emulation::Order::descending, seed);
        else if (order == "shuffled") emulation::set_order(emulation::Order::shuffled, seed);
        else
          throw py::value_error("order is " + order + "; allowed: ascending, descending, shuffled");
      },
      py::arg("order"), py::arg("seed") = 0);
#endif
}

}  // namespace ldit
