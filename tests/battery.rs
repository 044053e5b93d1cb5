//! The CPU backend, through its public API, against float64.

use atkd::battery;

fn assert_all_pass(checks: &[battery::Check]) {
    let failed: Vec<String> = checks
        .iter()
        .filter(|check| !check.passed())
        .map(|check| {
            format!(
                "{} / {}: {:.3} of the bound, {}",
                check.group, check.case, check.worst, check.detail
            )
        })
        .collect();
    let shown = failed.iter().take(40).cloned().collect::<Vec<_>>().join("\n");
    assert!(failed.is_empty(), "{} of {} cases failed:\n{shown}", failed.len(), checks.len());
}

#[test]
fn cpu() {
    assert_all_pass(&battery::run(atkd::cpu::forward_backward, |_| {}));
}

#[test]
fn reference() {
    assert_all_pass(&battery::run(battery::reference_backend, |_| {}));
}
