// What makes global memory weak: first-level caches that grow stale, and stores that arrive late and out of order.
//
// A multiprocessor's cache keeps a line from its first load on, whatever other multiprocessors store, until a program
// on it acquires. A program's stores wait; its own loads see them, others' do not. They arrive in memory at random, and
// at the latest when a thread releases: its own stores, and those that a barrier has ordered before.
#pragma once
#include <array>
#include <bitset>
#include <random>
#include <unordered_map>
#include <vector>

#include "values.h"

constexpr uint64_t LINE = 128;

class PendingStores {
   public:
    void add(uint64_t address, int bytes, const void* from, int thread, uint32_t epoch);
    bool touch(uint64_t address, int bytes) const;
    // Puts what is pending over bytes that were read from memory.
    void overlay(uint64_t address, int bytes, void* into) const;
    void release(int thread, uint32_t epoch);
    void arrive_at(uint64_t address, int bytes);
    void arrive_at_random(std::mt19937_64& random);
    void arrive();
    size_t size() const { return stores_.size(); }

   private:
    struct Store {
        uint64_t address;
        int bytes;
        std::array<unsigned char, 16> value;
        int thread;
        uint32_t epoch;
    };
    static constexpr size_t BUCKETS = 4096;
    static size_t bucket(uint64_t address) { return (address >> 4) % BUCKETS; }
    template <class Chosen>
    void arrive_if(Chosen chosen);

    std::vector<Store> stores_;
    std::bitset<BUCKETS> touched_;  // so that most loads need not search
};

struct Multiprocessor {
    using Line = std::array<unsigned char, LINE>;
    std::unordered_map<uint64_t, Line> cache;
    std::vector<PendingStores*> pending;  // of its programs, which its cache sees

    // Reads through the cache; a line is read whole, the rest of it may lie beyond an allocation but in the same page.
    void load(uint64_t address, int bytes, void* into);
    // A store changes the cached line; it brings no line in, because it knows only a part of it.
    void store(uint64_t address, int bytes, const void* from);
};
