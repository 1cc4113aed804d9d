#include "warpgroup.h"

#include <algorithm>

#include "block.h"
#include "number_formats.h"

void WarpgroupProducts::begin(Warp& warp, Product product) {
    product.group = groups_;
    for (const int output : product.instruction->outputs) warp.define(output, ALL, 0);
    products_.push_back(std::move(product));
}

void WarpgroupProducts::wait(Warp& warp, int pending) {
    size_t done = 0;
    while (done < products_.size() && products_[done].group < groups_ - pending) {
        products_[done].carry_out(warp, products_[done]);
        for (const int output : products_[done].instruction->outputs) warp.define(output, ALL, ALL);
        ++done;
    }
    products_.erase(products_.begin(), products_.begin() + done);
}

namespace {

constexpr int ROWS = 64, OF_WARP = 16, COLUMNS = 64;
constexpr int BYTES = 32;  // of a row of A, or of a column of B, in one product

// A matrix in shared memory. Its rows go by eights; in each eight, 16 bytes of the rows are put in another place by the
// swizzle, so that a column of them meets every bank.
struct Descriptor {
    uint64_t start, leading, stride;
    int swizzle;  // bytes, 0 for none

    explicit Descriptor(uint64_t bits) {
        const auto field = [&](int from) { return (bits >> from & 0x3fff) << 4; };
        start = field(0), leading = field(16), stride = field(32);
        constexpr int sizes[] = {0, 128, 64, 32};
        swizzle = sizes[bits >> 62];
        if (bits >> 49 & 7) throw Trap("wgmma with a base offset in its descriptor");
    }

    // Where 16 bytes of a row are.
    uint64_t address(int row, int chunk) const {
        if (swizzle == 0) return start + row / 8 * stride + chunk * leading + row % 8 * 16;
        const uint64_t plain = start + row / 8 * stride + row % 8 * swizzle + 16 * chunk;
        const uint64_t chunks = swizzle / 16 - 1;
        return plain ^ ((plain >> 7 & chunks) << 4);
    }

    void load_row(Warp& warp, int row, unsigned char* into) const {
        for (int chunk = 0; chunk < 2; ++chunk) {
            if (!warp.block.shared.load_by_proxy(address(row, chunk), 16, warp.number, into + 16 * chunk))
                throw Trap("wgmma reads shared memory that nobody has written");
        }
    }
};

template <class T>
float element(const unsigned char* row, int k) {
    T value;
    std::memcpy(&value, row + k * sizeof(T), sizeof value);
    if constexpr (std::is_same_v<T, float>) return to_tf32(value);
    else return to_float(value);
}

// The 16 rows of A that belong to this warp, from four registers placed as for mma, or from shared memory.
void gather_A(Warp& warp, const WarpgroupProducts::Product& product, unsigned char (&A)[OF_WARP][BYTES]) {
    if (product.A.empty()) {
        const Descriptor from(product.A_at);
        for (int row = 0; row < OF_WARP; ++row) from.load_row(warp, warp.number % 4 * OF_WARP + row, A[row]);
        return;
    }
    for (int i = 0; i < 4; ++i) {
        for (int lane = 0; lane < WARP; ++lane) {
            const uint32_t bits = from_bits<uint32_t>(product.A[i].lane[lane]);
            std::memcpy(&A[lane / 4 + 8 * (i % 2)][lane % 4 * 4 + 16 * (i / 2)], &bits, 4);
        }
    }
}

template <class T>
void carry_out(Warp& warp, const WarpgroupProducts::Product& product) {
    constexpr int K = BYTES / sizeof(T);
    unsigned char A[OF_WARP][BYTES], B[COLUMNS][BYTES];
    gather_A(warp, product, A);
    const Descriptor from(product.B_at);
    for (int column = 0; column < COLUMNS; ++column) from.load_row(warp, column, B[column]);
    const auto outputs = product.instruction->outputs;
    for (size_t i = 0; i < outputs.size(); ++i) {
        Lanes& output = warp.write(outputs[i]);
        for (int lane = 0; lane < WARP; ++lane) {
            const int row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
            double sum = product.accumulates ? from_bits<float>(output.lane[lane]) : 0;
            for (int k = 0; k < K; ++k) sum += double(element<T>(A[row], k)) * element<T>(B[column], k);
            output.lane[lane] = to_bits(float(sum));
        }
    }
}

// The inputs are A, the descriptor of B, and whether to accumulate.
template <class T, bool InRegisters>
void begin(Warp& warp, const Instruction& instruction, Mask) {
    constexpr int in_A = InRegisters ? 4 : 1;
    for (const int input : instruction.inputs) warp.require(input, ALL, "an input of wgmma");
    const auto input = [&](int i) { return warp.value<uint64_t>(instruction.inputs[i], 0); };
    const bool accumulates = input(in_A + 1) & 1;
    WarpgroupProducts::Product product{&instruction, {}, input(0), input(in_A), accumulates, carry_out<T>, 0};
    if (InRegisters)
        for (int i = 0; i < in_A; ++i) product.A.push_back(warp.read(instruction.inputs[i]));
    if (product.accumulates && !warp.products.follows(instruction))
        for (const int output : instruction.outputs) warp.require(output, ALL, "an accumulator of wgmma");
    warp.products.begin(warp, std::move(product));
}

void commit(Warp& warp, const Instruction&, Mask) { warp.products.commit(); }

void wait(Warp& warp, const Instruction& instruction, Mask) {
    warp.products.wait(warp, warp.value<int>(instruction.inputs[0], 0));
}

void fence(Warp&, const Instruction&, Mask) {}  // orders accesses of registers, which here are in order

template <class T>
void add_product(Operations& operations, const std::string& k, const std::string& type) {
    const std::string name = "m64n64k" + k + ".f32." + type + "." + type;
    add(operations, "wgmma.shared." + name, begin<T, false>, Gather::warp);
    add(operations, "wgmma.registers." + name, begin<T, true>, Gather::warp);
}

}  // namespace

// Whether the product adds to the accumulators of one under way: these two stay in order.
bool WarpgroupProducts::follows(const Instruction& instruction) const {
    const auto same = [&](const Product& product) {
        return std::equal(product.instruction->outputs.begin(), product.instruction->outputs.end(),
                          instruction.outputs.begin(), instruction.outputs.end());
    };
    return std::any_of(products_.begin(), products_.end(), same);
}

void add_warpgroup(Operations& operations) {
    add_product<float>(operations, "8", "tf32");
    add_product<Bfloat>(operations, "16", "bf16");
    add_product<Half>(operations, "16", "f16");
    add(operations, "wgmma.fence.sync.aligned", fence, Gather::warp);
    add(operations, "wgmma.commit_group.sync.aligned", commit, Gather::warp);
    add(operations, "wgmma.wait_group.sync.aligned", wait, Gather::warp);
}
