// Back to the release's formats: FP4 from INT8 with the scales it had, FP4 and FP8 from numbers that these hold.
// Source: operators/contracts/transcode_exact.py. Whatever has no exact image ends a call; the reference says what.

#include <cmath>

#include "transcode.h"

namespace {

constexpr int kCodes = 8;
constexpr int kMagnitudes = 129;  // of INT8, -128 included
constexpr double kParts = 4096;
constexpr float kDoubled[kCodes] = {0, 1, 2, 3, 4, 6, 8, 12};
constexpr uint32_t kInfinity = 0x7f800000;
constexpr int kUnitScale = 127;
// A page: where the hardware's prefetching ends.
constexpr int64_t kPrefetchBytes = 4096;
// 1.5 in float32's fraction bits: 6 is 1.5 * 2^2.
constexpr uint32_t kHalfFraction = 0x400000;

// What the codes of one row become under one group scale.
struct GroupTable {
  // Magnitudes from which on the code is larger than its index.
  uint8_t from[kCodes];
  // Magnitudes that the codes stand for, where whole numbers below 128 are, and whether they are.
  uint8_t value[16];
  bool is_whole;
  bool has_left;
  // What a magnitude's number lies off, in parts of the row's scale.
  int32_t left[kMagnitudes];
  double unit;
};

ASCEND_V4_INLINE bool passes(double magnitude, int code) {
  const double middle = (static_cast<double>(kDoubled[code]) + kDoubled[code + 1]) / 2;
  return magnitude > middle || (magnitude == middle && code % 2 == 1);
}

void fill_table(int byte, double scale, GroupTable* table) {
  const double unit = power_of_two(byte - 128), step = std::fabs(scale);
  table->unit = unit;
  table->has_left = false;
  for (int code = 0; code + 1 < kCodes; ++code) {
    const double middle = (static_cast<double>(kDoubled[code]) + kDoubled[code + 1]) / 2;
    const double near = std::floor(middle * unit / step);
    // The quotient may be rounded: the rule itself decides between its neighbours.
    int magnitude = near < 2 ? 0 : near > kMagnitudes ? kMagnitudes : static_cast<int>(near) - 1;
    while (magnitude < kMagnitudes && !passes(magnitude * step / unit, code)) ++magnitude;
    table->from[code] = static_cast<uint8_t>(magnitude);
  }
  table->is_whole = true;
  for (int code = 0; code < kCodes; ++code) {
    const double ratio = kDoubled[code] * unit / step;
    // A code that no magnitude takes need not be whole.
    const bool is_taken = code == 0 || table->from[code - 1] < kMagnitudes;
    const bool is_whole = ratio <= 128 && ratio == std::floor(ratio) && ratio * step == kDoubled[code] * unit;
    table->is_whole &= is_whole || !is_taken;
    table->value[code] = table->value[code + 8] = is_whole ? static_cast<uint8_t>(ratio) : 255;
  }
}

int code_of(const GroupTable& table, int magnitude) {
  int code = 0;
  while (code + 1 < kCodes && magnitude >= table.from[code]) ++code;
  return code;
}

void fill_left(double scale, GroupTable* table) {
  const double step = std::fabs(scale);
  for (int magnitude = 0; magnitude < kMagnitudes; ++magnitude) {
    const double nearest = static_cast<double>(kDoubled[code_of(*table, magnitude)]) * table->unit;
    table->left[magnitude] = static_cast<int32_t>(std::nearbyint(nearest / step * kParts) - magnitude * kParts);
  }
  table->has_left = true;
}

struct RowSums {
  int64_t squares = 0, left_squares = 0, changed = 0;
};

// Codes of 32 numbers; whether all of them are what their codes stand for.
ASCEND_V4_INLINE bool convert_group(const int8_t* codes, const GroupTable& table, uint32_t marks, uint8_t* out,
                                    int64_t* squares) {
  alignas(32) uint8_t nibbles[kGroupInputs];
  alignas(32) uint8_t magnitudes[kGroupInputs];
  int32_t sum = 0;
  for (int i = 0; i < kGroupInputs; ++i) {
    const int code = codes[i];
    sum += code * code;
    magnitudes[i] = static_cast<uint8_t>(code < 0 ? -code : code);
  }
  *squares += sum;
  for (int i = 0; i < kGroupInputs; ++i) nibbles[i] = 0;
  for (int code = 0; code + 1 < kCodes; ++code) {
    const uint8_t from = table.from[code];
    for (int i = 0; i < kGroupInputs; ++i) nibbles[i] = static_cast<uint8_t>(nibbles[i] + (magnitudes[i] >= from));
  }
  uint8_t differs = 0;
  if (table.is_whole) {
    const V16 values = load16(table.value);
    for (int half = 0; half < kGroupInputs; half += 16) {
      const V16 off = lookup(values, load16(nibbles + half)) ^ load16(magnitudes + half);
      const W2 any = (W2)off;
      differs |= (any[0] | any[1]) != 0;
    }
  }
  for (int i = 0; i < kGroupInputs; ++i)
    nibbles[i] = static_cast<uint8_t>(nibbles[i] | (codes[i] < 0 && nibbles[i] != 0 ? 8 : 0));
  if (marks != 0)
    for (int i = 0; i < kGroupInputs; ++i) nibbles[i] = static_cast<uint8_t>(nibbles[i] | ((marks >> i) & 1) << 3);
  for (int i = 0; i < kGroupBytes; ++i) out[i] = static_cast<uint8_t>(nibbles[2 * i] | nibbles[2 * i + 1] << 4);
  return table.is_whole && differs == 0;
}

bool marks_a_number(const int8_t* codes, uint32_t marks) {
  for (int i = 0; i < kGroupInputs; ++i)
    if (((marks >> i) & 1) != 0 && codes[i] != 0) return true;
  return false;
}

void add_differences(const int8_t* codes, double scale, GroupTable* table, RowSums* sums) {
  if (!table->has_left) fill_left(scale, table);
  const double step = std::fabs(scale);
  for (int i = 0; i < kGroupInputs; ++i) {
    const int magnitude = codes[i] < 0 ? -codes[i] : codes[i];
    const int64_t left = table->left[magnitude];
    sums->left_squares += left * left;
    sums->changed += static_cast<double>(kDoubled[code_of(*table, magnitude)]) * table->unit != magnitude * step;
  }
}

// One row's group tables by scale byte, made when first met. Rows with more scales make some of them again.
struct RowTables {
  static constexpr int kRoom = 16;
  GroupTable tables[kRoom];
  uint8_t place_of[256];
  int num_made = 0;

  void clear() {
    std::memset(place_of, kRoom, sizeof(place_of));
    num_made = 0;
  }

  GroupTable* of(uint8_t byte, double scale) {
    if (place_of[byte] == kRoom) {
      if (num_made == kRoom) clear();
      place_of[byte] = static_cast<uint8_t>(num_made++);
      fill_table(byte, scale, tables + place_of[byte]);
    }
    return tables + place_of[byte];
  }
};

ASCEND_V4_CLONES bool int8_row_to_fp4(const int8_t* codes, const uint8_t* release_scale, const uint8_t* marked,
                                      int64_t groups, double scale, RowTables* tables, uint8_t* out, RowSums* sums) {
  for (int64_t g = 0; g < groups; ++g) {
    if (release_scale[g] == kNanScale) return false;
    __builtin_prefetch(codes + g * kGroupInputs + kPrefetchBytes);
    uint32_t marks = 0;
    if (marked != nullptr) {
      for (int byte = 0; byte < 4; ++byte) marks |= static_cast<uint32_t>(marked[4 * g + byte]) << (8 * byte);
      if (marks != 0 && marks_a_number(codes + g * kGroupInputs, marks)) return false;
    }
    GroupTable* table = tables->of(release_scale[g], scale);
    if (!convert_group(codes + g * kGroupInputs, *table, marks, out + g * kGroupBytes, &sums->squares))
      add_differences(codes + g * kGroupInputs, scale, table, sums);
  }
  return true;
}

ASCEND_V4_INLINE uint32_t bits_of(uint16_t number) { return static_cast<uint32_t>(number) << 16; }
ASCEND_V4_INLINE uint32_t bits_of(uint32_t number) { return number; }

// Whether 32 numbers over their group's unit are all FP4 numbers, and their codes. The unit is the product of two powers
// of two, each of which float32 has.
template <class T>
ASCEND_V4_INLINE bool encode_group(const T* numbers, float first, float second, uint8_t* out) {
  alignas(64) uint32_t nibbles[kGroupInputs];
  uint32_t wrong = 0;
#pragma omp simd reduction(| : wrong)
  for (int i = 0; i < kGroupInputs; ++i) {
    const uint32_t bits = bits_of(numbers[i]), without_sign = bits & 0x7fffffff;
    float magnitude;
    std::memcpy(&magnitude, &without_sign, sizeof(magnitude));
    magnitude = magnitude * first * second;
    // How many of 1 2 3 4 6 8 12 it reaches, and what these add up to.
    const int ones = (magnitude >= 1) + (magnitude >= 2) + (magnitude >= 3) + (magnitude >= 4);
    const int twos = (magnitude >= 6) + (magnitude >= 8), four = magnitude >= 12;
    const int code = ones + twos + four;
    const float value = static_cast<float>(ones + 2 * twos + 4 * four);
    // The second part: a number that the unit makes vanish.
    wrong |= static_cast<uint32_t>(!(value == magnitude)) | static_cast<uint32_t>((without_sign != 0) & (code == 0));
    nibbles[i] = static_cast<uint32_t>(code) | (bits >> 28 & 8);
  }
#pragma omp simd
  for (int i = 0; i < kGroupBytes; ++i) out[i] = static_cast<uint8_t>(nibbles[2 * i] | nibbles[2 * i + 1] << 4);
  return wrong == 0;
}

template <class T>
ASCEND_V4_INLINE bool encode_row(const T* numbers, const uint8_t* scale, int64_t groups, uint8_t* out) {
  for (int64_t g = 0; g < groups; ++g) {
    if (scale[g] == kNanScale) return false;
    for (size_t byte = 0; byte < kGroupInputs * sizeof(T); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(numbers + g * kGroupInputs) + byte + kPrefetchBytes);
    const int power = 128 - scale[g], half = power / 2;
    const float first = static_cast<float>(power_of_two(half)), second = static_cast<float>(power_of_two(power - half));
    if (!encode_group(numbers + g * kGroupInputs, first, second, out + g * kGroupBytes)) return false;
  }
  return true;
}

ASCEND_V4_CLONES bool encode_bf16_row(const uint16_t* numbers, const uint8_t* scale, int64_t groups, uint8_t* out) {
  return encode_row(numbers, scale, groups, out);
}

ASCEND_V4_CLONES bool encode_float32_row(const uint32_t* numbers, const uint8_t* scale, int64_t groups, uint8_t* out) {
  return encode_row(numbers, scale, groups, out);
}

// Whether up to 128 numbers over their block's unit are all E4M3 numbers, and their codes; the unit as above.
template <class T>
ASCEND_V4_INLINE bool encode_block(const T* numbers, int64_t count, float first, float second, uint8_t* out) {
  constexpr float kSmallestNormal = 0x1p-6f, kLargest = 448.0f, kSmallSteps = 512.0f;
  uint32_t wrong = 0;
#pragma omp simd reduction(| : wrong)
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(numbers[i]), without_sign = bits & 0x7fffffff;
    float magnitude;
    std::memcpy(&magnitude, &without_sign, sizeof(magnitude));
    magnitude = magnitude * first * second;
    uint32_t scaled;
    std::memcpy(&scaled, &magnitude, sizeof(scaled));
    const bool is_small = magnitude < kSmallestNormal;
    const float steps = is_small ? magnitude * kSmallSteps : 0.0f;
    const int32_t small = static_cast<int32_t>(steps);
    const uint32_t code = is_small ? static_cast<uint32_t>(small) : (scaled >> 20) - (120u << 3);
    const bool holds = is_small ? static_cast<float>(small) == steps : (scaled & 0xfffff) == 0;
    wrong |= static_cast<uint32_t>(!(holds & (magnitude <= kLargest))) |
             static_cast<uint32_t>((without_sign != 0) & (code == 0));
    out[i] = static_cast<uint8_t>(code | (bits >> 24 & 0x80));
  }
  return wrong == 0;
}

template <class T>
ASCEND_V4_INLINE bool encode_blocks(const T* numbers, const uint8_t* scale, int64_t inputs, uint8_t* out) {
  for (int64_t k = 0, block = 0; k < inputs; k += kBlock, ++block) {
    if (scale[block] == kNanScale) return false;
    for (size_t byte = 0; byte < kBlock * sizeof(T); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(numbers + k) + byte + kPrefetchBytes);
    const int power = 127 - scale[block], half = power / 2;
    const float first = static_cast<float>(power_of_two(half)), second = static_cast<float>(power_of_two(power - half));
    if (!encode_block(numbers + k, inputs - k < kBlock ? inputs - k : kBlock, first, second, out + k)) return false;
  }
  return true;
}

ASCEND_V4_CLONES bool encode_bf16_blocks(const uint16_t* numbers, const uint8_t* scale, int64_t inputs, uint8_t* out) {
  return encode_blocks(numbers, scale, inputs, out);
}

ASCEND_V4_CLONES bool encode_float32_blocks(const uint32_t* numbers, const uint8_t* scale, int64_t inputs,
                                            uint8_t* out) {
  return encode_blocks(numbers, scale, inputs, out);
}

// Scale bytes of groups; false where one holds what no scale reaches.
template <class T>
ASCEND_V4_INLINE bool derive_row(const T* numbers, int64_t groups, uint8_t* out) {
  bool sound = true;
  for (int64_t g = 0; g < groups; ++g) {
    uint32_t largest = 0;
    for (int i = 0; i < kGroupInputs; ++i) {
      const uint32_t without_sign = bits_of(numbers[g * kGroupInputs + i]) & 0x7fffffff;
      largest = without_sign > largest ? without_sign : largest;
    }
    // 6 is 1.5 * 2^2. A float32 number below 2^-126 needs no scale above the smallest.
    const int above = (largest & 0x7fffff) > kHalfFraction;
    const int byte = static_cast<int>(largest >> 23) - 2 + above;
    sound &= largest < kInfinity;
    out[g] = largest == 0 ? kUnitScale : static_cast<uint8_t>(byte < 0 ? 0 : byte);
  }
  return sound;
}

ASCEND_V4_CLONES bool derive_bf16_row(const uint16_t* numbers, int64_t groups, uint8_t* out) {
  return derive_row(numbers, groups, out);
}

ASCEND_V4_CLONES bool derive_float32_row(const uint32_t* numbers, int64_t groups, uint8_t* out) {
  return derive_row(numbers, groups, out);
}

}  // namespace

extern "C" {

// codes [rows, inputs]; scale [rows]; release_scale [rows, inputs / 32] E8M0; marked [rows, inputs / 8] or null; out
// [rows, inputs / 2]; stats [6]. problem: -1, or a row that cannot be converted; then out is unfinished.
void ascend_v4_int8_to_fp4(const int8_t* codes, const float* scale, const uint8_t* release_scale,
                           const uint8_t* marked, int64_t rows, int64_t inputs, uint8_t* out, double* stats,
                           int64_t* problem) {
  const int64_t groups = inputs / kGroupInputs;
  for (int i = 0; i < kStats; ++i) stats[i] = 0;
  *problem = -1;
  RowTables tables;
  for (int64_t n = 0; n < rows; ++n) {
    const double step = static_cast<double>(scale[n]);
    RowSums sums;
    tables.clear();
    const uint8_t* row_marks = marked == nullptr ? nullptr : marked + n * (inputs / 8);
    if (!std::isfinite(scale[n]) || scale[n] <= 0 ||
        !int8_row_to_fp4(codes + n * inputs, release_scale + n * groups, row_marks, groups, step, &tables,
                         out + n * (inputs / 2), &sums)) {
      *problem = n;
      return;
    }
    const double unit = step * step;
    stats[0] += 1;
    stats[1] += sums.changed == 0;
    stats[2] += static_cast<double>(sums.changed);
    stats[3] += static_cast<double>(sums.left_squares) / (kParts * kParts) * unit;
    stats[4] += static_cast<double>(sums.squares) * unit;
  }
}

// weight [rows, inputs] bfloat16 or float32; scale [rows, inputs / 32] E8M0; the rest as above.
void ascend_v4_real_to_fp4(const void* weight, int64_t is_float32, const uint8_t* scale, int64_t rows, int64_t inputs,
                           uint8_t* out, int64_t* problem) {
  const int64_t groups = inputs / kGroupInputs;
  *problem = -1;
  for (int64_t n = 0; n < rows; ++n) {
    const uint8_t* row_scale = scale + n * groups;
    uint8_t* to = out + n * (inputs / 2);
    const bool sound =
        is_float32 ? encode_float32_row(static_cast<const uint32_t*>(weight) + n * inputs, row_scale, groups, to)
                   : encode_bf16_row(static_cast<const uint16_t*>(weight) + n * inputs, row_scale, groups, to);
    if (!sound) {
      *problem = n;
      return;
    }
  }
}

// weight as above, rows first_row and on of a tensor; scale [.., ceil(inputs / 128)] E8M0 of the whole tensor; out
// [rows, inputs].
void ascend_v4_real_to_fp8(const void* weight, int64_t is_float32, const uint8_t* scale, int64_t rows, int64_t inputs,
                           int64_t first_row, uint8_t* out, int64_t* problem) {
  const int64_t blocks = (inputs + kBlock - 1) / kBlock;
  *problem = -1;
  for (int64_t n = 0; n < rows; ++n) {
    const uint8_t* row_scale = scale + (first_row + n) / kBlock * blocks;
    uint8_t* to = out + n * inputs;
    const bool sound =
        is_float32 ? encode_float32_blocks(static_cast<const uint32_t*>(weight) + n * inputs, row_scale, inputs, to)
                   : encode_bf16_blocks(static_cast<const uint16_t*>(weight) + n * inputs, row_scale, inputs, to);
    if (!sound) {
      *problem = n;
      return;
    }
  }
}

// weight as above; out [rows, inputs / 32] E8M0.
void ascend_v4_derive_fp4_scale(const void* weight, int64_t is_float32, int64_t rows, int64_t inputs, uint8_t* out,
                                int64_t* problem) {
  const int64_t groups = inputs / kGroupInputs;
  *problem = -1;
  for (int64_t n = 0; n < rows; ++n) {
    const bool sound =
        is_float32 ? derive_float32_row(static_cast<const uint32_t*>(weight) + n * inputs, groups, out + n * groups)
                   : derive_bf16_row(static_cast<const uint16_t*>(weight) + n * inputs, groups, out + n * groups);
    if (!sound) {
      *problem = n;
      return;
    }
  }
}

}  // extern "C"
