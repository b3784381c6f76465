// Routing and the clamped SwiGLU for the few float32 rows of a decoding step. Source: reference/model.md 2.7.
// In torch they are nine and seven kernels whose launches cost more than their work.

#include <cmath>
#include <cstdint>

namespace {

float softplus(float value) { return value > 20.0f ? value : std::log1p(std::exp(value)); }

}  // namespace

extern "C" {

// logits [tokens, experts]; bias [experts] or null. Writes the ids of the best `chosen` experts of each token, best
// first, equal ones lowest id first, and their weights, which sum to `scaling`. scratch [2 * experts].
void ascend_v4_route(const float* logits, const float* bias, int64_t tokens, int64_t experts, int64_t chosen,
                     float scaling, float* scratch, float* weights, int32_t* ids) {
  float* score = scratch;
  float* rank = scratch + experts;
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t e = 0; e < experts; ++e) {
      score[e] = std::sqrt(softplus(logits[token * experts + e]));
      rank[e] = bias == nullptr ? score[e] : score[e] + bias[e];
    }
    float total = 0.0f;
    for (int64_t k = 0; k < chosen; ++k) {
      int64_t best = -1;
      for (int64_t e = 0; e < experts; ++e) {
        bool taken = false;
        for (int64_t j = 0; j < k; ++j) taken |= ids[token * chosen + j] == e;
        if (!taken && (best < 0 || rank[e] > rank[best])) best = e;
      }
      ids[token * chosen + k] = static_cast<int32_t>(best);
      weights[token * chosen + k] = score[best];
      total += score[best];
    }
    for (int64_t k = 0; k < chosen; ++k)
      weights[token * chosen + k] = weights[token * chosen + k] / total * scaling;
  }
}

// gate_up [rows, 2 * width], gate first; row_weight [rows] or null; out [rows, width].
void ascend_v4_clamped_swiglu(const float* gate_up, const float* row_weight, int64_t rows, int64_t width, float limit,
                              float* out) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* gates = gate_up + row * 2 * width;
    const float* ups = gates + width;
    const float weight = row_weight == nullptr ? 1.0f : row_weight[row];
    for (int64_t i = 0; i < width; ++i) {
      const float gate = gates[i] > limit ? limit : gates[i];
      const float up = ups[i] > limit ? limit : (ups[i] < -limit ? -limit : ups[i]);
      out[row * width + i] = gate / (1.0f + std::exp(-gate)) * up * weight;
    }
  }
}

}  // extern "C"
