//! Objectives as text: what is written is read again, what is left out is the default's, and what is wrong is an error.

use atkd::{Coefficient, Coefficients, Divergence, Objective, Reduction, SelectionRule, Target};

fn read(text: &str) -> Result<Objective, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

#[test]
fn what_is_written_is_read() {
    let every_divergence = [
        Divergence::ForwardKl,
        Divergence::ReverseKl,
        Divergence::Jsd { beta: 0.3 },
        Divergence::TotalVariation,
        Divergence::SkewKl { alpha: 0.1 },
        Divergence::SkewReverseKl { alpha: 0.2 },
    ];
    let by_uncertainty = Coefficients::new(0.5, Coefficient::Uncertainty);
    let decoupled = Objective::decoupled(by_uncertainty, Coefficients::new(1.0, 8.0)).unwrap();
    let every_setting = decoupled
        .with_selection_rule(SelectionRule::Median)
        .with_hard_ratio(0.4)
        .and_then(|objective| objective.with_temperature(2.0))
        .and_then(|objective| objective.with_reduction(Reduction::Denominator(7.0)))
        .and_then(|objective| objective.with_kd_weight(0.9))
        .and_then(|objective| objective.with_ce_weight(0.1))
        .and_then(|objective| objective.with_upstream_gradient(-3.0))
        .unwrap()
        .with_temperature_squared(true)
        .with_target(Target::Teacher)
        .with_ignore_index(-1);
    let base = [
        Objective::default(),
        Objective::plain(),
        Objective::tkd(),
        Objective::dkd(),
        every_setting,
    ];
    for objective in base {
        for divergence in every_divergence {
            let objective = objective.with_divergence(divergence).unwrap();
            let text = serde_json::to_string(&objective).unwrap();
            assert_eq!(read(&text), Ok(objective), "{text}");
        }
    }
}

#[test]
fn what_is_left_out_is_the_default() {
    assert_eq!(read("{}"), Ok(Objective::default()));
    assert_eq!(read(r#"{"plain": true}"#), Ok(Objective::plain()));
    let expected = Objective::atkd(0.4)
        .unwrap()
        .with_divergence(Divergence::Jsd { beta: 0.5 })
        .unwrap()
        .with_reduction(Reduction::GroupMean)
        .unwrap()
        .with_selection_rule(SelectionRule::Median);
    let text = r#"{
        "easy": {"tkd": 0, "dkd": 0.4},
        "hard": {"tkd": 0.6, "dkd": 0.6},
        "divergence": {"jsd": {"beta": 0.5}},
        "reduction": "group-mean",
        "selection_rule": "median"
    }"#;
    assert_eq!(read(text), Ok(expected));
}

#[test]
fn what_no_setter_takes_is_an_error() {
    for (text, part) in [
        (r#"{"temperature": 0}"#, "the temperature is 0, but must be in [1e-30, 1e30]"),
        (r#"{"hard_ratio": 1.5}"#, "the hard ratio is 1.5, but must be in [0, 1]"),
        (r#"{"ce_weight": -1}"#, "the cross-entropy weight is -1"),
        (r#"{"divergence": {"skew-kl": {"alpha": 1}}}"#, "at 1 the divergence is 0"),
        (r#"{"reduction": {"denominator": 0}}"#, "the reduction's denominator is 0"),
        (
            r#"{"plain": true, "easy": {"tkd": 0, "dkd": 0.3}}"#,
            "a plain objective has no coefficients",
        ),
        (r#"{"plain": true, "reduction": "group-mean"}"#, "so that there are no groups"),
        (r#"{"temprature": 2}"#, "unknown field `temprature`"),
        (r#"{"divergence": "kl"}"#, "unknown variant `kl`"),
        (r#"{"easy": {"tkd": "half", "dkd": 1}}"#, "untagged"),
    ] {
        let error = read(text).unwrap_err();
        assert!(error.contains(part), "{text}: {error}");
    }
}
