// Exponentials and their sums, relative to a maximum that may grow: the online softmax.
//
// An exponential is 2^(z * exponent - shift) with exponent = log2(e) / T: one multiply-add, rounded once. The shift is
// the integer nearest to a maximum's exponent (or a little less), so that logits up to 1e5 lose no digits and sums are
// rescaled by exact powers of 2. From LARGE on, the exponents' digits would not do: there the maximum itself is
// subtracted first (Shift). The passes over a row do so only where they must, in code of its own: in the common code a
// LARGE shift is NaN, and so is what it makes of a row.
#pragma once

#include "../packed.cuh"

// The maximum of the warp's floats, none of them NaN, by way of integers that order as they do.
ATKD_DEVICE float max_of_warp(float x) {
    int32_t bits = static_cast<int32_t>(to_bits(x));
    int32_t max = warp_max(bits ^ (bits >> 31 & 0x7fffffff));
    return from_bits<float>(static_cast<uint32_t>(max ^ (max >> 31 & 0x7fffffff)));
}

// The most that the exponentials of a chunk may add up to before their shift is raised. Exponents below 4 lose no
// digits, and a chunk that does not exceed the shift's maximum adds up to 8 at most.
constexpr float HEADROOM = 16.0f;

constexpr float LOG2_E = 1.44269504f;
constexpr double LN_2 = 0.69314718055994530942;

constexpr float LOWEST = -3.402823466e38f;

// Adding and subtracting it rounds to an integer; an integer below 2^22 is then in the last bits of the sum.
constexpr float ROUNDS = 12582912.0f; // 1.5 * 2^23

constexpr float LARGE = 262144.0f;

ATKD_DEVICE float shift_of(float max, float exponent) {
    float shift = fmaf(max, exponent, ROUNDS) - ROUNDS;
    return fabsf(shift) < LARGE ? shift : nanf("");
}

// Gaps, the differences x - y of the models' exponents, are in units of this, so that those between any two logits are
// finite. Nothing but the exponent of a float changes.
constexpr float GAP_UNIT = 0x1p64f;

// The two parts of what is subtracted, for any finite maximum: (z - logit_shift) * exponent - exponent_shift.
struct Shift {
    float logit_shift, exponent_shift;

    static ATKD_DEVICE Shift of(float max, float exponent) {
        float shift = fmaf(max, exponent, ROUNDS) - ROUNDS;
        bool large = !(fabsf(shift) < LARGE);
        return {large ? max : 0.0f, large ? 0.0f : shift};
    }
    ATKD_DEVICE float exponent_of(float z, float exponent) const {
        return fmaf(z - logit_shift, exponent, -exponent_shift);
    }
    // The exponent in units of GAP_UNIT.
    ATKD_DEVICE float gap_of(float z, float exponent) const {
        return fmaf(0.5f * z - 0.5f * logit_shift, exponent * (2 / GAP_UNIT), -exponent_shift * (1 / GAP_UNIT));
    }
};

// How much the exponents change from one maximum's shift to another's; and the same in units of GAP_UNIT.
ATKD_DEVICE float distance(float from_max, float to_max, float exponent) {
    Shift from = Shift::of(from_max, exponent), to = Shift::of(to_max, exponent);
    return fmaf(from.logit_shift - to.logit_shift, exponent, from.exponent_shift - to.exponent_shift);
}
ATKD_DEVICE float gap_between(float from_max, float to_max, float exponent) {
    Shift from = Shift::of(from_max, exponent), to = Shift::of(to_max, exponent);
    return fmaf(0.5f * from.logit_shift - 0.5f * to.logit_shift, exponent * (2 / GAP_UNIT),
                (from.exponent_shift - to.exponent_shift) * (1 / GAP_UNIT));
}

// 2^x of such a distance, which is not above 0: exactly, where it is an integer.
ATKD_DEVICE float exp2_of_distance(float x) {
    x = fmaxf(x, -127.0f);
    float rounded = x + ROUNDS;
    // 0 from -127.
    float power = from_bits<float>((to_bits(rounded) << 23) + 0x3f800000u);
    return power * exp2_fast(x - (rounded - ROUNDS));
}

// The maximum's own exponential is 2^residue, the residue being its exponent less the shift. A sum has it with
// exp2_fast's error, on which a peaked row's loss would hang; this is the difference from the exact value.
ATKD_DEVICE float correction_of(float max, float exponent) {
    float x = Shift::of(max, exponent).exponent_of(max, exponent);
    // 2^x for |x| <= 1/2, to 2e-8: Cephes'.
    float power = 1.535336188e-4f;
    power = fmaf(power, x, 1.339887440e-3f);
    power = fmaf(power, x, 9.618437358e-3f);
    power = fmaf(power, x, 5.550332471e-2f);
    power = fmaf(power, x, 2.402264791e-1f);
    power = fmaf(power, x, 6.931472029e-1f);
    return fmaf(power, x, 1.0f) - exp2_fast(x);
}

// The shifts of a part of a row, NaN where they are LARGE.
struct Shifts {
    float teacher, student;
    float student_at_1; // of 2^(z^q_j * log2(e))
};

// The largest of many elements, NaN aside.
template <class T> struct Largest {
    uint32_t two = to_bits(narrow<T>(NEG_INF)) * 0x10001u;

    ATKD_DEVICE void add(const Packed<T> &packed) {
        ATKD_UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            two = max_of_two<T>(two, packed.part[0].word[i]);
        }
    }
    ATKD_DEVICE float value() const { return fmaxf(widen(from_bits<T>(two)), widen(from_bits<T>(two >> 16))); }
};
template <> struct Largest<float> {
    float one = NEG_INF;

    ATKD_DEVICE void add(const Packed<float> &packed) {
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            one = fmaxf(one, from_bits<float>(packed.part[k / 4].word[k % 4]));
        }
    }
    ATKD_DEVICE float value() const { return one; }
};

template <class T> ATKD_DEVICE float max_of(const Packed<T> &packed) {
    Largest<T> largest;
    largest.add(packed);
    return largest.value();
}

// The log-odds against the target, log sum_{j != g} e^{(z_j - z_g) / T}, less the logarithm of the sum itself.
ATKD_DEVICE double to_margin(float max, float target, float exponent) {
    float residue = Shift::of(max, exponent).exponent_of(max, exponent);
    double difference = ((double(max) - double(target)) * double(exponent) - double(residue)) * LN_2;
    return target == -NEG_INF ? nan("") : difference;
}
