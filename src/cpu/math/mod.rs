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
//! Plain objectives take D over the whole vocabulary: for q_j over all j, the target included,
//!
//! ```text
//! loss = c D(p, q) + c_ce CE             dloss/db_j = c q_j (h_j - sum_i q_i h_i) + c_ce (q_j - [j = g])
//! ```
//!
//! Everything here holds for any divergence D. The parts that depend on it are behind [`RowDivergence`], one file per
//! family, and [`by_family`] is the one place that lists the families:
//!
//! 1. The first sweep over the logits sums up exponentials and a cross term ([`Fold`]). The KL divergences need no more.
//! 2. The others need both normalised probabilities of an element at once: a second sweep ([`SecondSweep`]) over the
//!    same row, which then is in the cache, with the exponentials that the first one has kept.
//! 3. A token's terms and the coefficients of its gradient follow from the sums, in float64 ([`finish`]).
//! 4. The gradient of an element is a sum of what the sweeps have kept of it and of the student's exponential, each times
//!    a coefficient.

mod exchange;
mod forward_kl;
mod mixture;
mod reverse_kl;
mod total_variation;
mod two_sweeps;

use std::ops::AddAssign;

use super::exp::Exponent;
use super::vector::Vector;
use crate::objective::{Coefficient, Objective, ReductionScales};
use crate::output::TokenTerms;
pub(crate) use forward_kl::ForwardKl;
pub(crate) use mixture::MixtureOf;
pub(crate) use reverse_kl::ReverseKl;
pub(crate) use total_variation::TotalVariation;

/// Evaluates an expression with the name bound to the [`RowDivergence`] of an objective.
macro_rules! by_family {
    ($objective:expr, $divergence:ident => $body:expr) => {{
        use $crate::cpu::math;
        use $crate::objective::Family;
        match $objective.divergence().family() {
            Family::ForwardKl => {
                let $divergence = math::ForwardKl;
                $body
            }
            Family::ReverseKl => {
                let $divergence = math::ReverseKl;
                $body
            }
            Family::Mixture(mixture) if math::MixtureOf::<true>::has_ratio(&mixture) => {
                let $divergence = math::MixtureOf::<true>::new(&mixture);
                $body
            }
            Family::Mixture(mixture) => {
                let $divergence = math::MixtureOf::<false>::new(&mixture);
                $body
            }
            Family::TotalVariation => {
                let $divergence = math::TotalVariation;
                $body
            }
        }
    }};
}
pub(crate) use by_family;

/// Indices into pairs: the teacher's value comes first.
pub(crate) const TEACHER: usize = 0;
pub(crate) const STUDENT: usize = 1;
/// Third in what is relative to [`RowState::shifts`].
pub(crate) const REFERENCE: usize = 2;

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
    /// The divergence's own sum: see [`Fold::fold`].
    pub cross: f64,
    /// sum e^{z^q_j - m_q}: the student's sum at temperature 1, for cross entropy.
    pub student_at_1: f64,
    /// The supports differ in a way that makes the divergence of the rest infinite.
    pub mismatch: bool,
    /// There were terms for [`Fold::far_term`], or shifts that moved as far.
    pub far: bool,
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.teacher += other.teacher;
        self.student += other.student;
        self.cross += other.cross;
        self.student_at_1 += other.student_at_1;
        self.mismatch |= other.mismatch;
        self.far |= other.far;
    }
}

/// Everything that the loss needs to know about a row, from the sweeps over it.
///
/// The shifts keep the digits of logits of any size. (Any number near the largest logit will do: every result is
/// independent of it.)
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowState {
    /// The sums' shifts, of the teacher and the student; as logits are given, not over the temperature. The third is
    /// the reference, which [`Fold::REFERENCE`] asks for: the teacher's logit of the token that has the student's shift.
    pub shifts: [f64; 3],
    pub sums: Sums,
    /// The sums of a second sweep.
    pub found: Found,
}

/// The results of a second sweep.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    /// D of the renormalised rest; D of the whole distributions for plain objectives.
    pub divergence: f64,
    /// sum q_j h_j, likewise.
    pub mean: f64,
}

impl RowState {
    /// A finite shift where there is no logit, or -inf alone: z - shift stays a number.
    pub const NO_SHIFT: f64 = -(f32::MAX as f64);

    pub fn empty() -> Self {
        let shifts = [Self::NO_SHIFT, Self::NO_SHIFT, 0.0];
        Self { shifts, sums: Sums::default(), found: Found::default() }
    }

    /// Makes the sums relative to new shifts, neither model's below the old one.
    pub fn rescale<F: Fold>(&mut self, shifts: [f64; 3], inverse_temperature: f64) {
        let moved = Moved::by(self.shifts, shifts, inverse_temperature);
        if moved.distances != [0.0; 3] {
            self.sums.cross = F::rescaled_cross(&self.sums, &moved);
            self.sums.far |= F::REFERENCE
                && self.sums.student > 0.0
                && moved.distances.iter().any(|moved| moved.abs() >= f64::from(FAR));
            self.sums.teacher *= moved.factors[TEACHER];
            self.sums.student *= moved.factors[STUDENT];
            self.sums.student_at_1 *= moved.distances[STUDENT].exp();
            self.shifts = shifts;
        }
    }

    /// Adds the state of another part of the row.
    pub fn merge<F: Fold>(&mut self, mut other: Self, inverse_temperature: f64) {
        let [teacher, student] = [TEACHER, STUDENT].map(|i| self.shifts[i].max(other.shifts[i]));
        let largest = if other.shifts[STUDENT] > self.shifts[STUDENT] { &other } else { &*self };
        let shifts = [teacher, student, largest.shifts[REFERENCE]];
        self.rescale::<F>(shifts, inverse_temperature);
        other.rescale::<F>(shifts, inverse_temperature);
        self.sums += other.sums;
    }

    /// The state of one element of the row. Relative to itself it has no cross term.
    pub fn of_element<F: Fold>([a, b]: [f32; 2]) -> Self {
        let shift = |z: f32| f64::from(z).max(Self::NO_SHIFT);
        let sum = |z: f32| (f64::from(z) - shift(z)).exp();
        let sums = Sums {
            teacher: sum(a),
            student: sum(b),
            student_at_1: sum(b),
            mismatch: F::is_mismatch(a, b),
            ..Sums::default()
        };
        Self { shifts: [shift(a), shift(b), shift(a)], sums, found: Found::default() }
    }
}

/// The way from some shifts to others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moved {
    /// The old shifts less the new ones, in logits.
    pub distances: [f64; 3],
    /// e^{distance / T} of the teacher and the student: the factors of exponentials.
    pub factors: [f64; 2],
}

impl Moved {
    pub fn by(from: [f64; 3], to: [f64; 3], inverse_temperature: f64) -> Self {
        let distances = [TEACHER, STUDENT, REFERENCE].map(|i| from[i] - to[i]);
        let factors = [TEACHER, STUDENT].map(|i| (distances[i] * inverse_temperature).exp());
        Self { distances, factors }
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
    /// See [`RowState::shifts`].
    pub reference: V,
    pub exponent: Exponent,
}

/// Events of the guarded loop, by lane: 1 where one was met, else 0.
#[derive(Clone, Copy)]
pub(crate) struct Flags<V> {
    /// See [`Sums::mismatch`].
    pub mismatch: V,
    /// A pair that [`Fold::fold`] has left to [`Fold::far_term`].
    pub far: V,
}

/// The first sweep of a pair, beside the sums of exponentials. `T` is the temperature, m the shifts of
/// [`Sums`].
pub(crate) trait Fold {
    /// The third of [`RowState::shifts`] is wanted.
    const REFERENCE: bool;

    /// The guarded loop is wanted for a reference that is this far from the teacher's shift.
    fn guards_reference(_from_shift: f32, _: Exponent) -> bool {
        false
    }

    /// Adds a pair's cross term to `cross`. Returns what the gradient, or the second sweep, needs of the pair beside the
    /// student's exponential. Where `GUARDED`, exponentials may be 0, logits infinite and distances [`FAR`].
    fn fold<V: Vector, const GUARDED: bool>(
        pair: &Pair<V>,
        cross: &mut V,
        flags: &mut Flags<V>,
    ) -> V;

    /// The cross term of a pair of finite logits if [`fold`](Self::fold) has flagged it as far, else 0.
    fn far_term(logits: [f32; 2], shifts: [f32; 3], exponent: Exponent) -> f64;

    /// The cross term relative to other shifts. `sums` are relative to the old ones.
    fn rescaled_cross(sums: &Sums, moved: &Moved) -> f64;

    /// True if a pair sets [`Sums::mismatch`].
    fn is_mismatch(_a: f32, _b: f32) -> bool {
        false
    }

    /// The sign of the cross term as ranks exchange it: see `atkd_row_state` in kernels/params.h.
    const EXCHANGED_SIGN: f64 = 1.0;
}

/// The factors that make normalised probabilities and their ratio from what the first sweep has kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Normaliser {
    /// Those of the exponentials of the teacher and the student.
    pub factors: [f64; 2],
    /// log2(p_j / q_j) less (d^p_j - d^q_j) log2(e) / T, d = z - m.
    pub log2_ratio: f32,
    /// log2(e) / T
    pub exponent: Exponent,
}

impl Normaliser {
    /// Those of exponentials that are `moved` from the state's. They are renormalised, or if the target counts those of
    /// the whole vocabulary; it then has the margins given.
    pub fn new(
        state: &RowState,
        moved: &Moved,
        counted: Option<Margins>,
        exponent: Exponent,
    ) -> Self {
        let sums = [state.sums.teacher, state.sums.student];
        let margins = counted.map(|Margins { u, w }| [u, w]);
        let mut factors = [0.0; 2];
        // Logarithms of e^{(z - m) / T} over its probability, with m of the exponentials.
        let mut logs = [0.0; 2];
        for model in [TEACHER, STUDENT] {
            let rest = margins.map_or(1.0, |margins| sigmoid(margins[model]));
            factors[model] = over(moved.factors[model], rest, sums[model]);
            let log_rest = margins.map_or(0.0, |margins| log_sigmoid(margins[model]));
            let moved = moved.distances[model] * exponent.inverse_temperature();
            // Finite, lest the difference be NaN. Without mass off the target, the distances are infinite.
            let log = sums[model].ln() - log_rest - moved;
            logs[model] = if sums[model] == 0.0 { 0.0 } else { log.clamp(-1e37, 1e37) };
        }
        let log2_ratio = ((logs[STUDENT] - logs[TEACHER]) * std::f64::consts::LOG2_E) as f32;
        Self { factors, log2_ratio, exponent }
    }
}

/// The sums of a second sweep, as its family defines them.
pub(crate) type SecondSums<T> = [T; 3];

/// The second sweep of a vector of elements.
pub(crate) trait SecondSweep: Copy {
    /// Distances are wanted; else they are not read, and 0.
    const DISTANCES: bool;

    /// Adds to the sums, and returns h_j times the student's exponential and a constant. `distances` are z - m, where m is
    /// the model's shift, and `exponentials` those of the first sweep, e^{(z - m) / T}.
    fn add<V: Vector>(
        self,
        distances: [V; 2],
        exponentials: [V; 2],
        normaliser: &Normaliser,
        sums: &mut SecondSums<V>,
    ) -> V;

    /// The sums of normalised probabilities, from those of exponentials with these factors.
    fn normalised(sums: SecondSums<f64>, factors: [f64; 2]) -> SecondSums<f64>;

    /// The sums of [`normalised`](Self::normalised) as ranks exchange them: see `atkd_sweep_terms` in kernels/params.h.
    fn exchanged(self, sums: SecondSums<f64>) -> SecondSums<f64>;

    /// The inverse of [`exchanged`](Self::exchanged).
    fn of_exchanged(self, terms: SecondSums<f64>) -> SecondSums<f64>;
}

/// The second sweep of divergences that have none.
#[derive(Clone, Copy)]
pub(crate) enum NoSweep {}

impl SecondSweep for NoSweep {
    const DISTANCES: bool = false;

    fn add<V: Vector>(self, _: [V; 2], _: [V; 2], _: &Normaliser, _: &mut SecondSums<V>) -> V {
        match self {}
    }

    fn normalised(sums: SecondSums<f64>, _: [f64; 2]) -> SecondSums<f64> {
        sums
    }

    fn exchanged(self, _: SecondSums<f64>) -> SecondSums<f64> {
        match self {}
    }

    fn of_exchanged(self, _: SecondSums<f64>) -> SecondSums<f64> {
        match self {}
    }
}

/// The two divergences of a token.
pub(crate) struct Terms {
    pub tkd: f64,
    /// dTKD/dw
    pub slope: f64,
    pub dkd: f64,
}

/// The margins of a token: its log-odds against the target.
#[derive(Clone, Copy)]
pub(crate) struct Margins {
    /// The teacher's.
    pub u: f64,
    /// The student's.
    pub w: f64,
}

/// A token's distillation loss and its gradient with respect to b = z / T. At an element off the target that is
/// `kept` times what the sweeps have kept of it (as a part of the sum that this is relative to, if there is one), and
/// `student` times qhat_j.
pub(crate) struct Weighed {
    pub loss: f64,
    pub kept: f64,
    pub student: f64,
    pub target: f64,
}

/// The mathematics that depends on the divergence.
pub(crate) trait RowDivergence: Copy + Sync {
    type Fold: Fold;
    type Second: SecondSweep;

    /// The second sweep, if there is one.
    fn second(self) -> Option<Self::Second> {
        None
    }

    /// The results of the second sweep from its sums over everything but the target. If the latter counts too, it has
    /// the margins given.
    fn found(self, _: SecondSums<f64>, _: Option<Margins>) -> Found {
        Found::default()
    }

    /// True if the gradient of rows with [`Sums::far`] needs [`far_kept`](Self::far_kept).
    const KEEPS_FAR: bool = false;

    /// Replaces everything that was kept of the elements of such a row; 0 for logits that are not finite.
    fn far_kept(self, _logits: [f32; 2], _: &RowState, _: Exponent) -> f32 {
        0.0
    }

    /// The terms of a token.
    fn terms(self, state: &RowState, margins: Margins, inverse_temperature: f64) -> Terms;

    /// The coefficients [`kept` and `student`](Weighed) of `c` times DKD's gradient.
    fn dkd_gradient(self, state: &RowState, c: f64, inverse_temperature: f64) -> [f64; 2];

    /// `c` times the divergence over the whole vocabulary.
    fn plain(
        self,
        state: &RowState,
        terms: &Terms,
        margins: Margins,
        c: f64,
        inverse_temperature: f64,
    ) -> Weighed;

    /// The numbers that are reported as TKD and DKD of a plain objective.
    fn plain_columns(self, terms: &Terms) -> [f64; 2] {
        [terms.tkd, terms.dkd]
    }

    /// An infinite loss has a gradient.
    const GRADIENT_BESIDE_INFINITY: bool = true;

    /// The sum that what the sweeps keep is relative to; 1 where it is not.
    fn kept_sum(self, state: &RowState) -> f64;

    /// The coefficients of what was kept and of the student's exponential, for those relative to other shifts: `moved`
    /// goes from theirs to the state's.
    fn rescaled_coefficients(
        self,
        state: &RowState,
        coefficients: [f64; 2],
        moved: &Moved,
    ) -> [f64; 2];

    /// c_tkd TKD + c_dkd DKD
    fn decoupled(
        self,
        state: &RowState,
        terms: &Terms,
        [c_tkd, c_dkd]: [f64; 2],
        inverse_temperature: f64,
    ) -> Weighed {
        let gamma = weighted(c_tkd, terms.slope);
        let [kept, student] = self.dkd_gradient(state, c_dkd, inverse_temperature);
        let loss = weighted(c_tkd, terms.tkd) + weighted(c_dkd, terms.dkd);
        Weighed { loss, kept, student: student + gamma, target: -gamma }
    }
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

/// log sigmoid(x)
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// sigmoid(x) - sigmoid(y), on the side where sigmoid(y) is small.
fn sigmoid_difference(x: f64, y: f64) -> f64 {
    if y > 0.0 { -(sigmoid(-x) - sigmoid(-y)) } else { sigmoid(x) - sigmoid(y) }
}

/// The derivative of sigmoid, s (1 - s).
fn sigmoid_slope(x: f64) -> f64 {
    sigmoid(x) * sigmoid(-x)
}

/// The numbers that a row's gradient is made with. With respect to z_j, j != g, it is
/// `student * e^{(z^q_j - m_q) / T} + student_at_1 * e^{z^q_j - m_q}` and `divergence` times what the sweeps have kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GradientScales {
    pub divergence: f64,
    pub student: f64,
    pub student_at_1: f64,
    /// The gradient at the target.
    pub target: f64,
}

/// The facts of a token beside its row's state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token {
    /// The 1 / T that the sums have.
    pub inverse_temperature: f64,
    /// The student's sum at temperature 1 is one of its own.
    pub at_1: bool,
    /// The factor of the distillation terms, and that of cross entropy: the objective's times the token's own.
    pub distillation_scale: f64,
    pub ce_weight: f64,
    /// The teacher's margin.
    pub margin: f64,
    /// The student's logit of the target.
    pub student_target: f64,
    pub hard: bool,
}

/// The terms of a token and the scales of its gradient. `scales` are the reduction's times the upstream gradient.
pub(crate) fn finish<D: RowDivergence>(
    divergence: D,
    objective: &Objective,
    state: &RowState,
    token: &Token,
    scales: ReductionScales,
) -> (TokenTerms, GradientScales) {
    let Token { inverse_temperature, margin: u, student_target, hard, .. } = *token;
    let [c_kd, c_ce] = [token.distillation_scale, token.ce_weight];
    let weights_are_finite = c_kd.is_finite() && c_ce.is_finite();
    let scale = scales.distillation(hard);
    let (sums, shift) = (&state.sums, state.shifts[STUDENT]);
    let w = margin(shift, sums.student, student_target, inverse_temperature);
    let w_at_1 = margin(shift, sums.student_at_1, student_target, 1.0);
    let uncertainty = sigmoid(u);
    let margins = Margins { u, w };
    let terms = divergence.terms(state, margins, inverse_temperature);

    let nan = f64::NAN;
    let no_number =
        GradientScales { divergence: nan, student: nan, student_at_1: nan, target: nan };
    if u.is_nan() || w.is_nan() || terms.dkd.is_nan() {
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

    let ([tkd, dkd], weighed) = if objective.is_plain() {
        (
            divergence.plain_columns(&terms),
            divergence.plain(state, &terms, margins, c_kd, inverse_temperature),
        )
    } else {
        let coefficients = if hard { objective.hard() } else { objective.easy() };
        let number = |coefficient| match coefficient {
            Coefficient::Constant(value) => value,
            Coefficient::Uncertainty => uncertainty,
        } * c_kd;
        let c = [number(coefficients.tkd), number(coefficients.dkd)];
        ([terms.tkd, terms.dkd], divergence.decoupled(state, &terms, c, inverse_temperature))
    };
    let terms = TokenTerms {
        margin: u,
        uncertainty,
        tkd,
        dkd,
        loss: if weights_are_finite {
            weighed.loss + weighted(c_ce, softplus(w_at_1))
        } else {
            f64::NAN
        },
        valid: true,
        hard,
    };

    let finite = scale.is_finite() && scales.ce.is_finite() && weights_are_finite;
    if !finite || !(D::GRADIENT_BESIDE_INFINITY || weighed.loss.is_finite()) {
        return (terms, no_number);
    }
    let gamma_at_1 = weighted(c_ce, sigmoid(w_at_1)) * scales.ce;
    let kept_sum = divergence.kept_sum(state);
    let mut of_row = GradientScales {
        divergence: over(weighed.kept * inverse_temperature, scale, kept_sum),
        student: over(weighed.student * inverse_temperature, scale, sums.student),
        student_at_1: over(gamma_at_1, 1.0, sums.student_at_1),
        target: weighed.target * inverse_temperature * scale - gamma_at_1,
    };
    if !token.at_1 {
        of_row.student += std::mem::take(&mut of_row.student_at_1);
    }
    (terms, of_row)
}
