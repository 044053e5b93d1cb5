//! Sparse teachers on disk: from logits, and what they hold.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use atkd::Logits;
use atkd::teacher_cache::{Encoding, Settings, TeacherCache, Writer};
use clap::{Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
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
    /// Keep K draws with replacement from all tokens but the label instead of the likeliest, for --tail sampled
    #[arg(long)]
    sampled: bool,
    /// Makes the draws of --sampled others; a run that goes on must have the same
    #[arg(long, value_name = "N", default_value_t = 0, requires = "sampled")]
    seed: u64,
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

/// Rows between two movements of the progress bar.
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
        let rows = teacher.elements().slice(start * vocab..end * vocab);
        let logits = Logits::new(rows, end - start, vocab)?;
        let labels = &labels[start..end];
        match args.sampled {
            true => writer.push_draws(logits, labels, args.seed),
            false => writer.push_logits(logits, labels),
        }
        .with_context(|| path.display().to_string())?;
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
