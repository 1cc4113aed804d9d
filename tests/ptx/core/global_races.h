// Races between warps of one program in global memory: a store, and another access of the same bytes by another warp,
// with no barrier between them.
//
// Of each 8 bytes the last store and the last load since the barrier are remembered, in a table that forgets one place
// for another. So a race may be missed, and none is invented.
#pragma once
#include <string>
#include <vector>

#include "code.h"

class GlobalRaces {
   public:
    GlobalRaces() : places_(SIZE) {}

    // ``changes``: whether a store changes what is there; storing what another warp stored does no harm.
    void check(uint64_t address, int bytes, int warp, uint32_t epoch, bool store, bool changes) {
        for (int done = 0; done < bytes;) {
            const uint64_t at = address + done;
            const int part = std::min<int>(bytes - done, 8 - at % 8);
            const uint8_t touched = ((1 << part) - 1) << at % 8;
            check_place(at / 8, touched, warp, epoch, store, changes);
            done += part;
        }
    }

   private:
    struct Touch {
        uint32_t epoch;
        uint8_t warp;
        uint8_t bytes;
    };
    struct Place {
        uint64_t number;
        Touch load, store;
    };
    static constexpr size_t SIZE = 1 << 14;

    static bool races(const Touch& other, uint8_t bytes, int warp, uint32_t epoch) {
        return other.epoch == epoch && other.warp != warp && (other.bytes & bytes);
    }

    void check_place(uint64_t number, uint8_t bytes, int warp, uint32_t epoch, bool store, bool changes) {
        Place& place = places_[(number ^ number >> 14) % SIZE];
        if (place.number != number) place = {number, {}, {}};
        if ((!store || changes) && races(place.store, bytes, warp, epoch))
            throw Trap(std::string("race in global memory: warp ") + std::to_string(place.store.warp) +
                       " has stored here since the last barrier");
        if (store && changes && races(place.load, bytes, warp, epoch))
            throw Trap(std::string("race in global memory: warp ") + std::to_string(place.load.warp) +
                       " has loaded from here since the last barrier");
        Touch& touch = store ? place.store : place.load;
        if (touch.epoch == epoch && touch.warp == warp) touch.bytes |= bytes;
        else touch = {epoch, uint8_t(warp), bytes};
    }

    std::vector<Place> places_;
};
