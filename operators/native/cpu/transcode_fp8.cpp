// FP8 and bfloat16 weights to INT8 with one scale per row, and FP8 to bfloat16.
// Source: operators/contracts/transcode.py and transcode_exact.py.

#include <cmath>

#include "transcode.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLanes = 16;
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef float F16 __attribute__((vector_size(64)));
constexpr float kInt8Max = 127.0f;
constexpr int kShiftFloor = -100;
constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits
constexpr uint32_t kRoundingBits = 0x4b400000;  // of the same number
// Squared errors and squares over the scale squared are summed as whole multiples of one over these.
constexpr float kErrorUnits = 131072.0f, kNormUnits = 4.0f;
constexpr uint8_t kFp8Nan = 0x7f;

// What is wrong with a row; `problem` is the row times 4 plus this.
enum Problem { kNanScaleFound = 0, kNanCodeFound = 1, kScaleTooLarge = 2, kNotRepresentable = 3 };

// An E4M3 code as float32, without passing through float32's slow subnormals.
ASCEND_V4_INLINE float widened(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0.001953125f;
  uint32_t small_bits, bits = (magnitude << 20) + (120u << 23);
  std::memcpy(&small_bits, &small, sizeof(small));
  // All ones for a code without an implicit bit: a mask, since a branch would keep the loop from being vectorised.
  const uint32_t is_small = 0u - ((magnitude - 8) >> 31);
  bits = (small_bits & is_small) | (bits & ~is_small) | (code & 0x80u) << 24;
  float value;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

ASCEND_V4_INLINE float widened(uint16_t number) {
  const uint32_t bits = static_cast<uint32_t>(number) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// Running sums of one row, in whole units of its scale squared: the same in any order.
struct Sums {
  U16 error = {}, norm = {}, changed = {};
};

// A scale split so that the product of either part with a code of 7 bits is exact.
struct Scale {
  float whole, high, low;
};

ASCEND_V4_INLINE Scale split(float scale) {
  uint32_t bits;
  std::memcpy(&bits, &scale, sizeof(bits));
  bits &= 0xfffff000u;
  Scale parts;
  parts.whole = scale;
  std::memcpy(&parts.high, &bits, sizeof(bits));
  parts.low = scale - parts.high;
  return parts;
}

// What becomes of numbers: whole numbers nearest to them over the scale, and what they add to the sums. No comparisons:
// those of vectors wider than the processor's would be done element by element.
struct Quantized {
  U16 code, error, norm, changed;
};

ASCEND_V4_INLINE void quantize(const F16& value, const Scale& scale, Quantized* result) {
  const F16 quotient = value / scale.whole;
  const F16 shifted = quotient + kRoundingShift;
  const F16 code = shifted - kRoundingShift;
  const F16 left = quotient - code;
  // Exact: where code times scale can be the value the two are so near that the subtraction does not round.
  const U16 off = (U16)((value - code * scale.high) - code * scale.low) & 0x7fffffff;
  result->code = (U16)shifted - kRoundingBits;
  result->error = (U16)(left * left * kErrorUnits + kRoundingShift) - kRoundingBits;
  result->norm = (U16)(quotient * quotient * kNormUnits + kRoundingShift) - kRoundingBits;
  result->changed = (off + 0x7fffffff) >> 31;
}

ASCEND_V4_INLINE void quantize_block(const float* values, const Scale& scale, uint32_t* codes, Sums* sums) {
  for (int64_t k = 0; k < kBlock; k += kLanes) {
    F16 value;
    std::memcpy(&value, values + k, sizeof(value));
    Quantized result;
    quantize(value, scale, &result);
    std::memcpy(codes + k, &result.code, sizeof(result.code));
    sums->error += result.error;
    sums->norm += result.norm;
    sums->changed += result.changed;
  }
}

struct Totals {
  uint64_t error = 0, norm = 0, changed = 0;
};

ASCEND_V4_INLINE Totals total(const Sums& sums) {
  Totals totals;
  for (int lane = 0; lane < kLanes; ++lane) {
    totals.error += sums.error[lane];
    totals.norm += sums.norm[lane];
    totals.changed += sums.changed[lane];
  }
  return totals;
}

ASCEND_V4_INLINE void add_stats(const Totals& totals, float scale, double* stats) {
  const double unit = static_cast<double>(scale) * static_cast<double>(scale);
  const double squared_error = static_cast<double>(totals.error) / kErrorUnits * unit;
  stats[0] += 1;
  stats[1] += totals.changed == 0;
  stats[2] += static_cast<double>(totals.changed);
  stats[3] += squared_error;
  stats[4] += static_cast<double>(totals.norm) / kNormUnits * unit;
  stats[5] += squared_error;
}

// A block's numbers times a factor; zeros after the first `count`.
template <class T>
ASCEND_V4_INLINE void widen(const T* from, int64_t count, float factor, float* values) {
  // The constant count spares whole blocks the loop's ends.
  if (count == kBlock) {
#pragma omp simd
    for (int64_t k = 0; k < kBlock; ++k) values[k] = widened(from[k]) * factor;
    return;
  }
  for (int64_t k = 0; k < kBlock; ++k) values[k] = k < count ? widened(from[k]) * factor : 0.0f;
}

// At most kBlock numbers that share a factor, as codes.
template <class T>
ASCEND_V4_INLINE void quantize_run(const T* from, int64_t count, float factor, const Scale& scale, int8_t* out,
                                   Sums* sums) {
  alignas(64) float values[kBlock];
  alignas(64) uint32_t codes[kBlock];
  widen(from, count, factor, values);
  quantize_block(values, scale, codes, sums);
  if (count == kBlock) {
#pragma omp simd
    for (int64_t k = 0; k < kBlock; ++k) out[k] = static_cast<int8_t>(codes[k]);
    return;
  }
  for (int64_t k = 0; k < count; ++k) out[k] = static_cast<int8_t>(codes[k]);
}

// Largest magnitude code of at most kBlock codes.
ASCEND_V4_INLINE uint8_t largest_code(const uint8_t* codes, int64_t count) {
  uint8_t most = 0;
  if (count == kBlock) {
#pragma omp simd reduction(max : most)
    for (int64_t k = 0; k < kBlock; ++k) {
      const uint8_t magnitude = codes[k] & 0x7f;
      most = magnitude > most ? magnitude : most;
    }
    return most;
  }
  for (int64_t k = 0; k < count; ++k) {
    const uint8_t magnitude = codes[k] & 0x7f;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

float code_value(uint8_t magnitude) {
  return magnitude < 8 ? static_cast<float>(magnitude) * 0.001953125f
                       : static_cast<float>((8 + (magnitude & 7)) * power_of_two((magnitude >> 3) - 10));
}

ASCEND_V4_INLINE int block_shift(uint8_t scale, int top) {
  const int shift = static_cast<int>(scale) - 127 - top;
  return shift > 0 ? 0 : (shift < kShiftFloor ? kShiftFloor : shift);
}

// The row's largest number as largest * 2^exponent, the exponent that of the highest block with a nonzero number.
// Returns false for a NaN.
ASCEND_V4_CLONES bool find_largest(const uint8_t* codes, const uint8_t* scale, int64_t inputs, float* largest,
                                   int* exponent) {
  *largest = 0;
  *exponent = 0;
  for (int64_t k = 0, block = 0; k < inputs; k += kBlock, ++block) {
    const uint8_t most = largest_code(codes + k, inputs - k < kBlock ? inputs - k : kBlock);
    if (most == kFp8Nan) return false;
    if (most == 0) continue;
    const int shift = static_cast<int>(scale[block]) - 127;
    if (*largest == 0 || shift > *exponent) {
      // Farther below than the floor it cannot stay the largest.
      const int below = *exponent - shift;
      *largest *= static_cast<float>(power_of_two(below < kShiftFloor ? kShiftFloor : below));
      *exponent = shift;
    }
    const float value = code_value(most) * static_cast<float>(power_of_two(block_shift(scale[block], *exponent)));
    *largest = value > *largest ? value : *largest;
  }
  return true;
}

// The stored scale; 1 for a row of zeros.
ASCEND_V4_INLINE float row_scale(float largest, int exponent) {
  return largest == 0 ? 1.0f : stored_scale(largest / kInt8Max, exponent);
}

ASCEND_V4_CLONES Totals quantize_row(const uint8_t* codes, const uint8_t* scale, int64_t inputs, int exponent,
                                     const Scale& by, int8_t* out) {
  Sums sums;
  for (int64_t k = 0, block = 0; k < inputs; k += kBlock, ++block) {
    const float factor = static_cast<float>(power_of_two(block_shift(scale[block], exponent)));
    quantize_run(codes + k, inputs - k < kBlock ? inputs - k : kBlock, factor, by, out + k, &sums);
  }
  return total(sums);
}

#if defined(__x86_64__) && defined(__GNUC__)

// Processors that look up 128 bytes at once: everything about a row's codes under one block scale, made once per row.
#define ASCEND_V4_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")))

enum Column { kCode, kErrorLow, kErrorHigh, kNormLow, kNormHigh, kChanged, kColumns };

struct CodeTable {
  alignas(64) uint8_t column[kColumns][kBlock];
  int shift;
};

constexpr int kTables = 8;

ASCEND_V4_CLONES void fill_table(int shift, const Scale& by, CodeTable* table) {
  alignas(64) float values[kBlock];
  alignas(64) uint32_t found[4][kBlock];
  const float factor = static_cast<float>(power_of_two(shift));
#pragma omp simd
  for (int64_t k = 0; k < kBlock; ++k) values[k] = widened(static_cast<uint8_t>(k)) * factor;
  values[kFp8Nan] = 0;
  for (int64_t k = 0; k < kBlock; k += kLanes) {
    F16 value;
    std::memcpy(&value, values + k, sizeof(value));
    Quantized result;
    quantize(value, by, &result);
    std::memcpy(found[0] + k, &result.code, sizeof(U16));
    std::memcpy(found[1] + k, &result.error, sizeof(U16));
    std::memcpy(found[2] + k, &result.norm, sizeof(U16));
    std::memcpy(found[3] + k, &result.changed, sizeof(U16));
  }
#pragma omp simd
  for (int64_t k = 0; k < kBlock; ++k) {
    table->column[kCode][k] = static_cast<uint8_t>(found[0][k]);
    table->column[kErrorLow][k] = static_cast<uint8_t>(found[1][k]);
    table->column[kErrorHigh][k] = static_cast<uint8_t>(found[1][k] >> 8);
    table->column[kNormLow][k] = static_cast<uint8_t>(found[2][k]);
    table->column[kNormHigh][k] = static_cast<uint8_t>(found[2][k] >> 8);
    table->column[kChanged][k] = static_cast<uint8_t>(found[3][k]);
  }
  table->shift = shift;
}

ASCEND_V4_VBMI Totals quantize_row_vbmi(const uint8_t* codes, const uint8_t* scale, int64_t inputs, int exponent,
                                        const Scale& by, int8_t* out) {
  CodeTable tables[kTables];
  for (CodeTable& table : tables) table.shift = 1;
  const __m512i zero = _mm512_setzero_si512();
  __m512i sums[kColumns];
  for (__m512i& sum : sums) sum = zero;
  for (int64_t k = 0, block = 0; k < inputs; k += kBlock, ++block) {
    const int shift = block_shift(scale[block], exponent);
    CodeTable* table = &tables[-shift % kTables];
    if (table->shift != shift) fill_table(shift, by, table);
    for (int64_t from = k; from < k + kBlock && from < inputs; from += 64) {
      const __mmask64 inside = inputs - from >= 64 ? ~__mmask64{0} : (__mmask64{1} << (inputs - from)) - 1;
      const __m512i index = _mm512_maskz_loadu_epi8(inside, codes + from);
      __m512i found[kColumns];
      for (int column = 0; column < kColumns; ++column)
        found[column] = _mm512_permutex2var_epi8(_mm512_load_si512(table->column[column]), index,
                                                 _mm512_load_si512(table->column[column] + 64));
      const __m512i code = found[kCode];
      const __m512i with_sign = _mm512_mask_sub_epi8(code, _mm512_movepi8_mask(index), zero, code);
      _mm512_mask_storeu_epi8(out + from, inside, with_sign);
      for (int column = kErrorLow; column < kColumns; ++column)
        sums[column] = _mm512_add_epi64(sums[column], _mm512_sad_epu8(found[column], zero));
    }
  }
  const auto added = [&](Column column) ASCEND_V4_VBMI {
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(sums[column]));
  };
  Totals totals;
  totals.error = added(kErrorLow) + (added(kErrorHigh) << 8);
  totals.norm = added(kNormLow) + (added(kNormHigh) << 8);
  totals.changed = added(kChanged);
  return totals;
}

bool has_vbmi() { return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512dq"); }

#else

constexpr auto quantize_row_vbmi = quantize_row;
bool has_vbmi() { return false; }

#endif

int64_t fp8_row_to_int8(const uint8_t* codes, const uint8_t* scale, int64_t inputs, bool vbmi, int8_t* out,
                        float* out_scale, double* stats) {
  float largest;
  int exponent;
  if (!find_largest(codes, scale, inputs, &largest, &exponent)) return kNanCodeFound;
  const float stored = row_scale(largest, exponent);
  if (std::isinf(stored)) return kScaleTooLarge;
  *out_scale = stored;
  const Scale by = split(in_weights(stored, -exponent));
  add_stats((vbmi ? quantize_row_vbmi : quantize_row)(codes, scale, inputs, exponent, by, out), stored, stats);
  return -1;
}

ASCEND_V4_CLONES int64_t bf16_row_to_int8(const uint16_t* numbers, int64_t inputs, int8_t* out, float* out_scale,
                                          double* stats) {
  uint16_t most = 0;
  for (int64_t k = 0; k < inputs; ++k) {
    const uint16_t magnitude = numbers[k] & 0x7fff;
    most = magnitude > most ? magnitude : most;
  }
  if (most >= 0x7f80) return kNanCodeFound;
  const uint32_t bits = static_cast<uint32_t>(most) << 16;
  float largest;
  std::memcpy(&largest, &bits, sizeof(bits));
  const float stored = row_scale(largest, 0);
  *out_scale = stored;
  Sums sums;
  const Scale parts = split(stored);
  for (int64_t k = 0; k < inputs; k += kBlock)
    quantize_run(numbers + k, inputs - k < kBlock ? inputs - k : kBlock, 1.0f, parts, out + k, &sums);
  add_stats(total(sums), stored, stats);
  return -1;
}

// At most kBlock codes as bfloat16. Gathers in `lost` what that cannot hold: low bits, and bit 31 for an infinity.
ASCEND_V4_INLINE void bf16_run(const uint8_t* from, int64_t count, float factor, uint16_t* to, U16* lost) {
  alignas(64) float values[kBlock];
  alignas(64) uint32_t halves[kBlock];
  widen(from, count, factor, values);
  for (int64_t k = 0; k < kBlock; k += kLanes) {
    U16 bits;
    std::memcpy(&bits, values + k, sizeof(bits));
    *lost |= (bits & 0xffff) | (((bits & 0x7f800000) + 0x00800000) & 0x80000000);
    bits >>= 16;
    std::memcpy(halves + k, &bits, sizeof(bits));
  }
  if (count == kBlock) {
#pragma omp simd
    for (int64_t k = 0; k < kBlock; ++k) to[k] = static_cast<uint16_t>(halves[k]);
    return;
  }
  for (int64_t k = 0; k < count; ++k) to[k] = static_cast<uint16_t>(halves[k]);
}

ASCEND_V4_CLONES int64_t fp8_row_to_bf16(const uint8_t* codes, const uint8_t* scale, int64_t inputs, uint16_t* out) {
  U16 lost = {};
  for (int64_t k = 0, block = 0; k < inputs; k += kBlock, ++block) {
    const int64_t count = inputs - k < kBlock ? inputs - k : kBlock;
    if (largest_code(codes + k, count) == kFp8Nan) return kNanCodeFound;
    bf16_run(codes + k, count, static_cast<float>(power_of_two(static_cast<int>(scale[block]) - 127)), out + k, &lost);
  }
  uint32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= lost[lane];
  return any == 0 ? -1 : kNotRepresentable;
}

bool has_nan_scale(const uint8_t* scale, int64_t blocks) {
  bool found = false;
  for (int64_t block = 0; block < blocks; ++block) found |= scale[block] == kNanScale;
  return found;
}

}  // namespace

extern "C" {

// codes [rows, inputs], rows first_row and on of a tensor; scale [.., ceil(inputs / 128)] E8M0 of the whole tensor;
// out [rows, inputs]; out_scale [rows]; stats [6]. problem: -1, or 4 * row + what is wrong; then out is unfinished.
void ascend_v4_fp8_to_int8(const uint8_t* codes, const uint8_t* scale, int64_t rows, int64_t inputs,
                           int64_t first_row, int8_t* out, float* out_scale, double* stats, int64_t* problem) {
  const int64_t blocks = (inputs + kBlock - 1) / kBlock;
  const bool vbmi = has_vbmi();
  for (int i = 0; i < kStats; ++i) stats[i] = 0;
  *problem = -1;
  for (int64_t n = 0; n < rows; ++n) {
    const uint8_t* block_scale = scale + (first_row + n) / kBlock * blocks;
    const int64_t wrong = has_nan_scale(block_scale, blocks)
                              ? static_cast<int64_t>(kNanScaleFound)
                              : fp8_row_to_int8(codes + n * inputs, block_scale, inputs, vbmi, out + n * inputs,
                                                out_scale + n, stats);
    if (wrong >= 0) {
      *problem = 4 * n + wrong;
      return;
    }
  }
}

// weight [rows, inputs] bfloat16; the rest as above.
void ascend_v4_bf16_to_int8(const uint16_t* weight, int64_t rows, int64_t inputs, int8_t* out, float* out_scale,
                            double* stats, int64_t* problem) {
  for (int i = 0; i < kStats; ++i) stats[i] = 0;
  *problem = -1;
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t wrong = bf16_row_to_int8(weight + n * inputs, inputs, out + n * inputs, out_scale + n, stats);
    if (wrong >= 0) {
      *problem = 4 * n + wrong;
      return;
    }
  }
}

// out [rows, inputs] bfloat16; the rest as above.
void ascend_v4_fp8_to_bf16(const uint8_t* codes, const uint8_t* scale, int64_t rows, int64_t inputs, int64_t first_row,
                           uint16_t* out, int64_t* problem) {
  const int64_t blocks = (inputs + kBlock - 1) / kBlock;
  *problem = -1;
  for (int64_t n = 0; n < rows; ++n) {
    const uint8_t* block_scale = scale + (first_row + n) / kBlock * blocks;
    const int64_t wrong = has_nan_scale(block_scale, blocks)
                              ? static_cast<int64_t>(kNanScaleFound)
                              : fp8_row_to_bf16(codes + n * inputs, block_scale, inputs, out + n * inputs);
    if (wrong >= 0) {
      *problem = 4 * n + wrong;
      return;
    }
  }
}

}  // extern "C"
