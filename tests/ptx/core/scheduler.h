// Runs a grid of programs, several at once, in an order drawn from a seed.
#pragma once
#include <string>

#include "code.h"
#include "ranges.h"

struct Grid {
    uint64_t size[3];
    uint64_t total() const { return size[0] * size[1] * size[2]; }
};

struct Settings {
    int32_t at_once;          // programs
    int32_t multiprocessors;  // that they are on, by turns
    int32_t turn;             // how many instructions a warp runs at most before another's turn
    int32_t weak;             // whether memory is
    int32_t ordered;          // whether it is a fault that nothing orders two programs' accesses
    uint64_t seed;
    uint64_t patience;        // instructions without any change of memory after which all wait for ever
};

// Registers that hold something when a program starts.
struct StartRegisters {
    int32_t thread, lane, program[3], grid[3];
};

struct Parameter {
    int32_t reg;
    uint64_t value;
};

// Returns the number of instructions that warps have run. Throws a Trap that says where.
uint64_t run_grid(const Code&, int entry, const StartRegisters&, const std::vector<Parameter>&, const Grid&, Ranges,
                  const Settings&);
