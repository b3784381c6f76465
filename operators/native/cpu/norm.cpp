// RMS norm of float32 rows. torch runs it as six kernels; for the few rows of a decoding step their launches are the cost.

#include <cmath>
#include <cstdint>

#include "simd.h"

extern "C" {

// x and out [rows, width]; weight [width], or null for none. out may be x.
ASCEND_V4_CLONES void ascend_v4_rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t width,
                                         float eps) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* in = x + row * width;
    float* to = out + row * width;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < width; ++i) total += in[i] * in[i];
    const float factor = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
    if (weight != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[i] = in[i] * factor * weight[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[i] = in[i] * factor;
    }
  }
}

}  // extern "C"
