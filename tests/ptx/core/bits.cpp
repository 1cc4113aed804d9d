// Logic, shifts and fields of bits.
#include <algorithm>

#include "elementwise.h"

namespace {

// A bit of the result is known if both inputs' are, or if one is that decides: a zero for "and", a one for "or".
template <class T>
void logic(Operations& operations, const std::string& type) {
    using Bit = Tracked<T>;
    bit_by_bit<T, T>(operations, "and." + type, [](T a, T b) { return T(a & b); }, [](Bit a, Bit b) {
        return T((a.defined & b.defined) | (a.defined & ~a.value) | (b.defined & ~b.value));
    });
    bit_by_bit<T, T>(operations, "or." + type, [](T a, T b) { return T(a | b); }, [](Bit a, Bit b) {
        return T((a.defined & b.defined) | (a.defined & a.value) | (b.defined & b.value));
    });
    bit_by_bit<T, T>(operations, "xor." + type, [](T a, T b) { return T(a ^ b); },
                     [](Bit a, Bit b) { return T(a.defined & b.defined); });
}

template <class T>
void inversion(Operations& operations, const std::string& type) {
    elementwise<T>(operations, "not." + type, [](T a) { return T(~a); });
}

// Shifts by the width or more leave zeros, or copies of the sign.
template <class T>
void shifts(Operations& operations, const std::string& bits) {
    using Signed = std::make_signed_t<T>;
    constexpr uint32_t width = 8 * sizeof(T);
    const auto left = [](T a, uint32_t n) { return T(n < width ? a << n : 0); };
    const auto right = [](T a, uint32_t n) { return T(n < width ? a >> n : 0); };
    // What is shifted in is defined.
    bit_by_bit<T, uint32_t>(operations, "shl.b" + bits, left, [](Tracked<T> a, Tracked<uint32_t> n) {
        return n.defined == ALL ? T(~decltype(left){}(T(~a.defined), n.value)) : T(0);
    });
    bit_by_bit<T, uint32_t>(operations, "shr.u" + bits, right, [](Tracked<T> a, Tracked<uint32_t> n) {
        return n.defined == ALL ? T(~decltype(right){}(T(~a.defined), n.value)) : T(0);
    });
    elementwise<Signed, uint32_t>(operations, "shr.s" + bits, [](Signed a, uint32_t n) {
        return Signed(a >> std::min(n, width - 1));
    });
}

// Bytes of a and b, numbered 0 to 3 and 4 to 7, each chosen by four bits, whose highest would spread the sign instead.
uint32_t permuted(uint32_t a, uint32_t b, uint32_t selection) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t choice = selection >> 4 * i & 15;
        uint32_t byte = bytes >> 8 * (choice & 7) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}

// A field of bits from a position on, in the low bits of the result. Above it, and beyond the input's end, is the fill.
uint32_t field(uint32_t a, uint32_t position, uint32_t length, uint32_t fill) {
    uint32_t result = 0;
    for (uint32_t i = 0; i < 32; ++i) {
        const bool inside = i < length && position + i < 32;
        result |= (inside ? a >> (position + i) & 1 : fill) << i;
    }
    return result;
}

uint32_t extracted(uint32_t a, uint32_t position, uint32_t length) { return field(a, position & 255, length & 255, 0); }

// The field's highest bit is its sign.
uint32_t extracted_signed(uint32_t a, uint32_t position, uint32_t length) {
    position &= 255, length &= 255;
    const uint32_t sign = length == 0 ? 0 : a >> std::min(position + length - 1, 31u) & 1;
    return field(a, position, length, sign);
}

uint32_t inserted(uint32_t a, uint32_t into, uint32_t position, uint32_t length) {
    position = std::min(position & 255, 32u), length = std::min(length & 255, 32u);
    const uint64_t place = ((uint64_t(1) << length) - 1) << position;
    return uint32_t((into & ~place) | (uint64_t(a) << position & place));
}

// Fields and bytes of the definedness are moved as those of the value; the numbers that say where must be defined.
template <class... Where>
bool known(Where... where) {
    return ((where.defined == ALL) && ...);
}

}  // namespace

void add_bits(Operations& operations) {
    logic<uint8_t>(operations, "pred");
    logic<uint16_t>(operations, "b16");
    logic<uint32_t>(operations, "b32");
    logic<uint64_t>(operations, "b64");
    elementwise<bool>(operations, "not.pred", [](bool a) { return !a; });
    inversion<uint16_t>(operations, "b16");
    inversion<uint32_t>(operations, "b32");
    inversion<uint64_t>(operations, "b64");
    shifts<uint16_t>(operations, "16");
    shifts<uint32_t>(operations, "32");
    shifts<uint64_t>(operations, "64");
    using U = uint32_t;
    using Bits = Tracked<U>;
    elementwise<U>(operations, "popc.b32", [](U a) { return U(std::popcount(a)); });
    elementwise<U, U, U>(operations, "bfe.s32", [](U a, U b, U c) { return extracted_signed(a, b, c); });
    bit_by_bit<U, U, U>(
        operations, "bfe.u32", [](U a, U b, U c) { return extracted(a, b, c); },
        [](Bits a, Bits b, Bits c) { return known(b, c) ? ~extracted(~a.defined, b.value, c.value) : 0; });
    bit_by_bit<U, U, U>(
        operations, "prmt.b32", [](U a, U b, U c) { return permuted(a, b, c); },
        [](Bits a, Bits b, Bits c) { return known(c) ? permuted(a.defined, b.defined, c.value) : 0; });
    bit_by_bit<U, U, U, U>(
        operations, "bfi.b32", [](U a, U b, U c, U d) { return inserted(a, b, c, d); },
        [](Bits a, Bits b, Bits c, Bits d) {
            return known(c, d) ? inserted(a.defined, b.defined, c.value, d.value) : 0;
        });
}
