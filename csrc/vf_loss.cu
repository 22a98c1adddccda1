// vf_loss: how much the cosines within two sets of vectors z and f differ, and how far apart z_i
// and f_i point. With ẑ = z / |z| and c_ij = ẑ_i·ẑ_j − f̂_i·f̂_j, means over samples as well:
//
//   distmat = mean_ij relu(|c_ij| − distmat_margin),    cos = mean_i relu(1 − cos_margin − ẑ_i·f̂_i)
//
// Letters: i and j are positions; c is a channel; z and f are T [samples, channels, positions], so
// vectors are columns of a sample, as convolutions leave them; zz and ff are products z_i·z_j and
// f_i·f_j; m, n, half and e index the float [2][4][4] of them that a lane holds: zz[m][n][2·half +
// e] is of row B::row() + 16·m + 8·half and column B::column() + 8·n + e of the block's tile.
//
// Forward, three kernels: vf_loss_positions makes the norms, the products z_i·f_i and sums of the
// second term; vf_loss_tiles the sums of the first, over tiles of 64 × 64 pairs on and above the
// diagonal, for both matrices are symmetric; vf_loss_means adds the sums up. A tile of either
// matrix lives in registers only, as products of the inputs as they are: the inverse norms are
// applied to the float32 products.
//
// Backward, one kernel: a block makes the gradient of 64 rows i, against 256 columns j (a panel) at
// a time. With G_ij = sign(c_ij)·[|c_ij| > distmat_margin], which is symmetric, the gradient of the
// first term by ẑ_i is 2·Σ_j G_ij·ẑ_j, over the number of pairs. That is a second product, of the
// weights w_ij = G_ij / |z_j| of the panel, T [64, 256] in shared memory, with the vectors z_j as
// they are. Its part along ẑ_i has no effect on |ẑ_i| = 1 and is taken out: Σ_j w_ij·(z_i·z_j),
// which the tiles give.
#include "common/async_copy.h"
#include "common/floats.h"
#include "common/fragments.h"
#include "common/launch.h"
#include "common/reduce.h"

namespace ldit {
namespace {

// Norms below these count as these, in either term.
constexpr float kFloorDistmat = 1e-12f, kFloorCos = 1e-8f;
// The largest weight of a panel as it is held: float16 then has ratios up to 2^29.
constexpr float kMaxWeight = 32768.f;

LDIT_DEVICE float inverse_norm(float norm, float floor) { return 1.f / fmaxf(norm, floor); }
LDIT_DEVICE float relu(float x) { return x <= 0.f ? 0.f : x; }  // NaN stays NaN

// --- Norms, products z·f and the second term.

constexpr int kThreadsY = 32, kThreadsX = 8;  // of a block: over channels, over positions
constexpr int kPositionsThreads = kThreadsY * kThreadsX;

template <class T, int count>
__global__ void __launch_bounds__(kPositionsThreads)
    vf_loss_positions(const T* __restrict__ z, const T* __restrict__ f, float* __restrict__ kept,
                      float* __restrict__ cos_sums, VfSizes sizes) {
  constexpr int width = kThreadsX * count;
  LDIT_SHARED(float, memory, 3 * kThreadsY * width);
  LDIT_SHARED(float, totals, BlockSums<1>::size);
  const std::int64_t positions = sizes.positions;
  unsigned parts = unsigned((positions + width - 1) / width);
  std::int64_t sample = blockIdx.x / parts, begin = std::int64_t(blockIdx.x % parts) * width;
  int ty = threadIdx.x / kThreadsX, local = threadIdx.x % kThreadsX * count;
  float zz[count] = {}, ff[count] = {}, zf[count] = {};
  if (begin + local < positions) {
    const std::int64_t offset = sample * sizes.channels * positions + begin + local;
#pragma unroll 4
    for (std::int64_t channel = ty; channel < sizes.channels; channel += kThreadsY) {
      auto a = load<count>(z + offset + channel * positions),
           b = load<count>(f + offset + channel * positions);
#pragma unroll
      for (int j = 0; j < count; ++j)
        zz[j] += a[j] * a[j], ff[j] += b[j] * b[j], zf[j] += a[j] * b[j];
    }
  }
#pragma unroll
  for (int j = 0; j < count; ++j) {
    memory[ty * width + local + j] = zz[j];
    memory[(kThreadsY + ty) * width + local + j] = ff[j];
    memory[(2 * kThreadsY + ty) * width + local + j] = zf[j];
  }
  __syncthreads();
  float term[1] = {0.f};
  std::int64_t position = begin + threadIdx.x;
  if (threadIdx.x < width && position < positions) {
    float sums[3] = {};
    for (int from = 0; from < kThreadsY; ++from)
#pragma unroll
      for (int k = 0; k < 3; ++k) sums[k] += memory[(k * kThreadsY + from) * width + threadIdx.x];
    float z_norm = sqrtf(sums[0]), f_norm = sqrtf(sums[1]);
    std::int64_t all = sizes.samples * positions, at = sample * positions + position;
    kept[at] = z_norm;
    kept[all + at] = f_norm;
    kept[2 * all + at] = sums[2];
    float cosine = sums[2] * inverse_norm(z_norm, kFloorCos) * inverse_norm(f_norm, kFloorCos);
    term[0] = relu(1.f - sizes.cos_margin - cosine);
  }
  BlockSums<1> sum(totals);
  sum(term, 0);
  if (threadIdx.x == 0) cos_sums[blockIdx.x] = term[0];
}

// --- Products of all pairs of a tile.

template <class T>
constexpr int kDepth = 64 / sizeof(T);  // channels of one step

constexpr int kChunk = 64;  // channels and positions of a step of the second product

// A block makes products of all pairs of `rows` × `columns` positions; the warps lie warps_down ×
// warps_across, and each owns 32 × 32 pairs, [2][4] fragments of D, [16, 8] each (common/mma.h).
//
// Shared memory holds two stages of T, each with the step's channels in rows, kDepth of them: of z
// [kDepth, rows] and [kDepth, columns], and the same of f.
template <class T, int warps_down, int warps_across>
struct Block {
  using Type = T;
  static constexpr int rows = 32 * warps_down, columns = 32 * warps_across,
                       threads = kWarp * warps_down * warps_across;
  using Rows = Tile<T, rows>;
  using Columns = Tile<T, columns>;
  static constexpr std::int64_t stage = 2 * (Rows::size(kDepth<T>) + Columns::size(kDepth<T>));

  // Of the lane's first pair within the block's tile.
  LDIT_DEVICE static int row() { return warp_index() / warps_across * 32 + group_index(); }
  LDIT_DEVICE static int column() { return warp_index() % warps_across * 32 + 2 * member_index(); }
};

// One sample of an input.
template <class T>
struct Sample {
  const T* start;
  std::int64_t channels, positions;
  bool aligned;  // whether 16 bytes can be read from every kVector<T>-th position of a channel on
};

// Channels [channel, channel + count) of the positions from `position` on, 0 where there are none.
template <int threads, class T, int columns>
LDIT_DEVICE void fetch(const Tile<T, columns>& to, const Sample<T>& from, std::int64_t channel,
                       std::int64_t position, int count) {
  constexpr int step = kVector<T>, across = columns / step;
  for (int unit = threadIdx.x; unit < count * across; unit += threads) {
    int row = unit / across, column = unit % across * step;
    std::int64_t remaining = min(from.positions - position - column, std::int64_t(step));
    int valid = channel + row < from.channels && remaining > 0 ? int(remaining) : 0;
    const T* source =
        valid ? from.start + (channel + row) * from.positions + position + column : from.start;
    if (from.aligned) copy16(to.at(row, column, step), source, valid * int(sizeof(T)));
    else store(to.at(row, column, step), load_tail<step>(source, valid));
  }
}

// sums += a_tileᵀ·b_tile, [32, 32] per warp, for the kDepth channels of one step, which lie in the
// rows of both tiles.
template <class B, class Rows, class Columns>
LDIT_DEVICE void add_products(const Rows& a_tile, const Columns& b_tile, float (&sums)[2][4][4]) {
  using T = typename B::Type;
  if constexpr (kIs16Bit<T>) {
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 16) {
      Word<T> a[2][4], b[4][2];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_a_transposed(a[m], a_tile, k, B::row() - group_index() + 16 * m);
      load_b_transposed<4>(b, b_tile, k, B::column() - 2 * member_index());
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) mma<T, 2>(sums[m][n], a[m], b[n]);
    }
  } else {
#pragma unroll 4
    for (int k = 0; k < kDepth<T>; ++k) {
      float a[4];
      float2 b[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) a[m] = *a_tile.at(k, B::row() + 8 * m, 1);
#pragma unroll
      for (int n = 0; n < 4; ++n) b[n] = b_tile.pair(k, B::column() + 8 * n);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          sums[m / 2][n][m % 2 * 2] += a[m] * b[n].x;
          sums[m / 2][n][m % 2 * 2 + 1] += a[m] * b[n].y;
        }
    }
  }
}

// sums += a_tile·b_tileᵀ, [32 channels, 16 rows] per warp, over the kChunk positions of one step:
// a_tile is z [kChunk channels, kChunk], b_tile the weights [rows, panel] from column `position`
// on.
template <class Vectors, class Weights>
LDIT_DEVICE void add_weighted_vectors(const Vectors& a_tile, const Weights& b_tile, int channel,
                                      int row, int position, float (&sums)[2][2][4]) {
  using T = std::remove_reference_t<decltype(*a_tile.memory.base)>;
#pragma unroll 4
  for (int k = 0; k < kChunk; k += kIs16Bit<T> ? 16 : 2) {
    if constexpr (kIs16Bit<T>) {
      Word<T> a[2][4], b[2][2];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_a<2>(a[m], a_tile, channel + 16 * m, k);
#pragma unroll
      for (int n = 0; n < 2; ++n) load_b<2>(b[n], b_tile, row + 8 * n, position + k);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n) mma<T, 2>(sums[m][n], a[m], b[n]);
    } else {
      float2 a[4], b[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) a[m] = a_tile.pair(channel + group_index() + 8 * m, k);
#pragma unroll
      for (int n = 0; n < 4; ++n)
        b[n] = b_tile.pair(row + 8 * (n / 2) + 2 * member_index() + n % 2, position + k);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float& sum = sums[m / 2][n / 2][m % 2 * 2 + n % 2];
          sum += a[m].x * b[n].x;
          sum += a[m].y * b[n].y;
        }
    }
  }
}

// A pipeline of two stages: calls `use(step)` for each step while the copies that `load(step + 1)`
// has started are under way. A step uses the shared memory of the step before the last; at the
// begin and at the end all of it is free.
template <class Load, class Use>
LDIT_DEVICE void two_stage_pipeline(int steps, Load&& load, Use&& use) {
  load(0);
  commit_copies();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    use(step);
    __syncthreads();
  }
}

// Adds z_i·z_j to zz and f_i·f_j to ff, [32, 32] per warp, for rows i from first_row on and columns
// j from first_column on; begins and ends with free shared memory.
template <class B, class T>
LDIT_DEVICE void products(const Sample<T>& z, const Sample<T>& f, std::int64_t first_row,
                          std::int64_t first_column, const Shared<T>& memory, float (&zz)[2][4][4],
                          float (&ff)[2][4][4]) {
  constexpr std::int64_t rows_size = B::Rows::size(kDepth<T>),
                         columns_size = B::Columns::size(kDepth<T>);
  auto rows = [&](int stage, int which) {
    return typename B::Rows{
        memory.part(stage * B::stage + which * (rows_size + columns_size), rows_size)};
  };
  auto columns = [&](int stage, int which) {
    return typename B::Columns{memory.part(
        stage * B::stage + which * (rows_size + columns_size) + rows_size, columns_size)};
  };
  auto load_step = [&](int step) {
    std::int64_t channel = std::int64_t(step) * kDepth<T>;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const Sample<T>& from = which == 0 ? z : f;
      fetch<B::threads>(rows(step % 2, which), from, channel, first_row, kDepth<T>);
      fetch<B::threads>(columns(step % 2, which), from, channel, first_column, kDepth<T>);
    }
  };
  two_stage_pipeline(int((z.channels + kDepth<T> - 1) / kDepth<T>), load_step, [&](int step) {
    add_products<B>(rows(step % 2, 0), columns(step % 2, 0), zz);
    add_products<B>(rows(step % 2, 1), columns(step % 2, 1), ff);
  });
}

// Norms of one sample; those of positions that do not exist are 0.
struct Norms {
  const float *z, *f;  // [positions]
  std::int64_t positions;

  LDIT_DEVICE float z_at(std::int64_t i) const { return i < positions ? z[i] : 0.f; }
  LDIT_DEVICE float f_at(std::int64_t i) const { return i < positions ? f[i] : 0.f; }
};

// Calls `use(m, half, n, e, c_ij)` for each pair of this lane.
template <class B, class Use>
LDIT_DEVICE void differences(const Norms& norms, std::int64_t first_row, std::int64_t first_column,
                             const float (&zz)[2][4][4], const float (&ff)[2][4][4], Use&& use) {
  float z_row[2][2], f_row[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::int64_t i = first_row + B::row() + 16 * m + 8 * half;
      z_row[m][half] = inverse_norm(norms.z_at(i), kFloorDistmat);
      f_row[m][half] = inverse_norm(norms.f_at(i), kFloorDistmat);
    }
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      std::int64_t j = first_column + B::column() + 8 * n + e;
      float z_column = inverse_norm(norms.z_at(j), kFloorDistmat),
            f_column = inverse_norm(norms.f_at(j), kFloorDistmat);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float z_cosine = zz[m][n][2 * half + e] * z_row[m][half] * z_column;
          float f_cosine = ff[m][n][2 * half + e] * f_row[m][half] * f_column;
          use(m, half, n, e, z_cosine - f_cosine);
        }
    }
}

// --- The first term.

template <class T>
using Square = Block<T, 2, 2>;

constexpr int kSide = Square<float>::rows;
static_assert(kSide == kVfTile);

template <class T>
__global__ void __launch_bounds__(Square<T>::threads, 4)
    vf_loss_tiles(const T* __restrict__ z, const T* __restrict__ f, const float* __restrict__ kept,
                  float* __restrict__ tile_sums, VfSizes sizes, bool aligned) {
  using B = Square<T>;
  LDIT_SHARED(T, memory, 2 * B::stage);
  LDIT_SHARED(float, totals, BlockSums<1>::size);
  const std::int64_t positions = sizes.positions;
  unsigned tiles = unsigned(sizes.tiles()), pairs = tiles * (tiles + 1) / 2,
           index = blockIdx.x % pairs, row = 0;
  while (index >= tiles - row) index -= tiles - row++;
  std::int64_t sample = blockIdx.x / pairs;
  std::int64_t first_row = std::int64_t(row) * kSide,
               first_column = first_row + std::int64_t(index) * kSide;
  std::int64_t offset = sample * sizes.channels * positions;
  float zz[2][4][4] = {}, ff[2][4][4] = {}, total[1] = {0.f};
  products<B>(Sample<T>{z + offset, sizes.channels, positions, aligned},
              Sample<T>{f + offset, sizes.channels, positions, aligned}, first_row, first_column,
              memory, zz, ff);
  Norms norms{kept + sample * positions, kept + (sizes.samples + sample) * positions, positions};
  differences<B>(norms, first_row, first_column, zz, ff, [&](int, int, int, int, float difference) {
    // Nothing for positions that do not exist.
    total[0] += relu(fabsf(difference) - sizes.distmat_margin);
  });
  BlockSums<1> sum(totals);
  sum(total, 0);
  // Twice for those beside the diagonal.
  if (threadIdx.x == 0) tile_sums[blockIdx.x] = index > 0 ? 2.f * total[0] : total[0];
}

constexpr int kMeansThreads = 256;

__global__ void __launch_bounds__(kMeansThreads)
    vf_loss_means(const float* __restrict__ tile_sums, const float* __restrict__ cos_sums,
                  float* __restrict__ distmat, float* __restrict__ cos, std::int64_t num_tiles,
                  std::int64_t num_cos, float pairs, float vectors) {
  LDIT_SHARED(float, totals, BlockSums<2>::size);
  float sums[2] = {0.f, 0.f};
  for (std::int64_t i = threadIdx.x; i < num_tiles; i += kMeansThreads) sums[0] += tile_sums[i];
  for (std::int64_t i = threadIdx.x; i < num_cos; i += kMeansThreads) sums[1] += cos_sums[i];
  BlockSums<2> sum(totals);
  sum(sums, 0);
  if (threadIdx.x == 0) {
    *distmat = sums[0] / pairs;
    *cos = sums[1] / vectors;
  }
}

// --- The gradient of z; that of f with the two exchanged.

template <class T>
struct Panel : Block<T, 2, 4> {
  using Self = Block<T, 2, 4>;
  static constexpr int width = 2 * Self::columns;  // positions whose weights are held at a time
  using Weights = Tile<T, width>;
  using Vectors = Tile<T, kChunk>;
  static_assert(width == kVfPanel);
  static_assert(2 * Vectors::size(kChunk) <= 2 * Self::stage);
  // Two stages of products or of vectors, T; weights T [rows, width]; float projections [4, rows]
  // of each column of warps; float scales [3, rows].
  static constexpr std::size_t shared =
      (2 * Self::stage + Weights::size(Self::rows)) * sizeof(T) + 7 * Self::rows * sizeof(float);
};

// Factors of the gradient of a row, for all of its channels: sum·Σ_j w_ij·z_cj + z·z_ci + f·f_ci.
struct RowScales {
  float sum, z, f;
};

LDIT_DEVICE RowScales row_scales(float z_norm, float f_norm, float product, float projection,
                                 float d_distmat, float d_cos, const VfSizes& sizes) {
  float to_unit = inverse_norm(z_norm, kFloorDistmat);
  RowScales scales;
  scales.sum = to_unit * (d_distmat * 2.f / sizes.pairs());
  float z_to_unit = inverse_norm(z_norm, kFloorCos), f_to_unit = inverse_norm(f_norm, kFloorCos);
  float cosine = product * z_to_unit * f_to_unit;
  float d_cosine =
      1.f - sizes.cos_margin - cosine > 0.f ? d_cos / sizes.vectors() * z_to_unit : 0.f;
  scales.f = -d_cosine * f_to_unit;
  scales.z = z_norm >= kFloorCos ? d_cosine * cosine * z_to_unit : 0.f;
  if (z_norm >= kFloorDistmat) scales.z -= projection * to_unit * to_unit * scales.sum;
  return scales;
}

template <class T>
__global__ void __launch_bounds__(Panel<T>::threads)
    vf_loss_gradient(const T* __restrict__ z, const T* __restrict__ f,
                     const float* __restrict__ z_norms, const float* __restrict__ f_norms,
                     const float* __restrict__ inner, const float* __restrict__ d_distmat,
                     const float* __restrict__ d_cos, float* partial, T* __restrict__ d_z,
                     VfSizes sizes, bool aligned) {
  using B = Panel<T>;
  DynamicShared dynamic;
  const Shared<T> memory = dynamic.template take<T>(2 * B::stage);
  const typename B::Weights weights{dynamic.template take<T>(B::Weights::size(B::rows))};
  const Shared<float> projections = dynamic.template take<float>(4 * B::rows);
  const Shared<float> scales = dynamic.template take<float>(3 * B::rows);
  const std::int64_t positions = sizes.positions, channels = sizes.channels;
  unsigned tiles = unsigned((positions + B::rows - 1) / B::rows);
  std::int64_t sample = blockIdx.x / tiles, first_row = std::int64_t(blockIdx.x % tiles) * B::rows;
  std::int64_t offset = sample * channels * positions;
  const Sample<T> z_sample{z + offset, channels, positions, aligned},
      f_sample{f + offset, channels, positions, aligned};
  const Norms norms{z_norms + sample * positions, f_norms + sample * positions, positions};
  // A vector of zeros has weight 0: it must not be the one that the others are scaled
  // by.
  auto weight = [&](std::int64_t j) {
    float norm = norms.z_at(j);
    return norm > 0.f ? inverse_norm(norm, kFloorDistmat) : 0.f;
  };
  float projection[2][2] = {};
  for (std::int64_t first = 0; first < positions; first += B::width) {
    const bool last = first + B::width >= positions;
    float max_weight = 0.f;
#pragma unroll
    for (int k = 0; k < B::width / kWarp; ++k)
      max_weight = fmaxf(max_weight, weight(first + k * kWarp + lane_index()));
    max_weight = warp_max(max_weight);
    const float unscale = max_weight > 0.f ? max_weight / kMaxWeight : 1.f, scale = 1.f / unscale;

    for (std::int64_t part = 0; part < B::width && first + part < positions; part += B::columns) {
      float zz[2][4][4] = {}, ff[2][4][4] = {};
      products<B>(z_sample, f_sample, first_row, first + part, memory, zz, ff);
      float w[2][2][4][2];
      differences<B>(norms, first_row, first + part, zz, ff,
                     [&](int m, int half, int n, int e, float difference) {
                       float size_ij = weight(first + part + B::column() + 8 * n + e) * scale;
                       float w_ij = fabsf(difference) > sizes.distmat_margin
                                        ? (difference > 0.f ? size_ij : -size_ij)
                                        : 0.f;
                       // As rounded for the product: its rounding is then taken out too.
                       w_ij = to_float(from_float<T>(w_ij));
                       projection[m][half] += w_ij * zz[m][n][2 * half + e] * unscale;
                       w[m][half][n][e] = w_ij;
                     });
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            weights.set_pair(B::row() + 16 * m + 8 * half, int(part) + B::column() + 8 * n,
                             word<T>(w[m][half][n][0], w[m][half][n][1]));
          }
    }

    if (last) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = warp_sum(projection[m][half], 4);
          if (member_index() == 0)
            projections[warp_index() % 4 * B::rows + B::row() + 16 * m + 8 * half] = sum;
        }
      __syncthreads();
      std::int64_t i = first_row + threadIdx.x;
      if (threadIdx.x < B::rows && i < positions) {
        float sum = 0.f;
        for (int k = 0; k < 4; ++k) sum += projections[k * B::rows + threadIdx.x];
        RowScales row = row_scales(norms.z_at(i), norms.f_at(i), inner[sample * positions + i], sum,
                                   *d_distmat, *d_cos, sizes);
        scales[threadIdx.x] = row.sum;
        scales[B::rows + threadIdx.x] = row.z;
        scales[2 * B::rows + threadIdx.x] = row.f;
      }
    }
    __syncthreads();

    // Channels × rows: Σ_j z_cj · w_ij.
    const int across = int((min(positions - first, std::int64_t(B::width)) + kChunk - 1) / kChunk);
    const int steps = int((channels + kChunk - 1) / kChunk) * across;
    auto vectors = [&](int step) {
      return typename B::Vectors{
          memory.part(step % 2 * B::Vectors::size(kChunk), B::Vectors::size(kChunk))};
    };
    auto load_step = [&](int step) {
      fetch<B::threads>(vectors(step), z_sample, std::int64_t(step / across) * kChunk,
                        first + step % across * kChunk, kChunk);
    };
    const int channel_of_warp = warp_index() / 4 * 32, row_of_warp = warp_index() % 4 * 16;
    float sums[2][2][4] = {};
    two_stage_pipeline(steps, load_step, [&](int step) {
      add_weighted_vectors(vectors(step), weights, channel_of_warp, row_of_warp,
                           step % across * kChunk, sums);
      if (step % across == across - 1) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              int in_chunk = channel_of_warp + 16 * m + 8 * (j / 2) + group_index();
              std::int64_t channel = std::int64_t(step / across) * kChunk + in_chunk;
              int row = row_of_warp + 8 * n + 2 * member_index() + j % 2;
              float sum = sums[m][n][j] * unscale;
              sums[m][n][j] = 0.f;
              if (channel >= channels || first_row + row >= positions) continue;
              std::int64_t at = offset + channel * positions + first_row + row;
              if (first > 0) sum += partial[at];
              if (!last) {
                partial[at] = sum;
                continue;
              }
              float own = to_float(z[at]) * scales[B::rows + row] +
                          to_float(f[at]) * scales[2 * B::rows + row];
              d_z[at] = from_float<T>(sum * scales[row] + own);
            }
      }
    });
  }
}

bool rows_aligned(const VfSizes& sizes, DType dtype, const void* z, const void* f) {
  return sizes.positions % (dtype == DType::float32 ? 4 : 8) == 0 && is_aligned(z) && is_aligned(f);
}

}  // namespace

void launch_vf_loss_fwd(Floats z, const void* f, float* kept, float* cos_sums, float* tile_sums,
                        float* distmat, float* cos, const VfSizes& sizes, Stream stream) {
  bool aligned = rows_aligned(sizes, z.dtype, z.data, f);
  std::int64_t cos_parts = 0;
  dispatch(z.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T *z_data = static_cast<const T*>(z.data), *f_data = static_cast<const T*>(f);
    auto positions = [&](auto kernel, int count) {
      cos_parts = sizes.samples * ((sizes.positions + kThreadsX * count - 1) / (kThreadsX * count));
      dim3 grid = blocks("vf_loss_positions", cos_parts);
      launch({"vf_loss_positions", grid, kPositionsThreads, stream}, kernel, z_data, f_data, kept,
             cos_sums, sizes);
    };
    if (aligned) positions(vf_loss_positions<T, kVector<T>>, kVector<T>);
    else positions(vf_loss_positions<T, 1>, 1);
    dim3 grid = blocks("vf_loss_tiles", sizes.tile_parts());
    launch({"vf_loss_tiles", grid, Square<T>::threads, stream}, vf_loss_tiles<T>, z_data, f_data,
           kept, tile_sums, sizes, aligned);
  });
  launch({"vf_loss_means", dim3(1), kMeansThreads, stream}, vf_loss_means, tile_sums, cos_sums,
         distmat, cos, sizes.tile_parts(), cos_parts, sizes.pairs(), sizes.vectors());
}

void launch_vf_loss_bwd(Floats z, const void* f, const float* z_norms, const float* f_norms,
                        const float* inner, const float* d_distmat, const float* d_cos,
                        float* partial, void* d_z, const VfSizes& sizes, Stream stream) {
  bool aligned = rows_aligned(sizes, z.dtype, z.data, f);
  dispatch(z.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using B = Panel<T>;
    dim3 grid =
        blocks("vf_loss_gradient", sizes.samples * ((sizes.positions + B::rows - 1) / B::rows));
    launch({"vf_loss_gradient", grid, B::threads, stream, B::shared}, vf_loss_gradient<T>,
           static_cast<const T*>(z.data), static_cast<const T*>(f), z_norms, f_norms, inner,
           d_distmat, d_cos, partial, static_cast<T*>(d_z), sizes, aligned);
  });
}

}  // namespace ldit
