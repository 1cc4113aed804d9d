#include "async_copies.h"

#include <algorithm>

#include "block.h"

void AsyncCopies::begin(Warp& warp, int lane, uint64_t to, uint64_t from, int bytes, int given, bool cached) {
    warp.block.shared.begin_copy(to, bytes, warp.number);
    copies_.push_back({to, from, bytes, given, cached, lane, groups_[lane]});
}

void AsyncCopies::commit(Mask lanes) {
    for_lanes(lanes, [&](int lane) { ++groups_[lane]; });
}

void AsyncCopies::wait(Warp& warp, Mask lanes, int pending) {
    const auto waits = [&](const Copy& copy) {
        return (lanes >> copy.lane & 1) && copy.group < groups_[copy.lane] - pending;
    };
    for (const Copy& copy : copies_) {
        if (!waits(copy)) continue;
        unsigned char value[16] = {};
        const Thread thread{warp.block, warp.number, copy.lane};
        if (copy.given) warp.block.memory.load(thread, copy.from, copy.given, copy.cached, false, value);
        warp.block.shared.end_copy(copy.to, copy.bytes, warp.number, value);
    }
    std::erase_if(copies_, waits);
}

namespace {

// The inputs are an address and an offset in shared memory, the same in global memory, the size, and how much is given.
template <bool Cached>
void begin(Warp& warp, const Instruction& instruction, Mask lanes) {
    for (const int input : instruction.inputs) warp.require(input, lanes, "where, or how much, cp.async copies");
    for_lanes(lanes, [&](int lane) {
        const auto input = [&](int i) { return warp.value<uint64_t>(instruction.inputs[i], lane); };
        const int bytes = input(4), given = input(5);
        if (given != 0 && given != bytes) throw Trap("cp.async of a part of its size");
        warp.copies.begin(warp, lane, uint32_t(input(0) + input(1)), input(2) + input(3), bytes, given, Cached);
    });
}

void commit(Warp& warp, const Instruction&, Mask lanes) { warp.copies.commit(lanes); }

void wait(Warp& warp, const Instruction& instruction, Mask lanes) {
    warp.copies.wait(warp, lanes, warp.value<int>(instruction.inputs[0], 0));
}

}  // namespace

void add_async_copies(Operations& operations) {
    add(operations, "cp.async.ca.shared.global", begin<true>);
    add(operations, "cp.async.cg.shared.global", begin<false>);
    add(operations, "cp.async.commit_group", commit);
    add(operations, "cp.async.wait_group", wait);
}
