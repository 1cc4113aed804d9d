// Exchanges between the lanes of a warp.
#include <algorithm>

#include "warp.h"

namespace {

// Which lane a shuffle of a whole warp reads.
struct Butterfly {
    int operator()(int lane, uint32_t b) const { return lane ^ int(b); }
};
struct Index {
    int operator()(int, uint32_t b) const { return b & 31; }
};

template <class From>
void shuffle(Warp& warp, const Instruction& instruction, Mask lanes) {
    const Lanes values = warp.read(instruction.inputs[0]);
    const Mask defined = warp.defined(instruction.inputs[0]);
    Lanes& output = warp.write(instruction.outputs[0]);
    Mask known = 0;
    warp.require(instruction.inputs[1], lanes, "a lane's number");
    for_lanes(lanes, [&](int lane) {
        const int from = From{}(lane, warp.value<uint32_t>(instruction.inputs[1], lane));
        if (from < 0 || from >= WARP || !(lanes >> from & 1)) throw Trap("shfl reads a lane that takes no part");
        output.lane[lane] = to_bits(from_bits<uint32_t>(values.lane[from]));
        known |= (defined >> from & 1) << lane;
    });
    warp.define(instruction.outputs[0], lanes, known);
}

template <class Function>
void reduce(Warp& warp, const Instruction& instruction, Mask lanes) {
    warp.require(instruction.inputs[1], lanes, "the members of a reduction");
    int32_t result = warp.value<int32_t>(instruction.inputs[0], std::countr_zero(lanes));
    for_lanes(lanes & (lanes - 1), [&](int lane) {
        result = Function{}(result, warp.value<int32_t>(instruction.inputs[0], lane));
    });
    Lanes& output = warp.write(instruction.outputs[0]);
    for_lanes(lanes, [&](int lane) { output.lane[lane] = to_bits(result); });
    const Mask undefined = lanes & ~warp.defined(instruction.inputs[0]);
    warp.define(instruction.outputs[0], lanes, undefined ? 0 : ALL);
}

template <class Function>
void reduction(Operations& operations, const std::string& name, Function) {
    add(operations, name, reduce<Function>, Gather::members);
}

}  // namespace

void add_exchanges(Operations& operations) {
    add(operations, "shfl.sync.bfly.b32", shuffle<Butterfly>, Gather::members);
    add(operations, "shfl.sync.idx.b32", shuffle<Index>, Gather::members);
    const auto sum = [](int32_t a, int32_t b) { return int32_t(uint32_t(a) + uint32_t(b)); };
    reduction(operations, "redux.sync.add.s32", sum);
    reduction(operations, "redux.sync.min.s32", [](int32_t a, int32_t b) { return std::min(a, b); });
    reduction(operations, "redux.sync.max.s32", [](int32_t a, int32_t b) { return std::max(a, b); });
}
