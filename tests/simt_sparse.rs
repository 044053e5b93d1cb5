//! The kernels of sparse teachers, run by the simulator.

mod simulated;

use std::cell::Cell;

use atkd::battery::{self, Bounds};
use atkd::simt::{Extra, Simulation};
use atkd::{
    Batch, Divergence, Error, Logits, LogitsMut, Objective, Output, SparseTeacher, Tail, cpu,
};
use half::bf16;
use simulated::{bytes, counts};

/// Each case by a schedule of its own. Tail uniform, which kernels do not have, is the CPU's.
#[test]
fn the_kernels_pass_the_battery() {
    let (turn, uniform) = (Cell::new(0), Cell::new(0));
    let backend = |objective: &Objective, batch: &Batch, student: Logits, mut to: LogitsMut| {
        let seed = turn.replace(turn.get() + 1);
        let simulation = Simulation { seed, ..Simulation::default() };
        match simulation.run(objective, batch, student, Some(&mut to), Extra::default()) {
            Err(Error::NoUniformTail) => {
                uniform.set(uniform.get() + 1);
                cpu::forward_backward(objective, batch, student, to)
            }
            output => Ok(output?.0),
        }
    };
    let checks = battery::sparse::run(Bounds::Kernels, backend, |_| {});
    battery::assert_all_pass(&checks);
    assert!(turn.get() > 2 * uniform.get(), "{} of {} cases", uniform.get(), turn.get());
}

/// Tokens with a teacher of the likeliest tokens of random logits, and a student of float32.
struct Input {
    vocab: usize,
    top_k: usize,
    indices: Vec<i32>,
    log_probs: Vec<f32>,
    of_targets: Vec<f32>,
    labels: Vec<i64>,
    student: Vec<f32>,
}

impl Input {
    fn new(tokens: usize, vocab: usize, top_k: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(vocab as u64);
        let labels = (0..tokens).map(|i| (i * 7919 % vocab) as i64).collect();
        let (mut indices, mut log_probs) = (Vec::new(), Vec::new());
        for _ in 0..tokens {
            // Different tokens, most of whose probability they have.
            let step = vocab / top_k;
            let first = random.usize(..step);
            indices.extend((0..top_k).map(|k| (first + k * step) as i32));
            log_probs.extend((0..top_k).map(|_| -(1.5 * top_k as f32).ln() - random.f32()));
        }
        Self {
            vocab,
            top_k,
            indices,
            log_probs,
            of_targets: vec![-3.0; tokens],
            labels,
            student: (0..tokens * vocab).map(|_| 9.0 * random.f32()).collect(),
        }
    }

    fn batch(&self, tail: Tail) -> Batch<'_> {
        let tokens = self.labels.len();
        let teacher =
            SparseTeacher::new(&self.indices, &self.log_probs, tokens, self.top_k, self.vocab);
        let teacher = teacher.and_then(|teacher| teacher.with_target_log_probs(&self.of_targets));
        Batch::new(teacher.unwrap().with_tail(tail), &self.labels).unwrap()
    }

    fn view(&self) -> Logits<'_> {
        Logits::new(&self.student, self.labels.len(), self.vocab).unwrap()
    }

    fn by(&self, simulation: Simulation, objective: &Objective, tail: Tail) -> (Output, Vec<f32>) {
        let mut gradient = vec![f32::NAN; self.student.len()];
        let mut to = LogitsMut::new(&mut gradient, self.labels.len(), self.vocab).unwrap();
        let batch = self.batch(tail);
        let run = simulation.run(objective, &batch, self.view(), Some(&mut to), Extra::default());
        (run.unwrap().0, gradient)
    }

    /// Against the CPU.
    fn check(&self, simulation: Simulation, objective: &Objective, tail: Tail) {
        let (output, gradient) = self.by(simulation, objective, tail);
        let mut expected = vec![f32::NAN; self.student.len()];
        let to = LogitsMut::new(&mut expected, self.labels.len(), self.vocab).unwrap();
        let batch = self.batch(tail);
        let by_cpu = cpu::forward_backward(objective, &batch, self.view(), to).unwrap();
        approx::assert_relative_eq!(output.loss, by_cpu.loss, max_relative = 2e-6);
        let hard = |output: &Output| Vec::from_iter(output.tokens.iter().map(|token| token.hard));
        assert_eq!(hard(&output), hard(&by_cpu));
        let largest = expected.iter().fold(0.0_f32, |largest, g| largest.max(g.abs()));
        for (i, (actual, expected)) in gradient.iter().zip(&expected).enumerate() {
            let allowed = 4e-6 * largest;
            assert!((actual - expected).abs() <= allowed, "{i}: {actual} {expected}");
        }
    }
}

fn objectives() -> [Objective; 3] {
    let jsd = Divergence::Jsd { beta: 0.5 };
    [
        Objective::default(),
        Objective::default().with_divergence(jsd).unwrap(),
        Objective::kl().with_temperature(2.0).and_then(|o| o.with_ce_weight(0.3)).unwrap(),
    ]
}

/// Rows that a block holds, that a cluster does, and that are longer than either, on devices with clusters and without.
#[test]
fn rows_of_any_length() {
    let without_clusters = || {
        let mut simulation = Simulation::default();
        simulation.device.pipelined_blocks = 0;
        simulation.device.pipelined_wide_blocks = 0;
        simulation
    };
    for (vocab, top_k, simulation) in [
        (30_011, 64, Simulation::default()),
        (151_936, 64, Simulation::default()),
        (40_009, 1024, without_clusters()),
        (150_001, 5, without_clusters()),
        (300_001, 1024, Simulation::default()),
    ] {
        let input = Input::new(2, vocab, top_k);
        for (i, objective) in objectives().iter().enumerate() {
            let tail = if i == 1 { Tail::Zero } else { Tail::Bucket };
            input.check(Simulation { seed: i as u64, ..simulation }, objective, tail);
        }
    }
}

/// The budget: each logit of the student is read once and its gradient written once, and those of known tokens once more.
/// Nothing of the size of the logits is read or written besides.
#[test]
fn two_volumes() {
    for (vocab, top_k) in [(4096, 64), (128_256, 64)] {
        let input = Input::new(3, vocab, top_k);
        let student: Vec<bf16> = input.student.iter().map(|&z| bf16::from_f32(z)).collect();
        let mut gradient = vec![bf16::NAN; student.len()];
        let (volume, known) = (2 * student.len() as u64, 3 * (top_k as u64 + 1));
        let mut over = student.clone();
        let objective = Objective::default();
        for in_place in [false, true] {
            let (simulation, batch) = (Simulation::default(), input.batch(Tail::Bucket));
            let extra = Extra::default();
            let (_, traffic) = if in_place {
                let mut student = LogitsMut::new(&mut over, 3, vocab).unwrap();
                simulation.run_in_place(&objective, &batch, &mut student, extra).unwrap()
            } else {
                let mut to = LogitsMut::new(&mut gradient, 3, vocab).unwrap();
                let student = Logits::new(&student, 3, vocab).unwrap();
                simulation.run(&objective, &batch, student, Some(&mut to), extra).unwrap()
            };
            let names: Vec<_> = traffic.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, ["sparse_margin", "select_hard", "row_sparse_bf16", "token_terms"]);
            let to = if in_place { "student" } else { "gradient" };
            let (read, _) = bytes(&traffic, "row_sparse_bf16", "student");
            // Every lane of a warp reads the target's.
            assert!(read >= volume && read <= volume + 2 * known + 3 * 64, "{read} of {volume}");
            assert_eq!(bytes(&traffic, "row_sparse_bf16", to).1, volume + 2 * known);
            // 16 bytes at a time, but for the known tokens.
            let (read, written, accesses) = counts(&traffic, "row_sparse_bf16", to);
            assert!(accesses <= (read + written) / 16 + 2 * known + 3 * 32, "{accesses}");
            for name in ["sparse_margin", "select_hard", "token_terms"] {
                assert_eq!(bytes(&traffic, name, "student"), (0, 0), "{name}");
            }
        }
        assert!(over == gradient);
    }
}

/// The schedule changes no bit, and a warp or a cluster more none of the selection's.
#[test]
fn the_schedule_changes_no_bit() {
    let input = Input::new(3, 70_001, 100);
    for objective in objectives() {
        let run = |seed| {
            let simulation = Simulation { seed, ..Simulation::default() };
            let (output, gradient) = input.by(simulation, &objective, Tail::Bucket);
            (output.loss.to_bits(), gradient)
        };
        let first = run(1);
        for seed in 2..5 {
            assert!(run(seed) == first);
        }
    }
}

/// Tokens whose teacher is no distribution have a gradient of NaN, and the call an error; the other tokens' gradient is theirs.
/// A row without mass by tail zero, one without draws, one of the whole vocabulary with too little.
#[test]
fn masses_that_no_tail_completes() {
    let objective = Objective::default();
    for (tail, vocab, of_target) in [
        (Tail::Zero, 1000, f32::NEG_INFINITY),
        (Tail::Sampled, 1000, -2.0),
        (Tail::Bucket, 8, -3.0),
    ] {
        let mut input = Input::new(3, vocab, 8);
        if tail == Tail::Bucket {
            for token in [0, 2] {
                input.of_targets[token] = -8_f32.ln();
                input.log_probs[8 * token..][..8].fill(-8_f32.ln());
            }
        } else {
            input.log_probs[8..16].fill(f32::NEG_INFINITY);
        }
        input.of_targets[1] = of_target;
        let batch = input.batch(tail);
        let run =
            Simulation::default().run(&objective, &batch, input.view(), None, Extra::default());
        assert_eq!(run.unwrap_err(), Error::DeviceTeacher { token: 1, vocab }, "{tail:?}");
        assert!(cpu::forward(&objective, &batch, input.view()).is_err(), "{tail:?}");
    }
}

#[test]
fn mistakes_are_nan() {
    let vocab = 1000;
    let spoil: [fn(&mut Input); 6] = [
        |input| input.indices[8] = 1000,
        |input| input.indices[15] = -2,
        |input| input.indices[9] = input.indices[8],
        |input| input.log_probs[12] = f32::NAN,
        |input| (input.log_probs[8], input.log_probs[9]) = (0.0, -0.1),
        |input| input.of_targets[1] = 0.5,
    ];
    for (i, spoil) in spoil.iter().enumerate() {
        for objective in objectives() {
            let mut input = Input::new(3, vocab, 8);
            spoil(&mut input);
            let mut gradient = vec![0.0_f32; 3 * vocab];
            let mut to = LogitsMut::new(&mut gradient, 3, vocab).unwrap();
            let (simulation, batch) = (Simulation::default(), input.batch(Tail::Bucket));
            let run =
                simulation.run(&objective, &batch, input.view(), Some(&mut to), Extra::default());
            assert_eq!(run.unwrap_err(), Error::DeviceTeacher { token: 1, vocab }, "mistake {i}");
            for (token, row) in gradient.chunks(vocab).enumerate() {
                assert!(
                    row.iter().all(|g| g.is_nan() == (token == 1)),
                    "mistake {i}, token {token}"
                );
            }
        }
    }
}
