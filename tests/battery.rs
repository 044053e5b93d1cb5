//! The CPU backend, through its public API, against float64.

use atkd::battery::{self, Bounds};

#[test]
fn cpu() {
    battery::assert_all_pass(&battery::run(Bounds::Cpu, atkd::cpu::forward_backward, |_| {}));
}

#[test]
fn reference() {
    battery::assert_all_pass(&battery::run(Bounds::Cpu, battery::reference_backend, |_| {}));
}
