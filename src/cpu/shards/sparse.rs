//! A sparse teacher of a vocabulary that is split: the logits that its tail makes, for the stages of any other teacher.
//!
//! By [`Tail::Bucket`] the tokens that the teacher does not know share its rest as they share the student's: then each has the
//! same ratio of both probabilities, and so every divergence, and its gradient, is that of the one class. The student's sum
//! over them is of all ranks, and is exchanged first.

use super::Stage;
use crate::cpu::Workers;
use crate::cpu::session::Modelled;
use crate::shards::{Exchanged, RowRest, Shard};
use crate::sparse::SparseTeacher;
use crate::{Error, Logits, Objective, Result, Tail, Target};

/// The student's sums over the shard's columns that the teacher does not know, `[tokens]`. The student's logits are
/// `[tokens, columns]`, and the teacher's indices are tokens of the whole vocabulary, those of other shards too.
///
/// # Errors
/// If shapes do not fit, a label is out of range, or a value of the teacher's is none that it may be; if the target is the
/// teacher's.
pub fn rests(
    objective: &Objective,
    shard: &Shard,
    teacher: &SparseTeacher,
    student: Logits,
) -> Result<Vec<RowRest>> {
    rests_by(Workers::default(), objective, shard, teacher, student)
}

/// The teacher's logits of the shard's columns, `[tokens, columns]`, for the stages: those of [`Tail::Bucket`] from the sums
/// of all ranks `[ranks, tokens]`, in the order of their columns; other tails need none. Rows of ignored tokens are 0.
///
/// They are up to a constant of the row the temperature times the logarithms of the probabilities. Rounding them to float32 is
/// what a dense teacher has, too.
///
/// # Errors
/// As [`rests`], or if there is not one sum per rank and token.
pub fn teacher_logits(
    objective: &Objective,
    shard: &Shard,
    teacher: &SparseTeacher,
    rests: &[RowRest],
    student: Logits,
) -> Result<Vec<f32>> {
    let mut logits = vec![0.0; student.tokens() * student.vocab()];
    let workers = Workers::default();
    teacher_logits_by(workers, objective, shard, teacher, rests, student, &mut logits)?;
    Ok(logits)
}

pub(in crate::cpu) fn rests_by(
    workers: Workers,
    objective: &Objective,
    shard: &Shard,
    teacher: &SparseTeacher,
    student: Logits,
) -> Result<Vec<RowRest>> {
    let nothing = Exchanged::new(&[]);
    let stage = Stage::new(workers, objective, shard, &nothing)?;
    let models = stage.models(teacher, student)?;
    let scratch = || stage.pass.rest_scratch(student.vocab(), false);
    Ok(stage.for_tokens(scratch, RowRest::EMPTY, |scratch, token| {
        let Some(model) = &models[token] else { return RowRest::EMPTY };
        let known = model.known_columns(shard.first_column(), student.vocab());
        let pass = stage.pass_of(token).without_cross_entropy();
        let rest = pass.rest(student.row(token), &known, scratch);
        RowRest { shift: rest.shift as f32, sum: rest.sum as f32 }
    }))
}

pub(in crate::cpu) fn teacher_logits_by(
    workers: Workers,
    objective: &Objective,
    shard: &Shard,
    teacher: &SparseTeacher,
    rests: &[RowRest],
    student: Logits,
    to: &mut [f32],
) -> Result<()> {
    let nothing = Exchanged::new(&[]);
    let stage = Stage::new(workers, objective, shard, &nothing)?;
    let models = stage.models(teacher, student)?;
    let tokens = student.tokens();
    let is_bucket = teacher.tail() == Tail::Bucket;
    let (what, values) = ("the student's sums", rests.len());
    let expected = values.next_multiple_of(tokens.max(1)).max(tokens);
    if is_bucket && values != expected {
        return Err(Error::StateCount { what, values, expected, tokens });
    }
    let rows = to.chunks_mut(student.vocab().max(1)).enumerate().collect();
    stage.workers.threads.map(
        rows,
        || (),
        |_, (token, row)| {
            let Some(model) = &models[token] else { return row.fill(0.0) };
            let temperature = shard.settings().temperature(token, objective);
            let of_rest = is_bucket.then(|| {
                let of_ranks = rests.iter().skip(token).step_by(tokens);
                let parts = of_ranks
                    .filter(|part| part.sum > 0.0)
                    .map(|part| f64::from(part.shift) / temperature + f64::from(part.sum).ln());
                temperature * crate::sparse::log_sum_exp(parts)
            });
            model.write_logits(temperature, of_rest, shard.first_column(), student.row(token), row);
        },
    );
    Ok(())
}

impl Stage<'_> {
    /// The teacher's distribution for every token, `None` for ignored ones.
    fn models(&self, teacher: &SparseTeacher, student: Logits) -> Result<Vec<Option<Modelled>>> {
        teacher.tail().check(self.objective)?;
        if self.objective.target() == Target::Teacher {
            return Err(Error::ShardOfTeacherTarget);
        }
        self.shard.check_columns(student.vocab())?;
        let expected = [self.labels.len(), student.vocab()];
        let vocab = self.shard.vocab();
        for (what, expected, actual) in [
            ("the student's logits", expected, [student.tokens(), student.vocab()]),
            ("the sparse teacher", [self.labels.len(), vocab], [teacher.tokens(), teacher.vocab()]),
        ] {
            if actual != expected {
                return Err(Error::ShapeMismatch { what, expected, actual });
            }
        }
        Modelled::of_tokens(self.workers, self.objective, &self.labels, teacher)
    }
}
