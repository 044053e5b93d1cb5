//! The errors that a backend is allowed, and the comparison of its results with exact ones. Other tests than the
//! battery use it too.

use crate::{Dtype, Objective, Output};

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
/// token's terms, `valid` is the number of tokens that the mean divides by.
pub fn gradient_floor(objective: &Objective, weight: f64, valid: usize) -> f64 {
    let scale = objective.reduction_scale(valid) * objective.upstream_gradient().abs();
    5e-7 * weight * scale / objective.temperature()
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

fn beyond_float32(value: f64) -> bool {
    value.abs() > f64::from(f32::MAX)
}
