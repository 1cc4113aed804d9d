// Logic, shifts and fields of bits.
#include <algorithm>

#include "elementwise.h"

namespace {

template <class T>
T inverted(T a) {
    if constexpr (std::is_same_v<T, bool>) return !a;
    else return T(~a);
}

// Whether a lane's result is known although one input is not: an input of zeros decides "and", one of ones "or".
template <class T, bool Or>
Mask decided(Warp& warp, const Instruction& instruction, Mask lanes) {
    Mask found = 0;
    for (const int operand : instruction.inputs) {
        const Lanes& input = warp.read(operand);
        for_lanes(lanes & warp.defined(operand), [&](int lane) {
            if (from_bits<T>(input.lane[lane]) == (Or ? inverted(T(0)) : T(0))) found |= Mask(1) << lane;
        });
    }
    return found;
}

template <class T, class Function, bool Or>
void and_or(Warp& warp, const Instruction& instruction, Mask lanes) {
    const Mask undefined = lanes & ~(warp.defined(instruction.inputs[0]) & warp.defined(instruction.inputs[1]));
    const Mask known = undefined ? decided<T, Or>(warp, instruction, undefined) : 0;
    Elementwise<Function, T, T>::run(warp, instruction, lanes);
    warp.define(instruction.outputs[0], known, ALL);
}

template <class T>
void logic(Operations& operations, const std::string& type) {
    const auto conjunction = [](T a, T b) { return T(a & b); };
    const auto disjunction = [](T a, T b) { return T(a | b); };
    add(operations, "and." + type, and_or<T, decltype(conjunction), false>);
    add(operations, "or." + type, and_or<T, decltype(disjunction), true>);
    elementwise<T, T>(operations, "xor." + type, [](T a, T b) { return T(a ^ b); });
    elementwise<T>(operations, "not." + type, [](T a) { return inverted(a); });
}

// Shifts by the width or more leave zeros, or copies of the sign.
template <class T>
void shifts(Operations& operations, const std::string& bits) {
    using Signed = std::make_signed_t<T>;
    constexpr uint32_t width = 8 * sizeof(T);
    elementwise<T, uint32_t>(operations, "shl.b" + bits, [](T a, uint32_t n) { return T(n < width ? a << n : 0); });
    elementwise<T, uint32_t>(operations, "shr.u" + bits, [](T a, uint32_t n) { return T(n < width ? a >> n : 0); });
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

}  // namespace

void add_bits(Operations& operations) {
    logic<bool>(operations, "pred");
    logic<uint16_t>(operations, "b16");
    logic<uint32_t>(operations, "b32");
    logic<uint64_t>(operations, "b64");
    shifts<uint16_t>(operations, "16");
    shifts<uint32_t>(operations, "32");
    shifts<uint64_t>(operations, "64");
    using U = uint32_t;
    elementwise<U>(operations, "popc.b32", [](U a) { return U(std::popcount(a)); });
    elementwise<U, U, U>(operations, "prmt.b32", [](U a, U b, U c) { return permuted(a, b, c); });
    elementwise<U, U, U>(operations, "bfe.u32", [](U a, U b, U c) { return extracted(a, b, c); });
    elementwise<U, U, U>(operations, "bfe.s32", [](U a, U b, U c) { return extracted_signed(a, b, c); });
    elementwise<U, U, U, U>(operations, "bfi.b32", [](U a, U b, U c, U d) { return inserted(a, b, c, d); });
}
