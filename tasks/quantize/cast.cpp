// BF16 to E4M3 with one scale, and what the rounding cost: one pass over the weight.
//
// Exact: the quotient is IEEE float32, rounded to nearest even, so the bytes are those of `(w.float() / scale).to(e4m3)`.
// Beyond +-448 it saturates, where that expression gives NaN. Loops are plain C++ that g++ vectorises.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr size_t kBlock = 4096;  // elements whose squares are summed in float32 before they go to float64

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

}  // namespace

extern "C" {

struct Sums {
  double signal;     // sum of w^2
  double noise;      // sum of (w - scale * e4m3(w / scale))^2
  uint64_t clipped;  // |w| > 448 * scale
};

// Largest |w| as BF16 bits; 0x7f80 and above mean that an element is Inf or NaN.
__attribute__((visibility("default"))) uint32_t kilotok_amax(const uint16_t* w, size_t n) {
  uint16_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (size_t i = 0; i < n; ++i) {
    uint16_t magnitude = w[i] & 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

__attribute__((visibility("default"))) void kilotok_cast(const uint16_t* w, uint8_t* out, size_t n, float scale, Sums* sums) {
  for (size_t start = 0; start < n; start += kBlock) {
    size_t stop = start + kBlock < n ? start + kBlock : n;
    float signal = 0, noise = 0;
    uint32_t clipped = 0;
#pragma omp simd reduction(+ : signal, noise, clipped)
    for (size_t i = start; i < stop; ++i) {
      uint32_t bits = static_cast<uint32_t>(w[i]) << 16;
      float x = as_float(bits & 0x7fffffffu);
      float y = x / scale;
      clipped += y > 448.0f ? 1u : 0u;
      y = y > 448.0f ? 448.0f : y;
      uint32_t rounded = as_bits(y) + 0x7ffffu + ((as_bits(y) >> 20) & 1u);  // 3 mantissa bits, ties to even
      float shifted = y + 16384.0f;  // 2^14: its last bit is 2^-9, the step of E4M3's subnormals
      bool normal = y >= 0.015625f;
      uint32_t code = normal ? (rounded >> 20) - (120u << 3) : as_bits(shifted) & 0xffu;
      float q = normal ? as_float(rounded & ~0xfffffu) : shifted - 16384.0f;
      float error = x - q * scale;
      signal += x * x;
      noise += error * error;
      out[i] = static_cast<uint8_t>(code | (bits >> 24 & 0x80u));
    }
    sums->signal += signal;
    sums->noise += noise;
    sums->clipped += clipped;
  }
}
}
