//! The fused loss on the CPU: the embedded default.
//!
//! Each row is read once from memory. Its exponentials stay in the core's own cache until the row's
//! sums are known, and the gradient is written from there. (JSD, total variation and the skewed divergences read the
//! row again, from the cache.) The calling thread and those of rayon's current
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
//! margins of its own. So they are for means of groups whose sizes only the selection tells: by the median, or within
//! sequences.
//!
//! A sparse teacher ([`SparseTeacher`](crate::SparseTeacher)) is read beforehand: it tells the hard tokens without the
//! student. A row then is read once and written once, and but for tail uniform costs one exponential a logit instead of two.
//!
//! Memory beyond the arguments: about 280 bytes per token, and two float32 rows per thread (three if cross
//! entropy is wanted at a temperature other than 1).

mod dispatch;
mod element;
mod entropy;
mod exp;
mod math;
pub mod raw;
mod rows;
mod session;
pub mod shards;
#[cfg(test)]
mod tests;
mod threads;
mod tile;
mod vector;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rayon::ThreadPool;

use crate::logits::ElementsMut;
use crate::objective::{Objective, check_temperature};
use crate::output::Output;
use crate::{Batch, Elements, Error, Logits, LogitsMut, Result, Teacher};
use dispatch::Instructions;
use rows::Destination;
#[cfg(feature = "teacher-cache")]
pub(crate) use rows::widen;
pub use session::Session;
pub(crate) use threads::Threads;

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
/// `student` and `gradient` are `[tokens, vocab]`, as the batch's teacher. `gradient` is of the student's dtype or
/// float32, or of any if the student's is float32; each element is rounded once from float32. Rows of ignored tokens
/// become 0.
///
/// # Errors
/// If the shapes differ, the gradient's dtype is none of these, a label is out of range, or labels are
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
/// than its temperature, target and ignore index is used. Each is [`TokenTerms::margin`](crate::TokenTerms::margin) of
/// a call rounded to float32.
///
/// # Errors
/// If a label is out of range, or labels are needed and missing.
pub fn teacher_margins(objective: &Objective, batch: &Batch) -> Result<Vec<f32>> {
    teacher_margins_by(Workers::default(), objective, batch)
}

/// The entropy of one model's distribution for each token, -sum p_j log p_j over the whole vocabulary, in nats, of the
/// logits divided by `temperature`. NaN where the logits have a NaN or +inf, or are all -inf.
///
/// For selections and weights by how sure a model is: those by the student's entropy, say, through
/// [`Batch::with_hard`] or [`Batch::with_token_weights`].
///
/// # Errors
/// If the temperature is not in [1e-30, 1e30].
pub fn token_entropies(logits: Logits, temperature: f64) -> Result<Vec<f32>> {
    token_entropies_by(Workers::default(), logits, temperature)
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
    compute(workers, objective, batch, into_rows(student, None)?)
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
    compute(workers, objective, batch, into_rows(student, Some(&mut gradient))?)
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
    workers: Workers,
    objective: &Objective,
    batch: &Batch,
) -> Result<Vec<f32>> {
    let mut session = Session::of_batch(workers, objective, batch)?;
    match batch.teacher() {
        Teacher::Dense(logits) => session.margins(0, logits)?,
        Teacher::Sparse(sparse) => session.model(&sparse).map(drop)?,
    }
    Ok(session.into_margins())
}

/// [`token_entropies`] by the workers given.
pub(crate) fn token_entropies_by(
    workers: Workers,
    logits: Logits,
    temperature: f64,
) -> Result<Vec<f32>> {
    check_temperature(temperature)?;
    let entropy = |_: &mut (), token| entropy::entropy(logits.row(token), temperature) as f32;
    Ok(workers.threads.map((0..logits.tokens()).collect(), || (), entropy))
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

/// The rows of a student, with a gradient of their own or none.
fn into_rows<'a>(
    student: Logits<'a>,
    gradient: Option<&'a mut LogitsMut>,
) -> Result<Vec<StudentRow<'a>>> {
    let Some(gradient) = gradient else {
        let row = |token| StudentRow::Forward(student.row(token));
        return Ok((0..student.tokens()).map(row).collect());
    };
    let shape = gradient.as_logits();
    let (expected, actual) = ([student.tokens(), student.vocab()], [shape.tokens(), shape.vocab()]);
    if actual != expected {
        return Err(Error::ShapeMismatch { what: "the gradient", expected, actual });
    }
    student.dtype().check_gradient(shape.dtype())?;
    let non_temporal = shape.tokens() * shape.vocab() * shape.dtype().size() >= NON_TEMPORAL_FROM;
    let rows = gradient.rows().into_iter().enumerate();
    let row =
        |(token, gradient)| StudentRow::Into { logits: student.row(token), gradient, non_temporal };
    Ok(rows.map(row).collect())
}

/// A call on a batch whose logits are all there: all stages in a row.
fn compute(
    workers: Workers,
    objective: &Objective,
    batch: &Batch,
    mut rows: Vec<StudentRow>,
) -> Result<Output> {
    let mut session = Session::of_batch(workers, objective, batch)?;
    let teacher = match batch.teacher() {
        Teacher::Dense(logits) => logits,
        Teacher::Sparse(sparse) => {
            sparse.tail().check(objective)?;
            let models = session.model(&sparse)?;
            session.select()?;
            session.sparse_rows(&sparse, models, &mut rows);
            return session.finish();
        }
    };
    let in_place = rows.iter().any(|row| matches!(row, StudentRow::InPlace(_)));
    let with_gradient = rows.iter().any(|row| !matches!(row, StudentRow::Forward(_)));
    if in_place && objective.depends_on_selection() && !session.knows_hard()
        || with_gradient && session.selects_before_gradients()
    {
        // A gradient that overwrites its logits cannot be written twice: its group must be known first.
        session.margins(0, teacher)?;
        session.select()?;
    }
    session.rows_of(&Vec::from_iter(0..rows.len()), teacher, &mut rows)?;
    let mispredicted = session.select()?.to_vec();
    let rows = rows.iter_mut().enumerate();
    let rows = rows.filter(|(token, _)| mispredicted.binary_search(token).is_ok());
    session
        .repair_of(rows.map(|(token, student)| (token, teacher.row(token), student)).collect())?;
    session.finish()
}

/// The hard tokens among those seen so far. They predict the group of the next one, rightly for all but about the
/// square root of the tokens.
struct RunningSelection {
    objective: Objective,
    hard: BinaryHeap<Reverse<i32>>,
    easy: BinaryHeap<i32>,
}

impl RunningSelection {
    fn new(objective: &Objective) -> Self {
        Self { objective: *objective, hard: BinaryHeap::new(), easy: BinaryHeap::new() }
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
