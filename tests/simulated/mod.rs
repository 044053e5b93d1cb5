//! The tests of the simulated kernels share an input, and the ways to run it.

#![allow(dead_code, reason = "each test binary uses a part")]

use atkd::plan::{Preference, RowKernel};
use atkd::simt::{Extra, Simulation, Traffic};
use atkd::{Batch, Logits, LogitsMut, Objective, Output, cpu};
use half::bf16;

pub fn preferring(row_kernel: RowKernel, team: u32) -> Simulation {
    let preferred = Some(Preference { row_kernel, team });
    Simulation { preferred, ..Simulation::default() }
}

/// Rows in the shared memory of few teams, each of which has many to do.
pub fn pipelined(team: u32, teams: u32) -> Simulation {
    pipelined_by(RowKernel::Pipelined, team, teams)
}

pub fn pipelined_by(row_kernel: RowKernel, team: u32, teams: u32) -> Simulation {
    let mut simulation = preferring(row_kernel, team);
    simulation.device.multiprocessors = 1;
    simulation.device.pipelined_blocks = team * teams;
    simulation.device.pipelined_wide_blocks = team * teams;
    // However large, so that small teams hold large rows too.
    simulation.device.shared_bytes = 16 << 20;
    simulation
}

/// Rows read twice by few teams, each of which has many to do.
pub fn in_teams(team: u32, teams: u32) -> Simulation {
    let preferred = Some(Preference { row_kernel: RowKernel::Stream, team });
    let mut simulation = Simulation { preferred, ..Simulation::default() };
    simulation.device.pipelined_blocks = 0;
    simulation.device.pipelined_wide_blocks = 0;
    simulation.device.multiprocessors = (team * teams).div_ceil(2);
    simulation
}

#[derive(Clone)]
pub struct Input {
    pub tokens: usize,
    pub vocab: usize,
    pub teacher: Vec<bf16>,
    pub student: Vec<bf16>,
    pub labels: Vec<i64>,
}

impl Input {
    pub fn new(tokens: usize, vocab: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(9);
        let mut logits = || -> Vec<bf16> {
            (0..tokens * vocab).map(|_| bf16::from_f32(9.0 * random.f32())).collect()
        };
        let (teacher, student) = (logits(), logits());
        let labels = (0..tokens).map(|i| (i * 7919 % vocab) as i64).collect();
        Self { tokens, vocab, teacher, student, labels }
    }

    pub fn view<'a>(&self, logits: &'a [bf16]) -> Logits<'a> {
        Logits::new(logits, self.tokens, self.vocab).unwrap()
    }

    pub fn batch(&self) -> Batch<'_> {
        Batch::new(self.view(&self.teacher), &self.labels).unwrap()
    }

    pub fn run(
        &self,
        simulation: Simulation,
        objective: &Objective,
        extra: Extra,
    ) -> (Output, Vec<bf16>, Traffic) {
        self.run_batch(simulation, objective, &self.batch(), extra)
    }

    pub fn run_batch(
        &self,
        simulation: Simulation,
        objective: &Objective,
        batch: &Batch,
        extra: Extra,
    ) -> (Output, Vec<bf16>, Traffic) {
        let mut gradient = vec![bf16::NAN; self.tokens * self.vocab];
        let mut to = LogitsMut::new(&mut gradient, self.tokens, self.vocab).unwrap();
        let student = self.view(&self.student);
        let (output, traffic) =
            simulation.run(objective, batch, student, Some(&mut to), extra).unwrap();
        (output, gradient, traffic)
    }

    /// Against the CPU.
    pub fn check(&self, objective: &Objective, (output, gradient): &(Output, Vec<bf16>)) {
        let mut expected = vec![bf16::NAN; self.tokens * self.vocab];
        let to = LogitsMut::new(&mut expected, self.tokens, self.vocab).unwrap();
        let student = self.view(&self.student);
        let by_cpu = cpu::forward_backward(objective, &self.batch(), student, to).unwrap();
        approx::assert_relative_eq!(output.loss, by_cpu.loss, max_relative = 1e-6);
        for (i, (&actual, &expected)) in gradient.iter().zip(&expected).enumerate() {
            let (actual, expected) = (actual.to_f32(), expected.to_f32());
            assert!(
                (actual - expected).abs() <= 0.01 * expected.abs() + 1e-9,
                "{i}: {actual} {expected}"
            );
        }
    }
}

/// Every row is read twice, by such blocks and clusters.
pub fn streamed(block: u32, cluster: u32, seed: u64) -> Simulation {
    let mut simulation = Simulation { block, cluster, seed, ..preferring(RowKernel::Stream, 0) };
    // No cache to speak of, so that every row long enough is a whole cluster's.
    simulation.device.l2_bytes = 1;
    simulation
}

/// Bytes that `kernel` read from and wrote to `buffer`, and how many accesses that took.
pub fn counts(traffic: &Traffic, kernel: &str, buffer: &str) -> (u64, u64, u64) {
    let (_, buffers) = traffic.iter().find(|(name, _)| *name == kernel).expect("it was launched");
    let buffer = buffers.iter().find(|b| b.name() == buffer).expect("it was given");
    (buffer.read, buffer.written, buffer.accesses)
}

/// The bytes alone.
pub fn bytes(traffic: &Traffic, kernel: &str, buffer: &str) -> (u64, u64) {
    let (read, written, _) = counts(traffic, kernel, buffer);
    (read, written)
}
