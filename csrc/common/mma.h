// Matrix products by a warp (mma.sync), and the loads that bring their fragments from shared memory
// (ldmatrix). All 32 lanes of a warp call each function.
//
// A fragment is what one lane holds of a matrix: registers of 32 bits, each with two neighbours
// along k, the lower index in the low half. With group = lane / 4 (0 to 7) and member = lane % 4:
//
//   A [16, k], row-major      a[0]        row group,      k 2·member and 2·member + 1
//                             a[1]        row group + 8,  the same k
//                             a[2], a[3]  the same rows,  k + 8 (only where k = 16)
//   B [k, 8], column-major    b[0]        column group,   k 2·member and 2·member + 1
//                             b[1]        the same column, k + 8 (only where k = 16)
//   C, D [16, 8], float32     d[0], d[1]  row group,      columns 2·member and 2·member + 1
//                             d[2], d[3]  row group + 8,  the same columns
//
// So D of one product, packed pairwise, is A of another: rows stay, its 8 columns become 8 of k.
// (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8" with .f16 and .bf16.)
//
// ldmatrix reads `count` matrices of 8×8 elements of 16 bits. Lane 8·i + j gives the address of row
// j of matrix i, aligned to 16 bytes (lanes without a matrix may give any row). r[i] is then row
// `group`, columns 2·member and 2·member + 1, of matrix i: the matrices (rows 0–7, k 0–7),
// (rows 8–15, k 0–7), (rows 0–7, k 8–15), (rows 8–15, k 8–15) make an A fragment, and the rows of a
// row-major Bᵀ a B fragment. Transposed, r[i] is rows 2·member and 2·member + 1, column `group`: a
// B fragment from a row-major B.
#pragma once

#include "convert.h"

namespace ldit {

template <class T>
constexpr bool kIs16Bit = std::is_same_v<T, bf16> || std::is_same_v<T, fp16>;

#ifdef LDIT_EMULATED
namespace detail {

// The fragments that a lane gives to a product; a Word holds two neighbours along k.
template <class Word>
struct Product {
  const Word* a;
  const Word* b;
  float* d;
};

template <class T>
float2 unpack_word(std::uint32_t word) {
  return unpack<T>(word);
}
template <class T>
float2 unpack_word(float2 word) {
  return word;
}

template <class T, int k, class Word>
LDIT_AS_ONE void multiply(void* const lanes[32], unsigned) {
  float a[16][k], b[k][8];
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<Product<Word>*>(lanes[lane]);
    int group = lane / 4, member = lane % 4;
    for (int half = 0; half < k / 8; ++half) {
      int first = 2 * member + 8 * half;
      for (int below = 0; below < 2; ++below) {
        float2 pair = unpack_word<T>(mine.a[2 * half + below]);
        a[group + 8 * below][first] = pair.x, a[group + 8 * below][first + 1] = pair.y;
      }
      float2 pair = unpack_word<T>(mine.b[half]);
      b[first][group] = pair.x, b[first + 1][group] = pair.y;
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<Product<Word>*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = mine.d[i];
      for (int j = 0; j < k; ++j) sum += a[row][j] * b[j][column];
      mine.d[i] = sum;
    }
  }
}

// d += a·b with A 16×k and B k×8, sums in the order of k.
template <class T, int k, class Word>
void emulated_mma(const char* what, float* d, const Word* a, const Word* b, Site site) {
  Product<Word> mine{a, b, d};
  emulation::collective(what, kFullMask, &mine, multiply<T, k, Word>, false, site);
}

// The lanes exchange addresses; each then reads what it gets itself, so that a sanitizer blames the
// right thread.
template <int count, bool transposed>
void emulated_ldmatrix(std::uint32_t (&r)[count], const void* row, Site site) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0)
    emulation::fail("ldmatrix from a misaligned address", site);
  struct Rows {
    const std::uint16_t* all[32];
  } mine{};
  mine.all[emulation::lane()] = static_cast<const std::uint16_t*>(row);
  auto share = [](void* const lanes[32], unsigned) LDIT_AS_ONE {
    for (int to = 0; to < 32; ++to)
      for (int from = 0; from < 32; ++from)
        static_cast<Rows*>(lanes[to])->all[from] = static_cast<Rows*>(lanes[from])->all[from];
  };
  emulation::collective(transposed ? "ldmatrix.trans" : "ldmatrix", kFullMask, &mine, share, false,
                        site);
  int group = emulation::lane() / 4, member = emulation::lane() % 4;
  for (int i = 0; i < count; ++i) {
    std::uint32_t word = 0;
    for (int half = 0; half < 2; ++half) {
      int of_row = transposed ? 2 * member + half : group,
          of_column = transposed ? group : 2 * member + half;
      word |= std::uint32_t(mine.all[8 * i + of_row][of_column]) << 16 * half;
    }
    r[i] = word;
  }
}

}  // namespace detail
#endif

// d += a·b with A 16×16 and B 16×8, products and sums in float32.
template <class T>
LDIT_DEVICE void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4],
                              const std::uint32_t (&b)[2],
                              [[maybe_unused]] Site site = Site::here()) {
  static_assert(kIs16Bit<T>);
#ifdef LDIT_EMULATED
  detail::emulated_mma<T, 16>("mma.m16n8k16", d, a, b, site);
#else
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// d += a·b with A 16×8 and B 8×8: for the last 8 of 72.
template <class T>
LDIT_DEVICE void mma_m16n8k8(float (&d)[4], const std::uint32_t (&a)[2],
                             const std::uint32_t (&b)[1],
                             [[maybe_unused]] Site site = Site::here()) {
  static_assert(kIs16Bit<T>);
#ifdef LDIT_EMULATED
  detail::emulated_mma<T, 8>("mma.m16n8k8", d, a, b, site);
#else
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  }
#endif
}

// Loads r[0 … count−1], count 1, 2 or 4, from rows in shared memory; see above.
template <bool transposed = false, int count>
LDIT_DEVICE void ldmatrix(std::uint32_t (&r)[count], const void* row,
                          [[maybe_unused]] Site site = Site::here()) {
  static_assert(count == 1 || count == 2 || count == 4);
#ifdef LDIT_EMULATED
  detail::emulated_ldmatrix<count, transposed>(r, row, site);
#else
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (count == 1) {
    if constexpr (transposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                   : "=r"(r[0])
                   : "r"(address)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                   : "=r"(r[0])
                   : "r"(address)
                   : "memory");
    }
  } else if constexpr (count == 2) {
    if constexpr (transposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                   : "=r"(r[0]), "=r"(r[1])
                   : "r"(address)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                   : "=r"(r[0]), "=r"(r[1])
                   : "r"(address)
                   : "memory");
    }
  } else {
    if constexpr (transposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(address)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(address)
                   : "memory");
    }
  }
#endif
}

}  // namespace ldit
