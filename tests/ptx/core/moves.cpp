// Copies between registers, and numbers that are put together from halves or taken apart.
#include "elementwise.h"

namespace {

template <class T>
void move(Operations& operations, const std::string& type) {
    bit_by_bit<T>(operations, "mov." + type, [](T a) { return a; }, [](Tracked<T> a) { return a.defined; });
}

// Two halves side by side, the first in the low bits.
template <class Whole, class Half>
void pack(Operations& operations, const std::string& type) {
    constexpr int n = 8 * sizeof(Half);
    const auto packed = [](Half low, Half high) { return Whole(Whole(high) << n | low); };
    bit_by_bit<Half, Half>(operations, "pack." + type, packed, [](Tracked<Half> low, Tracked<Half> high) {
        return Whole(Whole(high.defined) << n | low.defined);
    });
}

template <class Whole, class Half>
void unpack(Warp& warp, const Instruction& instruction, Mask lanes) {
    constexpr int n = 8 * sizeof(Half);
    const int input = instruction.inputs[0];
    const Mask unclear = lanes & ~warp.defined(input);
    const Lanes value = warp.read(input);  // a copy, because an output may be the same register
    Lanes bits;
    for_lanes(unclear, [&](int lane) { bits.lane[lane] = warp.defined_bits(input, lane); });
    for (int i = 0; i < 2; ++i) {
        Lanes& output = warp.write(instruction.outputs[i]);
        for_lanes(lanes, [&](int lane) { output.lane[lane] = to_bits(Half(value.lane[lane] >> i * n)); });
        warp.define(instruction.outputs[i], lanes, ~unclear);
        for_lanes(unclear, [&](int lane) {
            warp.define_bits(instruction.outputs[i], lane, ~to_bits(Half(~(bits.lane[lane] >> i * n))));
        });
    }
}

}  // namespace

void add_moves(Operations& operations) {
    move<uint8_t>(operations, "pred");
    for (const char* kind : {"b", "u"}) {
        move<uint16_t>(operations, std::string(kind) + "16");
        move<uint32_t>(operations, std::string(kind) + "32");
        move<uint64_t>(operations, std::string(kind) + "64");
    }
    pack<uint32_t, uint16_t>(operations, "b32");
    pack<uint64_t, uint32_t>(operations, "b64");
    add(operations, "unpack.b32", unpack<uint32_t, uint16_t>);
    add(operations, "unpack.b64", unpack<uint64_t, uint32_t>);
}
