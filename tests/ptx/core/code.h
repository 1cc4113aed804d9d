// Code as the core runs it: instructions with numbers for registers, and the functions that carry operations out.
#pragma once
#include <span>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "values.h"

class Warp;
struct Instruction;

// Carries an operation out for the lanes of the mask.
using Operation = void (*)(Warp&, const Instruction&, Mask);

enum class Control { none, branch, call, ret, barrier };

// What the other lanes of the warp must do before the instruction runs.
enum class Gather {
    none,
    members,  // those of the mask that is the last operand come too
    warp,     // all come
};

struct Kind {
    Operation run;
    Control control;
    Gather gather;
};

struct Instruction {
    Kind kind;
    int line;                      // in the text
    int guard;                     // register of the predicate, -1 for none
    bool guarded_by_false;         // @!p
    int target;                    // of a branch or call, an instruction's number
    std::span<const int> outputs;  // registers
    std::span<const int> inputs;   // registers, or ~n for the constant n
};

struct Code {
    std::vector<Instruction> instructions;
    std::vector<int> operands;
    std::vector<Lanes> constants;
    int n_registers;
    int n_threads;
    int shared_bytes;
    int n_warps() const { return n_threads / WARP; }
};

// Something that a GPU would not do, or that the kernel must not do.
struct Trap : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Operations by their names in instructions.py.
using Operations = std::unordered_map<std::string, Kind>;

inline void add(Operations& operations, const std::string& name, Operation run, Gather gather = Gather::none) {
    operations.emplace(name, Kind{run, Control::none, gather});
}

void add_control(Operations&);
void add_integers(Operations&);
void add_bits(Operations&);
void add_floats(Operations&);
void add_comparisons(Operations&);
void add_conversions(Operations&);
void add_moves(Operations&);
void add_global_memory(Operations&);
void add_shared_memory(Operations&);
void add_async_copies(Operations&);
void add_exchanges(Operations&);
void add_matrices(Operations&);
void add_warpgroup(Operations&);
