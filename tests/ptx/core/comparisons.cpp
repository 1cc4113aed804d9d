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
template <class Compare>
void of_pairs(Warp& warp, const Instruction& instruction, Mask lanes) {
    const Mask defined = warp.defined(instruction.inputs[0]) & warp.defined(instruction.inputs[1]);
    for_lanes(lanes, [&](int lane) {
        const uint32_t a = warp.value<uint32_t>(instruction.inputs[0], lane);
        const uint32_t b = warp.value<uint32_t>(instruction.inputs[1], lane);
        for (int half = 0; half < 2; ++half) {
            const float x = to_float(Bfloat{uint16_t(a >> 16 * half)}), y = to_float(Bfloat{uint16_t(b >> 16 * half)});
            warp.write(instruction.outputs[half]).lane[lane] = Compare{}(x, y);
        }
    });
    for (const int output : instruction.outputs) warp.define(output, lanes, defined);
}

// A value not chosen may be undefined.
template <class T>
void select(Warp& warp, const Instruction& instruction, Mask lanes) {
    const Lanes& a = warp.read(instruction.inputs[0]);
    const Lanes& b = warp.read(instruction.inputs[1]);
    const Lanes& choice = warp.read(instruction.inputs[2]);
    const Mask defined_a = warp.defined(instruction.inputs[0]), defined_b = warp.defined(instruction.inputs[1]);
    Mask chosen = 0;
    Lanes& output = warp.write(instruction.outputs[0]);
    for_lanes(lanes, [&](int lane) {
        const bool first = choice.lane[lane] & 1;
        chosen |= Mask(first) << lane;
        output.lane[lane] = to_bits(from_bits<T>(first ? a.lane[lane] : b.lane[lane]));
    });
    const Mask defined = ((chosen & defined_a) | (~chosen & defined_b)) & warp.defined(instruction.inputs[2]);
    warp.define(instruction.outputs[0], lanes, defined);
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
    add(operations, "setp.lt.bf16x2", of_pairs<std::less<float>>);
    add(operations, "setp.gt.bf16x2", of_pairs<std::greater<float>>);
    for (const char* type : {"b16"}) add(operations, std::string("selp.") + type, select<uint16_t>);
    for (const char* type : {"b32", "f32"}) add(operations, std::string("selp.") + type, select<uint32_t>);
    for (const char* type : {"b64", "f64"}) add(operations, std::string("selp.") + type, select<uint64_t>);
}
