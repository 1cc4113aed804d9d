// A program's shared memory: bounds, alignment, races between warps, and bytes that are undefined or on their way.
//
// Two warps race that access a byte in the same epoch, between the same two barriers, if one of them changes it.
#pragma once
#include <cstdint>
#include <vector>

class SharedMemory {
   public:
    // The epoch is the program's, which each barrier raises by one.
    SharedMemory(int bytes, const uint32_t& epoch) : values_(bytes), cells_(bytes), epoch_(epoch) {}
    void clear();

    // ``defined`` gets, or has, 255 for each byte that is defined and 0 for the others. Returns whether all are.
    bool load(uint64_t address, int bytes, int warp, void* into, uint8_t* defined = nullptr);
    void store(uint64_t address, int bytes, int warp, const void* from, const uint8_t* defined);

    // A copy that lands when it is waited for: until then nobody may touch the bytes.
    void begin_copy(uint64_t address, int bytes, int warp);
    void end_copy(uint64_t address, int bytes, int warp, const void* from);

    // Reads for the tensor cores of a warpgroup, which see stores only after fence.proxy.async.
    bool load_by_proxy(uint64_t address, int bytes, int warp, void* into);
    void fence_proxy() { ++fences_; }

   private:
    enum class State : uint8_t { undefined, defined, arriving };
    struct Cell {
        uint32_t loaded = 0, stored = 0;  // epochs
        uint32_t loaded_by = 0;           // warps, one bit each
        uint32_t fences = 0;              // how many there had been at the store
        uint8_t stored_by = 0;
        State state = State::undefined;
    };
    void check(uint64_t address, int bytes) const;
    void note_load(uint64_t at, int warp);
    void note_store(uint64_t at, int warp);
    [[noreturn]] void race(const char* what, uint64_t at, int warp) const;

    std::vector<unsigned char> values_;
    std::vector<Cell> cells_;
    const uint32_t& epoch_;
    uint32_t fences_ = 0;
};
