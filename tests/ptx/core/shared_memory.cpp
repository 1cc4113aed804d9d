#include "shared_memory.h"

#include <algorithm>
#include <cstring>

#include "block.h"

void SharedMemory::clear() { std::fill(cells_.begin(), cells_.end(), Cell()); }

void SharedMemory::check(uint64_t address, int bytes) const {
    if (address % bytes == 0 && address + bytes <= values_.size()) return;
    const std::string place = std::to_string(bytes) + " bytes at " + std::to_string(address);
    if (address % bytes) throw Trap("misaligned: shared memory, " + place);
    throw Trap("out of range: shared memory, " + place + " of " + std::to_string(values_.size()));
}

void SharedMemory::race(const char* what, uint64_t at, int warp) const {
    throw Trap(std::string("race in shared memory: ") + what + " since the last barrier, byte " + std::to_string(at) +
               ", warp " + std::to_string(warp));
}

void SharedMemory::note_load(uint64_t at, int warp) {
    Cell& cell = cells_[at];
    if (cell.state == State::arriving) throw Trap("cp.async has not been waited for, and its bytes are accessed");
    if (cell.stored == epoch_ && cell.stored_by != warp) race("loaded what another warp has stored", at, warp);
    if (cell.loaded != epoch_) cell.loaded = epoch_, cell.loaded_by = 0;
    cell.loaded_by |= 1u << warp;
}

void SharedMemory::note_store(uint64_t at, int warp) {
    Cell& cell = cells_[at];
    if (cell.state == State::arriving) throw Trap("cp.async has not been waited for, and its bytes are accessed");
    if (cell.stored == epoch_ && cell.stored_by != warp) race("stored over what another warp has stored", at, warp);
    if (cell.loaded == epoch_ && cell.loaded_by & ~(1u << warp))
        race("stored over what another warp has loaded", at, warp);
    cell.stored = epoch_;
    cell.stored_by = warp;
    cell.fences = fences_;
}

bool SharedMemory::load(uint64_t address, int bytes, int warp, void* into, uint8_t* defined) {
    check(address, bytes);
    bool all = true;
    for (int i = 0; i < bytes; ++i) {
        note_load(address + i, warp);
        const bool one = cells_[address + i].state == State::defined;
        if (defined) defined[i] = one ? 255 : 0;
        all &= one;
    }
    std::memcpy(into, &values_[address], bytes);
    return all;
}

// Storing what is there already does no harm: threads may hold copies of one value.
void SharedMemory::store(uint64_t address, int bytes, int warp, const void* from, const uint8_t* defined) {
    check(address, bytes);
    const unsigned char* value = static_cast<const unsigned char*>(from);
    for (int i = 0; i < bytes; ++i) {
        Cell& cell = cells_[address + i];
        const bool one = defined[i] == 255;  // a byte with any undefined bit is undefined
        const bool changes = cell.state != State::defined || !one || values_[address + i] != value[i];
        if (changes) note_store(address + i, warp);
        values_[address + i] = value[i];
        cell.state = one ? State::defined : State::undefined;
    }
}

void SharedMemory::begin_copy(uint64_t address, int bytes, int warp) {
    check(address, bytes);
    for (uint64_t at = address; at < address + bytes; ++at) {
        note_store(at, warp);
        cells_[at].state = State::arriving;
    }
}

void SharedMemory::end_copy(uint64_t address, int bytes, int warp, const void* from) {
    std::memcpy(&values_[address], from, bytes);
    for (uint64_t at = address; at < address + bytes; ++at) {
        cells_[at].state = State::undefined;  // arrived: an ordinary store of this epoch
        note_store(at, warp);
        cells_[at].state = State::defined;
    }
}

bool SharedMemory::load_by_proxy(uint64_t address, int bytes, int warp, void* into) {
    const bool defined = load(address, bytes, warp, into);
    for (uint64_t at = address; at < address + bytes; ++at) {
        if (cells_[at].stored && cells_[at].fences == fences_)
            throw Trap("wgmma reads shared memory that was stored with no fence.proxy.async since");
    }
    return defined;
}

namespace {

uint64_t address_of(Warp& warp, const Instruction& instruction, int lane) {
    return warp.value<uint32_t>(instruction.inputs[0], lane) + warp.value<uint32_t>(instruction.inputs[1], lane);
}

template <class T>
constexpr uint64_t above = ~uint64_t(std::make_unsigned_t<T>(-1));  // the bits of a register above the type's

// Loads values of type T, and widens them to Wide, and to the register, in which bits above the value's are zero.
template <class T, class Wide = T>
void load(Warp& warp, const Instruction& instruction, Mask lanes) {
    warp.require(instruction.inputs[0], lanes, "an address");
    const int n = instruction.outputs.size();
    for (const int output : instruction.outputs) warp.define(output, lanes, ALL);
    for_lanes(lanes, [&](int lane) {
        constexpr int most = 16 / sizeof(T);
        T values[most];
        std::make_unsigned_t<T> defined[most];
        const uint64_t address = address_of(warp, instruction, lane);
        auto* bytes_defined = reinterpret_cast<uint8_t*>(defined);
        const bool all = warp.block.shared.load(address, n * sizeof(T), warp.number, values, bytes_defined);
        for (int i = 0; i < n; ++i) {
            warp.write(instruction.outputs[i]).lane[lane] = to_bits(Wide(values[i]));
            if (!all) warp.define_bits(instruction.outputs[i], lane, above<T> | defined[i]);
        }
    });
}

template <class T>
void store(Warp& warp, const Instruction& instruction, Mask lanes) {
    warp.require(instruction.inputs[0], lanes, "an address");
    const int n = instruction.inputs.size() - 2;
    for_lanes(lanes, [&](int lane) {
        constexpr int most = 16 / sizeof(T);
        T values[most], defined[most];
        for (int i = 0; i < n; ++i) {
            values[i] = warp.value<T>(instruction.inputs[2 + i], lane);
            defined[i] = warp.defined_bits(instruction.inputs[2 + i], lane);
        }
        const uint64_t address = address_of(warp, instruction, lane);
        warp.block.shared.store(address, n * sizeof(T), warp.number, values, reinterpret_cast<uint8_t*>(defined));
    });
}

void fence_proxy(Warp& warp, const Instruction&, Mask) { warp.block.shared.fence_proxy(); }

}  // namespace

void add_shared_memory(Operations& operations) {
    add(operations, "ld.shared.b8", load<uint8_t>);
    add(operations, "ld.shared.b16", load<uint16_t>);
    add(operations, "ld.shared.b32", load<uint32_t>);
    add(operations, "ld.shared.b64", load<uint64_t>);
    add(operations, "ld.shared.s32", load<int32_t, int64_t>);
    add(operations, "st.shared.b8", store<uint8_t>);
    add(operations, "st.shared.b16", store<uint16_t>);
    add(operations, "st.shared.b32", store<uint32_t>);
    add(operations, "st.shared.b64", store<uint64_t>);
    add(operations, "fence.proxy.async.shared::cta", fence_proxy);
}
