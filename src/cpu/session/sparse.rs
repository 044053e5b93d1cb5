//! A call with a sparse teacher.
//!
//! Tokens that the teacher does not know are to it one class: by [`Tail::Bucket`] that is the definition, and by
//! [`Tail::Zero`] and [`Tail::Sampled`] no divergence tells tokens without a probability from each other. So the row becomes one of K + 2 classes,
//! the known tokens, the target and the rest, whose logit is the log-sum-exp of the rest's, and goes through the mathematics
//! of any other row. The gradient at a token of the rest is the class's times the token's share of it. Only [`Tail::Uniform`]
//! tells such tokens apart, and has a row of the whole vocabulary made for each token.
//!
//! The teacher's margins need no logits of the student: hard tokens are known before the rows.

use super::{Kept, Session, Token, margin_of_log_prob};
use crate::cpu::math::{self, Margins, RowDivergence, RowState, STUDENT, by_family};
use crate::cpu::rows::{Destination, RowPass, Scratch};
use crate::cpu::{StudentRow, Workers};
use crate::logits::{Elements, ElementsMut};
use crate::sparse::{KnownTokens, SparseTeacher, Tail, log_sum_exp};
use crate::{Objective, Result};

/// The teacher's distribution of a row, as its tail models it.
pub(in crate::cpu) struct Modelled {
    known: KnownTokens,
    /// The logarithm of the mass of all tokens that are not known, and how many they are.
    rest: f64,
    rest_tokens: usize,
    /// log((1 - p_g) / p_g)
    margin: f64,
}

impl Modelled {
    /// That of every token, `None` for those without a label, which are ignored.
    pub fn of_tokens(
        workers: Workers,
        objective: &Objective,
        labels: &[Option<usize>],
        teacher: &SparseTeacher,
    ) -> Result<Vec<Option<Self>>> {
        let found = workers.threads.map(
            (0..labels.len()).collect(),
            || (),
            |_, token| {
                let model = |label| {
                    let known = teacher.known(objective, token, label)?;
                    Ok(Self::new(known, teacher.tail(), teacher.vocab()))
                };
                labels[token].map(model).transpose()
            },
        );
        found.into_iter().collect()
    }

    /// The known columns of a shard, whose first is token `first` of the vocabulary, ascending from 0.
    pub fn known_columns(&self, first: usize, columns: usize) -> Vec<usize> {
        let inside = self.known.columns.iter().filter_map(|&column| column.checked_sub(first));
        inside.filter(|&column| column < columns).collect()
    }

    /// Writes the teacher's logits of a shard's columns, whose first is token `first` of the vocabulary. If the rest is one
    /// class, `of_rest` is T times the log-sum-exp of the student's logits, over T, of its tokens in all shards, and `student`
    /// has the shard's logits.
    pub fn write_logits(
        &self,
        temperature: f64,
        of_rest: Option<f64>,
        first: usize,
        student: Elements,
        to: &mut [f32],
    ) {
        let logit = self.teacher_logits(temperature);
        let each = logit(self.rest - (self.rest_tokens as f64).ln());
        match of_rest {
            // The class has the student's distribution, if it has one, so that its tokens all have one ratio of probabilities.
            Some(of_rest) if of_rest.is_finite() && each.is_finite() => {
                let shift = f64::from(logit(self.rest)) - of_rest;
                for (column, to) in to.iter_mut().enumerate() {
                    *to = (f64::from(student.get(column)) + shift) as f32;
                }
            }
            _ => to.fill(each),
        }
        for (&column, &log_prob) in self.known.columns.iter().zip(&self.known.log_probs) {
            if let Some(to) = column.checked_sub(first).and_then(|place| to.get_mut(place)) {
                *to = logit(log_prob);
            }
        }
    }

    fn new(mut known: KnownTokens, tail: Tail, vocab: usize) -> Self {
        let rest_tokens = vocab - known.columns.len();
        let others = log_sum_exp(
            known.log_probs.iter().enumerate().filter(|(k, _)| *k != known.target).map(|(_, p)| *p),
        );
        let log_target = known.log_probs[known.target];
        if tail == Tail::Zero {
            let margin = others - log_target;
            return Self { known, rest: f64::NEG_INFINITY, rest_tokens, margin }.settled();
        }
        let log_target = log_target.min(0.0);
        known.log_probs[known.target] = log_target;
        let is_sampled = tail == Tail::Sampled;
        let (log_off_target, margin) = match log_target {
            // Single precision has rounded away what a log-probability of 0 leaves. The other known tokens may still tell, but
            // not weights, whose unit nobody knows.
            0.0 if !is_sampled => (others, others),
            _ => ((-log_target.exp_m1()).ln(), margin_of_log_prob(log_target)),
        };
        let off_target = log_off_target.exp();
        let mut rest = off_target - others.exp();
        if is_sampled || rest < ROUNDING * off_target || rest_tokens == 0 {
            // The others have all of what is not the target's, but for rounding or the unit of weights.
            rest = 0.0;
            let excess = others - log_off_target;
            for (k, log_prob) in known.log_probs.iter_mut().enumerate() {
                *log_prob -= if k == known.target || !excess.is_finite() { 0.0 } else { excess };
            }
        }
        Self { known, rest: rest.ln(), rest_tokens, margin }.settled()
    }

    /// The logits that log-probabilities become. They are relative to a log-probability near the largest off the target, lest
    /// those of a teacher that is sure of it be rounded to the digits of large ones.
    fn teacher_logits(&self, temperature: f64) -> impl Fn(f64) -> f32 {
        let known = &self.known;
        let off_target = known.log_probs.iter().enumerate().filter(|&(k, _)| k != known.target);
        let largest = off_target.fold(self.rest, |largest, (_, &log_prob)| largest.max(log_prob));
        let largest = if largest.is_finite() { largest } else { 0.0 };
        move |log_prob| (temperature * (log_prob - largest)) as f32
    }

    /// A rest of one token is as known as the others.
    fn settled(mut self) -> Self {
        let known = &mut self.known;
        if self.rest_tokens == 1 {
            let column = known.columns.iter().enumerate().position(|(k, &column)| column != k);
            let column = column.unwrap_or(known.columns.len());
            known.columns.insert(column, column);
            known.log_probs.insert(column, self.rest);
            known.target += usize::from(column <= known.target);
            self.rest_tokens = 0;
        }
        self
    }
}

/// The share of a mass below which what is left of it is rounding in double precision.
const ROUNDING: f64 = 1e-12;

/// The margins of a token, of which the teacher's is known: to the bit those that its terms are finished with, lest where the
/// models agree the target have one sign in the total variation's mean, and another in its own gradient.
fn margins(pass: RowPass, u: f64, student_target: f64, state: &RowState) -> Margins {
    let (shift, sum) = (state.shifts[STUDENT], state.sums.student);
    Margins { u, w: math::margin(shift, sum, student_target, pass.inverse_temperature) }
}

/// A thread's own memory.
struct Rows {
    /// That of whole rows: of the student's rest, or of both models where the teacher's row is made.
    row: Scratch,
    teacher_row: Vec<f32>,
    classes: Scratch,
    /// The logits of the classes of each model, and the gradient.
    teacher: Vec<f32>,
    student: Vec<f32>,
    gradient: Vec<f32>,
}

impl Session<'_> {
    /// The teacher's distribution for every token, `None` for ignored ones. The margins of all tokens are known from here on.
    ///
    /// # Errors
    /// If a value of the teacher's is none that it may be.
    pub(in crate::cpu) fn model(
        &mut self,
        teacher: &SparseTeacher,
    ) -> Result<Vec<Option<Modelled>>> {
        let models = Modelled::of_tokens(self.workers, &self.objective, &self.labels, teacher)?;
        let margins = models.iter().map(|model| model.as_ref().map(|model| model.margin as f32));
        self.margins = margins.collect();
        Ok(models)
    }

    /// [`rows`](Self::rows) of all tokens, after their selection.
    pub(in crate::cpu) fn sparse_rows(
        &mut self,
        teacher: &SparseTeacher,
        models: Vec<Option<Modelled>>,
        rows: &mut [StudentRow],
    ) {
        by_family!(self.objective, divergence => {
            self.sparse_rows_by(divergence, teacher, models, rows);
        });
    }

    fn sparse_rows_by<D: RowDivergence>(
        &mut self,
        divergence: D,
        teacher: &SparseTeacher,
        models: Vec<Option<Modelled>>,
        rows: &mut [StudentRow],
    ) {
        let with_gradient = rows.iter().any(|row| !matches!(row, StudentRow::Forward(_)));
        let classes = teacher.top_k() + 2;
        let uniform = teacher.tail() == Tail::Uniform;
        let scratch = || Rows {
            row: match uniform {
                true => self.pass.scratch(self.vocab, with_gradient),
                false => self.pass.rest_scratch(self.vocab, with_gradient),
            },
            teacher_row: vec![0.0; if uniform { self.vocab } else { 0 }],
            classes: self.pass.without_cross_entropy().scratch(classes, true),
            teacher: Vec::with_capacity(classes),
            student: Vec::with_capacity(classes),
            gradient: Vec::with_capacity(classes),
        };
        let items = rows.iter_mut().zip(models).enumerate().collect();
        let done =
            self.workers.threads.map(items, scratch, |scratch, (token, (student, model))| {
                let Some(model) = model else {
                    if let Some(mut gradient) = student.gradient() {
                        gradient.row.fill_zero();
                    }
                    return Token::Ignored;
                };
                Token::Done(Box::new(match uniform {
                    true => {
                        self.row_of_whole_vocabulary(divergence, token, &model, student, scratch)
                    }
                    false => self.row_of_classes(divergence, token, &model, student, scratch),
                }))
            });
        self.tokens = done;
    }

    /// The row of a teacher that spreads the rest of its mass evenly.
    fn row_of_whole_vocabulary<D: RowDivergence>(
        &self,
        divergence: D,
        token: usize,
        model: &Modelled,
        student: &mut StudentRow,
        scratch: &mut Rows,
    ) -> Kept {
        let Modelled { known, rest, rest_tokens, margin } = model;
        let pass = self.pass_of(token);
        let temperature = self.own.temperature(token, &self.objective);
        let teacher_logit = model.teacher_logits(temperature);
        scratch.teacher_row.fill(teacher_logit(rest - (*rest_tokens as f64).ln()));
        for (&column, &log_prob) in known.columns.iter().zip(&known.log_probs) {
            scratch.teacher_row[column] = teacher_logit(log_prob);
        }
        let target = known.columns[known.target];
        let teacher = Elements::F32(&scratch.teacher_row);
        let logits = student.logits();
        let student_target = logits.get(target).into();
        let margins = |state: &RowState| margins(pass, *margin, student_target, state);
        let memory = &mut scratch.row;
        let state = pass.state_by(divergence, teacher, logits, target, margins, memory);
        let hard = self.is_hard(token);
        let (terms, scales) =
            self.finished(divergence, token, &state, *margin, student_target, hard);
        let gradient = student.gradient();
        let has_gradient = gradient.is_some();
        if let Some(to) = gradient {
            pass.gradient(divergence, &state, &scales, Some(target), &mut scratch.row, to);
        }
        Kept { target, state, student_target, terms, has_gradient, mispredicted: false }
    }

    /// The row of a teacher to which all tokens of the rest are one class.
    fn row_of_classes<D: RowDivergence>(
        &self,
        divergence: D,
        token: usize,
        model: &Modelled,
        student: &mut StudentRow,
        scratch: &mut Rows,
    ) -> Kept {
        let Modelled { known, rest: rest_log_prob, rest_tokens, margin } = model;
        let (pass, target) = (self.pass_of(token), known.target);
        let temperature = self.own.temperature(token, &self.objective);
        let logits = student.logits();
        let rest = pass.rest(logits, &known.columns, &mut scratch.row);

        // Classes are relative to a logit near the largest off the target, lest the log-sum-exp be rounded to the digits of
        // large ones.
        scratch.student.clear();
        scratch.student.extend(known.columns.iter().map(|&column| logits.get(column)));
        let off_target = scratch.student.iter().enumerate().filter(|&(k, _)| k != target);
        let mut shift = off_target.fold(rest.shift as f32, |largest, (_, &z)| largest.max(z));
        if scratch.student.iter().any(|&z| z.is_finite() && (z - shift).is_infinite()) {
            shift = 0.0;
        }
        let student_target = f64::from(scratch.student[target]) - f64::from(shift);
        scratch.student.iter_mut().for_each(|logit| *logit -= shift);
        let teacher_logit = model.teacher_logits(temperature);
        scratch.teacher.clear();
        scratch.teacher.extend(known.log_probs.iter().map(|&log_prob| teacher_logit(log_prob)));
        let from_shift = rest.shift - f64::from(shift);
        if *rest_tokens > 0 {
            scratch.student.push((from_shift + temperature * rest.sum.ln()) as f32);
            scratch.teacher.push(teacher_logit(*rest_log_prob));
        }

        let (teacher, student_logits) =
            (Elements::F32(&scratch.teacher), Elements::F32(&scratch.student));
        let of_classes = pass.without_cross_entropy();
        let margins = |state: &RowState| margins(pass, *margin, student_target, state);
        let memory = &mut scratch.classes;
        let mut state =
            of_classes.state_by(divergence, teacher, student_logits, target, margins, memory);
        // The exponential of a class at temperature 1, which for the rest is no function of its logit.
        let rest_factor_at_1 = match rest.sum_at_1 {
            0.0 => 0.0,
            _ => (from_shift - state.shifts[STUDENT]).exp(),
        };
        let at_1 = |k: usize| match known.columns.get(k) {
            Some(_) => (f64::from(scratch.student[k]) - state.shifts[STUDENT]).exp(),
            None => rest.sum_at_1 * rest_factor_at_1,
        };
        if pass.at_1 {
            let others = (0..scratch.student.len()).filter(|&k| k != target);
            state.sums.student_at_1 = others.map(at_1).sum();
        }
        let hard = self.is_hard(token);
        let (terms, scales) =
            self.finished(divergence, token, &state, *margin, student_target, hard);

        let gradient = student.gradient();
        let has_gradient = gradient.is_some();
        if let Some(mut to) = gradient {
            scratch.gradient.clear();
            scratch.gradient.resize(scratch.student.len(), 0.0);
            let of_class =
                Destination { row: ElementsMut::F32(&mut scratch.gradient), non_temporal: false };
            let memory = &mut scratch.classes;
            of_classes.gradient(divergence, &state, &scales, Some(target), memory, of_class);
            let of_rest = scratch.gradient.get(known.columns.len()).map_or(0.0, |&g| f64::from(g));
            // The gradient of a row that is no distribution is NaN.
            let scale =
                if rest.sum == 0.0 && of_rest.is_finite() { 0.0 } else { of_rest / rest.sum };
            let scale_at_1 = scales.student_at_1 * rest_factor_at_1;
            pass.rest_gradient(&rest, [scale, scale_at_1], &mut scratch.row, &mut to);
            for (k, &column) in known.columns.iter().enumerate() {
                let mut value = scratch.gradient[k];
                if pass.at_1 && k != target {
                    value += (scales.student_at_1 * at_1(k)) as f32;
                }
                to.row.set(column, value);
            }
        }
        let target = known.columns[target];
        Kept { target, state, student_target, terms, has_gradient, mispredicted: false }
    }

    /// Returns whether a token is hard, once that is known.
    fn is_hard(&self, token: usize) -> bool {
        self.hard.as_ref().is_some_and(|hard| hard[token])
    }
}
