// Hyper-connections of float32 streams around one sublayer. Source: reference/model.md 2.2.
// In torch the Sinkhorn passes alone are 120 kernels on a 4 x 4 matrix per token; here a sublayer is two calls.

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace {

constexpr int64_t kMaxStreams = 64;

float sigmoid(float value) { return 1.0f / (1.0f + std::exp(-value)); }

void softmax_rows(float* mix, int64_t streams, float eps) {
  for (int64_t row = 0; row < streams; ++row) {
    float* values = mix + row * streams;
    float peak = values[0];
    for (int64_t column = 1; column < streams; ++column) peak = std::fmax(peak, values[column]);
    float total = 0.0f;
    for (int64_t column = 0; column < streams; ++column) {
      values[column] = std::exp(values[column] - peak);
      total += values[column];
    }
    for (int64_t column = 0; column < streams; ++column) values[column] = values[column] / total + eps;
  }
}

void normalise_columns(float* mix, int64_t streams, float eps) {
  float factors[kMaxStreams];
  for (int64_t column = 0; column < streams; ++column) factors[column] = eps;
  for (int64_t row = 0; row < streams; ++row)
    for (int64_t column = 0; column < streams; ++column) factors[column] += mix[row * streams + column];
  for (int64_t column = 0; column < streams; ++column) factors[column] = 1.0f / factors[column];
  for (int64_t row = 0; row < streams; ++row)
    for (int64_t column = 0; column < streams; ++column) mix[row * streams + column] *= factors[column];
}

void normalise_rows(float* mix, int64_t streams, float eps) {
  for (int64_t row = 0; row < streams; ++row) {
    float total = eps;
    for (int64_t column = 0; column < streams; ++column) total += mix[row * streams + column];
    const float factor = 1.0f / total;
    for (int64_t column = 0; column < streams; ++column) mix[row * streams + column] *= factor;
  }
}

}  // namespace

extern "C" {

// logits [tokens, (2 + streams) * streams]; scale [3]; base [(2 + streams) * streams].
// Writes pre and post [tokens, streams] and mix [tokens, streams, streams]. streams is at most 64.
void ascend_v4_mixing_weights(const float* logits, const float* scale, const float* base, int64_t tokens,
                              int64_t streams, int64_t iterations, float eps, float* pre, float* post, float* mix) {
  const int64_t width = (2 + streams) * streams;
  for (int64_t token = 0; token < tokens; ++token) {
    const float* row = logits + token * width;
    float* square = mix + token * streams * streams;
    for (int64_t j = 0; j < streams; ++j) {
      pre[token * streams + j] = sigmoid(row[j] * scale[0] + base[j]) + eps;
      post[token * streams + j] = 2.0f * sigmoid(row[streams + j] * scale[1] + base[streams + j]);
    }
    for (int64_t j = 0; j < streams * streams; ++j)
      square[j] = row[2 * streams + j] * scale[2] + base[2 * streams + j];
    softmax_rows(square, streams, eps);
    normalise_columns(square, streams, eps);
    for (int64_t pass = 1; pass < iterations; ++pass) {
      normalise_rows(square, streams, eps);
      normalise_columns(square, streams, eps);
    }
  }
}

// streams_in [tokens, width]; fn [rows, width]. logits [tokens, rows] = streams . fn / rms(streams).
ASCEND_V4_CLONES void ascend_v4_mixing_logits(const float* streams_in, const float* fn, int64_t tokens, int64_t rows,
                                              int64_t width, float norm_eps, float* logits) {
  for (int64_t token = 0; token < tokens; ++token) {
    const float* in = streams_in + token * width;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < width; ++i) total += in[i] * in[i];
    const float factor = 1.0f / std::sqrt(total / static_cast<float>(width) + norm_eps);
    for (int64_t row = 0; row < rows; ++row) {
      const float* weights = fn + row * width;
      float product = 0.0f;
#pragma omp simd reduction(+ : product)
      for (int64_t i = 0; i < width; ++i) product += in[i] * weights[i];
      logits[token * rows + row] = product * factor;
    }
  }
}

// x [tokens, hidden]: the streams [tokens, streams, hidden] weighted by pre [tokens, streams].
ASCEND_V4_CLONES void ascend_v4_collapse_streams(const float* streams_in, const float* pre, int64_t tokens,
                                                 int64_t streams, int64_t hidden, float* x) {
  for (int64_t token = 0; token < tokens; ++token) {
    float* to = x + token * hidden;
    for (int64_t i = 0; i < hidden; ++i) to[i] = 0.0f;
    for (int64_t j = 0; j < streams; ++j) {
      const float weight = pre[token * streams + j];
      const float* from = streams_in + (token * streams + j) * hidden;
#pragma omp simd
      for (int64_t i = 0; i < hidden; ++i) to[i] += weight * from[i];
    }
  }
}

// New streams: out[k] = post[k] * output + sum over j of mix[j, k] * streams[j].
ASCEND_V4_CLONES void ascend_v4_spread_output(const float* output, const float* streams_in, const float* post,
                                              const float* mix, int64_t tokens, int64_t streams, int64_t hidden,
                                              float* out) {
  for (int64_t token = 0; token < tokens; ++token) {
    const float* from = output + token * hidden;
    for (int64_t k = 0; k < streams; ++k) {
      float* to = out + (token * streams + k) * hidden;
      const float weight = post[token * streams + k];
#pragma omp simd
      for (int64_t i = 0; i < hidden; ++i) to[i] = weight * from[i];
      for (int64_t j = 0; j < streams; ++j) {
        const float kept = mix[(token * streams + j) * streams + k];
        const float* stream = streams_in + (token * streams + j) * hidden;
#pragma omp simd
        for (int64_t i = 0; i < hidden; ++i) to[i] += kept * stream[i];
      }
    }
  }
}

}  // extern "C"
