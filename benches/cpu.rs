//! The fused CPU loss and gradient against the unfused baseline, at two real vocabularies.
//!
//! `cargo bench --bench cpu`. Throughput counts three volumes (teacher and student read, gradient
//! written), whatever a variant really moves; the last lines give the ratios. Then each divergence over the whole
//! vocabulary, beside forward KL.

use std::time::{Duration, Instant};

use atkd::{Batch, Divergence, Logits, LogitsMut, Objective, cpu, unfused};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;

fn logits(count: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..count).map(|_| 6.0 * ((0..4).map(|_| random.f32()).sum::<f32>() - 2.0)).collect()
}

/// The median of a few runs.
fn median(runs: usize, mut work: impl FnMut()) -> Duration {
    let mut times: Vec<Duration> = (0..runs + 1)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed()
        })
        .skip(1)
        .collect();
    times.sort();
    times[runs / 2]
}

fn compare(c: &mut Criterion) {
    let objective = Objective::default();
    let mut ratios = Vec::new();
    for (tokens, vocab) in [(256, 32_000), (128, 128_256)] {
        let (teacher, student) = (logits(tokens * vocab, 1), logits(tokens * vocab, 2));
        let narrow = |v: &[f32]| -> Vec<bf16> { v.iter().map(|&z| bf16::from_f32(z)).collect() };
        let (teacher_half, student_half) = (narrow(&teacher), narrow(&student));
        let labels: Vec<usize> = (0..tokens).map(|i| i * 7919 % vocab).collect();
        let wide: Vec<i64> = labels.iter().map(|&label| label as i64).collect();

        macro_rules! dtype {
            ($name:literal, $teacher:expr, $student:expr, $zero:expr, $unfused:path) => {{
                let view = |v| Logits::new(v, tokens, vocab).unwrap();
                let batch = Batch::new(view($teacher), &wide).unwrap();
                let mut gradient = vec![$zero; tokens * vocab];
                let mut student = $student.clone();
                let mut group = c.benchmark_group(format!("{tokens} x {vocab} {}", $name));
                group.throughput(Throughput::Bytes(3 * size_of_val(&student[..]) as u64));
                group.sample_size(20).measurement_time(Duration::from_secs(2));
                let mut fused = || {
                    let gradient = LogitsMut::new(&mut gradient, tokens, vocab).unwrap();
                    cpu::forward_backward(&objective, &batch, view($student), gradient).unwrap();
                };
                group.bench_function("fused", |b| b.iter(&mut fused));
                let fused = median(9, &mut fused);
                group.bench_function("fused in place", |b| {
                    b.iter(|| {
                        let student = LogitsMut::new(&mut student, tokens, vocab).unwrap();
                        cpu::forward_backward_in_place(&objective, &batch, student).unwrap()
                    })
                });
                group.bench_function("loss alone", |b| {
                    b.iter(|| cpu::forward(&objective, &batch, view($student)).unwrap())
                });
                let unfused = || $unfused($teacher, $student, &labels, vocab);
                group.sample_size(10);
                group.bench_function("unfused", |b| b.iter(unfused));
                let unfused = median(3, || drop(unfused()));
                group.finish();
                ratios.push(format!(
                    "{tokens} x {vocab} {}: fused {:.2} ms, unfused {:.1} ms, {:.1} times faster",
                    $name,
                    fused.as_secs_f64() * 1e3,
                    unfused.as_secs_f64() * 1e3,
                    unfused.as_secs_f64() / fused.as_secs_f64(),
                ));
            }};
        }
        dtype!("F32", &teacher, &student, 0.0_f32, unfused::forward_backward);
        dtype!("BF16", &teacher_half, &student_half, bf16::ZERO, unfused::forward_backward_bf16);
    }
    println!("{} on {} threads", cpu::instruction_set().unwrap(), rayon::current_num_threads());
    println!("{}", ratios.join("\n"));
}

fn divergences(c: &mut Criterion) {
    let (tokens, vocab) = (256, 32_000);
    let (teacher, student) = (logits(tokens * vocab, 1), logits(tokens * vocab, 2));
    let labels: Vec<i64> = (0..tokens).map(|i| (i * 7919 % vocab) as i64).collect();
    let view = |v| Logits::new(v, tokens, vocab).unwrap();
    let batch = Batch::new(view(&teacher[..]), &labels).unwrap();
    let mut gradient = vec![0.0_f32; tokens * vocab];
    let mut group = c.benchmark_group(format!("{tokens} x {vocab} F32, plain"));
    group.throughput(Throughput::Bytes(3 * size_of_val(&student[..]) as u64));
    group.sample_size(20).measurement_time(Duration::from_secs(2));
    let mut forward_kl = None;
    let mut ratios = Vec::new();
    for (name, divergence) in [
        ("forward KL", Divergence::ForwardKl),
        ("reverse KL", Divergence::ReverseKl),
        ("JSD(0.5)", Divergence::Jsd { beta: 0.5 }),
        ("skew KL(0.1)", Divergence::SkewKl { alpha: 0.1 }),
        ("total variation", Divergence::TotalVariation),
    ] {
        let objective = Objective::plain().with_divergence(divergence).unwrap();
        let mut call = || {
            let gradient = LogitsMut::new(&mut gradient, tokens, vocab).unwrap();
            cpu::forward_backward(&objective, &batch, view(&student[..]), gradient).unwrap();
        };
        group.bench_function(name, |b| b.iter(&mut call));
        let time = median(25, call).as_secs_f64();
        let times = time / *forward_kl.get_or_insert(time);
        ratios.push(format!("{name}: {:.2} ms, {times:.2} times forward KL", time * 1e3));
    }
    group.finish();
    println!("{}", ratios.join("\n"));
}

criterion_group!(benches, compare, divergences);
criterion_main!(benches);
