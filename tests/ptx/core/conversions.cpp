// Conversions between kinds of numbers.
#include "elementwise.h"
#include "number_formats.h"

namespace {

template <class To, class From>
void integer(Operations& operations) {
    const std::string name = std::string("cvt.") + type_name<To> + "." + type_name<From>;
    using Bits = std::make_unsigned_t<To>;
    if constexpr (sizeof(To) > sizeof(From) && std::is_signed_v<From>)
        elementwise<From>(operations, name, [](From a) { return To(a); });
    else  // what is added or cut off at the top says nothing about the other bits
        bit_by_bit<From>(operations, name, [](From a) { return To(a); },
                         [](Tracked<From> a) { return Bits(~Bits(decltype(a.defined)(~a.defined))); });
}

// From an integer to the nearest number.
template <class To, class From>
void nearest(Operations& operations) {
    const std::string name = std::string("cvt.rn.") + type_name<To> + "." + type_name<From>;
    elementwise<From>(operations, name, [](From a) { return To(a); });
}

template <class Narrow>
uint32_t packed(Narrow high, Narrow low) {
    return uint32_t(high.bits) << 16 | low.bits;
}

}  // namespace

void add_conversions(Operations& operations) {
    for_types<uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>([&]<class From>(From) {
        for_types<uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>([&]<class To>(To) {
            if constexpr (sizeof(To) != sizeof(From)) integer<To, From>(operations);
        });
        nearest<float, From>(operations);
        nearest<double, From>(operations);
    });
    elementwise<float>(operations, "cvt.f64.f32", [](float a) { return double(a); });
    elementwise<double>(operations, "cvt.rn.f32.f64", [](double a) { return float(a); });
    elementwise<Bfloat>(operations, "cvt.f32.bf16", [](Bfloat a) { return to_float(a); });
    elementwise<Half>(operations, "cvt.f32.f16", [](Half a) { return to_float(a); });
    elementwise<float>(operations, "cvt.rn.bf16.f32", [](float a) { return to_bfloat(a); });
    elementwise<float>(operations, "cvt.rn.f16.f32", [](float a) { return to_half(a); });
    elementwise<float, float>(operations, "cvt.rn.bf16x2.f32", [](float a, float b) {
        return packed(to_bfloat(a), to_bfloat(b));
    });
    elementwise<float, float>(operations, "cvt.rn.f16x2.f32", [](float a, float b) {
        return packed(to_half(a), to_half(b));
    });
}
