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

template <class T, class Function>
void reduce(Warp& warp, const Instruction& instruction, Mask lanes) {
    warp.require(instruction.inputs[1], lanes, "the members of a reduction");
    T result = warp.value<T>(instruction.inputs[0], std::countr_zero(lanes));
    for_lanes(lanes & (lanes - 1), [&](int lane) {
        result = Function{}(result, warp.value<T>(instruction.inputs[0], lane));
    });
    Lanes& output = warp.write(instruction.outputs[0]);
    for_lanes(lanes, [&](int lane) { output.lane[lane] = to_bits(result); });
    const Mask undefined = lanes & ~warp.defined(instruction.inputs[0]);
    warp.define(instruction.outputs[0], lanes, undefined ? 0 : ALL);
}

template <class T, class Function>
void reduction(Operations& operations, const std::string& operation, const std::string& type, Function) {
    add(operations, "redux.sync." + operation + "." + type, reduce<T, Function>, Gather::members);
}

template <class T>
void reductions(Operations& operations, const std::string& type) {
    reduction<T>(operations, "add", type, [](T a, T b) { return T(uint32_t(a) + uint32_t(b)); });
    reduction<T>(operations, "min", type, [](T a, T b) { return std::min(a, b); });
    reduction<T>(operations, "max", type, [](T a, T b) { return std::max(a, b); });
}

}  // namespace

void add_exchanges(Operations& operations) {
    add(operations, "shfl.sync.bfly.b32", shuffle<Butterfly>, Gather::members);
    add(operations, "shfl.sync.idx.b32", shuffle<Index>, Gather::members);
    reductions<int32_t>(operations, "s32");
    reductions<uint32_t>(operations, "u32");
}
