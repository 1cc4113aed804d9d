// float16, bfloat16 and tf32 on a machine that has none of them. Rounding is to nearest, ties to even.
#pragma once
#include <cmath>

#include "values.h"

inline float to_float(Bfloat value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

inline Bfloat to_bfloat(float value) {
    if (std::isnan(value)) return {0x7fff};
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t last_kept = bits >> 16 & 1;
    return {static_cast<uint16_t>((bits + 0x7fff + last_kept) >> 16)};
}

inline float to_float(Half value) {
    const int exponent = value.bits >> 10 & 31;
    const int fraction = value.bits & 1023;
    float size;
    if (exponent == 31) size = fraction ? NAN : INFINITY;
    else if (exponent == 0) size = std::ldexp(static_cast<float>(fraction), -24);
    else size = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return value.bits >> 15 ? -size : size;
}

inline Half to_half(float value) {
    if (std::isnan(value)) return {0x7fff};
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // half a step above the largest
    int exponent = -14;  // of a subnormal number
    if (size >= std::ldexp(1.0f, -14)) exponent = std::ilogb(size);
    // A fraction that rounds up to 2048 carries into the exponent, as it should.
    const int fraction = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + fraction))};
}

// What a tensor core sees of a float32: it leaves the last 13 bits out.
inline float to_tf32(float value) { return std::bit_cast<float>(std::bit_cast<uint32_t>(value) & ~0x1fffu); }

// Denormal numbers become zeros of their sign.
template <class T>
T flush(T value) {
    return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(T(0), value) : value;
}
