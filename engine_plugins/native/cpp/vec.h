// Sixteen float lanes on AVX2 (two registers) or AVX-512 (one), and the formats' bit tricks.
//
// What it is: the only file with intrinsics. Every function gives the same bits on both paths: sums go lane by lane and lanes
// are added in one fixed order, so a bundle answers the same on every machine.
// What it refuses to be: a vector library.
// Run it: compiled by engine_plugins/native/compiler.py, once per path, in namespace kilotok_avx2 / kilotok_avx512.
//
// FP8 decode: E4M3 s.eeee.mmm moved into FP16 s.0eeee.mmm0000000 is the value times 2^-8, subnormals included; F16C does the
// rest. The 2^8 sits in the matrix's scale. FP8 weights come as 16-bit words of two inputs for one output lane.
//
// With AVX512-BF16 two inputs are multiplied at once: E4M3 is exact in BF16, and the instruction adds the odd product, rounds,
// adds the even product, rounds. The other paths add in that order too, which keeps the bits the same.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "engine.h"

namespace KILOTOK_NAMESPACE {
using namespace kilotok;

#define KT_INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__
constexpr int kMaxTileRows = 8;
constexpr bool kWide = true;
using V = __m512;
using Register = __m512;
constexpr int kRegisters = 1;  // of one V
KT_INLINE V vzero() { return _mm512_setzero_ps(); }
KT_INLINE V vset1(float x) { return _mm512_set1_ps(x); }
KT_INLINE V vload(const float* p) { return _mm512_loadu_ps(p); }
KT_INLINE void vstore(float* p, V x) { _mm512_storeu_ps(p, x); }
KT_INLINE V vadd(V a, V b) { return _mm512_add_ps(a, b); }
KT_INLINE V vsub(V a, V b) { return _mm512_sub_ps(a, b); }
KT_INLINE V vmul(V a, V b) { return _mm512_mul_ps(a, b); }
KT_INLINE V vdiv(V a, V b) { return _mm512_div_ps(a, b); }
KT_INLINE V vmax(V a, V b) { return _mm512_max_ps(a, b); }
KT_INLINE V vmin(V a, V b) { return _mm512_min_ps(a, b); }
KT_INLINE V vfma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
KT_INLINE V vround(V a) { return _mm512_roundscale_ps(a, 8); }
KT_INLINE __m256 vlow(V x) { return _mm512_castps512_ps256(x); }
KT_INLINE __m256 vhigh(V x) { return _mm512_extractf32x8_ps(x, 1); }
KT_INLINE V vlanes(V x, int low, int high, float other) {  // lanes low .. high of x, `other` elsewhere
  const int upto = high < 0 ? 0 : high > 14 ? 0xFFFF : (2 << high) - 1, below = low < 1 ? 0 : low > 15 ? 0xFFFF : (1 << low) - 1;
  return _mm512_mask_mov_ps(_mm512_set1_ps(other), (__mmask16)(upto & ~below), x);
}
KT_INLINE V vpow2(V n) {  // 2^n for integral n in -126..127
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
KT_INLINE V vbf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
KT_INLINE void vsplit(V x, Register* to) { to[0] = x; }
KT_INLINE V vjoin(const Register* from) { return from[0]; }
KT_INLINE V vjoin_rounded(const Register* from) { return from[0]; }
KT_INLINE void vmac(Register* sum, const float* x, const Register* w) { sum[0] = vfma(vset1(*x), w[0], sum[0]); }
// Sixteen weights: of the even or of the odd input of a pair.
KT_INLINE void vdecode_fp8(const uint8_t* p, bool odd, Register* to) {
  __m256i word = _mm256_loadu_si256((const __m256i*)p);
  if (!odd) word = _mm256_slli_epi16(word, 8);
  to[0] = _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(word, 1), _mm256_set1_epi16((short)0xBF80)));
}
KT_INLINE void vdecode_rounded(const uint8_t* p, bool odd, Register* to) { vdecode_fp8(p, odd, to); }
KT_INLINE V vhalf_bf16(__m512i word, bool odd) {
  return _mm512_castsi512_ps(odd ? _mm512_and_si512(word, _mm512_set1_epi32((int)0xFFFF0000)) : _mm512_slli_epi32(word, 16));
}
KT_INLINE void vdecode_bf16(const uint8_t* p, bool odd, Register* to) { to[0] = vhalf_bf16(_mm512_loadu_si512(p), odd); }
KT_INLINE V vround_e4m3(V x) {  // to the E4M3 grid, nearest even; |x| <= 448 already
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
  __m512i moved = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFFF)), odd);
  V normal = _mm512_castsi512_ps(_mm512_and_si512(moved, _mm512_set1_epi32((int)0xFFF00000)));
  V tiny = _mm512_sub_ps(_mm512_add_ps(x, _mm512_set1_ps(24576.0f)), _mm512_set1_ps(24576.0f));  // steps of 2^-9
  __mmask16 small = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(0.015625f), _CMP_LT_OQ);
  return _mm512_mask_blend_ps(small, normal, tiny);
}
#else
constexpr int kMaxTileRows = 4;
constexpr bool kWide = false;
struct V {
  __m256 a, b;
};
using Register = __m256;
constexpr int kRegisters = 2;
KT_INLINE V vzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
KT_INLINE V vset1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
KT_INLINE V vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
KT_INLINE void vstore(float* p, V x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
KT_INLINE V vadd(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
KT_INLINE V vsub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
KT_INLINE V vmul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
KT_INLINE V vdiv(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
KT_INLINE V vmax(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
KT_INLINE V vmin(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
KT_INLINE V vfma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
KT_INLINE V vround(V x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
KT_INLINE __m256 vlow(V x) { return x.a; }
KT_INLINE __m256 vhigh(V x) { return x.b; }
KT_INLINE __m256 half_lanes(__m256 x, int low, int high, float other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), lane), _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(high)));
  return _mm256_blendv_ps(x, _mm256_set1_ps(other), _mm256_castsi256_ps(outside));
}
KT_INLINE V vlanes(V x, int low, int high, float other) {  // lanes low .. high of x, `other` elsewhere
  return {half_lanes(x.a, low, high, other), half_lanes(x.b, low - 8, high - 8, other)};
}
KT_INLINE __m256 half_pow2(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
KT_INLINE V vpow2(V n) { return {half_pow2(n.a), half_pow2(n.b)}; }
KT_INLINE __m256 half_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
KT_INLINE V vbf16(const uint16_t* p) { return {half_bf16(p), half_bf16(p + 8)}; }
KT_INLINE void vsplit(V x, Register* to) { to[0] = x.a, to[1] = x.b; }
KT_INLINE V vjoin(const Register* from) { return {from[0], from[1]}; }
KT_INLINE void vmac(Register* sum, const float* x, const Register* w) {
  const __m256 input = _mm256_broadcast_ss(x);
  sum[0] = _mm256_fmadd_ps(input, w[0], sum[0]);
  sum[1] = _mm256_fmadd_ps(input, w[1], sum[1]);
}
KT_INLINE void vdecode_fp8(const uint8_t* p, bool odd, Register* to) {
  __m256i word = _mm256_loadu_si256((const __m256i*)p);
  if (!odd) word = _mm256_slli_epi16(word, 8);
  word = _mm256_and_si256(_mm256_srai_epi16(word, 1), _mm256_set1_epi16((short)0xBF80));
  to[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(word)), to[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(word, 1));
}
// Faster where all products are of E4M3 values: the code's bits as BF16 are the value times 2^-120, in float's subnormals too, and
// sums of such products stay exact there. Register 0 has the even lanes, 1 the odd ones; vjoin_rounded undoes both.
KT_INLINE void vdecode_rounded(const uint8_t* p, bool odd, Register* to) {
  __m256i word = _mm256_loadu_si256((const __m256i*)p);
  if (!odd) word = _mm256_slli_epi16(word, 8);
  word = _mm256_and_si256(_mm256_srai_epi16(word, 4), _mm256_set1_epi16((short)0x87F0));
  to[0] = _mm256_castsi256_ps(_mm256_slli_epi32(word, 16));
  to[1] = _mm256_castsi256_ps(_mm256_and_si256(word, _mm256_set1_epi32((int)0xFFFF0000)));
}
KT_INLINE V vjoin_rounded(const Register* from) {
  const __m256 up = _mm256_set1_ps(5.192296858534828e33f);  // 2^112: what is left is 2^-8, as with the other decode
  const __m256 low = _mm256_unpacklo_ps(from[0], from[1]), high = _mm256_unpackhi_ps(from[0], from[1]);
  return {_mm256_mul_ps(_mm256_permute2f128_ps(low, high, 0x20), up), _mm256_mul_ps(_mm256_permute2f128_ps(low, high, 0x31), up)};
}
KT_INLINE void vdecode_bf16(const uint8_t* p, bool odd, Register* to) {
  for (int i = 0; i < 2; ++i) {
    const __m256i word = _mm256_loadu_si256((const __m256i*)(p + 32 * i));
    to[i] = _mm256_castsi256_ps(odd ? _mm256_and_si256(word, _mm256_set1_epi32((int)0xFFFF0000)) : _mm256_slli_epi32(word, 16));
  }
}
KT_INLINE __m256 half_round_e4m3(__m256 x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  __m256i moved = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFFF)), odd);
  __m256 normal = _mm256_castsi256_ps(_mm256_and_si256(moved, _mm256_set1_epi32((int)0xFFF00000)));
  __m256 tiny = _mm256_sub_ps(_mm256_add_ps(x, _mm256_set1_ps(24576.0f)), _mm256_set1_ps(24576.0f));
  __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
  return _mm256_blendv_ps(normal, tiny, _mm256_cmp_ps(size, _mm256_set1_ps(0.015625f), _CMP_LT_OQ));
}
KT_INLINE V vround_e4m3(V x) { return {half_round_e4m3(x.a), half_round_e4m3(x.b)}; }
#endif

// A row of E4M3 values: fp32, or BF16 pairs in the first half of the row where two inputs are multiplied at once.
#ifdef __AVX512BF16__
constexpr bool kDot = true;
KT_INLINE void vstore_rounded(float* row, int at, V x) {
  const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(x), 16);
  _mm256_storeu_si256((__m256i*)((uint16_t*)row + at), _mm512_cvtepi32_epi16(high));
}

// BF16 of the 128 positive E4M3 codes times 2^-8, as two tables of bytes: 64 codes to a register.
struct DotBytes {
  alignas(64) uint8_t high[128], low[128];
};
constexpr DotBytes make_dot_bytes() {
  constexpr int subnormal[8] = {0, 0x3700, 0x3780, 0x37C0, 0x3800, 0x3820, 0x3840, 0x3860};  // code x 2^-17
  DotBytes out{};
  for (int code = 0; code < 128; ++code) {
    const int bits = code < 8 ? subnormal[code] : 0x3800 | code << 4;
    out.high[code] = (uint8_t)(bits >> 8), out.low[code] = (uint8_t)bits;
  }
  return out;
}
static constexpr DotBytes kDotBytes = make_dot_bytes();
struct DotTables {
  __m512i high[2], low[2];
};
KT_INLINE DotTables dot_tables() {
  const DotBytes& t = kDotBytes;
  return {{_mm512_load_si512(t.high), _mm512_load_si512(t.high + 64)}, {_mm512_load_si512(t.low), _mm512_load_si512(t.low + 64)}};
}
KT_INLINE void vdecode_dot(const DotTables& t, __m512i codes, __m512bh& first, __m512bh& second) {  // two pairs of inputs
  codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), codes);
  __m512i high = _mm512_permutex2var_epi8(t.high[0], codes, t.high[1]);
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8((char)0x80), 0xF8);  // high | (codes & sign)
  const __m512i low = _mm512_permutex2var_epi8(t.low[0], codes, t.low[1]);
  first = (__m512bh)_mm512_unpacklo_epi8(low, high);
  second = (__m512bh)_mm512_unpackhi_epi8(low, high);
}
KT_INLINE V vhalf_bf16(__m512bh pairs, bool odd) { return vhalf_bf16((__m512i)pairs, odd); }
#else
constexpr bool kDot = false;
KT_INLINE void vstore_rounded(float* row, int at, V x) { vstore(row + at, x); }
#endif

// Lanes are joined in one fixed order: halves, quarters, pairs.
KT_INLINE float vsum(V x) {
  const __m256 eight = _mm256_add_ps(vlow(x), vhigh(x));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

KT_INLINE float vmax_lane(V x) {
  const __m256 eight = _mm256_max_ps(vlow(x), vhigh(x));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// exp with about 1 ulp: 2^n times a degree-6 polynomial (Cephes). Below -87 it gives 0 exactly.
KT_INLINE V vexp(V x) {
  const V low = vset1(-87.0f);
  V clamped = vmin(vmax(x, low), vset1(88.0f));
  V n = vround(vmul(clamped, vset1(1.44269504088896341f)));
  V r = vfma(n, vset1(-0.693359375f), clamped);
  r = vfma(n, vset1(2.12194440e-4f), r);
  V p = vset1(1.9875691500e-4f);
  p = vfma(p, r, vset1(1.3981999507e-3f));
  p = vfma(p, r, vset1(8.3334519073e-3f));
  p = vfma(p, r, vset1(4.1665795894e-2f));
  p = vfma(p, r, vset1(1.6666665459e-1f));
  p = vfma(p, r, vset1(5.0000001201e-1f));
  p = vadd(vfma(p, vmul(r, r), r), vset1(1.0f));
  return vmul(p, vpow2(n));
}

KT_INLINE V vsilu(V x) { return vdiv(x, vadd(vset1(1.0f), vexp(vsub(vzero(), x)))); }

KT_INLINE V vquantize(V x, float inv_scale) {  // modelopt: clamp(x / scale) to +-448, then to the E4M3 grid
  return vround_e4m3(vmin(vmax(vmul(x, vset1(inv_scale)), vset1(-448.0f)), vset1(448.0f)));
}

// The E4M3 codes of sixteen values that are on the grid already: the decode's way through FP16 backwards.
KT_INLINE void encode_e4m3(const float* x, uint8_t* codes) {
  const __m256 down = _mm256_set1_ps(0.00390625f);
  __m128i half[2];
  for (int i = 0; i < 2; ++i) {
    const __m128i h = _mm256_cvtps_ph(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), down), 0);
    half[i] = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(h, 7), _mm_set1_epi16(0x7F)),
                           _mm_and_si128(_mm_srli_epi16(h, 8), _mm_set1_epi16(0x80)));
  }
  _mm_storeu_si128((__m128i*)codes, _mm_packus_epi16(half[0], half[1]));
}

KT_INLINE uint16_t encode_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Threads write their rows next to each other; loops over lanes need no tail because every buffer is padded to 16.
KT_INLINE int padded(int size) { return (size + kLanes - 1) / kLanes * kLanes; }

}  // namespace KILOTOK_NAMESPACE
