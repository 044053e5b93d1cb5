//! The loss that is computed: coefficients, selection, target, reduction. Each setting is checked once, when it is set.

use crate::{Error, Result};

/// The weight of one term of a token's loss.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
pub enum Coefficient {
    /// The token's uncertainty UNC = 1 - p(target), a constant for the gradient: with it on DKD, and
    /// 1 on TKD, the sum is the plain KL divergence (Zhong et al., 2024).
    Uncertainty,
    /// The same number for every token.
    #[cfg_attr(feature = "serde", serde(untagged))]
    Constant(f64),
}

impl From<f64> for Coefficient {
    fn from(value: f64) -> Self {
        Coefficient::Constant(value)
    }
}

/// The weights of the two parts of a divergence, for one group of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct Coefficients {
    /// The coefficient of the target part, a divergence of two Bernoulli distributions.
    pub tkd: Coefficient,
    /// The coefficient of the diversity part, the divergence of the renormalised non-targets.
    pub dkd: Coefficient,
}

impl Coefficients {
    /// The coefficients of TKD and of DKD.
    pub fn new(tkd: impl Into<Coefficient>, dkd: impl Into<Coefficient>) -> Self {
        Self { tkd: tkd.into(), dkd: dkd.into() }
    }
}

/// A divergence of the student's distribution q from the teacher's p. With p_j, q_j the probabilities of token j:
///
/// | divergence | definition | with m = |
/// |---|---|---|
/// | forward KL | sum p log(p / q) | |
/// | reverse KL | sum q log(q / p) | |
/// | JSD(beta) | beta sum p log(p / m) + (1 - beta) sum q log(q / m) | beta p + (1 - beta) q |
/// | total variation | sum \|p - q\| / 2 | |
/// | skew KL(alpha) | sum p log(p / m) | alpha p + (1 - alpha) q |
/// | skew reverse KL(alpha) | sum q log(q / m) | alpha q + (1 - alpha) p |
///
/// The generalised Jensen-Shannon divergence is that of GKD (Agarwal et al., 2024), the skewed ones are those of
/// DistiLLM (Ko et al., 2024).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
pub enum Divergence {
    /// KL(p, q): the student covers whatever the teacher may say.
    #[default]
    ForwardKl,
    /// KL(q, p): the student says only what the teacher may. Infinite where the teacher rules out (-inf) a token that
    /// the student does not; then it has no gradient, which is NaN.
    ReverseKl,
    /// The generalised Jensen-Shannon divergence.
    Jsd {
        /// The teacher's share in the mixture, in \[0, 1\], and no nearer than 1e-9 to an end that it is not.
        /// As limits of JSD(beta) over beta and over 1 - beta, 0 means forward KL and 1 means reverse KL (as in GKD and TRL).
        beta: f64,
    },
    /// Half the sum of the absolute differences.
    #[cfg_attr(feature = "serde", serde(rename = "tvd"))]
    TotalVariation,
    /// KL(p, alpha p + (1 - alpha) q).
    SkewKl {
        /// The teacher's share in the mixture, in \[0, 1), and no nearer than 1e-9 to an end that it is not; 0 means forward KL.
        alpha: f64,
    },
    /// KL(q, alpha q + (1 - alpha) p).
    SkewReverseKl {
        /// The student's share in the mixture, in \[0, 1), and no nearer than 1e-9 to an end that it is not; 0 means reverse KL.
        alpha: f64,
    },
}

/// The divergences by the mathematics that computes them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Family {
    ForwardKl,
    ReverseKl,
    Mixture(Mixture),
    TotalVariation,
}

/// of_teacher KL(p, m) + of_student KL(q, m), with m = share p + (1 - share) q and 0 < share < 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Mixture {
    pub share: f64,
    pub of_teacher: f64,
    pub of_student: f64,
}

impl Divergence {
    pub(crate) fn family(self) -> Family {
        let mixture = |share, of_teacher, of_student| {
            Family::Mixture(Mixture { share, of_teacher, of_student })
        };
        match self {
            Self::ForwardKl | Self::Jsd { beta: 0.0 } | Self::SkewKl { alpha: 0.0 } => {
                Family::ForwardKl
            }
            Self::ReverseKl | Self::Jsd { beta: 1.0 } | Self::SkewReverseKl { alpha: 0.0 } => {
                Family::ReverseKl
            }
            Self::Jsd { beta } => mixture(beta, beta, 1.0 - beta),
            Self::TotalVariation => Family::TotalVariation,
            Self::SkewKl { alpha } => mixture(alpha, 1.0, 0.0),
            Self::SkewReverseKl { alpha } => mixture(1.0 - alpha, 0.0, 1.0),
        }
    }
}

/// The token of the vocabulary that splits a distribution into target and non-targets. Cross entropy is
/// of the same token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
pub enum Target {
    /// The label of the token.
    Label,
    /// The teacher's most probable token, the lowest index among equals. Labels, where there are any,
    /// then only say which tokens are ignored.
    Teacher,
}

/// How the losses of the tokens become one number.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
pub enum Reduction {
    /// The sum over the valid tokens.
    Sum,
    /// The mean over the valid tokens; 0 where there are none.
    Mean,
    /// The mean of the easy tokens' distillation terms plus the mean of the hard tokens', each over its own count; a group
    /// without tokens adds 0. Cross entropy has its mean over all valid tokens.
    ///
    /// The code of ATKD's authors computes this, with [`SelectionRule::Median`]. Of groups of equal size it is twice
    /// [`Mean`](Self::Mean).
    GroupMean,
    /// The sum over this number: with gradient accumulation, the valid tokens of the whole batch.
    Denominator(f64),
}

/// How the hard tokens are told from the easy ones by the teacher's margins, in float32. NaN is below every number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
pub enum SelectionRule {
    /// The `ceil(hard_ratio * valid tokens)` of the largest margin, the lower index among equals.
    #[default]
    TopK,
    /// Those whose margin is at least the lower median of the valid tokens': element (n - 1) / 2 of n in ascending order.
    /// The hard ratio is not used. Without equal margins n / 2 + 1 of an even n are hard, and (n + 1) / 2 of an odd one;
    /// all that equal the median are.
    ///
    /// The code of ATKD's authors selects so.
    Median,
}

/// The factors of tokens' losses in the reduced one, which is the sum of both's products.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReductionScales {
    /// The factor of an easy token's distillation terms.
    pub easy: f64,
    /// The factor of a hard token's.
    pub hard: f64,
    /// The factor of any valid token's cross entropy.
    pub ce: f64,
}

impl ReductionScales {
    /// The factor of the distillation terms of a token.
    pub fn distillation(&self, hard: bool) -> f64 {
        if hard { self.hard } else { self.easy }
    }

    pub(crate) fn times(self, factor: f64) -> Self {
        Self { easy: self.easy * factor, hard: self.hard * factor, ce: self.ce * factor }
    }
}

/// A loss over tokens, always a valid one.
///
/// For one token with target part TKD, diversity part DKD and cross entropy CE:
///
/// ```text
/// loss = kd_weight * (c_tkd * TKD + c_dkd * DKD) [* temperature^2] + ce_weight * CE
/// ```
///
/// where (c_tkd, c_dkd) are those of the hard tokens for the `ceil(hard_ratio * valid tokens)` tokens of the call
/// on which the teacher is least certain, and those of the easy tokens for the rest. For a batch in several calls see
/// [`select_hard`](crate::select_hard).
///
/// The code of the paper's authors takes another set of hard tokens, [`SelectionRule::Median`], and another mean,
/// [`Reduction::GroupMean`].
///
/// | constructor | easy tokens | hard tokens |
/// |---|---|---|
/// | [`atkd`](Self::atkd) | 0, lambda | 1 - lambda, 1 - lambda |
/// | [`plain`](Self::plain) | 1, UNC | 1, UNC |
/// | [`tkd`](Self::tkd) | 1, 0 | 1, 0 |
/// | [`dkd`](Self::dkd) | 0, 1 | 0, 1 |
/// | [`decoupled`](Self::decoupled) | any | any |
///
/// The divergence of both parts is forward KL or another ([`with_divergence`](Self::with_divergence)). `plain` is the
/// divergence over the whole vocabulary, which only for forward KL is the sum above.
///
/// [`Objective::default`] is the paper's ATKD: lambda 0.2, forward KL, hard ratio 0.5, temperature 1, the label as
/// target, the mean over valid tokens, no cross entropy.
///
/// ```
/// # use atkd::{Objective, Reduction};
/// let objective = Objective::atkd(0.3)?
///     .with_hard_ratio(0.4)?
///     .with_temperature(2.0)?
///     .with_ce_weight(0.5)?
///     .with_reduction(Reduction::Sum)?;
/// assert!(Objective::atkd(7.0).is_err());
/// # Ok::<(), atkd::Error>(())
/// ```
///
/// With the feature `serde` an objective is read and written by settings' names, and what is left out is the default's:
///
/// ```json
/// {
///   "easy": { "tkd": 0, "dkd": 0.2 },
///   "hard": { "tkd": 0.8, "dkd": 0.8 },
///   "divergence": { "jsd": { "beta": 0.5 } },
///   "selection_rule": "top-k",
///   "reduction": { "denominator": 4096 }
/// }
/// ```
///
/// A plain one has `"plain": true` instead of coefficients. What is read is checked as by the setters.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(remote = "Self", default, deny_unknown_fields)
)]
pub struct Objective {
    easy: Coefficients,
    hard: Coefficients,
    plain: bool,
    divergence: Divergence,
    selection_rule: SelectionRule,
    hard_ratio: f64,
    temperature: f64,
    temperature_squared: bool,
    target: Target,
    ignore_index: i64,
    reduction: Reduction,
    kd_weight: f64,
    ce_weight: f64,
    #[cfg_attr(feature = "serde", serde(rename = "upstream_gradient"))]
    upstream: f64,
}

#[cfg(feature = "serde")]
impl serde::Serialize for Objective {
    fn serialize<S: serde::Serializer>(
        &self,
        serializer: S,
    ) -> std::result::Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Objective {
    fn deserialize<D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<Self, D::Error> {
        let read = Self::deserialize(deserializer)?;
        let parts = |objective: Self| [objective.easy, objective.hard];
        // Those of the default stand where none are written.
        let is_plain = [Self::plain(), Self::default()].map(parts).contains(&parts(read));
        if read.plain && !is_plain {
            const MESSAGE: &str = "a plain objective has no coefficients of easy and hard tokens: leave out `easy` and \
                 `hard`, or `plain`";
            return Err(serde::de::Error::custom(MESSAGE));
        }
        read.checked().map_err(serde::de::Error::custom)
    }
}

impl Default for Objective {
    fn default() -> Self {
        Self::atkd(0.2).expect("the paper's lambda is in [0, 1]")
    }
}

fn check(name: &'static str, value: f64, allowed: &'static str, ok: bool) -> Result<f64> {
    if ok { Ok(value) } else { Err(Error::Setting { name, value, allowed }) }
}

/// The domain of a temperature.
pub(crate) const TEMPERATURE: &str =
    "in [1e-30, 1e30], so that float32 has its reciprocal finite and above 0";

pub(crate) fn check_temperature(value: f64) -> Result<f64> {
    check("the temperature", value, TEMPERATURE, (1e-30..=1e30).contains(&value))
}

pub(crate) fn unit_interval(name: &'static str, value: f64) -> Result<f64> {
    check(name, value, "in [0, 1]", (0.0..=1.0).contains(&value))
}

fn finite(name: &'static str, value: f64) -> Result<f64> {
    check(name, value, "finite", value.is_finite())
}

fn weight(name: &'static str, value: f64) -> Result<f64> {
    check(name, value, "finite and not negative", value.is_finite() && value >= 0.0)
}

fn positive(name: &'static str, value: f64) -> Result<f64> {
    check(name, value, "finite and above 0", value.is_finite() && value > 0.0)
}

impl SelectionRule {
    /// [`Objective::hard_count`] for any ratio.
    pub(crate) fn hard_count(self, hard_ratio: f64, valid: usize) -> usize {
        let wanted = match self {
            Self::TopK => (hard_ratio * valid as f64).ceil() as usize,
            Self::Median => valid / 2 + 1,
        };
        wanted.min(valid)
    }
}

impl Objective {
    /// Adaptive teaching, the loss of the paper: easy tokens learn `lambda * DKD`, hard ones
    /// `(1 - lambda) * (TKD + DKD)`.
    ///
    /// # Errors
    /// If `lambda` is not in [0, 1].
    pub fn atkd(lambda: f64) -> Result<Self> {
        let lambda = unit_interval("lambda", lambda)?;
        Self::decoupled(
            Coefficients::new(0.0, lambda),
            Coefficients::new(1.0 - lambda, 1.0 - lambda),
        )
    }

    /// The divergence over the whole vocabulary, forward KL or [another](Self::with_divergence). Forward KL is
    /// TKD + UNC * DKD. The target matters to cross entropy, to the terms that are reported, and to which tokens are
    /// reported as hard.
    pub fn plain() -> Self {
        let objective = Self::uniform(Coefficients::new(1.0, Coefficient::Uncertainty));
        Self { plain: true, ..objective }
    }

    /// The plain forward KL divergence: [`plain`](Self::plain), by the name of its default divergence.
    pub fn kl() -> Self {
        Self::plain()
    }

    /// The target part alone.
    pub fn tkd() -> Self {
        Self::uniform(Coefficients::new(1.0, 0.0))
    }

    /// The diversity part alone.
    pub fn dkd() -> Self {
        Self::uniform(Coefficients::new(0.0, 1.0))
    }

    /// Any decoupling: the paper's ablations, or DKD of Zhao et al. (2022) with the same two numbers
    /// for both groups.
    ///
    /// # Errors
    /// If a coefficient is not finite.
    pub fn decoupled(easy: Coefficients, hard: Coefficients) -> Result<Self> {
        for (name, coefficient) in [
            ("the easy tokens' TKD coefficient", easy.tkd),
            ("the easy tokens' DKD coefficient", easy.dkd),
            ("the hard tokens' TKD coefficient", hard.tkd),
            ("the hard tokens' DKD coefficient", hard.dkd),
        ] {
            if let Coefficient::Constant(value) = coefficient {
                finite(name, value)?;
            }
        }
        Ok(Self { easy, hard, ..Self::uniform(easy) })
    }

    /// The objective, if each of its settings is allowed.
    #[cfg(feature = "serde")]
    fn checked(self) -> Result<Self> {
        let base = match self.plain {
            true => Self::plain(),
            false => Self::decoupled(self.easy, self.hard)?,
        };
        base.with_divergence(self.divergence)?
            .with_selection_rule(self.selection_rule)
            .with_hard_ratio(self.hard_ratio)?
            .with_temperature(self.temperature)?
            .with_temperature_squared(self.temperature_squared)
            .with_target(self.target)
            .with_ignore_index(self.ignore_index)
            .with_reduction(self.reduction)?
            .with_kd_weight(self.kd_weight)?
            .with_ce_weight(self.ce_weight)?
            .with_upstream_gradient(self.upstream)
    }

    fn uniform(coefficients: Coefficients) -> Self {
        Self {
            easy: coefficients,
            hard: coefficients,
            plain: false,
            divergence: Divergence::ForwardKl,
            selection_rule: SelectionRule::TopK,
            hard_ratio: 0.5,
            temperature: 1.0,
            temperature_squared: false,
            target: Target::Label,
            ignore_index: -100,
            reduction: Reduction::Mean,
            kd_weight: 1.0,
            ce_weight: 0.0,
            upstream: 1.0,
        }
    }

    /// Default [`Divergence::ForwardKl`].
    ///
    /// # Errors
    /// If beta is not in \[0, 1\], or alpha not in \[0, 1), or either is nearer than 1e-9 to 0 or 1 without being it: in a
    /// mixture of such shares one model is lost by rounding.
    pub fn with_divergence(mut self, divergence: Divergence) -> Result<Self> {
        const SMALLEST_SHARE: f64 = 1e-9;
        let mixes = |share| (SMALLEST_SHARE..=1.0 - SMALLEST_SHARE).contains(&share);
        match divergence {
            Divergence::Jsd { beta } => {
                const ALLOWED: &str = "in [0, 1], and no nearer than 1e-9 to an end that it is not";
                check("beta", beta, ALLOWED, beta == 0.0 || beta == 1.0 || mixes(beta))?
            }
            Divergence::SkewKl { alpha } | Divergence::SkewReverseKl { alpha } => {
                const ALLOWED: &str = "in [0, 1), and no nearer than 1e-9 to an end that it is not: at 1 the divergence \
                     is 0 whatever the student does";
                check(
                    "the skew (alpha in Rust, beta elsewhere)",
                    alpha,
                    ALLOWED,
                    alpha == 0.0 || mixes(alpha),
                )?
            }
            Divergence::ForwardKl | Divergence::ReverseKl | Divergence::TotalVariation => 0.0,
        };
        self.divergence = divergence;
        Ok(self)
    }

    /// Default [`SelectionRule::TopK`].
    pub fn with_selection_rule(mut self, rule: SelectionRule) -> Self {
        self.selection_rule = rule;
        self
    }

    /// The share k of a call's valid tokens that is hard, rounded up to whole tokens. Default 0.5. Not used where
    /// the call is told which tokens are hard ([`Batch::with_hard`](crate::Batch::with_hard)), nor by
    /// [`SelectionRule::Median`].
    ///
    /// # Errors
    /// If it is not in [0, 1].
    pub fn with_hard_ratio(mut self, hard_ratio: f64) -> Result<Self> {
        self.hard_ratio = unit_interval("the hard ratio", hard_ratio)?;
        Ok(self)
    }

    /// Both models' logits are divided by it for TKD, DKD and UNC; cross entropy is taken at 1.
    /// Default 1.
    ///
    /// # Errors
    /// If it is not in [1e-30, 1e30]: the logits are multiplied by its reciprocal in float32.
    pub fn with_temperature(mut self, temperature: f64) -> Result<Self> {
        self.temperature = check_temperature(temperature)?;
        Ok(self)
    }

    /// Multiplies the distillation terms by the temperature's square, or not. The square keeps their
    /// gradient's size when the temperature changes (Hinton et al., 2015). Default no.
    pub fn with_temperature_squared(mut self, yes: bool) -> Self {
        self.temperature_squared = yes;
        self
    }

    /// Default [`Target::Label`].
    pub fn with_target(mut self, target: Target) -> Self {
        self.target = target;
        self
    }

    /// Tokens with this label are dropped: no loss, a gradient of zeros, not counted. Default -100.
    pub fn with_ignore_index(mut self, ignore_index: i64) -> Self {
        self.ignore_index = ignore_index;
        self
    }

    /// Default [`Reduction::Mean`].
    ///
    /// # Errors
    /// If a denominator is not finite and above 0; for means of groups, if easy and hard tokens have the same
    /// coefficients, so that there are no groups.
    pub fn with_reduction(mut self, reduction: Reduction) -> Result<Self> {
        match reduction {
            Reduction::Denominator(denominator) => {
                positive("the reduction's denominator", denominator)?;
            }
            Reduction::GroupMean if self.easy == self.hard => {
                let Coefficients { tkd, dkd } = self.easy;
                return Err(Error::NoGroups { tkd, dkd });
            }
            Reduction::GroupMean | Reduction::Mean | Reduction::Sum => {}
        }
        self.reduction = reduction;
        Ok(self)
    }

    /// The weight of the distillation terms. Default 1.
    ///
    /// # Errors
    /// If it is negative or not finite.
    pub fn with_kd_weight(mut self, kd_weight: f64) -> Result<Self> {
        self.kd_weight = weight("the distillation weight", kd_weight)?;
        Ok(self)
    }

    /// The weight of the student's cross entropy at the target, at temperature 1. Default 0.
    ///
    /// # Errors
    /// If it is negative or not finite.
    pub fn with_ce_weight(mut self, ce_weight: f64) -> Result<Self> {
        self.ce_weight = weight("the cross-entropy weight", ce_weight)?;
        Ok(self)
    }

    /// The gradient of whatever comes after with respect to this loss; the gradient is multiplied by
    /// it, the loss is not. Default 1.
    ///
    /// # Errors
    /// If it is not finite.
    pub fn with_upstream_gradient(mut self, upstream: f64) -> Result<Self> {
        self.upstream = finite("the upstream gradient", upstream)?;
        Ok(self)
    }

    /// See [`plain`](Self::plain).
    pub fn is_plain(&self) -> bool {
        self.plain
    }

    /// See [`with_divergence`](Self::with_divergence).
    pub fn divergence(&self) -> Divergence {
        self.divergence
    }

    /// Coefficients of the easy tokens. Those of [`plain`](Self::plain) are forward KL's.
    pub fn easy(&self) -> Coefficients {
        self.easy
    }

    /// Coefficients of the hard tokens, likewise.
    pub fn hard(&self) -> Coefficients {
        self.hard
    }

    /// See [`with_selection_rule`](Self::with_selection_rule).
    pub fn selection_rule(&self) -> SelectionRule {
        self.selection_rule
    }

    /// See [`with_hard_ratio`](Self::with_hard_ratio).
    pub fn hard_ratio(&self) -> f64 {
        self.hard_ratio
    }

    /// See [`with_temperature`](Self::with_temperature).
    pub fn temperature(&self) -> f64 {
        self.temperature
    }

    /// See [`with_temperature_squared`](Self::with_temperature_squared).
    pub fn temperature_squared(&self) -> bool {
        self.temperature_squared
    }

    /// See [`with_target`](Self::with_target).
    pub fn target(&self) -> Target {
        self.target
    }

    /// See [`with_ignore_index`](Self::with_ignore_index).
    pub fn ignore_index(&self) -> i64 {
        self.ignore_index
    }

    /// See [`with_reduction`](Self::with_reduction).
    pub fn reduction(&self) -> Reduction {
        self.reduction
    }

    /// See [`with_kd_weight`](Self::with_kd_weight).
    pub fn kd_weight(&self) -> f64 {
        self.kd_weight
    }

    /// See [`with_ce_weight`](Self::with_ce_weight).
    pub fn ce_weight(&self) -> f64 {
        self.ce_weight
    }

    /// With one more factor, which need not be finite.
    pub(crate) fn times_upstream_gradient(mut self, factor: f64) -> Self {
        self.upstream *= factor;
        self
    }

    /// See [`with_upstream_gradient`](Self::with_upstream_gradient).
    pub fn upstream_gradient(&self) -> f64 {
        self.upstream
    }

    /// The factor of TKD and DKD beside their coefficients: `kd_weight`, or
    /// `kd_weight * temperature^2`.
    pub fn distillation_scale(&self) -> f64 {
        self.distillation_scale_at(self.temperature)
    }

    /// The same at another temperature.
    pub(crate) fn distillation_scale_at(&self, temperature: f64) -> f64 {
        if self.temperature_squared {
            self.kd_weight * temperature * temperature
        } else {
            self.kd_weight
        }
    }

    /// True if a token's loss depends on its being easy or hard.
    pub fn depends_on_selection(&self) -> bool {
        self.easy != self.hard && !self.has_one_group()
    }

    /// True if the divergence needs a second sweep over the logits: all but forward and reverse KL.
    pub fn has_two_sweeps(&self) -> bool {
        match self.divergence.family() {
            Family::ForwardKl | Family::ReverseKl => false,
            Family::Mixture(_) | Family::TotalVariation => true,
        }
    }

    /// True if the divergence is infinite where the teacher has no probability and the student has one.
    pub(crate) fn is_infinite_by_zero_tail(&self) -> bool {
        self.divergence.family() == Family::ReverseKl && self.weighs_rest()
    }

    /// True if the gradient is linear in the teacher's probabilities off the target, so that estimates of these may take their
    /// place.
    pub(crate) fn takes_draws(&self) -> bool {
        self.divergence.family() == Family::ForwardKl || !self.weighs_rest()
    }

    /// True if a loss depends on more of the teacher than the target's probability.
    pub(crate) fn weighs_rest(&self) -> bool {
        let weighs = |of: Coefficients| of.dkd != Coefficient::Constant(0.0);
        self.kd_weight != 0.0 && (self.plain || weighs(self.easy) || weighs(self.hard))
    }

    /// True if all valid tokens are hard, or none is, whatever the margins.
    fn has_one_group(&self) -> bool {
        match self.selection_rule {
            SelectionRule::TopK => self.hard_ratio == 0.0 || self.hard_ratio == 1.0,
            SelectionRule::Median => false,
        }
    }

    /// Hard tokens among `valid` ones: `ceil(hard_ratio * valid)`, in float64; by the median `valid / 2 + 1`, and more
    /// where margins equal it.
    pub fn hard_count(&self, valid: usize) -> usize {
        self.selection_rule.hard_count(self.hard_ratio, valid)
    }

    /// True if [`hard_count`](Self::hard_count) of all valid tokens is how many are hard, where each of so many parts of
    /// them has a selection of its own.
    pub(crate) fn hard_count_is_known(&self, scopes: usize) -> bool {
        self.has_one_group() || self.selection_rule == SelectionRule::TopK && scopes == 1
    }

    /// True if no gradient can be computed before the selection, not even for a predicted group: it is divided by the
    /// group's size.
    pub(crate) fn selects_before_gradients(&self, scopes: usize) -> bool {
        self.reduction == Reduction::GroupMean && !self.hard_count_is_known(scopes)
    }

    /// The factors of the tokens' losses, where `valid` tokens count, `hard` of them hard.
    pub fn reduction_scales(&self, valid: usize, hard: usize) -> ReductionScales {
        let over = |count: usize| if count == 0 { 0.0 } else { 1.0 / count as f64 };
        let same = |scale: f64| ReductionScales { easy: scale, hard: scale, ce: scale };
        match self.reduction {
            Reduction::Sum => same(1.0),
            Reduction::Mean => same(over(valid)),
            Reduction::GroupMean => {
                let easy = over(valid.saturating_sub(hard));
                ReductionScales { easy, hard: over(hard), ce: over(valid) }
            }
            Reduction::Denominator(denominator) => same(1.0 / denominator),
        }
    }
}
