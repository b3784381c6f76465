// FP4 weights to INT8 and INT4 with one scale per row. Source: operators/contracts/transcode.py.
// Every decision about a row needs only how often each of 7 magnitudes stands under each scale byte: one walk counts,
// scales are judged on the counts, a second walk looks the codes up while the row is still in the first cache.

#include "transcode_fp4.h"

namespace {

typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef double D8 __attribute__((vector_size(64)));
typedef int64_t L8 __attribute__((vector_size(64)));

constexpr int kInt8Max = 127, kInt4Max = 7;
constexpr int kBias = 128;  // a doubled E2M1 number times 2^(byte - 128) is the weight
constexpr float kDoubled[8] = {0, 1, 2, 3, 4, 6, 8, 12};
constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits
constexpr int kNumbers = 16;
constexpr double kClipFloor = 1.0 / 1024;

// One row as counts, for scale bytes that have nonzero numbers, rising. Lane m is magnitude m; lane 0 is empty.
struct Row {
  int num_bytes = 0;
  uint8_t bytes[256];
  D8 counts[256];
  D8 values[256];  // times 2^-exponent
  float largest = 0.5f;
  int exponent = 0;
  bool empty = true;
};

// A scale for the row times 2^-exponent, and what it makes of it.
struct Candidate {
  float scale;
  double error;
  int64_t changed;
};

ASCEND_V4_INLINE void unpack(Counts counts, D8* to) {
  D8& lanes = *to;
  lanes[0] = 0;
  for (int field = 0; field < 4; ++field) {
    lanes[2 * field + 1] = static_cast<double>((counts.odd >> (16 * field)) & 0xffff);
    if (field < 3) lanes[2 * field + 2] = static_cast<double>((counts.even >> (16 * field)) & 0xffff);
  }
}

// Reads the counts of bytes low to high and clears them for the next row.
ASCEND_V4_CLONES void gather(Counts* counts, int low, int high, Row* row) {
  row->num_bytes = 0;
  double largest = 0;
  for (int byte = low; byte <= high; ++byte) {
    const Counts found = counts[byte];
    if ((found.odd | found.even) == 0) continue;
    counts[byte] = Counts{0, 0};
    const int index = row->num_bytes++;
    row->bytes[index] = static_cast<uint8_t>(byte);
    unpack(found, &row->counts[index]);
    int top = 7;
    while (row->counts[index][top] == 0) --top;
    const double value = kDoubled[top] * power_of_two(byte - kBias);
    if (value > largest) largest = value;
  }
  row->empty = largest == 0;
  if (row->empty) {
    row->largest = 0.5f;
    row->exponent = 0;
    return;
  }
  uint64_t bits;
  std::memcpy(&bits, &largest, sizeof(bits));
  row->exponent = static_cast<int>(bits >> 52) - 1022;
  row->largest = static_cast<float>(largest * power_of_two(-row->exponent));
  const D8 doubled = {kDoubled[0], kDoubled[1], kDoubled[2], kDoubled[3],
                      kDoubled[4], kDoubled[5], kDoubled[6], kDoubled[7]};
  for (int index = 0; index < row->num_bytes; ++index)
    row->values[index] = doubled * power_of_two(row->bytes[index] - kBias - row->exponent);
}

ASCEND_V4_INLINE double in_order(const D8& lanes, int exponent) {
  double total = 0;
  for (int lane = 1; lane < 8; ++lane) total += lanes[lane];
  return total * power_of_two(2 * exponent);
}

ASCEND_V4_INLINE void round_codes(const D8& values, float scale, float limit, F8* codes) {
  *codes = __builtin_convertvector(values, F8) / scale;
  *codes = (*codes + kRoundingShift) - kRoundingShift;
  *codes = *codes > limit ? *codes - *codes + limit : *codes;
}

ASCEND_V4_INLINE Candidate judged(const Row& row, float scale, int limit) {
  Candidate candidate;
  candidate.scale = in_weights(stored_scale(scale, row.exponent), -row.exponent);
  D8 error = {0, 0, 0, 0, 0, 0, 0, 0};
  D8 changed = error;
  const double wide = candidate.scale;
  for (int index = 0; index < row.num_bytes; ++index) {
    F8 codes;
    round_codes(row.values[index], candidate.scale, limit, &codes);
    const D8 difference = row.values[index] - __builtin_convertvector(codes, D8) * wide;
    error += row.counts[index] * (difference * difference);
    changed += (D8)((L8)row.counts[index] & (difference != 0));
  }
  candidate.error = in_order(error, row.exponent);
  candidate.changed = static_cast<int64_t>(in_order(changed, 0));
  return candidate;
}

ASCEND_V4_INLINE void add_stats(const Row& row, const Candidate& chosen, const Candidate& absmax, double* stats) {
  D8 norm = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int index = 0; index < row.num_bytes; ++index)
    norm += row.counts[index] * (row.values[index] * row.values[index]);
  stats[0] += 1;
  stats[1] += chosen.changed == 0;
  stats[2] += static_cast<double>(chosen.changed);
  stats[3] += chosen.error;
  stats[4] += in_order(norm, row.exponent);
  stats[5] += absmax.error;
}

// The first group whose scale is NaN, or -1; and the span of the scale bytes.
ASCEND_V4_INLINE int64_t scan_scales(const uint8_t* scale, int64_t groups, int* low, int* high) {
  uint8_t least = 255, most = 0;
  for (int64_t g = 0; g < groups; ++g) {
    least = scale[g] < least ? scale[g] : least;
    most = scale[g] > most ? scale[g] : most;
  }
  *low = least;
  *high = most;
  if (most != kNanScale) return -1;
  int64_t g = 0;
  while (scale[g] != kNanScale) ++g;
  return g;
}

// A table of 16 bytes per scale byte of the row: offset + code, times 16 for the high nibbles of packed pairs.
ASCEND_V4_INLINE void fill_tables(const Row& row, float scale, int limit, int offset, int shift, uint8_t* tables) {
  for (int index = 0; index < row.num_bytes; ++index) {
    F8 rounded;
    round_codes(row.values[index], scale, limit, &rounded);
    const I8 codes = __builtin_convertvector(rounded, I8);
    uint8_t* table = tables + kCodes * row.bytes[index];
    for (int m = 0; m < 8; ++m) {
      table[m] = static_cast<uint8_t>(static_cast<uint32_t>(offset + codes[m]) << shift);
      table[m + 8] = static_cast<uint8_t>(static_cast<uint32_t>(offset - codes[m]) << shift);
    }
  }
}

// The power of two of `decide_int8`: the largest magnitude is 0.5 or 0.75, 64 or 96 steps of it, and the next smaller
// step would not fit.
constexpr float kStep = 0x1p-7f;
constexpr int kStepExponent = -7;

// Whether every number of the row is a whole number of steps. False also where the step is below what is stored.
ASCEND_V4_INLINE bool is_whole(const Row& row) {
  return !row.empty && row.bytes[0] - kBias >= row.exponent + kStepExponent &&
         stored_scale(kStep, row.exponent) == in_weights(kStep, row.exponent);
}

ASCEND_V4_CLONES void decide_int8(const Row& row, int exact, uint8_t* tables, float* out_scale, double* stats) {
  const Candidate absmax = judged(row, row.largest / kInt8Max, kInt8Max);
  Candidate chosen = absmax;
  if (exact && is_whole(row)) {
    chosen = Candidate{kStep, 0, 0};
  } else if (exact) {
    const Candidate power = judged(row, kStep, kInt8Max);
    if (power.error <= absmax.error) chosen = power;
  }
  fill_tables(row, chosen.scale, kInt8Max, 0, 0, tables);
  *out_scale = row.empty ? 1.0f : stored_scale(chosen.scale, row.exponent);
  add_stats(row, chosen, absmax, stats);
}

// A number that takes the next code once the scale falls below number / (code + 1/2).
struct Event {
  double number = 0, border = 0;
  int code = 0, odd = 0, power = 0;  // the number is (1 or 3) * 2^-power
};

struct Events {
  Event at[2 * kNumbers * kInt4Max];
  int count = 0;
};

// In falling order of the border, then of the number: the order of the contract's int4_events.
constexpr Events sorted_events() {
  Events events;
  for (int odd = 1; odd <= 3; odd += 2) {
    double number = odd;
    for (int power = 1; power < kNumbers; ++power) {
      number /= 2;
      for (int code = 0; code < kInt4Max && number < 1; ++code) {
        Event event;
        event.number = number;
        event.border = number / (code + 0.5);
        event.code = code;
        event.odd = odd;
        event.power = power;
        if (event.border < kClipFloor) continue;
        int place = events.count++;
        while (place > 0 && (events.at[place - 1].border < event.border ||
                             (events.at[place - 1].border == event.border && events.at[place - 1].number < number))) {
          events.at[place] = events.at[place - 1];
          --place;
        }
        events.at[place] = event;
      }
    }
  }
  return events;
}

constexpr Events kEvents = sorted_events();

// The scale of least squared error among those with which numbers are clipped to INT4 or not.
ASCEND_V4_INLINE float best_int4_scale(const Row& row, float fallback) {
  constexpr int kOdd[8] = {0, 1, 1, 3, 1, 3, 1, 3}, kShift[8] = {0, 0, 1, 0, 2, 1, 3, 2};
  double counts[4][kNumbers] = {};
  for (int index = 0; index < row.num_bytes; ++index)
    for (int m = 1; m < 8; ++m) {
      const int power = row.exponent + kBias - row.bytes[index] - kShift[m];
      if (power < kNumbers && row.counts[index][m] != 0) counts[kOdd[m]][power] += row.counts[index][m];
    }
  double product = 0, square = 0, best = 0, scale = fallback;
  for (int index = 0; index < kEvents.count; ++index) {
    const Event& event = kEvents.at[index];
    const double count = counts[event.odd][event.power];
    if (count == 0) continue;
    product += count * event.number;
    square += count * (2 * event.code + 1);
    const double score = product * product / square;
    if (score > best) {
      best = score;
      scale = product / square;
    }
  }
  return static_cast<float>(scale);
}

ASCEND_V4_CLONES void decide_int4(const Row& row, int shift, uint8_t* tables, float* out_scale, double* stats) {
  const Candidate absmax = judged(row, row.largest / kInt4Max, kInt4Max);
  const Candidate clipped = judged(row, best_int4_scale(row, absmax.scale), kInt4Max);
  const Candidate& chosen = clipped.error <= absmax.error ? clipped : absmax;
  fill_tables(row, chosen.scale, kInt4Max, 8, shift, tables);
  *out_scale = row.empty ? 1.0f : stored_scale(chosen.scale, row.exponent);
  add_stats(row, chosen, absmax, stats);
}

// Two rows' codes, each 8 too high, into one byte; sums of those codes per group.
ASCEND_V4_CLONES void map_pair(const uint8_t* const codes[2], const uint8_t* const scale[2], int64_t groups,
                               const uint8_t* const tables[2], uint8_t* out, int32_t* const sums[2]) {
  for (int64_t g = 0; g < groups; ++g) {
    V16 low[2], high[2];
    for (int half = 0; half < 2; ++half) {
      const V16 table = load16(tables[half] + kCodes * scale[half][g]);
      const V16 pairs = load16(codes[half] + g * kGroupBytes);
      const V16 first = lookup(table, pairs & 15), second = lookup(table, pairs >> 4);
      const W2 sum = byte_sums(half == 0 ? first + second : (first >> 4) + (second >> 4));
      sums[half][g] = static_cast<int32_t>(sum[0] + sum[1]);
      low[half] = interleave_low(first, second);
      high[half] = interleave_high(first, second);
    }
    store16(out + g * kGroupInputs, (low[0] | low[1]) ^ 0x88);
    store16(out + g * kGroupInputs + 16, (high[0] | high[1]) ^ 0x88);
  }
}

// Sum of a part of one row's codes from packed pairs: for parts that do not end with a group.
int64_t sum_codes(const uint8_t* packed, int64_t from, int64_t until, int half) {
  int64_t sum = 0;
  for (int64_t k = from; k < until; ++k) sum += (((packed[k] >> (4 * half)) & 15) ^ 8) - 8;
  return sum;
}

}  // namespace

extern "C" {

// codes [rows, inputs / 2]; scale [rows, inputs / 32] E8M0; out [rows, inputs]; out_scale [rows]; stats [6].
// problem: -1, or row * (inputs / 32) + group of the first NaN scale; then out is unfinished. inputs <= 65504.
void ascend_v4_fp4_to_int8(const uint8_t* codes, const uint8_t* scale, int64_t rows, int64_t inputs, int64_t exact,
                           uint8_t* out, float* out_scale, double* stats, int64_t* problem) {
  const int64_t groups = inputs / kGroupInputs;
  const auto count = has_avx512() ? count_row_avx512 : count_row;
  const auto map = has_avx512() ? map_row_avx512 : map_row;
  Counts counts[256] = {};
  alignas(64) uint8_t tables[256 * kCodes] = {};
  Row row;
  for (int i = 0; i < kStats; ++i) stats[i] = 0;
  *problem = -1;
  for (int64_t n = 0; n < rows; ++n) {
    const uint8_t* row_codes = codes + n * (inputs / 2);
    const uint8_t* row_scale = scale + n * groups;
    int low, high;
    const int64_t bad = scan_scales(row_scale, groups, &low, &high);
    if (bad >= 0) {
      *problem = n * groups + bad;
      return;
    }
    count(row_codes, row_scale, groups, counts);
    gather(counts, low, high, &row);
    decide_int8(row, exact != 0, tables, out_scale + n, stats);
    map(row_codes, row_scale, groups, tables, out + n * inputs);
  }
}

// As above, for an even number of rows. out [rows / 2, inputs]; out_bias [rows, parts]; sums: scratch [2, inputs / 32].
void ascend_v4_fp4_to_int4(const uint8_t* codes, const uint8_t* scale, int64_t rows, int64_t inputs, int64_t parts,
                           uint8_t* out, float* out_scale, float* out_bias, int32_t* sums, double* stats,
                           int64_t* problem) {
  const int64_t groups = inputs / kGroupInputs, part_inputs = inputs / parts;
  const auto count = has_avx512() ? count_row_avx512 : count_row;
  Counts counts[256] = {};
  alignas(64) uint8_t tables[2][256 * kCodes];
  // Code 0 plus 8, for groups without a nonzero number.
  std::memset(tables[0], 0x08, sizeof(tables[0]));
  std::memset(tables[1], 0x80, sizeof(tables[1]));
  Row row;
  for (int i = 0; i < kStats; ++i) stats[i] = 0;
  *problem = -1;
  for (int64_t n = 0; n < rows; n += 2) {
    const uint8_t* row_codes[2] = {codes + n * (inputs / 2), codes + (n + 1) * (inputs / 2)};
    const uint8_t* row_scale[2] = {scale + n * groups, scale + (n + 1) * groups};
    for (int half = 0; half < 2; ++half) {
      int low, high;
      const int64_t bad = scan_scales(row_scale[half], groups, &low, &high);
      if (bad >= 0) {
        *problem = (n + half) * groups + bad;
        return;
      }
      count(row_codes[half], row_scale[half], groups, counts);
      gather(counts, low, high, &row);
      decide_int4(row, 4 * half, tables[half], out_scale + n + half, stats);
    }
    const uint8_t* both_tables[2] = {tables[0], tables[1]};
    int32_t* both_sums[2] = {sums, sums + groups};
    uint8_t* packed = out + n / 2 * inputs;
    map_pair(row_codes, row_scale, groups, both_tables, packed, both_sums);
    for (int half = 0; half < 2; ++half)
      for (int64_t part = 0; part < parts; ++part) {
        int64_t sum = 0;
        if (part_inputs % kGroupInputs == 0) {
          const int64_t part_groups = part_inputs / kGroupInputs;
          for (int64_t g = part * part_groups; g < (part + 1) * part_groups; ++g)
            sum += both_sums[half][g] - 8 * kGroupInputs;
        } else {
          sum = sum_codes(packed, part * part_inputs, (part + 1) * part_inputs, half);
        }
        out_bias[(n + half) * parts + part] =
            static_cast<float>(static_cast<double>(8 * sum) * static_cast<double>(out_scale[n + half]));
      }
  }
}

}  // extern "C"
