//! The stages of a call with a sparse teacher as launches.

use std::ffi::c_void;

use super::kernel::{Launch, Parameters, of_sparse};
use super::session::Launches;
use super::stages::{Checked, Stages, check_sizes, problem};
use super::workspace::{Column, Memory};
use crate::call::{RawLabels, RawOutput, RawSparseCall, RawSparseTeacher};
use crate::params::*;
use crate::plan::{self, DeviceProperties, HardTokens, LaunchShape, Plan, Schedule, Stage};
use crate::sparse::{less_exact, tolerance};
use crate::{Dtype, Error, Objective, Result, Tail};

/// The launches of a call. The teacher tells the hard tokens before any logit is read, so that no row is done twice.
///
/// # Errors
/// If sizes and addresses do not go together, the tokens exceed the workspace, or the tail is none that kernels have.
pub(crate) fn launches(
    objective: &Objective,
    call: &RawSparseCall,
    output: &RawOutput,
    device: &DeviceProperties,
    memory: Memory,
) -> Result<Launches> {
    let of_student = call.of_student();
    check_sizes(of_student.tokens, of_student.vocab)?;
    call.check(objective)?;
    output.check()?;
    memory.check(of_student.tokens)?;
    let RawSparseTeacher {
        top_k,
        indices,
        log_probs,
        dtype,
        target_log_probs,
        target_rounding,
        tail,
    } = call.teacher;
    tail.check(objective)?;
    let tail = match tail {
        Tail::Zero => ATKD_TAIL_ZERO,
        Tail::Bucket => ATKD_TAIL_BUCKET,
        Tail::Sampled if target_log_probs.is_none() => return Err(Error::SampledTarget),
        Tail::Sampled => ATKD_TAIL_SAMPLED,
        Tail::Uniform => return Err(Error::NoUniformTail),
    };

    let problem = problem(objective, &of_student);
    let mut plan = Plan::new(device, &problem, None);
    let given = problem.hard == HardTokens::Given;
    plan.schedule = if given { Schedule::Given } else { Schedule::SelectFirst };
    let checked = Checked { objective, call: &of_student, problem };
    let stages = Stages::new(&checked, output, &plan, memory);

    let (indices, index_bytes) = match indices {
        RawLabels::I64(address) => (address, 8),
        RawLabels::I32(address) => (address, 4),
    };
    let parameters = |shape: LaunchShape, tile, write_keys: bool| {
        let mut rows = stages.parameters_of_rows(shape);
        rows.slice = tile;
        // The margins of the classes are rounded once more than those that are there.
        rows.teacher_margin = memory.column(Column::Mispredicted) as *mut f32;
        rows.write_keys = write_keys.into();
        rows.clusters = shape.grid / shape.blocks_per_row();
        Parameters::Sparse(atkd_sparse {
            rows,
            indices: indices as *const c_void,
            log_probs: log_probs as *const c_void,
            target_log_probs: target_log_probs.unwrap_or(0) as *const f32,
            references: memory.column(Column::Tkd) as *mut f32,
            targets: memory.column(Column::Dkd) as *mut f32,
            rests: memory.column(Column::Loss) as *mut f64,
            margins: memory.column(Column::Uncertainty) as *mut f32,
            tolerance: tolerance(less_exact(dtype, target_log_probs.map(|_| target_rounding))),
            top_k: top_k as u32,
            index_bytes,
            log_prob_type: match dtype {
                Dtype::F32 => ATKD_GRADIENT_F32,
                Dtype::F16 => ATKD_GRADIENT_F16,
                Dtype::Bf16 => ATKD_GRADIENT_BF16,
            },
            tail,
        })
    };
    let margin_shape = plan::sparse_margin(device, of_student.tokens);
    let margins = Launch {
        kernel: "sparse_margin",
        shape: margin_shape,
        parameters: parameters(margin_shape, 0, true),
    };
    let student = of_student.student.dtype;
    let (row_shape, tile) =
        plan::row_sparse(device, of_student.tokens, of_student.vocab, student, top_k);
    let rows = Launch {
        kernel: of_sparse(objective.divergence().family(), student),
        shape: row_shape,
        parameters: parameters(row_shape, tile, false),
    };
    let finish = stages.launch(Stage::Finish);
    let launches = match problem.hard {
        HardTokens::Given => [margins, stages.launch(Stage::Count), rows, finish],
        // The selection leaves the caller's margins as keys, which then become the teacher's.
        HardTokens::ByMargins => [stages.launch(Stage::Select), margins, rows, finish],
        HardTokens::Selected => [margins, stages.launch(Stage::Select), rows, finish],
    };
    Ok(launches.into_iter().filter_map(Launch::unless_empty).collect())
}
