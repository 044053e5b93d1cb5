// The list of divergences: X(D, suffix, ..) for each, where `suffix` ends the names of its kernels. Kernels that compute
// with a divergence make their entries by it.
#pragma once

#include "forward_kl.cuh"

#define ATKD_DIVERGENCES(X, ...) X(ForwardKl, , __VA_ARGS__)
