//! The loss in float64, straight from its definitions: softmax, mask out the target, renormalise, two
//! KL divergences, and the chain rule for the gradient. Slow, serial, and independent of the fused
//! form, against which it is the oracle.

use crate::objective::{Coefficient, Target};
use crate::output::TokenTerms;
use crate::{Batch, Elements, Logits, Objective, Output, Result};

/// A distribution over the vocabulary, split at the target, as logarithms: probabilities that
/// underflow still have one. Everything is relative to the largest logit off the target, before the
/// temperature divides it, so that logits of any finite size cancel nothing.
struct Split {
    /// log of p_j renormalised over the non-targets; -inf where p_j is 0, and at the target.
    log_renormalised: Vec<f64>,
    /// log ((1 - p_g) / p_g)
    margin: f64,
    /// log p_g
    log_target: f64,
    /// log (1 - p_g), by way of the margin, since 1 - p_g loses every digit near 1.
    log_rest: f64,
}

impl Split {
    /// `logits` as [`defined`] has them.
    fn new(logits: &[f64], temperature: f64, target: usize) -> Self {
        let others = || logits.iter().enumerate().filter(|&(j, _)| j != target).map(|(_, &z)| z);
        let max = others().fold(f64::NEG_INFINITY, f64::max);
        // Nothing but -inf has no distances.
        let over = |z: f64| if max.is_finite() { (z - max) / temperature } else { z };
        let log_sum = others().map(|z| over(z).exp()).sum::<f64>().ln();
        let mut log_renormalised: Vec<f64> = logits
            .iter()
            .map(|&z| if z == f64::NEG_INFINITY { z } else { over(z) - log_sum })
            .collect();
        log_renormalised[target] = f64::NEG_INFINITY;
        let margin = log_sum + (max - logits[target]) / temperature;
        let log_target = log_sigmoid(-margin);
        Self { log_renormalised, margin, log_target, log_rest: log_sigmoid(margin) }
    }

    /// p_j
    fn probability(&self, j: usize, target: usize) -> f64 {
        let log =
            if j == target { self.log_target } else { self.log_rest + self.log_renormalised[j] };
        log.exp()
    }
}

/// log 1 / (1 + e^-x)
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// p log(p / q), with the limits: 0 where p is 0, +inf where only q is.
fn divergence(log_p: f64, log_q: f64) -> f64 {
    if log_p == f64::NEG_INFINITY {
        0.0
    } else if log_q == f64::NEG_INFINITY {
        f64::INFINITY
    } else {
        log_p.exp() * (log_p - log_q)
    }
}

fn widen(row: Elements) -> Vec<f64> {
    (0..row.len()).map(|j| f64::from(row.get(j))).collect()
}

fn defined(logits: &[f64]) -> bool {
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

/// `student` gives the logits of a token, in float64: finite differences need more than float32 holds.
pub(crate) fn compute(
    objective: &Objective,
    batch: &Batch,
    student: impl Fn(usize) -> Vec<f64>,
    mut gradient: Option<&mut [f64]>,
) -> Result<Output> {
    let labels = batch.valid_labels(objective)?;
    let teacher = batch.teacher();
    let (vocab, temperature) = (teacher.vocab(), objective.temperature());

    let targets: Vec<Option<usize>> = labels
        .iter()
        .enumerate()
        .map(|(token, label)| {
            label.map(|label| match objective.target() {
                Target::Label => label,
                Target::Teacher => {
                    let row = teacher.row(token);
                    (1..vocab).fold(0, |best, j| if row.get(j) > row.get(best) { j } else { best })
                }
            })
        })
        .collect();

    let margins: Vec<Option<f64>> = targets
        .iter()
        .enumerate()
        .map(|(token, target)| {
            target.map(|target| {
                let row = widen(teacher.row(token));
                match defined(&row) {
                    true => Split::new(&row, temperature, target).margin,
                    false => f64::NAN,
                }
            })
        })
        .collect();
    let hard = select(objective, batch, &margins);

    let valid = labels.iter().flatten().count();
    let scale = objective.reduction_scale(valid) * objective.upstream_gradient();
    let mut tokens = vec![TokenTerms::IGNORED; labels.len()];
    for (token, target) in targets.iter().enumerate() {
        let Some(target) = *target else { continue };
        let (a, b) = (widen(teacher.row(token)), student(token));
        let row = gradient.as_deref_mut().map(|g| &mut g[token * vocab..][..vocab]);
        let margin = margins[token].expect("a token with a target has a margin");
        tokens[token] = one_token(objective, &a, &b, target, margin, hard[token], scale, row);
    }
    Ok(Output::reduce(objective, tokens))
}

/// The batch's own mask; else the `ceil(k * valid)` tokens of largest float32 margin within each scope: NaN last, ties
/// by lower index.
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
        for &(token, _) in ranked.iter().take(objective.hard_count(ranked.len())) {
            hard[token] = true;
        }
    }
    hard
}

#[expect(clippy::too_many_arguments)]
fn one_token(
    objective: &Objective,
    a: &[f64],
    b: &[f64],
    target: usize,
    margin: f64,
    hard: bool,
    scale: f64,
    gradient: Option<&mut [f64]>,
) -> TokenTerms {
    let temperature = objective.temperature();
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
    let p = Split::new(a, temperature, target);
    let q = Split::new(b, temperature, target);
    let q_at_1 = Split::new(b, 1.0, target);
    let uncertainty = p.log_rest.exp();
    let tkd = divergence(p.log_target, q.log_target) + divergence(p.log_rest, q.log_rest);
    let others = || (0..a.len()).filter(|&j| j != target);
    let dkd: f64 = others().map(|j| divergence(p.log_renormalised[j], q.log_renormalised[j])).sum();
    let ce = -q_at_1.log_target;

    let coefficients = if hard { objective.hard() } else { objective.easy() };
    let number = |coefficient| match coefficient {
        Coefficient::Constant(value) => value,
        Coefficient::Uncertainty => uncertainty,
    } * objective.distillation_scale();
    let weights = [number(coefficients.tkd), number(coefficients.dkd), objective.ce_weight()];
    let loss = weights
        .iter()
        .zip([tkd, dkd, ce])
        .filter(|(weight, _)| **weight != 0.0)
        .map(|(weight, term)| weight * term)
        .sum();

    if let Some(gradient) = gradient {
        let [c_tkd, c_dkd, c_ce] = weights;
        let (p_g, p_rest) = (p.log_target.exp(), uncertainty);
        for (j, out) in gradient.iter_mut().enumerate() {
            // d log q_g / db_j = [j = g] - q_j and d log q_rest / db_j = [j != g] qhat_j - q_j.
            let at_target = if j == target { 1.0 } else { 0.0 };
            let (phat, qhat) = (p.log_renormalised[j].exp(), q.log_renormalised[j].exp());
            let q_j = q.probability(j, target);
            let tkd = -p_g * (at_target - q_j) - p_rest * (qhat - q_j);
            let dkd = if p.log_rest == f64::NEG_INFINITY { 0.0 } else { qhat - phat };
            let ce = q_at_1.probability(j, target) - at_target;
            *out = scale * ((c_tkd * tkd + c_dkd * dkd) / temperature + c_ce * ce);
        }
    }
    TokenTerms { margin, uncertainty, tkd, dkd, loss, valid: true, hard }
}
