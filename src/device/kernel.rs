//! The kernels: their names, parameter blocks and geometry, and what one launch of a kernel is.

use std::ffi::c_void;

use crate::Dtype;
use crate::call::RawLogits;
use crate::objective::Family;
use crate::params::*;
use crate::plan::{LaunchShape, RowKernel};

/// A kernel as the host knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its name.
    pub name: &'static str,
    /// Bytes of its parameter block.
    pub parameter_bytes: usize,
    /// Threads per block at most, by its launch bounds.
    pub threads: u32,
    /// Blocks that a multiprocessor holds at once, by its launch bounds.
    pub blocks: u32,
    /// How a simulation may make its launches smaller.
    pub shrinks: Shrinks,
}

/// The numbers of a launch that a simulation may make smaller than planned, since the kernel works with any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shrinks {
    /// Threads per block and blocks per cluster.
    BlocksAndClusters,
    /// Blocks per cluster alone: there is a thread per token.
    Clusters,
    /// Neither: the planned blocks have just enough room for a row.
    Never,
}

/// Hands the list of all kernels to a macro: by parameter block, then by launch bounds, then their names.
macro_rules! with_kernels {
    ($macro:ident) => {
        $macro! {
            TeacherMargin(atkd_teacher_margin) {
                ATKD_MARGIN_THREADS ATKD_MARGIN_BLOCKS BlocksAndClusters:
                    teacher_margin_f32 teacher_margin_f16 teacher_margin_bf16;
            }
            CountValid(atkd_count_valid) {
                ATKD_COUNT_THREADS ATKD_COUNT_BLOCKS Clusters: count_valid;
            }
            PrepareRows(atkd_prepare_rows) {
                ATKD_COUNT_THREADS ATKD_COUNT_BLOCKS Clusters: prepare_rows;
            }
            SelectHard(atkd_select_hard) {
                ATKD_SELECT_THREADS ATKD_SELECT_BLOCKS BlocksAndClusters: select_hard;
            }
            Rows(atkd_rows) {
                ATKD_RESIDENT_THREADS ATKD_RESIDENT_BLOCKS Never:
                    row_resident_f32 row_resident_f16 row_resident_bf16 row_resident_f32_reverse_kl
                    row_resident_f16_reverse_kl row_resident_bf16_reverse_kl row_resident_f32_mixture
                    row_resident_f16_mixture row_resident_bf16_mixture row_resident_f32_total_variation
                    row_resident_f16_total_variation row_resident_bf16_total_variation;
                ATKD_PIPELINED_THREADS ATKD_PIPELINED_BLOCKS Never:
                    row_pipelined_f32 row_pipelined_f16 row_pipelined_bf16 row_pipelined_f32_reverse_kl
                    row_pipelined_f16_reverse_kl row_pipelined_bf16_reverse_kl row_pipelined_f32_mixture
                    row_pipelined_f16_mixture row_pipelined_bf16_mixture row_pipelined_f32_total_variation
                    row_pipelined_f16_total_variation row_pipelined_bf16_total_variation;
                ATKD_PIPELINED_WIDE_THREADS ATKD_PIPELINED_WIDE_BLOCKS Never:
                    row_pipelined_wide_f32 row_pipelined_wide_f16 row_pipelined_wide_bf16
                    row_pipelined_wide_f32_reverse_kl row_pipelined_wide_f16_reverse_kl
                    row_pipelined_wide_bf16_reverse_kl row_pipelined_wide_f32_mixture
                    row_pipelined_wide_f16_mixture row_pipelined_wide_bf16_mixture
                    row_pipelined_wide_f32_total_variation row_pipelined_wide_f16_total_variation
                    row_pipelined_wide_bf16_total_variation row_pipelined_wide_at_1_f32
                    row_pipelined_wide_at_1_f16 row_pipelined_wide_at_1_bf16
                    row_pipelined_wide_at_1_f32_reverse_kl row_pipelined_wide_at_1_f16_reverse_kl
                    row_pipelined_wide_at_1_bf16_reverse_kl row_pipelined_wide_at_1_f32_mixture
                    row_pipelined_wide_at_1_f16_mixture row_pipelined_wide_at_1_bf16_mixture
                    row_pipelined_wide_at_1_f32_total_variation row_pipelined_wide_at_1_f16_total_variation
                    row_pipelined_wide_at_1_bf16_total_variation
                    row_pipelined_wide_f32_f16 row_pipelined_wide_f32_bf16
                    row_pipelined_wide_f16_f32 row_pipelined_wide_bf16_f32
                    row_pipelined_wide_f32_f16_reverse_kl row_pipelined_wide_f32_bf16_reverse_kl
                    row_pipelined_wide_f16_f32_reverse_kl row_pipelined_wide_bf16_f32_reverse_kl
                    row_pipelined_wide_f32_f16_mixture row_pipelined_wide_f32_bf16_mixture
                    row_pipelined_wide_f16_f32_mixture row_pipelined_wide_bf16_f32_mixture
                    row_pipelined_wide_f32_f16_total_variation
                    row_pipelined_wide_f32_bf16_total_variation
                    row_pipelined_wide_f16_f32_total_variation
                    row_pipelined_wide_bf16_f32_total_variation;
                ATKD_STREAM_THREADS ATKD_STREAM_BLOCKS BlocksAndClusters:
                    row_stream_f32_f32_f32 row_stream_f32_f32_f16 row_stream_f32_f32_bf16 row_stream_f32_f16_f16
                    row_stream_f32_f16_f32 row_stream_f32_bf16_bf16 row_stream_f32_bf16_f32 row_stream_f16_f32_f32
                    row_stream_f16_f32_f16 row_stream_f16_f32_bf16 row_stream_f16_f16_f16 row_stream_f16_f16_f32
                    row_stream_f16_bf16_bf16 row_stream_f16_bf16_f32 row_stream_bf16_f32_f32 row_stream_bf16_f32_f16
                    row_stream_bf16_f32_bf16 row_stream_bf16_f16_f16 row_stream_bf16_f16_f32
                    row_stream_bf16_bf16_bf16 row_stream_bf16_bf16_f32 row_stream_f32_f32_f32_reverse_kl
                    row_stream_f32_f32_f16_reverse_kl row_stream_f32_f32_bf16_reverse_kl
                    row_stream_f32_f16_f16_reverse_kl row_stream_f32_f16_f32_reverse_kl
                    row_stream_f32_bf16_bf16_reverse_kl row_stream_f32_bf16_f32_reverse_kl
                    row_stream_f16_f32_f32_reverse_kl row_stream_f16_f32_f16_reverse_kl
                    row_stream_f16_f32_bf16_reverse_kl row_stream_f16_f16_f16_reverse_kl
                    row_stream_f16_f16_f32_reverse_kl row_stream_f16_bf16_bf16_reverse_kl
                    row_stream_f16_bf16_f32_reverse_kl row_stream_bf16_f32_f32_reverse_kl
                    row_stream_bf16_f32_f16_reverse_kl row_stream_bf16_f32_bf16_reverse_kl
                    row_stream_bf16_f16_f16_reverse_kl row_stream_bf16_f16_f32_reverse_kl
                    row_stream_bf16_bf16_bf16_reverse_kl row_stream_bf16_bf16_f32_reverse_kl
                    row_stream_f32_f32_f32_mixture row_stream_f32_f32_f16_mixture row_stream_f32_f32_bf16_mixture
                    row_stream_f32_f16_f16_mixture row_stream_f32_f16_f32_mixture row_stream_f32_bf16_bf16_mixture
                    row_stream_f32_bf16_f32_mixture row_stream_f16_f32_f32_mixture row_stream_f16_f32_f16_mixture
                    row_stream_f16_f32_bf16_mixture row_stream_f16_f16_f16_mixture row_stream_f16_f16_f32_mixture
                    row_stream_f16_bf16_bf16_mixture row_stream_f16_bf16_f32_mixture row_stream_bf16_f32_f32_mixture
                    row_stream_bf16_f32_f16_mixture row_stream_bf16_f32_bf16_mixture row_stream_bf16_f16_f16_mixture
                    row_stream_bf16_f16_f32_mixture row_stream_bf16_bf16_bf16_mixture
                    row_stream_bf16_bf16_f32_mixture row_stream_f32_f32_f32_total_variation
                    row_stream_f32_f32_f16_total_variation row_stream_f32_f32_bf16_total_variation
                    row_stream_f32_f16_f16_total_variation row_stream_f32_f16_f32_total_variation
                    row_stream_f32_bf16_bf16_total_variation row_stream_f32_bf16_f32_total_variation
                    row_stream_f16_f32_f32_total_variation row_stream_f16_f32_f16_total_variation
                    row_stream_f16_f32_bf16_total_variation row_stream_f16_f16_f16_total_variation
                    row_stream_f16_f16_f32_total_variation row_stream_f16_bf16_bf16_total_variation
                    row_stream_f16_bf16_f32_total_variation row_stream_bf16_f32_f32_total_variation
                    row_stream_bf16_f32_f16_total_variation row_stream_bf16_f32_bf16_total_variation
                    row_stream_bf16_f16_f16_total_variation row_stream_bf16_f16_f32_total_variation
                    row_stream_bf16_bf16_bf16_total_variation row_stream_bf16_bf16_f32_total_variation;
            }
            Shard(atkd_shard) {
                ATKD_STREAM_THREADS ATKD_STREAM_BLOCKS BlocksAndClusters:
                    row_states_f32_f32 row_states_f32_f16 row_states_f32_bf16 row_states_f16_f32 row_states_f16_f16
                    row_states_f16_bf16 row_states_bf16_f32 row_states_bf16_f16 row_states_bf16_bf16
                    row_states_f32_f32_reverse_kl row_states_f32_f16_reverse_kl row_states_f32_bf16_reverse_kl
                    row_states_f16_f32_reverse_kl row_states_f16_f16_reverse_kl row_states_f16_bf16_reverse_kl
                    row_states_bf16_f32_reverse_kl row_states_bf16_f16_reverse_kl row_states_bf16_bf16_reverse_kl
                    row_states_f32_f32_two_sweeps row_states_f32_f16_two_sweeps row_states_f32_bf16_two_sweeps
                    row_states_f16_f32_two_sweeps row_states_f16_f16_two_sweeps row_states_f16_bf16_two_sweeps
                    row_states_bf16_f32_two_sweeps row_states_bf16_f16_two_sweeps row_states_bf16_bf16_two_sweeps
                    row_terms_f32_f32_mixture row_terms_f32_f16_mixture row_terms_f32_bf16_mixture
                    row_terms_f16_f32_mixture row_terms_f16_f16_mixture row_terms_f16_bf16_mixture
                    row_terms_bf16_f32_mixture row_terms_bf16_f16_mixture row_terms_bf16_bf16_mixture
                    row_terms_f32_f32_total_variation row_terms_f32_f16_total_variation
                    row_terms_f32_bf16_total_variation row_terms_f16_f32_total_variation
                    row_terms_f16_f16_total_variation row_terms_f16_bf16_total_variation
                    row_terms_bf16_f32_total_variation row_terms_bf16_f16_total_variation
                    row_terms_bf16_bf16_total_variation row_gradient_f32_f32 row_gradient_f32_f16
                    row_gradient_f32_bf16 row_gradient_f16_f32 row_gradient_f16_f16 row_gradient_f16_bf16
                    row_gradient_bf16_f32 row_gradient_bf16_f16 row_gradient_bf16_bf16
                    row_gradient_f32_f32_reverse_kl row_gradient_f32_f16_reverse_kl row_gradient_f32_bf16_reverse_kl
                    row_gradient_f16_f32_reverse_kl row_gradient_f16_f16_reverse_kl row_gradient_f16_bf16_reverse_kl
                    row_gradient_bf16_f32_reverse_kl row_gradient_bf16_f16_reverse_kl
                    row_gradient_bf16_bf16_reverse_kl row_gradient_f32_f32_mixture row_gradient_f32_f16_mixture
                    row_gradient_f32_bf16_mixture row_gradient_f16_f32_mixture row_gradient_f16_f16_mixture
                    row_gradient_f16_bf16_mixture row_gradient_bf16_f32_mixture row_gradient_bf16_f16_mixture
                    row_gradient_bf16_bf16_mixture row_gradient_f32_f32_total_variation
                    row_gradient_f32_f16_total_variation row_gradient_f32_bf16_total_variation
                    row_gradient_f16_f32_total_variation row_gradient_f16_f16_total_variation
                    row_gradient_f16_bf16_total_variation row_gradient_bf16_f32_total_variation
                    row_gradient_bf16_f16_total_variation row_gradient_bf16_bf16_total_variation;
                ATKD_MERGE_THREADS ATKD_MERGE_BLOCKS BlocksAndClusters:
                    merge_states merge_states_reverse_kl merge_states_mixture merge_states_total_variation;
            }
            Sparse(atkd_sparse) {
                ATKD_SPARSE_MARGIN_THREADS ATKD_SPARSE_MARGIN_BLOCKS BlocksAndClusters: sparse_margin;
                ATKD_SPARSE_THREADS ATKD_SPARSE_BLOCKS Never:
                    row_sparse_f32 row_sparse_f16 row_sparse_bf16 row_sparse_f32_reverse_kl row_sparse_f16_reverse_kl
                    row_sparse_bf16_reverse_kl row_sparse_f32_mixture row_sparse_f16_mixture row_sparse_bf16_mixture
                    row_sparse_f32_total_variation row_sparse_f16_total_variation row_sparse_bf16_total_variation;
            }
            TokenTerms(atkd_token_terms) {
                ATKD_TERMS_THREADS ATKD_TERMS_BLOCKS BlocksAndClusters:
                    token_terms token_terms_reverse_kl token_terms_mixture token_terms_total_variation;
            }
            ScaleGradient(atkd_scale_gradient) {
                ATKD_SCALE_THREADS ATKD_SCALE_BLOCKS BlocksAndClusters:
                    scale_gradient_f32 scale_gradient_f16 scale_gradient_bf16;
            }
            TokenEntropies(atkd_token_entropies) {
                ATKD_ENTROPY_THREADS ATKD_ENTROPY_BLOCKS BlocksAndClusters:
                    token_entropies_f32 token_entropies_f16 token_entropies_bf16;
            }
            Unfused(atkd_unfused) {
                ATKD_UNFUSED_THREADS ATKD_UNFUSED_BLOCKS BlocksAndClusters:
                    unfused_copy_f32 unfused_widen_f16 unfused_widen_bf16 unfused_narrow_f16 unfused_narrow_bf16
                    unfused_fill unfused_exp_minus_row unfused_over_row unfused_times_row unfused_times unfused_minus
                    unfused_over unfused_log unfused_over_row_slope unfused_times_minus_row unfused_max unfused_sum;
            }
            UnfusedTokens(atkd_unfused_tokens) {
                ATKD_UNFUSED_TOKENS_THREADS ATKD_UNFUSED_TOKENS_BLOCKS Clusters:
                    unfused_targets unfused_losses unfused_target_gradient;
            }
        }
    };
}
#[cfg(feature = "simt")]
pub(crate) use with_kernels;

macro_rules! table {
    ($($variant:ident($params:ident) {
        $($threads:ident $blocks:ident $shrinks:ident: $($name:ident)+;)+
    })+) => {
        /// A kernel's parameter block.
        #[derive(Clone, Copy, Debug)]
        #[cfg_attr(not(feature = "battery"), allow(dead_code, reason = "the battery alone launches the unfused kernels"))]
        pub enum Parameters {
            $($variant($params),)+
        }

        /// All kernels.
        pub const KERNELS: &[Kernel] = &[$($($(Kernel {
            name: stringify!($name),
            parameter_bytes: size_of::<$params>(),
            threads: $threads,
            blocks: $blocks,
            shrinks: Shrinks::$shrinks,
        },)+)+)+];

        impl Parameters {
            /// The address of the block, as a launch wants it.
            pub fn as_ptr(&self) -> *const c_void {
                match self {
                    $(Self::$variant(parameters) => std::ptr::from_ref(parameters).cast(),)+
                }
            }
        }
    };
}
with_kernels!(table);

/// One kernel of a call.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Its name.
    pub kernel: &'static str,
    /// Blocks and threads.
    pub shape: LaunchShape,
    /// Its argument.
    pub parameters: Parameters,
}

impl Launch {
    /// This launch, unless there is nothing to do: a grid without blocks cannot be launched.
    pub fn unless_empty(self) -> Option<Self> {
        (self.shape.grid > 0).then_some(self)
    }
}

/// The name of the kernel for logits of one type.
macro_rules! of_dtype {
    ($kernel:literal, $dtype:expr) => {
        match $dtype {
            $crate::Dtype::F32 => concat!($kernel, "_f32"),
            $crate::Dtype::F16 => concat!($kernel, "_f16"),
            $crate::Dtype::Bf16 => concat!($kernel, "_bf16"),
        }
    };
}
pub(crate) use of_dtype;

/// The name of the kernel for the terms of tokens by a divergence.
pub fn of_terms(family: Family) -> &'static str {
    match family {
        Family::ForwardKl => "token_terms",
        Family::ReverseKl => "token_terms_reverse_kl",
        Family::Mixture(_) => "token_terms_mixture",
        Family::TotalVariation => "token_terms_total_variation",
    }
}

/// The name of a kernel for rows for logits and a gradient of these types: of `row_stream` with all three, else with the
/// models' one, or two. Before them comes `at_1` if a kernel for a sum at temperature 1 is one of its own, and last the
/// divergence's name, where that is not forward KL.
pub fn of_rows(
    row_kernel: RowKernel,
    family: Family,
    [teacher, student, gradient]: [Dtype; 3],
    sum_at_1: bool,
) -> &'static str {
    let at_1 = match row_kernel {
        RowKernel::PipelinedWide if sum_at_1 => "_at_1",
        _ => "",
    };
    let divergence = of_terms(family).strip_prefix("token_terms").unwrap_or_default();
    let types = match row_kernel {
        RowKernel::Stream => vec![teacher, student, gradient],
        _ if teacher == student => vec![student],
        _ => vec![teacher, student],
    };
    let types = types.into_iter().map(|dtype| match dtype {
        Dtype::F32 => "_f32",
        Dtype::F16 => "_f16",
        Dtype::Bf16 => "_bf16",
    });
    let name = [row_kernel.name(), at_1].into_iter().chain(types).chain([divergence]);
    let name: String = name.collect();
    let kernel = KERNELS.iter().find(|kernel| kernel.name == name);
    kernel.expect("a plan chooses a kernel only for the types that it is there for").name
}

/// The kernels of shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardKernel {
    /// `row_states`
    States,
    /// `row_terms`, of divergences of two sweeps
    Terms,
    /// `row_gradient`
    Gradient,
    /// `merge_states`
    Merge,
}

/// The name of a kernel of shards, for logits of these types where it reads any.
pub fn of_shard(
    kernel: ShardKernel,
    family: Family,
    [teacher, student]: [Dtype; 2],
) -> &'static str {
    let two_sweeps = matches!(family, Family::Mixture(_) | Family::TotalVariation);
    let divergence = of_terms(family).strip_prefix("token_terms").unwrap_or_default();
    let [teacher, student] = [teacher, student].map(|dtype| of_dtype!("", dtype));
    let name = match kernel {
        ShardKernel::States if two_sweeps => format!("row_states{teacher}{student}_two_sweeps"),
        ShardKernel::States => format!("row_states{teacher}{student}{divergence}"),
        ShardKernel::Terms => format!("row_terms{teacher}{student}{divergence}"),
        ShardKernel::Gradient => format!("row_gradient{teacher}{student}{divergence}"),
        ShardKernel::Merge => format!("merge_states{divergence}"),
    };
    let kernel = KERNELS.iter().find(|kernel| kernel.name == name);
    kernel.expect("shards have kernels for all types").name
}

/// The name of the kernel for rows of a sparse teacher, for a student's logits of this type.
pub fn of_sparse(family: Family, student: Dtype) -> &'static str {
    let divergence = of_terms(family).strip_prefix("token_terms").unwrap_or_default();
    let name = format!("{}{divergence}", of_dtype!("row_sparse", student));
    let kernel = KERNELS.iter().find(|kernel| kernel.name == name);
    kernel.expect("sparse teachers have kernels for all types").name
}

/// The starts of rows, in the form in which kernels find them.
pub fn strides(logits: RawLogits, tokens: usize) -> atkd_strides {
    let strides = logits.strides.of(tokens);
    let (skip, inner) = strides.skip();
    // row / inner, rounded down, is row * inverse / 2^(32 + shift) for every row below 2^31: the inverse is too large
    // by at most 1, and 2^31 by no more than `inner` is no more than 2^(32 + shift).
    let shift = (inner as u32).next_power_of_two().ilog2().saturating_sub(1);
    let inverse = (1_u64 << (32 + shift)) / inner as u64 + 1;
    atkd_strides {
        stride: strides.row() as i64,
        skip,
        inverse: if skip == 0 { 0 } else { inverse as u32 },
        shift,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Divergence, Strides};

    /// Every kernel for rows is there for the types that plans choose it for, and for every divergence.
    #[test]
    fn kernels_for_rows_by_divergence_and_types() {
        use Dtype::{Bf16, F16, F32};
        let mixture = Divergence::Jsd { beta: 0.5 }.family();
        let named = |row_kernel, family, types, name| {
            assert_eq!(of_rows(row_kernel, family, types, false), name);
        };
        named(RowKernel::Resident, Family::ForwardKl, [F16; 3], "row_resident_f16");
        named(RowKernel::Pipelined, Family::ReverseKl, [F32; 3], "row_pipelined_f32_reverse_kl");
        named(RowKernel::PipelinedWide, mixture, [Bf16; 3], "row_pipelined_wide_bf16_mixture");
        named(RowKernel::Stream, Family::ForwardKl, [F32, Bf16, F32], "row_stream_f32_bf16_f32");
        let stream = "row_stream_f32_bf16_bf16_total_variation";
        named(RowKernel::Stream, Family::TotalVariation, [F32, Bf16, Bf16], stream);
        for family in [Family::ForwardKl, Family::ReverseKl, mixture, Family::TotalVariation] {
            assert!(KERNELS.iter().any(|kernel| kernel.name == of_terms(family)));
            for teacher in [F32, F16, Bf16] {
                for student in [F32, F16, Bf16] {
                    for gradient in [F32, F16, Bf16] {
                        if student.check_gradient(gradient).is_err() {
                            continue;
                        }
                        for sum_at_1 in [false, true] {
                            of_rows(
                                RowKernel::Stream,
                                family,
                                [teacher, student, gradient],
                                sum_at_1,
                            );
                        }
                    }
                }
                for row_kernel in RowKernel::ALL {
                    of_rows(row_kernel, family, [teacher; 3], false);
                }
                for row_kernel in [RowKernel::Pipelined, RowKernel::PipelinedWide] {
                    of_rows(row_kernel, family, [teacher, teacher, F32], false);
                }
                of_rows(RowKernel::PipelinedWide, family, [teacher, teacher, F32], true);
                if teacher != F32 {
                    for gradient in [teacher, F32] {
                        of_rows(RowKernel::PipelinedWide, family, [F32, teacher, gradient], false);
                    }
                    of_rows(RowKernel::PipelinedWide, family, [teacher, F32, F32], false);
                }
            }
        }
    }

    #[test]
    fn kernels_of_shards_by_divergence_and_types() {
        let mixture = Divergence::Jsd { beta: 0.5 }.family();
        for family in [Family::ForwardKl, Family::ReverseKl, mixture, Family::TotalVariation] {
            for teacher in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                for student in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                    for kernel in [ShardKernel::States, ShardKernel::Gradient, ShardKernel::Merge] {
                        of_shard(kernel, family, [teacher, student]);
                    }
                    if family == mixture || family == Family::TotalVariation {
                        of_shard(ShardKernel::Terms, family, [teacher, student]);
                    }
                }
            }
        }
    }

    /// The table names the launch bounds that each kernel is compiled with.
    #[test]
    fn launch_bounds_are_those_of_the_sources() {
        // Starts of kernels' names, up to where a macro pastes the rest, and the names of their bounds.
        let mut sources = Vec::new();
        for file in std::fs::read_dir("kernels").unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "cu") {
                let text = std::fs::read_to_string(path).unwrap();
                for entry in text.split("ATKD_KERNEL(").skip(1) {
                    let arguments: Vec<&str> = entry.split([',', ')']).map(str::trim).collect();
                    let (start, _) = arguments[0].split_once("##").unwrap_or((arguments[0], ""));
                    sources.push((start.to_string(), arguments[2].to_string()));
                }
            }
        }
        let number = |name: String| -> u32 {
            let line = format!("pub const {name}: u32 = ");
            let (_, rest) = include_str!("../params.rs").split_once(&line).expect(&name);
            rest.split(';').next().unwrap().parse().unwrap()
        };
        for kernel in KERNELS {
            let entries = sources.iter().filter(|(start, _)| kernel.name.starts_with(start));
            let entry = entries.max_by_key(|(start, _)| start.len());
            let (_, bounds) = entry.unwrap_or_else(|| panic!("no source has {}", kernel.name));
            let of_source = ["THREADS", "BLOCKS"].map(|of| number(format!("{bounds}_{of}")));
            assert_eq!([kernel.threads, kernel.blocks], of_source, "{}", kernel.name);
        }
    }

    #[test]
    fn rows_start_where_the_kernels_find_them() {
        let mut random = fastrand::Rng::with_seed(0);
        for inner in
            (2..70).chain((2..31).flat_map(|bits| [(1 << bits) - 1, 1 << bits, (1 << bits) + 1]))
        {
            let logits = RawLogits {
                address: 0,
                dtype: Dtype::F16,
                strides: Strides::nested(inner, 7 * inner + 5, 7),
            };
            let at = strides(logits, i32::MAX as usize);
            let last = i32::MAX as usize;
            let near = |row: usize| [row.saturating_sub(1), row, row + 1];
            let rows =
                (0..8).flat_map(|times| near(times * inner)).chain(near(last / inner * inner));
            let rows = rows.chain((0..100).map(|_| random.usize(..last))).chain([last]);
            for row in rows.filter(|&row| row <= last) {
                // The arithmetic of row_at in kernels/packed.cuh.
                let outer = (row as u64 * u64::from(at.inverse)) >> 32 >> at.shift;
                let start = row as i64 * at.stride + outer as i64 * at.skip;
                assert_eq!(start, logits.strides.start(row) as i64, "{row} of {inner}");
            }
        }
    }
}
