//! Sparse teachers on disk: from logits, and what they hold.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use atkd::Elements;
use atkd::teacher_cache::{Encoding, NewRows, Settings, TeacherCache, Writer};
use clap::{Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use serde_json::json;

use crate::output;
use crate::tensors::{self, Matrix};

/// A teacher that is not there: its K most probable tokens on disk.
///
/// Run the teacher once, keep of each token of the text what matters of its distribution, and let any number of
/// students learn from that. A cache holds, per token, K entries (index, log-probability), the log-probability of the
/// target, the probability of all the rest, and the target, so that training can check that it reads the same text.
/// Rust (atkd::teacher_cache) and Python (atkd.TeacherCache) read it, and write it from a running teacher.
#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Pack(PackArgs),
    Info(InfoArgs),
}

/// Make a cache of a file of logits.
///
/// The file holds `teacher` [N, V] (F32, F16 or BF16) and `labels` [N] (I64 or I32), as files of `atkd loss` do; a
/// label below 0 is a token to be ignored. Softmaxes are in float64.
///
/// The cache is a folder of safetensors files, each whole once it is there. A run that was killed goes on where the
/// last file ends: give the same command again. --top-k, --temperature, --encoding and --fingerprint must then be the
/// same.
///
/// Example: atkd teacher pack logits.safetensors --top-k 64 --out cache --fingerprint qwen3
#[derive(clap::Args)]
struct PackArgs {
    /// The teacher's logits, and labels, as safetensors
    logits: PathBuf,
    /// The folder of the cache
    #[arg(long, value_name = "CACHE")]
    out: PathBuf,
    /// Entries per token, at most 1024
    #[arg(long, value_name = "K", default_value_t = 64)]
    top_k: usize,
    /// Divides the logits; training must be at the same
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    temperature: f64,
    /// How log-probabilities are stored
    #[arg(long, value_enum, default_value = "f16")]
    encoding: EncodingName,
    /// Anything that tells the tokenizer or the text apart from others, such as a name or a hash
    #[arg(long, value_name = "STR", default_value = "")]
    fingerprint: String,
    /// Tokens per file of the cache, which are what a killed run loses at most [default: as many as 256 MB hold]
    #[arg(long, value_name = "N")]
    shard_tokens: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum EncodingName {
    /// 16 bits an entry: off by at most 1/2048 of the log-probability
    F16,
    /// 8 bits an entry: off by at most 1/510 of the row's range of log-probabilities
    U8,
}

/// Say what a cache holds.
///
/// Beside the bytes per token are those that DistillKit's compression takes. An entry that is read differs from the
/// teacher's log-probability by no more than the error of the encoding that is shown, which the writer has measured;
/// the target's log-probability and the rest's probability are float32.
///
/// Example: atkd teacher info cache --json
#[derive(clap::Args)]
struct InfoArgs {
    /// The folder of the cache
    cache: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.command {
        Command::Pack(args) => pack(args)?,
        Command::Info(args) => {
            let cache = TeacherCache::open(&args.cache)?;
            output::print(&if args.json { in_json(&cache) } else { in_words(&cache) })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Rows that are computed, and then pushed.
const CHUNK: usize = 64;

fn pack(args: &PackArgs) -> Result<()> {
    let path = &args.logits;
    let map = tensors::open(path)?;
    let file = tensors::parse(path, &map)?;
    for name in ["teacher", "labels"] {
        ensure!(
            file.tensor(name).is_ok(),
            "{} has no tensor `{name}`: a cache is made of `teacher` [N, V] (F32, F16 or BF16) and `labels` [N] (I64 or I32)",
            path.display()
        );
    }
    let teacher = Matrix::read(path, &file, "teacher")?;
    let labels = tensors::labels(path, &file, true)?.unwrap_or_default();
    let (tokens, vocab) = (teacher.rows, teacher.columns);
    ensure!(
        labels.len() == tokens,
        "`labels`: {} were given for {tokens} tokens, the rows of `teacher`",
        labels.len()
    );
    let settings = Settings {
        vocab_size: vocab,
        top_k: args.top_k,
        temperature: args.temperature,
        encoding: match args.encoding {
            EncodingName::F16 => Encoding::F16,
            EncodingName::U8 => Encoding::U8,
        },
        fingerprint: args.fingerprint.clone(),
    };
    let mut writer = Writer::open(&args.out, &settings)?;
    if let Some(tokens) = args.shard_tokens {
        writer = writer.with_shard_tokens(tokens).context("--shard-tokens")?;
    }
    let there = writer.tokens();
    if there > 0 {
        check_labels(&args.out, there, &labels)?;
    }
    if writer.is_complete() {
        ensure!(
            there == tokens,
            "the cache {} is complete with {there} tokens, but {} has {tokens}: give another folder",
            args.out.display(),
            path.display()
        );
    } else if there > 0 {
        eprintln!("{there} of {tokens} tokens are in {} already", args.out.display());
    }

    let bar = ProgressBar::new(tokens as u64).with_position(there as u64).with_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} tokens, {eta} left  {msg}")?,
    );
    for start in (there..tokens).step_by(CHUNK) {
        let end = tokens.min(start + CHUNK);
        let rows: Vec<Row> = (start..end)
            .into_par_iter()
            .map_init(
                || vec![0.0; vocab],
                |logits, token| {
                    copy_row(teacher.elements(), token, logits);
                    Row::new(logits, labels[token], &settings)
                        .with_context(|| format!("{}: the logits of token {token}", path.display()))
                },
            )
            .collect::<Result<_>>()?;
        let gathered = |f: fn(&Row) -> f32| rows.iter().map(f).collect::<Vec<_>>();
        writer.push(&NewRows {
            indices: &rows.iter().flat_map(|row| row.indices.iter().copied()).collect::<Vec<_>>(),
            log_probs: &rows
                .iter()
                .flat_map(|row| row.log_probs.iter().copied())
                .collect::<Vec<_>>(),
            target_log_prob: &gathered(|row| row.target_log_prob),
            tail_mass: Some(&gathered(|row| row.tail_mass)),
            labels: &labels[start..end],
        })?;
        bar.inc((end - start) as u64);
    }
    writer.finish()?;
    bar.finish_and_clear();
    output::print(&in_words(&TeacherCache::open(&args.out)?))
}

/// Checks that the tokens that are in the cache already are those that come first in the file.
fn check_labels(path: &Path, there: usize, labels: &[i64]) -> Result<()> {
    ensure!(
        there <= labels.len(),
        "the cache {} has {there} tokens already, but the file only {}: give another folder",
        path.display(),
        labels.len()
    );
    let cache = TeacherCache::open(path)?;
    for start in (0..there).step_by(4096) {
        let rows = cache.read(start..there.min(start + 4096))?;
        let differs = |(&one, &other): (&i32, &i64)| i64::from(one) != other;
        if let Some(i) = rows.labels.iter().zip(&labels[start..]).position(differs) {
            bail!(
                "the cache {} is of another text: the label of token {} is {} there, but {} in the file; give another folder",
                path.display(),
                start + i,
                rows.labels[i],
                labels[start + i]
            );
        }
    }
    Ok(())
}

fn copy_row(elements: Elements, token: usize, row: &mut [f32]) {
    let (start, end) = (token * row.len(), (token + 1) * row.len());
    match elements {
        Elements::F32(all) => row.copy_from_slice(&all[start..end]),
        Elements::F16(all) => {
            row.iter_mut().zip(&all[start..end]).for_each(|(to, from)| *to = from.to_f32())
        }
        Elements::Bf16(all) => {
            row.iter_mut().zip(&all[start..end]).for_each(|(to, from)| *to = from.to_f32())
        }
    }
}

/// The values that a cache keeps of a token.
struct Row {
    indices: Vec<i32>,
    log_probs: Vec<f32>,
    target_log_prob: f32,
    tail_mass: f32,
}

impl Row {
    /// `logits` are used up.
    fn new(logits: &mut [f32], label: i64, settings: &Settings) -> Result<Self> {
        let k = settings.top_k;
        let wrong = logits.iter().position(|z| z.is_nan() || *z == f32::INFINITY);
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if label < 0 && (wrong.is_some() || highest == f32::NEG_INFINITY) {
            // The writer keeps nothing of an ignored token without a distribution.
            let log_probs = vec![f32::NAN; k];
            return Ok(Self {
                indices: vec![0; k],
                log_probs,
                target_log_prob: 0.0,
                tail_mass: 0.0,
            });
        }
        if let Some(index) = wrong {
            bail!("the logit of {index} is {}, but must be finite or -inf", logits[index]);
        }
        ensure!(highest > f32::NEG_INFINITY, "all are -inf, but one at least must be finite");
        let vocab = logits.len();
        let target = usize::try_from(label).ok();
        if let Some(target) = target {
            ensure!(
                target < vocab,
                "the label is {target}, but must be below the vocabulary size {vocab}, or negative for a token to be ignored"
            );
        }
        let scaled = |z: f32| f64::from(z) / settings.temperature;
        let of_target = target.map_or(f64::NEG_INFINITY, |target| scaled(logits[target]));
        let top = top_k(logits, k);
        for &(_, index) in &top {
            logits[index] = f32::NEG_INFINITY;
        }
        if let Some(target) = target {
            logits[target] = f32::NEG_INFINITY;
        }
        // All logarithms are of sums without the target, so that one that the teacher is sure of loses nothing.
        let tail = log_sum_exp(logits.iter().map(|&z| scaled(z)));
        let entries =
            top.iter().filter(|entry| Some(entry.1) != target).map(|entry| scaled(entry.0));
        let others = log_sum_exp(entries.chain([tail]));
        let margin = others - of_target;
        let target_log_prob = match margin > 0.0 {
            true => -margin - (-margin).exp().ln_1p(),
            false => -margin.exp().ln_1p(),
        };
        let all = if margin > 0.0 {
            others + (-margin).exp().ln_1p()
        } else {
            of_target - target_log_prob
        };

        let mut row = Self {
            indices: top.iter().map(|entry| entry.1 as i32).collect(),
            log_probs: top.iter().map(|entry| (scaled(entry.0) - all) as f32).collect(),
            target_log_prob: target_log_prob as f32,
            tail_mass: (tail - all).exp() as f32,
        };
        row.indices.resize(k, -1);
        row.log_probs.resize(k, 0.0);
        Ok(row)
    }
}

/// The logarithm of the sum, -inf of none.
fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let highest = values.clone().fold(f64::NEG_INFINITY, f64::max);
    if highest == f64::NEG_INFINITY {
        return highest;
    }
    highest + values.map(|value| (value - highest).exp()).sum::<f64>().ln()
}

/// The largest k logits with their indices, by lower index where they are equal.
fn top_k(logits: &[f32], k: usize) -> Vec<(f32, usize)> {
    let larger = |a: &(f32, usize), b: &(f32, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    let mut top: Vec<(f32, usize)> = Vec::with_capacity(2 * k);
    let mut least = f32::NEG_INFINITY;
    for (index, &logit) in logits.iter().enumerate() {
        // A later logit that is equal to the least comes after k others.
        if logit > least || top.len() < k {
            top.push((logit, index));
            if top.len() == 2 * k {
                top.select_nth_unstable_by(k - 1, larger);
                top.truncate(k);
                least = top[k - 1].0;
            }
        }
    }
    top.sort_unstable_by(larger);
    top.truncate(k);
    top
}

fn in_json(cache: &TeacherCache) -> String {
    let settings = cache.settings();
    json!({
        "tokens": cache.tokens(),
        "complete": cache.is_complete(),
        "vocab_size": settings.vocab_size,
        "top_k": settings.top_k,
        "temperature": settings.temperature,
        "encoding": settings.encoding.name(),
        "largest_error": cache.largest_error(),
        "bits_per_index": settings.bits_per_index(),
        "bytes_per_token": cache.bytes_per_token(),
        "shards": cache.shards(),
        "fingerprint": settings.fingerprint,
        "mean_tail_mass": cache.mean_tail_mass(),
    })
    .to_string()
}

fn in_words(cache: &TeacherCache) -> String {
    let settings = cache.settings();
    let complete = match cache.is_complete() {
        true => "yes",
        false => "no: its writer has not finished, or its last files are lost",
    };
    let encoding =
        format!("{}, off by at most {:.2e} nats", settings.encoding.name(), cache.largest_error());
    let bytes = format!(
        "{} (DistillKit: 114 for K = 50, 300 for K = 128 of which 16 exact)",
        cache.bytes_per_token()
    );
    let fingerprint = match settings.fingerprint.as_str() {
        "" => "none",
        fingerprint => fingerprint,
    };
    let mut table = output::table(&[]);
    for (name, value) in [
        ("tokens", cache.tokens().to_string()),
        ("complete", complete.into()),
        ("vocabulary", settings.vocab_size.to_string()),
        ("entries per token", settings.top_k.to_string()),
        ("temperature", settings.temperature.to_string()),
        ("encoding", encoding),
        ("bits per index", settings.bits_per_index().to_string()),
        ("bytes per token", bytes),
        ("shards", cache.shards().to_string()),
        ("fingerprint", fingerprint.into()),
        ("mean tail mass", format!("{:.6}", cache.mean_tail_mass())),
    ] {
        table.add_row([name, &value]);
    }
    table.trim_fmt()
}
