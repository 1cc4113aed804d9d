// Where global memory may be accessed: the storages of the tensors that are alive.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

struct Range {
    uint64_t begin, end;
};

class Ranges {
   public:
    explicit Ranges(std::vector<Range> ranges) : ranges_(std::move(ranges)) {
        std::sort(ranges_.begin(), ranges_.end(), [](Range a, Range b) { return a.begin < b.begin; });
    }

    // Whether all bytes lie in one range. Neighbouring accesses mostly ask for the same one.
    bool contain(uint64_t address, int bytes) {
        if (last_.begin <= address && address + bytes <= last_.end) return true;
        auto after = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                                      [](uint64_t value, Range range) { return value < range.begin; });
        if (after == ranges_.begin()) return false;
        last_ = *--after;
        return address + bytes <= last_.end;
    }

   private:
    std::vector<Range> ranges_;
    Range last_{1, 0};
};
