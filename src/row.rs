//! The loss and the gradient's coefficients of one token, from a handful of numbers about its row.
//!
//! With a, b the teacher's and the student's logits over the temperature, g the target, and
//! L = log sum_{j != g} e^{..} of either (the target left out):
//!
//! ```text
//! u = L_p - a_g   UNC = sigmoid(u)          w = L_q - b_g   -log q_g = softplus(w)
//! TKD = softplus(w) - softplus(u) - sigmoid(u) (w - u)
//! DKD = sum_{j != g} phat_j (a_j - b_j) - (L_p - L_q)        phat_j = e^{a_j - L_p}, qhat_j = e^{b_j - L_q}
//!
//! loss = c_tkd TKD + c_dkd DKD + c_ce CE
//! dloss/db_j = (beta + gamma) qhat_j - beta phat_j (j != g)   dloss/db_g = -gamma
//! beta = c_dkd     gamma = c_tkd (sigmoid(w) - sigmoid(u)) + c_ce sigmoid(w)
//! ```

use crate::objective::{Coefficient, Objective};
use crate::output::TokenTerms;

/// One pass over a row, target left out: everything the loss needs to know about it.
///
/// Relative to a maximum m of each model, so that logits of any size lose no digits. (Any number near
/// the largest logit will do for m: every result is independent of it.) At temperature T the
/// exponents are (z - m) / T, while `weighted_gap` is in logits and takes its 1/T in [`Self::dkd`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowState {
    /// Largest teacher logit off the target, or a little less; as given, not over the temperature.
    pub teacher_max: f64,
    /// sum e^{(z_j - max) / T}
    pub teacher_sum: f64,
    /// sum e^{(z^p_j - max_p) / T} ((z^p_j - max_p) - (z^q_j - max_q))
    pub weighted_gap: f64,
    pub student_max: f64,
    pub student_sum: f64,
    /// sum e^{z^q_j - max_q}: the student's sum at temperature 1, for cross entropy.
    pub student_sum_at_1: f64,
    /// The student rules out (-inf) a token that the teacher does not.
    pub ruled_out: bool,
}

impl RowState {
    /// A finite stand-in for the maximum of nothing, or of -inf alone: z - max stays a number.
    pub const NO_MAX: f64 = -(f32::MAX as f64);

    pub const EMPTY: Self = Self {
        teacher_max: Self::NO_MAX,
        teacher_sum: 0.0,
        weighted_gap: 0.0,
        student_max: Self::NO_MAX,
        student_sum: 0.0,
        student_sum_at_1: 0.0,
        ruled_out: false,
    };

    /// The same sums relative to new maxima, neither below the old one.
    pub fn rebase(&mut self, teacher_max: f64, student_max: f64, inverse_temperature: f64) {
        let (dp, dq) = (self.teacher_max - teacher_max, self.student_max - student_max);
        if dp != 0.0 || dq != 0.0 {
            let teacher = (dp * inverse_temperature).exp();
            let student = (dq * inverse_temperature).exp();
            self.weighted_gap = teacher * (self.weighted_gap + self.teacher_sum * (dp - dq));
            self.teacher_sum *= teacher;
            self.student_sum *= student;
            self.student_sum_at_1 *= dq.exp();
            (self.teacher_max, self.student_max) = (teacher_max, student_max);
        }
    }

    fn dkd(&self, inverse_temperature: f64) -> f64 {
        if self.teacher_sum == 0.0 {
            0.0
        } else if self.ruled_out {
            f64::INFINITY
        } else {
            // Rounding may fall below 0: a mean over tokens needs that as much as what is too large.
            self.weighted_gap / self.teacher_sum * inverse_temperature - self.teacher_sum.ln()
                + self.student_sum.ln()
        }
    }
}

/// The log-odds against the target: log sum_{j != g} e^{(z_j - z_g) / T}.
pub(crate) fn margin(max: f64, sum: f64, target: f64, inverse_temperature: f64) -> f64 {
    if target == f64::INFINITY {
        return f64::NAN;
    }
    sum.ln() + (max - target) * inverse_temperature
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    if x <= 0.0 {
        let e = x.exp();
        e / (1.0 + e)
    } else {
        1.0 / (1.0 + (-x).exp())
    }
}

pub(crate) fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// TKD and its derivative sigmoid(w) - sigmoid(u) with respect to w. Both are computed on the side
/// where sigmoid(u) is small; swapping "the target" for "not the target" only flips the signs.
fn bernoulli_kl(u: f64, w: f64) -> (f64, f64) {
    let (sign, u, w) = if u > 0.0 { (-1.0, -u, -w) } else { (1.0, u, w) };
    let slope = sign * (sigmoid(w) - sigmoid(u));
    let kl = if u == f64::NEG_INFINITY {
        softplus(w)
    } else if w.is_infinite() {
        f64::INFINITY
    } else {
        softplus(w) - softplus(u) - sigmoid(u) * (w - u)
    };
    (kl, slope)
}

/// A term with coefficient 0 is absent, even where it is infinite.
fn weighted(coefficient: f64, term: f64) -> f64 {
    if coefficient == 0.0 { 0.0 } else { coefficient * term }
}

/// What the second pass over a row multiplies: the gradient with respect to z_j is
/// `student * e^{(z^q_j - max_q) / T} - teacher * e^{(z^p_j - max_p) / T} + student_at_1 * e^{z^q_j - max_q}`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GradientScales {
    pub teacher: f64,
    pub student: f64,
    pub student_at_1: f64,
    /// The gradient at the target.
    pub target: f64,
}

/// The terms of a token and what its gradient needs. `inverse_temperature` is the one that the sums have;
/// `scale` is the reduction's and the upstream gradient's; `u` is the teacher's margin, `student_target` the student's logit of the target.
pub(crate) fn finish(
    objective: &Objective,
    inverse_temperature: f64,
    state: &RowState,
    u: f64,
    student_target: f64,
    hard: bool,
    scale: f64,
) -> (TokenTerms, GradientScales) {
    let w = margin(state.student_max, state.student_sum, student_target, inverse_temperature);
    let w_at_1 = margin(state.student_max, state.student_sum_at_1, student_target, 1.0);
    let uncertainty = sigmoid(u);
    let (tkd, slope) = bernoulli_kl(u, w);
    let dkd = state.dkd(inverse_temperature);

    let nan = f64::NAN;
    let no_number = GradientScales { teacher: nan, student: nan, student_at_1: nan, target: nan };
    if u.is_nan() || w.is_nan() || dkd.is_nan() {
        let terms = TokenTerms {
            margin: u,
            uncertainty,
            tkd: f64::NAN,
            dkd: f64::NAN,
            loss: f64::NAN,
            valid: true,
            hard,
        };
        return (terms, no_number);
    }

    let coefficients = if hard { objective.hard() } else { objective.easy() };
    let number = |coefficient| match coefficient {
        Coefficient::Constant(value) => value,
        Coefficient::Uncertainty => uncertainty,
    } * objective.distillation_scale();
    let (c_tkd, c_dkd) = (number(coefficients.tkd), number(coefficients.dkd));
    let c_ce = objective.ce_weight();

    let terms = TokenTerms {
        margin: u,
        uncertainty,
        tkd,
        dkd,
        loss: weighted(c_tkd, tkd) + weighted(c_dkd, dkd) + weighted(c_ce, softplus(w_at_1)),
        valid: true,
        hard,
    };

    if !scale.is_finite() {
        return (terms, no_number);
    }
    // Where the teacher has no mass off the target, DKD is 0 whatever the student does.
    let beta = if state.teacher_sum == 0.0 { 0.0 } else { c_dkd };
    let gamma = c_tkd * slope;
    let gamma_at_1 = weighted(c_ce, sigmoid(w_at_1));
    // A sum of 0 belongs to exponentials that are all 0, and so is their share of the gradient.
    let over = |numerator: f64, sum: f64| if sum == 0.0 { 0.0 } else { numerator * scale / sum };
    let mut scales = GradientScales {
        teacher: over(beta * inverse_temperature, state.teacher_sum),
        student: over((beta + gamma) * inverse_temperature, state.student_sum),
        student_at_1: over(gamma_at_1, state.student_sum_at_1),
        target: -(gamma * inverse_temperature + gamma_at_1) * scale,
    };
    if objective.temperature() == 1.0 {
        scales.student += std::mem::take(&mut scales.student_at_1);
    }
    (terms, scales)
}
