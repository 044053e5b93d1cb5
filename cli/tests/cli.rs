//! The command line as scripts see it: output, files, exit codes, errors.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use atkd::teacher_cache::TeacherCache;
use atkd::{Batch, Divergence, Logits, Objective, SparseTeacher, Tail, cuda, reference};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

const TOKENS: usize = 6;
const VOCAB: usize = 50;

struct Files {
    folder: TempDir,
    teacher: Vec<f32>,
    student: Vec<f32>,
    labels: Vec<i64>,
}

/// A tensor of a file: its name, dtype, shape and bytes.
type Tensor<'a> = (&'a str, Dtype, &'a [usize], &'a [u8]);

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|z| z.to_le_bytes()).collect()
}

impl Files {
    fn new() -> Self {
        let mut random = fastrand::Rng::with_seed(4);
        let mut logits = || (0..TOKENS * VOCAB).map(|_| 5.0 * random.f32()).collect::<Vec<f32>>();
        Self {
            folder: tempfile::tempdir().unwrap(),
            teacher: logits(),
            student: logits(),
            labels: vec![3, 0, -100, 49, 7, 7],
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file of the tensors.
    fn save(&self, name: &str, tensors: &[Tensor]) -> PathBuf {
        let views: Vec<_> = tensors
            .iter()
            .map(|&(name, dtype, shape, bytes)| {
                (name, TensorView::new(dtype, shape.to_vec(), bytes).unwrap())
            })
            .collect();
        let path = self.path(name);
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        path
    }

    /// The batch, with the labels as given.
    fn batch(&self, name: &str, labels: &[i64]) -> PathBuf {
        let labels: Vec<u8> = labels.iter().flat_map(|label| label.to_le_bytes()).collect();
        let shape = &[TOKENS, VOCAB];
        self.save(
            name,
            &[
                ("student", Dtype::F32, shape, &little_endian(&self.student)),
                ("teacher", Dtype::F32, shape, &little_endian(&self.teacher)),
                ("labels", Dtype::I64, &[labels.len() / 8], &labels),
            ],
        )
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn atkd(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atkd"));
    command.args(arguments);
    command
}

fn loss(path: &Path, options: &[&str]) -> Command {
    let mut command = atkd(&["loss"]);
    command.arg(path).args(options);
    command
}

/// Exit status 2, nothing on standard output, and one paragraph that has all the words.
#[track_caller]
fn fails(mut command: Command, words: &[&str]) {
    let output = command.output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(output.stdout.is_empty());
    assert!(message.starts_with("error: ") && !message.trim_end().contains('\n'), "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

fn json(mut command: Command) -> serde_json::Value {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn loss_and_gradient_are_the_reference_s() {
    let files = Files::new();
    let path = files.batch("batch", &files.labels);
    let teacher = Logits::new(&files.teacher, TOKENS, VOCAB).unwrap();
    let student = Logits::new(&files.student, TOKENS, VOCAB).unwrap();
    let batch = Batch::new(teacher, &files.labels).unwrap();
    let (exact, gradient) =
        reference::forward_backward(&Objective::default(), &batch, student).unwrap();

    // Ranks of which some have columns, be they more than the vocabulary.
    let shards = [("cpu", "1"), ("cpu", "3"), ("cpu", "64"), ("simt", "8")];
    let whole = ["auto", "cpu", "simt", "reference"].map(|backend| (backend, None));
    for (backend, shards) in whole.into_iter().chain(shards.map(|(b, ranks)| (b, Some(ranks)))) {
        let out = files.path("out");
        let grad = out.to_str().unwrap();
        let mut options = vec!["--backend", backend, "--json", "--grad", grad];
        options.extend(shards.iter().flat_map(|ranks| ["--shards", ranks]));
        let object = json(loss(&path, &options));
        let expected = exact.summary();
        let number = |key: &str| object[key].as_f64().unwrap_or_else(|| panic!("no {key}"));
        for (key, value) in [
            ("loss", exact.loss),
            ("threshold_uncertainty", expected.threshold_uncertainty.unwrap()),
            ("mean_uncertainty", expected.mean_uncertainty),
            ("mean_tkd", expected.mean_tkd),
            ("mean_dkd", expected.mean_dkd),
        ] {
            assert!((number(key) - value).abs() <= 1e-6 * value + 2e-7, "{backend} {key}");
        }
        assert_eq!(object["tokens"], 6);
        assert_eq!(object["valid_tokens"], 5);
        assert_eq!(object["hard_tokens"], 3);
        assert_eq!(object["backend"], if backend == "auto" { "cpu" } else { backend });

        let bytes = std::fs::read(&out).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let values = |name: &str| -> Vec<f32> {
            let tensor = file.tensor(name).unwrap();
            assert_eq!(tensor.dtype(), Dtype::F32);
            let chunks = tensor.data().chunks(4);
            chunks.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
        };
        assert_eq!(file.tensor("grad").unwrap().shape(), [TOKENS, VOCAB]);
        for (g, exact) in values("grad").into_iter().zip(&gradient) {
            assert!((f64::from(g) - exact).abs() <= 2e-7, "{backend}: {g}, {exact}");
        }
        let columns: HashMap<&str, Vec<f32>> =
            ["uncertainty", "tkd", "dkd", "loss"].map(|name| (name, values(name))).into();
        let hard = file.tensor("hard").unwrap();
        assert_eq!(hard.dtype(), Dtype::U8);
        for (i, token) in exact.tokens.iter().enumerate() {
            assert_eq!(hard.data()[i] == 1, token.hard);
            for (name, value) in [
                ("uncertainty", token.uncertainty),
                ("tkd", token.tkd),
                ("dkd", token.dkd),
                ("loss", token.loss),
            ] {
                assert!((f64::from(columns[name][i]) - value).abs() <= 2e-6 * (1.0 + value));
            }
        }
    }
    assert_eq!(files.names(), ["batch", "out"], "no temporary file is left");
}

#[test]
fn half_precision_gradients_keep_the_student_s_dtype() {
    let files = Files::new();
    let student: Vec<u8> =
        files.student.iter().flat_map(|&z| half::bf16::from_f32(z).to_le_bytes()).collect();
    let labels = [0_u8; 8 * TOKENS];
    let shape = &[TOKENS, VOCAB];
    let path = files.save(
        "batch",
        &[
            ("student", Dtype::BF16, shape, &student),
            ("teacher", Dtype::F32, shape, &little_endian(&files.teacher)),
            ("labels", Dtype::I64, &[TOKENS], &labels),
        ],
    );
    let out = files.path("out");
    json(loss(&path, &["--json", "--grad", out.to_str().unwrap()]));
    let bytes = std::fs::read(out).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("grad").unwrap().dtype(), Dtype::BF16);
}

/// Every option changes what it says: against the library on the same input.
#[test]
fn options_reach_the_objective() {
    let files = Files::new();
    let path = files.batch("batch", &files.labels);
    let batch = || {
        let teacher = Logits::new(&files.teacher, TOKENS, VOCAB).unwrap();
        Batch::new(teacher, &files.labels).unwrap()
    };
    let student = Logits::new(&files.student, TOKENS, VOCAB).unwrap();
    let o = Objective::default();
    let cases: Vec<(&[&str], atkd::Result<Objective>)> = vec![
        (&["--objective", "plain"], Ok(Objective::plain())),
        (&["--objective", "kl"], Ok(Objective::kl())),
        (&["--divergence", "reverse-kl"], o.with_divergence(Divergence::ReverseKl)),
        (
            &["--objective", "plain", "--divergence", "jsd"],
            Objective::plain().with_divergence(Divergence::Jsd { beta: 0.5 }),
        ),
        (
            &["--divergence", "jsd", "--beta", "0.1"],
            o.with_divergence(Divergence::Jsd { beta: 0.1 }),
        ),
        (&["--divergence", "tvd"], o.with_divergence(Divergence::TotalVariation)),
        (
            &["--divergence", "skew-kl", "--beta", "0.2"],
            o.with_divergence(Divergence::SkewKl { alpha: 0.2 }),
        ),
        (
            &["--divergence", "skew-reverse-kl", "--beta", "0.2"],
            o.with_divergence(Divergence::SkewReverseKl { alpha: 0.2 }),
        ),
        (&["--objective", "tkd"], Ok(Objective::tkd())),
        (&["--objective", "dkd"], Ok(Objective::dkd())),
        (&["--lambda", "0.35"], Objective::atkd(0.35)),
        (&["--hard-ratio", "0.2"], o.with_hard_ratio(0.2)),
        (&["--temperature", "2.5"], o.with_temperature(2.5)),
        (
            &["--temperature", "2.5", "--temperature-squared"],
            o.with_temperature(2.5).map(|o| o.with_temperature_squared(true)),
        ),
        (&["--target", "teacher"], Ok(o.with_target(atkd::Target::Teacher))),
        (&["--reduction", "sum"], o.with_reduction(atkd::Reduction::Sum)),
        (&["--reduction", "group-mean"], o.with_reduction(atkd::Reduction::GroupMean)),
        (&["--selection-rule", "median"], Ok(o.with_selection_rule(atkd::SelectionRule::Median))),
        (
            &["--selection-rule", "median", "--reduction", "group-mean", "--ce-weight", "0.5"],
            o.with_selection_rule(atkd::SelectionRule::Median)
                .with_ce_weight(0.5)
                .and_then(|o| o.with_reduction(atkd::Reduction::GroupMean)),
        ),
        (&["--ce-weight", "0.5"], o.with_ce_weight(0.5)),
        (&["--kd-weight", "0.25"], o.with_kd_weight(0.25)),
    ];
    for (options, objective) in cases {
        let exact = reference::forward(&objective.unwrap(), &batch(), student).unwrap().loss;
        let object = json(loss(&path, &[options, &["--json"]].concat()));
        let actual = object["loss"].as_f64().unwrap();
        assert!((actual - exact).abs() <= 1e-6 * exact + 2e-7, "{options:?}: {actual}, {exact}");
    }
    let labels = [3, 0, 1, 49, 7, 7];
    let object = json(loss(&files.batch("other", &labels), &["--ignore-index", "7", "--json"]));
    assert_eq!(object["valid_tokens"], 4);
}

/// Entropies are at the temperature, per token and as means of the valid ones.
#[test]
fn entropies_of_both_models() {
    let files = Files::new();
    let path = files.batch("batch", &files.labels);
    let entropies =
        |rows| reference::token_entropies(Logits::new(rows, TOKENS, VOCAB).unwrap(), 2.0).unwrap();
    let models = [("teacher", entropies(&files.teacher)), ("student", entropies(&files.student))];
    for backend in ["cpu", "simt", "reference"] {
        let out = files.path("out");
        let options =
            ["--backend", backend, "--temperature", "2", "--entropies", "--json", "--grad"];
        let object = json(loss(&path, &[&options[..], &[out.to_str().unwrap()]].concat()));
        let bytes = std::fs::read(&out).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for (model, exact) in &models {
            let column = file.tensor(&format!("{model}_entropy")).unwrap();
            assert_eq!((column.dtype(), column.shape()), (Dtype::F32, &[TOKENS][..]));
            let found = column.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            for (found, exact) in found.zip(exact) {
                assert!((f64::from(found) - exact).abs() <= 2e-6 * (1.0 + exact), "{backend}");
            }
            let valid = files.labels.iter().zip(exact).filter(|(label, _)| **label != -100);
            let mean = valid.map(|(_, entropy)| entropy).sum::<f64>() / 5.0;
            let printed = object[format!("mean_{model}_entropy")].as_f64().unwrap();
            assert!((printed - mean).abs() <= 2e-6 * (1.0 + mean), "{backend} {printed} {mean}");
        }
    }
    let plain = json(loss(&path, &["--json"]));
    assert!(plain.get("mean_teacher_entropy").is_none());
    let table = loss(&path, &["--entropies"]).output().unwrap().stdout;
    let table = String::from_utf8(table).unwrap();
    assert!(table.contains("mean entropy of the teacher"), "{table}");
}

/// Known tokens in a row.
const TOP_K: usize = 3;

/// A sparse teacher's tensors.
struct Known {
    indices: Vec<i64>,
    log_probs: Vec<f32>,
    of_targets: Vec<f32>,
}

impl Known {
    /// The first tokens of the teacher's rows that are not the label, and one place that is empty.
    fn new(files: &Files) -> Self {
        let mut known = Self { indices: Vec::new(), log_probs: Vec::new(), of_targets: Vec::new() };
        for (row, &label) in files.teacher.chunks(VOCAB).zip(&files.labels) {
            let log_sum = row.iter().map(|&z| f64::from(z).exp()).sum::<f64>().ln();
            let log_prob = |j: usize| (f64::from(row[j]) - log_sum) as f32;
            for j in (0..VOCAB).filter(|&j| j as i64 != label).take(TOP_K) {
                known.indices.push(j as i64);
                known.log_probs.push(log_prob(j));
            }
            known.of_targets.push(usize::try_from(label).map_or(f32::NAN, log_prob));
        }
        known.indices[4] = -1;
        known
    }

    /// A file of these, of the student, the labels, and other tensors.
    fn save(&self, files: &Files, name: &str, others: &[Tensor]) -> PathBuf {
        let integers = |values: &[i64]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let (indices, labels): (Vec<u8>, Vec<u8>) =
            (integers(&self.indices), integers(&files.labels));
        let top_k = self.indices.len() / TOKENS;
        let (student, log_probs) = (little_endian(&files.student), little_endian(&self.log_probs));
        let of_targets = little_endian(&self.of_targets);
        let all: [Tensor; 5] = [
            ("student", Dtype::F32, &[TOKENS, VOCAB], &student),
            ("labels", Dtype::I64, &[TOKENS], &labels),
            ("teacher_indices", Dtype::I64, &[TOKENS, top_k], &indices),
            ("teacher_log_probs", Dtype::F32, &[TOKENS, TOP_K], &log_probs),
            ("teacher_target_log_prob", Dtype::F32, &[self.of_targets.len()], &of_targets),
        ];
        // Others stand for these; those without elements take them out.
        let is_other = |name: &str| others.iter().any(|other| other.0 == name);
        let mut tensors: Vec<Tensor> =
            all.into_iter().filter(|tensor| !is_other(tensor.0)).collect();
        tensors.extend(others.iter().filter(|tensor| !tensor.3.is_empty()));
        files.save(name, &tensors)
    }
}

/// KL(p, q) summed over the tokens, and its gradient, from the textbook: of the classes that a tail makes.
fn textbook_kl(files: &Files, known: &Known, tail: &str) -> (f64, Vec<f64>) {
    let (mut loss, mut gradient) = (0.0, vec![0.0; TOKENS * VOCAB]);
    for token in (0..TOKENS).filter(|&token| files.labels[token] >= 0) {
        let of_row = token * TOP_K..(token + 1) * TOP_K;
        let of_target = (files.labels[token], known.of_targets[token]);
        let pairs = known.indices[of_row.clone()].iter().zip(&known.log_probs[of_row]);
        let p: HashMap<usize, f64> = pairs
            .map(|(&j, &log)| (j, log))
            .chain([of_target])
            .filter(|&(j, _)| j >= 0)
            .map(|(j, log)| (j as usize, f64::from(log).exp()))
            .collect();
        let row = &files.student[token * VOCAB..][..VOCAB];
        let sum: f64 = row.iter().map(|&z| f64::from(z).exp()).sum();
        let q: Vec<f64> = row.iter().map(|&z| f64::from(z).exp() / sum).collect();
        let mass: f64 = p.values().sum();
        let rest_q = 1.0 - p.keys().map(|&j| q[j]).sum::<f64>();
        if tail == "bucket" {
            loss += (1.0 - mass) * ((1.0 - mass) / rest_q).ln();
        }
        for (j, &q) in q.iter().enumerate() {
            let of_token = match (p.get(&j), tail) {
                (Some(p), "zero") => p / mass,
                (Some(p), _) => *p,
                (None, "uniform") => (1.0 - mass) / (VOCAB - p.len()) as f64,
                (None, _) => 0.0,
            };
            loss += if of_token > 0.0 { of_token * (of_token / q).ln() } else { 0.0 };
            let in_bucket = tail == "bucket" && !p.contains_key(&j);
            let share = if in_bucket { (1.0 - mass) * q / rest_q } else { of_token };
            gradient[token * VOCAB + j] = q - share;
        }
    }
    (loss, gradient)
}

#[test]
fn sparse_teachers() {
    let files = Files::new();
    let known = Known::new(&files);
    let path = known.save(&files, "sparse", &[]);
    for backend in ["auto", "cpu", "reference", "simt"] {
        for tail in [None, Some("bucket"), Some("uniform"), Some("zero")] {
            if (backend, tail) == ("simt", Some("uniform")) {
                continue;
            }
            let out = files.path("out");
            let mut options = vec!["--objective", "kl", "--reduction", "sum", "--json"];
            options.extend(["--backend", backend, "--grad", out.to_str().unwrap()]);
            options.extend(tail.iter().flat_map(|tail| ["--tail", tail]));
            let object = json(loss(&path, &options));
            let tail = tail.unwrap_or("bucket");
            let (exact, exact_gradient) = textbook_kl(&files, &known, tail);
            let actual = object["loss"].as_f64().unwrap();
            assert!((actual - exact).abs() <= 2e-6 * exact, "{backend} {tail}: {actual}, {exact}");
            assert_eq!((&object["tail"], &object["top_k"]), (&tail.into(), &TOP_K.into()));
            assert_eq!(object["backend"], if backend == "auto" { "cpu" } else { backend });
            let bytes = std::fs::read(&out).unwrap();
            let written = SafeTensors::deserialize(&bytes).unwrap();
            let (shape, gradient) = floats(&written, "grad");
            assert_eq!(shape, [TOKENS, VOCAB]);
            for (g, exact) in gradient.into_iter().zip(&exact_gradient) {
                assert!((f64::from(g) - exact).abs() <= 2e-6, "{backend} {tail}: {g}, {exact}");
            }
            assert_eq!(written.tensor("hard").unwrap().shape(), [TOKENS]);
        }
    }
    let table = loss(&path, &[]).output().unwrap().stdout;
    let table = String::from_utf8(table).unwrap();
    assert!(table.contains("tail of the teacher") && table.contains("up to 3"), "{table}");
}

/// The other options are those of any loss, against the library; other dtypes, padding, and numbers of the tokens' own.
#[test]
fn sparse_teachers_take_every_option() {
    let files = Files::new();
    let known = Known::new(&files);
    let weights = [1.0, 0.5, 9.0, 0.0, 2.0, 3.0];
    let temperatures = [1.0, 2.0, 0.5, 3.0, 1.0, 4.0];
    let narrow: Vec<u8> = known.indices.iter().flat_map(|&j| (j as i32).to_le_bytes()).collect();
    let half: Vec<half::bf16> =
        known.log_probs.iter().map(|&log| half::bf16::from_f32(log)).collect();
    let half_bytes: Vec<u8> = half.iter().flat_map(|log| log.to_le_bytes()).collect();
    let padded = files.student.chunks(VOCAB).flat_map(|row| row.iter().copied().chain([90.0; 4]));
    let others: [Tensor; 5] = [
        ("student", Dtype::F32, &[TOKENS, VOCAB + 4], &little_endian(&padded.collect::<Vec<_>>())),
        ("teacher_indices", Dtype::I32, &[TOKENS, TOP_K], &narrow),
        ("teacher_log_probs", Dtype::BF16, &[TOKENS, TOP_K], &half_bytes),
        ("token_weights", Dtype::F32, &[TOKENS], &little_endian(&weights)),
        ("temperatures", Dtype::F32, &[TOKENS], &little_endian(&temperatures)),
    ];
    let path = known.save(&files, "sparse", &others);
    let teacher = SparseTeacher::new(&known.indices, &half[..], TOKENS, TOP_K, VOCAB)
        .and_then(|teacher| teacher.with_target_log_probs(&known.of_targets))
        .unwrap()
        .with_tail(Tail::Uniform);
    let batch = Batch::new(teacher, &files.labels)
        .and_then(|batch| batch.with_token_weights(&weights))
        .and_then(|batch| batch.with_temperatures(&temperatures))
        .unwrap();
    let student = Logits::new(&files.student, TOKENS, VOCAB).unwrap();
    let default = Objective::default();
    let cases: [(&[&str], atkd::Result<Objective>); 4] = [
        (&[], Ok(default)),
        (&["--divergence", "reverse-kl"], default.with_divergence(Divergence::ReverseKl)),
        (
            &["--objective", "plain", "--divergence", "jsd", "--beta", "0.1"],
            Objective::plain().with_divergence(Divergence::Jsd { beta: 0.1 }),
        ),
        (
            &["--reduction", "group-mean", "--ce-weight", "0.5"],
            default.with_ce_weight(0.5).and_then(|o| o.with_reduction(atkd::Reduction::GroupMean)),
        ),
    ];
    for (options, objective) in cases {
        let exact = reference::forward(&objective.unwrap(), &batch, student).unwrap();
        let common = ["--vocab-size", "50", "--tail", "uniform", "--json"];
        let object = json(loss(&path, &[options, &common].concat()));
        let actual = object["loss"].as_f64().unwrap();
        assert!((actual - exact.loss).abs() <= 2e-6 * exact.loss, "{options:?}: {actual}");
        assert_eq!(object["hard_tokens"], exact.summary().hard_tokens);
    }
    // Without labels the target is the likeliest of those that are known.
    let path = known.save(&files, "unlabelled", &[("labels", Dtype::I64, &[0], &[])]);
    let object = json(loss(&path, &["--target", "teacher", "--json"]));
    assert_eq!(object["valid_tokens"], 6);
}

/// Draws go from the logits by the cache to the loss; the same seed draws the same, and each token by itself.
#[test]
fn a_teacher_of_draws() {
    let files = Files::new();
    let options = ["--top-k", "16", "--sampled", "--seed", "3"];
    assert!(pack(&files, &files.labels, &options).output().unwrap().status.success());
    let cache = TeacherCache::open(files.path("cache")).unwrap();
    let rows = cache.read(0..TOKENS).unwrap();
    for (token, &label) in files.labels.iter().enumerate().filter(|(_, label)| **label >= 0) {
        let entries = &rows.indices[token * 16..][..16];
        assert!(!entries.contains(&(label as i32)) && entries[0] >= 0, "{entries:?}");
        let weights = &rows.log_probs[token * 16..][..16];
        let mass: f64 = weights.iter().map(|&weight| f64::from(weight).exp()).sum();
        let left = -f64::from(rows.target_log_prob[token]).exp_m1();
        assert!((mass - left).abs() < 2e-3, "{mass} {left}");
        // A draw has a sixteenth of what the label leaves.
        for weight in weights.iter().filter(|weight| weight.is_finite()) {
            let count = 16.0 * f64::from(*weight).exp() / left;
            assert!((count - count.round()).abs() < 0.05 * count, "{count}");
        }
    }
    let other = Files::new();
    let options = ["--top-k", "16", "--sampled", "--seed", "4"];
    assert!(pack(&other, &other.labels, &options).output().unwrap().status.success());
    let of_other = TeacherCache::open(other.path("cache")).unwrap().read(0..TOKENS).unwrap();
    assert_ne!(of_other.indices, rows.indices);
    assert_eq!(of_other.target_log_prob, rows.target_log_prob);

    let known = Known::new(&files);
    let path = known.save(&files, "sparse", &[]);
    let sampled = SparseTeacher::new(&known.indices, &known.log_probs, TOKENS, TOP_K, VOCAB)
        .and_then(|teacher| teacher.with_target_log_probs(&known.of_targets))
        .unwrap()
        .with_tail(Tail::Sampled);
    let batch = Batch::new(sampled, &files.labels).unwrap();
    let student = Logits::new(&files.student, TOKENS, VOCAB).unwrap();
    let exact = reference::forward(&Objective::default(), &batch, student).unwrap();
    let object = json(loss(&path, &["--tail", "sampled", "--json"]));
    let actual = object["loss"].as_f64().unwrap();
    assert!((actual - exact.loss).abs() <= 2e-6 * exact.loss, "{actual} {}", exact.loss);
    assert_eq!(object["tail"], "sampled");
    fails(
        loss(&path, &["--tail", "sampled", "--divergence", "jsd"]),
        &["forward KL alone", "such as tkd"],
    );
    let unsampled = pack(&files, &files.labels, &["--seed", "3"]).output().unwrap();
    assert_eq!(unsampled.status.code(), Some(2));
    assert!(String::from_utf8(unsampled.stderr).unwrap().contains("--sampled"));
}

#[test]
fn bad_sparse_teachers() {
    let files = Files::new();
    let known = Known::new(&files);
    let path = known.save(&files, "sparse", &[]);
    fails(
        loss(&path, &["--backend", "simt", "--tail", "uniform"]),
        &["simt", "no kernel", "--backend cpu", "--tail bucket"],
    );
    fails(loss(&path, &["--shards", "2"]), &["--shards", "sparse teacher"]);
    fails(loss(&path, &["--entropies"]), &["--entropies", "sparse teacher"]);
    fails(
        loss(&path, &["--tail", "zero", "--divergence", "reverse-kl"]),
        &["reverse KL is infinite", "bucket"],
    );
    fails(loss(&path, &["--vocab-size", "2"]), &["token 0", "index", "vocabulary size 2"]);
    let dense = files.batch("dense", &files.labels);
    fails(loss(&dense, &["--tail", "bucket"]), &["--tail", "`teacher_indices`"]);

    let case = |others: &[Tensor], words: &[&str]| {
        fails(loss(&known.save(&files, "case", others), &[]), words);
    };
    let logits = little_endian(&files.teacher);
    case(
        &[("teacher", Dtype::F32, &[TOKENS, VOCAB], &logits)],
        &["`teacher_indices` and `teacher`", "either"],
    );
    case(
        &[("student_hidden", Dtype::F32, &[TOKENS, VOCAB], &logits)],
        &["`teacher_indices` and `student_hidden`"],
    );
    case(&[("teacher_indices", Dtype::I64, &[0], &[])], &["no tensor `teacher_indices`"]);
    case(&[("teacher_log_probs", Dtype::F32, &[0], &[])], &["no tensor `teacher_log_probs`"]);
    case(
        &[("teacher_target_log_prob", Dtype::F32, &[0], &[])],
        &["token 0", "target 3", "not among its 3 indices", "give the target's log-probabilities"],
    );
    let bytes = |count: usize| vec![0_u8; count];
    case(
        &[("teacher_indices", Dtype::I64, &[TOKENS * TOP_K], &bytes(144))],
        &["`teacher_indices`", "[18]", "[N, K]"],
    );
    case(
        &[("teacher_indices", Dtype::F32, &[TOKENS, TOP_K], &bytes(72))],
        &["`teacher_indices` is F32", "I64 (or I32)"],
    );
    case(
        &[("teacher_log_probs", Dtype::F32, &[TOKENS, 2], &bytes(48))],
        &["[6, 3]", "`teacher_log_probs` is [6, 2]"],
    );
    case(
        &[("teacher_target_log_prob", Dtype::F32, &[5], &bytes(20))],
        &["`teacher_target_log_prob`", "5", "6"],
    );
    case(
        &[("student", Dtype::F32, &[4, VOCAB], &bytes(800))],
        &["`student` is [4, 50]", "`teacher_indices` is [6, 3]"],
    );
    let changed = |change: fn(&mut Known), words: &[&str]| {
        let mut known = Known::new(&files);
        change(&mut known);
        fails(loss(&known.save(&files, "changed", &[]), &[]), words);
    };
    changed(|known| known.indices[10] = 50, &["index 1", "token 3 is 50", "vocabulary size 50"]);
    changed(|known| known.indices[1] = 0, &["token 0", "index 0 twice"]);
    changed(|known| known.log_probs[5] = f32::NAN, &["log-probability 2", "token 1 is NaN"]);
    changed(|known| known.log_probs[9] = 0.2, &["token 3", "1.30622", "more than 1", "logits"]);
    changed(|known| known.of_targets[4] = 0.5, &["token 4 is 0.5", "at most 1"]);
}

#[test]
fn numbers_that_json_lacks() {
    let mut files = Files::new();
    files.student[5] = f32::NAN;
    let path = files.batch("nan", &files.labels);
    let object = json(loss(&path, &["--json"]));
    assert_eq!((&object["loss"], &object["non_finite_tokens"]), (&"NaN".into(), &1.into()));
    files.student[5] = f32::NEG_INFINITY;
    let object = json(loss(&files.batch("inf", &files.labels), &["--json"]));
    assert_eq!(object["loss"], "Infinity");
    let object = json(loss(&files.batch("none", &[-100; TOKENS]), &["--json"]));
    assert_eq!((&object["loss"], &object["hard_tokens"]), (&0.0.into(), &0.into()));
    assert!(object["threshold_uncertainty"].is_null());
}

#[test]
fn bad_settings() {
    let files = Files::new();
    let path = files.batch("batch", &files.labels);
    fails(loss(&path, &["--lambda", "7"]), &["lambda is 7", "[0, 1]"]);
    fails(loss(&path, &["--objective", "kl", "--lambda", "7"]), &["lambda is 7"]);
    fails(loss(&path, &["--beta", "1.5"]), &["beta is 1.5", "[0, 1]"]);
    fails(
        loss(&path, &["--divergence", "skew-kl", "--beta", "1"]),
        &["beta elsewhere) is 1", "[0, 1)"],
    );
    fails(
        loss(&path, &["--objective", "kl", "--divergence", "tvd"]),
        &["--objective plain", "forward KL"],
    );
    fails(loss(&path, &["--hard-ratio", "1.5"]), &["hard ratio is 1.5", "[0, 1]"]);
    fails(loss(&path, &["--temperature", "0"]), &["temperature is 0"]);
    let no_gpu = cuda::context(0).and_then(|context| cuda::Kernels::load(&context)).is_err();
    for command in [&["loss", path.to_str().unwrap()][..], &["gradcheck"], &["bench"]] {
        if no_gpu {
            fails(atkd(&[command, &["--backend", "cuda"]].concat()), &["cuda", "--backend cpu"]);
        }
    }
    fails(atkd(&["bench", "--tokens", "0"]), &["--tokens 0"]);
    for runs in ["0", "1000001", "4294967296", &u64::MAX.to_string()] {
        fails(
            atkd(&["bench", "--runs", runs, "--tokens", "1", "--vocab", "10"]),
            &[&format!("--runs is {runs}"), "at least 1", "1000000"],
        );
    }
    let huge = u64::MAX.to_string();
    fails(atkd(&["bench", "--tokens", &huge]), &["does not fit"]);
    // A product that an address holds and no allocation does, and one that no machine has.
    fails(atkd(&["bench", "--tokens", "2000000000000000000", "--vocab", "2"]), &["memory"]);
    fails(atkd(&["bench", "--tokens", "1000000000", "--vocab", "1000000"]), &["do not fit"]);
    fails(loss(&path, &["--lambda", "-1"]), &["lambda is -1"]);
    fails(loss(&path, &["--shards", "2", "--backend", "reference"]), &["reference", "no shards"]);
    fails(loss(&path, &["--ce-weight", "-0.5"]), &["cross-entropy weight is -0.5"]);
}

#[test]
fn bad_files() {
    let files = Files::new();
    let shape: &[usize] = &[TOKENS, VOCAB];
    let logits = little_endian(&files.student);
    let labels = [0_u8; 8 * TOKENS];
    let student = ("student", Dtype::F32, shape, &logits[..]);
    let teacher = ("teacher", Dtype::F32, shape, &logits[..]);
    let label = ("labels", Dtype::I64, &[TOKENS][..], &labels[..]);

    fails(loss(&files.path("absent"), &[]), &["absent", "No such file"]);
    fails(loss(files.folder.path(), &[]), &["cannot read", "is a directory", "regular file"]);
    std::fs::write(files.path("text"), "not safetensors at all").unwrap();
    fails(loss(&files.path("text"), &[]), &["text", "not a safetensors file"]);
    std::fs::write(files.path("empty"), "").unwrap();
    fails(loss(&files.path("empty"), &[]), &["empty"]);
    let whole = std::fs::read(files.batch("batch", &files.labels)).unwrap();
    std::fs::write(files.path("cut"), &whole[..whole.len() - 9]).unwrap();
    fails(loss(&files.path("cut"), &[]), &["cut", "not a safetensors file"]);

    let save = |tensors: &[_]| loss(&files.save("case", tensors), &[]);
    fails(save(&[student, label]), &["`teacher`", "labels, student"]);
    fails(save(&[student, teacher]), &["`labels`"]);
    let narrow = ("teacher", Dtype::F32, &[TOKENS * 2, VOCAB / 2][..], &logits[..]);
    fails(save(&[student, narrow, label]), &["[6, 50]", "[12, 25]", "student"]);
    let flat = ("student", Dtype::F32, &[TOKENS * VOCAB][..], &logits[..]);
    fails(save(&[flat, teacher, label]), &["`student`", "[300]", "[N, V]"]);
    let wrong = ("student", Dtype::I32, shape, &logits[..]);
    fails(save(&[wrong, teacher, label]), &["`student` is I32", "BF16"]);
    let wrong = ("labels", Dtype::F32, &[TOKENS * 2][..], &labels[..]);
    fails(save(&[student, teacher, wrong]), &["`labels` is F32", "I64"]);
    let few = ("labels", Dtype::I64, &[TOKENS - 1][..], &labels[8..]);
    fails(save(&[student, teacher, few]), &["5 labels", "6 tokens"]);
    let square = ("labels", Dtype::I64, &[TOKENS, 1][..], &labels[..]);
    fails(save(&[student, teacher, square]), &["`labels`", "[6, 1]"]);
    let none = ["student", "teacher"].map(|name| (name, Dtype::F32, &[TOKENS, 0][..], &[][..]));
    fails(save(&[none[0], none[1], label]), &["vocabulary 0"]);
}

/// Columns beyond `--vocab-size`, of which each model has as many as it likes, and numbers of the tokens' own.
#[test]
fn padded_vocabularies_and_numbers_of_tokens() {
    let files = Files::new();
    let labels: Vec<u8> = files.labels.iter().flat_map(|label| label.to_le_bytes()).collect();
    let padded = |rows: &[f32], columns: usize| -> Vec<u8> {
        let padding = vec![60.0; columns - VOCAB];
        let rows = rows.chunks(VOCAB).flat_map(|row| row.iter().chain(&padding)).copied();
        little_endian(&rows.collect::<Vec<f32>>())
    };
    let weights = [1.0, 0.5, 9.0, 0.0, 2.0, 3.0];
    let temperatures = [1.0, 2.0, 0.5, 3.0, 1.0, 4.0];
    let save = |name: &str, weights: &[f32]| {
        files.save(
            name,
            &[
                ("student", Dtype::F32, &[TOKENS, 64], &padded(&files.student, 64)),
                ("teacher", Dtype::F32, &[TOKENS, 56], &padded(&files.teacher, 56)),
                ("labels", Dtype::I64, &[TOKENS], &labels),
                ("token_weights", Dtype::F32, &[weights.len()], &little_endian(weights)),
                ("temperatures", Dtype::F32, &[TOKENS], &little_endian(&temperatures)),
            ],
        )
    };
    let path = save("padded", &weights);
    fails(loss(&path, &[]), &["[6, 64]", "[6, 56]", "--vocab-size"]);
    fails(loss(&path, &["--vocab-size", "57"]), &["`teacher`", "vocabulary size is 57", "56"]);
    let few = save("few", &weights[..5]);
    fails(loss(&few, &["--vocab-size", "50"]), &["`token_weights`", "5", "6"]);

    let view = |rows| Logits::new(rows, TOKENS, VOCAB).unwrap();
    let batch = Batch::new(view(&files.teacher), &files.labels).unwrap();
    let batch = batch.with_token_weights(&weights).unwrap();
    let batch = batch.with_temperatures(&temperatures).unwrap();
    let (exact, exact_gradient) =
        reference::forward_backward(&Objective::default(), &batch, view(&files.student)).unwrap();
    for backend in ["cpu", "simt", "reference"] {
        let out = files.path(backend);
        let options = ["--vocab-size", "50", "--backend", backend, "--json", "--grad"];
        let options = [&options[..], &[out.to_str().unwrap()]].concat();
        let printed = json(loss(&path, &options));
        assert!((printed["loss"].as_f64().unwrap() - exact.loss).abs() < 1e-6);
        let bytes = std::fs::read(&out).unwrap();
        let written = SafeTensors::deserialize(&bytes).unwrap();
        let gradient = written.tensor("grad").unwrap();
        assert_eq!(gradient.shape(), [TOKENS, 64]);
        let gradient: Vec<f32> = gradient
            .data()
            .chunks(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        for (row, exact) in gradient.chunks(64).zip(exact_gradient.chunks(VOCAB)) {
            assert!(row[VOCAB..].iter().all(|&g| g == 0.0));
            assert!(row.iter().zip(exact).all(|(g, exact)| (f64::from(*g) - exact).abs() < 1e-6));
        }
    }
}

/// A hidden size of each model.
const SIZES: [usize; 2] = [3, 4];

impl Files {
    /// Hidden states and weights of random numbers: a product with these is a model's logits.
    fn layers(&self) -> [(Vec<f32>, Vec<f32>); 2] {
        let mut random = fastrand::Rng::with_seed(5);
        SIZES.map(|size| {
            let mut numbers =
                |count: usize| (0..count).map(|_| 2.0 * random.f32() - 1.0).collect::<Vec<f32>>();
            (numbers(TOKENS * size), numbers(VOCAB * size))
        })
    }
}

fn floats(written: &SafeTensors, name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensor = written.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
    let numbers = tensor.data().chunks(4);
    let numbers = numbers.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
    (tensor.shape().to_vec(), numbers)
}

#[test]
fn hidden_states() {
    let files = Files::new();
    let labels: Vec<u8> = files.labels.iter().flat_map(|label| label.to_le_bytes()).collect();
    let [student, teacher] = files.layers();
    let bias: Vec<f32> = (0..VOCAB).map(|word| (word % 5) as f32 * 0.2).collect();
    let logits = |(hidden, weight): &(Vec<f32>, Vec<f32>), size: usize, bias: Option<&[f32]>| {
        let mut logits = Vec::new();
        for hidden in hidden.chunks(size) {
            for (word, weight) in weight.chunks(size).enumerate() {
                let product: f32 = hidden.iter().zip(weight).map(|(h, w)| h * w).sum();
                logits.push(product + bias.map_or(0.0, |bias| bias[word]));
            }
        }
        logits
    };
    let (of_student, of_teacher) =
        (logits(&student, SIZES[0], Some(&bias)), logits(&teacher, SIZES[1], None));
    let view = |rows| Logits::new(rows, TOKENS, VOCAB).unwrap();
    let batch = Batch::new(view(&of_teacher), &files.labels).unwrap();
    let (exact, of_logits) =
        reference::forward_backward(&Objective::default(), &batch, view(&of_student)).unwrap();

    let bytes = [&student.0, &student.1, &teacher.0, &teacher.1, &bias].map(|v| little_endian(v));
    let tensors: Vec<(&str, Dtype, &[usize], &[u8])> = vec![
        ("student_hidden", Dtype::F32, &[TOKENS, 3], &bytes[0]),
        ("student_weight", Dtype::F32, &[VOCAB, 3], &bytes[1]),
        ("teacher_hidden", Dtype::F32, &[TOKENS, 4], &bytes[2]),
        ("teacher_weight", Dtype::F32, &[VOCAB, 4], &bytes[3]),
        ("student_bias", Dtype::F32, &[VOCAB], &bytes[4]),
        ("labels", Dtype::I64, &[TOKENS], &labels),
    ];
    let path = files.save("hidden", &tensors);
    for options in [&["--backend", "cpu"][..], &["--chunk", "1"], &["--chunk", "4"]] {
        let out = files.path("out");
        let more = ["--json", "--grad", out.to_str().unwrap()];
        let printed = json(loss(&path, &[options, &more].concat()));
        assert!((printed["loss"].as_f64().unwrap() - exact.loss).abs() < 1e-5);
        assert_eq!(printed["backend"], "cpu");
        assert_eq!(printed["hard_tokens"], 3);
        let bytes = std::fs::read(&out).unwrap();
        let written = SafeTensors::deserialize(&bytes).unwrap();
        assert!(written.tensor("grad").is_err());
        let (shape, hidden) = floats(&written, "grad_hidden");
        assert_eq!(shape, [TOKENS, 3]);
        let (shape, weight) = floats(&written, "grad_weight");
        assert_eq!(shape, [VOCAB, 3]);
        let (shape, of_bias) = floats(&written, "grad_bias");
        assert_eq!(shape, [VOCAB]);
        assert_eq!(floats(&written, "dkd").0, [TOKENS]);
        let gradient = |token: usize, word: usize| of_logits[token * VOCAB + word];
        let close = |found: f32, exact: f64| assert!((f64::from(found) - exact).abs() < 1e-5);
        for i in 0..3 {
            for token in 0..TOKENS {
                let of = |word: usize| gradient(token, word) * f64::from(student.1[word * 3 + i]);
                close(hidden[token * 3 + i], (0..VOCAB).map(of).sum());
            }
            for word in 0..VOCAB {
                let of = |token: usize| gradient(token, word) * f64::from(student.0[token * 3 + i]);
                close(weight[word * 3 + i], (0..TOKENS).map(of).sum());
            }
        }
        for (word, &found) in of_bias.iter().enumerate() {
            close(found, (0..TOKENS).map(|token| gradient(token, word)).sum());
        }
    }
    let without_gradient = json(loss(&path, &["--json"]));
    assert!((without_gradient["loss"].as_f64().unwrap() - exact.loss).abs() < 1e-5);

    // Known log-probabilities of the labels select, whatever the logits say.
    let log_probs = [-0.1_f32, -3.0, -0.2, -0.3, -2.0, -1.0];
    let bytes_of_log_probs = little_endian(&log_probs);
    let mut selected = tensors.clone();
    selected.push(("teacher_log_prob", Dtype::F32, &[TOKENS], &bytes_of_log_probs));
    let out = files.path("out");
    json(loss(&files.save("selected", &selected), &["--json", "--grad", out.to_str().unwrap()]));
    let written = std::fs::read(&out).unwrap();
    let hard = SafeTensors::deserialize(&written).unwrap();
    let hard = hard.tensor("hard").unwrap().data().to_vec();
    let valid: Vec<usize> = (0..TOKENS).filter(|&token| files.labels[token] != -100).collect();
    let mut expected = valid.clone();
    expected.sort_by(|&a, &b| log_probs[a].total_cmp(&log_probs[b]));
    expected.truncate(valid.len().div_ceil(2));
    for (token, &hard) in hard.iter().enumerate() {
        assert_eq!(hard == 1, expected.contains(&token), "token {token}");
    }

    for backend in ["simt", "reference"] {
        let words = [backend, "takes logits", "--backend cpu"];
        fails(loss(&path, &["--backend", backend]), &words);
    }
    fails(loss(&path, &["--chunk", "0"]), &["tokens of a chunk is 0", "at least 1"]);
    fails(loss(&path, &["--entropies"]), &["--entropies", "hidden states"]);
    fails(loss(&path, &["--shards", "2"]), &["--shards", "hidden states"]);
    let of_logits = files.batch("batch", &files.labels);
    fails(loss(&of_logits, &["--chunk", "2"]), &["--chunk", "student_hidden"]);
    let with = |name: &str, tensor: (&'static str, Dtype, &'static [usize], &[u8])| {
        let mut changed = tensors.clone();
        changed.retain(|(name, ..)| *name != tensor.0);
        changed.push(tensor);
        files.save(name, &changed)
    };
    let wrong = with("wrong", ("student_weight", Dtype::F32, &[VOCAB - 10, 3], &bytes[1][..480]));
    fails(loss(&wrong, &[]), &["`student_weight`", "40", "50", "--vocab-size"]);
    let wrong = with("wrong", ("teacher_weight", Dtype::F32, &[4, VOCAB], &bytes[3]));
    fails(loss(&wrong, &[]), &["`teacher_weight` is [4, 50]", "[6, 4]", "[V, 4]"]);
    let wrong = with("wrong", ("student_bias", Dtype::F32, &[3], &bytes[4][..12]));
    fails(loss(&wrong, &[]), &["`student_bias`", "3 elements", "50"]);
    let wrong = with("wrong", ("labels", Dtype::I64, &[5], &labels[..40]));
    fails(loss(&wrong, &[]), &["`labels`", "5", "6 tokens"]);
    let both = with("both", ("student", Dtype::F32, &[TOKENS, 3], &bytes[0]));
    fails(loss(&both, &[]), &["`student_hidden` and `student`", "either"]);
    let mut few = tensors.clone();
    few.retain(|(name, ..)| *name != "teacher_weight");
    fails(loss(&files.save("few", &few), &[]), &["no tensor `teacher_weight`"]);
}

#[test]
fn a_failed_run_leaves_no_file() {
    let files = Files::new();
    let out = files.path("out");
    let path = files.batch("batch", &[3, 0, 1, 50, 7, 7]);
    let command = loss(&path, &["--grad", out.to_str().unwrap()]);
    fails(command, &["token 3", "50", "vocabulary size 50"]);
    assert_eq!(files.names(), ["batch"]);

    std::fs::write(&out, "what was there before").unwrap();
    fails(loss(&path, &["--grad", out.to_str().unwrap()]), &["token 3"]);
    assert_eq!(std::fs::read(&out).unwrap(), b"what was there before");

    let folder = files.folder.path();
    fails(loss(&path, &["--grad", folder.to_str().unwrap()]), &["is a directory"]);
}

/// A place where nothing can be written is told before anything is read, let alone computed.
#[test]
fn a_place_that_cannot_be_written_to_is_told_first() {
    let files = Files::new();
    let absent = files.path("absent");
    let fails_at = |place: &Path, words: &[&str]| {
        fails(loss(&absent, &["--grad", place.to_str().unwrap()]), words);
    };
    fails_at(&files.path("nowhere").join("out"), &["cannot write", "no folder", "nowhere"]);
    fails_at(&files.path("out/"), &["out/", "directory"]);
    fails_at(&files.path(&"x".repeat(300)), &["cannot write", "name too long"]);
    let file = files.path("file");
    std::fs::write(&file, "old").unwrap();
    fails_at(&file.join("out"), &["cannot write"]);
    let mut permissions = file.metadata().unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&file, permissions).unwrap();
    fails_at(&file, &["cannot write", "file", "read-only"]);
    assert_eq!(std::fs::read(&file).unwrap(), b"old");
    assert_eq!(files.names(), ["file"]);
}

#[cfg(unix)]
#[test]
fn the_gradient_goes_where_a_link_leads() {
    use std::os::unix::fs::symlink;
    let files = Files::new();
    let path = files.batch("batch", &files.labels);
    std::fs::create_dir(files.path("folder")).unwrap();
    let target = files.path("folder/target");
    // A link to a link, both relative, to a file that is not there, and later is.
    symlink("folder/second", files.path("first")).unwrap();
    symlink("target", files.path("folder/second")).unwrap();
    let link = files.path("first");
    for before in [None, Some("old")] {
        if let Some(before) = before {
            std::fs::write(&target, before).unwrap();
        }
        loss(&path, &["--grad", link.to_str().unwrap()]).assert().success();
        for link in [&link, &files.path("folder/second")] {
            assert!(link.symlink_metadata().unwrap().is_symlink());
        }
        let bytes = std::fs::read(&target).unwrap();
        assert!(SafeTensors::deserialize(&bytes).unwrap().tensor("grad").is_ok());
        assert_eq!(std::fs::read_dir(files.path("folder")).unwrap().count(), 2);
    }
    symlink("circle", files.path("circle")).unwrap();
    fails(
        loss(&path, &["--grad", files.path("circle").to_str().unwrap()]),
        &["cannot write", "circle", "symbolic links"],
    );
    assert_eq!(files.names(), ["batch", "circle", "first", "folder"]);
}

/// However it ends, nothing is left of a gradient that is not whole.
#[cfg(target_os = "linux")]
#[test]
fn a_killed_run_leaves_no_file() {
    let files = Files::new();
    let shape: &[usize] = &[1000, 4000];
    let logits = vec![0; 4_000_000 * 4];
    let labels = vec![0; 1000 * 8];
    let path = files.save(
        "batch",
        &[
            ("student", Dtype::F32, shape, &logits),
            ("teacher", Dtype::F32, shape, &logits),
            ("labels", Dtype::I64, &[1000], &labels),
        ],
    );
    let out = files.path("out");
    for milliseconds in [5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150] {
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_atkd"))
            .arg("loss")
            .arg(&path)
            .args(["--backend", "cpu", "--grad", out.to_str().unwrap()])
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
        if out.exists() {
            assert!(SafeTensors::deserialize(&std::fs::read(&out).unwrap()).is_ok());
            std::fs::remove_file(&out).unwrap();
        }
        assert_eq!(files.names(), ["batch"], "killed after {milliseconds} ms");
    }
}

/// A file that cannot be mapped into memory is refused at once, without a wait for a pipe that nobody writes to.
#[cfg(unix)]
#[test]
fn pipes_and_devices_are_no_input() {
    let files = Files::new();
    let pipe = files.path("pipe");
    Command::new("mkfifo").arg(&pipe).assert().success();
    let mut command = loss(&pipe, &[]);
    command.timeout(std::time::Duration::from_secs(20));
    fails(command, &["cannot read", "pipe", "regular file"]);
    fails(loss(Path::new("/dev/null"), &[]), &["cannot read", "/dev/null", "device"]);
    // A shell's <(...) is such a pipe.
    let mut command = loss(Path::new("/dev/stdin"), &[]);
    command.write_stdin("{}");
    fails(command, &["cannot read", "/dev/stdin", "pipe"]);
}

#[test]
fn the_version_is_the_program_s() {
    for flag in ["--version", "-V"] {
        let output = atkd(&[flag]).output().unwrap();
        let expected = format!("atkd {}\n", env!("CARGO_PKG_VERSION"));
        assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    }
}

/// A driver's library without the driver's functions.
#[cfg(target_os = "linux")]
#[test]
fn a_driver_without_functions() {
    let files = Files::new();
    let path = files.batch("batch", &files.labels);
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-x", "c", "/dev/null", "-o"]).arg(files.path("libcuda.so"));
    compiler.assert().success();
    let with_driver = |arguments: &[&str]| {
        let mut command = atkd(arguments);
        command.env("LD_LIBRARY_PATH", files.folder.path());
        command
    };
    let batch = path.to_str().unwrap();
    let words = ["libcuda has no cuCtxGetCurrent", "CUDA 12.0"];
    assert_eq!(json(with_driver(&["loss", batch, "--json"]))["backend"], "cpu");
    let told = with_driver(&["loss", batch, "--backend", "cuda"]).output().unwrap().stderr;
    if String::from_utf8_lossy(&told).contains("the CUDA kernels are not in this build") {
        eprintln!(
            "SKIPPED: a_driver_without_functions: a build without kernels looks for no driver"
        );
        return;
    }
    fails(with_driver(&["loss", batch, "--backend", "cuda"]), &words);
    let info = with_driver(&["info"]).output().unwrap();
    assert!(info.status.success() && String::from_utf8_lossy(&info.stdout).contains(words[0]));
}

/// 36864 threads run at once, in teams: none may take a mapping of the process, let alone two, of which Linux allows
/// 65530.
#[test]
fn the_simulator_takes_an_ordinary_batch() {
    let files = Files::new();
    let (tokens, vocab) = (32, 32_000);
    let mut random = fastrand::Rng::with_seed(4);
    let mut logits = || {
        let values: Vec<f32> = (0..tokens * vocab).map(|_| 5.0 * random.f32()).collect();
        little_endian(&values)
    };
    let labels: Vec<u8> = (0..tokens as i64).flat_map(|label| label.to_le_bytes()).collect();
    let path = files.save(
        "batch",
        &[
            ("student", Dtype::F32, &[tokens, vocab], &logits()),
            ("teacher", Dtype::F32, &[tokens, vocab], &logits()),
            ("labels", Dtype::I64, &[tokens], &labels),
        ],
    );
    let loss = |backend| {
        let object = json(loss(&path, &["--backend", backend, "--json"]));
        object["loss"].as_f64().unwrap()
    };
    let (simulated, exact) = (loss("simt"), loss("reference"));
    assert!((simulated - exact).abs() <= 1e-6 * exact + 2e-7, "{simulated} {exact}");
}

#[test]
fn the_gradient_overwrites_neither_its_input_nor_a_device() {
    let files = Files::new();
    let path = files.batch("batch", &files.labels);
    let before = std::fs::read(&path).unwrap();
    fails(loss(&path, &["--grad", path.to_str().unwrap()]), &["read from"]);
    assert_eq!(std::fs::read(&path).unwrap(), before);

    #[cfg(unix)]
    {
        // A socket of our own: a test must not risk the machine's devices.
        let socket = files.path("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        fails(loss(&path, &["--grad", socket.to_str().unwrap()]), &["device or pipe"]);
        assert!(!socket.metadata().unwrap().is_file());
        assert_eq!(files.names(), ["batch", "socket"]);
    }
}

#[cfg(unix)]
#[test]
fn the_gradient_s_file_obeys_the_umask() {
    use std::os::unix::fs::PermissionsExt;
    let files = Files::new();
    files.batch("batch", &files.labels);
    for (umask, mode) in [("022", 0o644), ("077", 0o600)] {
        // A bare name, in the current folder.
        let script = format!("umask {umask} && exec \"$0\" loss batch --grad out");
        let mut shell = Command::new("sh");
        shell.args(["-c", &script, env!("CARGO_BIN_EXE_atkd")]).current_dir(files.folder.path());
        shell.assert().success();
        let actual = files.path("out").metadata().unwrap().permissions().mode();
        assert_eq!(actual & 0o777, mode, "umask {umask}");
        assert_eq!(files.names(), ["batch", "out"]);
    }
}

/// Tensors at odd offsets, and labels of 32 bits.
#[test]
fn misaligned_tensors_and_narrow_labels() {
    let files = Files::new();
    let aligned = files.batch("aligned", &files.labels);
    let expected = json(loss(&aligned, &["--json"]));
    let labels: Vec<u8> = files.labels.iter().flat_map(|&l| (l as i32).to_le_bytes()).collect();
    let tensors = [
        ("a", "U8", vec![3], vec![0; 3]),
        ("student", "F32", vec![TOKENS, VOCAB], little_endian(&files.student)),
        ("teacher", "F32", vec![TOKENS, VOCAB], little_endian(&files.teacher)),
        ("labels", "I32", vec![TOKENS], labels),
    ];
    // By hand, since the library sorts tensors by alignment.
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert(name.into(), entry);
        data.extend(bytes);
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(data);
    let path = files.path("misaligned");
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(json(loss(&path, &["--json"])), expected);
}

#[test]
fn labels_are_optional_for_the_teacher_s_target() {
    let files = Files::new();
    let shape: &[usize] = &[TOKENS, VOCAB];
    let path = files.save(
        "batch",
        &[
            ("student", Dtype::F32, shape, &little_endian(&files.student)),
            ("teacher", Dtype::F32, shape, &little_endian(&files.teacher)),
        ],
    );
    let object = json(loss(&path, &["--target", "teacher", "--json"]));
    assert_eq!(object["valid_tokens"], 6);
    // If there are labels, they say which tokens are ignored.
    let path = files.batch("labelled", &files.labels);
    let object = json(loss(&path, &["--target", "teacher", "--json"]));
    assert_eq!(object["valid_tokens"], 5);
}

#[test]
fn gradcheck_passes() {
    let output = atkd(&["gradcheck"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    assert!(text.contains("finite differences") && text.contains("cases passed"), "{text}");
    assert!(text.contains("sparse teachers: objectives"), "{text}");
}

#[test]
fn bench_reports_what_scripts_read() {
    for dtype in ["f32", "BF16", "f16"] {
        let options = ["--tokens", "8", "--vocab", "300", "--runs", "3", "--dtype", dtype];
        let object = json(atkd(&[&["bench", "--json"], &options[..]].concat()));
        assert!(object["copy_gb_per_s"].as_f64().unwrap() > 0.0);
        assert!(object["device"].is_string());
        let results = object["results"].as_array().unwrap();
        assert_eq!(results[0]["variant"], "fused");
        assert_eq!(results.iter().any(|r| r["variant"] == "unfused"), dtype != "f16");
        for result in results {
            assert_eq!((&result["tokens"], &result["vocab"]), (&8.into(), &300.into()));
            assert_eq!(result["dtype"], dtype.to_uppercase());
            for key in ["median_ms", "gb_per_s", "share_of_copy"] {
                assert!(result[key].as_f64().unwrap() > 0.0, "{key}");
            }
        }
    }
}

#[test]
fn bench_saves_numbers_a_table_and_a_plot() {
    let files = Files::new();
    let folder = files.path("results");
    let options = ["--tokens", "4", "--vocab", "200,400", "--runs", "1", "--save"];
    let output = atkd(&["bench"]).args(options).arg(&folder).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let read = |name| std::fs::read_to_string(folder.join(name)).unwrap();
    let numbers: serde_json::Value = serde_json::from_str(&read("bench.json")).unwrap();
    assert!(numbers["results"].is_array());
    assert_eq!(read("bench.md").trim(), String::from_utf8(output.stdout).unwrap().trim());
    let plot = read("bench.svg");
    for word in ["<svg", "copying memory", "fused in place", "vocabulary V"] {
        assert!(plot.contains(word), "{word}");
    }
    // A folder that cannot be is told before a benchmark that would take hours.
    let file = files.path("file");
    std::fs::write(&file, "").unwrap();
    let mut command = atkd(&["bench", "--runs", "1000000", "--save"]);
    command.arg(&file).timeout(std::time::Duration::from_secs(60));
    fails(command, &["cannot write to", "file"]);
    fails(atkd(&["bench", "--backend", "cpu", "--row-kernel", "stream"]), &["CUDA kernels", "cpu"]);
}

#[test]
fn info_names_every_backend() {
    let output = atkd(&["info"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for word in ["cpu", "reference", "cuda", "simt", "auto is", "row_pipelined"] {
        assert!(text.contains(word), "{text}");
    }
    // Cargo hides the build script's warning of those who install from a registry.
    if let Some(hint) = cuda::Kernels::missing() {
        assert!(text.contains("kernels in this build: none") && text.contains(hint), "{text}");
        fails(atkd(&["bench", "--backend", "cuda"]), &[hint]);
    }
}

#[test]
fn the_instruction_set_can_be_named() {
    let files = Files::new();
    let path = files.batch("batch", &files.labels);
    let by = |name: &str| {
        let mut command = loss(&path, &["--json", "--backend", "cpu"]);
        command.env("ATKD_INSTRUCTIONS", name);
        command
    };
    let portable = json(by("portable"));
    let exact = json(loss(&path, &["--json", "--backend", "reference"]));
    let number = |object: &serde_json::Value| object["loss"].as_f64().unwrap();
    assert!((number(&portable) - number(&exact)).abs() < 1e-6 * number(&exact));
    fails(by("sse9"), &["ATKD_INSTRUCTIONS", "sse9", "portable"]);
    let mut info = atkd(&["info"]);
    info.env("ATKD_INSTRUCTIONS", "sse9");
    let text = String::from_utf8(info.output().unwrap().stdout).unwrap();
    assert!(text.contains("sse9"), "{text}");
}

/// The teacher's logits and labels, packed into a cache beside them.
fn pack(files: &Files, labels: &[i64], options: &[&str]) -> Command {
    let mut command = atkd(&["teacher", "pack"]);
    command.arg(files.batch("logits", labels)).arg("--out").arg(files.path("cache")).args(options);
    command
}

fn teacher_info(path: &Path) -> serde_json::Value {
    let mut command = atkd(&["teacher", "info", "--json"]);
    command.arg(path);
    json(command)
}

#[test]
fn a_packed_teacher_is_that_of_the_logits() {
    for encoding in ["f16", "u8"] {
        let files = Files::new();
        let options = ["--top-k", "8", "--temperature", "2", "--encoding", encoding];
        let output = pack(&files, &files.labels, &options).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        for words in
            ["bits per index", "6", "DistillKit: 114", encoding, "yes", "fingerprint", "none"]
        {
            assert!(text.contains(words), "{words:?} is not in {text}");
        }

        let cache = TeacherCache::open(files.path("cache")).unwrap();
        let rows = cache.read(0..TOKENS).unwrap();
        let mut tails = 0.0;
        for (token, &label) in files.labels.iter().enumerate() {
            let logits = &files.teacher[token * VOCAB..][..VOCAB];
            let mass: f64 = logits.iter().map(|&z| (f64::from(z) / 2.0).exp()).sum();
            let log_p = |index: usize| f64::from(logits[index]) / 2.0 - mass.ln();
            let mut sorted: Vec<usize> = (0..VOCAB).collect();
            sorted.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            let mut tail = 1.0;
            for (i, &index) in sorted[..8].iter().enumerate() {
                let entry = token * 8 + i;
                // Entries may be as near to each other as the encoding's error.
                let j = rows.indices[token * 8..][..8].iter().position(|&j| j == index as i32);
                let read = rows.log_probs[token * 8 + j.unwrap_or_else(|| panic!("{entry}"))];
                assert!((f64::from(read) - log_p(index)).abs() < 2e-2, "{encoding} {entry}");
                tail -= log_p(index).exp();
            }
            assert_eq!(i64::from(rows.labels[token]), label);
            if label >= 0 {
                let target = log_p(label as usize);
                assert!((f64::from(rows.target_log_prob[token]) - target).abs() < 1e-6);
                if !sorted[..8].contains(&(label as usize)) {
                    tail -= target.exp();
                }
            }
            assert!((f64::from(rows.tail_mass[token]) - tail).abs() < 1e-6);
            tails += tail / TOKENS as f64;
        }

        let info = teacher_info(&files.path("cache"));
        assert_eq!(info["tokens"], 6);
        assert_eq!(info["complete"], true);
        assert_eq!(info["vocab_size"], 50);
        assert_eq!(info["top_k"], 8);
        assert_eq!(info["temperature"], 2.0);
        assert_eq!(info["encoding"], encoding);
        assert_eq!(info["bits_per_index"], 6);
        assert_eq!(info["bytes_per_token"], 34);
        assert_eq!(info["shards"], 1);
        assert_eq!(info["fingerprint"], "");
        assert!((info["mean_tail_mass"].as_f64().unwrap() - tails).abs() < 1e-6);
        assert!(info["largest_error"].as_f64().unwrap() < 1e-2);
    }
}

#[test]
fn packing_goes_on_where_it_was_killed() {
    let files = Files::new();
    let options = ["--top-k", "3", "--shard-tokens", "2", "--fingerprint", "qwen"];
    assert!(pack(&files, &files.labels, &options).output().unwrap().status.success());
    let cache = files.path("cache");
    let whole = TeacherCache::open(&cache).unwrap().read(0..6).unwrap();
    // The cache looks as if its writer had been killed in the second file.
    for shard in ["1", "2", "3"] {
        std::fs::remove_file(cache.join(format!("teacher-0000{shard}.safetensors"))).unwrap();
    }
    std::fs::write(cache.join("teacher-00001.safetensors.partial"), "half").unwrap();
    let info = teacher_info(&cache);
    assert_eq!((&info["tokens"], &info["complete"]), (&2.into(), &false.into()));
    let output = atkd(&["teacher", "info"]).arg(&cache).output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains("no: its writer has not finished"));

    let other = ["--top-k", "4", "--fingerprint", "qwen"];
    fails(pack(&files, &files.labels, &other), &["top_k is 4", "begun with 3", "cache"]);
    let mut labels = files.labels.clone();
    labels[1] = 8;
    fails(pack(&files, &labels, &options), &["another text", "token 1 is 0", "8 in the file"]);
    let output = pack(&files, &files.labels, &options).output().unwrap();
    assert!(output.status.success());
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("2 of 6 tokens are in"), "{message}");
    assert_eq!(TeacherCache::open(&cache).unwrap().read(0..6).unwrap(), whole);
    // Once more there is nothing left to do.
    assert!(pack(&files, &files.labels, &options).output().unwrap().status.success());
    assert_eq!(teacher_info(&cache)["shards"], 4);
}

#[test]
fn files_that_hold_no_teacher_say_so() {
    let files = Files::new();
    let packed = |path: &Path, options: &[&str]| {
        let mut command = atkd(&["teacher", "pack"]);
        command.arg(path).arg("--out").arg(files.path("cache")).args(options);
        command
    };
    let labels: Vec<u8> = [1_i32, 2].iter().flat_map(|label| label.to_le_bytes()).collect();
    let labels = |shape: &'static [usize]| ("labels", Dtype::I32, shape, &labels[..4 * shape[0]]);
    let logits = |values: &[f32]| little_endian(values);
    let path = files.save("none", &[labels(&[2])]);
    fails(packed(&path, &[]), &["no tensor `teacher`", "`labels`", "none"]);
    let fine = logits(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    fn teacher(bytes: &[u8]) -> (&str, Dtype, &[usize], &[u8]) {
        ("teacher", Dtype::F32, &[2, 3], bytes)
    }
    let path = files.save("short", &[labels(&[1]), teacher(&fine)]);
    fails(packed(&path, &[]), &["`labels`: 1", "2 tokens"]);
    for (logit, word) in [(f32::NAN, "logit of 1 is NaN"), (f32::INFINITY, "logit of 1 is inf")] {
        let path =
            files.save("bad", &[labels(&[2]), teacher(&logits(&[1.0, 2.0, 3.0, 4.0, logit, 6.0]))]);
        fails(packed(&path, &[]), &["bad", "token 1:", word]);
    }
    let none = f32::NEG_INFINITY;
    let path =
        files.save("masked", &[labels(&[2]), teacher(&logits(&[none, none, none, 4.0, 5.0, 6.0]))]);
    fails(packed(&path, &[]), &["masked", "token 0:", "all logits of the row are -inf"]);
    let path = files.save("fine", &[labels(&[2]), teacher(&fine)]);
    fails(packed(&path, &["--top-k", "0"]), &["top_k is 0"]);
    fails(packed(&path, &["--temperature", "-1"]), &["temperature is -1"]);
    fails(packed(&path, &["--shard-tokens", "0"]), &["--shard-tokens", "at least 1"]);
    let mut info = atkd(&["teacher", "info"]);
    info.arg(&path);
    fails(info, &["no teacher cache", "fine"]);
    // The surplus of K over V is not there.
    assert!(packed(&path, &["--top-k", "5"]).output().unwrap().status.success());
    let rows = TeacherCache::open(files.path("cache")).unwrap().read(0..2).unwrap();
    assert_eq!(rows.indices, [2, 1, 0, -1, -1, 2, 1, 0, -1, -1]);
    assert_eq!(rows.tail_mass, [0.0, 0.0]);
}

/// The page of `atkd report` about this file.
fn report(files: &Files, path: &Path, options: &[&str]) -> String {
    let page = files.path("page.html");
    let mut command = atkd(&["report"]);
    command.arg(path).arg("--out").arg(&page).args(options);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    std::fs::read_to_string(page).unwrap()
}

#[test]
fn a_report_has_the_numbers_of_the_loss() {
    let files = Files::new();
    let path = files.batch("batch", &files.labels);
    let page = report(&files, &path, &["--ce-weight", "0.5"]);
    let object = json(loss(&path, &["--ce-weight", "0.5", "--json"]));
    let loss = object["loss"].as_f64().unwrap();
    for words in [
        format!("<td>{loss:.9}</td>"),
        format!("<th>of these hard</th><td>{}</td>", object["hard_tokens"]),
        format!("uncertainty {:.6}", object["threshold_uncertainty"].as_f64().unwrap()),
        "--ce-weight 0.5".into(),
        "gradient norm".into(),
    ] {
        assert!(page.contains(&words), "{words:?} is not in {page}");
    }
    // It stands alone.
    for word in ["<script", "href=", "src=", "url("] {
        assert!(!page.contains(word), "{word}");
    }
    // JSD has no parts, and a file without a label that counts no tokens.
    let page = report(&files, &path, &["--objective", "plain", "--divergence", "jsd"]);
    assert!(page.contains("not computed in parts"));
    let none = files.batch("none", &[-100; TOKENS]);
    assert!(report(&files, &none, &[]).contains("No token has a label that counts"));
    let mut command = atkd(&["report"]);
    command.arg(&path).arg("--out").arg(files.path("no/such/folder.html"));
    fails(command, &["cannot write", "no folder"]);
}
