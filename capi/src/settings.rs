//! The settings of an objective as a C struct.

use atkd::{Coefficient, Coefficients, Divergence, Objective, Reduction, SelectionRule, Target};

use crate::status::Failure;

/// The adaptive loss of the paper, ATKD_OBJECTIVE_*.
pub const ATKD_OBJECTIVE_ATKD: i32 = 0;
/// The plain forward KL divergence.
pub const ATKD_OBJECTIVE_KL: i32 = 1;
/// The target part alone.
pub const ATKD_OBJECTIVE_TKD: i32 = 2;
/// The diversity part alone.
pub const ATKD_OBJECTIVE_DKD: i32 = 3;
/// The coefficients in the settings.
pub const ATKD_OBJECTIVE_DECOUPLED: i32 = 4;
/// The divergence over the whole vocabulary.
pub const ATKD_OBJECTIVE_PLAIN: i32 = 5;

/// KL(p, q) of the teacher's p and the student's q, ATKD_DIVERGENCE_*.
pub const ATKD_DIVERGENCE_FORWARD_KL: i32 = 0;
/// KL(q, p).
pub const ATKD_DIVERGENCE_REVERSE_KL: i32 = 1;
/// beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q; forward KL for 0, reverse for 1.
pub const ATKD_DIVERGENCE_JSD: i32 = 2;
/// Total variation, half the sum of |p - q|.
pub const ATKD_DIVERGENCE_TVD: i32 = 3;
/// KL(p, beta p + (1 - beta) q).
pub const ATKD_DIVERGENCE_SKEW_KL: i32 = 4;
/// KL(q, beta q + (1 - beta) p).
pub const ATKD_DIVERGENCE_SKEW_REVERSE_KL: i32 = 5;

/// A coefficient that is `value`.
pub const ATKD_COEFFICIENT_CONSTANT: i32 = 0;
/// A coefficient that is the token's uncertainty.
pub const ATKD_COEFFICIENT_UNCERTAINTY: i32 = 1;

/// The label of the token.
pub const ATKD_TARGET_LABEL: i32 = 0;
/// The teacher's arg max.
pub const ATKD_TARGET_TEACHER: i32 = 1;

/// The mean over the valid tokens.
pub const ATKD_REDUCTION_MEAN: i32 = 0;
/// The sum over the valid tokens.
pub const ATKD_REDUCTION_SUM: i32 = 1;
/// That sum over `denominator`.
pub const ATKD_REDUCTION_DENOMINATOR: i32 = 2;
/// The mean of the easy tokens plus the mean of the hard ones, as the code of ATKD's authors has it: of groups of equal
/// size twice ATKD_REDUCTION_MEAN. Cross entropy has its mean over all valid tokens.
pub const ATKD_REDUCTION_GROUP_MEAN: i32 = 3;

/// The hard_ratio's share of the valid tokens, rounded up, on which the teacher is least certain.
pub const ATKD_SELECTION_RULE_TOP_K: i32 = 0;
/// The tokens from the lower median on, as the code of ATKD's authors has it.
pub const ATKD_SELECTION_RULE_MEDIAN: i32 = 1;

/// The weight of one term.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdCoefficient {
    /// ATKD_COEFFICIENT_*.
    pub kind: i32,
    /// The number of ATKD_COEFFICIENT_CONSTANT.
    pub value: f64,
}

/// The weights of both terms for one group of tokens.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdCoefficients {
    /// The weight of TKD, the target part.
    pub tkd: AtkdCoefficient,
    /// The weight of DKD, the diversity part.
    pub dkd: AtkdCoefficient,
}

/// The loss that is computed. Start from atkd_default_settings().
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdSettings {
    /// ATKD_OBJECTIVE_*.
    pub objective: i32,
    /// ATKD_TARGET_*: which token splits a distribution.
    pub target: i32,
    /// ATKD_REDUCTION_*.
    pub reduction: i32,
    /// Not 0: the distillation terms are multiplied by the temperature's square.
    pub temperature_squared: i32,
    /// Tokens with this label are dropped.
    pub ignore_index: i64,
    /// In [0, 1]; of ATKD_OBJECTIVE_ATKD.
    pub lambda: f64,
    /// The share of the valid tokens that is hard, in [0, 1]; of ATKD_SELECTION_RULE_TOP_K.
    pub hard_ratio: f64,
    /// Above 0.
    pub temperature: f64,
    /// The weight of the distillation terms, not negative.
    pub kd_weight: f64,
    /// The weight of the cross entropy, not negative.
    pub ce_weight: f64,
    /// Above 0; of ATKD_REDUCTION_DENOMINATOR.
    pub denominator: f64,
    /// The weights of easy tokens, for ATKD_OBJECTIVE_DECOUPLED.
    pub easy: AtkdCoefficients,
    /// The weights of hard tokens, for ATKD_OBJECTIVE_DECOUPLED.
    pub hard: AtkdCoefficients,
    /// ATKD_DIVERGENCE_*; ATKD_OBJECTIVE_KL takes the forward one alone.
    pub divergence: i32,
    /// In [0, 1], below 1 for the skewed divergences, and no nearer than 1e-9 to an end that it is not; of these and of
    /// ATKD_DIVERGENCE_JSD.
    pub beta: f64,
    /// ATKD_SELECTION_RULE_*.
    pub selection_rule: i32,
}

impl Default for AtkdSettings {
    fn default() -> Self {
        let objective = Objective::default();
        let coefficients = |of: Coefficients| AtkdCoefficients {
            tkd: coefficient(of.tkd),
            dkd: coefficient(of.dkd),
        };
        Self {
            objective: ATKD_OBJECTIVE_ATKD,
            target: ATKD_TARGET_LABEL,
            reduction: ATKD_REDUCTION_MEAN,
            temperature_squared: objective.temperature_squared().into(),
            ignore_index: objective.ignore_index(),
            lambda: 0.2,
            hard_ratio: objective.hard_ratio(),
            temperature: objective.temperature(),
            kd_weight: objective.kd_weight(),
            ce_weight: objective.ce_weight(),
            denominator: 1.0,
            easy: coefficients(objective.easy()),
            hard: coefficients(objective.hard()),
            divergence: ATKD_DIVERGENCE_FORWARD_KL,
            beta: 0.5,
            selection_rule: ATKD_SELECTION_RULE_TOP_K,
        }
    }
}

pub(crate) fn selection_rule(rule: i32) -> Result<SelectionRule, Failure> {
    match rule {
        ATKD_SELECTION_RULE_TOP_K => Ok(SelectionRule::TopK),
        ATKD_SELECTION_RULE_MEDIAN => Ok(SelectionRule::Median),
        other => {
            let allowed = "ATKD_SELECTION_RULE_TOP_K (0) or ATKD_SELECTION_RULE_MEDIAN (1)";
            Err(Failure::value("the selection rule", other, allowed))
        }
    }
}

fn coefficient(of: Coefficient) -> AtkdCoefficient {
    match of {
        Coefficient::Constant(value) => AtkdCoefficient { kind: ATKD_COEFFICIENT_CONSTANT, value },
        Coefficient::Uncertainty => {
            AtkdCoefficient { kind: ATKD_COEFFICIENT_UNCERTAINTY, value: 0.0 }
        }
    }
}

impl AtkdCoefficients {
    fn parse(&self) -> Result<Coefficients, Failure> {
        let parse = |of: AtkdCoefficient| match of.kind {
            ATKD_COEFFICIENT_CONSTANT => Ok(Coefficient::Constant(of.value)),
            ATKD_COEFFICIENT_UNCERTAINTY => Ok(Coefficient::Uncertainty),
            kind => Err(Failure::value(
                "a coefficient's kind",
                kind,
                "ATKD_COEFFICIENT_CONSTANT (0) or ATKD_COEFFICIENT_UNCERTAINTY (1)",
            )),
        };
        Ok(Coefficients { tkd: parse(self.tkd)?, dkd: parse(self.dkd)? })
    }
}

/// The objective that the settings describe.
pub(crate) fn objective(settings: &AtkdSettings) -> Result<Objective, Failure> {
    let objective = match settings.objective {
        ATKD_OBJECTIVE_ATKD => Objective::atkd(settings.lambda)?,
        ATKD_OBJECTIVE_KL if settings.divergence != ATKD_DIVERGENCE_FORWARD_KL => {
            let allowed = "ATKD_DIVERGENCE_FORWARD_KL (0) for ATKD_OBJECTIVE_KL: ATKD_OBJECTIVE_PLAIN takes all";
            return Err(Failure::value("the divergence", settings.divergence, allowed));
        }
        ATKD_OBJECTIVE_KL => Objective::kl(),
        ATKD_OBJECTIVE_PLAIN => Objective::plain(),
        ATKD_OBJECTIVE_TKD => Objective::tkd(),
        ATKD_OBJECTIVE_DKD => Objective::dkd(),
        ATKD_OBJECTIVE_DECOUPLED => {
            Objective::decoupled(settings.easy.parse()?, settings.hard.parse()?)?
        }
        other => {
            let allowed = "one of ATKD_OBJECTIVE_* (0 to 5)";
            return Err(Failure::value("the objective", other, allowed));
        }
    };
    let beta = settings.beta;
    // Checked whatever the divergence.
    objective.with_divergence(Divergence::Jsd { beta })?;
    let divergence = match settings.divergence {
        ATKD_DIVERGENCE_FORWARD_KL => Divergence::ForwardKl,
        ATKD_DIVERGENCE_REVERSE_KL => Divergence::ReverseKl,
        ATKD_DIVERGENCE_JSD => Divergence::Jsd { beta },
        ATKD_DIVERGENCE_TVD => Divergence::TotalVariation,
        ATKD_DIVERGENCE_SKEW_KL => Divergence::SkewKl { alpha: beta },
        ATKD_DIVERGENCE_SKEW_REVERSE_KL => Divergence::SkewReverseKl { alpha: beta },
        other => {
            let allowed = "one of ATKD_DIVERGENCE_* (0 to 5)";
            return Err(Failure::value("the divergence", other, allowed));
        }
    };
    let target = match settings.target {
        ATKD_TARGET_LABEL => Target::Label,
        ATKD_TARGET_TEACHER => Target::Teacher,
        other => {
            let allowed = "ATKD_TARGET_LABEL (0) or ATKD_TARGET_TEACHER (1)";
            return Err(Failure::value("the target", other, allowed));
        }
    };
    let reduction = match settings.reduction {
        ATKD_REDUCTION_MEAN => Reduction::Mean,
        ATKD_REDUCTION_SUM => Reduction::Sum,
        ATKD_REDUCTION_DENOMINATOR => Reduction::Denominator(settings.denominator),
        ATKD_REDUCTION_GROUP_MEAN => Reduction::GroupMean,
        other => {
            let allowed = "one of ATKD_REDUCTION_* (0 to 3)";
            return Err(Failure::value("the reduction", other, allowed));
        }
    };
    let rule = selection_rule(settings.selection_rule)?;
    Ok(objective
        .with_divergence(divergence)?
        .with_selection_rule(rule)
        .with_hard_ratio(settings.hard_ratio)?
        .with_temperature(settings.temperature)?
        .with_temperature_squared(settings.temperature_squared != 0)
        .with_target(target)
        .with_ignore_index(settings.ignore_index)
        .with_reduction(reduction)?
        .with_kd_weight(settings.kd_weight)?
        .with_ce_weight(settings.ce_weight)?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fmt::Debug;

    use atkd::battery::settings::fields;

    use super::*;

    fn changed(one: &impl Debug, other: &impl Debug) -> BTreeSet<String> {
        let (one, other) = (fields(one), fields(other));
        one.iter()
            .filter(|&(name, value)| other[name] != *value)
            .map(|(name, _)| name.clone())
            .collect()
    }

    fn set<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
        names.into_iter().map(String::from).collect()
    }

    #[test]
    fn every_setting_of_an_objective_can_be_set() {
        let default = AtkdSettings::default();
        let rust = Objective::default();
        assert_eq!(objective(&default).unwrap(), rust);
        let constant = |value| AtkdCoefficient { kind: ATKD_COEFFICIENT_CONSTANT, value };
        let both = AtkdCoefficients { tkd: constant(0.5), dkd: constant(0.6) };
        let decoupled = AtkdSettings { objective: ATKD_OBJECTIVE_DECOUPLED, ..default };
        let denominator = ATKD_REDUCTION_DENOMINATOR;
        // Other settings, and the fields of the objective that they change.
        let jsd = AtkdSettings { divergence: ATKD_DIVERGENCE_JSD, ..default };
        let changes: [(AtkdSettings, &[&str]); 16] = [
            (
                AtkdSettings { objective: ATKD_OBJECTIVE_PLAIN, ..default },
                &["easy", "hard", "plain"],
            ),
            (jsd, &["divergence"]),
            (AtkdSettings { beta: 0.1, ..jsd }, &["divergence"]),
            (AtkdSettings { target: ATKD_TARGET_TEACHER, ..default }, &["target"]),
            (AtkdSettings { reduction: ATKD_REDUCTION_SUM, ..default }, &["reduction"]),
            (AtkdSettings { reduction: denominator, denominator: 7.0, ..default }, &["reduction"]),
            (AtkdSettings { reduction: ATKD_REDUCTION_GROUP_MEAN, ..default }, &["reduction"]),
            (
                AtkdSettings { selection_rule: ATKD_SELECTION_RULE_MEDIAN, ..default },
                &["selection_rule"],
            ),
            (AtkdSettings { temperature_squared: 1, ..default }, &["temperature_squared"]),
            (AtkdSettings { ignore_index: -1, ..default }, &["ignore_index"]),
            (AtkdSettings { lambda: 0.3, ..default }, &["easy", "hard"]),
            (AtkdSettings { hard_ratio: 0.4, ..default }, &["hard_ratio"]),
            (AtkdSettings { temperature: 2.0, ..default }, &["temperature"]),
            (AtkdSettings { kd_weight: 0.5, ..default }, &["kd_weight"]),
            (AtkdSettings { ce_weight: 0.5, ..default }, &["ce_weight"]),
            (AtkdSettings { easy: both, hard: both, ..decoupled }, &["easy", "hard"]),
        ];
        // An upstream gradient is an argument of the call.
        let mut rust_fields = set(["upstream"]);
        let mut c_fields = BTreeSet::new();
        for (settings, expected) in changes {
            let actual = changed(&rust, &objective(&settings).unwrap());
            assert_eq!(actual, set(expected.iter().copied()), "{settings:?}");
            rust_fields.extend(actual);
            c_fields.extend(changed(&default, &settings));
        }
        let names = |of: &dyn Debug| fields(&of).into_keys().collect::<BTreeSet<_>>();
        assert_eq!(rust_fields, names(&rust), "settings of Rust");
        assert_eq!(c_fields, names(&default), "settings of C");
    }

    /// The choices of an objective as C's numbers. Each match is over all that Rust has: a variant without a number does
    /// not compile.
    fn settings_of(objective: &Objective) -> AtkdSettings {
        let default = AtkdSettings::default();
        let (divergence, beta) = match objective.divergence() {
            Divergence::ForwardKl => (ATKD_DIVERGENCE_FORWARD_KL, default.beta),
            Divergence::ReverseKl => (ATKD_DIVERGENCE_REVERSE_KL, default.beta),
            Divergence::Jsd { beta } => (ATKD_DIVERGENCE_JSD, beta),
            Divergence::TotalVariation => (ATKD_DIVERGENCE_TVD, default.beta),
            Divergence::SkewKl { alpha } => (ATKD_DIVERGENCE_SKEW_KL, alpha),
            Divergence::SkewReverseKl { alpha } => (ATKD_DIVERGENCE_SKEW_REVERSE_KL, alpha),
        };
        let target = match objective.target() {
            Target::Label => ATKD_TARGET_LABEL,
            Target::Teacher => ATKD_TARGET_TEACHER,
        };
        let selection_rule = match objective.selection_rule() {
            SelectionRule::TopK => ATKD_SELECTION_RULE_TOP_K,
            SelectionRule::Median => ATKD_SELECTION_RULE_MEDIAN,
        };
        let (reduction, denominator) = match objective.reduction() {
            Reduction::Mean => (ATKD_REDUCTION_MEAN, default.denominator),
            Reduction::Sum => (ATKD_REDUCTION_SUM, default.denominator),
            Reduction::GroupMean => (ATKD_REDUCTION_GROUP_MEAN, default.denominator),
            Reduction::Denominator(number) => (ATKD_REDUCTION_DENOMINATOR, number),
        };
        AtkdSettings { divergence, beta, target, selection_rule, reduction, denominator, ..default }
    }

    #[test]
    fn every_choice_has_its_number() {
        let default = Objective::default();
        let targets = [Target::Label, Target::Teacher].map(|target| default.with_target(target));
        let rules = [SelectionRule::TopK, SelectionRule::Median];
        let rules = rules.map(|rule| default.with_selection_rule(rule));
        let reductions =
            [Reduction::Mean, Reduction::Sum, Reduction::GroupMean, Reduction::Denominator(7.0)];
        let reductions = reductions.map(|reduction| default.with_reduction(reduction).unwrap());
        for expected in targets.into_iter().chain(rules).chain(reductions) {
            assert_eq!(objective(&settings_of(&expected)).unwrap(), expected);
        }
    }

    #[test]
    fn every_divergence_has_its_number() {
        let beta = 0.3;
        for divergence in [
            Divergence::ForwardKl,
            Divergence::ReverseKl,
            Divergence::Jsd { beta },
            Divergence::TotalVariation,
            Divergence::SkewKl { alpha: beta },
            Divergence::SkewReverseKl { alpha: beta },
        ] {
            let expected = Objective::default().with_divergence(divergence).unwrap();
            let settings = settings_of(&expected);
            assert_eq!(objective(&settings).unwrap(), expected);
            let kl = AtkdSettings { objective: ATKD_OBJECTIVE_KL, ..settings };
            assert_eq!(objective(&kl).is_ok(), divergence == Divergence::ForwardKl);
            assert!(objective(&AtkdSettings { beta: 1.5, ..settings }).is_err());
        }
        let settings = AtkdSettings { divergence: 6, ..AtkdSettings::default() };
        assert!(objective(&settings).is_err());
    }

    #[test]
    fn settings_that_are_no_objective() {
        let default = AtkdSettings::default();
        let groups = AtkdSettings { reduction: ATKD_REDUCTION_GROUP_MEAN, ..default };
        assert_eq!(objective(&groups).unwrap().reduction(), Reduction::GroupMean);
        let kinds =
            [ATKD_OBJECTIVE_KL, ATKD_OBJECTIVE_PLAIN, ATKD_OBJECTIVE_TKD, ATKD_OBJECTIVE_DKD];
        for kind in kinds {
            assert!(objective(&AtkdSettings { objective: kind, ..groups }).is_err());
        }
        assert!(objective(&AtkdSettings { reduction: 4, ..default }).is_err());
        assert!(objective(&AtkdSettings { selection_rule: 2, ..default }).is_err());
    }
}
