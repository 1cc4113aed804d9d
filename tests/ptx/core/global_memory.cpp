#include "global_memory.h"

#include <cstdio>

#include "block.h"

void GlobalMemory::check(Thread thread, uint64_t address, int bytes, const char* what) {
    const bool aligned = address % bytes == 0;
    if (aligned && ranges_.contain(address, bytes)) return;
    char text[160];
    std::snprintf(text, sizeof text, "%s: %s of %d bytes at %#llx by thread %d",
                  aligned ? "out of range" : "misaligned", what, bytes, static_cast<unsigned long long>(address),
                  thread.number());
    throw Trap(text);
}

void GlobalMemory::load(Thread thread, uint64_t address, int bytes, bool cached, bool atomic, void* into) {
    Block& block = thread.block;
    check(thread, address, bytes, "load");
    if (!atomic) block.races.check(address, bytes, thread.warp, block.epoch, false, false);
    if (races_) races_->access(block.place, thread.warp, {address, bytes, false, atomic});
    if (weak_ && cached) return block.multiprocessor.load(address, bytes, into);
    std::memcpy(into, reinterpret_cast<const void*>(address), bytes);
    if (weak_) block.stores.overlay(address, bytes, into);
}

void GlobalMemory::store(Thread thread, uint64_t address, int bytes, const void* from) {
    Block& block = thread.block;
    check(thread, address, bytes, "store");
    unsigned char before[16];
    std::memcpy(before, reinterpret_cast<const void*>(address), bytes);
    if (weak_) block.stores.overlay(address, bytes, before);
    const bool changes = std::memcmp(before, from, bytes) != 0;
    block.races.check(address, bytes, thread.warp, block.epoch, true, changes);
    if (changes && races_) races_->access(block.place, thread.warp, {address, bytes, true, false});
    changes_ += changes;
    if (!weak_) {
        std::memcpy(reinterpret_cast<void*>(address), from, bytes);
        return;
    }
    block.multiprocessor.store(address, bytes, from);
    block.stores.add(address, bytes, from, thread.number(), block.epoch);
    constexpr size_t most = 512;
    if (block.stores.size() > most) block.stores.arrive_at_random(random_);
}

// Atomics happen in memory, after the program's own stores to the same place.
template <class T, class Function>
T GlobalMemory::atomic(Thread thread, uint64_t address, Function function) {
    check(thread, address, sizeof(T), "atomic");
    if (races_) races_->access(thread.block.place, thread.warp, {address, sizeof(T), true, true});
    if (weak_) thread.block.stores.arrive_at(address, sizeof(T));
    T before;
    std::memcpy(&before, reinterpret_cast<const void*>(address), sizeof before);
    const T after = function(before);
    changes_ += before != after;
    std::memcpy(reinterpret_cast<void*>(address), &after, sizeof after);
    if (weak_) thread.block.multiprocessor.store(address, sizeof after, &after);
    return before;
}

void GlobalMemory::release(Thread thread, uint64_t address) {
    thread.block.stores.release(thread.number(), thread.block.epoch);
    if (races_) races_->release(thread.block.place, thread.warp, address);
}

void GlobalMemory::acquire(Thread thread, uint64_t address) {
    thread.block.multiprocessor.cache.clear();
    if (races_) races_->acquire(thread.block.place, thread.warp, address);
}

void GlobalMemory::start(const Block& block) {
    if (races_) races_->start(block.place);
}

void GlobalMemory::barrier(const Block& block) {
    if (races_) races_->barrier(block.place);
}

void GlobalMemory::let_time_pass(Block& block) {
    constexpr int rarely = 64;
    if (weak_ && block.stores.size() && random_() % rarely == 0) block.stores.arrive_at_random(random_);
}

void GlobalMemory::finish(Block& block) { block.stores.arrive(); }

namespace {

enum class Loaded { cached, past_the_cache, relaxed, acquiring };

uint64_t address_of(Warp& warp, const Instruction& instruction, int lane) {
    return warp.value<uint64_t>(instruction.inputs[0], lane) + warp.value<uint64_t>(instruction.inputs[1], lane);
}

template <class T, Loaded How>
void load(Warp& warp, const Instruction& instruction, Mask lanes) {
    warp.require(instruction.inputs[0], lanes, "an address");
    const int n = instruction.outputs.size();
    constexpr bool cached = How == Loaded::cached, atomic = !cached && How != Loaded::past_the_cache;
    GlobalMemory& memory = warp.block.memory;
    for_lanes(lanes, [&](int lane) {
        T values[16 / sizeof(T)];
        const Thread thread{warp.block, warp.number, lane};
        const uint64_t address = address_of(warp, instruction, lane);
        memory.load(thread, address, n * sizeof(T), cached, atomic, values);
        if (How == Loaded::acquiring) memory.acquire(thread, address);
        for (int i = 0; i < n; ++i) warp.write(instruction.outputs[i]).lane[lane] = to_bits(values[i]);
    });
    for (const int output : instruction.outputs) warp.define(output, lanes, ALL);
}

template <class T>
void store(Warp& warp, const Instruction& instruction, Mask lanes) {
    const int n = instruction.inputs.size() - 2;
    warp.require(instruction.inputs[0], lanes, "an address");
    for (int i = 0; i < n; ++i) warp.require(instruction.inputs[2 + i], lanes, "stored");
    for_lanes(lanes, [&](int lane) {
        T values[16 / sizeof(T)];
        for (int i = 0; i < n; ++i) values[i] = warp.value<T>(instruction.inputs[2 + i], lane);
        const uint64_t address = address_of(warp, instruction, lane);
        warp.block.memory.store({warp.block, warp.number, lane}, address, n * sizeof(T), values);
    });
}

template <class T, class Function, bool Release, bool Acquire>
void atomic(Warp& warp, const Instruction& instruction, Mask lanes) {
    warp.require(instruction.inputs[0], lanes, "an address");
    warp.require(instruction.inputs[2], lanes, "stored");
    const bool tells = !instruction.outputs.empty();  // what was there before
    GlobalMemory& memory = warp.block.memory;
    for_lanes(lanes, [&](int lane) {
        const Thread thread{warp.block, warp.number, lane};
        const uint64_t address = address_of(warp, instruction, lane);
        const T operand = warp.value<T>(instruction.inputs[2], lane);
        if (Release) memory.release(thread, address);
        const T before = memory.atomic<T>(thread, address, [&](T value) { return Function{}(value, operand); });
        if (Acquire) memory.acquire(thread, address);
        if (tells) warp.write(instruction.outputs[0]).lane[lane] = to_bits(before);
    });
    if (tells) warp.define(instruction.outputs[0], lanes, ALL);
}

template <class T, class Function>
void atomics(Operations& operations, const std::string& operation, Function) {
    add(operations, "atom.global.gpu.relaxed." + operation, atomic<T, Function, false, false>);
    add(operations, "atom.global.gpu.acquire." + operation, atomic<T, Function, false, true>);
    add(operations, "atom.global.gpu.release." + operation, atomic<T, Function, true, false>);
    add(operations, "atom.global.gpu.acq_rel." + operation, atomic<T, Function, true, true>);
    add(operations, "red.global.gpu.relaxed." + operation, atomic<T, Function, false, false>);
    add(operations, "red.global.gpu.release." + operation, atomic<T, Function, true, false>);
}

template <class T>
void loads_and_stores(Operations& operations, const std::string& type) {
    add(operations, "ld.global." + type, load<T, Loaded::cached>);
    add(operations, "ld.global.cg." + type, load<T, Loaded::past_the_cache>);
    add(operations, "ld.global.gpu.relaxed." + type, load<T, Loaded::relaxed>);
    add(operations, "ld.global.gpu.acquire." + type, load<T, Loaded::acquiring>);
    add(operations, "st.global." + type, store<T>);
}

}  // namespace

void add_global_memory(Operations& operations) {
    loads_and_stores<uint8_t>(operations, "b8");
    loads_and_stores<uint16_t>(operations, "b16");
    loads_and_stores<uint32_t>(operations, "b32");
    loads_and_stores<uint64_t>(operations, "b64");
    const auto sum = [](auto value, auto operand) { return value + operand; };
    const auto exchange = [](auto, auto operand) { return operand; };
    atomics<uint32_t>(operations, "add.u32", sum);
    atomics<uint64_t>(operations, "add.u64", sum);
    atomics<uint32_t>(operations, "exch.b32", exchange);
}
