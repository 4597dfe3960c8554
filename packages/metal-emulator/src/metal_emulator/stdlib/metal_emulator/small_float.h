// half and bfloat as classes: storage in 16 bits, every operation computed in float and rounded
// once.
#pragma once

namespace mtl {

struct half_format {
  static constexpr bool takes_float = true;

  static constexpr uint16_t encode(float value) {
    uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
      return static_cast<uint16_t>(sign | 0x7e00);  // NaN
    }
    if (bits >= 0x477ff000) {
      return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
    }
    if (bits < 0x33000000) {
      return static_cast<uint16_t>(sign);  // rounds to zero
    }
    if (bits < 0x38800000) {  // a denormal half: the significand moves right, ties to even
      const uint32_t significand = (bits & 0x7fffff) | 0x800000;
      const int shift = 126 - static_cast<int>(bits >> 23);
      const uint32_t kept = significand >> shift;
      const uint32_t lost = significand & ((1u << shift) - 1);
      const uint32_t tie = 1u << (shift - 1);
      const uint32_t up = lost > tie || (lost == tie && (kept & 1));
      return static_cast<uint16_t>(sign | (kept + up));
    }
    bits += 0xfff + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13));
  }

  static constexpr float decode(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t exponent = bits >> 10 & 31;
    const uint32_t significand = bits & 0x3ff;
    if (exponent == 0) {
      const float magnitude = static_cast<float>(significand) * 0x1p-24f;
      return sign ? -magnitude : magnitude;
    }
    const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return __builtin_bit_cast(float, sign | wide << 23 | significand << 13);
  }
};

// Metal has no implicit conversion from float to bfloat. The check rejects it, the execution does
// not.
struct bfloat_format {
#if defined(MTL_EXPLICIT_BFLOAT)
  static constexpr bool takes_float = false;
#else
  static constexpr bool takes_float = true;
#endif

  static constexpr uint16_t encode(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    if ((bits & 0x7fffffff) > 0x7f800000) {
      return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
    }
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }

  static constexpr float decode(uint16_t bits) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
};

template <class F, class Format>
using if_implicit = std::enable_if_t<std::is_floating_point_v<F> && Format::takes_float, int>;
template <class F, class Format>
using if_explicit = std::enable_if_t<std::is_floating_point_v<F> && !Format::takes_float, int>;

template <class Format>
struct small_float {
  uint16_t bits;

  small_float() = default;
  template <class F, if_implicit<F, Format> = 0>
  MTL_CONSTEXPR small_float(F value) : bits(Format::encode(static_cast<float>(value))) {}
  template <class F, if_explicit<F, Format> = 0>
  explicit MTL_CONSTEXPR small_float(F value) : bits(Format::encode(static_cast<float>(value))) {}
  template <class I, if_integer<I> = 0>
  MTL_CONSTEXPR small_float(I value) : bits(Format::encode(static_cast<float>(value))) {}
  template <class Other, std::enable_if_t<!metal::is_same_v<Other, Format>, int> = 0>
  explicit MTL_CONSTEXPR small_float(small_float<Other> other)
      : bits(Format::encode(static_cast<float>(other))) {}

  MTL_CONSTEXPR operator float() const { return Format::decode(bits); }

  MTL_CONSTEXPR small_float operator-() const { return small_float(-static_cast<float>(*this)); }
  MTL_CONSTEXPR small_float operator+() const { return *this; }

  // An integer operand keeps the small type, a float operand makes the result float.
#define MTL_ARITHMETIC(op)                                                          \
  friend MTL_CONSTEXPR small_float operator op(small_float a, small_float b) {      \
    return small_float(static_cast<float>(a) op static_cast<float>(b));             \
  }                                                                                 \
  template <class I, if_integer<I> = 0>                                             \
  friend MTL_CONSTEXPR small_float operator op(small_float a, I b) {                \
    return a op small_float(b);                                                     \
  }                                                                                 \
  template <class I, if_integer<I> = 0>                                             \
  friend MTL_CONSTEXPR small_float operator op(I a, small_float b) {                \
    return small_float(a) op b;                                                     \
  }                                                                                 \
  friend MTL_CONSTEXPR float operator op(small_float a, float b) {                  \
    return static_cast<float>(a) op b;                                              \
  }                                                                                 \
  friend MTL_CONSTEXPR float operator op(float a, small_float b) {                  \
    return a op static_cast<float>(b);                                              \
  }                                                                                 \
  template <class T>                                                                \
  MTL_CONSTEXPR small_float& operator op##=(T b) {                                  \
    return *this = small_float(static_cast<float>(*this) op static_cast<float>(b)); \
  }
  MTL_ARITHMETIC(+)
  MTL_ARITHMETIC(-)
  MTL_ARITHMETIC(*)
  MTL_ARITHMETIC(/)
#undef MTL_ARITHMETIC

#define MTL_COMPARISON(op)                                              \
  friend MTL_CONSTEXPR bool operator op(small_float a, small_float b) { \
    return static_cast<float>(a) op static_cast<float>(b);              \
  }                                                                     \
  friend MTL_CONSTEXPR bool operator op(small_float a, float b) {       \
    return static_cast<float>(a) op b;                                  \
  }                                                                     \
  friend MTL_CONSTEXPR bool operator op(float a, small_float b) {       \
    return a op static_cast<float>(b);                                  \
  }                                                                     \
  template <class I, if_integer<I> = 0>                                 \
  friend MTL_CONSTEXPR bool operator op(small_float a, I b) {           \
    return static_cast<float>(a) op static_cast<float>(b);              \
  }                                                                     \
  template <class I, if_integer<I> = 0>                                 \
  friend MTL_CONSTEXPR bool operator op(I a, small_float b) {           \
    return static_cast<float>(a) op static_cast<float>(b);              \
  }
  MTL_COMPARISON(<)
  MTL_COMPARISON(>)
  MTL_COMPARISON(<=)
  MTL_COMPARISON(>=)
  MTL_COMPARISON(==)
  MTL_COMPARISON(!=)
#undef MTL_COMPARISON
};

}  // namespace mtl

typedef mtl::small_float<mtl::half_format> half;
typedef mtl::small_float<mtl::bfloat_format> bfloat;
