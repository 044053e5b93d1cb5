//! The CUDA kernels for shards of the vocabulary, run by the simulator: against float64, and rank against rank.

mod simulated;
#[path = "simulated/shards.rs"]
mod stages;

use std::cell::Cell;

use atkd::simt::{Extra, Simulation};
use atkd::{
    Batch, Divergence, Dtype, Error, Logits, LogitsMut, Objective, Output, Reduction, Target,
    battery, reference,
};
use half::bf16;
use simulated::Input;
use stages::Shards;

/// Shards of uneven widths, some of them empty; so many in turn that types and settings, which repeat by threes and fives, meet
/// them all.
const WIDTHS: [&[usize]; 4] = [&[3, 1], &[2, 0, 5], &[3, 1, 0, 5, 2, 1, 4, 7], &[1]];

fn small(seed: u64) -> Simulation {
    Simulation { seed, block: 32, ..Simulation::default() }
}

#[test]
fn shards_pass_the_battery() {
    let turn = Cell::new(0);
    let backend = |objective: &Objective, batch: &Batch, student: Logits, mut to: LogitsMut| {
        let turn = turn.replace(turn.get() + 1);
        let simulation = Simulation { cluster: 1 + turn as u32 / 4 % 2, ..small(turn as u64) };
        Shards::new(simulation, objective, batch, student, WIDTHS[turn % 4]).run(&mut to)
    };
    let checks = battery::run(battery::Bounds::Kernels, backend, |_| {});
    battery::assert_all_pass(&checks);
}
