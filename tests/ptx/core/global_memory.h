// Global memory: loads, stores and atomics, in the ranges of tensors, aligned, and strong or weak (weak_memory.h).
#pragma once
#include <optional>
#include <random>

#include "program_races.h"
#include "ranges.h"
#include "values.h"

struct Block;

// Who accesses.
struct Thread {
    Block& block;
    int warp;
    int lane;
    int number() const { return warp * WARP + lane; }
};

class GlobalMemory {
   public:
    GlobalMemory(Ranges ranges, bool weak, std::optional<ProgramRaces> races, std::mt19937_64& random)
        : ranges_(std::move(ranges)), weak_(weak), races_(std::move(races)), random_(random) {}

    // ``cached``: through the multiprocessor's cache, which may be stale. ``atomic``: meant to race.
    void load(Thread, uint64_t address, int bytes, bool cached, bool atomic, void* into);
    void store(Thread, uint64_t address, int bytes, const void* from);
    template <class T, class Function>
    T atomic(Thread, uint64_t address, Function function);

    // By an access of an address. A release comes before it, an acquire after.
    void release(Thread, uint64_t address);
    void acquire(Thread, uint64_t address);
    void start(const Block&);
    void barrier(const Block&);
    void let_time_pass(Block&);
    void finish(Block&);
    // How many accesses have changed memory: while it stands still, programs may be waiting for each other for ever.
    uint64_t changes() const { return changes_; }

   private:
    void check(Thread, uint64_t address, int bytes, const char* what);

    Ranges ranges_;
    const bool weak_;
    std::optional<ProgramRaces> races_;
    std::mt19937_64& random_;
    uint64_t changes_ = 0;
};
