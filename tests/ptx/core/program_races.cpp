#include "program_races.h"

#include <algorithm>

#include "code.h"

namespace {
void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
    for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}
}  // namespace

ProgramRaces::ProgramRaces(int programs, int warps)
    : warps_(warps), clocks_(programs * warps, Clock(programs * warps, 0)) {}

void ProgramRaces::start(int program) {
    for (int warp = 0; warp < warps_; ++warp) {
        Clock& clock = clocks_[of(program, warp)];
        for (size_t other = 0; other < clock.size(); ++other) {
            if (int(other) / warps_ != program) clock[other] = 0;
        }
    }
    barrier(program);
}

void ProgramRaces::barrier(int program) {
    Clock all(clocks_.size(), 0);
    for (int warp = 0; warp < warps_; ++warp) join(all, clocks_[of(program, warp)]);
    for (int warp = 0; warp < warps_; ++warp) {
        clocks_[of(program, warp)] = all;
        ++clocks_[of(program, warp)][of(program, warp)];
    }
}

void ProgramRaces::check(const Touch& before, int warp, const Access& access, const char* what) const {
    const bool same = before.warp / warps_ == warp / warps_;  // of one program: GlobalRaces sees to those
    if (same || (before.atomic && access.atomic) || before.time <= clocks_[warp][before.warp]) return;
    throw Trap(std::string("race between programs: nothing orders this ") + (access.store ? "store" : "load") +
               " after another program's " + what);
}

void ProgramRaces::access(int program, int warp, Access access) {
    const int who = of(program, warp);
    const Touch touch{clocks_[who][who], uint16_t(who), access.atomic};
    std::array<Byte, PAGE>& page = bytes_[access.address / PAGE];  // an access is aligned, so it lies in one
    for (int i = 0; i < access.bytes; ++i) {
        Byte& byte = page[access.address % PAGE + i];
        check(byte.store, who, access, "store");
        if (access.store) check(byte.load, who, access, "load");
        (access.store ? byte.store : byte.load) = touch;
    }
}

void ProgramRaces::release(int program, int warp, uint64_t address) {
    const int who = of(program, warp);
    Clock& released = released_.try_emplace(address, clocks_.size(), 0).first->second;
    join(released, clocks_[who]);
    ++clocks_[who][who];
}

void ProgramRaces::acquire(int program, int warp, uint64_t address) {
    const auto found = released_.find(address);
    if (found != released_.end()) join(clocks_[of(program, warp)], found->second);
}
