// The launchers of all kernels, the whole C++ interface of this folder: raw pointers, sizes and a
// stream; no CUDA header and no torch.
//
// A launcher trusts what binding.cpp has checked: pointers are those of contiguous arrays unless a
// stride is given, in elements, and are of the dtype named. `void*` with a dtype is an array of
// floats of that kind, null where the text allows none. All throw ldit::LaunchError.
#pragma once

#include <cstdint>
#include <stdexcept>

struct CUstream_st;

namespace ldit {

using Stream = CUstream_st*;

enum class DType { float32, float16, bfloat16 };

struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An array of floats of any of the three kinds; null if `data` is.
struct Floats {
  void* data = nullptr;
  DType dtype = DType::float32;
};

// [rows, width] of unit column stride; `stride` elements from row to row.
struct Rows {
  Floats array;
  std::int64_t stride = 0;
};

// Makes this device the current one; returns which one was, or −1 if it is the same.
int set_device(int device);

// --- swiglu: out [rows, width] = silu(a)·b of gate_up [rows, 2·width] + bias [2·width], which may
// be null.

struct SwigluSizes {
  std::int64_t rows, width;
  std::int64_t rows_per_block;
  constexpr std::int64_t parts() const { return (rows + rows_per_block - 1) / rows_per_block; }
};

void launch_swiglu_fwd(Floats gate_up, Floats bias, void* out, const SwigluSizes& sizes,
                       Stream stream);

// `partials` float32 [parts, 2·width], or null where the gradient of the bias is not asked for.
void launch_swiglu_bwd(Floats gate_up, Floats bias, const void* d_out, void* d_gate_up,
                       float* partials, Floats d_bias, const SwigluSizes& sizes, Stream stream);

// --- adaln_rms_norm: y = x / rms(x) · weight · (1 + scale) + shift; x and y [samples, tokens,
// width].

struct NormSizes {
  std::int64_t samples, tokens, width;
  std::int64_t tokens_per_block;
  float eps;
  constexpr std::int64_t chunks() const {
    return (tokens + tokens_per_block - 1) / tokens_per_block;
  }
};

// The modulation of the norm: weight [width]; scale and, unless null, shift [samples, width].
struct Modulation {
  Floats weight;
  Rows scale, shift;
};

constexpr std::int64_t kMaxNormWidth = 4096;

void launch_adaln_rms_norm_fwd(Floats x, const Modulation& modulation, Floats y,
                               const NormSizes& sizes, Stream stream);

// `partials` float32 [samples, chunks, 2, width], or null when only d_x is asked for; then the last
// three are not written. d_weight [width], d_scale and d_shift [samples, width] are contiguous;
// each may be null.
void launch_adaln_rms_norm_bwd(Floats x, const Modulation& modulation, Floats d_y, Floats d_x,
                               float* partials, Floats d_weight, Floats d_scale, Floats d_shift,
                               const NormSizes& sizes, Stream stream);

// --- gated_residual_adaln_rms_norm: x' = x + gate·(branch + bias), then the norm of x'. All
// [samples, tokens, width] but these: x, x' and their gradients have one dtype, that of branch or
// float32; branch, y and their gradients another.

// The parameters of x + gate·(branch + bias): gate [samples, width]; bias [width], which may be
// null.
struct Residual {
  Rows gate;
  Floats bias;
};

// Contiguous; gate only where there is a branch, bias only where there is one; each may be null.
struct ModulationGradients {
  Floats weight, scale, shift, gate, bias;
};

void launch_gated_residual_adaln_rms_norm_fwd(Floats x, Floats branch, const Residual& residual,
                                              const Modulation& modulation, void* x_new, void* y,
                                              const NormSizes& sizes, Stream stream);

// `d_x_new` or `d_y` is null where that result has no gradient. `partials` float32 [samples,
// chunks, 3, width], 4 with a bias, or null when only d_x and d_branch are asked for; then
// `gradients` are not written.
void launch_gated_residual_adaln_rms_norm_bwd(Floats x_new, Floats branch, const Residual& residual,
                                              const Modulation& modulation, const void* d_x_new,
                                              const void* d_y, void* d_x, void* d_branch,
                                              float* partials, const ModulationGradients& gradients,
                                              const NormSizes& sizes, Stream stream);

// --- rope_attention: softmax(q·kᵀ / √width)·v within each head of qkv [samples, tokens, 3, heads,
// width], to which a bias is added if there is one; queries and keys normed if there are weights
// [width], then rotated if there is a table, float32 [tokens, width / 2, 2]: cos and sin.

struct AttentionSizes {
  std::int64_t samples, tokens, heads, width;
  int queries, keys;  // rows of a head that stay in shared memory at a time
  int warps;
};

constexpr std::int64_t kMaxHeadWidth = 128;

// Applied to qkv as it is loaded: + bias, then for queries and keys the RMS norm and RoPE.
struct QkvPrologue {
  const float* table = nullptr;
  Floats q_weight, k_weight;  // both or neither
  Floats bias;                // [3, heads, width], or null
  float eps = 0;              // of the norms
};

// Partial sums of a block for the gradients of the vectors, float32, or null where they are not
// asked for.
struct VectorPartials {
  float* dw_partial = nullptr;  // [2, samples·heads, width]
  float* db_partial = nullptr;  // [samples, 3, heads, width]
};

struct VectorGradients {
  Floats d_q_weight, d_k_weight, d_bias;
};

// out [samples, tokens, heads·width] of the dtype of qkv; lse float32 [samples, heads, tokens],
// log2 Σ exp of the scores.
void launch_rope_attention_fwd(Floats qkv, const QkvPrologue& prologue, void* out, float* lse,
                               const AttentionSizes& sizes, Stream stream);

// `scratch` float32 [samples, heads, tokens, width], or null where `keys` holds all tokens and
// heads are at most 72 wide.
void launch_rope_attention_bwd(const void* d_out, Floats qkv, const void* out, const float* lse,
                               const QkvPrologue& prologue, void* d_qkv, float* scratch,
                               const VectorPartials& partials, const VectorGradients& gradients,
                               const AttentionSizes& sizes, Stream stream);

// --- adamw_ema_: one step of AdamW, of the weights' moving average and their copy, in place.

enum class ScalarType { float64, float32, float16, bfloat16, int64, int32, int16, int8, uint8 };

// One number, on the device.
struct Scalar {
  const void* data;
  ScalarType type;
};

struct AdamWArrays {
  float *param, *exp_avg, *exp_avg_sq, *ema;
  Floats grad;       // float32 or bfloat16
  void* bf16_param;  // may be null
};

struct AdamWScalars {
  Scalar step, lr, grad_scale, skip;
};

struct AdamWHyperparams {
  double beta1, beta2, eps, weight_decay, ema_decay;
};

// A block updates `elements_per_block`, rounded up to what its threads take at a time.
void launch_adamw_ema(const AdamWArrays& arrays, const AdamWScalars& scalars,
                      const AdamWHyperparams& hyperparams, std::int64_t numbers,
                      std::int64_t elements_per_block, Stream stream);

// --- vf_loss: both terms for vectors z and f, [samples, channels, positions], of one dtype.

constexpr std::int64_t kVfTile = 64;    // positions along a side of a tile of the first term
constexpr std::int64_t kVfPanel = 256;  // positions up to which the gradient needs no partial sums

struct VfSizes {
  std::int64_t samples, channels, positions;
  float distmat_margin, cos_margin;
  constexpr std::int64_t tiles() const { return (positions + kVfTile - 1) / kVfTile; }
  constexpr std::int64_t tile_parts() const { return samples * (tiles() * (tiles() + 1) / 2); }
  constexpr std::int64_t most_cos_parts() const { return samples * ((positions + 7) / 8); }
  constexpr float pairs() const { return static_cast<float>(samples * positions * positions); }
  constexpr float vectors() const { return static_cast<float>(samples * positions); }
};

// `kept` [3, samples, positions]: norms of z, norms of f, products z·f. Scratch: `cos_sums`
// [most_cos_parts], `tile_sums` [tile_parts]. The results `distmat` and `cos` are one number each.
// All float32.
void launch_vf_loss_fwd(Floats z, const void* f, float* kept, float* cos_sums, float* tile_sums,
                        float* distmat, float* cos, const VfSizes& sizes, Stream stream);

// The gradient of z, with three parts of `kept`; that of f with z and f, and so the norms,
// exchanged. `partial` float32, of the shape of z, or null up to `kVfPanel` positions.
void launch_vf_loss_bwd(Floats z, const void* f, const float* z_norms, const float* f_norms,
                        const float* inner, const float* d_distmat, const float* d_cos,
                        float* partial, void* d_z, const VfSizes& sizes, Stream stream);

}  // namespace ldit
