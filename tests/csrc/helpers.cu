// Test kernels of one warp or block, one for each helper of csrc/common, with a C interface for
// ctypes. For the emulation and for a device.
#include "common/async_copy.h"
#include "common/fragments.h"
#include "common/mma.h"
#include "common/reduce.h"
#include "common/vector.h"
#include "interface.h"

using namespace ldit;

namespace {

// d [16, 8] = a [16, k] · b [k, 8], fragments put together by hand from the layout that mma.h
// documents.
template <class T, int k>
__global__ void product(const T* a, const T* b, float* d) {
  int group = lane_index() / 4, member = lane_index() % 4;
  std::uint32_t a_frag[k / 4], b_frag[k / 8];
  for (int half = 0; half < k / 8; ++half) {
    int first = 2 * member + 8 * half;
    for (int below = 0; below < 2; ++below) {
      const T* at = a + (group + 8 * below) * k + first;
      a_frag[2 * half + below] = pack<T>(to_float(at[0]), to_float(at[1]));
    }
    b_frag[half] = pack<T>(to_float(b[first * 8 + group]), to_float(b[(first + 1) * 8 + group]));
  }
  float sums[4] = {};
  if constexpr (k == 16) mma_m16n8k16<T>(sums, a_frag, b_frag);
  else mma_m16n8k8<T>(sums, a_frag, b_frag);
  for (int i = 0; i < 4; ++i) d[(group + 8 * (i / 2)) * 8 + 2 * member + i % 2] = sums[i];
}

// The same of float32, with k = 8: as kernels have it, and by shuffles, which is what a device
// does.
__global__ void multiply_float32(const float* a, const float* b, float* d, float* by_shuffles) {
  int group = lane_index() / 4, member = lane_index() % 4, first = 2 * member;
  float2 above{a[group * 8 + first], a[group * 8 + first + 1]};
  float2 below{a[(group + 8) * 8 + first], a[(group + 8) * 8 + first + 1]};
  float2 b_frag{b[first * 8 + group], b[(first + 1) * 8 + group]};
  float sums[4] = {}, sums_by_shuffles[4] = {};
  detail::mma_fp32(sums, above, below, b_frag);
  detail::mma_fp32_by_shuffles(sums_by_shuffles, above, below, b_frag);
  for (int i = 0; i < 4; ++i) {
    int at = (group + 8 * (i / 2)) * 8 + 2 * member + i % 2;
    d[at] = sums[i], by_shuffles[at] = sums_by_shuffles[i];
  }
}

// The same product of 16 and 16, fragments by ldmatrix: A as it is, B [k, 8] row-major, transposed
// on the way.
template <class T>
__global__ void multiply_from_shared(const T* a, const T* b, float* d) {
  LDIT_SHARED(T, a_shared, 256);
  LDIT_SHARED(T, b_shared, 128);
  int lane = lane_index();
  copy16(a_shared.span(8 * lane, 8), a + 8 * lane);
  if (lane < 16) copy16(b_shared.span(8 * lane, 8), b + 8 * lane);
  commit_copies();
  wait_copies<0>();
  __syncwarp();
  std::uint32_t fragment_a[4], fragment_b[2];
  int tile = lane / 8, row = lane % 8;
  ldmatrix(fragment_a, a_shared.span((row + 8 * (tile % 2)) * 16 + 8 * (tile / 2), 8));
  ldmatrix<true>(fragment_b, b_shared.span((row + 8 * (tile % 2)) * 8, 8));
  float sums[4] = {};
  mma_m16n8k16<T>(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = sums[i];
}

// words [count, 32]: what ldmatrix gives each lane of `count` tiles [count, 8, 8].
template <bool transposed, int count>
__global__ void tiles(const bf16* in, std::uint32_t* words) {
  LDIT_SHARED(bf16, memory, 256);
  int lane = lane_index();
  if (lane < 8 * count) store(memory.span(8 * lane, 8), load<8>(in + 8 * lane));
  __syncwarp();
  std::uint32_t r[count];
  ldmatrix<transposed>(r, memory.span(8 * (lane % (8 * count)), 8));
  for (int i = 0; i < count; ++i) words[i * 32 + lane] = r[i];
}

// Three stages of 32 floats through two buffers, the last with only `valid` bytes in each copy.
__global__ void staged(const float* in, float* out, int valid) {
  LDIT_SHARED(float, memory, 256);
  int lane = lane_index();
  auto begin = [&](int stage) {
    copy16(memory.span(stage % 2 * 128 + 4 * lane, 4), in + stage * 128 + 4 * lane,
           stage == 2 ? valid : 16);
    commit_copies();
  };
  begin(0);
  begin(1);
  for (int stage = 0; stage < 3; ++stage) {
    if (stage < 2) wait_copies<1>();
    else wait_copies<0>();
    __syncwarp();
    for (int i = 0; i < 4; ++i)
      out[stage * 128 + 32 * i + lane] = memory[stage % 2 * 128 + 32 * i + lane];
    __syncwarp();
    if (stage == 0) begin(2);
  }
}

// out [4, threads]: sum and maximum over groups of 8 lanes, the sum over the block, and that summed
// over the block.
__global__ void reductions(const float* in, float* out) {
  using Sums = BlockSums<2>;
  LDIT_SHARED(float, memory, Sums::size);
  const Sums sums(memory);
  float mine = in[threadIdx.x], both[2] = {mine, mine};
  out[threadIdx.x] = warp_sum(mine, 8);
  out[blockDim.x + threadIdx.x] = warp_max(mine, 8);
  sums(both, 0);
  out[2 * blockDim.x + threadIdx.x] = both[0];
  sums(both, 1);
  out[3 * blockDim.x + threadIdx.x] = both[1];
}

template <class T>
__global__ void round_to_16_bits(const float* in, T* out, std::int64_t count) {
  std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) out[i] = from_float<T>(in[i]);
}

template <class T>
__global__ void to_float32(const T* in, float* out, std::int64_t count) {
  std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) out[i] = to_float(in[i]);
}

// Copies `count` elements by vectors of 8 with a tail, from and to any address.
template <class T>
__global__ void copy(const T* in, T* out, std::int64_t count, bool aligned) {
  std::int64_t first = 8 * std::int64_t(threadIdx.x), valid = count - first;
  if (valid <= 0) return;
  if (aligned && valid >= 8) store(out + first, load<8>(in + first));
  else store_tail(out + first, load_tail<8>(in + first, valid), valid);
}

template <class Use>
void with_16_bit_type(bool bfloat, Use&& use) {
  if (bfloat) use(TypeTag<bf16>{});
  else use(TypeTag<fp16>{});
}

unsigned many(std::int64_t count) { return static_cast<unsigned>((count + 255) / 256); }

}  // namespace

EXPORT const char* run_multiply(bool bfloat, int k, const void* a, const void* b, float* d) {
  return caught([&] {
    with_16_bit_type(bfloat, [&](auto tag) {
      using T = typename decltype(tag)::type;
      LaunchConfig config{"product", dim3(1), 32, nullptr};
      auto *a_matrix = static_cast<const T*>(a), *b_matrix = static_cast<const T*>(b);
      if (k == 16) launch(config, product<T, 16>, a_matrix, b_matrix, d);
      else launch(config, product<T, 8>, a_matrix, b_matrix, d);
    });
  });
}

EXPORT const char* run_multiply_float32(const float* a, const float* b, float* d,
                                        float* by_shuffles) {
  return caught([&] {
    launch({"multiply_float32", dim3(1), 32, nullptr}, multiply_float32, a, b, d, by_shuffles);
  });
}

EXPORT const char* run_multiply_from_shared(bool bfloat, const void* a, const void* b, float* d) {
  return caught([&] {
    with_16_bit_type(bfloat, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch({"multiply_from_shared", dim3(1), 32, nullptr}, multiply_from_shared<T>,
             static_cast<const T*>(a), static_cast<const T*>(b), d);
    });
  });
}

EXPORT const char* run_tiles(bool transposed, int count, const void* in, std::uint32_t* words) {
  return caught([&] {
    LaunchConfig config{"tiles", dim3(1), 32, nullptr};
    auto* from = static_cast<const bf16*>(in);
    auto call = [&](auto count) {
      constexpr int n = decltype(count)::value;
      if (transposed) launch(config, tiles<true, n>, from, words);
      else launch(config, tiles<false, n>, from, words);
    };
    if (count == 1) call(std::integral_constant<int, 1>{});
    else if (count == 2) call(std::integral_constant<int, 2>{});
    else call(std::integral_constant<int, 4>{});
  });
}

EXPORT const char* run_staged(const float* in, float* out, int valid) {
  return caught([&] { launch({"staged", dim3(1), 32, nullptr}, staged, in, out, valid); });
}

EXPORT const char* run_reductions(int threads, const float* in, float* out) {
  return caught(
      [&] { launch({"reductions", dim3(1), unsigned(threads), nullptr}, reductions, in, out); });
}

EXPORT const char* run_round_to_16_bits(bool bfloat, const float* in, void* out,
                                        std::int64_t count) {
  return caught([&] {
    with_16_bit_type(bfloat, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch({"round_to_16_bits", dim3(many(count)), 256, nullptr}, round_to_16_bits<T>, in,
             static_cast<T*>(out), count);
    });
  });
}

EXPORT const char* run_to_float32(bool bfloat, const void* in, float* out, std::int64_t count) {
  return caught([&] {
    with_16_bit_type(bfloat, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch({"to_float32", dim3(many(count)), 256, nullptr}, to_float32<T>,
             static_cast<const T*>(in), out, count);
    });
  });
}

EXPORT const char* run_copy(int dtype, const void* in, void* out, std::int64_t count,
                            bool aligned) {
  return caught([&] {
    dispatch(static_cast<DType>(dtype), [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch({"copy", dim3(1), 32, nullptr}, copy<T>, static_cast<const T*>(in),
             static_cast<T*>(out), count, aligned);
    });
  });
}
