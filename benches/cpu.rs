//! The fused CPU loss and gradient against the unfused baseline, at two real vocabularies.
//!
//! `cargo bench --bench cpu`. Throughput counts three volumes (teacher and student read, gradient
//! written), whatever a variant really moves; the last lines give the ratios. Then each divergence over the whole
//! vocabulary, beside forward KL, and sparse teachers beside the logits of the whole vocabulary.

use std::time::{Duration, Instant};

use atkd::{Batch, Divergence, Logits, LogitsMut, Objective, SparseTeacher, Tail, cpu, unfused};
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

/// The likeliest tokens of each row of a teacher, its log-probabilities, and those of the targets.
type Likeliest = (Vec<i32>, Vec<f32>, Vec<f32>);

fn likeliest(teacher: &[f32], vocab: usize, labels: &[i64], top_k: usize) -> Likeliest {
    let (mut indices, mut log_probs, mut of_targets) = (Vec::new(), Vec::new(), Vec::new());
    for (row, &label) in teacher.chunks(vocab).zip(labels) {
        let log_sum = row.iter().map(|&z| f64::from(z).exp()).sum::<f64>().ln();
        let mut order: Vec<usize> = (0..vocab).collect();
        order.select_nth_unstable_by(top_k, |&i, &j| row[j].total_cmp(&row[i]));
        order[..top_k].sort_by(|&i, &j| row[j].total_cmp(&row[i]));
        indices.extend(order[..top_k].iter().map(|&j| j as i32));
        log_probs.extend(order[..top_k].iter().map(|&j| (f64::from(row[j]) - log_sum) as f32));
        of_targets.push((f64::from(row[label as usize]) - log_sum) as f32);
    }
    (indices, log_probs, of_targets)
}

fn sparse_teacher(
    (indices, log_probs, of_targets): &Likeliest,
    vocab: usize,
    tail: Tail,
) -> SparseTeacher<'_> {
    let tokens = of_targets.len();
    let top_k = indices.len() / tokens;
    let teacher = SparseTeacher::new(indices, log_probs, tokens, top_k, vocab).unwrap();
    teacher.with_target_log_probs(of_targets).unwrap().with_tail(tail)
}

fn sparse(c: &mut Criterion) {
    let (tokens, vocab) = (256, 32_000);
    let (teacher, student) = (logits(tokens * vocab, 1), logits(tokens * vocab, 2));
    let labels: Vec<i64> = (0..tokens).map(|i| (i * 7919 % vocab) as i64).collect();
    let view = |v| Logits::new(v, tokens, vocab).unwrap();
    let kept = [64, 1024].map(|top_k| likeliest(&teacher, vocab, &labels, top_k));
    let sparse = |kept, tail| Batch::new(sparse_teacher(kept, vocab, tail), &labels).unwrap();
    let mut gradient = vec![0.0_f32; tokens * vocab];
    let mut call = |batch: &Batch| {
        let gradient = LogitsMut::new(&mut gradient, tokens, vocab).unwrap();
        cpu::forward_backward(&Objective::default(), batch, view(&student), gradient).unwrap();
    };
    let dense = Batch::new(view(&teacher), &labels).unwrap();
    let variants = [
        ("dense", dense),
        ("K = 64, bucket", sparse(&kept[0], Tail::Bucket)),
        ("K = 64, uniform", sparse(&kept[0], Tail::Uniform)),
        ("K = 1024, bucket", sparse(&kept[1], Tail::Bucket)),
    ];
    let mut group = c.benchmark_group(format!("{tokens} x {vocab} F32, sparse teacher"));
    group.throughput(Throughput::Bytes(3 * size_of_val(&student[..]) as u64));
    group.sample_size(20).measurement_time(Duration::from_secs(2));
    for (name, batch) in &variants {
        group.bench_function(*name, |b| b.iter(|| call(batch)));
    }
    group.finish();

    // In turn, so that what else the machine does slows all of them.
    let mut times = variants.map(|_| Vec::new());
    for _ in 0..25 {
        for ((_, batch), times) in variants.iter().zip(&mut times) {
            let start = Instant::now();
            call(batch);
            times.push(start.elapsed());
        }
    }
    let medians = times.map(|mut times| {
        times.sort();
        times[times.len() / 2].as_secs_f64()
    });
    for ((name, _), time) in variants.iter().zip(medians) {
        println!("{name}: {:.2} ms, {:.2} times dense", time * 1e3, time / medians[0]);
    }
}

criterion_group!(benches, compare, divergences, sparse);
criterion_main!(benches);
