//! The fused loss on the CPU: the embedded default.
//!
//! Each row is read once from memory. Its exponentials stay in the core's own cache until the row's
//! sums are known, and the gradient is written from there. The calling thread and those of rayon's current
//! thread pool, as many in all as the pool has, work on rows of their own; the result is the same, bit for
//! bit, for any number of threads, on machines of one instruction set ([`instruction_set`]).
//!
//! A call may be made anywhere: in a task of the pool, or with a lock held that tasks of the pool want. Threads of the
//! pool help if they are free before the work is done, and the calling thread does what is left; nobody waits for
//! a thread that is busy with something else. A call works in the child of a fork, too, whatever threads of the parent
//! were doing. The parent's pools have no threads there, so that calls have others to help them, of a pool
//! that this crate makes: as many as the pool has that they would have been of, and at most one per core
//! (`RAYON_NUM_THREADS`).
//!
//! The hard tokens are known only when every teacher's row has been read. A gradient beside the logits is written at
//! once for the group that the tokens so far predict, and the few mispredicted rows are done again: the result is the
//! exact selection's, and the logits are read once. A gradient in place would have overwritten the logits of a
//! mispredicted row, so there the teacher's logits are read once more, beforehand; but not if the batch has a mask or
//! margins of its own.
//!
//! Memory beyond the arguments: about 230 bytes per token, and two float32 rows per thread (three if cross
//! entropy is wanted at a temperature other than 1).

mod dispatch;
mod element;
mod exp;
mod math;
pub mod raw;
mod rows;
#[cfg(test)]
mod tests;
mod threads;
mod tile;
mod vector;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Mutex, PoisonError};

use rayon::ThreadPool;

use crate::logits::ElementsMut;
use crate::objective::{Objective, Target};
use crate::output::{Output, TokenTerms};
use crate::{Batch, Dtype, Elements, Error, Logits, LogitsMut, Result, selection};
use dispatch::Instructions;
use math::{Divergence, ForwardKl, RowState};
use rows::{Destination, RowPass};
use threads::Threads;

/// Bytes from which on a gradient is too large to be found in the cache by whoever reads it next.
const NON_TEMPORAL_FROM: usize = 16 << 20;

/// The instruction set in use: the one that the environment variable `ATKD_INSTRUCTIONS` names (`avx512`, `avx2`
/// or `portable`), else the widest that this machine has. Results differ in their last bits from one to another.
/// The variable is read once per process.
///
/// # Errors
/// If the machine has none of that name; so do all calls then.
pub fn instruction_set() -> Result<&'static str> {
    Ok(Instructions::chosen()?.name())
}

/// The loss, and each token's terms, in nats. `student` is `[tokens, vocab]`, as the batch's teacher.
///
/// # Errors
/// If the shapes differ, a label is out of range, or labels are needed and missing.
pub fn forward(objective: &Objective, batch: &Batch, student: Logits) -> Result<Output> {
    forward_by(Workers::default(), objective, batch, student)
}

/// The loss, each token's terms, and the gradient with respect to the student's logits, times the
/// objective's upstream gradient.
///
/// `student` and `gradient` are `[tokens, vocab]`, as the batch's teacher. `gradient` is of the student's dtype, each
/// element rounded once from float32, or float32. Rows of ignored tokens become 0.
///
/// # Errors
/// If the shapes differ, the gradient's dtype is neither, a label is out of range, or labels are
/// needed and missing. Nothing was written then.
pub fn forward_backward(
    objective: &Objective,
    batch: &Batch,
    student: Logits,
    gradient: LogitsMut,
) -> Result<Output> {
    forward_backward_by(Workers::default(), objective, batch, student, gradient)
}

/// [`forward_backward`] with the gradient written over the student's logits, `[tokens, vocab]`: a third less memory
/// traffic. The gradient has the logits' dtype.
///
/// # Errors
/// If the shapes differ, a label is out of range, or labels are needed and missing. The logits are unchanged then.
pub fn forward_backward_in_place(
    objective: &Objective,
    batch: &Batch,
    student: LogitsMut,
) -> Result<Output> {
    forward_backward_in_place_by(Workers::default(), objective, batch, student)
}

/// The teacher's margins, one per token: the log-odds against the target, u = log((1 - p) / p), at the objective's
/// temperature, for [`select_hard`](crate::select_hard) over the tokens of several calls. -inf for an ignored token, which
/// a margin alone does not tell: a valid token's is -inf where the teacher is certain. Of the objective, nothing else
/// than its temperature, target and ignore index is used. Each is [`TokenTerms::margin`] of a call rounded to float32.
///
/// # Errors
/// If a label is out of range, or labels are needed and missing.
pub fn teacher_margins(objective: &Objective, batch: &Batch) -> Result<Vec<f32>> {
    teacher_margins_by(Workers::default(), objective, batch)
}

/// The means of a call: an instruction set and threads.
#[derive(Clone, Copy)]
pub(crate) struct Workers<'a> {
    /// `None` for [`Instructions::chosen`].
    instructions: Option<Instructions>,
    threads: Threads<'a>,
}

impl Default for Workers<'_> {
    fn default() -> Self {
        Self::of(None)
    }
}

impl<'a> Workers<'a> {
    /// The caller and all but one of the pool's threads, or of rayon's current pool.
    pub(crate) fn of(pool: Option<&'a ThreadPool>) -> Self {
        Self { instructions: None, threads: Threads(pool) }
    }
}

/// [`forward`] by the workers given.
pub(crate) fn forward_by(
    workers: Workers,
    objective: &Objective,
    batch: &Batch,
    student: Logits,
) -> Result<Output> {
    batch.check_shape("the student's logits", [student.tokens(), student.vocab()])?;
    let rows = (0..student.tokens()).map(|token| StudentRow::Forward(student.row(token))).collect();
    compute(workers, objective, batch, rows)
}

/// [`forward_backward`] by the workers given.
pub(crate) fn forward_backward_by(
    workers: Workers,
    objective: &Objective,
    batch: &Batch,
    student: Logits,
    mut gradient: LogitsMut,
) -> Result<Output> {
    let shape = gradient.as_logits();
    batch.check_shape("the student's logits", [student.tokens(), student.vocab()])?;
    batch.check_shape("the gradient", [shape.tokens(), shape.vocab()])?;
    if shape.dtype() != student.dtype() && shape.dtype() != Dtype::F32 {
        return Err(Error::GradientDtype { student: student.dtype(), actual: shape.dtype() });
    }
    let non_temporal = shape.tokens() * shape.vocab() * shape.dtype().size() >= NON_TEMPORAL_FROM;
    let rows = gradient.rows().into_iter().enumerate();
    let rows = rows
        .map(|(token, gradient)| StudentRow::Into {
            logits: student.row(token),
            gradient,
            non_temporal,
        })
        .collect();
    compute(workers, objective, batch, rows)
}

/// [`forward_backward_in_place`] by the workers given.
pub(crate) fn forward_backward_in_place_by(
    workers: Workers,
    objective: &Objective,
    batch: &Batch,
    mut student: LogitsMut,
) -> Result<Output> {
    let shape = student.as_logits();
    batch.check_shape("the student's logits", [shape.tokens(), shape.vocab()])?;
    let rows = student.rows().into_iter().map(StudentRow::InPlace).collect();
    compute(workers, objective, batch, rows)
}

/// [`teacher_margins`] by the workers given.
pub(crate) fn teacher_margins_by(
    Workers { instructions, threads }: Workers,
    objective: &Objective,
    batch: &Batch,
) -> Result<Vec<f32>> {
    let pass = RowPass::new(instructions, objective)?;
    let targets = targets(&pass, threads, objective, batch)?;
    let margins = margins(&pass, threads, batch, &targets);
    Ok(margins.into_iter().map(|margin| margin.map_or(f32::NEG_INFINITY, |m| m as f32)).collect())
}

/// The target of each token; `None` for ignored ones.
fn targets(
    pass: &RowPass,
    threads: Threads,
    objective: &Objective,
    batch: &Batch,
) -> Result<Vec<Option<usize>>> {
    let labels = batch.valid_labels(objective)?;
    let teacher = batch.teacher();
    Ok(match objective.target() {
        Target::Label => labels,
        Target::Teacher => {
            let scratch = || pass.scratch(teacher.vocab(), false);
            threads.map(
                labels.into_iter().enumerate().collect(),
                scratch,
                |scratch, (token, label)| label.map(|_| pass.arg_max(teacher.row(token), scratch)),
            )
        }
    })
}

/// The margin of each token that has a target, from the teacher's logits alone.
fn margins(
    pass: &RowPass,
    threads: Threads,
    batch: &Batch,
    targets: &[Option<usize>],
) -> Vec<Option<f64>> {
    let targets = targets.iter().copied().enumerate().collect();
    let margin = |_: &mut (), (token, target): (usize, Option<usize>)| {
        target.map(|target| pass.margin(batch.teacher().row(token), target))
    };
    threads.map(targets, || (), margin)
}

/// One row of the student, and the destination of its gradient.
enum StudentRow<'a> {
    Forward(Elements<'a>),
    Into { logits: Elements<'a>, gradient: ElementsMut<'a>, non_temporal: bool },
    InPlace(ElementsMut<'a>),
}

impl StudentRow<'_> {
    fn logits(&self) -> Elements<'_> {
        match self {
            StudentRow::Forward(logits) | StudentRow::Into { logits, .. } => *logits,
            StudentRow::InPlace(logits) => logits.as_ref(),
        }
    }

    fn gradient(&mut self) -> Option<Destination<'_>> {
        match self {
            StudentRow::Forward(_) => None,
            StudentRow::Into { gradient, non_temporal, .. } => {
                Some(Destination { row: gradient.reborrow(), non_temporal: *non_temporal })
            }
            StudentRow::InPlace(row) => {
                Some(Destination { row: row.reborrow(), non_temporal: false })
            }
        }
    }
}

/// The facts about a row that are kept until the hard tokens are known.
struct Kept {
    state: RowState,
    student_target: f64,
    /// The terms for the group that the gradient was written for.
    terms: TokenTerms,
}

/// A call, by the divergence of its objective.
fn compute(
    workers: Workers,
    objective: &Objective,
    batch: &Batch,
    rows: Vec<StudentRow>,
) -> Result<Output> {
    compute_by::<ForwardKl>(workers, objective, batch, rows)
}

fn compute_by<D: Divergence>(
    Workers { instructions, threads }: Workers,
    objective: &Objective,
    batch: &Batch,
    mut rows: Vec<StudentRow>,
) -> Result<Output> {
    let teacher = batch.teacher();
    let pass = RowPass::new(instructions, objective)?;
    let targets = targets(&pass, threads, objective, batch)?;
    let with_gradient = rows.iter().any(|row| !matches!(row, StudentRow::Forward(_)));
    let in_place = rows.iter().any(|row| matches!(row, StudentRow::InPlace(_)));
    let scratch = || pass.scratch(teacher.vocab(), with_gradient);

    let valid = targets.iter().flatten().count();
    let scale = objective.reduction_scale(valid) * objective.upstream_gradient();
    let finish = |state: &RowState, margin, student_target, hard| {
        let inverse_temperature = pass.inverse_temperature;
        math::finish::<D>(
            objective,
            inverse_temperature,
            state,
            margin,
            student_target,
            hard,
            scale,
        )
    };

    let depends = objective.depends_on_selection();
    // All backends select by float32 margins.
    let select_by = |margin: &dyn Fn(usize) -> Option<f32>| {
        selection::select(objective.hard_ratio(), batch.scopes(), teacher.tokens(), margin)
    };
    let known = match (batch.hard(), batch.margins()) {
        (Some(hard), _) => Some(
            hard.iter().zip(&targets).map(|(&hard, target)| hard && target.is_some()).collect(),
        ),
        (None, Some(margins)) => Some(select_by(&|token| targets[token].map(|_| margins[token]))),
        // A gradient that overwrites its logits cannot be written twice: its group must be known first.
        (None, None) => (depends && in_place).then(|| {
            let margins = margins(&pass, threads, batch, &targets);
            select_by(&|token| margins[token].map(|margin| margin as f32))
        }),
    };
    let running = Mutex::new(RunningSelection::new(objective));
    let group = |token: usize, margin: f64| match &known {
        Some(hard) => hard[token],
        None => running.lock().unwrap_or_else(PoisonError::into_inner).add(margin as f32),
    };

    let mut order: Vec<(usize, &mut StudentRow)> = rows.iter_mut().enumerate().collect();
    if known.is_none() && depends && with_gradient {
        // Neighbours are alike; a mixed order teaches the running selection sooner.
        fastrand::Rng::with_seed(0).shuffle(&mut order);
    }
    let mut kept = threads.map(order, scratch, |scratch, (token, student)| {
        let Some(target) = targets[token] else {
            if let Some(mut gradient) = student.gradient() {
                gradient.row.fill_zero();
            }
            return (token, None);
        };
        let row = teacher.row(token);
        let state = pass.state::<D>(row, student.logits(), target, scratch);
        let margin = pass.margin_of(&state, row, target);
        let student_target = student.logits().get(target).into();
        let (terms, scales) = finish(&state, margin, student_target, group(token, margin));
        if let Some(gradient) = student.gradient() {
            pass.gradient::<D>(&state, &scales, target, scratch, gradient);
        }
        (token, Some(Kept { state, student_target, terms }))
    });
    kept.sort_unstable_by_key(|&(token, _)| token);

    let hard: Vec<bool> = known.unwrap_or_else(|| {
        select_by(&|token| kept[token].1.as_ref().map(|kept| kept.terms.margin as f32))
    });
    let mispredicted = kept
        .iter_mut()
        .zip(&mut rows)
        .filter_map(|((token, kept), student)| {
            let kept = kept.as_mut().filter(|kept| kept.terms.hard != hard[*token])?;
            Some((*token, targets[*token]?, kept, student))
        })
        .collect();
    threads.map(
        mispredicted,
        || None,
        |own, (token, target, kept, student)| {
            let (terms, scales) =
                finish(&kept.state, kept.terms.margin, kept.student_target, hard[token]);
            kept.terms = terms;
            if depends && with_gradient {
                let scratch = own.get_or_insert_with(scratch);
                let state = pass.state::<D>(teacher.row(token), student.logits(), target, scratch);
                let gradient = student.gradient().expect("there is one for every row");
                pass.gradient::<D>(&state, &scales, target, scratch, gradient);
            }
        },
    );
    let terms = |(_, kept): (usize, Option<Kept>)| kept.map_or(TokenTerms::IGNORED, |k| k.terms);
    Ok(Output::reduce(objective, kept.into_iter().map(terms).collect()))
}

/// The hard tokens among those seen so far. They predict the group of the next one, rightly for all but about the
/// square root of the tokens.
struct RunningSelection<'a> {
    objective: &'a Objective,
    hard: BinaryHeap<Reverse<i32>>,
    easy: BinaryHeap<i32>,
}

impl<'a> RunningSelection<'a> {
    fn new(objective: &'a Objective) -> Self {
        Self { objective, hard: BinaryHeap::new(), easy: BinaryHeap::new() }
    }

    /// Adds a margin, and returns true if it is among the largest so far.
    fn add(&mut self, margin: f32) -> bool {
        let bits = margin.to_bits() as i32;
        // The order of the numbers as an order of integers.
        let key = if bits < 0 { bits ^ i32::MAX } else { bits };
        self.hard.push(Reverse(key));
        if self.hard.len() > self.objective.hard_count(self.hard.len() + self.easy.len()) {
            self.easy.extend(self.hard.pop().map(|Reverse(least)| least));
        } else if let Some(largest) = self.easy.pop() {
            // One more hard token is wanted: the largest of those below, which may be the new one's.
            self.hard.push(Reverse(largest));
            self.easy.extend(self.hard.pop().map(|Reverse(least)| least));
        }
        self.hard.peek().is_some_and(|&Reverse(least)| key >= least)
    }
}
