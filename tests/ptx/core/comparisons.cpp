// Comparisons, and the choice between two values.
#include <cmath>

#include "elementwise.h"
#include "number_formats.h"

namespace {

template <class T>
void order(Operations& operations, const std::string& type) {
    elementwise<T, T>(operations, "setp.lt." + type, [](T a, T b) { return a < b; });
    elementwise<T, T>(operations, "setp.le." + type, [](T a, T b) { return a <= b; });
    elementwise<T, T>(operations, "setp.gt." + type, [](T a, T b) { return a > b; });
    elementwise<T, T>(operations, "setp.ge." + type, [](T a, T b) { return a >= b; });
}

template <class T>
void equality(Operations& operations, const std::string& type) {
    elementwise<T, T>(operations, "setp.eq." + type, [](T a, T b) { return a == b; });
    elementwise<T, T>(operations, "setp.ne." + type, [](T a, T b) { return a != b; });
}

// Comparisons of floating-point numbers, true for NaN when "u" ends their name.
template <class T>
void float_comparisons(Operations& operations) {
    const std::string type = type_name<T>;
    order<T>(operations, type);
    elementwise<T, T>(operations, "setp.eq." + type, [](T a, T b) { return a == b; });
    elementwise<T, T>(operations, "setp.ne." + type, [](T a, T b) { return a < b || a > b; });
    elementwise<T, T>(operations, "setp.equ." + type, [](T a, T b) { return !(a < b || a > b); });
    elementwise<T, T>(operations, "setp.neu." + type, [](T a, T b) { return !(a == b); });
    elementwise<T, T>(operations, "setp.ltu." + type, [](T a, T b) { return !(a >= b); });
    elementwise<T, T>(operations, "setp.leu." + type, [](T a, T b) { return !(a > b); });
    elementwise<T, T>(operations, "setp.gtu." + type, [](T a, T b) { return !(a <= b); });
    elementwise<T, T>(operations, "setp.geu." + type, [](T a, T b) { return !(a < b); });
    elementwise<T, T>(operations, "setp.num." + type, [](T a, T b) { return !std::isnan(a) && !std::isnan(b); });
    elementwise<T, T>(operations, "setp.nan." + type, [](T a, T b) { return std::isnan(a) || std::isnan(b); });
}

// Two comparisons, of the low and the high half of both inputs.
template <class T, class Compare>
void of_pairs(Warp& warp, const Instruction& instruction, Mask lanes) {
    const Mask defined = warp.defined(instruction.inputs[0]) & warp.defined(instruction.inputs[1]);
    for_lanes(lanes, [&](int lane) {
        const uint32_t a = warp.value<uint32_t>(instruction.inputs[0], lane);
        const uint32_t b = warp.value<uint32_t>(instruction.inputs[1], lane);
        for (int half = 0; half < 2; ++half) {
            const float x = to_float(T{uint16_t(a >> 16 * half)}), y = to_float(T{uint16_t(b >> 16 * half)});
            warp.write(instruction.outputs[half]).lane[lane] = Compare{}(x, y);
        }
    });
    for (const int output : instruction.outputs) warp.define(output, lanes, defined);
}

template <class T, class Compare>
void of_16_bits(Operations& operations, const std::string& comparison, const std::string& type, Compare) {
    const auto compare = [](T a, T b) { return Compare{}(to_float(a), to_float(b)); };
    elementwise<T, T>(operations, "setp." + comparison + "." + type, compare);
    add(operations, "setp." + comparison + "." + type + "x2", of_pairs<T, Compare>);
}

// Bits of a value that is not chosen may be undefined.
template <class T>
void selection(Operations& operations, const std::string& type) {
    bit_by_bit<T, T, uint8_t>(
        operations, "selp." + type, [](T a, T b, uint8_t choice) { return choice & 1 ? a : b; },
        [](Tracked<T> a, Tracked<T> b, Tracked<uint8_t> choice) {
            return choice.defined != 255 ? T(0) : choice.value & 1 ? a.defined : b.defined;
        });
}

}  // namespace

void add_comparisons(Operations& operations) {
    for_types<uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>([&]<class T>(T) {
        order<T>(operations, type_name<T>);
        const std::string bits = std::to_string(8 * sizeof(T));
        if constexpr (std::is_unsigned_v<T>) equality<T>(operations, "b" + bits);
    });
    float_comparisons<float>(operations);
    float_comparisons<double>(operations);
    of_16_bits<Bfloat>(operations, "lt", "bf16", std::less<float>());
    of_16_bits<Bfloat>(operations, "gt", "bf16", std::greater<float>());
    of_16_bits<Half>(operations, "lt", "f16", std::less<float>());
    of_16_bits<Half>(operations, "gt", "f16", std::greater<float>());
    selection<uint16_t>(operations, "b16");
    for (const char* kind : {"b", "f"}) {
        selection<uint32_t>(operations, std::string(kind) + "32");
        selection<uint64_t>(operations, std::string(kind) + "64");
    }
}
