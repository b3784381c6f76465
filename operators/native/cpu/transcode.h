// What the weight conversions share: 16-byte vectors, rounding, statistics. The rules of the numbers stand in
// operators/contracts/transcode.py and hold to the bit, so no product may be contracted into a fused one.

#ifndef ASCEND_V4_TRANSCODE_H_
#define ASCEND_V4_TRANSCODE_H_

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off", "no-trapping-math")
#else
#pragma STDC FP_CONTRACT OFF
#endif

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "simd.h"

#define ASCEND_V4_INLINE static inline __attribute__((always_inline))

namespace {

typedef uint8_t V16 __attribute__((vector_size(16)));
typedef uint64_t W2 __attribute__((vector_size(16)));

constexpr int64_t kGroupInputs = 32;
constexpr int64_t kGroupBytes = 16;
constexpr int64_t kBlock = 128;
constexpr int kStats = 6;
constexpr uint8_t kNanScale = 255;

ASCEND_V4_INLINE V16 load16(const void* from) {
  V16 value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

ASCEND_V4_INLINE void store16(void* to, V16 value) { std::memcpy(to, &value, sizeof(value)); }

// table[index] per byte; every index is below 16.
ASCEND_V4_INLINE V16 lookup(V16 table, V16 index) {
#if defined(__aarch64__)
  return (V16)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index);
#elif !defined(__clang__)
  return __builtin_shuffle(table, index);
#else
  V16 found;
  for (int i = 0; i < 16; ++i) found[i] = table[index[i]];
  return found;
#endif
}

// a0 b0 a1 b1 ... of the lower and of the upper halves.
ASCEND_V4_INLINE V16 interleave_low(V16 a, V16 b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  return __builtin_shuffle(a, b, (V16){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#endif
}

ASCEND_V4_INLINE V16 interleave_high(V16 a, V16 b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  return __builtin_shuffle(a, b, (V16){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

// Sums of bytes 0 to 7 and 8 to 15.
ASCEND_V4_INLINE W2 byte_sums(V16 bytes) {
#if defined(__x86_64__)
  return (W2)_mm_sad_epu8((__m128i)bytes, _mm_setzero_si128());
#elif defined(__aarch64__)
  return (W2)vpaddlq_u32(vpaddlq_u16(vpaddlq_u8((uint8x16_t)bytes)));
#else
  W2 sums = {0, 0};
  for (int i = 0; i < 16; ++i) sums[i / 8] += bytes[i];
  return sums;
#endif
}

// 2^exponent, within +-1022.
ASCEND_V4_INLINE double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// A float32 scale for rows times 2^-exponent, in the units of the weights.
ASCEND_V4_INLINE float in_weights(float scale, int exponent) {
  return static_cast<float>(static_cast<double>(scale) * power_of_two(exponent));
}

// What is stored of it: never subnormal, which devices take for zero.
ASCEND_V4_INLINE float stored_scale(float scale, int exponent) {
  constexpr float kSmallest = 0x1p-126f;
  const float stored = in_weights(scale, exponent);
  return stored < kSmallest ? kSmallest : stored;
}

}  // namespace

#endif  // ASCEND_V4_TRANSCODE_H_
