//! Divergences from a mixture m = share p + (1 - share) q: JSD, skew KL and skew reverse KL.
//!
//! ```text
//! D = of_teacher sum p log(p / m) + of_student sum q log(q / m)
//! h_j = of_student log(q_j / m_j) + of_ratio (p_j / m_j - 1) + a constant, which is left out
//! of_ratio = of_student share - of_teacher (1 - share)
//! ```
//!
//! With r = log2(p / q), both logarithms follow from the smaller probability over the larger one, e = 2^-|r|, which never
//! overflows. Let k be the share of the smaller one. Then m is y = 1 + k (e - 1) times the larger one, and
//!
//! ```text
//! log2(p / m) = min(r, 0) - log2(y)      log2(q / m) = -max(r, 0) - log2(y)
//! p / m - 1 = (1 - share) (r > 0 ? 1 - e : e - 1) / y
//! ```
//!
//! The ratio comes from the logits and not from the probabilities, so that a student close to its teacher keeps the
//! digits of their difference. JSD's of_ratio is 0, and its loop does without the division.

use std::f64::consts::{LN_2, LOG2_E};

use super::two_sweeps::TwoSweeps;
use super::{
    Found, Margins, Normaliser, STUDENT, SecondSums, SecondSweep, TEACHER, log_sigmoid,
    sigmoid_slope,
};
use crate::cpu::exp::{Exponent, exp_and_exp_m1, polynomial};
use crate::cpu::vector::Vector;
use crate::objective::Mixture;

/// The largest ratio of two probabilities that is told from larger ones, in octaves.
const FARTHEST: f32 = 124.0;

/// log2(1 + t) / t for 1 / sqrt(2) <= 1 + t <= sqrt(2), the highest power first: the polynomial that makes the relative
/// error least, for t > 0 that of log2(1 + t) - 1.
const COEFFICIENTS: [f32; 9] = [
    0.131_835_12,
    -0.211_823_12,
    0.215_198_05,
    -0.238_091_63,
    0.287_906_8,
    -0.360_755_98,
    0.480_911_02,
    -0.721_346_3,
    std::f32::consts::LOG2_E,
];

/// A mixture's numbers, in float32 for the loop and in float64 for the two classes. `RATIO` says that of_ratio is not 0.
#[derive(Clone, Copy)]
pub(crate) struct MixtureOf<const RATIO: bool> {
    exact: Mixture,
    share: f32,
    rest: f32,
    of_student: f32,
    /// of_ratio (1 - share), in bits as the loop's logarithms are.
    of_ratio_log2: f32,
}

fn of_ratio(mixture: &Mixture) -> f64 {
    mixture.of_student * mixture.share - mixture.of_teacher * (1.0 - mixture.share)
}

impl<const RATIO: bool> MixtureOf<RATIO> {
    /// True if the mixture's of_ratio is not 0.
    pub fn has_ratio(mixture: &Mixture) -> bool {
        of_ratio(mixture) != 0.0
    }

    pub fn new(mixture: &Mixture) -> Self {
        Self {
            exact: *mixture,
            share: mixture.share as f32,
            rest: (1.0 - mixture.share) as f32,
            of_student: mixture.of_student as f32,
            of_ratio_log2: (of_ratio(mixture) * (1.0 - mixture.share) * LOG2_E) as f32,
        }
    }

    /// The weight of (p - q) / m in h, in bits.
    fn of_difference(&self) -> f64 {
        of_ratio(&self.exact) * (1.0 - self.exact.share) * LOG2_E
    }

    /// log(p / m), log(q / m) and p / m - 1 of two probabilities given by their logarithms, of which at most one is -inf.
    fn of_pair(&self, log_p: f64, log_q: f64) -> [f64; 3] {
        let share = self.exact.share;
        let r = log_p - log_q;
        let e_m1 = (-r.abs()).exp_m1();
        let (k, rest) = if r > 0.0 { (1.0 - share, share) } else { (share, 1.0 - share) };
        let y = k * (-r.abs()).exp() + rest;
        let log_y = if e_m1 > -0.5 { (k * e_m1).ln_1p() } else { y.ln() };
        let difference = if r > 0.0 { -e_m1 } else { e_m1 };
        [r.min(0.0) - log_y, -r.max(0.0) - log_y, (1.0 - share) * difference / y]
    }

    /// The divergence's term and h of an outcome with these probabilities, and q h.
    fn outcome(&self, log_p: f64, log_q: f64) -> [f64; 3] {
        let none = f64::NEG_INFINITY;
        if log_p == none && log_q == none {
            return [0.0; 3];
        }
        let [of_p, of_q, ratio_m1] = self.of_pair(log_p, log_q);
        let Mixture { of_teacher, of_student, .. } = self.exact;
        // A probability of 0 has no term, and its logarithm is infinite.
        let times = |log: f64, x: f64| if log == none { 0.0 } else { log.exp() * x };
        let h = of_student * of_q + of_ratio(&self.exact) * ratio_m1;
        [of_teacher * times(log_p, of_p) + of_student * times(log_q, of_q), h, times(log_q, h)]
    }

    fn target(&self, Margins { u, w }: Margins) -> [f64; 3] {
        self.outcome(log_sigmoid(-u), log_sigmoid(-w))
    }
}

impl<const RATIO: bool> SecondSweep for MixtureOf<RATIO> {
    const DISTANCES: bool = true;

    #[inline(always)]
    fn add<V: Vector>(
        self,
        distances: [V; 2],
        exponentials: [V; 2],
        normaliser: &Normaliser,
        [of_p, of_q, slopes]: &mut SecondSums<V>,
    ) -> V {
        let zero = V::splat(0.0);
        let gap = distances[TEACHER].sub(distances[STUDENT]);
        let r = normaliser.exponent.log2_plus(gap, V::splat(normaliser.log2_ratio));
        // The smaller of probabilities that are farther apart is 0 beside the other, so that any number will do beside it.
        // So it does where a token is masked: in one model, and the ratio infinite, or in both, and it is NaN.
        let r = r.max_or(V::splat(-FARTHEST)).min_or(V::splat(FARTHEST));
        let opposite = zero.sub(r);
        let (e, e_m1) = exp_and_exp_m1(r.min_or(opposite), Exponent::BINARY);
        let (share, rest) = (V::splat(self.share), V::splat(self.rest));
        let k = opposite.select_below(0.0, rest, share);
        let of_larger = opposite.select_below(0.0, share, rest);
        let y = k.mul_add(e, of_larger);
        let log2_y = log2::<V>(y, k.mul(e_m1));
        let log2_p = r.min_or(zero).sub(log2_y);
        let log2_q = opposite.min_or(zero).sub(log2_y);
        *of_p = exponentials[TEACHER].mul_add(log2_p, *of_p);
        let q = exponentials[STUDENT];
        let mut kept = q.mul(log2_q);
        *of_q = of_q.add(kept);
        if RATIO {
            kept = kept.mul(V::splat(self.of_student));
            let difference = opposite.select_below(0.0, zero.sub(e_m1), e_m1);
            let of_ratio = q.mul(difference).div(y);
            kept = of_ratio.mul_add(V::splat(self.of_ratio_log2), kept);
            *slopes = slopes.add(kept);
        }
        kept
    }

    fn normalised([of_p, of_q, slopes]: SecondSums<f64>, factors: [f64; 2]) -> SecondSums<f64> {
        [of_p * factors[TEACHER], of_q * factors[STUDENT], slopes * factors[STUDENT]]
    }

    /// The slopes are sum q h, h in bits; sum q (p - q) / m is exchanged.
    fn exchanged(self, [of_p, of_q, slopes]: SecondSums<f64>) -> SecondSums<f64> {
        [
            of_p,
            of_q,
            if RATIO {
                (slopes - self.exact.of_student * of_q) / self.of_difference()
            } else {
                0.0
            },
        ]
    }

    fn of_exchanged(self, [of_p, of_q, difference]: SecondSums<f64>) -> SecondSums<f64> {
        [of_p, of_q, self.exact.of_student * of_q + self.of_difference() * difference]
    }
}

/// log2 of y = 1 + t, 0 < y <= 1, given both: the former has the digits of small ones, the latter of large ones.
#[inline(always)]
fn log2<V: Vector>(y: V, t: V) -> V {
    let (octaves, mantissa) = y.split_octaves();
    let t = octaves.select_below(0.0, mantissa.sub(V::splat(1.0)), t);
    polynomial(t, &COEFFICIENTS).mul_add(t, octaves)
}

impl<const RATIO: bool> TwoSweeps for MixtureOf<RATIO> {
    fn unit(self) -> f64 {
        if RATIO { LN_2 } else { self.exact.of_student * LN_2 }
    }

    fn found(self, [of_p, of_q, slopes]: SecondSums<f64>, target: Option<Margins>) -> Found {
        let Mixture { of_teacher, of_student, .. } = self.exact;
        let mut found = Found {
            divergence: (of_teacher * of_p + of_student * of_q) * LN_2,
            mean: if RATIO { slopes } else { of_student * of_q } * LN_2,
        };
        if let Some(margins) = target {
            let [term, _, q_h] = self.target(margins);
            found.divergence += term;
            found.mean += q_h;
        }
        found
    }

    fn bernoulli(self, margins: Margins) -> [f64; 2] {
        let Margins { u, w } = margins;
        let [of_target, h_target, _] = self.target(margins);
        let [of_rest, h_rest, _] = self.outcome(log_sigmoid(u), log_sigmoid(w));
        let slope = sigmoid_slope(w);
        // h may be infinite where the student's probability is 0.
        let slope = if slope == 0.0 { 0.0 } else { slope * (h_rest - h_target) };
        [of_target + of_rest, slope]
    }

    fn target_slope(self, margins: Margins) -> f64 {
        self.target(margins)[1]
    }
}
