//! The fused loss on the CPU: the embedded default.
//!
//! Each row is read once from memory. Its exponentials stay in the core's own cache until the row's
//! sums are known, and the gradient leaves from there. All cores of rayon's current thread pool work,
//! each on rows of its own; the result is the same, bit for bit, for any number of threads.
//!
//! An objective that treats hard and easy tokens differently reads the teacher's logits once more,
//! beforehand, for the margins by which tokens are ranked.
//!
//! Memory beyond the arguments: about 150 bytes a token, and two float32 rows a thread (three if
//! cross entropy is wanted at a temperature other than 1).

mod block;
mod rows;
#[cfg(test)]
mod tests;
mod vector;

use rayon::prelude::*;

use crate::logits::ElementsMut;
use crate::objective::{Objective, Target};
use crate::output::{Output, TokenTerms};
use crate::{Batch, Dtype, Elements, Error, Logits, LogitsMut, Result, row};
use block::Instructions;
use rows::{Destination, RowPass, Scratches};

/// Bytes of a gradient that is too large to be found in the cache by whoever reads it next.
const STREAM_FROM: usize = 16 << 20;

/// The instruction set in use: the widest that this machine has.
pub fn instruction_set() -> &'static str {
    Instructions::widest().name()
}

/// The loss, and each token's terms.
///
/// # Errors
/// If the shapes differ, a label is out of range, or labels are needed and missing.
pub fn forward(objective: &Objective, batch: &Batch, student: Logits) -> Result<Output> {
    batch.check_shape("the student's logits", [student.tokens(), student.vocab()])?;
    let rows = (0..student.tokens()).map(|token| StudentRow::Forward(student.row(token))).collect();
    compute(Instructions::widest(), objective, batch, rows)
}

/// The loss, each token's terms, and the gradient with respect to the student's logits, times the
/// objective's upstream gradient.
///
/// `gradient` is of the student's dtype, each element rounded once from float32, or float32. Rows of
/// ignored tokens become 0.
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
    forward_backward_with(Instructions::widest(), objective, batch, student, gradient)
}

fn forward_backward_with(
    instructions: Instructions,
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
    let streamed = shape.tokens() * shape.vocab() * shape.dtype().size() >= STREAM_FROM;
    let rows = gradient.rows().into_iter().enumerate();
    let rows = rows
        .map(|(token, gradient)| StudentRow::Into {
            logits: student.row(token),
            gradient,
            streamed,
        })
        .collect();
    compute(instructions, objective, batch, rows)
}

/// As [`forward_backward`], with the gradient written over the student's logits: a third less memory
/// traffic.
///
/// # Errors
/// As [`forward_backward`]; the logits are unchanged then.
pub fn forward_backward_in_place(
    objective: &Objective,
    batch: &Batch,
    mut student: LogitsMut,
) -> Result<Output> {
    let shape = student.as_logits();
    batch.check_shape("the student's logits", [shape.tokens(), shape.vocab()])?;
    let rows = student.rows().into_iter().map(StudentRow::InPlace).collect();
    compute(Instructions::widest(), objective, batch, rows)
}

/// One row of the student, and where its gradient goes.
enum StudentRow<'a> {
    Forward(Elements<'a>),
    Into { logits: Elements<'a>, gradient: ElementsMut<'a>, streamed: bool },
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
            StudentRow::Into { gradient, streamed, .. } => {
                Some(Destination { row: gradient.reborrow(), streamed: *streamed })
            }
            StudentRow::InPlace(row) => Some(Destination { row: row.reborrow(), streamed: false }),
        }
    }
}

fn compute(
    instructions: Instructions,
    objective: &Objective,
    batch: &Batch,
    mut rows: Vec<StudentRow>,
) -> Result<Output> {
    let labels = batch.valid_labels(objective)?;
    let teacher = batch.teacher();
    let pass = RowPass::new(instructions, objective);
    let with_gradient = rows.iter().any(|row| !matches!(row, StudentRow::Forward(_)));
    let scratches = Scratches::new(&pass, teacher.vocab(), with_gradient);

    let targets: Vec<Option<usize>> = match objective.target() {
        Target::Label => labels,
        Target::Teacher => labels
            .into_par_iter()
            .enumerate()
            .map(|(token, label)| {
                label.map(|_| scratches.with(|scratch| pass.arg_max(teacher.row(token), scratch)))
            })
            .collect(),
    };

    // Selection must precede the rows only if their losses depend on it.
    let selected = objective.depends_on_selection().then(|| {
        let margins: Vec<Option<f64>> = targets
            .par_iter()
            .enumerate()
            .map(|(token, target)| {
                let row = teacher.row(token);
                target.map(|target| scratches.with(|scratch| pass.margin(row, target, scratch)))
            })
            .collect();
        let hard = select_hard(objective, batch, &margins);
        (margins, hard)
    });
    let all_hard = objective.hard_ratio() == 1.0;

    let valid = targets.iter().flatten().count();
    let scale = objective.reduction_scale(valid) * objective.upstream_gradient();
    let mut tokens: Vec<TokenTerms> = rows
        .par_iter_mut()
        .zip(&targets)
        .enumerate()
        .map(|(token, (student, target))| {
            let Some(target) = *target else {
                if let Some(mut gradient) = student.gradient() {
                    gradient.row.fill_zero();
                }
                return TokenTerms::IGNORED;
            };
            scratches.with(|scratch| {
                let row = teacher.row(token);
                let state = pass.state(row, student.logits(), target, scratch);
                let (u, hard) = match &selected {
                    Some((margins, hard)) => {
                        (margins[token].expect("a token with a target has one"), hard[token])
                    }
                    None => (pass.margin_of(&state, row, target), all_hard),
                };
                let student_target = student.logits().get(target).into();
                let (terms, scales) =
                    row::finish(objective, &state, u, student_target, hard, scale);
                if let Some(gradient) = student.gradient() {
                    pass.gradient(&state, &scales, target, scratch, gradient);
                }
                terms
            })
        })
        .collect();

    if selected.is_none() {
        let margins: Vec<Option<f64>> =
            tokens.iter().map(|token| token.valid.then_some(token.margin)).collect();
        let hard = select_hard(objective, batch, &margins);
        for (token, hard) in tokens.iter_mut().zip(hard) {
            token.hard = hard;
        }
    }
    Ok(Output::reduce(objective, tokens))
}

/// Whether each token is among the `ceil(k * valid)` of largest margin in its scope. NaN ranks below
/// every number; among equals the lower index wins.
fn select_hard(objective: &Objective, batch: &Batch, margins: &[Option<f64>]) -> Vec<bool> {
    let mut hard = vec![false; margins.len()];
    for scope in batch.scopes() {
        let mut ranked: Vec<(f64, usize)> = scope
            .filter_map(|token| {
                let margin = margins[token]?;
                // Adding 0 makes -0 and 0 equal in the total order, and a NaN of either sign last.
                Some((if margin.is_nan() { -f64::NAN } else { margin + 0.0 }, token))
            })
            .collect();
        let count = objective.hard_count(ranked.len());
        if count > 0 && count < ranked.len() {
            ranked
                .select_nth_unstable_by(count - 1, |(a, i), (b, j)| b.total_cmp(a).then(i.cmp(j)));
        }
        for &(_, token) in &ranked[..count] {
            hard[token] = true;
        }
    }
    hard
}
