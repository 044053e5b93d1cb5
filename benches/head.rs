//! The loss from hidden states and weights, with the student's gradients, against the bare products: both models' logits
//! and the two products for the gradients, by the same gemm on all of rayon's threads.
//!
//! `cargo bench --bench head --features head`. The last lines give the ratios; and, on Linux, the peak of the memory that a
//! call takes beside its inputs and gradients, of 2048 tokens of 64000 logits in bfloat16, which would take 524 MB.

use std::time::{Duration, Instant};

use atkd::head::{self, Chunks, Gradients, Layer};
use atkd::{Objective, cpu::Session};
use criterion::{Criterion, criterion_group, criterion_main};
use gemm::Parallelism;
use half::bf16;

const TOKENS: usize = 512;
const VOCAB: usize = 32_000;
const FEATURES: usize = 512;

fn numbers(count: usize, scale: f32, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..count).map(|_| scale * ((0..4).map(|_| random.f32()).sum::<f32>() - 2.0)).collect()
}

/// A contiguous matrix, or its transpose: rows, columns, and the strides of both.
type Matrix<'a> = (&'a [f32], [usize; 2], [usize; 2]);

fn row_major(of: &[f32], rows: usize, columns: usize) -> Matrix<'_> {
    (of, [rows, columns], [columns, 1])
}

fn transposed(of: &[f32], rows: usize, columns: usize) -> Matrix<'_> {
    (of, [columns, rows], [1, columns])
}

/// Writes the product of two matrices.
fn multiply(to: &mut [f32], (left, [m, k], left_strides): Matrix, right: Matrix) {
    let (right, [depth, n], right_strides) = right;
    assert!(depth == k && to.len() == m * n && left.len() == m * k && right.len() == k * n);
    let [left_row, left_column] = left_strides.map(|stride| stride as isize);
    let [right_row, right_column] = right_strides.map(|stride| stride as isize);
    // SAFETY: the three are contiguous matrices of these shapes.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            to.as_mut_ptr(),
            1,
            n as isize,
            false,
            left.as_ptr(),
            left_column,
            left_row,
            right.as_ptr(),
            right_column,
            right_row,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        )
    }
}

fn against_products(c: &mut Criterion) {
    let (hidden, teacher_hidden) =
        (numbers(TOKENS * FEATURES, 1.0, 1), numbers(TOKENS * FEATURES, 1.0, 2));
    let (weight, teacher_weight) =
        (numbers(VOCAB * FEATURES, 0.1, 3), numbers(VOCAB * FEATURES, 0.1, 4));
    let labels: Vec<i64> = (0..TOKENS).map(|i| (i * 7919 % VOCAB) as i64).collect();
    let mut of_hidden = vec![0.0_f32; hidden.len()];
    let mut of_weight = vec![0.0_f32; weight.len()];
    let mut logits = vec![0.0_f32; TOKENS * VOCAB];
    let mut gradient = vec![0.0_f32; TOKENS * VOCAB];

    let mut products = || {
        for (hidden, weight, to) in
            [(&teacher_hidden, &teacher_weight, &mut logits), (&hidden, &weight, &mut gradient)]
        {
            let hidden = row_major(hidden, TOKENS, FEATURES);
            multiply(to, hidden, transposed(weight, VOCAB, FEATURES));
        }
        let of_tokens = row_major(&gradient, TOKENS, VOCAB);
        multiply(&mut of_hidden, of_tokens, row_major(&weight, VOCAB, FEATURES));
        let of_words = transposed(&gradient, TOKENS, VOCAB);
        multiply(&mut of_weight, of_words, row_major(&hidden, TOKENS, FEATURES));
    };
    let (mut to_hidden, mut to_weight) = (vec![0.0_f32; hidden.len()], vec![0.0; weight.len()]);
    let mut loss = |chunks| {
        let session = Session::begin(&Objective::default(), &labels, VOCAB).unwrap();
        let student = Layer::new(&hidden, &weight, FEATURES).unwrap();
        let teacher = Layer::new(&teacher_hidden, &teacher_weight, FEATURES).unwrap();
        let gradients = Gradients {
            hidden: Some((&mut to_hidden).into()),
            weight: Some(&mut to_weight),
            bias: None,
        };
        head::loss(session, &student, &teacher, chunks, gradients).unwrap();
    };

    let chunks = [Chunks::default(), Chunks::Tokens(256), Chunks::Tokens(128)];
    let mut group = c.benchmark_group(format!("{TOKENS} x {VOCAB} F32, hidden size {FEATURES}"));
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    group.bench_function("bare products", |b| b.iter(&mut products));
    for chunks in chunks {
        group.bench_function(format!("{chunks:?}"), |b| b.iter(|| loss(chunks)));
    }
    group.finish();

    // They run in turn: what else the machine does falls on all alike.
    let time = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    let mut times = vec![Vec::new(); 1 + chunks.len()];
    for _ in 0..9 {
        times[0].push(time(&mut products));
        for (times, chunks) in times[1..].iter_mut().zip(chunks) {
            times.push(time(&mut || loss(chunks)));
        }
    }
    let median = |times: &Vec<f64>| {
        let mut times = times.clone();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let bare = median(&times[0]);
    println!("bare products: {:.0} ms on {} threads", bare * 1e3, rayon::current_num_threads());
    for (times, chunks) in times[1..].iter().zip(chunks) {
        let time = median(times);
        println!("{chunks:?}: {:.0} ms, {:.2} times the bare products", time * 1e3, time / bare);
    }
}

/// A number of bytes that the system keeps of this process.
fn status(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}

fn memory(_: &mut Criterion) {
    let (tokens, vocab, features, chunk) = (2048, 64_000, 64, 128);
    let half = |count, scale, seed| -> Vec<bf16> {
        numbers(count, scale, seed).into_iter().map(bf16::from_f32).collect()
    };
    let (hidden, teacher_hidden) =
        (half(tokens * features, 1.0, 1), half(tokens * features, 1.0, 2));
    let (weight, teacher_weight) = (half(vocab * features, 0.2, 3), half(vocab * features, 0.2, 4));
    let labels: Vec<i64> = (0..tokens).map(|i| (i * 7919 % vocab) as i64).collect();
    let student = Layer::new(&hidden, &weight, features).unwrap();
    let teacher = Layer::new(&teacher_hidden, &teacher_weight, features).unwrap();
    // The system gives their memory only when they are written.
    let mut of_hidden = vec![bf16::ONE; hidden.len()];
    let mut of_weight = vec![1.0_f32; weight.len()];
    let session = Session::begin(&Objective::default(), &labels, vocab).unwrap();
    let gradients = Gradients {
        hidden: Some((&mut of_hidden).into()),
        weight: Some(&mut of_weight),
        bias: None,
    };
    if std::fs::write("/proc/self/clear_refs", "5").is_err() {
        return;
    }
    let Some(before) = status("VmRSS") else { return };
    head::loss(session, &student, &teacher, Chunks::Tokens(chunk), gradients).unwrap();
    let peak = status("VmHWM").unwrap_or(0) - before;
    println!(
        "{tokens} x {vocab} BF16 in chunks of {chunk}: {:.0} MB at the peak",
        peak as f64 / 1e6
    );
}

criterion_group!(benches, against_products, memory);
criterion_main!(benches);
