// Matrix instructions of one warp: products on tensor cores, and the loads and stores that place their operands.
//
// Lane l holds of each 8 x 8 part row l / 4, and of that row the neighbours from (l % 4) * n on, n in a register.
// Products are summed in float64, and rounded once; the hardware rounds its sums in a way of its own.
#include "block.h"
#include "number_formats.h"

namespace {

struct Tf32 {
    static constexpr int in_register = 1;
    static double element(uint64_t bits, int) { return to_tf32(from_bits<float>(bits)); }
};
template <class T>
struct Pair {
    static constexpr int in_register = 2;
    static double element(uint64_t bits, int i) { return to_float(T{uint16_t(bits >> 16 * i)}); }
};
struct Double {
    static constexpr int in_register = 1;
    static double element(uint64_t bits, int) { return from_bits<double>(bits); }
};

// D = A B + C; A is ROWS x K, B K x 8. Registers of A go down 8 rows, then right; those of B go down.
template <class Input, class Sum, int ROWS, int K>
void product(Warp& warp, const Instruction& instruction, Mask) {
    constexpr int n = Input::in_register, wide = 4 * n, down = ROWS / 8;
    constexpr int in_A = down * K / wide, in_B = K / wide, in_C = 2 * down;
    double A[ROWS][K], B[K][8], C[ROWS][8];
    bool defined = true;
    for (int i = 0; i < in_A + in_B + in_C; ++i) defined &= warp.defined(instruction.inputs[i]) == ALL;
    for (int lane = 0; lane < WARP; ++lane) {
        const int row = lane / 4, column = lane % 4;
        const auto input = [&](int i) { return warp.read(instruction.inputs[i]).lane[lane]; };
        for (int e = 0; e < n; ++e) {
            const int k = column * n + e;
            for (int i = 0; i < in_A; ++i)
                A[row + 8 * (i % down)][k + wide * (i / down)] = Input::element(input(i), e);
            for (int i = 0; i < in_B; ++i) B[k + wide * i][row] = Input::element(input(in_A + i), e);
        }
        for (int i = 0; i < in_C; ++i)
            C[row + 8 * (i / 2)][2 * column + i % 2] = from_bits<Sum>(input(in_A + in_B + i));
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < 8; ++j)
            for (int k = 0; k < K; ++k) C[i][j] += A[i][k] * B[k][j];
    for (int i = 0; i < in_C; ++i) {
        Lanes& output = warp.write(instruction.outputs[i]);
        for (int lane = 0; lane < WARP; ++lane)
            output.lane[lane] = to_bits(Sum(C[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]));
        warp.define(instruction.outputs[i], ALL, defined ? ALL : 0);
    }
}

// The row's address comes from lane 8 m + row, m the number of the matrix.
uint64_t row_address(Warp& warp, const Instruction& instruction, int matrix, int row) {
    const int lane = 8 * matrix + row;
    return warp.value<uint32_t>(instruction.inputs[0], lane) + warp.value<uint32_t>(instruction.inputs[1], lane);
}

// Loads 8 x 8 matrices of 16 bits, each row 16 bytes; transposed, a lane gets two neighbours of a column.
template <bool Transposed>
void load(Warp& warp, const Instruction& instruction, Mask) {
    warp.require(instruction.inputs[0], ALL, "an address");
    const int n = instruction.outputs.size();
    for (int matrix = 0; matrix < n; ++matrix) {
        uint16_t elements[8][8];
        Mask defined_rows = 0;
        for (int row = 0; row < 8; ++row) {
            const uint64_t address = row_address(warp, instruction, matrix, row);
            const bool defined = warp.block.shared.load(address, 16, warp.number, elements[row]);
            defined_rows |= Mask(defined) << row;
        }
        Lanes& output = warp.write(instruction.outputs[matrix]);
        Mask defined = 0;
        for (int lane = 0; lane < WARP; ++lane) {
            const int row = lane / 4, column = 2 * (lane % 4);
            const uint32_t low = Transposed ? elements[column][row] : elements[row][column];
            const uint32_t high = Transposed ? elements[column + 1][row] : elements[row][column + 1];
            output.lane[lane] = high << 16 | low;
            const Mask needed = Transposed ? 3u << column : 1u << row;
            defined |= Mask((defined_rows & needed) == needed) << lane;
        }
        warp.define(instruction.outputs[matrix], ALL, defined);
    }
}

void store(Warp& warp, const Instruction& instruction, Mask) {
    warp.require(instruction.inputs[0], ALL, "an address");
    const int n = instruction.inputs.size() - 2;
    for (int matrix = 0; matrix < n; ++matrix) {
        const Lanes& input = warp.read(instruction.inputs[2 + matrix]);
        for (int row = 0; row < 8; ++row) {
            uint32_t pairs[4], defined[4];
            for (int i = 0; i < 4; ++i) {
                pairs[i] = from_bits<uint32_t>(input.lane[4 * row + i]);
                defined[i] = warp.defined_bits(instruction.inputs[2 + matrix], 4 * row + i);
            }
            const uint64_t address = row_address(warp, instruction, matrix, row);
            warp.block.shared.store(address, 16, warp.number, pairs, reinterpret_cast<uint8_t*>(defined));
        }
    }
}

template <class Input, class Sum, int ROWS, int K>
void add_product(Operations& operations, const std::string& types) {
    const std::string shape = "m" + std::to_string(ROWS) + "n8k" + std::to_string(K);
    add(operations, "mma.sync.aligned." + shape + ".row.col." + types, product<Input, Sum, ROWS, K>, Gather::warp);
}

}  // namespace

void add_matrices(Operations& operations) {
    add_product<Tf32, float, 16, 8>(operations, "f32.tf32.tf32.f32");
    add_product<Pair<Bfloat>, float, 16, 16>(operations, "f32.bf16.bf16.f32");
    add_product<Pair<Half>, float, 16, 16>(operations, "f32.f16.f16.f32");
    add_product<Double, double, 8, 4>(operations, "f64.f64.f64.f64");
    add_product<Double, double, 16, 16>(operations, "f64.f64.f64.f64");
    add(operations, "ldmatrix.sync.aligned.m8n8.x4.shared.b16", load<false>, Gather::warp);
    add(operations, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", load<true>, Gather::warp);
    add(operations, "stmatrix.sync.aligned.m8n8.x4.shared.b16", store, Gather::warp);
}
