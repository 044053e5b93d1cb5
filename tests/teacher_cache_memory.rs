//! A writer's memory is of one push, however many tokens there are, and a reader's is of the rows that it returns.

mod counting_allocator;

use std::time::Instant;

use atkd::Dtype;
use atkd::teacher_cache::{Encoding, NewRows, Settings, TeacherCache, Writer};

#[test]
fn memory_is_of_a_push() {
    let folder = tempfile::tempdir().unwrap();
    let (k, tokens) = (64, 100);
    let settings = Settings::new(151_936, k);
    let indices: Vec<i32> = (0..tokens * k).map(|i| (i * 7 % 151_936) as i32).collect();
    let log_probs: Vec<f32> = (0..tokens * k).map(|i| -5.0 - (i % k) as f32 * 0.1).collect();
    let rows = NewRows {
        indices: &indices,
        log_probs: &log_probs,
        target_log_prob: &vec![-9.0; tokens],
        tail_mass: None,
        labels: &vec![151_935; tokens],
        rounding: Dtype::F32,
    };
    let write = |pushes: usize| {
        let path = folder.path().join(pushes.to_string());
        // A last shard that is not full, so that columns move.
        let writer = Writer::open(&path, &settings).unwrap();
        let mut writer = writer.with_shard_tokens(pushes * tokens * 2 / 3).unwrap();
        counting_allocator::peak(|| {
            (0..pushes).for_each(|_| writer.push(&rows).unwrap());
            writer.finish().unwrap();
        })
    };
    let (few, many) = (write(10), write(300));
    let bytes = 300 * tokens * settings.bytes_per_token();
    println!("{few} and {many} bytes for 1000 and 30000 tokens, which are {bytes} bytes on disk");
    assert!(many < few + 10_000 && bytes > 5 * many, "{few} {many} {bytes}");

    let cache = TeacherCache::open(folder.path().join("300")).unwrap();
    let of_rows = 500 * (8 * k + 12);
    let read = counting_allocator::peak(|| drop(cache.read(19_800..20_300).unwrap()));
    assert!(read < of_rows + 20_000, "{read} bytes for rows of {of_rows}");
}

/// `cargo test --release --features teacher-cache --test teacher_cache_memory -- --ignored --nocapture`
#[test]
#[ignore = "writes half a gigabyte, for its speed"]
fn a_million_tokens() {
    let (vocab, k, piece, tokens) = (151_936, 64, 1000, 1_000_000);
    let mut random = fastrand::Rng::with_seed(1);
    let (mut indices, mut log_probs) = (Vec::new(), Vec::new());
    for _ in 0..piece {
        let start = random.i32(0..100_000);
        indices.extend((0..k as i32).map(|i| start + 800 * i));
        let logits: Vec<f64> = (0..k).map(|_| -8.0 * random.f64()).collect();
        let mass: f64 = logits.iter().map(|z| z.exp()).sum();
        log_probs.extend(logits.iter().map(|z| (z - mass.ln() - 0.1) as f32));
    }
    for encoding in Encoding::ALL {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings { encoding, ..Settings::new(vocab, k) };
        let start = Instant::now();
        let write = counting_allocator::peak(|| {
            let mut writer = Writer::open(folder.path(), &settings).unwrap();
            for _ in 0..tokens / piece {
                let rows = NewRows {
                    indices: &indices,
                    log_probs: &log_probs,
                    target_log_prob: &[-9.0; 1000],
                    tail_mass: None,
                    labels: &[151_935; 1000],
                    rounding: Dtype::F32,
                };
                writer.push(&rows).unwrap();
            }
            writer.finish().unwrap();
        });
        let written = start.elapsed().as_secs_f64();
        let cache = TeacherCache::open(folder.path()).unwrap();
        let start = Instant::now();
        let read = counting_allocator::peak(|| {
            for first in (0..tokens).step_by(2048) {
                let rows = cache.read(first..tokens.min(first + 2048)).unwrap();
                assert!(rows.tail_mass[0] > 0.0);
            }
        });
        let read_in = start.elapsed().as_secs_f64();
        let shards = 0..cache.shards();
        let lengths = shards.map(|shard| {
            let name = format!("teacher-{shard:05}.safetensors");
            std::fs::metadata(folder.path().join(name)).unwrap().len()
        });
        println!(
            "{}: {:.1} bytes a token on disk in {} shards; written in {written:.1} s with {write} bytes, read in {read_in:.1} s with {read} bytes",
            encoding.name(),
            lengths.sum::<u64>() as f64 / tokens as f64,
            cache.shards(),
        );
    }
}
