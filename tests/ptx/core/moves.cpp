// Copies between registers, and numbers that are put together from halves or taken apart.
#include "warp.h"

namespace {

template <class T>
void move(Warp& warp, const Instruction& instruction, Mask lanes) {
    const Lanes& input = warp.read(instruction.inputs[0]);
    Lanes& output = warp.write(instruction.outputs[0]);
    for_lanes(lanes, [&](int lane) { output.lane[lane] = to_bits(from_bits<T>(input.lane[lane])); });
    warp.define_halves(instruction.outputs[0], lanes, warp.halves_defined(instruction.inputs[0]));
}

// Two inputs side by side in the output, the first in the low half.
template <int Width>
void pack(Warp& warp, const Instruction& instruction, Mask lanes) {
    constexpr int half = Width / 2;
    constexpr uint64_t part = (uint64_t(1) << half) - 1;
    const Lanes& low = warp.read(instruction.inputs[0]);
    const Lanes& high = warp.read(instruction.inputs[1]);
    const Halves defined{warp.defined(instruction.inputs[0]), warp.defined(instruction.inputs[1])};
    Lanes& output = warp.write(instruction.outputs[0]);
    for_lanes(lanes, [&](int lane) { output.lane[lane] = (low.lane[lane] & part) | (high.lane[lane] & part) << half; });
    warp.define_halves(instruction.outputs[0], lanes, defined);
}

template <int Width>
void unpack(Warp& warp, const Instruction& instruction, Mask lanes) {
    constexpr int half = Width / 2;
    constexpr uint64_t part = (uint64_t(1) << half) - 1;
    const Lanes input = warp.read(instruction.inputs[0]);  // a copy, because an output may be the same register
    const Halves defined = warp.halves_defined(instruction.inputs[0]);
    Lanes& low = warp.write(instruction.outputs[0]);
    Lanes& high = warp.write(instruction.outputs[1]);
    for_lanes(lanes, [&](int lane) {
        low.lane[lane] = input.lane[lane] & part;
        high.lane[lane] = input.lane[lane] >> half & part;
    });
    warp.define(instruction.outputs[0], lanes, defined.low);
    warp.define(instruction.outputs[1], lanes, defined.high);
}

}  // namespace

void add_moves(Operations& operations) {
    add(operations, "mov.pred", move<bool>);
    for (const char* kind : {"b", "u"}) {
        add(operations, std::string("mov.") + kind + "16", move<uint16_t>);
        add(operations, std::string("mov.") + kind + "32", move<uint32_t>);
        add(operations, std::string("mov.") + kind + "64", move<uint64_t>);
    }
    add(operations, "pack.b32", pack<32>);
    add(operations, "pack.b64", pack<64>);
    add(operations, "unpack.b32", unpack<32>);
    add(operations, "unpack.b64", unpack<64>);
}
