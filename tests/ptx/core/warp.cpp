// How a warp goes: branches part its lanes, and lanes that arrive at the same instruction go on together.
#include "warp.h"

#include <algorithm>

Warp::Warp(Block& block, const Code& code, int number)
    : block(block), code(code), number(number), registers_(new Lanes[code.n_registers]), defined_(code.n_registers) {}

void Warp::start(int entry) {
    std::fill(defined_.begin(), defined_.end(), 0);
    partly_defined_.clear();
    paths_ = {Path{ALL, entry, {}}};
    at_barrier_ = false;
    copies = {};
    products = {};
}

void Warp::require(int operand, Mask lanes, const char* use) const {
    if (lanes & ~defined(operand)) throw Trap(std::string("a value that nobody has defined is ") + use);
}

uint64_t Warp::defined_bits(int operand, int lane) const {
    if (defined(operand) >> lane & 1) return ~uint64_t(0);
    const auto found = partly_defined_.find(operand);
    return found == partly_defined_.end() ? 0 : found->second.lane[lane];
}

void Warp::define_bits(int reg, int lane, uint64_t defined) {
    const Mask bit = Mask(1) << lane;
    if (defined == ~uint64_t(0)) {
        defined_[reg] |= bit;
    } else {
        defined_[reg] &= ~bit;
        if (defined || partly_defined_.contains(reg)) partly_defined_[reg].lane[lane] = defined;
    }
}

void Warp::forget_bits(int reg, Mask lanes) {
    const auto found = partly_defined_.find(reg);
    if (found != partly_defined_.end()) for_lanes(lanes, [&](int lane) { found->second.lane[lane] = 0; });
}

void Warp::set_everywhere(int reg, uint64_t value) {
    std::fill_n(registers_[reg].lane, WARP, value);
    define(reg, ALL, ALL);
}

void Warp::set_lane_numbers(int thread, int lane) {
    for (int i = 0; i < WARP; ++i) {
        registers_[thread].lane[i] = number * WARP + i;
        registers_[lane].lane[i] = i;
    }
    define(thread, ALL, ALL);
    define(lane, ALL, ALL);
}

Mask Warp::alive() const {
    Mask lanes = 0;
    for (const Path& path : paths_) lanes |= path.lanes;
    return lanes;
}

void Warp::pass_barrier() { at_barrier_ = false; }

bool Warp::step() {
    if (at_barrier_ || paths_.empty()) return false;
    if (paths_.size() == 1) {
        const Instruction& instruction = code.instructions[paths_[0].next];
        if (!ready(paths_[0], instruction)) return false;
        run(0);
        return true;
    }
    std::vector<size_t> waiting;
    while (waiting.size() < paths_.size()) {
        const size_t path = first_of_the_rest(waiting);
        if (ready(paths_[path], code.instructions[paths_[path].next])) {
            run(path);
            return true;
        }
        waiting.push_back(path);
    }
    return false;
}

// The path deepest in calls, and of those the one furthest behind: so the others are caught up with.
size_t Warp::first_of_the_rest(const std::vector<size_t>& waiting) const {
    size_t best = paths_.size();
    for (size_t i = 0; i < paths_.size(); ++i) {
        if (std::find(waiting.begin(), waiting.end(), i) != waiting.end()) continue;
        const auto rank = [&](size_t k) { return std::pair(-int(paths_[k].returns.size()), paths_[k].next); };
        if (best == paths_.size() || rank(i) < rank(best)) best = i;
    }
    return best;
}

bool Warp::ready(const Path& path, const Instruction& instruction) const {
    const Gather gather = instruction.kind.gather;
    if (gather == Gather::none || path.lanes == ALL) return true;
    Mask needed = alive();
    if (gather == Gather::members) needed &= value<uint32_t>(instruction.inputs.back(), std::countr_zero(path.lanes));
    return (needed & ~path.lanes) == 0;
}

void Warp::run(size_t path) {
    const Instruction& instruction = code.instructions[paths_[path].next];
    current_ = &instruction;
    Mask lanes = paths_[path].lanes;
    if (instruction.guard >= 0) {
        require(instruction.guard, lanes, "a predicate");
        Mask chosen = 0;
        const Lanes& guard = read(instruction.guard);
        for_lanes(lanes, [&](int lane) {
            if ((guard.lane[lane] & 1) != instruction.guarded_by_false) chosen |= Mask(1) << lane;
        });
        lanes = chosen;
    }
    if (instruction.kind.control != Control::none) return follow(path, instruction, lanes);
    if (instruction.kind.gather != Gather::none && lanes != paths_[path].lanes)
        throw Trap("an instruction of the whole warp is predicated");
    if (lanes) instruction.kind.run(*this, instruction, lanes);
    ++paths_[path].next;
    if (paths_.size() > 1) merge();
}

// Carries a branch, call, return or barrier out; the lanes that are not taken go on to the next instruction.
void Warp::follow(size_t path, const Instruction& instruction, Mask taken) {
    Path on{taken, instruction.target, paths_[path].returns};
    const int next = ++paths_[path].next;
    paths_[path].lanes &= ~taken;
    switch (instruction.kind.control) {
        case Control::call: on.returns.push_back(next); break;
        case Control::ret:
            if (on.returns.empty()) on.lanes = 0;
            else {
                on.next = on.returns.back();
                on.returns.pop_back();
            }
            break;
        case Control::barrier:
            if (paths_[path].lanes) throw Trap("a barrier is predicated");
            on.next = next;
            at_barrier_ = true;
            break;
        default: break;
    }
    if (on.lanes && !paths_[path].lanes) paths_[path] = std::move(on);
    else if (on.lanes) paths_.push_back(std::move(on));
    else if (!paths_[path].lanes) {
        paths_.erase(paths_.begin() + path);
        return;
    }
    if (paths_.size() > 1) merge();
}

// Joins paths that are at the same place.
void Warp::merge() {
    for (size_t i = paths_.size(); i-- > 1;) {
        for (size_t k = 0; k < i; ++k) {
            if (paths_[i].next != paths_[k].next || paths_[i].returns != paths_[k].returns) continue;
            paths_[k].lanes |= paths_[i].lanes;
            paths_.erase(paths_.begin() + i);
            break;
        }
    }
}

namespace {
void trap(Warp&, const Instruction&, Mask) { throw Trap("the kernel says trap"); }
void nothing(Warp&, const Instruction&, Mask) {}
}  // namespace

void add_control(Operations& operations) {
    operations.emplace("bra", Kind{nothing, Control::branch, Gather::none});
    operations.emplace("call", Kind{nothing, Control::call, Gather::none});
    operations.emplace("ret", Kind{nothing, Control::ret, Gather::none});
    operations.emplace("bar.sync", Kind{nothing, Control::barrier, Gather::warp});
    operations.emplace("bar.warp.sync", Kind{nothing, Control::none, Gather::members});
    operations.emplace("trap", Kind{trap, Control::none, Gather::none});
    operations.emplace("nothing", Kind{nothing, Control::none, Gather::none});
}
