//! The mathematics of a row: what one sweep over its logits sums up, and a token's terms and gradient from that.
//!
//! With a, b the teacher's and the student's logits over the temperature, g the target, and
//! L = log sum_{j != g} e^{..} of either (the target left out):
//!
//! ```text
//! u = L_p - a_g   UNC = sigmoid(u)          w = L_q - b_g   -log q_g = softplus(w)
//! TKD = D of the two classes "the target, or not", which have the log-odds u and w
//! DKD = D of the rest: phat_j = e^{a_j - L_p}, qhat_j = e^{b_j - L_q}, j != g
//!
//! loss = c_tkd TKD + c_dkd DKD + c_ce CE
//! dloss/db_j = qhat_j (gamma + c_dkd (h_j - sum_i qhat_i h_i))   (j != g)    h_j = dDKD/dqhat_j
//! dloss/db_g = -gamma                    gamma = c_tkd dTKD/dw + c_ce sigmoid(w)
//! ```
//!
//! Everything here holds for any divergence D. The parts that depend on it are behind [`Divergence`], one file per
//! divergence: the cross term that a sweep adds up ([`fold`](Divergence::fold)), the two terms and the coefficients that
//! follow from the sums, and the gradient of an element.

mod forward_kl;

use std::ops::AddAssign;

use super::vector::Vector;
use crate::objective::{Coefficient, Objective, ReductionScales};
use crate::output::TokenTerms;
pub(crate) use forward_kl::ForwardKl;

/// Indices into pairs: the teacher's value comes first.
pub(crate) const TEACHER: usize = 0;
pub(crate) const STUDENT: usize = 1;

/// How far below its shift a logit may be for float32 to weigh the distance to it. Masks are farther: the sum of their
/// distances may overflow, and a probability of the other model that float32 takes for 0 may still count.
pub(crate) const FAR: f32 = 1e20;

/// Sums over a row, or over a part of it, with the target left out. Each exponential is relative to a shift m of its
/// model, a number near its largest logit. Distances z - m are in logits, not over the temperature.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sums {
    /// sum e^{(z^p_j - m_p) / T}
    pub teacher: f64,
    /// sum e^{(z^q_j - m_q) / T}
    pub student: f64,
    /// The divergence's own sum: see [`Divergence::fold`].
    pub cross: f64,
    /// sum e^{z^q_j - m_q}: the student's sum at temperature 1, for cross entropy.
    pub student_at_1: f64,
    /// The supports differ in a way that makes the divergence of the rest infinite.
    pub mismatch: bool,
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.teacher += other.teacher;
        self.student += other.student;
        self.cross += other.cross;
        self.student_at_1 += other.student_at_1;
        self.mismatch |= other.mismatch;
    }
}

/// Everything that the loss needs to know about a row, from one sweep over it.
///
/// The shifts keep the digits of logits of any size. (Any number near the largest logit will do: every result is
/// independent of it.)
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowState {
    /// The sums' shifts, of the teacher and the student; as logits are given, not over the temperature.
    pub shifts: [f64; 2],
    pub sums: Sums,
}

impl RowState {
    /// A finite shift where there is no logit, or -inf alone: z - shift stays a number.
    pub const NO_SHIFT: f64 = -(f32::MAX as f64);

    pub fn empty() -> Self {
        Self { shifts: [Self::NO_SHIFT; 2], sums: Sums::default() }
    }

    /// Makes the sums relative to new shifts, neither below the old one.
    pub fn rescale<D: Divergence>(&mut self, shifts: [f64; 2], inverse_temperature: f64) {
        let moved = [0, 1].map(|model| self.shifts[model] - shifts[model]);
        if moved != [0.0; 2] {
            let factors = moved.map(|moved| (moved * inverse_temperature).exp());
            self.sums.cross = D::rescaled_cross(&self.sums, moved, factors);
            self.sums.teacher *= factors[TEACHER];
            self.sums.student *= factors[STUDENT];
            self.sums.student_at_1 *= moved[STUDENT].exp();
            self.shifts = shifts;
        }
    }
}

/// One vector of logits of each model, the teacher's and the student's.
#[derive(Clone, Copy)]
pub(crate) struct Pair<V> {
    pub logits: [V; 2],
    /// z - m, where m is the model's shift.
    pub distances: [V; 2],
    /// e^{(z - m) / T}
    pub exponentials: [V; 2],
}

/// Events of the guarded loop, by lane: 1 where one was met, else 0.
#[derive(Clone, Copy)]
pub(crate) struct Flags<V> {
    /// See [`Sums::mismatch`].
    pub mismatch: V,
    /// A pair that [`Divergence::fold`] has left to [`Divergence::far_term`].
    pub far: V,
}

/// The two divergences of a token.
pub(crate) struct Terms {
    pub tkd: f64,
    /// dTKD/dw
    pub slope: f64,
    pub dkd: f64,
}

/// The mathematics that depends on the divergence. `T` is the temperature, m the shifts of [`Sums`].
pub(crate) trait Divergence {
    /// Sweeps over a row's logits before its gradient can be written.
    const SWEEPS: usize;

    /// Adds a pair's cross term to `cross`. Returns what [`gradient`](Self::gradient) needs of the pair beside the
    /// student's exponential. Where `GUARDED`, exponentials may be 0, logits infinite and distances [`FAR`].
    fn fold<V: Vector, const GUARDED: bool>(
        pair: &Pair<V>,
        cross: &mut V,
        flags: &mut Flags<V>,
    ) -> V;

    /// The cross term of a pair of finite logits if [`fold`](Self::fold) has flagged it as far, else 0.
    fn far_term(logits: [f32; 2], shifts: [f32; 2], inverse_temperature: f64) -> f64;

    /// The cross term relative to other shifts: `moved` are the old ones less the new ones, and `factors` are
    /// e^{moved / T}. `sums` are relative to the old ones.
    fn rescaled_cross(sums: &Sums, moved: [f64; 2], factors: [f64; 2]) -> f64;

    /// The terms of a token with the log-odds `u` and `w`.
    fn terms(sums: &Sums, u: f64, w: f64, inverse_temperature: f64) -> Terms;

    /// The coefficients of c_dkd DKD + c_tkd TKD, the latter by gamma = c_tkd dTKD/dw, times `scale`. Those of
    /// [`gradient`](Self::gradient) and of the student's exponential, in this order.
    fn coefficients(
        sums: &Sums,
        c_dkd: f64,
        gamma: f64,
        inverse_temperature: f64,
        scale: f64,
    ) -> [f64; 2];

    /// The same coefficients for exponentials relative to other shifts, which are `moved` above those of `coefficients`;
    /// `factors` are e^{moved / T}.
    fn rescaled_coefficients(
        coefficients: [f64; 2],
        moved: [f64; 2],
        factors: [f64; 2],
    ) -> [f64; 2];

    /// Adds the divergence's part, times `coefficient`, to the gradient of elements. `kept` is what
    /// [`fold`](Self::fold) returned, `student` the student's exponentials.
    fn gradient<V: Vector>(kept: V, student: V, coefficient: V, gradient: V) -> V;
}

/// The log-odds against the target: log sum_{j != g} e^{(z_j - z_g) / T}, from `sum` relative to `shift`.
pub(crate) fn margin(shift: f64, sum: f64, target: f64, inverse_temperature: f64) -> f64 {
    if target == f64::INFINITY {
        return f64::NAN;
    }
    sum.ln() + (shift - target) * inverse_temperature
}

fn sigmoid(x: f64) -> f64 {
    if x <= 0.0 {
        let e = x.exp();
        e / (1.0 + e)
    } else {
        1.0 / (1.0 + (-x).exp())
    }
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// A term with coefficient 0 is absent, even where it is infinite.
fn weighted(coefficient: f64, term: f64) -> f64 {
    if coefficient == 0.0 { 0.0 } else { coefficient * term }
}

/// `numerator * scale / sum`. A sum of 0 belongs to exponentials that are all 0, and so is their share of the gradient.
fn over(numerator: f64, scale: f64, sum: f64) -> f64 {
    if sum == 0.0 { 0.0 } else { numerator * scale / sum }
}

/// The numbers that a row's gradient is made with. With respect to z_j, j != g, it is
/// `student * e^{(z^q_j - m_q) / T} + student_at_1 * e^{z^q_j - m_q}` and, times `divergence`,
/// [`Divergence::gradient`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct GradientScales {
    pub divergence: f64,
    pub student: f64,
    pub student_at_1: f64,
    /// The gradient at the target.
    pub target: f64,
}

/// The terms of a token and the scales of its gradient. `inverse_temperature` is the one that the sums have, `scales`
/// are the reduction's times the upstream gradient, `u` is the teacher's margin, and `student_target` is the student's
/// logit of the target.
pub(crate) fn finish<D: Divergence>(
    objective: &Objective,
    inverse_temperature: f64,
    state: &RowState,
    u: f64,
    student_target: f64,
    hard: bool,
    scales: ReductionScales,
) -> (TokenTerms, GradientScales) {
    let scale = scales.distillation(hard);
    let (sums, shift) = (&state.sums, state.shifts[STUDENT]);
    let w = margin(shift, sums.student, student_target, inverse_temperature);
    let w_at_1 = margin(shift, sums.student_at_1, student_target, 1.0);
    let uncertainty = sigmoid(u);
    let Terms { tkd, slope, dkd } = D::terms(sums, u, w, inverse_temperature);

    let nan = f64::NAN;
    let no_number =
        GradientScales { divergence: nan, student: nan, student_at_1: nan, target: nan };
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

    if !scale.is_finite() || !scales.ce.is_finite() {
        return (terms, no_number);
    }
    let gamma = c_tkd * slope;
    let gamma_at_1 = weighted(c_ce, sigmoid(w_at_1)) * scales.ce;
    let [divergence, student] = D::coefficients(sums, c_dkd, gamma, inverse_temperature, scale);
    let mut of_row = GradientScales {
        divergence,
        student,
        student_at_1: over(gamma_at_1, 1.0, sums.student_at_1),
        target: -(gamma * inverse_temperature * scale + gamma_at_1),
    };
    if objective.temperature() == 1.0 {
        of_row.student += std::mem::take(&mut of_row.student_at_1);
    }
    (terms, of_row)
}
