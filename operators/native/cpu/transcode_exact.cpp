// FP4 weights to bfloat16, which loses nothing, and where their negative zeros stand.
// Source: operators/contracts/transcode_exact.py.

#include "transcode.h"

namespace {

constexpr int kLargestScale = 252;  // above it 6 * 2^(byte - 127) may be beyond bfloat16

// Low and high bytes of the bfloat16 numbers of 16 codes, per scale byte.
struct Bf16Tables {
  alignas(64) uint8_t bytes[256][2][16];
};

// m * 2^(byte - 128) in bfloat16, m one of 0 1 2 3 4 6 8 12.
constexpr uint16_t bf16_of(int m, int byte) {
  if (m == 0) return 0;
  const int power = (m >= 8 ? 3 : m >= 4 ? 2 : m >= 2 ? 1 : 0);
  const int fraction = m == (1 << power) ? 0 : 64;  // 3 6 12 are 1.5 times a power of two
  const int exponent = byte - 128 + power + 127;
  if (exponent > 0) return static_cast<uint16_t>((exponent << 7) + fraction);
  // Subnormal: 1.fraction moved below the smallest exponent. Scale byte 0 is the only one to get here, by 1 at most.
  return static_cast<uint16_t>((128 + fraction) >> (1 - exponent));
}

constexpr Bf16Tables bf16_tables() {
  constexpr int kDoubled[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  Bf16Tables tables{};
  for (int byte = 0; byte <= kLargestScale; ++byte)
    for (int code = 0; code < 16; ++code) {
      const int bits = bf16_of(kDoubled[code & 7], byte) | (code & 8) << 12;
      tables.bytes[byte][0][code] = static_cast<uint8_t>(bits & 255);
      tables.bytes[byte][1][code] = static_cast<uint8_t>(bits >> 8);
    }
  return tables;
}

constexpr Bf16Tables kBf16 = bf16_tables();

ASCEND_V4_CLONES void bf16_row(const uint8_t* codes, const uint8_t* scale, int64_t groups, uint8_t* out) {
  for (int64_t g = 0; g < groups; ++g) {
    const V16 low_table = load16(kBf16.bytes[scale[g]][0]), high_table = load16(kBf16.bytes[scale[g]][1]);
    const V16 pairs = load16(codes + g * kGroupBytes);
    const V16 first = interleave_low(pairs & 15, pairs >> 4), second = interleave_high(pairs & 15, pairs >> 4);
    uint8_t* to = out + 2 * g * kGroupInputs;
    const V16 low[2] = {lookup(low_table, first), lookup(low_table, second)};
    const V16 high[2] = {lookup(high_table, first), lookup(high_table, second)};
    for (int half = 0; half < 2; ++half) {
      store16(to + 32 * half, interleave_low(low[half], high[half]));
      store16(to + 32 * half + 16, interleave_high(low[half], high[half]));
    }
  }
}

ASCEND_V4_INLINE uint8_t largest_byte(const uint8_t* bytes, int64_t count) {
  uint8_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = bytes[i] > most ? bytes[i] : most;
  return most;
}

ASCEND_V4_CLONES int64_t mark_negative_zeros(const uint8_t* codes, int64_t groups, uint8_t* out) {
  const V16 bits = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  int64_t found = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const V16 pairs = load16(codes + g * kGroupBytes);
    const V16 low = (V16)((pairs & 15) == 8), high = (V16)((pairs >> 4) == 8);
    const W2 first = byte_sums(interleave_low(low, high) & bits);
    const W2 second = byte_sums(interleave_high(low, high) & bits);
    const uint32_t marks = static_cast<uint32_t>(first[0] | first[1] << 8 | second[0] << 16 | second[1] << 24);
    found += __builtin_popcount(marks);
    for (int byte = 0; byte < 4; ++byte) out[4 * g + byte] = static_cast<uint8_t>(marks >> (8 * byte));
  }
  return found;
}

}  // namespace

extern "C" {

// codes [rows, inputs / 2]; scale [rows, inputs / 32] E8M0; out [rows, inputs] bfloat16, little-endian.
// problem: -1, or the index in `scale` of the first one above 2^125; then out is unfinished.
void ascend_v4_fp4_to_bf16(const uint8_t* codes, const uint8_t* scale, int64_t rows, int64_t inputs, uint8_t* out,
                           int64_t* problem) {
  const int64_t groups = inputs / kGroupInputs;
  *problem = -1;
  for (int64_t n = 0; n < rows; ++n) {
    const uint8_t* row_scale = scale + n * groups;
    if (largest_byte(row_scale, groups) > kLargestScale) {
      int64_t g = 0;
      while (row_scale[g] <= kLargestScale) ++g;
      *problem = n * groups + g;
      return;
    }
    bf16_row(codes + n * (inputs / 2), row_scale, groups, out + 2 * n * inputs);
  }
}

// codes [rows, inputs / 2]; out [rows, inputs / 8], input k in bit k % 8 of byte k / 8; found [1] counts them.
void ascend_v4_negative_zeros(const uint8_t* codes, int64_t rows, int64_t inputs, uint8_t* out, int64_t* found) {
  *found = mark_negative_zeros(codes, rows * (inputs / kGroupInputs), out);
}

}  // extern "C"
