// A warp: registers, and the paths on which its lanes go.
#pragma once
#include <memory>
#include <unordered_map>
#include <vector>

#include "async_copies.h"
#include "code.h"
#include "warpgroup.h"

struct Block;

// Lanes that are at the same instruction, with the same calls open.
struct Path {
    Mask lanes;
    int next;
    std::vector<int> returns;
};

class Warp {
   public:
    Block& block;
    const Code& code;
    const int number;
    AsyncCopies copies;
    WarpgroupProducts products;

    Warp(Block& block, const Code& code, int number);
    void start(int entry);

    // Runs one instruction. Returns false if no path can go on: all have ended, or wait at a barrier.
    bool step();
    bool ended() const { return paths_.empty() && !at_barrier_; }
    bool at_barrier() const { return at_barrier_; }
    void pass_barrier();
    const Instruction* current() const { return current_; }

    // What an operand holds. Values that nobody has defined are followed from register to register, as memory checkers
    // do; whoever acts on one, by an address, a branch or a store, calls require.
    const Lanes& read(int operand) const { return operand < 0 ? code.constants[~operand] : registers_[operand]; }
    Mask defined(int operand) const { return operand < 0 ? ALL : defined_[operand]; }  // lanes with all bits defined
    uint64_t defined_bits(int operand, int lane) const;
    void require(int operand, Mask lanes, const char* use) const;
    Lanes& write(int reg) { return registers_[reg]; }
    void define(int reg, Mask lanes, Mask defined) {
        defined_[reg] = (defined_[reg] & ~lanes) | (lanes & defined);
        if (lanes & ~defined) forget_bits(reg, lanes & ~defined);
    }
    void define_bits(int reg, int lane, uint64_t defined);
    template <class T>
    T value(int operand, int lane) const {
        return from_bits<T>(read(operand).lane[lane]);
    }
    void set_everywhere(int reg, uint64_t value);
    void set_lane_numbers(int thread, int lane);
    Mask alive() const;

   private:
    bool ready(const Path& path, const Instruction& instruction) const;
    void forget_bits(int reg, Mask lanes);
    void run(size_t path);
    void follow(size_t path, const Instruction& instruction, Mask taken);
    size_t first_of_the_rest(const std::vector<size_t>& waiting) const;
    void merge();

    std::unique_ptr<Lanes[]> registers_;
    std::vector<Mask> defined_;
    std::unordered_map<int, Lanes> partly_defined_;  // bits, of lanes that are not in defined_
    std::vector<Path> paths_;
    bool at_barrier_ = false;
    const Instruction* current_ = nullptr;
};
