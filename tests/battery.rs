//! The CPU backend, through its public API, against float64.

use atkd::battery::shards::{Cpu, in_shards};
use atkd::battery::{self, Bounds};

#[test]
fn cpu() {
    battery::assert_all_pass(&battery::run(Bounds::Cpu, atkd::cpu::forward_backward, |_| {}));
}

#[test]
fn reference() {
    battery::assert_all_pass(&battery::run(Bounds::Cpu, battery::reference_backend, |_| {}));
}

/// By ranks that have some columns each, none of them all.
#[test]
fn cpu_in_shards() {
    for ranks in [2, 3, 8] {
        let checks = battery::run(
            Bounds::Cpu,
            |objective, batch, student, gradient| {
                in_shards(&Cpu, ranks, objective, batch, student, Some(gradient))
            },
            |_| {},
        );
        battery::assert_all_pass(&checks);
    }
}
