//! A call in stages.

mod sparse;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::math::{self, GradientScales, RowDivergence, RowState, TEACHER, by_family};
use super::rows::RowPass;
#[cfg(feature = "head")]
use super::threads::Threads;
use super::{RunningSelection, StudentRow, Workers, into_rows};
use crate::batch::{TokenSettings, check_count, valid_labels};
use crate::call::HARD_MASK;
use crate::error::NO_GROUP_SIZES;
use crate::objective::{Objective, ReductionScales, Target};
use crate::output::{Output, TokenTerms};
use crate::selection::{self, check_offsets};
use crate::{Batch, Elements, Error, Labels, Logits, LogitsMut, Result};
pub(super) use sparse::Modelled;

/// One call in stages: the batch is handed over in ranges of tokens, each with logits of its own, by a caller who never
/// has all logits at once. The result is that of one call on the whole batch, to the bit: every token's terms, the hard
/// tokens, the loss and the gradients.
///
/// 1. [`begin`](Self::begin) takes the labels of all tokens.
/// 2. [`rows`](Self::rows) takes the logits of a range of tokens and writes their gradient; once per token, in any
///    order. The hard tokens are not known yet, so that their set is predicted.
/// 3. [`select`](Self::select) selects them, and returns the mispredicted tokens, some percent.
/// 4. [`repair`](Self::repair) takes the logits of mispredicted tokens once more and writes the right gradient.
/// 5. [`finish`](Self::finish) returns the loss and every token's terms.
///
/// No gradient needs a repair if the hard tokens are known before the rows: given by [`with_hard`](Self::with_hard),
/// selected by [`with_margins`](Self::with_margins) or [`with_teacher_log_probs`](Self::with_teacher_log_probs), or selected
/// after [`margins`](Self::margins) of all tokens. They must be known there for [`Reduction::GroupMean`](crate::Reduction::GroupMean) with a selection by the median or within
/// sequences: how many there are is a factor of the gradients.
///
/// ```
/// use atkd::cpu::Session;
/// use atkd::{Logits, LogitsMut, Objective};
///
/// let labels = [0_i64, 1, 2, 0];
/// let logits = |_range: std::ops::Range<usize>| ([2.0_f32, 1.0, 0.0, 0.0, 3.0, 1.0], [1.0_f32; 6]);
/// let mut gradients = [0.0_f32; 12];
///
/// let mut session = Session::begin(&Objective::default(), &labels, 3)?;
/// for (i, gradient) in gradients.chunks_mut(6).enumerate() {
///     let (teacher, student) = logits(2 * i..2 * i + 2);
///     let (teacher, student) = (Logits::new(&teacher[..], 2, 3)?, Logits::new(&student[..], 2, 3)?);
///     session.rows(2 * i, teacher, student, Some(LogitsMut::new(gradient, 2, 3)?))?;
/// }
/// for token in session.select()?.to_vec() {
///     let (teacher, student) = logits(token..token + 1);
///     let row = token % 2 * 3..token % 2 * 3 + 3;
///     let gradient = LogitsMut::new(&mut gradients[3 * token..][..3], 1, 3)?;
///     let teacher = Logits::new(&teacher[row.clone()], 1, 3)?;
///     session.repair(&[token], teacher, Logits::new(&student[row], 1, 3)?, gradient)?;
/// }
/// let output = session.finish()?;
/// assert_eq!(output.tokens.iter().filter(|token| token.hard).count(), 2);
/// # Ok::<(), atkd::Error>(())
/// ```
pub struct Session<'a> {
    workers: Workers<'a>,
    objective: Objective,
    pass: RowPass,
    vocab: usize,
    /// The labels, `None` for ignored tokens; 0 for all of a batch without labels.
    labels: Vec<Option<usize>>,
    sequences: Option<Cow<'a, [usize]>>,
    /// The margins to select by that the caller has.
    given_margins: Option<Cow<'a, [f32]>>,
    own: TokenSettings<'a>,
    /// The teacher's margins, if that stage was run; `None` for tokens that it did not have, or that are ignored.
    margins: Vec<Option<f32>>,
    /// The teacher's arg maxima that the stage of margins has found, if these are the targets.
    arg_maxima: Vec<Option<usize>>,
    /// The hard tokens, once they are known.
    hard: Option<Vec<bool>>,
    /// [`select`](Self::select) has been called.
    is_selected: bool,
    /// Those by the margins so far, if they are predicted so.
    predicted: Option<Vec<bool>>,
    /// Every prediction by margins is turned round, for tests.
    #[cfg(test)]
    pub(crate) mispredicts: bool,
    running: Mutex<RunningSelection>,
    tokens: Vec<Token>,
    mispredicted: Vec<usize>,
    scales: ReductionScales,
}

/// A token on its way through the stages.
enum Token {
    /// Its logits were not handed over yet.
    Waiting,
    Ignored,
    Done(Box<Kept>),
}

/// The facts about a row that are kept until the hard tokens are known.
struct Kept {
    target: usize,
    state: RowState,
    student_target: f64,
    /// The terms for the group that the gradient was written for.
    terms: TokenTerms,
    has_gradient: bool,
    /// The gradient is that of the other group.
    mispredicted: bool,
}

impl<'a> Session<'a> {
    /// Begins a call on as many tokens as there are labels.
    ///
    /// # Errors
    /// If a label is out of range.
    pub fn begin(
        objective: &Objective,
        labels: impl Into<Labels<'a>>,
        vocab: usize,
    ) -> Result<Self> {
        let labels = labels.into();
        Self::by(Workers::default(), objective, Some(labels), labels.len(), vocab)
    }

    /// Begins a call without labels, for objectives with [`Target::Teacher`].
    ///
    /// # Errors
    /// If the objective's target is the label.
    pub fn begin_unlabelled(objective: &Objective, tokens: usize, vocab: usize) -> Result<Self> {
        Self::by(Workers::default(), objective, None, tokens, vocab)
    }

    /// [`begin`](Self::begin) by the workers given.
    pub(super) fn by(
        workers: Workers<'a>,
        objective: &Objective,
        labels: Option<Labels>,
        tokens: usize,
        vocab: usize,
    ) -> Result<Self> {
        Self::new(workers, objective, valid_labels(objective, labels, tokens, vocab)?, vocab)
    }

    /// A call on a batch whose logits are all there.
    pub(super) fn of_batch(
        workers: Workers<'a>,
        objective: &Objective,
        batch: &Batch<'a>,
    ) -> Result<Self> {
        let labels = batch.valid_labels(objective)?;
        let mut session = Self::new(workers, objective, labels, batch.teacher().vocab())?;
        session.sequences = batch.sequences().map(Cow::from);
        session.given_margins = batch.margins().map(Cow::from);
        session = session.with_settings(batch.token_settings())?;
        match batch.hard() {
            Some(hard) => session.with_hard(hard),
            None => Ok(session),
        }
    }

    fn new(
        workers: Workers<'a>,
        objective: &Objective,
        labels: Vec<Option<usize>>,
        vocab: usize,
    ) -> Result<Self> {
        let valid = labels.iter().flatten().count();
        Ok(Self {
            workers,
            objective: *objective,
            pass: RowPass::new(workers.instructions, objective)?,
            vocab,
            sequences: None,
            given_margins: None,
            own: TokenSettings::default(),
            margins: Vec::new(),
            arg_maxima: Vec::new(),
            hard: None,
            is_selected: false,
            predicted: None,
            #[cfg(test)]
            mispredicts: false,
            running: Mutex::new(RunningSelection::new(objective)),
            tokens: labels.iter().map(|_| Token::Waiting).collect(),
            labels,
            mispredicted: Vec::new(),
            scales: scales(objective, valid, objective.hard_count(valid)),
        })
    }

    /// Settings come before stages.
    fn check_before_stages(&self) -> Result<()> {
        if self.is_selected {
            return Err(Error::Stage {
                token: 0,
                problem: "was selected, or not, before a setting",
            });
        }
        let rows = self.tokens.iter().position(|token| !matches!(token, Token::Waiting));
        match rows.or_else(|| self.margins.iter().position(Option::is_some)) {
            Some(token) => Err(Error::Stage { token, problem: "was handed over before a setting" }),
            None => Ok(()),
        }
    }

    /// Selects within sequences: see [`Batch::with_sequences`].
    ///
    /// # Errors
    /// As there, or if a token was handed over before.
    pub fn with_sequences(mut self, offsets: impl Into<Cow<'a, [usize]>>) -> Result<Self> {
        self.check_before_stages()?;
        let offsets = offsets.into();
        check_offsets(&offsets, self.labels.len())?;
        self.sequences = Some(offsets);
        Ok(self)
    }

    /// Selects by margins that the caller has: see [`Batch::with_margins`].
    ///
    /// # Errors
    /// If there is not one margin per token, or a token was handed over before.
    pub fn with_margins(mut self, margins: &'a [f32]) -> Result<Self> {
        self.check_before_stages()?;
        let tokens = self.labels.len();
        if margins.len() != tokens {
            return Err(Error::MarginCount { margins: margins.len(), tokens });
        }
        self.given_margins = Some(margins.into());
        Ok(self)
    }

    /// Selects by the teacher's log-probability of each token's target, at the token's temperature, where it is known before
    /// the logits are: from a server, say. NaN is below every number. [`TokenTerms::margin`] stays that of the logits.
    ///
    /// # Errors
    /// If there is not one per token, that of a token which is not ignored is above 1e-4 (rounding alone does not make it so
    /// large), or a token was handed over before.
    pub fn with_teacher_log_probs(mut self, log_probs: &[f32]) -> Result<Self> {
        self.check_before_stages()?;
        check_count("the teacher's log-probabilities", log_probs.len(), self.labels.len())?;
        for (token, &log_prob) in log_probs.iter().enumerate() {
            if self.labels[token].is_some() && log_prob > 1e-4 {
                return Err(Error::LogProb { token, log_prob });
            }
        }
        self.given_margins = Some(log_probs.iter().map(|&log_prob| margin_of(log_prob)).collect());
        Ok(self)
    }

    /// Takes the hard tokens from a selection made elsewhere: see [`Batch::with_hard`].
    ///
    /// # Errors
    /// If there is not one value per token, or a token was handed over before.
    pub fn with_hard(mut self, hard: &[bool]) -> Result<Self> {
        self.check_before_stages()?;
        check_count(HARD_MASK, hard.len(), self.labels.len())?;
        let valid = self.labels.iter().zip(hard).map(|(label, &hard)| hard && label.is_some());
        self.know(valid.collect());
        Ok(self)
    }

    /// Multiplies the weights of each token's terms: see [`Batch::with_token_weights`].
    ///
    /// # Errors
    /// If there is not one weight per token, or a token was handed over before.
    pub fn with_token_weights(mut self, weights: &'a [f32]) -> Result<Self> {
        self.check_before_stages()?;
        self.own = self.own.with_weights(weights, self.labels.len())?;
        Ok(self)
    }

    fn with_settings(mut self, own: TokenSettings<'a>) -> Result<Self> {
        own.check(&self.labels)?;
        if own.temperatures.is_some() {
            self.pass = self.pass.of_any_temperature();
        }
        self.own = own;
        Ok(self)
    }

    /// Gives each token a temperature of its own: see [`Batch::with_temperatures`].
    ///
    /// # Errors
    /// If there is not one temperature per token, that of one which is not ignored is not in [1e-30, 1e30], or a token was
    /// handed over before.
    pub fn with_temperatures(self, temperatures: &'a [f32]) -> Result<Self> {
        self.check_before_stages()?;
        let own = self.own.with_temperatures(temperatures, self.labels.len())?;
        self.with_settings(own)
    }

    /// The pass over a token's row.
    fn pass_of(&self, token: usize) -> RowPass {
        match self.own.temperatures {
            None => self.pass,
            Some(_) => self.pass.at(self.own.temperature(token, &self.objective)),
        }
    }

    /// Computes the margins of the tokens from `first` on, from the teacher's logits alone. After that of all tokens,
    /// [`select`](Self::select) needs no rows.
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn margins(&mut self, first: usize, teacher: Logits) -> Result<()> {
        let range = self.range("the teacher's logits", first, teacher)?;
        self.margins_of(&Vec::from_iter(range), teacher);
        Ok(())
    }

    /// [`margins`](Self::margins) of any tokens of the call, row `i` that of `tokens[i]`.
    pub(crate) fn margins_of(&mut self, tokens: &[usize], teacher: Logits) {
        let arg_maxima = self.arg_maxima_of(tokens, teacher);
        let margin = |_: &mut (), row: usize| {
            let (token, logits) = (tokens[row], teacher.row(row));
            let target = self.target(token, arg_maxima.get(row));
            target.map(|target| self.pass_of(token).margin(logits, target) as f32)
        };
        let found = self.workers.threads.map((0..tokens.len()).collect(), || (), margin);
        if self.objective.target() == Target::Teacher {
            self.arg_maxima.resize(self.labels.len(), None);
        }
        for (&token, arg_max) in tokens.iter().zip(arg_maxima) {
            self.arg_maxima[token] = arg_max;
        }
        self.margins.resize(self.labels.len(), None);
        for (&token, margin) in tokens.iter().zip(found) {
            self.margins[token] = margin;
        }
    }

    /// Computes the terms of the tokens from `first` on, and their gradient where one is wanted, in the student's dtype
    /// or float32, or in any if the student's is float32. Rows of ignored tokens become 0. All three have one shape
    /// `[range, vocab]`.
    ///
    /// # Errors
    /// If shapes do not fit, the gradient's dtype is none of these, or a token was handed over before. Nothing was done
    /// then.
    pub fn rows(
        &mut self,
        first: usize,
        teacher: Logits,
        student: Logits,
        mut gradient: Option<LogitsMut>,
    ) -> Result<()> {
        let range = self.range("the student's logits", first, student)?;
        let mut rows = into_rows(student, gradient.as_mut())?;
        self.rows_of(&Vec::from_iter(range), teacher, &mut rows)
    }

    /// Does what [`rows`](Self::rows) does, with the gradient written over the student's logits.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub fn rows_in_place(
        &mut self,
        first: usize,
        teacher: Logits,
        student: LogitsMut,
    ) -> Result<()> {
        let range = self.range("the student's logits", first, student.as_logits())?;
        self.rows_in_place_of(&Vec::from_iter(range), teacher, student)
    }

    /// [`rows_in_place`](Self::rows_in_place) of any tokens of the call, row `i` that of `tokens[i]`.
    pub(crate) fn rows_in_place_of(
        &mut self,
        tokens: &[usize],
        teacher: Logits,
        mut student: LogitsMut,
    ) -> Result<()> {
        let mut rows: Vec<_> = student.rows().into_iter().map(StudentRow::InPlace).collect();
        self.rows_of(tokens, teacher, &mut rows)
    }

    pub(super) fn rows_of(
        &mut self,
        tokens: &[usize],
        teacher: Logits,
        rows: &mut [StudentRow],
    ) -> Result<()> {
        by_family!(self.objective, divergence => self.rows_by(divergence, tokens, teacher, rows))
    }

    fn rows_by<D: RowDivergence>(
        &mut self,
        divergence: D,
        tokens: &[usize],
        teacher: Logits,
        rows: &mut [StudentRow],
    ) -> Result<()> {
        let expected = [teacher.tokens(), self.vocab];
        for (what, actual) in [
            ("the teacher's logits", [teacher.tokens(), teacher.vocab()]),
            ("the student's logits", [rows.len(), self.vocab]),
        ] {
            if actual != expected {
                return Err(Error::ShapeMismatch { what, expected, actual });
            }
        }
        let before = tokens.iter().find(|&&token| !matches!(self.tokens[token], Token::Waiting));
        if let Some(&token) = before {
            return Err(Error::Stage { token, problem: "was handed over before" });
        }
        self.select_by_given_margins();
        let arg_maxima = self.arg_maxima_of(tokens, teacher);
        let with_gradient = rows.iter().any(|row| !matches!(row, StudentRow::Forward(_)));
        if let (true, Some(&token)) =
            (with_gradient && self.selects_before_gradients(), tokens.first())
        {
            return Err(Error::Stage { token, problem: NO_GROUP_SIZES });
        }
        let scratch = || self.pass.scratch(self.vocab, with_gradient);
        let mut order: Vec<(usize, &mut StudentRow)> = rows.iter_mut().enumerate().collect();
        let known = self.hard.as_ref().or(self.predicted.as_ref());
        if known.is_none() && self.objective.depends_on_selection() && with_gradient {
            // Neighbours are alike; a mixed order teaches the running selection sooner.
            fastrand::Rng::with_seed(0).shuffle(&mut order);
        }
        let found = self.workers.threads.map(order, scratch, |scratch, (row, student)| {
            let Some(target) = self.target(tokens[row], arg_maxima.get(row)) else {
                if let Some(mut gradient) = student.gradient() {
                    gradient.row.fill_zero();
                }
                return (row, Token::Ignored);
            };
            let (token, teacher) = (tokens[row], teacher.row(row));
            let pass = self.pass_of(token);
            let state = pass.state(divergence, teacher, student.logits(), target, scratch);
            let margin = pass.margin_of(&state, TEACHER, teacher.get(target));
            let student_target = student.logits().get(target).into();
            let hard = match known {
                Some(hard) => hard[token],
                None => {
                    let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
                    running.add(margin as f32)
                }
            };
            let (terms, scales) =
                self.finished(divergence, token, &state, margin, student_target, hard);
            let mut has_gradient = false;
            if let Some(gradient) = student.gradient() {
                pass.gradient(divergence, &state, &scales, Some(target), scratch, gradient);
                has_gradient = true;
            }
            let mispredicted = false;
            let kept = Kept { target, state, student_target, terms, has_gradient, mispredicted };
            (row, Token::Done(Box::new(kept)))
        });
        for (row, token) in found {
            self.tokens[tokens[row]] = token;
        }
        Ok(())
    }

    /// Selects the hard tokens, and returns those whose gradients were written for the other group, in ascending order:
    /// none if the selection was known, or changes no gradient.
    ///
    /// # Errors
    /// If a token has neither a margin of the stage of that name, nor logits.
    pub fn select(&mut self) -> Result<&[usize]> {
        self.select_by_given_margins();
        if self.hard.is_none() {
            let mut margins = Vec::with_capacity(self.labels.len());
            for (token, label) in self.labels.iter().enumerate() {
                margins.push(match (&self.tokens[token], self.margins.get(token), label) {
                    (_, _, None) | (Token::Ignored, ..) => None,
                    (Token::Done(kept), ..) => Some(kept.terms.margin as f32),
                    (Token::Waiting, Some(&Some(margin)), _) => Some(margin),
                    _ => return Err(Error::Stage { token, problem: "has no margin yet" }),
                });
            }
            self.know(self.selected(|token| margins[token]));
        }
        let hard = self.hard.take().unwrap_or_default();
        for (token, &hard) in hard.iter().enumerate() {
            if let Token::Done(kept) = &self.tokens[token]
                && kept.terms.hard != hard
            {
                by_family!(self.objective, divergence => self.regroup(divergence, token, hard));
            }
        }
        self.hard = Some(hard);
        self.is_selected = true;
        Ok(&self.mispredicted)
    }

    /// Gives a token the terms of the other group.
    fn regroup<D: RowDivergence>(&mut self, divergence: D, token: usize, hard: bool) {
        let Token::Done(kept) = &self.tokens[token] else { return };
        let (terms, _) = self.finished(
            divergence,
            token,
            &kept.state,
            kept.terms.margin,
            kept.student_target,
            hard,
        );
        let Token::Done(kept) = &mut self.tokens[token] else { return };
        kept.terms = terms;
        if kept.has_gradient && self.objective.depends_on_selection() {
            kept.mispredicted = true;
            self.mispredicted.push(token);
        }
    }

    /// Writes the gradients of mispredicted tokens anew. Row `i` of all three is of token `tokens[i]`: any part of those
    /// that [`select`](Self::select) returned, in any order.
    ///
    /// # Errors
    /// If shapes do not fit, or a token needs no repair. Nothing was done then.
    pub fn repair(
        &mut self,
        tokens: &[usize],
        teacher: Logits,
        student: Logits,
        mut gradient: LogitsMut,
    ) -> Result<()> {
        self.check_repair(tokens, teacher, student)?;
        let mut rows = into_rows(student, Some(&mut gradient))?;
        self.repair_rows(tokens, teacher, &mut rows)
    }

    /// Does what [`repair`](Self::repair) does, with the gradient written over the student's logits.
    ///
    /// # Errors
    /// As [`repair`](Self::repair).
    pub fn repair_in_place(
        &mut self,
        tokens: &[usize],
        teacher: Logits,
        mut student: LogitsMut,
    ) -> Result<()> {
        self.check_repair(tokens, teacher, student.as_logits())?;
        let mut rows: Vec<_> = student.rows().into_iter().map(StudentRow::InPlace).collect();
        self.repair_rows(tokens, teacher, &mut rows)
    }

    fn check_repair(&self, tokens: &[usize], teacher: Logits, student: Logits) -> Result<()> {
        let expected = [tokens.len(), self.vocab];
        for (what, logits) in [("the teacher's logits", teacher), ("the student's logits", student)]
        {
            let actual = [logits.tokens(), logits.vocab()];
            if actual != expected {
                return Err(Error::ShapeMismatch { what, expected, actual });
            }
        }
        Ok(())
    }

    fn repair_rows(
        &mut self,
        tokens: &[usize],
        teacher: Logits,
        rows: &mut [StudentRow],
    ) -> Result<()> {
        let rows = rows.iter_mut().enumerate();
        self.repair_of(
            rows.map(|(row, student)| (tokens[row], teacher.row(row), student)).collect(),
        )
    }

    /// Tokens of the call, and the size of the vocabulary.
    pub(crate) fn shape(&self) -> [usize; 2] {
        [self.labels.len(), self.vocab]
    }

    pub(super) fn repair_of(
        &mut self,
        rows: Vec<(usize, Elements, &mut StudentRow)>,
    ) -> Result<()> {
        by_family!(self.objective, divergence => self.repair_by(divergence, rows))
    }

    fn repair_by<D: RowDivergence>(
        &mut self,
        divergence: D,
        rows: Vec<(usize, Elements, &mut StudentRow)>,
    ) -> Result<()> {
        let mut tokens: Vec<usize> = rows.iter().map(|(token, ..)| *token).collect();
        tokens.sort_unstable();
        let twice = tokens.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
        let right = |token: &&usize| !matches!(self.tokens.get(**token), Some(Token::Done(kept)) if kept.mispredicted);
        if let Some(token) = twice.or_else(|| tokens.iter().find(right).copied()) {
            return Err(Error::Stage { token, problem: "needs no repair" });
        }
        self.write_gradients(divergence, rows, |hard| hard);
        for &token in &tokens {
            if let Token::Done(kept) = &mut self.tokens[token] {
                kept.mispredicted = false;
            }
        }
        self.mispredicted.retain(|token| tokens.binary_search(token).is_err());
        Ok(())
    }

    /// Writes the gradients of tokens that were handed over, for the group that follows from their own.
    fn write_gradients<D: RowDivergence>(
        &self,
        divergence: D,
        rows: Vec<(usize, Elements, &mut StudentRow)>,
        group: impl Fn(bool) -> bool + Sync,
    ) {
        let scratch = || self.pass.scratch(self.vocab, true);
        self.workers.threads.map(rows, scratch, |scratch, (token, teacher, student)| {
            let Token::Done(kept) = &self.tokens[token] else { return };
            let TokenTerms { margin, hard, .. } = kept.terms;
            let (state, student_target) = (&kept.state, kept.student_target);
            let (_, scales) =
                self.finished(divergence, token, state, margin, student_target, group(hard));
            let pass = self.pass_of(token);
            let state = pass.state(divergence, teacher, student.logits(), kept.target, scratch);
            let gradient = student.gradient().expect("the row has a gradient");
            pass.gradient(divergence, &state, &scales, Some(kept.target), scratch, gradient);
        });
    }

    /// Ends the call.
    ///
    /// # Errors
    /// If a token has not been through all of its stages.
    pub fn finish(mut self) -> Result<Output> {
        self.select()?;
        if let Some(&token) = self.mispredicted.first() {
            return Err(Error::Stage { token, problem: "waits for its repair" });
        }
        let terms = self.tokens.into_iter().enumerate().map(|(token, state)| match state {
            Token::Waiting => Err(Error::Stage { token, problem: "was never handed over" }),
            Token::Ignored => Ok(TokenTerms::IGNORED),
            Token::Done(kept) => Ok(kept.terms),
        });
        Ok(Output::reduce(&self.objective, terms.collect::<Result<_>>()?, self.own))
    }

    /// The margins of that stage, -inf for ignored tokens.
    pub(super) fn into_margins(self) -> Vec<f32> {
        self.margins.into_iter().map(|margin| margin.unwrap_or(f32::NEG_INFINITY)).collect()
    }

    /// Returns whether the hard tokens are known, or will be before the first row.
    pub(crate) fn knows_hard(&self) -> bool {
        self.hard.is_some() || self.given_margins.is_some()
    }

    /// Returns whether the selection must come before the first gradient.
    pub(crate) fn selects_before_gradients(&self) -> bool {
        let scopes = self.sequences.as_deref().map_or(1, |offsets| offsets.len() - 1);
        !self.knows_hard() && self.objective.selects_before_gradients(scopes)
    }

    /// From here on these are the hard tokens.
    fn know(&mut self, hard: Vec<bool>) {
        let valid = self.labels.iter().flatten().count();
        self.scales = scales(&self.objective, valid, hard.iter().filter(|&&hard| hard).count());
        self.hard = Some(hard);
    }

    fn finished<D: RowDivergence>(
        &self,
        divergence: D,
        token: usize,
        state: &RowState,
        margin: f64,
        student_target: f64,
        hard: bool,
    ) -> (TokenTerms, GradientScales) {
        let of_token = OfToken { pass: self.pass_of(token), own: self.own, token };
        of_token.finish(
            divergence,
            &self.objective,
            state,
            [margin, student_target],
            hard,
            self.scales,
        )
    }

    fn select_by_given_margins(&mut self) {
        if let (None, Some(margins)) = (&self.hard, &self.given_margins) {
            self.know(self.selected(|token| self.labels[token].map(|_| margins[token])));
        }
    }

    /// Selects by float32 margins, as all backends do.
    fn selected(&self, margin: impl Fn(usize) -> Option<f32>) -> Vec<bool> {
        let tokens = self.labels.len();
        let scopes = selection::scopes(self.sequences.as_deref(), tokens);
        let (rule, ratio) = (self.objective.selection_rule(), self.objective.hard_ratio());
        selection::select(rule, ratio, scopes, tokens, margin)
    }

    /// The tokens from `first` on whose logits these are.
    fn range(&self, what: &'static str, first: usize, logits: Logits) -> Result<Range<usize>> {
        let (count, tokens) = (logits.tokens(), self.labels.len());
        let end = first.checked_add(count).filter(|&end| end <= tokens);
        let end = end.ok_or(Error::TokenRange { first, count, tokens })?;
        let (expected, actual) = ([count, self.vocab], [count, logits.vocab()]);
        if actual != expected {
            return Err(Error::ShapeMismatch { what, expected, actual });
        }
        Ok(first..end)
    }

    /// The teacher's arg max for each of these tokens, `None` for ignored ones, if these are the targets; else nothing.
    fn arg_maxima_of(&self, tokens: &[usize], teacher: Logits) -> Vec<Option<usize>> {
        if self.objective.target() == Target::Label {
            return Vec::new();
        }
        let scratch = || self.pass.scratch(self.vocab, false);
        let rows = tokens.iter().enumerate().collect();
        self.workers.threads.map(rows, scratch, |scratch, (row, &token)| {
            let known = self.arg_maxima.get(token).copied().flatten();
            self.labels[token]
                .map(|_| known.unwrap_or_else(|| self.pass.arg_max(teacher.row(row), scratch)))
        })
    }

    /// The target of a token; `None` for an ignored one.
    fn target(&self, token: usize, arg_max: Option<&Option<usize>>) -> Option<usize> {
        arg_max.copied().unwrap_or(self.labels[token])
    }
}

/// These parts of a session are for [`head`](crate::head) alone.
#[cfg(feature = "head")]
impl<'a> Session<'a> {
    pub(crate) fn objective(&self) -> &Objective {
        &self.objective
    }

    pub(crate) fn threads(&self) -> Threads<'a> {
        self.workers.threads
    }

    /// The tokens that are not ignored; the others are done.
    pub(crate) fn valid_tokens(&mut self) -> Vec<usize> {
        for (token, _) in self.tokens.iter_mut().zip(&self.labels).filter(|(_, l)| l.is_none()) {
            *token = Token::Ignored;
        }
        (0..self.labels.len()).filter(|&token| self.labels[token].is_some()).collect()
    }

    /// Predicts the hard tokens by the margins of these tokens and of all before. Unlike the prediction of
    /// [`rows`](Self::rows) alone, this one is the same whatever the threads.
    pub(crate) fn predict(&mut self, tokens: &[usize], teacher: Logits) {
        self.margins_of(tokens, teacher);
        let predicted = self.selected(|token| self.margins[token]);
        #[cfg(test)]
        let predicted = predicted.into_iter().map(|hard| hard ^ self.mispredicts).collect();
        self.predicted = Some(predicted);
    }

    /// [`rows`](Self::rows) without a gradient of any tokens of the call, row `i` that of `tokens[i]`.
    pub(crate) fn forward_rows_of(
        &mut self,
        tokens: &[usize],
        teacher: Logits,
        student: Logits,
    ) -> Result<()> {
        self.rows_of(tokens, teacher, &mut into_rows(student, None)?)
    }

    /// Replaces the student's logits of mispredicted tokens, before their repair, by the gradients that were written for
    /// the wrong group.
    pub(crate) fn mispredicted_gradients(
        &self,
        tokens: &[usize],
        teacher: Logits,
        mut student: LogitsMut,
    ) {
        let mut students: Vec<_> = student.rows().into_iter().map(StudentRow::InPlace).collect();
        let rows = students.iter_mut().enumerate();
        let rows = rows.map(|(row, student)| (tokens[row], teacher.row(row), student)).collect();
        by_family!(self.objective, divergence => self.write_gradients(divergence, rows, |hard| !hard));
    }
}

/// The values that a token has of its own.
pub(super) struct OfToken<'a> {
    pub pass: RowPass,
    pub own: TokenSettings<'a>,
    pub token: usize,
}

impl OfToken<'_> {
    /// The terms of the token, and the scales of its row's gradient, from the state of the row, the teacher's margin and
    /// the student's logit of the target.
    pub fn finish<D: RowDivergence>(
        &self,
        divergence: D,
        objective: &Objective,
        state: &RowState,
        [margin, student_target]: [f64; 2],
        hard: bool,
        scales: ReductionScales,
    ) -> (TokenTerms, GradientScales) {
        let Self { pass, own, token } = self;
        let weight = own.weight(*token);
        let temperature = own.temperature(*token, objective);
        let token = math::Token {
            inverse_temperature: pass.inverse_temperature,
            at_1: pass.at_1,
            distillation_scale: objective.distillation_scale_at(temperature) * weight,
            ce_weight: objective.ce_weight() * weight,
            margin,
            student_target,
            hard,
        };
        math::finish(divergence, objective, state, &token, scales)
    }
}

/// The factors of the gradients of tokens' losses.
pub(super) fn scales(objective: &Objective, valid: usize, hard: usize) -> ReductionScales {
    objective.reduction_scales(valid, hard).times(objective.upstream_gradient())
}

/// [`margin_of_log_prob`] in single precision, as a margin to select by: 0 for what rounding makes more of, and NaN stays,
/// which counts as a margin below every number.
fn margin_of(log_prob: f32) -> f32 {
    margin_of_log_prob(if log_prob > 0.0 { 0.0 } else { log_prob.into() }) as f32
}

/// log((1 - p) / p) of log p.
fn margin_of_log_prob(log_prob: f64) -> f64 {
    // Each form is exact where the other cancels.
    let rest = if log_prob > -std::f64::consts::LN_2 {
        (-log_prob.exp_m1()).ln()
    } else {
        (-log_prob.exp()).ln_1p()
    };
    rest - log_prob
}
