//! The loss in float64, straight from its definitions: softmax, mask out the target, renormalise, the divergences of
//! the two classes and of the rest, or the one of the whole vocabulary, and the chain rule for the gradient. Slow,
//! serial, and independent of the fused form, against which it is the oracle. A sparse teacher becomes the distribution that
//! its tail models.

pub(crate) mod sparse;

use crate::objective::{Coefficient, Family, Mixture, Target, check_temperature};
use crate::output::TokenTerms;
use crate::{
    Batch, Elements, Logits, Objective, Output, ReductionScales, Result, SelectionRule, Teacher,
};
use sparse::SparseRow;

/// A distribution as logarithms: probabilities that underflow still have one. Everything is relative to the largest
/// logit, before the temperature divides it, so that logits of any finite size cancel nothing.
pub(crate) struct Softmax {
    logits: Vec<f64>,
    temperature: f64,
    max: f64,
    /// log of the sum of e^((z - max) / temperature)
    log_sum: f64,
    /// log p_j; -inf where p_j is 0, which is everywhere if there are no logits but -inf.
    pub log: Vec<f64>,
}

impl Softmax {
    /// `logits` hold neither NaN nor +inf.
    pub fn new(logits: Vec<f64>, temperature: f64) -> Self {
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // Nothing but -inf has no distances.
        let over = |z: f64| if max.is_finite() { (z - max) / temperature } else { z };
        let log_sum = logits.iter().map(|&z| over(z).exp()).sum::<f64>().ln();
        let log = logits
            .iter()
            .map(|&z| if z == f64::NEG_INFINITY { z } else { over(z) - log_sum })
            .collect();
        Self { logits, temperature, max, log_sum, log }
    }

    /// False if there is no logit but -inf.
    fn exists(&self) -> bool {
        self.max.is_finite()
    }

    /// log p_j - log p_k of a `k` with a probability above 0.
    fn log_relative_to(&self, k: usize, j: usize) -> f64 {
        (self.logits[j] - self.logits[k]) / self.temperature
    }
}

/// A distribution over the vocabulary, split at the target.
pub(crate) struct Split {
    target: usize,
    /// The renormalised non-targets; the target has no probability there.
    pub rest: Softmax,
    /// log ((1 - p_g) / p_g)
    margin: f64,
    /// log p_g
    pub log_target: f64,
    /// log (1 - p_g), by way of the margin, since 1 - p_g loses every digit near 1.
    pub log_rest: f64,
}

impl Split {
    /// `logits` as [`defined`] has them.
    pub fn new(logits: &[f64], temperature: f64, target: usize) -> Self {
        let mut others = logits.to_vec();
        others[target] = f64::NEG_INFINITY;
        let rest = Softmax::new(others, temperature);
        let margin = rest.log_sum + (rest.max - logits[target]) / temperature;
        let (log_target, log_rest) = (log_sigmoid(-margin), log_sigmoid(margin));
        Self { target, rest, margin, log_target, log_rest }
    }

    /// p_j
    fn probability(&self, j: usize) -> f64 {
        let log = if j == self.target { self.log_target } else { self.log_rest + self.rest.log[j] };
        log.exp()
    }
}

/// log 1 / (1 + e^-x)
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// p times a logarithm, with the limits: 0 where p is 0, and infinite where only the logarithm is.
fn times_log(log_p: f64, log: f64) -> f64 {
    if log_p == f64::NEG_INFINITY {
        0.0
    } else if log.is_infinite() {
        log
    } else {
        log_p.exp() * log
    }
}

/// The addend of one token, or one of the two classes, with the probabilities p and q in a divergence D, and its
/// derivative with respect to log q, which is q dD/dq.
fn divergence(family: Family, log_p: f64, log_q: f64) -> (f64, f64) {
    if log_p == f64::NEG_INFINITY && log_q == f64::NEG_INFINITY {
        return (0.0, 0.0);
    }
    let (p, q) = (log_p.exp(), log_q.exp());
    let log_ratio = log_p - log_q;
    match family {
        Family::ForwardKl => (times_log(log_p, log_ratio), -p),
        Family::ReverseKl => {
            let value = times_log(log_q, -log_ratio);
            (value, value + q)
        }
        Family::Mixture(Mixture { share, of_teacher, of_student }) => {
            // log(p / m) and log(q / m) by what m is of the larger one: nothing overflows, and nothing is lost where
            // p and q are close.
            let (log_p_m, log_q_m) = if log_ratio > 0.0 {
                let log_p_m = -((1.0 - share) * (-log_ratio).exp_m1()).ln_1p();
                (log_p_m, log_p_m - log_ratio)
            } else {
                let log_q_m = -(share * log_ratio.exp_m1()).ln_1p();
                (log_q_m + log_ratio, log_q_m)
            };
            let (of_p, of_q) = (times_log(log_p, log_p_m), times_log(log_q, log_q_m));
            // m depends on q, too.
            let by_mixture = of_student * share - of_teacher * (1.0 - share);
            let slope = of_student * of_q + by_mixture * q * log_p_m.exp();
            (of_teacher * of_p + of_student * of_q, slope)
        }
        Family::TotalVariation => {
            let sign = match log_ratio {
                0.0 => 0.0,
                _ => -log_ratio.signum(),
            };
            (-0.5 * p.max(q) * (-log_ratio.abs()).exp_m1(), 0.5 * q * sign)
        }
    }
}

/// The divergence of two distributions, and its gradient with respect to `q`'s logits over the temperature.
fn between(family: Family, p: &Softmax, q: &Softmax) -> (f64, Vec<f64>) {
    let both = || p.log.iter().zip(&q.log);
    let value = both().map(|(&log_p, &log_q)| divergence(family, log_p, log_q).0).sum();
    let mut slopes: Vec<f64> = match family {
        // A factor of p adds a constant to dD/dq = 1 + log(q / p), and none to the gradient. Where p is minute on all
        // that q holds, that constant has a size beside which all differences are lost: the factor that makes p
        // equal to q at q's maximum avoids it.
        Family::ReverseKl => {
            let top =
                (1..q.log.len()).fold(0, |top, j| if q.log[j] > q.log[top] { j } else { top });
            let log_p = |j| q.log[top] + p.log_relative_to(top, j);
            (0..q.log.len()).map(|j| divergence(family, log_p(j), q.log[j]).1).collect()
        }
        _ => both().map(|(&log_p, &log_q)| divergence(family, log_p, log_q).1).collect(),
    };
    // d log q_k / db_j = [j = k] - q_j
    let total: f64 = slopes.iter().sum();
    slopes.iter_mut().zip(&q.log).for_each(|(slope, log_q)| *slope -= log_q.exp() * total);
    (value, slopes)
}

pub(crate) fn widen(row: Elements) -> Vec<f64> {
    (0..row.len()).map(|j| f64::from(row.get(j))).collect()
}

/// True if the logits are those of a distribution.
pub(crate) fn defined(logits: &[f64]) -> bool {
    logits.iter().all(|z| !z.is_nan() && *z != f64::INFINITY)
        && logits.iter().any(|z| *z != f64::NEG_INFINITY)
}

/// The loss, and each token's terms, in nats. `student` is `[tokens, vocab]`, as the batch's teacher.
///
/// # Errors
/// Those of [`forward_backward`].
pub fn forward(objective: &Objective, batch: &Batch, student: Logits) -> Result<Output> {
    batch.check_shape("the student's logits", [student.tokens(), student.vocab()])?;
    compute(objective, batch, |token| widen(student.row(token)), None)
}

/// The loss, each token's terms, and the gradient with respect to the student's logits,
/// `[tokens, vocab]` without gaps, in float64.
///
/// # Errors
/// If the shapes differ, a label is out of range, or labels are needed and missing.
pub fn forward_backward(
    objective: &Objective,
    batch: &Batch,
    student: Logits,
) -> Result<(Output, Vec<f64>)> {
    batch.check_shape("the student's logits", [student.tokens(), student.vocab()])?;
    let mut gradient = vec![0.0; student.tokens() * student.vocab()];
    let rows = |token| widen(student.row(token));
    let output = compute(objective, batch, rows, Some(&mut gradient))?;
    Ok((output, gradient))
}

/// The entropy of one model's distribution for each token: see [`cpu::token_entropies`](crate::cpu::token_entropies).
///
/// # Errors
/// If the temperature is not in [1e-30, 1e30].
pub fn token_entropies(logits: Logits, temperature: f64) -> Result<Vec<f64>> {
    check_temperature(temperature)?;
    let entropy = |token| {
        let row = widen(logits.row(token));
        if !defined(&row) {
            return f64::NAN;
        }
        let log = Softmax::new(row, temperature).log;
        // A probability of 0 adds its limit, 0. The sum of nothing is -0.
        let possible = log.iter().filter(|&&log| log != f64::NEG_INFINITY);
        possible.map(|log| -log.exp() * log).sum::<f64>() + 0.0
    };
    Ok((0..logits.tokens()).map(entropy).collect())
}

/// The target of each token, `None` where it is ignored.
pub(crate) fn targets(objective: &Objective, batch: &Batch) -> Result<Vec<Option<usize>>> {
    let teacher = batch.teacher_logits()?;
    let arg_max = |token| {
        let row = teacher.row(token);
        (1..row.len()).fold(0, |best, j| if row.get(j) > row.get(best) { j } else { best })
    };
    let target = |(token, label): (usize, Option<usize>)| {
        label.map(|label| match objective.target() {
            Target::Label => label,
            Target::Teacher => arg_max(token),
        })
    };
    let labels = batch.valid_labels(objective)?;
    Ok(labels.into_iter().enumerate().map(target).collect())
}

/// The factors of a token's terms.
pub(crate) struct Weights {
    pub tkd: f64,
    pub dkd: f64,
    /// The plain divergence, where that is not the sum of the two.
    pub plain: f64,
    pub ce: f64,
}

impl Weights {
    /// The plain forward KL is that of its coefficients.
    pub fn new(objective: &Objective, temperature: f64, uncertainty: f64, hard: bool) -> Self {
        let (kd, ce) = (objective.distillation_scale_at(temperature), objective.ce_weight());
        if objective.is_plain() && objective.divergence().family() != Family::ForwardKl {
            return Self { tkd: 0.0, dkd: 0.0, plain: kd, ce };
        }
        let coefficients = if hard { objective.hard() } else { objective.easy() };
        let [tkd, dkd] =
            [coefficients.tkd, coefficients.dkd].map(|coefficient| match coefficient {
                Coefficient::Constant(value) => kd * value,
                Coefficient::Uncertainty => kd * uncertainty,
            });
        Self { tkd, dkd, plain: 0.0, ce }
    }

    /// These weights times the token's own.
    pub fn times(self, weight: f64) -> Self {
        let Self { tkd, dkd, plain, ce } = self;
        // Infinite weights would leave infinite what is to be NaN, and make NaN of terms that are absent.
        let weight = if weight.is_finite() { weight } else { f64::NAN };
        Self { tkd: tkd * weight, dkd: dkd * weight, plain: plain * weight, ce: ce * weight }
    }

    /// The distillation terms of a token whose loss is a sum of parts.
    pub fn distillation(&self, token: &TokenTerms) -> f64 {
        weighted(self.tkd, token.tkd) + weighted(self.dkd, token.dkd)
    }
}

/// A term without a weight is absent, infinite or not.
fn weighted(weight: f64, term: f64) -> f64 {
    if weight == 0.0 { 0.0 } else { weight * term }
}

/// `student` gives the logits of a token, in float64: finite differences need more than float32 holds.
pub(crate) fn compute(
    objective: &Objective,
    batch: &Batch,
    student: impl Fn(usize) -> Vec<f64>,
    mut gradient: Option<&mut [f64]>,
) -> Result<Output> {
    let (vocab, own) = (batch.teacher().vocab(), batch.token_settings());
    let labels = batch.valid_labels(objective)?;
    own.check(&labels)?;
    let rows = match batch.teacher() {
        Teacher::Dense(logits) => {
            let row = |(token, target)| TeacherRow::Dense(widen(logits.row(token)), target);
            let targets = targets(objective, batch)?.into_iter().enumerate();
            targets.map(|(token, target)| target.map(|target| row((token, target)))).collect()
        }
        Teacher::Sparse(sparse) => {
            sparse.tail().check(objective)?;
            let row = |(token, label)| SparseRow::new(&sparse, objective, token, label, vocab);
            labels
                .into_iter()
                .enumerate()
                .map(|(token, label)| label.map(|label| row((token, label))).transpose())
                .map(|row| Ok(row?.map(TeacherRow::Sparse)))
                .collect::<Result<Vec<_>>>()?
        }
    };
    let margins: Vec<Option<f64>> = rows
        .iter()
        .enumerate()
        .map(|(token, row)| {
            row.as_ref().map(|row| match row {
                TeacherRow::Sparse(row) => row.margin,
                TeacherRow::Dense(row, target) if defined(row) => {
                    Split::new(row, own.temperature(token, objective), *target).margin
                }
                TeacherRow::Dense(..) => f64::NAN,
            })
        })
        .collect();
    let hard = select(objective, batch, &margins);

    let valid = rows.iter().flatten().count();
    let hard_count = hard.iter().filter(|&&hard| hard).count();
    let scales = objective.reduction_scales(valid, hard_count).times(objective.upstream_gradient());
    let mut tokens = vec![TokenTerms::IGNORED; rows.len()];
    for (token, row) in rows.iter().enumerate() {
        let Some(row) = row else { continue };
        let b = student(token);
        let to = gradient.as_deref_mut().map(|g| &mut g[token * vocab..][..vocab]);
        let margin = margins[token].expect("a token with a target has a margin");
        let (weight, temperature) = (own.weight(token), own.temperature(token, objective));
        let hard = hard[token];
        tokens[token] = match row {
            TeacherRow::Dense(a, target) => divergence_of_token(
                objective,
                a,
                &b,
                *target,
                margin,
                hard,
                weight,
                temperature,
                scales,
                to,
            ),
            TeacherRow::Sparse(row) => {
                row.terms(objective, &b, hard, weight, temperature, scales, to)?
            }
        };
    }
    Ok(Output::reduce(objective, tokens, own))
}

/// The batch's own mask; else, by float32 margins within each scope, NaN last: the `ceil(k * valid)` tokens of largest
/// margin, ties by lower index; or those at or above the lower median.
fn select(objective: &Objective, batch: &Batch, margins: &[Option<f64>]) -> Vec<bool> {
    if let Some(hard) = batch.hard() {
        return hard.iter().zip(margins).map(|(&hard, margin)| hard && margin.is_some()).collect();
    }
    let mut hard = vec![false; margins.len()];
    for scope in batch.scopes() {
        let key =
            |token: usize, margin| batch.margins().map_or(margin as f32, |given| given[token]);
        let mut ranked: Vec<(usize, f32)> =
            scope.filter_map(|token| Some((token, key(token, margins[token]?)))).collect();
        ranked.sort_by(|(_, a), (_, b)| match (a.is_nan(), b.is_nan()) {
            (false, false) => b.partial_cmp(a).expect("neither is NaN"),
            (a, b) => a.cmp(&b),
        });
        let wanted = match objective.selection_rule() {
            SelectionRule::TopK => objective.hard_count(ranked.len()),
            SelectionRule::Median => {
                // The order is descending.
                let median = ranked.iter().rev().nth(ranked.len().saturating_sub(1) / 2);
                let at_least = |&&(_, margin): &&(usize, f32)| {
                    median.is_some_and(|&(_, median)| margin >= median || median.is_nan())
                };
                ranked.iter().take_while(at_least).count()
            }
        };
        for &(token, _) in &ranked[..wanted] {
            hard[token] = true;
        }
    }
    hard
}

/// A teacher's row that is not ignored, the dense one with its target.
enum TeacherRow {
    Dense(Vec<f64>, usize),
    Sparse(SparseRow),
}

/// The terms of a token with these logits, and its gradient.
#[expect(clippy::too_many_arguments)]
fn divergence_of_token(
    objective: &Objective,
    a: &[f64],
    b: &[f64],
    target: usize,
    margin: f64,
    hard: bool,
    weight: f64,
    temperature: f64,
    scales: ReductionScales,
    gradient: Option<&mut [f64]>,
) -> TokenTerms {
    if !defined(a) || !defined(b) {
        if let Some(gradient) = gradient {
            gradient.fill(f64::NAN);
        }
        let nan = f64::NAN;
        return TokenTerms {
            margin,
            uncertainty: if defined(a) { log_sigmoid(margin).exp() } else { nan },
            tkd: nan,
            dkd: nan,
            loss: nan,
            valid: true,
            hard,
        };
    }
    let family = objective.divergence().family();
    let p = Split::new(a, temperature, target);
    let q = Split::new(b, temperature, target);
    let q_at_1 = Split::new(b, 1.0, target);
    let uncertainty = p.log_rest.exp();

    let (of_target, slope_of_target) = divergence(family, p.log_target, q.log_target);
    let (of_rest, slope_of_rest) = divergence(family, p.log_rest, q.log_rest);
    let tkd = of_target + of_rest;
    let without_rest = match family {
        Family::ForwardKl => !p.rest.exists(),
        Family::ReverseKl => !q.rest.exists(),
        Family::Mixture(_) | Family::TotalVariation => !p.rest.exists() || !q.rest.exists(),
    };
    let (dkd, slopes_of_dkd) = match without_rest {
        true => (0.0, vec![0.0; a.len()]),
        false => between(family, &p.rest, &q.rest),
    };
    let ce = -q_at_1.log_target;
    let whole = objective.is_plain() && family != Family::ForwardKl;
    let (plain, slopes_of_plain) = match whole {
        true => between(
            family,
            &Softmax::new(a.to_vec(), temperature),
            &Softmax::new(b.to_vec(), temperature),
        ),
        false => (0.0, vec![0.0; a.len()]),
    };

    let weights = Weights::new(objective, temperature, uncertainty, hard).times(weight);
    let terms = [(weights.tkd, tkd), (weights.dkd, dkd), (weights.plain, plain), (weights.ce, ce)];
    let loss = terms.iter().map(|&(weight, term)| weighted(weight, term)).sum();

    if let Some(gradient) = gradient {
        // Forward KL and cross entropy have a gradient where they are infinite, a limit; reverse KL has none.
        let none = family == Family::ReverseKl
            && terms[..3].iter().any(|&(weight, term)| weight != 0.0 && term.is_infinite());
        // d log q_rest / dw = 1 - s and d log q_g / dw = -s, where w is the margin and s = q_rest.
        let slope_of_tkd = slope_of_rest * q.log_target.exp() - slope_of_target * q.log_rest.exp();
        for (j, out) in gradient.iter_mut().enumerate() {
            let at_target = if j == target { 1.0 } else { 0.0 };
            // dw / db_j
            let of_margin = q.rest.log[j].exp() - at_target;
            let distillation = weighted(weights.tkd, slope_of_tkd * of_margin)
                + weighted(weights.dkd, slopes_of_dkd[j])
                + weighted(weights.plain, slopes_of_plain[j]);
            let ce = q_at_1.probability(j) - at_target;
            *out = scales.distillation(hard) * distillation / temperature
                + scales.ce * weights.ce * ce;
        }
        if none {
            gradient.fill(f64::NAN);
        }
    }
    // A plain divergence that is no sum of its parts is reported without them.
    let [tkd, dkd] = match family {
        Family::Mixture(_) | Family::TotalVariation if whole => [f64::NAN; 2],
        _ => [tkd, dkd],
    };
    TokenTerms { margin, uncertainty, tkd, dkd, loss, valid: true, hard }
}
