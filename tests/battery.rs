//! The CPU backend, through its public API, against float64.

use atkd::battery;

#[test]
fn cpu() {
    battery::assert_all_pass(&battery::run(atkd::cpu::forward_backward, |_| {}));
}

#[test]
fn reference() {
    battery::assert_all_pass(&battery::run(battery::reference_backend, |_| {}));
}
