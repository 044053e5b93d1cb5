// Margins as sortable keys.
#pragma once

#include "../packed.cuh"

// An unsigned integer that orders as the margins do: NaN is 1, below every number; 0 is left for
// ignored tokens. -0 and 0 are one.
ATKD_DEVICE uint32_t key_of(float margin) {
    if (margin != margin) {
        return 1;
    }
    union {
        float number;
        uint32_t bits;
    } image = {margin + 0.0f};
    return image.bits & 0x80000000u ? ~image.bits : image.bits | 0x80000000u;
}

// The margin of a key; of NaN or an ignored token one below all.
ATKD_DEVICE float margin_of_key(uint32_t key) {
    return key <= 1 ? NEG_INF : from_bits<float>((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}
