// cp.async: copies from global to shared memory that land when their group is waited for.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "values.h"

class Warp;

class AsyncCopies {
   public:
    // Copies the first ``given`` of ``bytes`` bytes, and zeros for the rest.
    void begin(Warp&, int lane, uint64_t to, uint64_t from, int bytes, int given, bool cached);
    void commit(Mask lanes);
    // Lands all but the last ``pending`` groups of each lane.
    void wait(Warp&, Mask lanes, int pending);

   private:
    struct Copy {
        uint64_t to, from;
        int bytes, given;
        bool cached;
        int lane;
        int group;
    };
    std::vector<Copy> copies_;
    std::array<int, WARP> groups_{};  // how many each lane has committed
};
