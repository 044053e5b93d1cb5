//! The unfused loss as kernel launches, one per step.

use std::ffi::c_void;

use super::EPSILON;
use crate::call::{RawCall, RawLabels, RawLogits, RawOutput};
use crate::device::kernel::{Launch, Parameters};
use crate::device::stages::{self, Checked};
use crate::device::workspace::Layout;
use crate::device::workspace::Memory as Workspace;
use crate::params::*;
use crate::plan::{DeviceProperties, LaunchShape, Plan};
use crate::{Dtype, Objective, Result};

/// Full-size results that are alive at once.
const MATRICES: usize = 8;
/// Results with one number a token.
const VECTORS: usize = 11;

/// The places of the steps' results in one piece of device memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    pub tokens: usize,
    pub vocab: usize,
}

impl Memory {
    /// The part that the selection needs, as in the fused call.
    pub fn layout(self) -> Layout {
        Layout { capacity: self.tokens }
    }

    fn vectors(self) -> usize {
        self.layout().bytes().next_multiple_of(256)
    }

    /// Bytes before the reduced loss, a float32.
    pub fn loss(self) -> usize {
        self.vectors() + VECTORS * self.tokens * 4
    }

    fn matrices(self) -> usize {
        (self.loss() + 4).next_multiple_of(256)
    }

    pub fn bytes(self) -> usize {
        self.matrices() + MATRICES * self.tokens * self.vocab * 4
    }
}

/// The steps of the paper's ATKD (lambda 0.2, hard ratio 0.5, mean over the tokens), loss and gradient.
/// Rows are contiguous, labels 64 bits.
///
/// # Errors
/// The launches of an unfused call, in the form of the fused one's.
pub(crate) fn launches(
    call: &RawCall,
    device: &DeviceProperties,
    address: u64,
) -> Result<Vec<Launch>> {
    let RawCall { tokens, vocab, .. } = *call;
    let memory = Memory { tokens, vocab };
    let objective = Objective::default();
    let gradient = call.gradient.expect("the baseline computes a gradient");
    let Some(RawLabels::I64(labels)) = call.labels else { panic!("the baseline's labels are i64") };

    let m: [u64; MATRICES] =
        std::array::from_fn(|i| address + (memory.matrices() + i * tokens * vocab * 4) as u64);
    let [max, sum, p_target, q_target, uncertainty, rest, dkd, d_rest, factor, dot, losses]: [u64;
        VECTORS] = std::array::from_fn(|i| address + (memory.vectors() + i * tokens * 4) as u64);
    let loss = address + memory.loss() as u64;

    let rows = LaunchShape { grid: tokens as u32, block: 512, cluster: 1, team: 1, shared: 0 };
    let step_over =
        |[tokens, vocab]: [usize; 2], kernel, [a, b, row, out]: [u64; 4], constant| Launch {
            kernel,
            shape: LaunchShape { grid: tokens as u32, ..rows },
            parameters: Parameters::Unfused(atkd_unfused {
                a: a as *const c_void,
                b: b as *const f32,
                row: row as *const f32,
                out: out as *mut c_void,
                tokens: tokens as u32,
                vocab: vocab as u32,
                constant,
                reserved: 0,
            }),
        };
    let step = |kernel, a, b, row, constant, out| {
        step_over([tokens, vocab], kernel, [a, b, row, out], constant)
    };
    let widen = |from: RawLogits, to| {
        let kernel = match from.dtype {
            Dtype::F32 => "unfused_copy_f32",
            Dtype::F16 => "unfused_widen_f16",
            Dtype::Bf16 => "unfused_widen_bf16",
        };
        step(kernel, from.address, 0, 0, 0.0, to)
    };
    let softmax = |logits, exponentials, out| {
        [
            step("unfused_max", logits, 0, 0, 0.0, max),
            step("unfused_exp_minus_row", logits, 0, max, 0.0, exponentials),
            step("unfused_sum", exponentials, 0, 0, 0.0, sum),
            step("unfused_over_row", exponentials, 0, sum, 0.0, out),
        ]
    };

    // The fused call's own selection is the best there is for the baseline too.
    let ranked = RawCall { margins: Some(uncertainty), sequences: None, ..*call };
    let checked = Checked::new(&objective, &ranked)?;
    let plan = Plan::new(device, &checked.problem, None);
    let workspace = Workspace::new(memory.layout(), address);
    let mut fused = stages::launches(&checked, &RawOutput::default(), &plan, workspace)?;
    let select = fused.find(|launch| launch.kernel == "select_hard").expect("ATKD selects");
    let Parameters::SelectHard(atkd_select_hard { batch, .. }) = select.parameters else {
        unreachable!("that is its parameter block");
    };

    // All tokens as one row.
    let reduce = step_over([1, tokens], "unfused_sum", [losses, 0, 0, loss], 0.0);
    let [p, q, mask] = [m[0], m[1], m[2]];
    let of_tokens = |kernel, d_q: u64| Launch {
        kernel,
        shape: LaunchShape { grid: tokens.div_ceil(256) as u32, block: 256, ..rows },
        parameters: Parameters::UnfusedTokens(atkd_unfused_tokens {
            p: p as *const f32,
            q: q as *const f32,
            labels: labels as *const i64,
            groups: batch.groups,
            dkd: dkd as *const f32,
            d_rest: d_rest as *const f32,
            mask: mask as *mut f32,
            d_q: d_q as *mut f32,
            p_target: p_target as *mut f32,
            q_target: q_target as *mut f32,
            uncertainty: uncertainty as *mut f32,
            rest: rest as *mut f32,
            factor: factor as *mut f32,
            loss: losses as *mut f32,
            tokens: tokens as u32,
            vocab: vocab as u32,
            easy: 0.2,
            hard: 0.8,
            scale: 1.0 / tokens as f32,
            epsilon: EPSILON,
        }),
    };

    let mut steps = vec![widen(call.teacher, m[1])];
    steps.extend(softmax(m[1], m[2], p));
    steps.push(widen(call.student, m[2]));
    steps.extend(softmax(m[2], m[3], q));
    let [p_others, q_others, p_hat, q_hat] = [m[3], m[4], m[0], m[3]];
    let [log_p, log_q, gap, product] = [m[5], m[6], m[7], m[5]];
    steps.extend([
        step("unfused_fill", 0, 0, 0, 1.0, mask),
        of_tokens("unfused_targets", 0),
        step("unfused_times", p, mask, 0, 0.0, p_others),
        step("unfused_times", q, mask, 0, 0.0, q_others),
        step("unfused_over_row", p_others, 0, uncertainty, EPSILON, p_hat),
        step("unfused_over_row", q_others, 0, rest, EPSILON, q_hat),
        step("unfused_log", p_hat, 0, 0, EPSILON, log_p),
        step("unfused_log", q_hat, 0, 0, EPSILON, log_q),
        step("unfused_minus", log_p, log_q, 0, 0.0, gap),
        step("unfused_times", p_hat, gap, 0, 0.0, product),
        step("unfused_sum", product, 0, 0, 0.0, dkd),
        select,
        of_tokens("unfused_losses", 0),
        reduce,
    ]);
    let [d_log_q, d_q_hat, d_q_others, slope] = [m[5], m[6], m[5], m[7]];
    let [d_q, d_q_times_q, exact] = [m[6], m[5], m[5]];
    steps.extend([
        step("unfused_times_row", p_hat, 0, factor, 0.0, d_log_q),
        step("unfused_over", d_log_q, q_hat, 0, EPSILON, d_q_hat),
        step("unfused_over_row_slope", d_q_hat, q_others, rest, EPSILON, slope),
        step("unfused_sum", slope, 0, 0, 0.0, d_rest),
        step("unfused_over_row", d_q_hat, 0, rest, EPSILON, d_q_others),
        step("unfused_times", d_q_others, mask, 0, 0.0, d_q),
        of_tokens("unfused_target_gradient", d_q),
        step("unfused_times", d_q, q, 0, 0.0, d_q_times_q),
        step("unfused_sum", d_q_times_q, 0, 0, 0.0, dot),
    ]);
    let narrow = match gradient.dtype {
        Dtype::F32 => None,
        Dtype::F16 => Some("unfused_narrow_f16"),
        Dtype::Bf16 => Some("unfused_narrow_bf16"),
    };
    let result = if narrow.is_some() { exact } else { gradient.address };
    steps.push(step("unfused_times_minus_row", q, d_q, dot, 0.0, result));
    steps.extend(narrow.map(|kernel| step(kernel, exact, 0, 0, 0.0, gradient.address)));
    Ok(steps)
}
