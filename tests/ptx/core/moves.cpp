// Copies between registers, and numbers that are put together from halves or taken apart.
#include "elementwise.h"

namespace {

template <class T>
void moves(Operations& operations, const std::string& type) {
    elementwise<T>(operations, "mov." + type, [](T a) { return a; });
}

// Inputs side by side in the output, the first in the lowest bits.
template <int Width>
void pack(Warp& warp, const Instruction& instruction, Mask lanes) {
    const int n = instruction.inputs.size(), bits = Width / n;
    const uint64_t part = (uint64_t(1) << bits) - 1;
    Lanes& output = warp.write(instruction.outputs[0]);
    Mask defined = ALL;
    for (const int input : instruction.inputs) defined &= warp.defined(input);
    for_lanes(lanes, [&](int lane) {
        uint64_t whole = 0;
        for (int i = 0; i < n; ++i) whole |= (warp.read(instruction.inputs[i]).lane[lane] & part) << i * bits;
        output.lane[lane] = whole;
    });
    warp.define(instruction.outputs[0], lanes, defined);
}

template <int Width>
void unpack(Warp& warp, const Instruction& instruction, Mask lanes) {
    const int n = instruction.outputs.size(), bits = Width / n;
    const uint64_t part = (uint64_t(1) << bits) - 1;
    const Lanes input = warp.read(instruction.inputs[0]);
    const Mask defined = warp.defined(instruction.inputs[0]);
    for (int i = 0; i < n; ++i) {
        Lanes& output = warp.write(instruction.outputs[i]);
        for_lanes(lanes, [&](int lane) { output.lane[lane] = input.lane[lane] >> i * bits & part; });
        warp.define(instruction.outputs[i], lanes, defined);
    }
}

}  // namespace

void add_moves(Operations& operations) {
    moves<bool>(operations, "pred");
    for (const char* kind : {"b", "u"}) {
        moves<uint16_t>(operations, std::string(kind) + "16");
        moves<uint32_t>(operations, std::string(kind) + "32");
        moves<uint64_t>(operations, std::string(kind) + "64");
    }
    add(operations, "pack.b32", pack<32>);
    add(operations, "pack.b64", pack<64>);
    add(operations, "unpack.b32", unpack<32>);
    add(operations, "unpack.b64", unpack<64>);
}
