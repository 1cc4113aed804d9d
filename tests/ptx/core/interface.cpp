// What Python calls, in C. core.py declares the same.
#include <cstring>
#include <memory>

#include "scheduler.h"

namespace {

const Operations& operations() {
    static const Operations all = [] {
        Operations found;
        for (const auto add_some : {add_control, add_integers, add_bits, add_floats, add_comparisons, add_conversions,
                                    add_moves, add_global_memory, add_shared_memory, add_async_copies, add_exchanges,
                                    add_matrices, add_warpgroup})
            add_some(found);
        return found;
    }();
    return all;
}

}  // namespace

extern "C" {

struct EncodedInstruction {
    int32_t operation, line, guard, guarded_by_false, target, n_outputs, n_inputs;
};

struct EncodedCode {
    const EncodedInstruction* instructions;
    const int32_t* operands;
    const uint64_t* constants;
    const char* const* operations;  // names
    int32_t n_instructions, n_operands, n_constants;
    int32_t n_registers, n_threads, shared_bytes;
};

int32_t has_operation(const char* name) { return operations().contains(name); }

Code* make_code(const EncodedCode* from) {
    auto code = std::make_unique<Code>();
    code->operands.assign(from->operands, from->operands + from->n_operands);
    code->n_registers = from->n_registers;
    code->n_threads = from->n_threads;
    code->shared_bytes = from->shared_bytes;
    for (int i = 0; i < from->n_constants; ++i) {
        Lanes everywhere;
        std::fill_n(everywhere.lane, WARP, from->constants[i]);
        code->constants.push_back(everywhere);
    }
    const int* operand = code->operands.data();
    for (int i = 0; i < from->n_instructions; ++i) {
        const EncodedInstruction& e = from->instructions[i];
        const std::span outputs(operand, e.n_outputs), inputs(operand + e.n_outputs, e.n_inputs);
        operand += e.n_outputs + e.n_inputs;
        const Kind kind = operations().at(from->operations[e.operation]);
        code->instructions.push_back({kind, e.line, e.guard, bool(e.guarded_by_false), e.target, outputs, inputs});
    }
    return code.release();
}

void free_code(Code* code) { delete code; }

// Returns the number of instructions that warps have run, or -1 with a message.
int64_t run_code(const Code* code, int32_t entry, const StartRegisters* registers, const Parameter* parameters,
                 int32_t n_parameters, const Grid* grid, const Range* ranges, int32_t n_ranges,
                 const Settings* settings, char* message, int32_t message_bytes) {
    try {
        const std::vector<Parameter> given(parameters, parameters + n_parameters);
        return run_grid(*code, entry, *registers, given, *grid, Ranges({ranges, ranges + n_ranges}), *settings);
    } catch (const std::exception& problem) {
        std::strncpy(message, problem.what(), message_bytes - 1);
        message[message_bytes - 1] = 0;
        return -1;
    }
}
}
