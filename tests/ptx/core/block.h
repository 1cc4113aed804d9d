// A program of the grid: its warps, its shared memory, and what it has to do with global memory. CUDA calls it a block.
#pragma once
#include <memory>
#include <vector>

#include "global_memory.h"
#include "global_races.h"
#include "shared_memory.h"
#include "warp.h"
#include "weak_memory.h"

struct Block {
    GlobalMemory& memory;
    Multiprocessor& multiprocessor;
    std::vector<std::unique_ptr<Warp>> warps;
    SharedMemory shared;
    PendingStores stores;
    GlobalRaces races;
    uint32_t epoch = 0;  // how many barriers there have been, of this program and of those before it in this place
    const int place;     // among those that run at once
    uint64_t number = 0;  // in the grid
    bool running = false;

    Block(GlobalMemory& memory, Multiprocessor& multiprocessor, const Code& code, int place)
        : memory(memory), multiprocessor(multiprocessor), shared(code.shared_bytes, epoch), place(place) {
        for (int i = 0; i < code.n_warps(); ++i) warps.push_back(std::make_unique<Warp>(*this, code, i));
        multiprocessor.pending.push_back(&stores);
    }
};
