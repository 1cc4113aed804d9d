#include "weak_memory.h"

#include <algorithm>

namespace {
bool overlap(uint64_t a, int bytes_a, uint64_t b, int bytes_b) { return a < b + bytes_b && b < a + bytes_a; }
}  // namespace

void PendingStores::add(uint64_t address, int bytes, const void* from, int thread, uint32_t epoch) {
    Store store{address, bytes, {}, thread, epoch};
    std::memcpy(store.value.data(), from, bytes);
    stores_.push_back(store);
    touched_.set(bucket(address));
}

// Accesses are aligned and of at most 16 bytes, so each lies in one bucket.
bool PendingStores::touch(uint64_t address, int bytes) const {
    for (uint64_t part = address & ~uint64_t(15); part < address + bytes; part += 16) {
        if (touched_.test(bucket(part))) return true;
    }
    return false;
}

void PendingStores::overlay(uint64_t address, int bytes, void* into) const {
    if (!touch(address, bytes)) return;
    for (const Store& store : stores_) {
        if (!overlap(store.address, store.bytes, address, bytes)) continue;
        for (int i = 0; i < store.bytes; ++i) {
            const uint64_t offset = store.address + i - address;
            if (offset < uint64_t(bytes)) static_cast<unsigned char*>(into)[offset] = store.value[i];
        }
    }
}

template <class Chosen>
void PendingStores::arrive_if(Chosen chosen) {
    std::vector<Store> kept;
    touched_.reset();
    for (const Store& store : stores_) {
        if (chosen(store)) {
            std::memcpy(reinterpret_cast<void*>(store.address), store.value.data(), store.bytes);
        } else {
            kept.push_back(store);
            touched_.set(bucket(store.address));
        }
    }
    stores_ = std::move(kept);
}

void PendingStores::release(int thread, uint32_t epoch) {
    arrive_if([&](const Store& store) { return store.thread == thread || store.epoch < epoch; });
}

void PendingStores::arrive_at(uint64_t address, int bytes) {
    if (touch(address, bytes))
        arrive_if([&](const Store& store) { return overlap(store.address, store.bytes, address, bytes); });
}

// Half of the places, so that stores to one place stay in order.
void PendingStores::arrive_at_random(std::mt19937_64& random) {
    const uint64_t salt = random() | 1;
    arrive_if([&](const Store& store) { return (store.address >> 4) * salt >> 63; });
}

void PendingStores::arrive() {
    arrive_if([](const Store&) { return true; });
}

void Multiprocessor::load(uint64_t address, int bytes, void* into) {
    const uint64_t begin = address & ~(LINE - 1);
    auto found = cache.find(begin);
    if (found == cache.end()) {
        found = cache.emplace(begin, Line{}).first;
        std::memcpy(found->second.data(), reinterpret_cast<const void*>(begin), LINE);
        for (const PendingStores* stores : pending) stores->overlay(begin, LINE, found->second.data());
    }
    std::memcpy(into, found->second.data() + (address - begin), bytes);
}

void Multiprocessor::store(uint64_t address, int bytes, const void* from) {
    const uint64_t begin = address & ~(LINE - 1);
    const auto found = cache.find(begin);
    if (found != cache.end()) std::memcpy(found->second.data() + (address - begin), from, bytes);
}
