// All kernels: what is compiled, for GPUs and for the simulator.
#include "count_valid.cu"
#include "row_pipelined.cu"
#include "row_resident.cu"
#include "row_stream.cu"
#include "select_hard.cu"
#include "sum_losses.cu"
#include "teacher_margin.cu"
#include "unfused.cu"
