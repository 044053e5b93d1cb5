//! The stages of a call on a shard of the vocabulary: see [`crate::shards`].
//!
//! Two ranks of which one has tokens 0 and 1 of the vocabulary, and the other token 2:
//!
//! ```
//! use atkd::cpu::shards;
//! use atkd::shards::{Exchanged, Shard};
//! use atkd::{Logits, LogitsMut, Objective, select_hard};
//!
//! let objective = Objective::default();
//! let labels = [2_i64, 0];
//! let teachers: [&[f32]; 2] = [&[2.0, 1.0, 0.0, 3.0], &[0.5, 1.0]];
//! let students: [&[f32]; 2] = [&[1.0, 1.0, 0.0, 1.0], &[1.0, 2.0]];
//! let ranks = [Shard::new(&labels, 3, 0)?, Shard::new(&labels, 3, 2)?];
//! let logits = |of: [&'static [f32]; 2], rank: usize| Logits::new(of[rank], 2, [2, 1][rank]);
//!
//! let mut states = Vec::new();
//! for rank in 0..2 {
//!     let (teacher, student) = (logits(teachers, rank)?, logits(students, rank)?);
//!     // Each rank has its own, and gathers those of all.
//!     states.extend(shards::states(&objective, &ranks[rank], teacher, student)?);
//! }
//! let exchanged = Exchanged::new(&states);
//! let margins = shards::margins(&objective, &ranks[0], &exchanged)?;
//! let hard = select_hard(&margins, None, objective.hard_ratio(), None)?;
//! for rank in 0..2 {
//!     let shard = ranks[rank].with_hard(&hard)?;
//!     let columns = [2, 1][rank];
//!     let mut gradient = vec![0.0_f32; 2 * columns];
//!     let (teacher, student) = (logits(teachers, rank)?, logits(students, rank)?);
//!     let to = LogitsMut::new(&mut gradient, 2, columns)?;
//!     shards::gradient(&objective, &shard, &exchanged, teacher, student, to)?;
//!     let output = shards::finish(&objective, &shard, &exchanged)?;
//!     assert!(output.loss > 0.0 && hard == [false, true]);
//! }
//! # Ok::<(), atkd::Error>(())
//! ```

mod sparse;

use super::math::{
    Fold, GradientScales, Margins, RowDivergence, RowState, STUDENT, SecondSweep, TEACHER,
    by_family,
};
use super::rows::{RowPass, Scratch};
use super::session::{OfToken, scales};
use super::{StudentRow, Workers, into_rows};
use crate::objective::ReductionScales;
use crate::output::{Output, TokenTerms};
use crate::shards::{self, Exchanged, Shard, SweepTerms};
use crate::{Elements, Error, Logits, LogitsMut, Objective, Result, Target};

pub use sparse::{rests, teacher_logits};
pub(super) use sparse::{rests_by, teacher_logits_by};

/// The states of the shard's part of each row, `[tokens]`. Both models' logits are `[tokens, columns]`.
///
/// # Errors
/// If shapes do not fit, a label is out of range, or labels are needed and missing.
pub fn states(
    objective: &Objective,
    shard: &Shard,
    teacher: Logits,
    student: Logits,
) -> Result<Vec<shards::RowState>> {
    states_by(Workers::default(), objective, shard, teacher, student)
}

/// The teacher's margins, one per token: see [`cpu::teacher_margins`](crate::cpu::teacher_margins).
///
/// # Errors
/// If there is not one state per rank and token, no rank has the target of a token, a label is out of range, or labels are
/// needed and missing.
pub fn margins(objective: &Objective, shard: &Shard, exchanged: &Exchanged) -> Result<Vec<f32>> {
    margins_by(Workers::default(), objective, shard, exchanged)
}

/// The terms of the second sweep over the shard's part of each row, `[tokens]`, for a divergence that has one.
///
/// # Errors
/// As [`states`] and [`margins`]; and if the divergence has one sweep.
pub fn terms(
    objective: &Objective,
    shard: &Shard,
    exchanged: &Exchanged,
    teacher: Logits,
    student: Logits,
) -> Result<Vec<SweepTerms>> {
    terms_by(Workers::default(), objective, shard, exchanged, teacher, student)
}

/// The gradient with respect to the student's logits of the shard's columns, times the objective's upstream gradient: as
/// that of [`cpu::forward_backward`](crate::cpu::forward_backward).
///
/// # Errors
/// As [`states`] and [`margins`]; and if the gradient's dtype is none that the student's allows, or the hard tokens or the
/// terms of a second sweep are needed and missing. Nothing was written then.
pub fn gradient(
    objective: &Objective,
    shard: &Shard,
    exchanged: &Exchanged,
    teacher: Logits,
    student: Logits,
    mut gradient: LogitsMut,
) -> Result<()> {
    let rows = into_rows(student, Some(&mut gradient))?;
    gradient_by(Workers::default(), objective, shard, exchanged, teacher, rows)
}

/// [`gradient`](fn@gradient) written over the student's logits.
///
/// # Errors
/// As there.
pub fn gradient_in_place(
    objective: &Objective,
    shard: &Shard,
    exchanged: &Exchanged,
    teacher: Logits,
    mut student: LogitsMut,
) -> Result<()> {
    let rows = student.rows().into_iter().map(StudentRow::InPlace).collect();
    gradient_by(Workers::default(), objective, shard, exchanged, teacher, rows)
}

/// The loss of the tokens and the terms of each: the same bits on every rank that has these tokens.
///
/// # Errors
/// As [`margins`]; and if the hard tokens or the terms of a second sweep are needed and missing.
pub fn finish(objective: &Objective, shard: &Shard, exchanged: &Exchanged) -> Result<Output> {
    finish_by(Workers::default(), objective, shard, exchanged)
}

/// A stage at work.
struct Stage<'a> {
    workers: Workers<'a>,
    objective: &'a Objective,
    shard: &'a Shard<'a>,
    exchanged: &'a Exchanged<'a>,
    labels: Vec<Option<usize>>,
    pass: RowPass,
}

/// A token's row, merged from the states of all ranks.
struct WholeRow {
    state: RowState,
    /// A token of the vocabulary.
    target: usize,
    /// Both models' logits of the target.
    logits: [f32; 2],
    /// The margins of the target, if it counts in a second sweep.
    counted: Option<Margins>,
}

impl<'a> Stage<'a> {
    fn new(
        workers: Workers<'a>,
        objective: &'a Objective,
        shard: &'a Shard,
        exchanged: &'a Exchanged,
    ) -> Result<Self> {
        let labels = shard.valid_labels(objective)?;
        let mut pass = RowPass::new(workers.instructions, objective)?;
        if shard.settings().temperatures.is_some() {
            pass = pass.of_any_temperature();
        }
        Ok(Self { workers, objective, shard, exchanged, labels, pass })
    }

    /// The pass over a token's row.
    fn pass_of(&self, token: usize) -> RowPass {
        let own = self.shard.settings();
        match own.temperatures {
            None => self.pass,
            Some(_) => self.pass.at(own.temperature(token, self.objective)),
        }
    }

    /// Does `work` for every token that is not ignored; the others get `ignored`.
    fn for_tokens<S, T: Clone + Send + Sync>(
        &self,
        scratch: impl Fn() -> S + Sync,
        ignored: T,
        work: impl Fn(&mut S, usize) -> T + Sync,
    ) -> Vec<T> {
        self.workers.threads.map((0..self.labels.len()).collect(), scratch, |scratch, token| {
            match self.labels[token] {
                None => ignored.clone(),
                Some(_) => work(scratch, token),
            }
        })
    }

    /// The index of a target in the shard's columns, if it is there.
    fn place(&self, target: usize, columns: usize) -> Option<usize> {
        target.checked_sub(self.shard.first_column()).filter(|&place| place < columns)
    }

    /// The index of the target that this shard leaves out of its part of a row, which may be another than that of the whole
    /// row if it is the teacher's.
    fn left_out(&self, token: usize, teacher: Elements, scratch: &mut Scratch) -> Option<usize> {
        match self.objective.target() {
            Target::Teacher => Some(self.pass.arg_max(teacher, scratch)),
            Target::Label => self.place(self.labels[token]?, teacher.len()),
        }
    }

    fn check_shapes(&self, teacher: Logits, student: [usize; 2]) -> Result<()> {
        self.shard.check_columns(teacher.vocab())?;
        let expected = [self.labels.len(), teacher.vocab()];
        for (what, actual) in [
            ("the teacher's logits", [teacher.tokens(), teacher.vocab()]),
            ("the student's logits", student),
        ] {
            if actual != expected {
                return Err(Error::ShapeMismatch { what, expected, actual });
            }
        }
        Ok(())
    }

    /// Checks what was exchanged: that there is one of each, and one target per token.
    fn check_exchanged(&self) -> Result<()> {
        let tokens = self.labels.len();
        self.exchanged.check(tokens)?;
        let has_target = |token| {
            let mut states = self.exchanged.states_of(token, tokens);
            states.any(|state: &shards::RowState| state.target >= 0)
        };
        match (0..tokens).find(|&token| self.labels[token].is_some() && !has_target(token)) {
            Some(token) => Err(Error::NoShardTarget { token }),
            None => Ok(()),
        }
    }

    /// Merges the states of a token's row in the order of the ranks.
    fn merged<F: Fold>(&self, token: usize) -> WholeRow {
        let (pass, tokens) = (self.pass_of(token), self.labels.len());
        let states = || self.exchanged.states_of(token, tokens).copied();
        // The teacher's largest logit among the targets that shards have left out, the lowest token among equals.
        let order =
            |state: &shards::RowState| (state.teacher_target, std::cmp::Reverse(state.target));
        let winner = states().filter(|state| state.target >= 0).reduce(|best, state| {
            if best.teacher_target.is_nan() || order(&state) > order(&best) { state } else { best }
        });
        let winner = winner.unwrap_or(shards::RowState::EMPTY);
        let mut state = RowState::empty();
        for part in states() {
            let of_part = RowState::of_exchanged::<F>(&part, pass.exponent, pass.at_1);
            state.merge::<F>(of_part, pass.inverse_temperature);
            if part.target >= 0 && part.target != winner.target {
                let logits = [part.teacher_target, part.student_target];
                state.merge::<F>(RowState::of_element::<F>(logits), pass.inverse_temperature);
            }
        }
        let logits = [winner.teacher_target, winner.student_target];
        let counted = pass.counted(&state, logits);
        WholeRow { state, target: winner.target as usize, logits, counted }
    }

    /// The row with what the second sweep has found, if the divergence has one.
    fn complete<D: RowDivergence>(&self, divergence: D, token: usize) -> WholeRow {
        let mut row = self.merged::<D::Fold>(token);
        if let (Some(second), Some(terms)) =
            (divergence.second(), self.exchanged.terms_of(token, self.labels.len()))
        {
            let mut sums = [0.0; 3];
            for terms in terms {
                let terms = [terms.teacher, terms.student, terms.slope];
                sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += f64::from(term));
            }
            row.state.found = divergence.found(second.of_exchanged(sums), row.counted);
        }
        row
    }

    fn check_terms(&self) -> Result<()> {
        let needed = self.objective.has_two_sweeps() && !self.labels.is_empty();
        match self.exchanged.terms_of(0, 1) {
            None if needed => Err(Error::NoSweepTerms),
            _ => Ok(()),
        }
    }

    /// A token's terms, and the scales of its gradient.
    fn finished<D: RowDivergence>(
        &self,
        divergence: D,
        token: usize,
        row: &WholeRow,
        hard: bool,
        scales: ReductionScales,
    ) -> (TokenTerms, GradientScales) {
        let pass = self.pass_of(token);
        let margin = pass.margin_of(&row.state, TEACHER, row.logits[TEACHER]);
        let of_token = OfToken { pass, own: self.shard.settings(), token };
        let target = [margin, row.logits[STUDENT].into()];
        of_token.finish(divergence, self.objective, &row.state, target, hard, scales)
    }
}

pub(super) fn states_by(
    workers: Workers,
    objective: &Objective,
    shard: &Shard,
    teacher: Logits,
    student: Logits,
) -> Result<Vec<shards::RowState>> {
    let nothing = Exchanged::new(&[]);
    let stage = Stage::new(workers, objective, shard, &nothing)?;
    stage.check_shapes(teacher, [student.tokens(), student.vocab()])?;
    by_family!(objective, divergence => Ok(stage.states(divergence, teacher, student)))
}

pub(super) fn margins_by(
    workers: Workers,
    objective: &Objective,
    shard: &Shard,
    exchanged: &Exchanged,
) -> Result<Vec<f32>> {
    let stage = Stage::new(workers, objective, shard, exchanged)?;
    stage.check_exchanged()?;
    by_family!(objective, divergence => Ok(stage.margins(divergence)))
}

pub(super) fn terms_by(
    workers: Workers,
    objective: &Objective,
    shard: &Shard,
    exchanged: &Exchanged,
    teacher: Logits,
    student: Logits,
) -> Result<Vec<SweepTerms>> {
    let stage = Stage::new(workers, objective, shard, exchanged)?;
    stage.check_shapes(teacher, [student.tokens(), student.vocab()])?;
    stage.check_exchanged()?;
    if !objective.has_two_sweeps() {
        return Err(Error::NoSecondSweep);
    }
    by_family!(objective, divergence => Ok(stage.terms(divergence, teacher, student)))
}

pub(super) fn gradient_by(
    workers: Workers,
    objective: &Objective,
    shard: &Shard,
    exchanged: &Exchanged,
    teacher: Logits,
    rows: Vec<StudentRow>,
) -> Result<()> {
    let stage = Stage::new(workers, objective, shard, exchanged)?;
    let columns = rows.first().map_or(teacher.vocab(), |row| row.logits().len());
    stage.check_shapes(teacher, [rows.len(), columns])?;
    stage.check_exchanged()?;
    stage.check_terms()?;
    let hard = shard.groups(objective, &stage.labels)?;
    by_family!(objective, divergence => stage.gradient(divergence, teacher, rows, &hard));
    Ok(())
}

pub(super) fn finish_by(
    workers: Workers,
    objective: &Objective,
    shard: &Shard,
    exchanged: &Exchanged,
) -> Result<Output> {
    let stage = Stage::new(workers, objective, shard, exchanged)?;
    stage.check_exchanged()?;
    stage.check_terms()?;
    let hard = shard.groups(objective, &stage.labels)?;
    by_family!(objective, divergence => Ok(stage.finish(divergence, &hard)))
}

impl Stage<'_> {
    fn states<D: RowDivergence>(
        &self,
        _: D,
        teacher: Logits,
        student: Logits,
    ) -> Vec<shards::RowState> {
        let scratch = || self.pass.of_first_sweep().scratch(teacher.vocab(), false);
        self.for_tokens(scratch, shards::RowState::EMPTY, |scratch, token| {
            let (pass, teacher, student) =
                (self.pass_of(token), teacher.row(token), student.row(token));
            let target = self.left_out(token, teacher, scratch);
            let state = pass.first_sweep::<D::Fold>(teacher, student, target, scratch);
            let target = target.map(|target| {
                (self.shard.first_column() + target, [teacher.get(target), student.get(target)])
            });
            state.exchanged::<D::Fold>(pass.exponent, pass.at_1, target)
        })
    }

    fn margins<D: RowDivergence>(&self, _: D) -> Vec<f32> {
        self.for_tokens(
            || (),
            f32::NEG_INFINITY,
            |_, token| {
                let row = self.merged::<D::Fold>(token);
                self.pass_of(token).margin_of(&row.state, TEACHER, row.logits[TEACHER]) as f32
            },
        )
    }

    fn terms<D: RowDivergence>(
        &self,
        divergence: D,
        teacher: Logits,
        student: Logits,
    ) -> Vec<SweepTerms> {
        let scratch = || self.pass.scratch(teacher.vocab(), false);
        self.for_tokens(scratch, SweepTerms::EMPTY, |scratch, token| {
            let mut row = self.merged::<D::Fold>(token);
            let (teacher, student) = (teacher.row(token), student.row(token));
            let (sums, _) = self.sweeps(divergence, token, &mut row, teacher, student, scratch);
            let Some((second, sums)) = divergence.second().zip(sums) else {
                return SweepTerms::EMPTY;
            };
            let [teacher, student, slope] = second.exchanged(sums).map(|sum| sum as f32);
            SweepTerms { teacher, student, slope }
        })
    }

    /// Sweeps over the shard's part of a row, given the state of the whole. Returns the sums of the second sweep, and the
    /// index of the target if it is there.
    fn sweeps<D: RowDivergence>(
        &self,
        divergence: D,
        token: usize,
        row: &mut WholeRow,
        teacher: Elements,
        student: Elements,
        scratch: &mut Scratch,
    ) -> (Option<[f64; 3]>, Option<usize>) {
        let (pass, target) = (self.pass_of(token), self.place(row.target, teacher.len()));
        let part = pass.first_sweep::<D::Fold>(teacher, student, target, scratch);
        // The ranks do not exchange which terms were far.
        row.state.sums.far |= part.sums.far;
        let sums = pass.sweep_again(divergence, teacher, student, &row.state, row.counted, scratch);
        (sums, target)
    }

    fn gradient<D: RowDivergence>(
        &self,
        divergence: D,
        teacher: Logits,
        rows: Vec<StudentRow>,
        hard: &[bool],
    ) {
        let [valid, hard_tokens] = self.shard.counts(&self.labels, hard);
        let scales = scales(self.objective, valid, hard_tokens);
        let scratch = || self.pass.scratch(teacher.vocab(), true);
        let rows = rows.into_iter().enumerate().collect();
        self.workers.threads.map(rows, scratch, |scratch, (token, mut student)| {
            if self.labels[token].is_none() {
                if let Some(mut gradient) = student.gradient() {
                    gradient.row.fill_zero();
                }
                return;
            }
            let (pass, teacher) = (self.pass_of(token), teacher.row(token));
            let mut row = self.complete(divergence, token);
            let (_, target) =
                self.sweeps(divergence, token, &mut row, teacher, student.logits(), scratch);
            let (_, scales) = self.finished(divergence, token, &row, hard[token], scales);
            if let Some(gradient) = student.gradient() {
                pass.gradient(divergence, &row.state, &scales, target, scratch, gradient);
            }
        });
    }

    fn finish<D: RowDivergence>(&self, divergence: D, hard: &[bool]) -> Output {
        let counts @ [valid, hard_tokens] = self.shard.counts(&self.labels, hard);
        let scales = scales(self.objective, valid, hard_tokens);
        let tokens = self.for_tokens(
            || (),
            TokenTerms::IGNORED,
            |_, token| {
                let row = self.complete(divergence, token);
                self.finished(divergence, token, &row, hard[token], scales).0
            },
        );
        Output::reduce_over(self.objective, tokens, self.shard.settings(), counts)
    }
}
