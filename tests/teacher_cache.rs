//! Sparse teachers on disk: what comes back, what stays of a killed run, and that no bytes are trusted.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use atkd::Dtype;
use atkd::teacher_cache::{Encoding, Error, NewRows, Rows, Settings, TeacherCache, Writer};
use fastrand::Rng;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use tempfile::TempDir;

/// Rows to push, owned.
#[derive(Clone, Default)]
struct Given {
    indices: Vec<i32>,
    log_probs: Vec<f32>,
    target_log_prob: Vec<f32>,
    tail_mass: Vec<f32>,
    labels: Vec<i64>,
}

impl Given {
    /// Random rows of a teacher with `spread` nats between its tokens: with and without the target among the entries,
    /// some with missing entries, some to be ignored.
    fn random(settings: &Settings, tokens: usize, spread: f64, random: &mut Rng) -> Self {
        let (vocab, k) = (settings.vocab_size, settings.top_k);
        let mut rows = Self::default();
        for token in 0..tokens {
            let mut there = k.min(vocab);
            if token % 5 == 4 {
                there = random.usize(0..=there);
            }
            let mut indices: Vec<usize> = Vec::new();
            // The ends of the vocabulary are among the first rows'.
            if there > 0 && token % 3 == 0 {
                indices.push(vocab - 1);
            }
            while indices.len() < there {
                let index = random.usize(0..vocab);
                if !indices.contains(&index) {
                    indices.push(index);
                }
            }
            let label = match token % 4 {
                0 if there > 0 => indices[random.usize(0..there)] as i64,
                3 => -100,
                _ => random.usize(0..vocab) as i64,
            };
            let mut weights: Vec<f64> =
                indices.iter().map(|_| (spread * (random.f64() - 0.5)).exp()).collect();
            let among = indices.iter().position(|&index| index as i64 == label);
            let target = match among {
                Some(i) => weights[i],
                None if label >= 0 => 0.1 * (spread * (random.f64() - 0.5)).exp(),
                None => 0.0,
            };
            let others = there + usize::from(label >= 0 && among.is_none()) < vocab;
            let has_tail = others || (there == 0 && label < 0);
            let tail = if has_tail { 0.5 * random.f64() + 1e-3 } else { 0.0 };
            let mut sum = weights.iter().sum::<f64>() + tail;
            if among.is_none() {
                sum += target;
            }
            weights.resize(k, 0.0);
            let indices = indices.iter().map(|&index| index as i32);
            rows.indices.extend(indices.chain(std::iter::repeat_n(-1, k - there)));
            rows.log_probs.extend(weights.iter().map(|weight| (weight / sum).ln() as f32));
            rows.target_log_prob.push(if label >= 0 {
                (target / sum).ln() as f32
            } else {
                f32::NAN
            });
            rows.tail_mass.push((tail / sum) as f32);
            rows.labels.push(label);
        }
        rows
    }

    fn view(&self) -> NewRows<'_> {
        NewRows {
            indices: &self.indices,
            log_probs: &self.log_probs,
            target_log_prob: &self.target_log_prob,
            tail_mass: Some(&self.tail_mass),
            labels: &self.labels,
            rounding: Dtype::F32,
        }
    }

    fn slice(&self, tokens: std::ops::Range<usize>) -> Self {
        let k = self.indices.len() / self.labels.len();
        let entries = tokens.start * k..tokens.end * k;
        Self {
            indices: self.indices[entries.clone()].into(),
            log_probs: self.log_probs[entries].into(),
            target_log_prob: self.target_log_prob[tokens.clone()].into(),
            tail_mass: self.tail_mass[tokens.clone()].into(),
            labels: self.labels[tokens].into(),
        }
    }
}

fn settings(vocab_size: usize, top_k: usize, encoding: Encoding) -> Settings {
    let fingerprint = "tokenizer \"q\" \u{1f600}\n".into();
    Settings { vocab_size, top_k, temperature: 1.7, encoding, fingerprint }
}

/// A cache in shards of `shard_tokens`.
fn write(path: &Path, settings: &Settings, rows: &Given, shard_tokens: usize) {
    let mut writer = Writer::open(path, settings).unwrap().with_shard_tokens(shard_tokens).unwrap();
    writer.push(&rows.view()).unwrap();
    writer.finish().unwrap();
}

fn temporary() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a").join("cache");
    (folder, path)
}

#[track_caller]
fn says<T>(result: Result<T, Error>, words: &[&str]) {
    let message = match result {
        Ok(_) => panic!("no error"),
        Err(error) => error.to_string(),
    };
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

/// By how much an entry may be off, as the module's documentation states: the encoding, and the shift that restores the
/// mass.
fn allowed(encoding: Encoding, log_prob: f64, row: &[f64]) -> f64 {
    let (largest, smallest) =
        row.iter().fold((f64::MIN, f64::MAX), |(a, b), &l| (a.max(l), b.min(l)));
    let error = |l: f64| match encoding {
        Encoding::F16 => l.abs() / 2048.0 + 3e-8,
        Encoding::U8 => (largest - smallest) / 510.0 + 3e-8,
    };
    // Float32's rounding beside.
    error(log_prob) + error(smallest) + 3e-7 * (1.0 - smallest)
}

/// The rows that were read are those that were pushed, sorted, but for the stated error; and they are distributions.
fn compare(settings: &Settings, given: &Given, read: &Rows) -> f64 {
    let k = settings.top_k;
    let mut worst = 0.0_f64;
    for token in 0..given.labels.len() {
        let entries = token * k..(token + 1) * k;
        let label = given.labels[token];
        let of = |indices: &[i32], log_probs: &[f32]| -> HashMap<i32, f64> {
            let both = indices.iter().zip(log_probs).filter(|(index, _)| **index != -1);
            both.map(|(&index, &log_prob)| (index, log_prob.into())).collect()
        };
        let expected = of(&given.indices[entries.clone()], &given.log_probs[entries.clone()]);
        let row = &read.log_probs[entries.clone()];
        let actual = of(&read.indices[entries.clone()], row);
        assert_eq!(actual.len(), expected.len(), "token {token}");
        let there = actual.len();
        assert!(read.indices[entries.clone()][..there].iter().all(|&index| index != -1));
        assert!(row[there..].iter().all(|&log_prob| log_prob == f32::NEG_INFINITY));
        let values: Vec<f64> = expected.values().copied().collect();
        for (index, &expected) in &expected {
            let error = (actual[index] - expected).abs();
            let allowed = allowed(settings.encoding, expected, &values);
            assert!(error <= allowed, "token {token} {index}: {expected} {error} {allowed}");
            worst = worst.max(error);
        }
        let target = read.target_log_prob[token];
        let others: Vec<(i32, f32)> = read.indices[entries.clone()]
            .iter()
            .copied()
            .zip(row[..there].iter().copied())
            .filter(|&(index, _)| i64::from(index) != label)
            .collect();
        assert!(others.windows(2).all(|pair| pair[0].1 >= pair[1].1), "token {token} is sorted");
        let mass = others.iter().map(|&(_, log_prob)| f64::from(log_prob).exp()).sum::<f64>()
            + f64::from(target).exp()
            + f64::from(read.tail_mass[token]);
        assert!((mass - 1.0).abs() < 3.5e-6, "token {token}: {mass}");
        match label {
            0.. => assert_eq!(target, given.target_log_prob[token]),
            _ => assert_eq!(target, f32::NEG_INFINITY),
        }
        if let Some(&of_target) = actual.get(&(label as i32)) {
            assert_eq!(of_target as f32, target);
        }
        assert_eq!(read.tail_mass[token], given.tail_mass[token]);
        assert_eq!(i64::from(read.labels[token]), label);
    }
    worst
}

#[test]
fn what_was_pushed_comes_back() {
    let mut random = Rng::with_seed(1);
    for encoding in Encoding::ALL {
        for vocab in [1, 2, 3, 131_071, 131_072, 151_936, (1 << 31) - 1] {
            for k in [1, 64, 1024] {
                let settings = settings(vocab, k, encoding);
                for spread in [0.0, 1.0, 20.0] {
                    let rows = Given::random(&settings, 41, spread, &mut random);
                    let (_folder, path) = temporary();
                    write(&path, &settings, &rows, 16);
                    let cache = TeacherCache::open(&path).unwrap();
                    assert_eq!(cache.settings(), &settings);
                    assert!(cache.is_complete() && cache.tokens() == 41 && cache.shards() == 3);
                    let worst = compare(&settings, &rows, &cache.read(0..41).unwrap());
                    assert!((f64::from(cache.largest_error()) - worst).abs() < 1e-5);
                    let tail: f64 = rows.tail_mass.iter().map(|&mass| f64::from(mass)).sum();
                    assert!((cache.mean_tail_mass() - tail / 41.0).abs() < 1e-9);
                }
            }
        }
    }
}

#[test]
fn bits_and_bytes_are_the_fewest() {
    let bits = |vocab| Settings::new(vocab, 1).bits_per_index();
    let powers = [1, 2, 3, 131_071, 131_072, 151_936, (1 << 31) - 1];
    assert_eq!(powers.map(bits), [1, 2, 2, 17, 18, 18, 31]);
    let bytes = |encoding| settings(151_936, 64, encoding).bytes_per_token();
    assert_eq!(Encoding::ALL.map(bytes), [284, 228]);
    let (_folder, path) = temporary();
    let settings = settings(151_936, 64, Encoding::U8);
    write(&path, &settings, &Given::random(&settings, 1000, 8.0, &mut Rng::with_seed(2)), 1000);
    let length = fs::metadata(path.join("teacher-00000.safetensors")).unwrap().len();
    assert!((228_000..229_500).contains(&length), "{length}");
}

#[test]
fn any_range_is_read_across_shards() {
    let (_folder, path) = temporary();
    let settings = settings(1000, 5, Encoding::F16);
    let rows = Given::random(&settings, 23, 6.0, &mut Rng::with_seed(3));
    write(&path, &settings, &rows, 4);
    let cache = TeacherCache::open(&path).unwrap();
    let all = cache.read(0..23).unwrap();
    for start in 0..=23 {
        for end in start..=23 {
            let part = cache.read(start..end).unwrap();
            assert_eq!(part.indices, all.indices[5 * start..5 * end]);
            assert_eq!(part.log_probs, all.log_probs[5 * start..5 * end]);
            assert_eq!(part.target_log_prob, all.target_log_prob[start..end]);
            assert_eq!(part.tail_mass, all.tail_mass[start..end]);
            assert_eq!(part.labels, all.labels[start..end]);
        }
    }
    says(cache.read(20..24), &["20..24", "has 23"]);
    #[expect(clippy::reversed_empty_ranges, reason = "a caller's mistake")]
    let reversed = 5..3;
    says(cache.read(reversed), &["5..3"]);
    says(cache.read(usize::MAX - 1..usize::MAX), &["23"]);
    let mut short = Rows { indices: vec![0; 9], ..cache.read(0..2).unwrap() };
    let to = atkd::teacher_cache::RowsMut {
        indices: &mut short.indices,
        log_probs: &mut short.log_probs,
        target_log_prob: &mut short.target_log_prob,
        tail_mass: &mut short.tail_mass,
        labels: &mut short.labels,
    };
    says(cache.read_into(0..2, to), &["indices", "9", "10"]);
}

/// One row of K = 3, V = 10.
fn push(
    indices: [i32; 3],
    log_probs: [f32; 3],
    target: f32,
    tail: Option<f32>,
    label: i64,
) -> Result<Rows, Error> {
    let (_folder, path) = temporary();
    let mut writer = Writer::open(&path, &Settings::new(10, 3)).unwrap();
    let tail = tail.map(|tail| [tail]);
    writer.push(&NewRows {
        indices: &indices,
        log_probs: &log_probs,
        target_log_prob: &[target],
        tail_mass: tail.as_ref().map(|tail| &tail[..]),
        labels: &[label],
        rounding: Dtype::F32,
    })?;
    writer.finish()?;
    TeacherCache::open(&path)?.read(0..1)
}

#[test]
fn the_tail_is_what_the_others_leave() {
    let half = 0.5_f32.ln();
    let rows = push([3, 1, -1], [2.0 * half, half, 7.0], 3.0 * half, None, 9).unwrap();
    assert_eq!(rows.indices, [1, 3, -1]);
    assert!((rows.tail_mass[0] - 0.125).abs() < 1e-6);
    // The target among them counts once.
    let rows = push([3, 1, -1], [2.0 * half, half, 0.0], half, None, 1).unwrap();
    assert!((rows.tail_mass[0] - 0.25).abs() < 1e-6);
    // A target of which the teacher is surer than float32's 1 can tell.
    let rows = push([3, 1, 2], [-26.0, 0.0, -27.0], -1e-11, None, 1).unwrap();
    let [first, second] = [-26.0_f64, -27.0].map(f64::exp);
    assert_eq!(rows.target_log_prob, [-1e-11]);
    let expected = 1e-11 - first - second;
    assert!((f64::from(rows.tail_mass[0]) - expected).abs() < 1e-4 * expected);
    // Served log-probabilities may add up to a little more than 1.
    let rows = push([3, 1, 2], [-1.0, -0.45863, -20.0], -1.0, None, 3).unwrap();
    let mass: f64 = rows.log_probs.iter().map(|&l| f64::from(l).exp()).sum();
    assert!(rows.tail_mass[0] < 2e-6 && mass < 1.0 + 2e-6, "{rows:?}");
}

/// One row of 0.1, 0.2, 0.3 and 0.4, which rounding has multiplied, of which token 3 is the label.
fn push_whole(
    indices: [i32; 4],
    factor: f64,
    tail: Option<f32>,
    rounding: Dtype,
) -> Result<Rows, Error> {
    let (_folder, path) = temporary();
    let mut writer = Writer::open(&path, &Settings::new(4, 4)).unwrap();
    let log_prob = |i: i32| (factor * f64::from(i + 1) / 10.0).ln() as f32;
    writer.push(&NewRows {
        indices: &indices,
        log_probs: &indices.map(|i| log_prob(i.max(0))),
        target_log_prob: &[log_prob(3)],
        tail_mass: tail.as_ref().map(std::slice::from_ref),
        labels: &[3],
        rounding,
    })?;
    writer.finish()?;
    TeacherCache::open(&path)?.read(0..1)
}

/// What rounding leaves of 1 goes to no tail, since no token is left to have it.
#[test]
fn rows_of_the_whole_vocabulary_have_no_tail() {
    let (all, but_label) = ([2, 0, 3, 1], [2, 0, -1, 1]);
    for (rounding, off) in [(Dtype::F32, 9e-5), (Dtype::F16, 9e-3), (Dtype::Bf16, 2.9e-2)] {
        for (factor, tail) in [1.0 - off, 1.0, 1.0 + off]
            .into_iter()
            .flat_map(|factor| [None, Some(0.0), Some(off as f32)].map(|tail| (factor, tail)))
        {
            for indices in [all, but_label] {
                let rows = push_whole(indices, factor, tail, rounding).unwrap();
                assert_eq!(rows.tail_mass, [0.0], "{rounding:?} {factor} {tail:?}");
                let target = rows.target_log_prob[0];
                assert!((target - 0.4_f32.ln()).abs() < 3e-7, "{target}");
                for (index, log_prob) in rows.indices.iter().zip(&rows.log_probs) {
                    if *index >= 0 {
                        let exact = ((index + 1) as f32 / 10.0).ln();
                        assert!((log_prob - exact).abs() < exact.abs() / 1024.0, "{rows:?}");
                    }
                }
            }
        }
        for factor in [1.0 - 1.2 * off, 1.0 + 1.2 * off] {
            let words = ["token 0", "whole vocabulary of 4", "must add up to 1"];
            says(push_whole(all, factor, None, rounding), &words);
        }
        // There is no token to have a tail; what the others leave of 1 is one where a token is not among them.
        says(push_whole(all, 0.5, Some(0.5), rounding), &["add up to 0.5", "vocabulary of 4"]);
        says(push_whole(all, 1.0, Some(0.5), rounding), &["add up to 1.5", "tail 0.5"]);
        let rows = push_whole([2, 0, 3, -1], 1.0, None, rounding).unwrap();
        assert!((rows.tail_mass[0] - 0.2).abs() < 1e-6, "{rows:?}");
    }
}

#[test]
fn entries_without_mass_are_not_kept() {
    let dead = f32::NEG_INFINITY;
    let rows = push([3, 1, 2], [dead, 0.0, -65_505.0], dead, None, 3).unwrap();
    assert_eq!(rows.indices, [1, -1, -1]);
    assert_eq!((rows.target_log_prob[0], rows.tail_mass[0]), (dead, 0.0));
    // A finite log-probability is kept, though the probability is 0.
    assert_eq!(
        push([3, 1, 2], [-65_504.0, 0.0, -800.0], dead, None, 4).unwrap().indices,
        [1, 2, 3]
    );
}

#[test]
fn rows_that_no_teacher_has_are_refused() {
    let half = 0.5_f32.ln();
    let (fine, dead) = ([half, 2.0 * half, 3.0 * half], f32::NEG_INFINITY);
    says(push([1, 2, 10], fine, -3.0, None, 4), &["token 0", "index is 10", "size 10", "-1"]);
    says(push([1, 2, -2], fine, -3.0, None, 4), &["index is -2"]);
    says(push([1, 2, 1], fine, -3.0, None, 4), &["index 1 is there twice"]);
    says(push([1, 2, 3], [half, f32::NAN, dead], -3.0, None, 4), &["of 2 is NaN"]);
    says(push([1, 2, 3], [0.1, dead, dead], -3.0, None, 4), &["of 1 is 0.1", "at most 0"]);
    says(push([1, 2, 3], fine, f32::NAN, None, 4), &["target's", "NaN"]);
    says(push([1, 2, 3], fine, 0.5, None, 4), &["target's", "0.5"]);
    says(push([1, 2, 3], fine, half, None, 4), &["add up to 1.375", "0.875", "0.5"]);
    says(push([1, 2, 3], fine, -9.0, None, 1), &["-9", "-0.69", "label 1"]);
    says(push([1, 2, 3], fine, -9.0, Some(0.3), 4), &["add up to 1.17", "tail 0.3"]);
    says(push([1, 2, 3], fine, -9.0, Some(f32::NAN), 4), &["tail's mass is NaN"]);
    says(push([1, 2, 3], fine, -9.0, Some(-0.1), 4), &["tail's mass is -0.1"]);
    says(push([1, 2, 3], fine, -9.0, None, 10), &["label is 10", "size 10", "ignored"]);
    says(push([1, 2, 3], fine, -9.0, None, i64::MIN), &["label is -9223372036854775808"]);
    // Nothing is required of a token that is ignored.
    let rows = push([1, 2, 1], [f32::NAN; 3], f32::NAN, Some(f32::NAN), -7).unwrap();
    assert_eq!((&rows.indices[..], rows.labels[0], rows.tail_mass[0]), (&[-1; 3][..], -7, 1.0));

    // None of the rows of a call with a bad one is written.
    let (_folder, path) = temporary();
    let settings = settings(10, 3, Encoding::F16);
    let mut writer = Writer::open(&path, &settings).unwrap().with_shard_tokens(2).unwrap();
    let mut rows = Given::random(&settings, 7, 1.0, &mut Rng::with_seed(4));
    writer.push(&rows.slice(0..1).view()).unwrap();
    rows.labels[5] = 11;
    says(writer.push(&rows.view()), &["token 6", "label is 11"]);
    assert_eq!(writer.tokens(), 1);
    says(writer.push(&NewRows { labels: &[1, 2], ..rows.view() }), &["indices", "21", "6"]);
    let short = NewRows { tail_mass: Some(&[0.0]), ..rows.view() };
    says(writer.push(&short), &["tail_mass", "1", "7"]);
}

#[test]
fn settings_outside_their_domain_are_refused() {
    let (_folder, path) = temporary();
    let good = Settings::new(10, 3);
    let bad = |settings: &Settings, words: &[&str]| says(Writer::open(&path, settings), words);
    bad(&Settings::new(0, 3), &["vocab_size is 0"]);
    bad(&Settings::new(1 << 31, 3), &["vocab_size is 2147483648", "2147483647"]);
    bad(&Settings::new(10, 0), &["top_k is 0"]);
    bad(&Settings::new(10, 1025), &["top_k is 1025", "1024"]);
    for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        bad(&Settings { temperature, ..good.clone() }, &["temperature"]);
    }
    bad(&Settings { fingerprint: "x".repeat(5000), ..good.clone() }, &["5000", "4096"]);
    assert!(!path.exists());
    let shards = |tokens| Writer::open(&path, &good).unwrap().with_shard_tokens(tokens);
    says(shards(0), &["shard_tokens is 0"]);
    says(shards(usize::MAX), &["shard_tokens"]);
}

/// Whenever a run is killed, the next one makes of it what one run would have made.
#[test]
fn a_killed_run_goes_on() {
    for encoding in Encoding::ALL {
        let settings = settings(5000, 7, encoding);
        let rows = Given::random(&settings, 20, 5.0, &mut Rng::with_seed(5));
        let (_folder, path) = temporary();
        write(&path, &settings, &rows, 6);
        let whole = TeacherCache::open(&path).unwrap().read(0..20).unwrap();
        for killed_at in 0..20 {
            let (_folder, path) = temporary();
            let mut writer = Writer::open(&path, &settings).unwrap().with_shard_tokens(6).unwrap();
            for token in 0..killed_at {
                writer.push(&rows.slice(token..token + 1).view()).unwrap();
            }
            assert_eq!(writer.tokens(), killed_at);
            drop(writer);
            // The part of a shard that it left may be any bytes.
            let partial = path.join(format!("teacher-{:05}.safetensors.partial", killed_at / 6));
            assert_eq!(partial.exists(), killed_at % 6 > 0);
            fs::write(&partial, &b"half"[..killed_at % 5]).unwrap();
            if killed_at < 6 {
                says(TeacherCache::open(&path), &["no teacher cache", "half written"]);
            } else {
                let cache = TeacherCache::open(&path).unwrap();
                assert!(!cache.is_complete());
                assert_eq!(cache.tokens(), killed_at / 6 * 6);
            }
            let mut writer = Writer::open(&path, &settings).unwrap().with_shard_tokens(6).unwrap();
            assert!(!partial.exists());
            assert_eq!((writer.tokens(), writer.is_complete()), (killed_at / 6 * 6, false));
            writer.push(&rows.slice(writer.tokens()..20).view()).unwrap();
            writer.finish().unwrap();
            let cache = TeacherCache::open(&path).unwrap();
            assert!(cache.is_complete());
            assert_eq!(cache.read(0..20).unwrap(), whole, "killed at {killed_at}");
        }
    }
}

#[test]
fn what_is_flushed_stays() {
    let (_folder, path) = temporary();
    let settings = settings(5000, 7, Encoding::U8);
    let rows = Given::random(&settings, 20, 5.0, &mut Rng::with_seed(6));
    for end in [3, 3, 11, 20] {
        let mut writer = Writer::open(&path, &settings).unwrap().with_shard_tokens(6).unwrap();
        let next = rows.slice(writer.tokens()..end);
        if !next.labels.is_empty() {
            writer.push(&next.view()).unwrap();
        }
        writer.flush().unwrap();
        writer.flush().unwrap();
        assert_eq!(writer.tokens(), end);
    }
    let cache = TeacherCache::open(&path).unwrap();
    assert_eq!((cache.tokens(), cache.is_complete(), cache.shards()), (20, false, 5));
    compare(&settings, &rows, &cache.read(0..20).unwrap());

    // A last shard without tokens says that the cache is complete.
    Writer::open(&path, &settings).unwrap().finish().unwrap();
    let cache = TeacherCache::open(&path).unwrap();
    assert_eq!((cache.tokens(), cache.is_complete(), cache.shards()), (20, true, 6));
    compare(&settings, &rows, &cache.read(0..20).unwrap());
    // And that it takes no more. Finishing it again changes nothing.
    let mut writer = Writer::open(&path, &settings).unwrap();
    assert!(writer.is_complete() && writer.tokens() == 20);
    says(writer.push(&rows.view()), &["complete with 20 tokens"]);
    writer.finish().unwrap();
    assert_eq!(TeacherCache::open(&path).unwrap().shards(), 6);
    // Without it, it is not complete.
    fs::remove_file(path.join("teacher-00005.safetensors")).unwrap();
    assert!(!TeacherCache::open(&path).unwrap().is_complete());

    let (_folder, empty) = temporary();
    Writer::open(&empty, &settings).unwrap().finish().unwrap();
    let cache = TeacherCache::open(&empty).unwrap();
    assert_eq!((cache.tokens(), cache.is_complete(), cache.mean_tail_mass()), (0, true, 0.0));
    assert_eq!(cache.read(0..0).unwrap(), Rows::default());
}

#[test]
fn a_run_with_other_settings_does_not_go_on() {
    let (_folder, path) = temporary();
    let begun = settings(5000, 7, Encoding::F16);
    write(&path, &begun, &Given::random(&begun, 3, 5.0, &mut Rng::with_seed(7)), 2);
    let other = |settings: Settings, words: &[&str]| says(Writer::open(&path, &settings), words);
    other(Settings { vocab_size: 5001, ..begun.clone() }, &["vocab_size", "5000", "5001"]);
    other(Settings { top_k: 8, ..begun.clone() }, &["top_k", "7", "8"]);
    other(Settings { temperature: 2.5, ..begun.clone() }, &["temperature", "1.7", "2.5"]);
    other(Settings { encoding: Encoding::U8, ..begun.clone() }, &["encoding", "f16", "u8"]);
    other(
        Settings { fingerprint: "r".into(), ..begun.clone() },
        &["fingerprint is r", "tokenizer"],
    );
}

#[test]
fn a_cache_has_one_writer() {
    let (_folder, path) = temporary();
    let settings = Settings::new(10, 3);
    let writer = Writer::open(&path, &settings).unwrap();
    says(Writer::open(&path, &settings), &["another program", "cache"]);
    drop(writer);
    Writer::open(&path, &settings).unwrap();
}

/// A cache of three shards, at `path`.
fn three_shards(path: &Path) -> [PathBuf; 3] {
    let settings = settings(5000, 7, Encoding::U8);
    write(path, &settings, &Given::random(&settings, 10, 5.0, &mut Rng::with_seed(8)), 4);
    [0, 1, 2].map(|shard| path.join(format!("teacher-{shard:05}.safetensors")))
}

#[test]
fn folders_that_hold_no_cache_say_so() {
    let (folder, path) = temporary();
    says(TeacherCache::open(&path), &["cannot open", "cache", "No such file"]);
    says(TeacherCache::open(folder.path()), &["no teacher cache", "no shards"]);
    let [first, second, third] = three_shards(&path);
    says(TeacherCache::open(&first), &["00000", "no folder"]);
    let missing = path.join("elsewhere");
    fs::rename(&second, &missing).unwrap();
    says(TeacherCache::open(&path), &["teacher-00001.safetensors is missing", "teacher-00002"]);
    let settings = settings(5000, 7, Encoding::U8);
    says(Writer::open(&path, &settings), &["teacher-00001.safetensors is missing"]);
    // The last one takes the place of the missing one.
    fs::rename(&third, &second).unwrap();
    says(TeacherCache::open(&path), &["teacher-00001", "was teacher-00002.safetensors"]);
    fs::rename(&second, &third).unwrap();
    fs::create_dir(&second).unwrap();
    says(TeacherCache::open(&path), &["teacher-00001", "no regular file"]);
    fs::remove_dir(&second).unwrap();
    fs::rename(&missing, &second).unwrap();
    // Other files do not matter.
    fs::write(path.join("README.md"), "a cache").unwrap();
    fs::write(path.join("teacher-1.safetensors"), "").unwrap();
    fs::write(path.join("teacher-+0003.safetensors"), "").unwrap();
    let cache = TeacherCache::open(&path).unwrap();
    assert_eq!(cache.tokens(), 10);
    fs::copy(&third, path.join("teacher-00003.safetensors")).unwrap();
    says(
        TeacherCache::open(&path),
        &["teacher-00003", "comes after", "teacher-00002", "is the last"],
    );
}

#[test]
fn truncated_and_foreign_shards_are_told() {
    let (_folder, path) = temporary();
    let [_, second, _] = three_shards(&path);
    let whole = fs::read(&second).unwrap();
    for length in [0, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&second, &whole[..length]).unwrap();
        let bytes = format!("({length} bytes)");
        says(TeacherCache::open(&path), &["teacher-00001", "no whole safetensors file", &bytes]);
    }
    fs::write(&second, [&whole[..], b"x"].concat()).unwrap();
    says(TeacherCache::open(&path), &["teacher-00001", "no whole safetensors file"]);

    let (_other_folder, other) = temporary();
    let [_, of_another, _] = three_shards(&other);
    fs::copy(&of_another, &second).unwrap();
    says(
        TeacherCache::open(&path),
        &["teacher-00001", "another cache", "teacher-00000", "number of the cache"],
    );
    let settings = Settings { temperature: 1.5, ..settings(5000, 7, Encoding::U8) };
    let (_other_folder, other) = temporary();
    write(&other, &settings, &Given::random(&settings, 10, 5.0, &mut Rng::with_seed(8)), 4);
    fs::copy(other.join("teacher-00001.safetensors"), &second).unwrap();
    says(TeacherCache::open(&path), &["teacher-00001", "temperature is 1.5, but 1.7"]);

    let tensor = TensorView::new(safetensors::Dtype::U8, vec![2], &[1, 2]).unwrap();
    fs::write(&second, safetensors::serialize([("weight", tensor)], None).unwrap()).unwrap();
    says(TeacherCache::open(&path), &["teacher-00001", "not of a teacher cache"]);
}

/// Dtype and shape.
type Tensor = (safetensors::Dtype, Vec<usize>);

/// Writes a shard anew with changed metadata and tensors, `None` for one that is not there any more.
fn rewrite(shard: &Path, metadata: &[(&str, Option<&str>)], tensors: &[(&str, Option<Tensor>)]) {
    let bytes = fs::read(shard).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let mut facts = header.metadata().clone().unwrap();
    for &(key, value) in metadata {
        facts.remove(key);
        if let Some(value) = value {
            facts.insert(key.into(), value.into());
        }
    }
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut views: HashMap<String, TensorView> = file.tensors().into_iter().collect();
    for (name, change) in tensors {
        let old = views.remove(*name).unwrap();
        if let Some((dtype, shape)) = change {
            let length = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            let view = TensorView::new(*dtype, shape.clone(), &old.data()[..length]).unwrap();
            views.insert(name.to_string(), view);
        }
    }
    fs::write(shard, safetensors::serialize(views, Some(facts)).unwrap()).unwrap();
}

#[test]
fn headers_are_checked() {
    let (_folder, path) = temporary();
    let [first, second, _] = three_shards(&path);
    let whole = fs::read(&first).unwrap();
    let metadata = |key, value, words: &[&str]| {
        rewrite(&first, &[(key, value)], &[]);
        says(TeacherCache::open(&path), &[&["teacher-00000"], words].concat());
        fs::write(&first, &whole).unwrap();
    };
    metadata("format", Some("pt"), &["format \"pt\"", "atkd-teacher-cache"]);
    metadata("format_version", Some("2"), &["version 2", "reads 1"]);
    metadata("encoding", Some("f8"), &["encoding \"f8\""]);
    metadata("vocab_size", Some("0"), &["vocab_size is 0"]);
    metadata("top_k", Some("-3"), &["\"-3\" for `top_k`"]);
    metadata("top_k", Some("2000"), &["top_k is 2000"]);
    metadata("temperature", Some("NaN"), &["temperature is NaN"]);
    metadata("last", Some("yes"), &["\"yes\" for `last`"]);
    metadata("shard", Some("1"), &["was teacher-00001.safetensors"]);
    metadata("first_token", Some("1"), &["begins with token 1", "must begin with 0"]);
    metadata("tokens", Some("5"), &["`target_log_prob` as F32 [4]", "F32 [5]"]);
    metadata("tokens", Some("18446744073709551615"), &["`target_log_prob`", "[4]"]);
    metadata("tokens", Some("18446744073709551616"), &["`tokens`"]);
    metadata("largest_error", Some("large"), &["`largest_error`"]);
    for key in ["format_version", "vocab_size", "fingerprint", "cache", "shard", "tokens", "last"] {
        metadata(key, None, &[&format!("lacks `{key}`")]);
    }
    metadata("format", None, &["not of a teacher cache"]);
    // Other numbers that fit the tensors of the first shard do not fit those of the next.
    metadata("vocab_size", Some("5001"), &["teacher-00001", "another cache", "5000", "5001"]);

    use safetensors::Dtype::{F16, F32, I32, U8};
    let tensor = |name, change, words: &[&str]| {
        rewrite(&first, &[], &[(name, change)]);
        says(TeacherCache::open(&path), &[&["teacher-00000"], words].concat());
        fs::write(&first, &whole).unwrap();
    };
    for name in ["target_log_prob", "tail_mass", "labels", "log_prob_range", "log_probs", "indices"]
    {
        tensor(name, None, &[&format!("no tensor `{name}`")]);
    }
    tensor("labels", Some((F32, vec![4])), &["`labels` as F32 [4]", "I32 [4]"]);
    tensor("tail_mass", Some((I32, vec![4])), &["`tail_mass`", "I32"]);
    tensor("labels", Some((I32, vec![4, 1])), &["[4, 1]"]);
    tensor("log_probs", Some((F16, vec![4, 3])), &["F16 [4, 3]", "U8 [4, 7]"]);
    tensor("indices", Some((U8, vec![4, 11])), &["[4, 11]", "[4, 12]"]);
    tensor("log_prob_range", Some((F32, vec![8])), &["[8]", "[4, 2]"]);

    TeacherCache::open(&path).unwrap();
    let later = fs::read(&second).unwrap();
    rewrite(&second, &[("first_token", Some("5"))], &[]);
    says(TeacherCache::open(&path), &["teacher-00001", "token 5", "with 4"]);
    fs::write(&second, later).unwrap();
    // A file that safetensors itself wrote is read, in its order of tensors.
    rewrite(&second, &[], &[]);
    TeacherCache::open(&path).unwrap().read(0..10).unwrap();
}

#[test]
fn damaged_rows_are_told_with_their_token() {
    for encoding in Encoding::ALL {
        let (_folder, path) = temporary();
        // Indices of 13 bits, and 5 bits after them.
        let settings = settings(5000, 7, encoding);
        let mut rows = Given::random(&settings, 5, 5.0, &mut Rng::with_seed(9));
        rows.labels[2] = -1;
        rows.target_log_prob[2] = 0.0;
        let known: f32 = rows.log_probs[14..21].iter().map(|l| l.exp()).sum();
        rows.tail_mass[2] = 1.0 - known;
        write(&path, &settings, &rows, 3);
        let shard = path.join("teacher-00000.safetensors");
        let whole = fs::read(&shard).unwrap();
        let damaged = |name: &str, at: usize, bytes: &[u8], words: &[&str]| {
            let mut copy = whole.clone();
            let file = SafeTensors::deserialize(&whole).unwrap();
            let data = file.tensor(name).unwrap().data();
            let width = data.len() / 3;
            let start = data.as_ptr() as usize - whole.as_ptr() as usize + 2 * width + at;
            copy[start..start + bytes.len()].copy_from_slice(bytes);
            fs::write(&shard, copy).unwrap();
            let cache = TeacherCache::open(&path).unwrap();
            let token = ["teacher-00000", "token 2 is damaged"];
            says(cache.read(0..5), &[&token, words].concat());
            cache.read(0..2).unwrap();
            cache.read(3..5).unwrap();
        };
        let float = |value: f32| value.to_le_bytes();
        damaged("labels", 0, &5000_i32.to_le_bytes(), &["label is 5000", "size 5000"]);
        damaged("target_log_prob", 0, &float(f32::NAN), &["target's log-probability is NaN"]);
        damaged("target_log_prob", 0, &float(0.5), &["is 0.5"]);
        damaged("target_log_prob", 0, &float(-3.0), &["is -3", "label -1"]);
        damaged("tail_mass", 0, &float(f32::NAN), &["tail's mass NaN"]);
        damaged("tail_mass", 0, &float(-1.0), &["tail's mass -1"]);
        damaged("tail_mass", 0, &float(rows.tail_mass[2] + 0.05), &["the mass of its entries"]);
        damaged("indices", 0, &[0xff, 0xff], &["index is 8191", "size 5000"]);
        damaged("indices", 11, &[0x80], &["bits after its indices"]);
        // 5000, which is an entry that is not there.
        damaged("indices", 0, &[0x88, 0x13], &["entry 1 is there, but the one before it is not"]);
        match encoding {
            Encoding::F16 => {
                damaged("log_probs", 0, &[0, 0x7e], &["log-probability is NaN"]);
                damaged("log_probs", 0, &[0, 0x3c], &["log-probability is 1"]);
                damaged("log_probs", 0, &[0, 0xd5], &["after -80", "must fall"]);
                damaged("log_probs", 12, &[0, 0xfc], &["-inf"]);
            }
            Encoding::U8 => {
                damaged("log_probs", 0, &[255], &["must fall"]);
                damaged("log_prob_range", 0, &float(0.1), &["to 0.1"]);
                damaged("log_prob_range", 0, &float(f32::NAN), &["to NaN"]);
                damaged("log_prob_range", 4, &float(f32::NEG_INFINITY), &["from -inf"]);
                damaged("log_prob_range", 0, &float(-40.0), &["log-probabilities are from"]);
            }
        }
    }
}

/// Small caches, as the bytes of their shards.
fn seeds() -> Vec<(Settings, Vec<Vec<u8>>)> {
    let mut seeds = Vec::new();
    let mut random = Rng::with_seed(10);
    for encoding in Encoding::ALL {
        for (vocab, k) in [(2, 3), (50, 4), (151_936, 9), ((1 << 31) - 1, 2)] {
            let (_folder, path) = temporary();
            let settings = settings(vocab, k, encoding);
            write(&path, &settings, &Given::random(&settings, 9, 9.0, &mut random), 4);
            let shard = |shard| fs::read(path.join(format!("teacher-{shard:05}.safetensors")));
            seeds.push((settings, (0..3).map(|number| shard(number).unwrap()).collect()));
        }
    }
    seeds
}

/// Damages one of the shards somehow.
fn damage(shards: &mut [Vec<u8>], random: &mut Rng) {
    let chosen = random.usize(0..shards.len());
    let length = shards[chosen].len();
    let header = length.min(700);
    let other = random.choice(shards.iter()).cloned().unwrap();
    let bytes = &mut shards[chosen];
    match random.u8(0..10) {
        // Bits and bytes anywhere, or in the header.
        0 | 1 if length > 0 => bytes[random.usize(0..length)] ^= 1 << random.u8(0..8),
        2 if length > 0 => bytes[random.usize(0..header)] ^= 1 << random.u8(0..8),
        3 if length > 0 => bytes[random.usize(0..length)] = random.u8(..),
        // A digit for a digit keeps the header one that can be parsed.
        4 if length > 0 => {
            let at = random.usize(0..header);
            if let Some(digit) = bytes[at..].iter_mut().find(|byte| byte.is_ascii_digit()) {
                *digit = random.u8(b'0'..=b'9');
            }
        }
        5 => bytes.truncate(random.usize(0..=length)),
        6 => (0..random.usize(1..40)).for_each(|_| bytes.push(random.u8(..))),
        // A run of another shard's, or of one byte.
        7 if length > 0 => {
            let start = random.usize(0..length);
            let end = length.min(start + random.usize(1..64)).min(other.len());
            if start < end {
                bytes[start..end].copy_from_slice(&other[start..end]);
            }
        }
        8 if length > 0 => {
            let start = random.usize(0..length);
            let end = length.min(start + random.usize(1..64));
            bytes[start..end].fill(*random.choice(&[0, 0xff, 0x7f, 0x80, b'9']).unwrap());
        }
        _ => {
            let (a, b) = (random.usize(0..shards.len()), random.usize(0..shards.len()));
            shards.swap(a, b);
        }
    }
}

/// A read of damaged bytes gives a distribution, or an error.
fn try_to_use(path: &Path, settings: &Settings) -> Result<(), Error> {
    let cache = TeacherCache::open(path)?;
    let k = cache.settings().top_k;
    cache.mean_tail_mass();
    for token in 0..cache.tokens() {
        let rows = cache.read(token..token + 1)?;
        let vocab = cache.settings().vocab_size as i64;
        assert!(rows.indices.len() == k && i64::from(rows.labels[0]) < vocab);
        assert!(rows.indices.iter().all(|&index| index >= -1 && i64::from(index) < vocab));
        let others =
            rows.indices.iter().zip(&rows.log_probs).filter(|(i, _)| **i != rows.labels[0]);
        let mass = others.map(|(_, &l)| f64::from(l).exp()).sum::<f64>()
            + f64::from(rows.target_log_prob[0]).exp()
            + f64::from(rows.tail_mass[0]);
        assert!((mass - 1.0).abs() < 1e-5, "{mass}");
    }
    cache.read(0..cache.tokens())?;
    let mut writer = Writer::open(path, settings)?;
    if !writer.is_complete() {
        writer.push(&Given::random(settings, 3, 1.0, &mut Rng::with_seed(1)).view())?;
    }
    writer.finish()
}

/// Cases until the time or their number is up. Returns how many, and of how many something was wrong.
fn fuzz(seed: u64, most: usize, until: Instant) -> (usize, usize) {
    let seeds = seeds();
    let folder = tempfile::tempdir().unwrap();
    let (mut cases, mut errors) = (0, 0);
    while cases < most && Instant::now() < until {
        let case = seed + cases as u64;
        let random = &mut Rng::with_seed(case);
        let (settings, mut shards) = random.choice(&seeds).cloned().unwrap();
        (0..random.usize(1..4)).for_each(|_| damage(&mut shards, random));
        let path = folder.path().join("cache");
        fs::create_dir(&path).unwrap();
        for (number, bytes) in shards.iter().enumerate() {
            fs::write(path.join(format!("teacher-{number:05}.safetensors")), bytes).unwrap();
        }
        match std::panic::catch_unwind(|| try_to_use(&path, &settings)) {
            Ok(result) => errors += usize::from(result.is_err()),
            Err(_) => panic!("case {case} panics"),
        }
        fs::remove_dir_all(&path).unwrap();
        cases += 1;
    }
    (cases, errors)
}

#[test]
fn no_bytes_make_it_panic() {
    let (cases, errors) = fuzz(0, 3000, Instant::now() + Duration::from_secs(60));
    println!("{errors} of {cases} damaged caches are errors");
    // The others' damage is in bytes that nothing can tell from a teacher's, such as an index's.
    assert!(errors > cases / 2 && errors < cases);
}

/// `ATKD_FUZZ_MINUTES=10 cargo test --features teacher-cache --test teacher_cache -- --ignored --nocapture fuzz`
#[test]
#[ignore = "takes as many minutes as ATKD_FUZZ_MINUTES says"]
fn fuzz_for_minutes() {
    let minutes = std::env::var("ATKD_FUZZ_MINUTES").map_or(1.0, |text| text.parse().unwrap());
    let seed = 1_000_000_000 * Rng::new().u64(1..1_000_000_000);
    let (cases, errors) =
        fuzz(seed, usize::MAX, Instant::now() + Duration::from_secs_f64(60.0 * minutes));
    println!("{cases} damaged caches from seed {seed}, of which {errors} are errors, none a panic");
}
