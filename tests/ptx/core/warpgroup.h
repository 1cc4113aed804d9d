// wgmma: products of matrices in shared memory, which four warps begin together and wait for later.
//
// A product is carried out when its group is waited for, the latest that the hardware may. Until then its accumulators
// are undefined, so using them too early is noticed, and so is shared memory overwritten too early, by what it gives.
#pragma once
#include <vector>

#include "values.h"

class Warp;
struct Instruction;

class WarpgroupProducts {
   public:
    // D = A B, or D += A B. A comes from registers, 4 of them, or from a descriptor of shared memory, B from another.
    struct Product {
        const Instruction* instruction;
        std::vector<Lanes> A;
        uint64_t A_at, B_at;
        bool accumulates;
        void (*carry_out)(Warp&, const Product&);
        int group;
    };
    void begin(Warp&, Product);
    void commit() { ++groups_; }
    void wait(Warp&, int pending);
    bool follows(const Instruction&) const;

   private:
    std::vector<Product> products_;
    int groups_ = 0;
};
