//! The CUDA kernels, run by the simulator: against float64, whatever the schedule, within their
//! budgets of memory traffic; and the simulator, against kernels that are wrong.

use atkd::simt::machine::{Buffer, Kernel, Launch, run};
use atkd::simt::{self, Simulation, Traffic};
use atkd::{Batch, Logits, LogitsMut, Objective, Target, battery};
use half::bf16;

#[test]
fn the_kernels_pass_the_battery() {
    let checks = battery::run(simt::forward_backward, |_| {});
    let failed: Vec<String> = checks
        .iter()
        .filter(|check| !check.passed())
        .map(|check| format!("{}: {:.2} of the bound, {}", check.case, check.worst, check.detail))
        .collect();
    assert!(failed.is_empty(), "{} of {}:\n{}", failed.len(), checks.len(), failed.join("\n"));
}

struct Input {
    tokens: usize,
    vocab: usize,
    teacher: Vec<bf16>,
    student: Vec<bf16>,
    labels: Vec<i64>,
}

impl Input {
    fn new(tokens: usize, vocab: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(9);
        let mut logits = || -> Vec<bf16> {
            (0..tokens * vocab).map(|_| bf16::from_f32(9.0 * random.f32())).collect()
        };
        let (teacher, student) = (logits(), logits());
        let labels = (0..tokens).map(|i| (i * 7919 % vocab) as i64).collect();
        Self { tokens, vocab, teacher, student, labels }
    }

    fn run(&self, simulation: Simulation, objective: &Objective) -> (f64, Vec<bf16>, Traffic) {
        let view = |v| Logits::new(v, self.tokens, self.vocab).unwrap();
        let batch = Batch::new(view(&self.teacher), &self.labels).unwrap();
        let mut gradient = vec![bf16::NAN; self.tokens * self.vocab];
        let mut to = LogitsMut::new(&mut gradient, self.tokens, self.vocab).unwrap();
        let (output, traffic) =
            simulation.run(objective, &batch, view(&self.student), Some(&mut to)).unwrap();
        (output.loss, gradient, traffic)
    }
}

#[test]
fn the_schedule_changes_no_bit() {
    let input = Input::new(5, 1003);
    for objective in [Objective::default(), Objective::default().with_target(Target::Teacher)] {
        for block in [32, 96, 256] {
            let run = |seed| {
                let (loss, gradient, _) = input.run(Simulation { block, seed }, &objective);
                (loss.to_bits(), gradient)
            };
            let first = run(0);
            for seed in 1..6 {
                assert_eq!(run(seed), first, "block {block}, seed {seed}");
            }
        }
    }
}

/// Bytes that `kernel` read from and wrote to `buffer`.
fn bytes(traffic: &Traffic, kernel: &str, buffer: &str) -> (u64, u64) {
    let (_, buffers) = traffic.iter().find(|(name, _)| *name == kernel).expect("it was launched");
    let buffer = buffers.iter().find(|b| b.name() == buffer).expect("it was given");
    (buffer.read, buffer.written)
}

#[test]
fn kernels_read_and_write_what_they_should() {
    let input = Input::new(7, 4096);
    let volume = (input.tokens * input.vocab * 2) as u64;
    let simulation = Simulation { block: 128, seed: 1 };
    let (_, _, traffic) = input.run(simulation, &Objective::default());
    // Beside the rows themselves, their target once more.
    let target = 2 * input.tokens as u64;
    assert_eq!(bytes(&traffic, "teacher_margin", "teacher"), (volume + target, 0));
    assert_eq!(bytes(&traffic, "row_stream", "teacher"), (2 * volume + target, 0));
    assert_eq!(bytes(&traffic, "row_stream", "student"), (2 * volume + target, 0));
    assert_eq!(bytes(&traffic, "row_stream", "gradient"), (0, volume));
    let (read, written) = bytes(&traffic, "select_hard", "keys");
    assert_eq!((read, written), (6 * 4 * input.tokens as u64, 0));
    assert_eq!(bytes(&traffic, "select_hard", "teacher"), (0, 0));
    // What nothing depends on is not read.
    let (_, _, traffic) = input.run(simulation, &Objective::kl());
    assert!(traffic.iter().all(|(kernel, _)| *kernel != "teacher_margin"));
    assert_eq!(bytes(&traffic, "row_stream", "teacher"), (2 * volume + target, 0));
}

/// The last row starts at element 2^31: offsets of 32 bits would wrap. The memory between the rows is
/// never touched, so the machine need not have it.
#[test]
fn rows_beyond_2_31_elements() {
    use half::slice::HalfBitsSliceExt;
    let (tokens, vocab, stride) = (3, 1000, 1 << 30);
    let length = (tokens - 1) * stride + vocab;
    let small = Input::new(tokens, vocab);
    let spread = |rows: &[bf16]| -> Vec<u16> {
        let mut memory = vec![0_u16; length];
        for (i, row) in rows.chunks(vocab).enumerate() {
            memory.reinterpret_cast_mut::<bf16>()[i * stride..][..vocab].copy_from_slice(row);
        }
        memory
    };
    let (teacher, student) = (spread(&small.teacher), spread(&small.student));
    let mut gradient = vec![0_u16; length];
    let view = |memory| {
        let elements: &[bf16] = <[u16] as HalfBitsSliceExt>::reinterpret_cast(memory);
        Logits::strided(elements, tokens, vocab, stride).unwrap()
    };
    let batch = Batch::new(view(&teacher), &small.labels).unwrap();
    let objective = Objective::default();
    for backend in [simt::forward_backward, atkd::cpu::forward_backward] {
        gradient[(tokens - 1) * stride..].fill(0);
        let elements: &mut [bf16] = gradient.reinterpret_cast_mut();
        let to = LogitsMut::strided(elements, tokens, vocab, stride).unwrap();
        let output = backend(&objective, &batch, view(&student), to).unwrap();

        let near = |v| Logits::new(v, tokens, vocab).unwrap();
        let near_batch = Batch::new(near(&small.teacher), &small.labels).unwrap();
        let mut expected = vec![bf16::ZERO; tokens * vocab];
        let to = LogitsMut::new(&mut expected, tokens, vocab).unwrap();
        assert_eq!(backend(&objective, &near_batch, near(&small.student), to).unwrap(), output);
        let gradient: &[bf16] = gradient.reinterpret_cast();
        for (i, row) in expected.chunks(vocab).enumerate() {
            assert_eq!(gradient[i * stride..][..vocab], *row, "row {i}");
        }
    }
}

/// Many more tokens than threads, with many equal margins.
#[test]
fn selection_of_many_tokens() {
    for (tokens, block) in [(1, 32), (300, 1024), (4096, 256), (20_000, 32)] {
        let mut input = Input::new(tokens, 3);
        for z in &mut input.teacher {
            *z = bf16::from_f32(z.to_f32().round());
        }
        for i in (0..tokens).step_by(17) {
            input.labels[i] = -100;
        }
        let view = |v| Logits::new(v, tokens, 3).unwrap();
        let batch = Batch::new(view(&input.teacher), &input.labels).unwrap();
        for ratio in [0.03, 0.5, 0.99] {
            let objective = Objective::default().with_hard_ratio(ratio).unwrap();
            let simulation = Simulation { block, seed: 5 };
            let (output, _) =
                simulation.run(&objective, &batch, view(&input.student), None).unwrap();
            // Of the kernel's own margins, since margins that differ in float64 may not in float32.
            let margin = |i: usize| output.tokens[i].margin;
            let mut order: Vec<usize> = (0..tokens).filter(|i| i % 17 != 0).collect();
            order.sort_by(|&i, &j| margin(j).total_cmp(&margin(i)).then(i.cmp(&j)));
            order.truncate((ratio * order.len() as f64).ceil() as usize);
            order.sort();
            let hard: Vec<usize> = (0..tokens).filter(|&i| output.tokens[i].hard).collect();
            assert_eq!(hard, order, "{tokens} tokens, hard ratio {ratio}");
        }
    }
}

/// As `kernels/simt/broken.cpp` has it.
#[repr(C)]
struct Broken {
    data: *mut u32,
}

unsafe extern "C" {
    fn broken_missing_barrier(parameters: &Broken);
    fn broken_divergent_barrier(parameters: &Broken);
    fn broken_two_barriers(parameters: &Broken);
    fn broken_shuffle(parameters: &Broken);
    fn broken_read_outside(parameters: &Broken);
    fn broken_write_outside(parameters: &Broken);
    fn broken_alignment(parameters: &Broken);
    fn broken_unwritten_shared(parameters: &Broken);
    fn broken_shared_bounds(parameters: &Broken);
}

/// What two warps of a broken kernel leave behind.
fn broken(kernel: Kernel<Broken>, seed: u64) -> Result<[u32; 64], String> {
    #[repr(align(16))]
    struct Memory([u32; 64]);
    let mut memory = Memory([0; 64]);
    let parameters = Broken { data: memory.0.as_mut_ptr() };
    let mut buffers = [Buffer::output("data", &mut memory.0)];
    let launch = Launch { kernel: "broken", grid: 1, block: 64, seed };
    // SAFETY: the kernel's parameters are these.
    unsafe { run(launch, kernel, &parameters, &mut buffers)? };
    Ok(memory.0)
}

#[track_caller]
fn caught(kernel: Kernel<Broken>, words: &[&str]) {
    let message = broken(kernel, 3).expect_err("the mistake must be found");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

#[test]
fn a_missing_barrier_shows_in_the_schedule() {
    let results: Vec<_> =
        (0..4).map(|seed| broken(broken_missing_barrier, seed).unwrap()).collect();
    assert!(results.iter().any(|result| *result != results[0]));
}

#[test]
fn barriers_that_threads_never_reach() {
    caught(broken_divergent_barrier, &["block 0", "deadlock", "32 threads", "line", "ended"]);
    caught(broken_two_barriers, &["deadlock", "barrier in line"]);
    caught(broken_shuffle, &["deadlock", "rest of their warp", "2 threads (first 5) have ended"]);
}

#[test]
fn accesses_that_a_gpu_would_punish() {
    caught(broken_read_outside, &["read of 4 bytes outside", "thread 63", "byte 256 of data"]);
    caught(broken_write_outside, &["write of 4 bytes outside", "byte -", "of data"]);
    caught(broken_alignment, &["16 bytes", "no multiple of 16"]);
}

#[test]
fn shared_memory_that_nobody_wrote() {
    caught(broken_unwritten_shared, &["nobody has written", "cells[9]", "thread 9"]);
    caught(broken_shared_bounds, &["outside an array", "cells["]);
}
