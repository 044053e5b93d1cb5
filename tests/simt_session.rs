//! A call in stages by the CUDA kernels, run by the simulator.

#[macro_use]
#[path = "stages/on_host_logits.rs"]
mod on_host_logits;
mod stages;

use atkd::plan::{Preference, RowKernel};
use atkd::simt::{self, Extra, Simulation};
use atkd::{Batch, Objective, Output, Result};
use half::bf16;
use stages::{Backend, Session, logits, logits_mut};

impl Backend for Simulation {
    fn whole(
        &self,
        objective: &Objective,
        batch: &Batch,
        student: &[bf16],
        gradient: &mut [bf16],
    ) -> Result<Output> {
        let to = &mut logits_mut(gradient);
        Ok(self.run(objective, batch, logits(student), Some(to), Extra::default())?.0)
    }

    fn begin<'a>(
        &'a self,
        objective: &Objective,
        batch: &Batch<'a>,
    ) -> Result<Box<dyn Session + 'a>> {
        Ok(Box::new(Simulation::begin(*self, objective, batch, Extra::default())?))
    }
}

on_host_logits!(simt::Session<'_>);

/// The kernels for rows, with few blocks at once, so that each has several rows of a range.
fn simulations() -> [Simulation; 3] {
    [(RowKernel::Resident, 0, 1), (RowKernel::Pipelined, 2, 1), (RowKernel::Stream, 2, 0)].map(
        |(row_kernel, team, pipelined_blocks)| {
            let preferred = Some(Preference { row_kernel, team });
            let mut simulation = Simulation { preferred, block: 32, ..Simulation::default() };
            simulation.device.multiprocessors = 4;
            simulation.device.pipelined_blocks = pipelined_blocks;
            simulation.device.pipelined_wide_blocks = pipelined_blocks;
            simulation
        },
    )
}

#[test]
fn ranges_of_any_length_come_to_the_bits_of_one_call() {
    for simulation in simulations() {
        stages::ranges_of_any_length_come_to_the_bits_of_one_call(&simulation);
    }
}

#[test]
fn margins_of_some_tokens() {
    for simulation in simulations() {
        stages::margins_of_some_tokens(&simulation);
    }
}

#[test]
fn ranges_without_gradients() {
    for simulation in simulations() {
        stages::ranges_without_gradients(&simulation);
    }
}

#[test]
fn a_batch_without_a_valid_token_has_no_loss() {
    for simulation in simulations() {
        stages::a_batch_without_a_valid_token_has_no_loss(&simulation);
    }
}

#[test]
fn stages_out_of_order_are_errors() {
    for simulation in simulations() {
        stages::stages_out_of_order_are_errors(&simulation);
    }
}

#[test]
fn gradients_wait_for_the_sizes_of_groups() {
    for simulation in simulations() {
        stages::gradients_wait_for_the_sizes_of_groups(&simulation);
    }
}
