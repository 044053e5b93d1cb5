// The kernels, compiled for the simulator.
#include "../teacher_margin.cu"
#include "../select_hard.cu"
#include "../row_stream.cu"
#include "../sum_losses.cu"
