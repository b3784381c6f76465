// Walks over one row of FP4: how often each magnitude stands under each scale, and a table per scale byte applied to
// every code. Written for 16-byte vectors, and again for AVX-512, which counts four groups at a time and maps two.

#ifndef ASCEND_V4_TRANSCODE_FP4_H_
#define ASCEND_V4_TRANSCODE_FP4_H_

#include "transcode.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define ASCEND_V4_HAS_AVX512 1
#define ASCEND_V4_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#endif

namespace {

constexpr int kCodes = 16;
// A page: where the hardware's prefetching ends. The walk that counts is the first to see its codes, the walk that maps
// the first to touch the next row's output.
constexpr int64_t kPrefetchBytes = 4096;

// Counts of magnitudes 1 3 5 7 (odd) and 2 4 6 (even) in four fields of 16 bits each.
struct Counts {
  uint64_t odd, even;
};

constexpr uint64_t kCountFields = 0x003f003f003f003full;

// For two magnitudes a and b each: 1 for a, 64 for b. Sums of both stay apart up to 63 numbers.
alignas(64) constexpr uint8_t kCountTables[4][16] = {
    {0, 1, 64, 0, 0, 0, 0, 0, 0, 1, 64, 0, 0, 0, 0, 0},
    {0, 0, 0, 1, 64, 0, 0, 0, 0, 0, 0, 1, 64, 0, 0, 0},
    {0, 0, 0, 0, 0, 1, 64, 0, 0, 0, 0, 0, 0, 1, 64, 0},
    {0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1},
};

ASCEND_V4_INLINE void add_counts(Counts* counts, uint64_t sums) {
  counts->odd += sums & kCountFields;
  counts->even += (sums >> 6) & kCountFields;
}

ASCEND_V4_INLINE void count_groups(const uint8_t* codes, const uint8_t* scale, int64_t groups, Counts* counts) {
  for (int64_t g = 0; g < groups; ++g) {
    const V16 pairs = load16(codes + g * kGroupBytes);
    const V16 low = pairs & 15, high = pairs >> 4;
    W2 sums = {0, 0};
    for (int t = 0; t < 4; ++t) {
      const V16 table = load16(kCountTables[t]);
      sums |= byte_sums(lookup(table, low) + lookup(table, high)) << (16 * t);
    }
    add_counts(counts + scale[g], sums[0] + sums[1]);
  }
}

// tables [256][16]: what becomes of a code under a scale byte.
ASCEND_V4_INLINE void map_groups(const uint8_t* codes, const uint8_t* scale, int64_t groups, const uint8_t* tables,
                                 uint8_t* out) {
  for (int64_t g = 0; g < groups; ++g) {
    const V16 table = load16(tables + kCodes * scale[g]);
    const V16 pairs = load16(codes + g * kGroupBytes);
    const V16 first = lookup(table, pairs & 15), second = lookup(table, pairs >> 4);
    store16(out + g * kGroupInputs, interleave_low(first, second));
    store16(out + g * kGroupInputs + 16, interleave_high(first, second));
  }
}

ASCEND_V4_CLONES void count_row(const uint8_t* codes, const uint8_t* scale, int64_t groups, Counts* counts) {
  count_groups(codes, scale, groups, counts);
}

ASCEND_V4_CLONES void map_row(const uint8_t* codes, const uint8_t* scale, int64_t groups, const uint8_t* tables,
                              uint8_t* out) {
  map_groups(codes, scale, groups, tables, out);
}

#if defined(ASCEND_V4_HAS_AVX512)

// Two tables side by side, each twice.
ASCEND_V4_AVX512 inline __m512i two_tables(const uint8_t* tables, const uint8_t* scale) {
  const auto table = [&](int g) ASCEND_V4_AVX512 {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(tables + kCodes * scale[g]));
  };
  return _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(table(0)), 0xff00, table(1));
}

ASCEND_V4_AVX512 void count_row_avx512(const uint8_t* codes, const uint8_t* scale, int64_t groups, Counts* counts) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i tables[4];
  for (int t = 0; t < 4; ++t)
    tables[t] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kCountTables[t])));
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + g * kGroupBytes + kPrefetchBytes), _MM_HINT_T0);
    const __m512i pairs = _mm512_loadu_si512(codes + g * kGroupBytes);
    const __m512i low = _mm512_and_si512(pairs, nibble);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble);
    __m512i sums[4];
    for (int t = 0; t < 4; ++t)
      sums[t] = _mm512_sad_epu8(
          _mm512_add_epi8(_mm512_shuffle_epi8(tables[t], low), _mm512_shuffle_epi8(tables[t], high)),
          _mm512_setzero_si512());
    __m512i all = _mm512_or_si512(sums[0], _mm512_slli_epi64(sums[1], 16));
    all = _mm512_or_si512(all, _mm512_or_si512(_mm512_slli_epi64(sums[2], 32), _mm512_slli_epi64(sums[3], 48)));
    // Each group's sum stands twice: both halves of a lane added the other way round.
    all = _mm512_add_epi64(all, _mm512_shuffle_epi32(all, _MM_PERM_BADC));
    const __m512i fields = _mm512_set1_epi64(kCountFields);
    const __m512i odd = _mm512_and_si512(all, fields);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi64(all, 6), fields);
    const __m512i both = _mm512_unpacklo_epi64(odd, even);
    const auto add = [&](int group, __m128i counted) ASCEND_V4_AVX512 {
      __m128i* to = reinterpret_cast<__m128i*>(counts + scale[g + group]);
      _mm_storeu_si128(to, _mm_add_epi64(_mm_loadu_si128(to), counted));
    };
    add(0, _mm512_castsi512_si128(both));
    add(1, _mm512_extracti64x2_epi64(both, 1));
    add(2, _mm512_extracti64x2_epi64(both, 2));
    add(3, _mm512_extracti64x2_epi64(both, 3));
  }
  count_row(codes + g * kGroupBytes, scale + g, groups - g, counts);
}

ASCEND_V4_AVX512 void map_row_avx512(const uint8_t* codes, const uint8_t* scale, int64_t groups,
                                     const uint8_t* tables, uint8_t* out) {
  const __m512i nibble = _mm512_set1_epi8(15);
  int64_t g = 0;
  for (; g + 2 <= groups; g += 2) {
    uint8_t* to = out + g * kGroupInputs;
    __builtin_prefetch(to + kPrefetchBytes, 1);
    // A word per pair, its first code in the low byte. Both bytes keep four bits.
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + g * kGroupBytes));
    const __m512i words = _mm512_cvtepu8_epi16(pairs);
    const __m512i each = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)), nibble);
    _mm512_storeu_si512(to, _mm512_shuffle_epi8(two_tables(tables, scale + g), each));
  }
  map_row(codes + g * kGroupBytes, scale + g, groups - g, tables, out + g * kGroupInputs);
}

inline bool has_avx512() { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"); }

#else

constexpr auto count_row_avx512 = count_row;
constexpr auto map_row_avx512 = map_row;
inline bool has_avx512() { return false; }

#endif

}  // namespace

#endif  // ASCEND_V4_TRANSCODE_FP4_H_
