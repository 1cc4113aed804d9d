// Arithmetic of integers, which wraps around.
#include <algorithm>

#include "elementwise.h"

namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// The result has as many bits as the inputs: without the casts 16 bits would grow to an int, and signs could overflow.
template <class T>
void sums(Operations& operations) {
    using U = Unsigned<T>;
    elementwise<T, T>(operations, named<T>("add"), [](T a, T b) { return U(U(a) + U(b)); });
    elementwise<T, T>(operations, named<T>("sub"), [](T a, T b) { return U(U(a) - U(b)); });
    elementwise<T>(operations, named<T>("neg"), [](T a) { return U(U(0) - U(a)); });
    elementwise<T, T>(operations, named<T>("min"), [](T a, T b) { return std::min(a, b); });
    elementwise<T, T>(operations, named<T>("max"), [](T a, T b) { return std::max(a, b); });
}

template <class T>
void products(Operations& operations) {
    using U = Unsigned<T>;
    const auto product = [](T a, T b) { return U(uint64_t(a) * uint64_t(b)); };
    const auto product_and_sum = [](T a, T b, T c) { return U(uint64_t(a) * uint64_t(b) + uint64_t(c)); };
    elementwise<T, T>(operations, named<T>("mul.lo"), product);
    elementwise<T, T, T>(operations, named<T>("mad.lo"), product_and_sum);
}

// Two cases that a processor refuses are spelled out: by zero, where PTX leaves the result open and a GPU gives all
// ones, and the most negative number by -1.
template <class T>
T quotient(T a, T b) {
    if (b == 0) return T(-1);
    if (std::is_signed_v<T> && b == T(-1)) return T(Unsigned<T>(0) - Unsigned<T>(a));
    return a / b;
}

template <class T>
T rest(T a, T b) {
    if (b == 0) return T(-1);
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return a % b;
}

template <class T>
void quotients(Operations& operations) {
    elementwise<T, T>(operations, named<T>("div"), [](T a, T b) { return quotient(a, b); });
    elementwise<T, T>(operations, named<T>("rem"), [](T a, T b) { return rest(a, b); });
}

// Products of 32 bits by 32 in 64 bits.
template <class T, class Wide>
void wide_products(Operations& operations) {
    elementwise<T, T>(operations, named<T>("mul.wide"), [](T a, T b) { return Wide(a) * Wide(b); });
    elementwise<T, T>(operations, named<T>("mul.hi"), [](T a, T b) { return T(Wide(a) * Wide(b) >> 32); });
    elementwise<T, T, Wide>(operations, named<T>("mad.wide"), [](T a, T b, Wide c) {
        return uint64_t(Wide(a) * Wide(b)) + uint64_t(c);
    });
}

}  // namespace

void add_integers(Operations& operations) {
    for_types<uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>([&]<class T>(T) {
        sums<T>(operations);
        products<T>(operations);
        quotients<T>(operations);
    });
    wide_products<uint32_t, uint64_t>(operations);
    wide_products<int32_t, int64_t>(operations);
}
