// Races between programs in global memory: two accesses of a byte, one of them a store and one of them not atomic, that
// nothing orders. This finds what is missing in the order of programs whether or not a run goes wrong by it.
//
// An order comes from a release at an address and an acquire at the same address after it, and within a program from
// barriers. Each warp has a clock, and knows up to which time of every other warp all has happened before: a vector
// clock. Of each byte the last store and the last load are remembered.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

class ProgramRaces {
   public:
    struct Access {
        uint64_t address;
        int bytes;
        bool store, atomic;
    };

    ProgramRaces(int programs, int warps);
    // A program begins in a place that another has left.
    void start(int program);
    void barrier(int program);
    void access(int program, int warp, Access access);
    void release(int program, int warp, uint64_t address);
    void acquire(int program, int warp, uint64_t address);

   private:
    using Clock = std::vector<uint32_t>;
    struct Touch {
        uint32_t time = 0;
        uint16_t warp = 0;
        bool atomic = false;
    };
    struct Byte {
        Touch store, load;
    };
    static constexpr uint64_t PAGE = 128;

    int of(int program, int warp) const { return program * warps_ + warp; }
    void check(const Touch& before, int warp, const Access&, const char* what) const;

    const int warps_;  // of a program
    std::vector<Clock> clocks_;
    std::unordered_map<uint64_t, Clock> released_;
    std::unordered_map<uint64_t, std::array<Byte, PAGE>> bytes_;
};
