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
typedef uint64_t W8 __attribute__((vector_size(64)));
typedef float F16 __attribute__((vector_size(64)));
constexpr float kInt8Max = 127.0f;
constexpr int kShiftFloor = -100;
constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits
constexpr uint32_t kRoundingBits = 0x4b400000;  // of the same number
// For the statistics a number over its row's scale is a code plus a whole multiple of one over this, at most a half.
constexpr int kParts = 4096;
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

// Running sums of one row: the same in any order. `left` is what the code leaves of a number, in parts.
struct Sums {
  U16 code_code = {}, code_left = {}, changed = {};
  W8 left_left = {};
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

// What becomes of numbers: whole numbers nearest to them over the scale, whole parts that are left of them, whether
// they changed. No comparisons: those of vectors wider than the processor's would be done element by element.
struct Quantized {
  F16 code, left;
  U16 changed;
};

// Whole numbers of at most 2^22 either way, which products of codes and parts are.
ASCEND_V4_INLINE U16 whole(const F16& number) { return (U16)(number + kRoundingShift) - kRoundingBits; }

ASCEND_V4_INLINE void quantize(const F16& value, const F16& quotient, const Scale& scale, Quantized* result) {
  const F16 code = (quotient + kRoundingShift) - kRoundingShift;
  const F16 left = (quotient - code) * static_cast<float>(kParts);
  // Exact: where code times scale can be the value the two are so near that the subtraction does not round.
  const U16 off = (U16)((value - code * scale.high) - code * scale.low) & 0x7fffffff;
  result->code = code;
  result->left = (left + kRoundingShift) - kRoundingShift;
  result->changed = (off + 0x7fffffff) >> 31;
}

ASCEND_V4_INLINE void quantize_block(const float* values, const Scale& scale, uint32_t* codes, Sums* sums) {
  U16 left_left = {};
  for (int64_t k = 0; k < kBlock; k += kLanes) {
    F16 value;
    std::memcpy(&value, values + k, sizeof(value));
    Quantized result;
    quantize(value, value / scale.whole, scale, &result);
    const U16 code = whole(result.code);
    std::memcpy(codes + k, &code, sizeof(code));
    sums->code_code += whole(result.code * result.code);
    sums->code_left += whole(result.code * result.left);
    sums->changed += result.changed;
    left_left += whole(result.left * result.left);
  }
  // Of the sums only this one outgrows 32 bits in a wide row.
  sums->left_left += ((W8)left_left & 0xffffffff) + ((W8)left_left >> 32);
}

struct Totals {
  int64_t code_code = 0, code_left = 0, left_left = 0, changed = 0;
};

ASCEND_V4_INLINE Totals total(const Sums& sums) {
  Totals totals;
  for (int lane = 0; lane < kLanes; ++lane) {
    totals.code_code += sums.code_code[lane];
    totals.code_left += static_cast<int32_t>(sums.code_left[lane]);
    totals.changed += sums.changed[lane];
  }
  for (int lane = 0; lane < kLanes / 2; ++lane) totals.left_left += static_cast<int64_t>(sums.left_left[lane]);
  return totals;
}

ASCEND_V4_INLINE void add_stats(const Totals& totals, float scale, double* stats) {
  const double unit = static_cast<double>(scale) * static_cast<double>(scale);
  constexpr double kSquaredParts = kParts * kParts;
  const int64_t norm = totals.code_code * int64_t{kParts * kParts} + totals.code_left * (2 * kParts) + totals.left_left;
  const double squared_error = static_cast<double>(totals.left_left) / kSquaredParts * unit;
  stats[0] += 1;
  stats[1] += totals.changed == 0;
  stats[2] += static_cast<double>(totals.changed);
  stats[3] += squared_error;
  stats[4] += static_cast<double>(norm) / kSquaredParts * unit;
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

// Processors that look up 128 bytes at once and sum products of bytes. One table per row holds what becomes of every
// number; a code 8 higher is twice the number, so the tables of the blocks' scales are cut from it, 8 further on per
// power of two.
#define ASCEND_V4_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")))

constexpr int kOctave = 8;
// Numbers below these octaves, of which a row's largest is in the highest, get code 0 and leave less than half a part.
constexpr int kOctaves = 22;
// Room for a block below all of them, and for the two octaves before its code 0.
constexpr int kBelow = kBlock + 2 * kOctave;
// Room for a block whose largest number is code 1, three octaves below code 8, and is the row's largest.
constexpr int kTableBytes = kBelow + (kOctaves + 1) * kOctave + kBlock + 64;
constexpr uint8_t kChangedBit = 0x80;
constexpr int kLowBits = 6, kLowParts = 1 << kLowBits;
// A page: where the hardware's prefetching ends, and a row of 4096. The next row's codes and its output.
constexpr int64_t kPrefetchBytes = 4096;

struct Tables {
  alignas(64) uint8_t code[kTableBytes];
  // left_high * kLowParts + left_low, the latter not negative.
  alignas(64) int8_t left_high[kTableBytes];
  alignas(64) uint8_t left_low[kTableBytes];
  // By scale: the largest codes, and the three tables as its blocks read them, codes 0 to 63 first.
  alignas(64) uint8_t most[256][64];
  alignas(64) uint8_t of_scale[256][6][64];
  uint8_t distinct[256];
  int num_distinct = 0;
  const uint8_t* scale = nullptr;
  bool vbmi = false;

  Tables() {
    vbmi = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
    std::memset(code, 0, sizeof(code));
    std::memset(left_high, 0, sizeof(left_high));
    std::memset(left_low, 0, sizeof(left_low));
    std::memset(code, kChangedBit, kBelow);
  }

  // Block scales that the next rows share.
  void start_band(const uint8_t* band_scale, int64_t blocks) {
    scale = band_scale;
    bool seen[256] = {};
    num_distinct = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      if (!seen[scale[block]]) distinct[num_distinct++] = scale[block];
      seen[scale[block]] = true;
    }
  }
};

// The next 64 codes that a row with this many left still has.
ASCEND_V4_INLINE uint64_t inside_row(int64_t left) {
  return left >= 64 ? ~uint64_t{0} : left > 0 ? (uint64_t{1} << left) - 1 : 0;
}

// As find_largest.
ASCEND_V4_VBMI bool find_largest_vbmi(const uint8_t* codes, int64_t inputs, Tables* tables, float* largest,
                                      int* exponent) {
  const __m512i magnitude = _mm512_set1_epi8(0x7f);
  for (int i = 0; i < tables->num_distinct; ++i)
    _mm512_store_si512(tables->most[tables->distinct[i]], _mm512_setzero_si512());
  for (int64_t k = 0, block = 0; k < inputs; k += kBlock, ++block) {
    uint8_t* most = tables->most[tables->scale[block]];
    const __m512i low = _mm512_maskz_loadu_epi8(inside_row(inputs - k), codes + k);
    const __m512i high = _mm512_maskz_loadu_epi8(inside_row(inputs - k - 64), codes + k + 64);
    const __m512i larger = _mm512_max_epu8(_mm512_and_si512(low, magnitude), _mm512_and_si512(high, magnitude));
    _mm512_store_si512(most, _mm512_max_epu8(larger, _mm512_load_si512(most)));
  }
  uint8_t most_of[256];
  int top = -1;
  for (int i = 0; i < tables->num_distinct; ++i) {
    const __m512i wide = _mm512_load_si512(tables->most[tables->distinct[i]]);
    const __m256i half = _mm256_max_epu8(_mm512_castsi512_si256(wide), _mm512_extracti64x4_epi64(wide, 1));
    const __m128i quarter = _mm_max_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    // The least of the complements, once each byte met its neighbour.
    const __m128i pairs = _mm_max_epu8(quarter, _mm_srli_epi16(quarter, 8));
    const __m128i rest = _mm_sub_epi16(_mm_set1_epi16(255), _mm_and_si128(pairs, _mm_set1_epi16(255)));
    most_of[i] = static_cast<uint8_t>(255 - _mm_extract_epi16(_mm_minpos_epu16(rest), 0));
    if (most_of[i] == kFp8Nan) return false;
    if (most_of[i] != 0 && tables->distinct[i] > top) top = tables->distinct[i];
  }
  *largest = 0;
  *exponent = top < 0 ? 0 : top - 127;
  for (int i = 0; i < tables->num_distinct; ++i) {
    if (most_of[i] == 0) continue;
    const int shift = block_shift(tables->distinct[i], *exponent);
    const float value = code_value(most_of[i]) * static_cast<float>(power_of_two(shift));
    *largest = value > *largest ? value : *largest;
  }
  return true;
}

// The octave of the largest number, counted as codes do: 1 for code 8. 0 for a row of zeros.
int octave_of(float largest) {
  uint32_t bits;
  std::memcpy(&bits, &largest, sizeof(bits));
  return largest == 0 ? 0 : static_cast<int>(bits >> 23) - 127 + 7;
}

ASCEND_V4_VBMI ASCEND_V4_INLINE void store_bytes(__m512i numbers, void* to) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(numbers));
}

// Fills the octaves from `top` down.
ASCEND_V4_VBMI void fill_tables(int top, const Scale& by, Tables* tables) {
  F16 value;
  for (int lane = 0; lane < kLanes; ++lane)
    value[lane] = static_cast<float>((8 + lane % kOctave) * power_of_two(top - 10 - (lane < kOctave)));
  F16 quotient = value / by.whole;
  for (int at = kBelow + (kOctaves - 2) * kOctave; at >= kBelow; at -= kLanes) {
    Quantized result;
    quantize(value, quotient, by, &result);
    const __m512i left = (__m512i)whole(result.left);
    store_bytes((__m512i)(whole(result.code) | result.changed << 7), tables->code + at);
    store_bytes(_mm512_srai_epi32(left, kLowBits), tables->left_high + at);
    store_bytes(_mm512_and_si512(left, _mm512_set1_epi32(kLowParts - 1)), tables->left_low + at);
    // Two octaves down. Quotients halve exactly with their values.
    value *= 0.25f;
    quotient *= 0.25f;
  }
}

// A table as blocks read it whose code 8 lies at 8 from here.
ASCEND_V4_VBMI ASCEND_V4_INLINE void spread_table(const void* table, int64_t here, uint8_t (*halves)[64]) {
  // Codes 1, 2 and 3, and 4 to 7 are numbers of the three octaves before code 8's; code 0 is zero.
  const __m512i small = _mm512_castsi128_si512(_mm_setr_epi8(0, 0, 8, 12, 16, 18, 20, 22, 0, 0, 0, 0, 0, 0, 0, 0));
  const uint8_t* from = static_cast<const uint8_t*>(table) + here;
  const __m512i codes = _mm512_maskz_loadu_epi8(~__mmask64{1}, from);
  _mm512_store_si512(halves[0],
                     _mm512_mask_permutexvar_epi8(codes, 0xfe, small, _mm512_loadu_si512(from - 2 * kOctave)));
  _mm512_store_si512(halves[1], _mm512_loadu_si512(from + 64));
}

// As quantize_row.
ASCEND_V4_VBMI Totals quantize_row_vbmi(const uint8_t* codes, int64_t inputs, float largest, int exponent,
                                        const Scale& by, Tables* tables, int8_t* out) {
  const int top = octave_of(largest);
  fill_tables(top, by, tables);
  for (int i = 0; i < tables->num_distinct; ++i) {
    const uint8_t scale = tables->distinct[i];
    const int64_t wanted = kBelow + (block_shift(scale, exponent) - top + kOctaves - 1) * kOctave;
    const int64_t here = wanted < 2 * kOctave ? 2 * kOctave : wanted;
    spread_table(tables->code, here, tables->of_scale[scale]);
    spread_table(tables->left_high, here, tables->of_scale[scale] + 2);
    spread_table(tables->left_low, here, tables->of_scale[scale] + 4);
  }
  const __m512i zero = _mm512_setzero_si512();
  __m512i code_code = zero, code_high = zero, code_low = zero, high_high = zero, high_low = zero, low_low = zero;
  const int64_t ahead = inputs > kPrefetchBytes ? inputs : kPrefetchBytes;
  Totals totals;
  for (int64_t k = 0, block = 0; k < inputs; k += kBlock, ++block) {
    const uint8_t(*table)[64] = tables->of_scale[tables->scale[block]];
    const auto look_up = [&](int first, __m512i index) ASCEND_V4_VBMI {
      return _mm512_permutex2var_epi8(_mm512_load_si512(table[first]), index, _mm512_load_si512(table[first + 1]));
    };
    for (int64_t from = k; from < k + kBlock && from < inputs; from += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + from + ahead), _MM_HINT_T0);
      __builtin_prefetch(out + from + kPrefetchBytes, 1);
      const __mmask64 inside = inside_row(inputs - from);
      const __m512i index = _mm512_maskz_loadu_epi8(inside, codes + from);
      const __m512i found = look_up(0, index), high = look_up(2, index), low = look_up(4, index);
      const __m512i code = _mm512_and_si512(found, _mm512_set1_epi8(0x7f));
      totals.changed += __builtin_popcountll(_mm512_movepi8_mask(found));
      code_code = _mm512_dpbusd_epi32(code_code, code, code);
      code_high = _mm512_dpbusd_epi32(code_high, code, high);
      code_low = _mm512_dpbusd_epi32(code_low, code, low);
      high_high = _mm512_dpbusd_epi32(high_high, _mm512_abs_epi8(high), _mm512_abs_epi8(high));
      high_low = _mm512_dpbusd_epi32(high_low, low, high);
      low_low = _mm512_dpbusd_epi32(low_low, low, low);
      const __m512i with_sign = _mm512_mask_sub_epi8(code, _mm512_movepi8_mask(index), zero, code);
      _mm512_mask_storeu_epi8(out + from, inside, with_sign);
    }
  }
  const auto sum = [](__m512i lanes) ASCEND_V4_VBMI { return int64_t{_mm512_reduce_add_epi32(lanes)}; };
  totals.code_code = sum(code_code);
  totals.code_left = sum(code_high) * kLowParts + sum(code_low);
  totals.left_left = sum(high_high) * (kLowParts * kLowParts) + sum(high_low) * (2 * kLowParts) + sum(low_low);
  return totals;
}

#else

// Nothing but the scales of the row's blocks.
struct Tables {
  const uint8_t* scale = nullptr;
  static constexpr bool vbmi = false;

  void start_band(const uint8_t* band_scale, int64_t) { scale = band_scale; }
};

bool find_largest_vbmi(const uint8_t*, int64_t, Tables*, float*, int*) { return false; }

Totals quantize_row_vbmi(const uint8_t*, int64_t, float, int, const Scale&, Tables*, int8_t*) { return {}; }

#endif

int64_t fp8_row_to_int8(const uint8_t* codes, int64_t inputs, Tables* tables, int8_t* out, float* out_scale,
                        double* stats) {
  float largest;
  int exponent;
  const bool sound = tables->vbmi ? find_largest_vbmi(codes, inputs, tables, &largest, &exponent)
                                  : find_largest(codes, tables->scale, inputs, &largest, &exponent);
  if (!sound) return kNanCodeFound;
  const float stored = row_scale(largest, exponent);
  if (std::isinf(stored)) return kScaleTooLarge;
  *out_scale = stored;
  const Scale by = split(in_weights(stored, -exponent));
  add_stats(tables->vbmi ? quantize_row_vbmi(codes, inputs, largest, exponent, by, tables, out)
                         : quantize_row(codes, tables->scale, inputs, exponent, by, out),
            stored, stats);
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
  for (int i = 0; i < kStats; ++i) stats[i] = 0;
  *problem = -1;
  Tables tables;
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t band = (first_row + n) / kBlock;
    if (n == 0 || (first_row + n) % kBlock == 0) {
      if (has_nan_scale(scale + band * blocks, blocks)) {
        *problem = 4 * n + kNanScaleFound;
        return;
      }
      tables.start_band(scale + band * blocks, blocks);
    }
    const int64_t wrong = fp8_row_to_int8(codes + n * inputs, inputs, &tables, out + n * inputs, out_scale + n, stats);
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
