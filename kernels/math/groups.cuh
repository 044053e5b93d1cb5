// The two groups of tokens: how large they are, and what a reduction divides their losses by.
#pragma once

#include "../machine.cuh"

// Hard tokens among the valid ones where the largest margins are: ceil(ratio * valid).
ATKD_DEVICE uint32_t hard_count(double ratio, uint32_t valid) {
    double wanted = ceil(ratio * double(valid));
    return wanted < double(valid) ? static_cast<uint32_t>(wanted) : valid;
}

// The factors of tokens' losses: of the distillation terms of easy and of hard tokens, and of cross entropy.
struct ReductionScales {
    double easy, hard, ce;

    static ATKD_DEVICE ReductionScales of(uint32_t reduction, double scale, uint32_t valid, uint32_t hard) {
        double of_valid = scale * (reduction == ATKD_SUM ? 1.0 : 1.0 / valid);
        if (reduction != ATKD_GROUP_MEAN) {
            return {of_valid, of_valid, of_valid};
        }
        return {valid <= hard ? 0 : scale / (valid - hard), hard == 0 ? 0 : scale / hard, of_valid};
    }
};
