// Operations that each lane does for itself, from functions of values.
#pragma once
#include "warp.h"

// A function of values as an operation: the output's type is what the function returns.
// Lanes of which an input is undefined get an undefined result.
template <class Function, class... Inputs>
struct Elementwise {
    static void run(Warp& warp, const Instruction& instruction, Mask lanes) {
        run_with(warp, instruction, lanes, std::index_sequence_for<Inputs...>());
    }

   private:
    template <size_t... I>
    static void run_with(Warp& warp, const Instruction& instruction, Mask lanes, std::index_sequence<I...>) {
        const Function function{};
        const Lanes* inputs[] = {&warp.read(instruction.inputs[I])...};
        Lanes& output = warp.write(instruction.outputs[0]);
        const Mask defined = (warp.defined(instruction.inputs[I]) & ...);
        for_lanes(lanes, [&](int lane) {
            output.lane[lane] = to_bits(function(from_bits<Inputs>(inputs[I]->lane[lane])...));
        });
        warp.define(instruction.outputs[0], lanes, defined);
    }
};

template <class... Inputs, class Function>
void elementwise(Operations& operations, const std::string& name, Function) {
    add(operations, name, Elementwise<Function, Inputs...>::run);
}

// A value, with a one for each bit of it that is defined.
template <class T>
struct Tracked {
    using Bits = std::make_unsigned_t<T>;
    T value;
    Bits defined;
};

// The same for functions that move bits around: of which bits of the result are defined, another function tells.
template <class Function, class Shadow, class... Inputs>
struct BitByBit {
    static void run(Warp& warp, const Instruction& instruction, Mask lanes) {
        run_with(warp, instruction, lanes, std::index_sequence_for<Inputs...>());
    }

   private:
    template <size_t... I>
    static void run_with(Warp& warp, const Instruction& instruction, Mask lanes, std::index_sequence<I...>) {
        const Mask unclear = lanes & ~(warp.defined(instruction.inputs[I]) & ...);
        Lanes defined;
        for_lanes(unclear, [&](int lane) {
            const auto bits = Shadow{}(Tracked<Inputs>{
                warp.value<Inputs>(instruction.inputs[I], lane),
                from_bits<typename Tracked<Inputs>::Bits>(warp.defined_bits(instruction.inputs[I], lane))}...);
            defined.lane[lane] = ~(to_bits(decltype(bits)(~bits)));  // bits beyond the type's width count as defined
        });
        Elementwise<Function, Inputs...>::run(warp, instruction, lanes);
        for_lanes(unclear, [&](int lane) { warp.define_bits(instruction.outputs[0], lane, defined.lane[lane]); });
    }
};

template <class... Inputs, class Function, class Shadow>
void bit_by_bit(Operations& operations, const std::string& name, Function, Shadow) {
    add(operations, name, BitByBit<Function, Shadow, Inputs...>::run);
}

template <class T> inline const char* type_name;
template <> inline constexpr const char* type_name<uint16_t> = "u16";
template <> inline constexpr const char* type_name<uint32_t> = "u32";
template <> inline constexpr const char* type_name<uint64_t> = "u64";
template <> inline constexpr const char* type_name<int16_t> = "s16";
template <> inline constexpr const char* type_name<int32_t> = "s32";
template <> inline constexpr const char* type_name<int64_t> = "s64";
template <> inline constexpr const char* type_name<float> = "f32";
template <> inline constexpr const char* type_name<double> = "f64";

// Calls body(T()) for each type.
template <class... Types, class Body>
void for_types(Body body) {
    (body(Types()), ...);
}

template <class T>
std::string named(const std::string& operation) {
    return operation + "." + type_name<T>;
}
