//! Distils a small transformer language model from a larger one, on real text, under five objectives
//! side by side: cross entropy alone, KL, TKD, DKD and ATKD. All on the CPU, in a few minutes:
//!
//! ```text
//! cargo run --release --example distill --features candle
//! ```
//!
//! `--divergence` puts another divergence in place of KL, or compares all of them; `--on-policy` lets the students
//! learn from samples of their own; with `--fused-head` the logits of a batch never exist; with `--teacher-cache` they
//! learn once more from the teacher's likeliest tokens, of caches on disk.

#[path = "distill/model.rs"]
mod model;
#[path = "distill/report.rs"]
mod report;
#[path = "distill/text.rs"]
mod text;

use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use atkd::candle::{
    KnownLogProbs, Layer, linear_loss_with_output, loss, loss_with_output, sparse_loss_with_output,
};
use atkd::head::Chunks;
use atkd::teacher_cache::{Settings, TeacherCache, Writer};
use atkd::{Divergence, Logits, Objective, Output, Tail, TokenTerms};
use candle_core::{Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;

use model::{Model, Size};
use report::{Curve, Row};
use text::Text;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

const TEACHER: Size = Size { layers: 4, heads: 6, width: 192 };
const STUDENT: Size = Size { layers: 2, heads: 2, width: 64 };

/// Sequences in a step, and tokens in a sequence.
const BATCH: usize = 8;
const TIME: usize = 64;

/// Tokens that have logits at a time, with --fused-head.
const CHUNK: usize = 64;

/// Sequences of held-out text on which models are measured.
const HELD_OUT: usize = 128;

/// Points of a curve of held-out loss.
const MEASUREMENTS: usize = 15;

const TEACHER_RATE: f64 = 2e-3;
const STUDENT_RATE: f64 = 4e-3;

/// Distils a small language model from a larger one under five objectives, and compares them.
///
/// A transformer teacher is trained on real text. Then one and the same small student is trained, from
/// the same start and on the same batches in the same order, under cross entropy alone, and under
///
///   ce-weight * cross entropy + kd-weight * (KL, TKD, DKD or ATKD) from the teacher.
///
/// With --divergence another divergence takes KL's place, in TKD, DKD and ATKD too; with --divergence all there is
/// one student for each divergence instead. With --on-policy a share of the batches is, for each student but the one
/// under cross entropy alone, sequences that it has sampled itself, each after a token of the text. Teacher and student
/// score these; cross entropy has no part in them, since a model learns nothing from its own samples as labels.
///
/// Reported is the cross entropy, in nats a token, and KL(teacher, student), on text that no model was trained on:
/// every tenth file (of fewer than ten files, the last tenth of each); and KL(student, teacher) on samples of the
/// student after tokens of that text.
///
/// With --fused-head the students' losses are computed from hidden states and the weights of the last layers, with logits
/// for a chunk of tokens at a time, and the teacher's hidden states are kept rather than its logits: the same losses
/// to rounding, in less memory, which is reported.
///
/// With --teacher-cache 8,32,128 what the teacher says of the batches is also written to OUT/teacher-8 and so on, of
/// each token the 8, 32 or 128 most probable tokens, and the distilled students are trained once more from each of
/// these caches, without the teacher. Reported is what a cache takes on disk, beside the students' losses.
///
///   cargo run --release --example distill --features candle -- --divergence all --on-policy 0.5
#[derive(Parser)]
#[command(name = "distill", verbatim_doc_comment, allow_negative_numbers = true)]
struct Args {
    /// A file, or a folder of files, of UTF-8 text [default: the Rust sources of this crate's own
    /// dependencies in cargo's registry]
    #[arg(long)]
    text: Option<PathBuf>,
    /// Training steps of each student, of 512 tokens each
    #[arg(long, default_value_t = 550)]
    steps: usize,
    /// Training steps of the teacher [default: as many as the students']
    #[arg(long)]
    teacher_steps: Option<usize>,
    /// The seed of the models' starts, of the order of the batches and of samples
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The folder for tables (CSV), plots (SVG) and a page about the last student (HTML)
    #[arg(long, default_value = "target/distill")]
    out: PathBuf,
    /// ATKD's weight of easy tokens; hard ones have 1 - lambda
    #[arg(long, default_value_t = 0.2)]
    lambda: f64,
    /// The share of tokens that ATKD takes as hard
    #[arg(long, default_value_t = 0.5)]
    hard_ratio: f64,
    /// How far the student's distribution q is from the teacher's p
    #[arg(long, value_enum, default_value = "forward-kl")]
    divergence: DivergenceName,
    /// The teacher's share in the mixture of jsd and skew-kl, the student's in that of skew-reverse-kl (the
    /// alpha of DistiLLM)
    #[arg(long, default_value_t = 0.5)]
    beta: f64,
    /// The share of the training batches that are the student's own samples; with --divergence all each divergence
    /// trains two students, one on the text alone and one with such batches
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    on_policy: f64,
    /// The temperature of the distillation terms
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// The weight of cross entropy beside a distillation term, on batches of the text
    #[arg(long, default_value_t = 1.0)]
    ce_weight: f64,
    /// The weight of the distillation term
    #[arg(long, default_value_t = 1.0)]
    kd_weight: f64,
    /// Never make the logits of a batch
    #[arg(long)]
    fused_head: bool,
    /// Train from caches of the teacher's K most probable tokens too, for each K of this list
    #[arg(long, value_name = "K", value_delimiter = ',', conflicts_with_all = ["fused_head", "on_policy"])]
    teacher_cache: Vec<usize>,
    /// The distribution that a cache's teacher is taken for on tokens that are not in it
    #[arg(long, value_enum, default_value = "bucket")]
    tail: TailName,
}

#[derive(Clone, Copy, ValueEnum)]
enum TailName {
    /// It gives them no probability, and its known tokens all of it
    Zero,
    /// It gives each of them the same
    Uniform,
    /// They are one class, of the probability that is left
    Bucket,
}

impl From<TailName> for Tail {
    fn from(name: TailName) -> Self {
        match name {
            TailName::Zero => Self::Zero,
            TailName::Uniform => Self::Uniform,
            TailName::Bucket => Self::Bucket,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum DivergenceName {
    /// KL(p, q)
    ForwardKl,
    /// KL(q, p)
    ReverseKl,
    /// beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q; forward KL for 0, reverse for 1
    Jsd,
    /// Total variation, half the sum of |p - q|
    Tvd,
    /// KL(p, beta p + (1 - beta) q), beta below 1
    SkewKl,
    /// KL(q, beta q + (1 - beta) p), beta below 1
    SkewReverseKl,
    /// Each of these, in place of the objectives
    All,
}

impl DivergenceName {
    /// The divergence and its name in tables; none for all of them.
    fn divergence(self, beta: f64) -> Option<(String, Divergence)> {
        Some(match self {
            Self::ForwardKl => ("KL".into(), Divergence::ForwardKl),
            Self::ReverseKl => ("reverse KL".into(), Divergence::ReverseKl),
            Self::Jsd => (format!("JSD({beta})"), Divergence::Jsd { beta }),
            Self::Tvd => ("TVD".into(), Divergence::TotalVariation),
            Self::SkewKl => (format!("skew KL({beta})"), Divergence::SkewKl { alpha: beta }),
            Self::SkewReverseKl => {
                (format!("skew reverse KL({beta})"), Divergence::SkewReverseKl { alpha: beta })
            }
            Self::All => return None,
        })
    }
}

fn main() -> ExitCode {
    // Candle's own threads wait by spinning, on the cores that matrix products and students need.
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// glibc returns freed memory to the system beyond twice the largest block that was ever mapped and
/// freed, which a training step would do, and undo, for every tensor. A large block raises that bound.
fn keep_freed_memory() {
    drop(std::hint::black_box(vec![1u8; 31 << 20]));
}

/// A model's answer to a batch: logits, or the hidden states that its last layer multiplies.
#[derive(Clone)]
enum Said {
    Logits(Tensor),
    Hidden {
        hidden: Tensor,
        weight: Tensor,
    },
    /// Log-probabilities of a few tokens and of the target, from a cache.
    Known {
        indices: Tensor,
        log_probs: Tensor,
        of_targets: Tensor,
        tail: Tail,
    },
}

impl Said {
    fn by(model: &Model, inputs: &Tensor, fused_head: bool) -> Result<Self> {
        Ok(if fused_head {
            Self::Hidden { hidden: model.hidden(inputs)?, weight: model.output_weight().clone() }
        } else {
            Self::Logits(model.logits(inputs)?)
        })
    }

    fn detach(&self) -> Self {
        match self {
            Self::Logits(logits) => Self::Logits(logits.detach()),
            Self::Hidden { hidden, weight } => {
                Self::Hidden { hidden: hidden.detach(), weight: weight.detach() }
            }
            Self::Known { .. } => self.clone(),
        }
    }

    /// The loss of a student that says this.
    fn loss(
        &self,
        objective: &Objective,
        teacher: &Said,
        labels: &Tensor,
    ) -> Result<(Tensor, Output)> {
        Ok(match (self, teacher) {
            (Self::Logits(student), Self::Logits(teacher)) => {
                loss_with_output(objective, student, teacher, labels)?
            }
            (
                Self::Hidden { hidden, weight },
                Self::Hidden { hidden: of_teacher, weight: weight_of_teacher },
            ) => {
                let (student, teacher) =
                    (Layer::new(hidden, weight), Layer::new(of_teacher, weight_of_teacher));
                let chunks = Chunks::Tokens(CHUNK);
                linear_loss_with_output(objective, student, teacher, labels, chunks)?
            }
            (Self::Logits(student), Self::Known { indices, log_probs, of_targets, tail }) => {
                let known = KnownLogProbs::new(indices, log_probs)
                    .with_target_log_probs(of_targets)
                    .with_tail(*tail);
                sparse_loss_with_output(objective, student, known, labels)?
            }
            _ => return Err("the models say what does not go together".into()),
        })
    }
}

/// The origin of the teacher's words in a run.
enum Source<'a> {
    /// The teacher itself, whose every word on the batches of the text is written down.
    Teacher { model: &'a Model, writers: &'a mut [Writer] },
    /// The cache that has them, batch after batch.
    Cache { cache: &'a TeacherCache, tail: Tail },
}

impl Source<'_> {
    /// The teacher's words on the batch of the text that comes after so many others.
    fn of(&mut self, batch: &Batch, before: usize, fused_head: bool) -> Result<Said> {
        Ok(match self {
            Self::Teacher { model, writers } => {
                let said = Said::by(model, &batch.inputs, fused_head)?.detach();
                if let Said::Logits(logits) = &said
                    && !writers.is_empty()
                {
                    let (tokens, vocab) = logits.dims2()?;
                    let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
                    let labels: Vec<i64> =
                        batch.labels.to_dtype(candle_core::DType::I64)?.to_vec1()?;
                    for writer in writers.iter_mut() {
                        writer.push_logits(Logits::new(&logits, tokens, vocab)?, &labels)?;
                    }
                }
                said
            }
            Self::Cache { cache, tail } => {
                let tokens = BATCH * TIME;
                let rows = cache.read(before * tokens..(before + 1) * tokens)?;
                let shape = (tokens, cache.settings().top_k);
                let indices = Tensor::from_vec(rows.indices, shape, &Device::Cpu)?;
                let log_probs = Tensor::from_vec(rows.log_probs, shape, &Device::Cpu)?;
                let of_targets = Tensor::from_vec(rows.target_log_prob, tokens, &Device::Cpu)?;
                Said::Known { indices, log_probs, of_targets, tail: *tail }
            }
        })
    }
}

/// The most memory that was in use, in bytes, since it was last asked for with `restart`; none where the system does not
/// tell.
fn peak_memory(restart: bool) -> Option<u64> {
    if restart {
        // Memory that the teacher's training has freed would hide what the students' takes.
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        // SAFETY: it may be called at any time.
        unsafe {
            libc::malloc_trim(0);
        }
        std::fs::write("/proc/self/clear_refs", "5").ok()?;
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}

struct Student {
    training: Training,
    model: Model,
    optimizer: AdamW,
    rng: fastrand::Rng,
    curve: Vec<(usize, f64)>,
}

/// The loss that a student is trained by, and on which batches.
struct Training {
    name: String,
    objective: Objective,
    /// The share of its batches that it samples itself.
    on_policy: f64,
}

impl Training {
    /// True for that share of the steps, spread evenly, and for the first one of any share above 0.
    fn samples_at(&self, step: usize) -> bool {
        let samples_until = |step: usize| (step as f64 * self.on_policy).ceil();
        samples_until(step) > samples_until(step - 1)
    }
}

fn run(args: &Args) -> Result<()> {
    let started = Instant::now();
    keep_freed_memory();
    let teacher_steps = args.teacher_steps.unwrap_or(args.steps);
    if args.steps == 0 || teacher_steps == 0 {
        return Err("a model needs at least one training step, but 0 were asked for".into());
    }
    let trainings = trainings_of(args)?;
    report::create_folder(&args.out)?;
    for path in args.teacher_cache.iter().map(|&k| cache_path(args, k)) {
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(
                    format!("cannot delete the old cache {}: {error}", path.display()).into()
                );
            }
            _ => {}
        }
    }

    let text = Text::load(args.text.as_deref())?;
    for (what, tokens) in [("to train on", &text.train), ("held out", &text.held_out)] {
        if tokens.len() <= TIME {
            return Err(format!(
                "the text has {} tokens {what}, but a sequence alone has {TIME} and what follows it",
                tokens.len()
            )
            .into());
        }
    }
    println!(
        "text: {} files, {:.1} MB; {} tokens to train on, {} held out, vocabulary {}",
        text.files,
        text.bytes as f64 / 1e6,
        text.train.len(),
        text.held_out.len(),
        text.vocab
    );
    let held_out = HeldOut::new(&text.held_out)?;

    let teacher = train_teacher(&text, teacher_steps, args.seed)?;
    let mut students = students_of(trainings, &text, args.seed)?;
    println!(
        "teacher: {:.2} million parameters; student: {:.2} million",
        teacher.parameters() as f64 / 1e6,
        students[0].model.parameters() as f64 / 1e6
    );
    let mut writers = args
        .teacher_cache
        .iter()
        .map(|&k| {
            let settings =
                Settings { temperature: args.temperature, ..Settings::new(text.vocab, k) };
            Ok(Writer::open(cache_path(args, k), &settings)?)
        })
        .collect::<Result<Vec<_>>>()?;
    let before = peak_memory(true);
    let source = Source::Teacher { model: &teacher, writers: &mut writers };
    let margins = train_students(&mut students, "students", source, &text, &held_out, args)?;
    let memory = peak_memory(false).zip(before).map(|(peak, before)| peak.saturating_sub(before));
    writers.into_iter().try_for_each(Writer::finish)?;

    let teacher_terms = held_out.measure(&teacher, None, args.fused_head)?;
    let mut rows = vec![Row::new("teacher".into(), &teacher_terms, None, 0.0, TIME)];
    let mut baseline: Option<Vec<TokenTerms>> = None;
    let mut measure = |students: &[Student], rows: &mut Vec<Row>| -> Result<()> {
        for student in students {
            let terms = held_out.measure(&student.model, Some(&teacher), args.fused_head)?;
            let reverse_kl = held_out.reverse_kl_of_samples(&student.model, &teacher, args.seed)?;
            let name = student.training.name.clone();
            rows.push(Row::new(name, &terms, baseline.as_deref(), reverse_kl, TIME));
            baseline.get_or_insert(terms);
        }
        Ok(())
    };
    measure(&students, &mut rows)?;
    if let Some(Student { training, model, .. }) = students.last() {
        let Training { name, objective, .. } = training;
        let terms = held_out.measure_by(objective, model, Some(&teacher), args.fused_head)?;
        report::write_page(&args.out, name, args.steps, &terms)?;
    }
    let mut runs = vec![("loss".to_string(), curves(students))];
    for &k in &args.teacher_cache {
        let cache = TeacherCache::open(cache_path(args, k))?;
        println!(
            "cache of K = {k}: {} bytes a token (float16 logits: {}), mean probability of the tokens that are not in it {:.4}",
            cache.bytes_per_token(),
            2 * text.vocab,
            cache.mean_tail_mass()
        );
        let mut distilled = trainings_of(args)?;
        // Cross entropy has no teacher.
        distilled.remove(0);
        for training in &mut distilled {
            training.name += &format!(", K = {k}");
        }
        let mut students = students_of(distilled, &text, args.seed)?;
        let source = Source::Cache { cache: &cache, tail: args.tail.into() };
        train_students(&mut students, "from the cache", source, &text, &held_out, args)?;
        measure(&students, &mut rows)?;
        runs.push((format!("loss-{k}"), curves(students)));
    }
    let selection = Objective::default().with_hard_ratio(args.hard_ratio)?;
    let hard = selection.hard_count(teacher_terms.len());
    println!("{}", report::table(&rows));
    report::write_results(&args.out, &rows)?;
    for (name, curves) in &runs {
        report::write_curves(&args.out, name, curves, rows[0].loss)?;
    }
    report::write_uncertainty(&args.out, &teacher_terms, hard)?;
    let wrong = [1, 4, 16].map(|batches| BATCH * TIME * batches).map(|tokens| {
        let share = report::guessed_wrong(&margins, tokens, &selection);
        share.map(|share| format!("{:.1}% of {tokens}", 100.0 * share))
    });
    let wrong: Vec<_> = wrong.into_iter().flatten().collect();
    if !wrong.is_empty() {
        println!(
            "tokens of a batch that the threshold of the one before takes for hard or easy wrongly: {}",
            wrong.join(", ")
        );
    }
    if let Some(memory) = memory {
        println!(
            "memory that the students' training took, at its peak, beside models and text: {:.0} MB{}",
            memory as f64 / 1e6,
            if args.fused_head { " (with --fused-head)" } else { "" }
        );
    }
    println!(
        "{} held-out tokens, losses in nats a token, ± standard error over their sequences (models of \
         another --seed differ by more); cross entropy weighs {} and distillation {}; {:.0} s\n\
         tables and plots: {}",
        teacher_terms.len(),
        args.ce_weight,
        args.kd_weight,
        started.elapsed().as_secs_f64(),
        args.out.display()
    );
    Ok(())
}

fn cache_path(args: &Args, top_k: usize) -> PathBuf {
    args.out.join(format!("teacher-{top_k}"))
}

/// All from the same start.
fn students_of(trainings: Vec<Training>, text: &Text, seed: u64) -> Result<Vec<Student>> {
    let student = |training| {
        let model = Model::new(STUDENT, text.vocab, TIME, seed)?;
        let optimizer = optimizer(&model)?;
        let rng = fastrand::Rng::with_seed(seed ^ 0x5a3b_1e50);
        Ok(Student { training, model, optimizer, rng, curve: Vec::new() })
    };
    trainings.into_iter().map(student).collect()
}

fn curves(students: Vec<Student>) -> Vec<Curve> {
    let curve = |Student { training: Training { name, on_policy, .. }, curve, .. }| Curve {
        name,
        on_policy: on_policy > 0.0,
        points: curve,
    };
    students.into_iter().map(curve).collect()
}

fn trainings_of(args: &Args) -> Result<Vec<Training>> {
    let &Args { beta, on_policy, .. } = args;
    // Lambda and beta are checked even where nothing is trained by them: a lambda of 7 is a mistake anyway.
    let atkd = Objective::atkd(args.lambda)?.with_divergence(Divergence::Jsd { beta })?;
    if !(0.0..=1.0).contains(&on_policy) {
        return Err(format!(
            "--on-policy is {on_policy}, but is a share of the batches, which must be in [0, 1]"
        )
        .into());
    }
    let (objectives, shares) = match args.divergence.divergence(beta) {
        Some((name, divergence)) => {
            let by = |name: &str, objective| (name.to_string(), objective, divergence);
            let objectives = vec![
                by(&name, Objective::plain()),
                by("TKD", Objective::tkd()),
                by("DKD", Objective::dkd()),
                by("ATKD", atkd),
            ];
            (objectives, vec![on_policy])
        }
        None => {
            let all = DivergenceName::value_variants().iter().filter_map(|d| d.divergence(beta));
            let objectives = all.map(|(name, divergence)| (name, Objective::plain(), divergence));
            let shares = if on_policy > 0.0 { vec![0.0, on_policy] } else { vec![0.0] };
            (objectives.collect(), shares)
        }
    };
    let mut trainings = vec![Training {
        name: "cross entropy".into(),
        objective: cross_entropy()?,
        on_policy: 0.0,
    }];
    for on_policy in shares {
        for (name, objective, divergence) in &objectives {
            let objective = objective
                .with_divergence(*divergence)?
                .with_hard_ratio(args.hard_ratio)?
                .with_temperature(args.temperature)?
                .with_kd_weight(args.kd_weight)?
                .with_ce_weight(args.ce_weight)?;
            let name = format!("{name}{}", if on_policy > 0.0 { " on-policy" } else { "" });
            trainings.push(Training { name, objective, on_policy });
        }
    }
    Ok(trainings)
}

fn cross_entropy() -> atkd::Result<Objective> {
    Objective::kl().with_kd_weight(0.0)?.with_ce_weight(1.0)
}

/// Inputs `[BATCH, TIME]` and, for each, what follows it.
struct Batch {
    inputs: Tensor,
    labels: Tensor,
}

impl Batch {
    /// The sequences that start at these tokens.
    fn new(tokens: &[u32], starts: &[usize]) -> Result<Self> {
        let sequences = |shift| {
            let rows = starts.iter().flat_map(|start| &tokens[start + shift..][..TIME]);
            Tensor::from_iter(rows.copied(), &Device::Cpu)
        };
        Ok(Self { inputs: sequences(0)?.reshape((starts.len(), TIME))?, labels: sequences(1)? })
    }

    fn random(tokens: &[u32], rng: &mut fastrand::Rng) -> Result<Self> {
        let starts: Vec<usize> = (0..BATCH).map(|_| rng.usize(..tokens.len() - TIME)).collect();
        Self::new(tokens, &starts)
    }

    /// The model's samples, each after the first token of one of these sequences.
    fn sampled(&self, model: &Model, rng: &mut fastrand::Rng) -> Result<Self> {
        let mut tokens = self.inputs.narrow(1, 0, 1)?;
        for _ in 0..TIME {
            let logits = model.last_logits(&tokens)?.to_vec2::<f32>()?;
            let next = Tensor::from_iter(logits.iter().map(|row| sample(row, rng)), &Device::Cpu)?;
            tokens = Tensor::cat(&[&tokens, &next.unsqueeze(1)?], 1)?;
        }
        let labels = tokens.narrow(1, 1, TIME)?.flatten_all()?;
        Ok(Self { inputs: tokens.narrow(1, 0, TIME)?, labels })
    }
}

/// A token drawn with the softmax of the logits as probabilities.
fn sample(logits: &[f32], rng: &mut fastrand::Rng) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    let sums: Vec<f64> = logits
        .iter()
        .map(|logit| {
            sum += f64::from(logit - largest).exp();
            sum
        })
        .collect();
    let drawn = rng.f64() * sum;
    sums.partition_point(|&sum| sum <= drawn) as u32
}

struct HeldOut {
    batches: Vec<Batch>,
}

impl HeldOut {
    /// Sequences without overlap, spread evenly over the held-out text.
    fn new(tokens: &[u32]) -> Result<Self> {
        let available = (tokens.len() - 1) / TIME;
        let chosen = available.min(HELD_OUT);
        let starts: Vec<usize> = (0..chosen).map(|i| i * available / chosen * TIME).collect();
        let batches =
            starts.chunks(BATCH).map(|starts| Batch::new(tokens, starts)).collect::<Result<_>>()?;
        Ok(Self { batches })
    }

    /// Each token's cross entropy as its loss, and its divergence from the teacher, or from itself.
    fn measure(
        &self,
        model: &Model,
        teacher: Option<&Model>,
        fused_head: bool,
    ) -> Result<Vec<TokenTerms>> {
        self.measure_by(&cross_entropy()?, model, teacher, fused_head)
    }

    /// Each token's terms by an objective, whose hard tokens are those of a batch.
    fn measure_by(
        &self,
        objective: &Objective,
        model: &Model,
        teacher: Option<&Model>,
        fused_head: bool,
    ) -> Result<Vec<TokenTerms>> {
        let measure = |batch: &Batch| -> Result<Vec<TokenTerms>> {
            let said = Said::by(model, &batch.inputs, fused_head)?.detach();
            let by_teacher = match teacher {
                Some(teacher) => Said::by(teacher, &batch.inputs, fused_head)?.detach(),
                None => said.clone(),
            };
            let (_, output) = said.loss(objective, &by_teacher, &batch.labels)?;
            Ok(output.tokens)
        };
        let terms = self.batches.par_iter().map(measure).collect::<Result<Vec<_>>>()?;
        Ok(terms.concat())
    }

    /// The mean reverse KL divergence from the teacher on the model's own samples, after tokens of the held-out text.
    fn reverse_kl_of_samples(&self, model: &Model, teacher: &Model, seed: u64) -> Result<f64> {
        let objective = Objective::plain().with_divergence(Divergence::ReverseKl)?;
        let measure = |(i, batch): (usize, &Batch)| -> Result<Vec<TokenTerms>> {
            let mut rng = fastrand::Rng::with_seed(seed.wrapping_add(i as u64));
            let own = batch.sampled(model, &mut rng)?;
            let logits = model.logits(&own.inputs)?.detach();
            let teacher_logits = teacher.logits(&own.inputs)?.detach();
            let (_, output) = loss_with_output(&objective, &logits, &teacher_logits, &own.labels)?;
            Ok(output.tokens)
        };
        let batches = self.batches.par_iter().enumerate();
        let terms = batches.map(measure).collect::<Result<Vec<_>>>()?.concat();
        Ok(report::mean(terms.iter().map(|token| token.loss)))
    }
}

fn optimizer(model: &Model) -> Result<AdamW> {
    let params = ParamsAdamW { beta2: 0.99, ..ParamsAdamW::default() };
    Ok(AdamW::new(model.vars(), params)?)
}

/// Rises over the first twentieth of the steps, then falls along a cosine to a tenth.
fn learning_rate(peak: f64, step: usize, steps: usize) -> f64 {
    let warm_up = (steps / 20).max(1);
    let fall = (step as f64 / steps as f64 * std::f64::consts::PI).cos();
    peak * (step as f64 / warm_up as f64).min(1.0) * (0.55 + 0.45 * fall)
}

fn progress(what: &'static str, steps: usize) -> Result<ProgressBar> {
    let style = "{prefix} {bar:40} {pos}/{len} steps, {eta} left  {msg}";
    let bar = ProgressBar::new(steps as u64).with_prefix(what);
    bar.set_style(ProgressStyle::with_template(style)?);
    Ok(bar)
}

fn train_teacher(text: &Text, steps: usize, seed: u64) -> Result<Model> {
    let model = Model::new(TEACHER, text.vocab, TIME, seed ^ 0x7eac_4e70)?;
    let mut optimizer = optimizer(&model)?;
    let mut rng = fastrand::Rng::with_seed(seed ^ 0xba7c_4e50);
    let bar = progress("teacher ", steps)?;
    for step in 1..=steps {
        let batch = Batch::random(&text.train, &mut rng)?;
        let logits = model.logits(&batch.inputs)?;
        let loss = loss(&cross_entropy()?, &logits, &logits.detach(), &batch.labels)?;
        optimizer.set_learning_rate(learning_rate(TEACHER_RATE, step, steps));
        optimizer.step(&loss.backward()?)?;
        bar.set_message(format!("loss {:.3}", loss.to_scalar::<f32>()?));
        bar.inc(1);
    }
    bar.finish();
    Ok(model)
}

/// All students take a step on one batch of the text, with what the teacher says of it, or on samples of their own,
/// before the next batch. Returns the teacher's margins of all batches of the text.
fn train_students(
    students: &mut [Student],
    what: &'static str,
    mut source: Source,
    text: &Text,
    held_out: &HeldOut,
    args: &Args,
) -> Result<Vec<f64>> {
    let mut rng = fastrand::Rng::with_seed(args.seed ^ 0x5e1e_c7ed);
    let mut margins = Vec::new();
    let every = args.steps.div_ceil(MEASUREMENTS);
    let bar = progress(what, args.steps)?;
    for step in 1..=args.steps {
        let batch = Batch::random(&text.train, &mut rng)?;
        let by_teacher = source.of(&batch, step - 1, args.fused_head)?;
        let teacher = match source {
            Source::Teacher { model, .. } => Some(model),
            Source::Cache { .. } => None,
        };
        let rate = learning_rate(STUDENT_RATE, step, args.steps);
        let step_of = |student: &mut Student| -> Result<Vec<TokenTerms>> {
            let Student { training, model, rng, .. } = student;
            let (loss, output) = if training.samples_at(step) {
                let own = batch.sampled(model, rng)?;
                let teacher = teacher.ok_or("a cache knows nothing of the student's samples")?;
                let by_teacher = Said::by(teacher, &own.inputs, args.fused_head)?.detach();
                let objective = training.objective.with_ce_weight(0.0)?;
                let said = Said::by(model, &own.inputs, args.fused_head)?;
                said.loss(&objective, &by_teacher, &own.labels)?
            } else {
                let said = Said::by(model, &batch.inputs, args.fused_head)?;
                said.loss(&training.objective, &by_teacher, &batch.labels)?
            };
            student.optimizer.set_learning_rate(rate);
            student.optimizer.step(&loss.backward()?)?;
            Ok(output.tokens)
        };
        let terms = students.par_iter_mut().map(step_of).collect::<Result<Vec<_>>>()?;
        margins.extend(terms[0].iter().map(|token| token.margin));
        if step % every == 0 || step == args.steps {
            for student in &mut *students {
                let terms = held_out.measure(&student.model, None, args.fused_head)?;
                student.curve.push((step, report::mean(terms.iter().map(|token| token.loss))));
            }
        }
        bar.inc(1);
    }
    bar.finish();
    Ok(margins)
}
