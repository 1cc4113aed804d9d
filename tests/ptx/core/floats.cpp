// Arithmetic of float32 and float64, each result rounded once, to nearest. The compiler must not contract: build.py.
#include "elementwise.h"
#include "number_formats.h"

namespace {

// NaN loses against a number.
template <class T>
T lesser(T a, T b) {
    if (a == b) return std::signbit(a) ? a : b;
    return std::isnan(a) ? b : std::isnan(b) ? a : std::min(a, b);
}

template <class T>
T greater(T a, T b) {
    return -lesser(-a, -b);
}

template <class T>
T quiet(T a) {
    return std::isnan(a) ? std::numeric_limits<T>::quiet_NaN() : a;
}

template <class T>
void arithmetic(Operations& operations) {
    elementwise<T, T>(operations, named<T>("add"), [](T a, T b) { return a + b; });
    elementwise<T, T>(operations, named<T>("sub"), [](T a, T b) { return a - b; });
    elementwise<T, T>(operations, named<T>("mul"), [](T a, T b) { return a * b; });
    elementwise<T, T>(operations, named<T>("div"), [](T a, T b) { return a / b; });
    elementwise<T, T, T>(operations, named<T>("fma"), [](T a, T b, T c) { return std::fma(a, b, c); });
    elementwise<T>(operations, named<T>("sqrt"), [](T a) { return std::sqrt(a); });
    elementwise<T>(operations, named<T>("neg"), [](T a) { return -a; });
    elementwise<T>(operations, named<T>("abs"), [](T a) { return std::fabs(a); });
    elementwise<T, T>(operations, named<T>("min"), [](T a, T b) { return quiet(lesser(a, b)); });
    elementwise<T, T>(operations, named<T>("max"), [](T a, T b) { return quiet(greater(a, b)); });
}

}  // namespace

void add_floats(Operations& operations) {
    arithmetic<float>(operations);
    arithmetic<double>(operations);
    elementwise<float, float>(operations, "max.NaN.f32", [](float a, float b) {
        return std::isnan(a) || std::isnan(b) ? NAN : greater(a, b);
    });
    elementwise<float>(operations, "abs.ftz.f32", [](float a) { return flush(std::fabs(a)); });
    elementwise<float>(operations, "sqrt.ftz.f32", [](float a) { return flush(std::sqrt(flush(a))); });
    // Of the double's 64 bits the approximation reads and gives the upper 32.
    elementwise<double>(operations, "rcp.approx.ftz.f64", [](double a) {
        constexpr uint64_t upper = 0xffffffff00000000;
        const double read = flush(from_bits<double>(to_bits(a) & upper));
        return flush(from_bits<double>(to_bits(1 / read) & upper));
    });
}
