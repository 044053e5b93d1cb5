// The list of divergences: X(D, suffix, ..) for each, where `suffix` ends the names of its kernels. Kernels that compute
// with a divergence make their entries by it.
#pragma once

#include "forward_kl.cuh"
#include "mixture.cuh"
#include "reverse_kl.cuh"
#include "total_variation.cuh"

#define ATKD_DIVERGENCES(X, ...)                                                                                       \
    X(ForwardKl, , __VA_ARGS__)                                                                                        \
    X(ReverseKl, _reverse_kl, __VA_ARGS__)                                                                             \
    X(Mixture, _mixture, __VA_ARGS__)                                                                                  \
    X(TotalVariation, _total_variation, __VA_ARGS__)
