//! The stages of a call, and their launches.
//!
//! A [`Schedule`] says which stages a call has, in which order; [`Stages`] makes the launch of each.

use std::f64::consts::LN_2;
use std::ffi::c_void;

use super::kernel::{Launch, Parameters, of_dtype, of_rows, of_terms, strides};
use super::workspace::{Column, Memory};
use crate::call::{
    RawCall, RawEntropies, RawLogits, RawOutput, RawSelection, RawTeacher, check_alignment,
};
use crate::objective::{Family, Mixture, unit_interval};
use crate::params::*;
use crate::plan::{
    self, DeviceProperties, HardTokens, LaunchShape, Plan, Problem, Schedule, Stage,
};
use crate::{Coefficient, Coefficients, Dtype, Error, Objective, Reduction, Result, SelectionRule};

/// A call whose shapes, strides and addresses go together, and that kernels can do. What lies behind an address cannot
/// be known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checked<'a> {
    pub objective: &'a Objective,
    pub call: &'a RawCall,
    /// The facts of the call that a plan follows from.
    pub problem: Problem,
}

impl<'a> Checked<'a> {
    /// # Errors
    /// If the call's shapes, strides and addresses do not go together, or are too large.
    pub fn new(objective: &'a Objective, call: &'a RawCall) -> Result<Self> {
        check_sizes(call.tokens, call.vocab)?;
        call.check(objective)?;
        Ok(Self { objective, call, problem: problem(objective, call) })
    }
}

pub(super) fn problem(objective: &Objective, call: &RawCall) -> Problem {
    Problem {
        tokens: call.tokens,
        vocab: call.vocab,
        teacher: call.teacher.dtype,
        student: call.student.dtype,
        gradient: call.gradient.map_or(call.student.dtype, |gradient| gradient.dtype),
        sum_at_1: objective.ce_weight() != 0.0
            && (objective.temperature() != 1.0 || call.temperatures.is_some()),
        aligned_alike: aligned_alike(call.student, call.teacher, call.tokens)
            && call.gradient.is_none_or(|to| {
                [call.student, call.teacher]
                    .iter()
                    .all(|&logits| aligned_alike(logits, to, call.tokens))
            }),
        scopes: scopes(call),
        target: objective.target(),
        hard: match (call.hard, call.margins) {
            (Some(_), _) => HardTokens::Given,
            (None, Some(_)) => HardTokens::ByMargins,
            (None, None) => HardTokens::Selected,
        },
        gradient_depends_on_hard: objective.depends_on_selection() && call.gradient.is_some(),
        needs_group_sizes: call.gradient.is_some()
            && objective.selects_before_gradients(scopes(call)),
        in_place: call.is_in_place(),
    }
}

/// Returns true if all rows of both start equally many elements after multiples of 16 bytes, modulo the elements that both
/// have in whole 16 bytes.
fn aligned_alike(one: RawLogits, other: RawLogits, tokens: usize) -> bool {
    let period = 16 / one.dtype.size().max(other.dtype.size()) as i64;
    let offsets = |logits: RawLogits| {
        let strides = logits.strides.of(tokens);
        let first = logits.address / logits.dtype.size() as u64 % period as u64;
        let [row, skip] = [strides.row() as i64, strides.skip().0].map(|n| n.rem_euclid(period));
        // Whole periods do not matter, wherever they are skipped.
        let inner = if skip == 0 { 0 } else { strides.skip().1 };
        (first, row, skip, inner)
    };
    offsets(one) == offsets(other)
}

/// Parts within which hard tokens are selected.
fn scopes(call: &RawCall) -> usize {
    call.sequences.map_or(1, |(_, count)| count)
}

pub(super) fn check_sizes(tokens: usize, vocab: usize) -> Result<()> {
    for (what, value) in [("the number of tokens", tokens), ("the vocabulary size", vocab)] {
        if value > i32::MAX as usize {
            return Err(Error::TooLarge { what, value, most: i32::MAX as usize });
        }
    }
    Ok(())
}

/// The pass over the teacher's logits, which leaves margins at `to` if that is not 0.
pub(super) fn margin_pass(call: &RawCall, batch: atkd_batch, plan: &Plan, to: u64) -> Launch {
    Launch {
        kernel: of_dtype!("teacher_margin", call.teacher.dtype),
        shape: plan.margin,
        parameters: Parameters::TeacherMargin(atkd_teacher_margin {
            batch,
            margins: to as *mut f32,
            blocks: plan.margin.grid,
            reserved: 0,
        }),
    }
}

/// The kernel that leaves the teacher's margins at `to`, if there is anything to do.
///
/// # Errors
/// If the shape, the stride and the addresses do not go together, or exceed the workspace.
pub(crate) fn margins(
    objective: &Objective,
    teacher: &RawTeacher,
    to: u64,
    device: &DeviceProperties,
    memory: Memory,
) -> Result<Option<Launch>> {
    check_sizes(teacher.tokens, teacher.vocab)?;
    teacher.check(objective, to)?;
    memory.check(teacher.tokens)?;
    let call = teacher.call();
    let plan = Plan::new(device, &problem(objective, &call), None);
    Ok(margin_pass(&call, memory.batch_of(objective, &call), &plan, to).unless_empty())
}

/// The kernel of a selection apart from any call, if there is anything to do. It leaves the workspace's counters alone.
///
/// # Errors
/// If the ratio is not in [0, 1], or the addresses do not go together, or they exceed the workspace.
pub(crate) fn selection(
    selection: &RawSelection,
    hard_ratio: f64,
    device: &DeviceProperties,
    memory: Memory,
) -> Result<Option<Launch>> {
    let RawSelection { tokens, margins, valid, sequences, rule, hard } = *selection;
    unit_interval("the hard ratio", hard_ratio)?;
    check_sizes(tokens, 1)?;
    selection.check()?;
    let scopes = sequences.map_or(1, |(_, count)| count);
    memory.check(tokens)?;
    let launch = Launch {
        kernel: "select_hard",
        shape: plan::select_hard(device, tokens, scopes),
        parameters: Parameters::SelectHard(atkd_select_hard {
            batch: memory.batch(tokens),
            margins: margins as *const f32,
            valid: valid.unwrap_or(0) as *const u8,
            offsets: sequences.map_or(0, |(address, _)| address) as *const i64,
            mispredicted: std::ptr::null_mut(),
            states: memory.states(),
            kept_threshold: std::ptr::null_mut(),
            hard_to: hard as *mut u8,
            hard_ratio,
            scopes: scopes as u32,
            count: 0,
            rule: self::rule(rule),
            reserved: 0,
        }),
    };
    Ok(if tokens > 0 { launch.unless_empty() } else { None })
}

pub(super) fn rule(rule: SelectionRule) -> u32 {
    match rule {
        SelectionRule::TopK => ATKD_TOP_K,
        SelectionRule::Median => ATKD_MEDIAN,
    }
}

/// The kernels of a call, in order. Its results are in the workspace, and where `output` wants them.
///
/// # Errors
/// If the outputs' addresses are not aligned, or the call exceeds the workspace.
pub(crate) fn launches(
    checked: &Checked,
    output: &RawOutput,
    plan: &Plan,
    memory: Memory,
) -> Result<impl Iterator<Item = Launch> + use<>> {
    output.check()?;
    memory.check(checked.call.tokens)?;
    let (stages, margin_pass) = (Stages::new(checked, output, plan, memory), plan.margin_pass);
    let order = plan.schedule.stages().iter();
    let order = order.filter(move |&&stage| stage != Stage::Margins || margin_pass);
    Ok(order.filter_map(move |&stage| stages.launch(stage).unless_empty()))
}

/// A call, from which the launch of each stage is made.
pub(super) struct Stages {
    objective: Objective,
    call: RawCall,
    pub output: RawOutput,
    pub problem: Problem,
    pub plan: Plan,
    memory: Memory,
    pub batch: atkd_batch,
}

impl Stages {
    pub fn new(checked: &Checked, output: &RawOutput, plan: &Plan, memory: Memory) -> Self {
        let Checked { objective, call, problem } = *checked;
        let batch = memory.batch_of(objective, call);
        let (objective, call, output, plan) = (*objective, *call, *output, *plan);
        Self { objective, call, output, problem, plan, memory, batch }
    }

    pub fn launch(&self, stage: Stage) -> Launch {
        match stage {
            Stage::Margins => margin_pass(&self.call, self.batch, &self.plan, 0),
            Stage::Count => self.count(),
            Stage::Select => self.select(),
            Stage::Rows => self.rows(self.plan.rows, false),
            Stage::Repair => self.rows(self.plan.rows_again, true),
            Stage::Finish => self.finish(),
        }
    }

    /// The launch between two of rows, with the targets, groups and weights of so many tokens for rows in `memory`. The
    /// groups are those of the `other_group`, if it is wanted.
    pub fn prepare(&self, count: usize, memory: Memory, other_group: bool) -> Launch {
        Launch {
            kernel: "prepare_rows",
            shape: plan::prepare_rows(count),
            parameters: Parameters::PrepareRows(atkd_prepare_rows {
                batch: self.batch,
                mispredicted: memory.column(Column::Mispredicted) as *const u32,
                targets: memory.column(Column::Targets) as *mut i32,
                groups: memory.column(Column::Groups) as *mut u8,
                token_weights: memory.column(Column::Keys) as *mut f32,
                temperatures: memory.column(Column::Mispredicted) as *mut f32,
                states: memory.states(),
                count: count as u32,
                other_group: other_group.into(),
            }),
        }
    }

    /// The batch for kernels that ask for valid tokens alone: the labels tell, and targets may not be there yet.
    fn labelled(&self) -> atkd_batch {
        atkd_batch { target: ATKD_TARGET_LABEL, ..self.batch }
    }

    fn predicts(&self) -> bool {
        self.plan.schedule == Schedule::PredictThenRepair
    }

    /// The caller's margins, if hard tokens are selected by them.
    fn margins_given(&self) -> Option<u64> {
        self.call.margins.filter(|_| self.problem.hard == HardTokens::ByMargins)
    }

    fn count(&self) -> Launch {
        self.count_by(0, self.call.hard.is_some())
    }

    /// With the numbers of valid and hard tokens at `counts`, if that is not 0; else with that of hard ones only if they are
    /// counted here.
    pub fn count_by(&self, counts: u64, count_hard: bool) -> Launch {
        Launch {
            kernel: "count_valid",
            shape: self.plan.count,
            parameters: Parameters::CountValid(atkd_count_valid {
                batch: self.labelled(),
                hard: self.call.hard.unwrap_or(0) as *const u8,
                states: self.memory.states(),
                kept_threshold: self.memory.kept_threshold(),
                counts: counts as *const u32,
                valid_group: if self.objective.hard_ratio() == 1.0 { ATKD_HARD } else { ATKD_EASY },
                count_hard: count_hard.into(),
            }),
        }
    }

    fn select(&self) -> Launch {
        let mispredicted =
            if self.predicts() { self.memory.column(Column::Mispredicted) } else { 0 };
        Launch {
            kernel: "select_hard",
            shape: self.plan.select,
            parameters: Parameters::SelectHard(atkd_select_hard {
                batch: self.labelled(),
                margins: self.margins_given().unwrap_or(0) as *const f32,
                valid: std::ptr::null(),
                offsets: self.call.sequences.map_or(0, |(address, _)| address) as *const i64,
                mispredicted: mispredicted as *mut u32,
                states: self.memory.states(),
                kept_threshold: self.memory.kept_threshold(),
                hard_to: std::ptr::null_mut(),
                hard_ratio: self.objective.hard_ratio(),
                scopes: self.problem.scopes as u32,
                count: (self.plan.schedule == Schedule::SelectFirst).into(),
                rule: rule(self.objective.selection_rule()),
                reserved: 0,
            }),
        }
    }

    /// The rows' kernel: for all tokens, or for the mispredicted ones again.
    fn rows(&self, shape: LaunchShape, again: bool) -> Launch {
        let Self { problem, plan, memory, .. } = self;
        let mispredicted = if again { memory.column(Column::Mispredicted) } else { 0 };
        // Rows leave the keys unless a pass over the teacher's logits has, or a prediction that had them.
        let write_keys = !again && (!plan.margin_pass || self.margins_given().is_some());
        Launch {
            kernel: of_rows(
                plan.row_kernel,
                self.objective.divergence().family(),
                [problem.teacher, problem.student, problem.gradient],
                problem.sum_at_1,
            ),
            shape,
            parameters: Parameters::Rows(atkd_rows {
                mispredicted: mispredicted as *const u32,
                write_keys: write_keys.into(),
                predicts: (self.predicts() && !again).into(),
                ..self.parameters_of_rows(shape)
            }),
        }
    }

    /// The parameters of a kernel for rows that does all tokens, predicts nothing and leaves no keys.
    pub fn parameters_of_rows(&self, shape: LaunchShape) -> atkd_rows {
        let Self { call, problem, plan, memory, .. } = self;
        atkd_rows {
            batch: self.batch,
            objective: self.weights(),
            student: call.student.address as *const c_void,
            gradient: call.gradient.map_or(0, |gradient| gradient.address) as *mut c_void,
            upstream: call.upstream.unwrap_or(0) as *const f32,
            teacher_margin: memory.column(Column::Uncertainty) as *mut f32,
            student_margin: memory.column(Column::Tkd) as *mut f32,
            dkd: memory.column(Column::Dkd) as *mut f32,
            student_margin_at_1: memory.column(Column::Loss) as *mut f64,
            states: memory.states(),
            mispredicted: std::ptr::null(),
            student_strides: strides(call.student, call.tokens),
            gradient_strides: strides(call.gradient.unwrap_or(call.student), call.tokens),
            scale: self.scale() * self.objective.upstream_gradient(),
            hard_ratio: self.ratio_for_group_sizes(),
            reduction: self.reduction(),
            write_keys: 0,
            predicts: 0,
            clusters: shape.grid / shape.blocks_per_row(),
            team: shape.team,
            slice: plan.slice_chunks,
            gradient_type: match problem.gradient {
                Dtype::F32 => ATKD_GRADIENT_F32,
                Dtype::F16 => ATKD_GRADIENT_F16,
                Dtype::Bf16 => ATKD_GRADIENT_BF16,
            },
            divergence: self.divergence(),
        }
    }

    fn finish(&self) -> Launch {
        let Self { output, plan, memory, .. } = self;
        Launch {
            kernel: of_terms(self.objective.divergence().family()),
            shape: plan.terms,
            parameters: Parameters::TokenTerms(atkd_token_terms {
                batch: self.batch,
                objective: self.weights(),
                uncertainty: memory.column(Column::Uncertainty) as *mut f32,
                tkd: memory.column(Column::Tkd) as *mut f32,
                dkd: memory.column(Column::Dkd) as *mut f32,
                loss: memory.column(Column::Loss) as *mut f64,
                sums: memory.states().cast(),
                reduced_loss_to: output.loss.unwrap_or(0) as *mut f32,
                uncertainty_to: output.uncertainty.unwrap_or(0) as *mut f32,
                tkd_to: output.tkd.unwrap_or(0) as *mut f32,
                dkd_to: output.dkd.unwrap_or(0) as *mut f32,
                margin_to: output.margin.unwrap_or(0) as *mut f32,
                token_loss_to: output.token_loss.unwrap_or(0) as *mut f32,
                groups_to: output.groups.unwrap_or(0) as *mut u8,
                scale: self.scale(),
                reduction: self.reduction(),
                blocks: plan.terms.grid,
                divergence: self.divergence(),
            }),
        }
    }

    fn divergence(&self) -> atkd_divergence {
        let family = self.objective.divergence().family();
        let mixture = match family {
            Family::Mixture(mixture) => mixture,
            _ => Mixture { share: 0.0, of_teacher: 0.0, of_student: 0.0 },
        };
        let Mixture { share, of_teacher, of_student } = mixture;
        let rest = 1.0 - share;
        atkd_divergence {
            share: share as f32,
            rest: rest as f32,
            of_teacher: (of_teacher * LN_2) as f32,
            of_student: (of_student * LN_2) as f32,
            of_difference: (rest * (of_student * share - of_teacher * rest)) as f32,
            taylor: taylor(share),
            plain: (self.objective.is_plain() && family != Family::ForwardKl).into(),
        }
    }

    fn weights(&self) -> atkd_objective {
        let objective = &self.objective;
        // The kernels multiply by the powers of each token's own.
        let own = self.call.temperatures.is_some();
        let temperature = if own { 1.0 } else { objective.temperature() };
        let scale = objective.distillation_scale_at(temperature);
        let number = |coefficient| {
            let (value, times_uncertainty) = match coefficient {
                Coefficient::Constant(value) => (value, 0),
                Coefficient::Uncertainty => (1.0, 1),
            };
            atkd_coefficient { value: value * scale, times_uncertainty }
        };
        let (easy, hard) = match self.divergence().plain {
            0 => (objective.easy(), objective.hard()),
            _ => (Coefficients::new(0.0, 1.0), Coefficients::new(0.0, 1.0)),
        };
        atkd_objective {
            tkd: [number(easy.tkd), number(hard.tkd)],
            dkd: [number(easy.dkd), number(hard.dkd)],
            ce_weight: objective.ce_weight(),
            inverse_temperature: 1.0 / temperature,
            times_square: (own && objective.temperature_squared()).into(),
        }
    }

    /// The factor of the sum over the tokens, but for a mean's division by their count, which the kernels do.
    fn scale(&self) -> f64 {
        match self.objective.reduction() {
            Reduction::Sum | Reduction::Mean | Reduction::GroupMean => 1.0,
            Reduction::Denominator(denominator) => 1.0 / denominator,
        }
    }

    fn reduction(&self) -> u32 {
        match self.objective.reduction() {
            Reduction::Sum | Reduction::Denominator(_) => ATKD_SUM,
            Reduction::Mean => ATKD_MEAN,
            Reduction::GroupMean => ATKD_GROUP_MEAN,
        }
    }

    /// The hard ratio if that tells rows how many tokens are hard, selected or not yet; else -1: they are counted before.
    fn ratio_for_group_sizes(&self) -> f64 {
        let known = self.problem.hard != HardTokens::Given
            && self.objective.hard_count_is_known(self.problem.scopes);
        if known { self.objective.hard_ratio() } else { -1.0 }
    }
}

/// The kernel that multiplies a gradient `[tokens, vocab]`, in place, by the float32 scalar at `factor`.
///
/// # Errors
/// If the shape, the strides and the addresses do not go together.
pub(crate) fn scale_gradient(
    device: &DeviceProperties,
    gradient: RawLogits,
    tokens: usize,
    vocab: usize,
    factor: u64,
) -> Result<Option<Launch>> {
    check_sizes(tokens, vocab)?;
    gradient.end("the gradient", tokens, vocab)?;
    if factor == 0 {
        return Err(Error::Null { what: "the factor", elements: 1 });
    }
    check_alignment("the factor", factor, size_of::<f32>() as u64)?;
    let (shape, parts) = plan::scale_gradient(device, tokens, vocab);
    let launch = Launch {
        kernel: of_dtype!("scale_gradient", gradient.dtype),
        shape,
        parameters: Parameters::ScaleGradient(atkd_scale_gradient {
            gradient: gradient.address as *mut c_void,
            factor: factor as *const f32,
            strides: strides(gradient, tokens),
            tokens: tokens as u32,
            vocab: vocab as u32,
            blocks: shape.grid,
            parts,
        }),
    };
    Ok(launch.unless_empty())
}

/// The kernel of the entropies of one model's distributions, if there is anything to do.
///
/// # Errors
/// If the temperature is outside its domain, or shape, strides and addresses do not go together.
pub(crate) fn token_entropies(
    device: &DeviceProperties,
    of: &RawEntropies,
) -> Result<Option<Launch>> {
    let RawEntropies { tokens, vocab, logits, temperature, to } = *of;
    check_sizes(tokens, vocab)?;
    of.check()?;
    let shape = plan::token_entropies(device, tokens, vocab);
    let launch = Launch {
        kernel: of_dtype!("token_entropies", logits.dtype),
        shape,
        parameters: Parameters::TokenEntropies(atkd_token_entropies {
            logits: logits.address as *const c_void,
            entropies: to as *mut f32,
            strides: strides(logits, tokens),
            tokens: tokens as u32,
            vocab: vocab as u32,
            inverse_temperature: (1.0 / temperature) as f32,
            blocks: shape.grid,
        }),
    };
    Ok(launch.unless_empty())
}

/// The Taylor polynomial of -log2(share 2^r + 1 - share) over r, the lowest power first: log(share e^x + 1 - share) is the
/// generating function of the cumulants of a Bernoulli distribution.
fn taylor(share: f64) -> [f32; ATKD_TAYLOR as usize] {
    let variance = share * (1.0 - share);
    let skew = 1.0 - 2.0 * share;
    let cumulants = [
        share,
        variance,
        variance * skew,
        variance * (1.0 - 6.0 * variance),
        variance * skew * (1.0 - 12.0 * variance),
    ];
    let mut power_over_factorial = 1.0 / LN_2;
    let mut order = 0.0;
    cumulants.map(|cumulant| {
        order += 1.0;
        power_over_factorial *= LN_2 / order;
        (-cumulant * power_over_factorial) as f32
    })
}
