// Values of registers: 32 lanes of 64 bits. A narrower value lies in the low bits, and the bits above it are zero.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

using Mask = uint32_t;  // one bit a lane
constexpr int WARP = 32;
constexpr Mask ALL = 0xffffffff;

struct Lanes {
    uint64_t lane[WARP];
};

struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};

template <class T>
T from_bits(uint64_t bits) {
    if constexpr (std::is_same_v<T, bool>) return bits & 1;
    else if constexpr (sizeof(T) == 8) return std::bit_cast<T>(bits);
    else if constexpr (sizeof(T) == 4) return std::bit_cast<T>(static_cast<uint32_t>(bits));
    else if constexpr (sizeof(T) == 2) return std::bit_cast<T>(static_cast<uint16_t>(bits));
    else return std::bit_cast<T>(static_cast<uint8_t>(bits));
}

template <class T>
uint64_t to_bits(T value) {
    if constexpr (std::is_same_v<T, bool>) return value;
    else if constexpr (sizeof(T) == 8) return std::bit_cast<uint64_t>(value);
    else if constexpr (sizeof(T) == 4) return std::bit_cast<uint32_t>(value);
    else if constexpr (sizeof(T) == 2) return std::bit_cast<uint16_t>(value);
    else return std::bit_cast<uint8_t>(value);
}

// Calls body(lane) for each lane of the mask.
template <class Body>
void for_lanes(Mask mask, Body body) {
    if (mask == ALL) {
        for (int lane = 0; lane < WARP; ++lane) body(lane);
        return;
    }
    for (; mask; mask &= mask - 1) body(std::countr_zero(mask));
}
