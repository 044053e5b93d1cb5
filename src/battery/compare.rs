//! The errors that a backend is allowed, and the comparison of its results with exact ones. Other tests than the
//! battery use it too.

use crate::objective::Family;
use crate::reference::sparse::SparseRow;
use crate::reference::{self, Softmax, Split, Weights, defined, widen};
use crate::{
    Batch, Dtype, Logits, Objective, Output, ReductionScales, Result, Teacher, TokenTerms,
};

/// The error allowed to a loss of ordinary logits, those up to 50 in size: 1e-6 relative + 2e-7 `unit`, where `unit` is
/// T^2 if that multiplies the distillation terms and is above 1, else 1.
pub fn loss_within(exact: f64, unit: f64) -> f64 {
    loss_within_relative(RELATIVE, exact, unit)
}

/// The relative error allowed to a loss, and to a row's gradient over its largest element.
pub const RELATIVE: f64 = 1e-6;

/// [`loss_within`] with another relative error.
pub fn loss_within_relative(relative: f64, exact: f64, unit: f64) -> f64 {
    relative * exact.abs() + 2e-7 * unit
}

/// The error allowed to a token's TKD, DKD, UNC, margin (`unit` 1) or loss (`unit` as in [`loss_within`]):
/// 2e-6 (unit + |exact|).
pub fn term_within(exact: f64, unit: f64) -> f64 {
    2e-6 * (unit + exact.abs())
}

/// The error allowed to every element of a float32 gradient: 5e-7 `weight` scale / T. `weight` bounds what multiplies a
/// token's terms, `exact` tells how many tokens a mean divides by; where that is one for each group, the scale is the
/// larger one. It grows with the logarithm of a mixture's smaller share below 0.01, by which an element's slope does, which
/// cancels against the mean of all slopes.
pub fn gradient_floor(objective: &Objective, weight: f64, exact: &Output) -> f64 {
    let scales = reduction_scales(objective, exact);
    let scale = scales.easy.max(scales.hard).max(scales.ce) * objective.upstream_gradient().abs();
    let slope = match objective.divergence().family() {
        Family::Mixture(mixture) => {
            let smaller = mixture.share.min(1.0 - mixture.share);
            (smaller.ln() / 0.01_f64.ln()).max(1.0)
        }
        _ => 1.0,
    };
    5e-7 * weight * slope * scale / objective.temperature()
}

/// The factors of the tokens' losses in a reduced one.
pub fn reduction_scales(objective: &Objective, exact: &Output) -> ReductionScales {
    let count = |counts: fn(&TokenTerms) -> bool| exact.tokens.iter().filter(|t| counts(t)).count();
    objective.reduction_scales(count(|token| token.valid), count(|token| token.hard))
}

/// The relative difference of two probabilities up to which total variation may have any of its subgradients.
const TIE: f64 = 2e-6;

/// The allowed distance of two gradients of a batch, `[tokens, vocab]`, because total variation has a kink where p = q:
/// within rounding of it, that is up to a relative difference of 2e-6, a subgradient is any number between the two slopes.
/// 0 everywhere for other divergences, and for models that are equal to the bit.
///
/// A token or class in that band changes its own element of the gradient, and by way of the mean of all slopes those of
/// its row by their share of the band's probability. `exact` is what the reference returns.
///
/// # Errors
/// Those of the reference.
pub fn ties(
    objective: &Objective,
    batch: &Batch,
    student: Logits,
    exact: &Output,
) -> Result<Vec<f64>> {
    let vocab = student.vocab();
    let mut allowed = vec![0.0; student.tokens() * vocab];
    if objective.divergence().family() != Family::TotalVariation {
        return Ok(allowed);
    }
    let own = batch.token_settings();
    let scales = reduction_scales(objective, exact).times(objective.upstream_gradient().abs());
    // A sparse teacher's target is its row's to tell.
    let targets = match batch.teacher() {
        Teacher::Dense(_) => reference::targets(objective, batch)?,
        Teacher::Sparse(_) => batch.valid_labels(objective)?,
    };
    for (token, target) in targets.into_iter().enumerate() {
        let Some(target) = target else { continue };
        let temperature = own.temperature(token, objective);
        let TokenTerms { uncertainty, hard, .. } = exact.tokens[token];
        let weights =
            Weights::new(objective, temperature, uncertainty, hard).times(own.weight(token));
        let scale = scales.distillation(hard) / temperature;
        let (row, b) = (&mut allowed[token * vocab..][..vocab], widen(student.row(token)));
        match batch.teacher() {
            Teacher::Dense(teacher) => {
                row_ties(&widen(teacher.row(token)), &b, target, temperature, &weights, scale, row);
            }
            Teacher::Sparse(teacher) => {
                let of_classes = SparseRow::new(&teacher, objective, token, target, vocab)?;
                let (a, b) = of_classes.logits(&b, temperature);
                let mut ties = vec![0.0; a.len()];
                row_ties(&a, &b, of_classes.target, temperature, &weights, scale, &mut ties);
                for (class, tie) in of_classes.classes.iter().zip(ties) {
                    class.iter().for_each(|&j| row[j] = tie);
                }
            }
        }
    }
    Ok(allowed)
}

/// [`ties`] of one row.
fn row_ties(
    a: &[f64],
    b: &[f64],
    target: usize,
    temperature: f64,
    weights: &Weights,
    scale: f64,
    row: &mut [f64],
) {
    if a == b || !defined(a) || !defined(b) {
        return;
    }
    let [p, q] = [a, b].map(|row| Split::new(row, temperature, target));
    let classes = reach(p.log_rest, q.log_rest).max(reach(p.log_target, q.log_target));
    let of_margin = 2.0 * weights.tkd.abs() * classes * (q.log_rest + q.log_target).exp();
    for (j, (allowed, log_q)) in row.iter_mut().zip(&q.rest.log).enumerate() {
        *allowed += scale * of_margin * if j == target { 1.0 } else { log_q.exp() };
    }
    let [whole_p, whole_q] = [a, b].map(|row| Softmax::new(row.to_vec(), temperature));
    for (weight, p, q) in [(weights.dkd, &p.rest, &q.rest), (weights.plain, &whole_p, &whole_q)] {
        let both = || p.log.iter().zip(&q.log);
        let band: f64 = both().map(|(&p, &q)| reach(p, q) * q.exp()).sum();
        for (allowed, (&p, &q)) in row.iter_mut().zip(both()) {
            *allowed += scale * weight.abs() * q.exp() * (reach(p, q) + band);
        }
    }
}

/// The size of the change from the exact slope of |p - q| / 2 to any other that is allowed.
fn reach(log_p: f64, log_q: f64) -> f64 {
    if log_p == log_q {
        0.5
    } else if -(-(log_p - log_q).abs()).exp_m1() <= TIE {
        1.0
    } else {
        0.0
    }
}

/// The error allowed to an element of a gradient in `dtype`. `largest` is the largest size of an element of its row,
/// `floor` from [`gradient_floor`].
pub fn gradient_within(dtype: Dtype, exact: f64, largest: f64, floor: f64) -> f64 {
    RELATIVE * largest + floor + half_ulp(dtype, exact)
}

/// Half the distance from `value` to its neighbours in `dtype`; 0 for float32, whose rounding the
/// other terms allow for.
fn half_ulp(dtype: Dtype, value: f64) -> f64 {
    let (digits, lowest) = match dtype {
        Dtype::F32 => return 0.0,
        Dtype::F16 => (10, -14),
        Dtype::Bf16 => (7, -126),
    };
    let exponent =
        if value == 0.0 { lowest } else { (value.abs().log2().floor() as i32).max(lowest) };
    0.5 * 2.0_f64.powi(exponent - digits)
}

/// The largest error so far, as a share of what is allowed.
pub struct Worst {
    /// The share: above 1 the comparison has failed.
    pub ratio: f64,
    /// The value that had it, in words and numbers.
    pub detail: String,
}

impl Worst {
    /// No error yet.
    pub fn none() -> Self {
        Self { ratio: 0.0, detail: "exact".into() }
    }

    /// A failure without a size.
    pub fn fail(detail: String) -> Self {
        Self { ratio: f64::INFINITY, detail }
    }

    /// Compares a value that `what` names. NaN must be NaN; what is beyond float32 may be infinite.
    pub fn add(&mut self, what: impl FnOnce() -> String, actual: f64, expected: f64, allowed: f64) {
        let ratio = if expected.is_nan() {
            if actual.is_nan() { 0.0 } else { f64::INFINITY }
        } else if actual == expected
            || (beyond_float32(expected) && actual == expected.signum() * f64::INFINITY)
        {
            0.0
        } else if actual.is_finite() && expected.is_finite() {
            (actual - expected).abs() / allowed
        } else {
            f64::INFINITY
        };
        if ratio > self.ratio {
            let detail = format!("{}: {actual:e}, exactly {expected:e}", what());
            *self = Self { ratio, detail };
        }
    }

    /// Compares what a call returned, its loss within `relative` and `unit` as in [`loss_within`].
    pub fn add_output(&mut self, output: &Output, exact: &Output, relative: f64, unit: f64) {
        let allowed = loss_within_relative(relative, exact.loss, unit);
        self.add(|| "loss".into(), output.loss, exact.loss, allowed);
        let lengths = [output.tokens.len(), exact.tokens.len()].map(|len| len as f64);
        self.add(|| "number of tokens".into(), lengths[0], lengths[1], 0.0);
        for (i, (token, exact)) in output.tokens.iter().zip(&exact.tokens).enumerate() {
            if (token.valid, token.hard) != (exact.valid, exact.hard) {
                *self = Self::fail(format!(
                    "token {i}: valid {}, hard {}; exactly {}, {}",
                    token.valid, token.hard, exact.valid, exact.hard
                ));
                return;
            }
            for (what, term, exact, unit) in [
                ("margin", token.margin, exact.margin, 1.0),
                ("UNC", token.uncertainty, exact.uncertainty, 1.0),
                ("TKD", token.tkd, exact.tkd, 1.0),
                ("DKD", token.dkd, exact.dkd, 1.0),
                ("loss", token.loss, exact.loss, unit),
            ] {
                self.add(|| format!("{what} of token {i}"), term, exact, term_within(exact, unit));
            }
        }
    }
}

/// True if an element of a gradient may be infinite in `dtype` because it, or a number within what is allowed, rounds to
/// that.
pub fn overflows(dtype: Dtype, exact: f64, allowed: f64) -> bool {
    // Half a unit in the last place above the largest finite number.
    let limit = match dtype {
        Dtype::F32 => return beyond_float32(exact),
        Dtype::F16 => 65520.0,
        Dtype::Bf16 => 511.0 * 2.0_f64.powi(119),
    };
    exact.abs() + allowed >= limit
}

fn beyond_float32(value: f64) -> bool {
    value.abs() > f64::from(f32::MAX)
}
