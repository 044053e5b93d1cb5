//! A teacher that is not there: its most probable tokens on disk, which a [`Writer`] writes while the teacher runs, and
//! a [`TeacherCache`] reads while the student learns.
//!
//! Per token of the text a cache has K entries (index, log-probability), the log-probability of the target, the
//! probability of all that is neither (`tail_mass`), and the target itself, by which a training loop checks that it
//! learns from the same text. The log-probabilities are of the teacher's softmax at the cache's temperature.
//!
//! ```
//! use atkd::Dtype;
//! use atkd::teacher_cache::{NewRows, Settings, TeacherCache, Writer};
//!
//! # let folder = tempfile::tempdir().unwrap();
//! # let path = folder.path().join("cache");
//! let settings = Settings::new(151_936, 2);
//! let mut writer = Writer::open(&path, &settings)?;
//! // A run that was killed goes on here.
//! for _token in writer.tokens()..3 {
//!     writer.push(&NewRows {
//!         indices: &[77, 151_000],
//!         log_probs: &[-2.0, -0.5],
//!         target_log_prob: &[-5.0],
//!         tail_mass: None,
//!         labels: &[4],
//!         rounding: Dtype::F32,
//!     })?;
//! }
//! writer.finish()?;
//!
//! let cache = TeacherCache::open(&path)?;
//! assert!(cache.is_complete() && cache.tokens() == 3);
//! let rows = cache.read(1..3)?;
//! assert_eq!(rows.indices, [151_000, 77, 151_000, 77]);
//! # Ok::<(), atkd::teacher_cache::Error>(())
//! ```
//!
//! # Format
//!
//! A cache is a folder of safetensors files `teacher-00000.safetensors`, `teacher-00001.safetensors` and so on, its
//! *shards*, of 256 MB unless the writer is told otherwise. Each has all facts in its `__metadata__`:
//!
//! | key | |
//! |---|---|
//! | `format`, `format_version` | `atkd-teacher-cache`, `1` |
//! | `vocab_size`, `top_k`, `temperature`, `encoding`, `fingerprint` | the [`Settings`] |
//! | `cache` | a random number that all shards of a cache have in common |
//! | `shard`, `first_token`, `tokens` | the file's number, the number of its first token, how many tokens it has |
//! | `largest_error` | the most, in nats, by which an entry differs from what was pushed |
//! | `last` | `true` in the last shard, which may have no tokens; a cache without is not complete |
//!
//! and n tokens as these tensors, little-endian:
//!
//! | tensor | | |
//! |---|---|---|
//! | `target_log_prob` | F32 `[n]` | negative infinity for tokens without a target |
//! | `tail_mass` | F32 `[n]` | probability of the tokens that are neither the target nor among the K |
//! | `labels` | I32 `[n]` | the target; as it was pushed if below 0, which is a token to be ignored |
//! | `log_prob_range` | F32 `[n, 2]` | of the encoding `u8` alone: the row's largest and smallest log-probability |
//! | `log_probs` | F16 or U8 `[n, K]` | falling |
//! | `indices` | U8 `[n, ceil(K bits / 8)]` | K numbers of ceil(log2(V + 1)) bits, the lowest first, and zeros; V stands for -1, an entry that is not there, which come last |
//!
//! A code c of the encoding `u8` stands for `largest - (largest - smallest) c / 255`. A shard is written under
//! another name in the same folder, synced to disk and renamed, so that every file with a shard's name is whole.
//!
//! # Errors of the encodings
//!
//! An encoding moves an entry's log-probability l by at most E: |l| / 2048 + 3e-8 for [`Encoding::F16`]; for
//! [`Encoding::U8`] R / 510 where the row's log-probabilities span R nats, and float32's rounding of l. On power laws
//! like a language model's (K = 64, the likeliest token's probability from 0.2 to 0.7) that is a KL divergence from the
//! teacher of some 1e-7 and 1e-5.
//!
//! The target's log-probability and the tail's mass are float32, and reading restores the mass: the target's entry is
//! `target_log_prob`, and the others are shifted together, by no more than the largest E among them, so that they, the
//! target and the tail add up to 1 but for 3e-6. An entry that is read is then off by at most its E and the largest;
//! what it comes to is the shard's `largest_error`.

mod error;
mod reader;
mod row;
mod writer;

use std::fs;
use std::path::{Path, PathBuf};

pub use error::{Error, Result};
pub use reader::{Rows, RowsMut, TeacherCache};
pub use writer::{NewRows, Writer};

/// The `format` and `format_version` of a shard.
const FORMAT: [&str; 2] = ["atkd-teacher-cache", "1"];

/// How log-probabilities are stored. The [module](self) has their errors.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Encoding {
    /// 16 bits an entry.
    F16,
    /// 8 bits an entry, and 64 a row.
    U8,
}

impl Encoding {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::F16, Self::U8];

    /// `f16` or `u8`, as in a shard's metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::U8 => "u8",
        }
    }
}

/// The facts that all rows of a cache have in common.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// V, from 1 to 2^31 - 1.
    pub vocab_size: usize,
    /// K, from 1 to 1024. It may exceed V: the surplus entries are -1.
    pub top_k: usize,
    /// The number that divided the teacher's logits: in [1e-30, 1e30].
    pub temperature: f64,
    /// How log-probabilities are stored.
    pub encoding: Encoding,
    /// Anything that tells the tokenizer or the text apart from others, at most 4096 bytes. It is compared, not read.
    pub fingerprint: String,
}

impl Settings {
    /// Temperature 1, the encoding `f16`, no fingerprint.
    pub fn new(vocab_size: usize, top_k: usize) -> Self {
        let fingerprint = String::new();
        Self { vocab_size, top_k, temperature: 1.0, encoding: Encoding::F16, fingerprint }
    }

    /// The bits of an index: the fewest that hold V values and one more for -1.
    pub fn bits_per_index(&self) -> u32 {
        usize::BITS - self.vocab_size.leading_zeros()
    }

    /// The bytes that a token takes on disk.
    pub fn bytes_per_token(&self) -> usize {
        self.columns().iter().map(|column| column.bytes).sum()
    }

    /// # Errors
    /// If a setting is outside its domain.
    fn check(&self) -> Result<()> {
        let bad = |name, value, allowed| Err(Error::Setting { name, value, allowed });
        let Self { vocab_size, top_k, temperature, fingerprint, .. } = self;
        if !(1..=i32::MAX as usize).contains(vocab_size) {
            return bad("vocab_size", vocab_size.to_string(), "from 1 to 2147483647");
        }
        if !(1..=1024).contains(top_k) {
            return bad("top_k", top_k.to_string(), "from 1 to 1024");
        }
        if !(1e-30..=1e30).contains(temperature) {
            return bad("temperature", format!("{temperature:e}"), "from 1e-30 to 1e30");
        }
        if fingerprint.len() > 4096 {
            return bad(
                "fingerprint",
                format!("{} bytes long", fingerprint.len()),
                "at most 4096 bytes: a hash of a longer one, for example",
            );
        }
        Ok(())
    }

    /// Names and values, as shards have them in their metadata.
    fn facts(&self) -> [(&'static str, String); 5] {
        [
            ("vocab_size", self.vocab_size.to_string()),
            ("top_k", self.top_k.to_string()),
            ("temperature", self.temperature.to_string()),
            ("encoding", self.encoding.name().into()),
            ("fingerprint", self.fingerprint.clone()),
        ]
    }

    /// The first fact that another cache has differently: its name, its value here and there.
    fn difference(&self, other: &Self) -> Option<(&'static str, String, String)> {
        let both = self.facts().into_iter().zip(other.facts());
        both.map(|((name, here), (_, there))| (name, here, there)).find(|(_, a, b)| a != b)
    }

    /// The tensors of a shard in the order of the file, those of wide elements first so that all are aligned. One that
    /// the encoding does not have is of 0 bytes.
    fn columns(&self) -> [Column; COLUMNS] {
        let (k, bits) = (self.top_k, self.bits_per_index() as usize);
        let packed = (k * bits).div_ceil(8);
        let (log_probs, dtype, range) = match self.encoding {
            Encoding::F16 => (2 * k, safetensors::Dtype::F16, 0),
            Encoding::U8 => (k, safetensors::Dtype::U8, 8),
        };
        let column = |name, dtype, width, bytes| Column { name, dtype, width, bytes };
        [
            column("target_log_prob", safetensors::Dtype::F32, None, 4),
            column("tail_mass", safetensors::Dtype::F32, None, 4),
            column("labels", safetensors::Dtype::I32, None, 4),
            column("log_prob_range", safetensors::Dtype::F32, Some(2), range),
            column("log_probs", dtype, Some(k), log_probs),
            column("indices", safetensors::Dtype::U8, Some(packed), packed),
        ]
    }
}

const COLUMNS: usize = 6;
const TARGET_LOG_PROB: usize = 0;
const TAIL_MASS: usize = 1;
const LABELS: usize = 2;
const LOG_PROB_RANGE: usize = 3;
const LOG_PROBS: usize = 4;
const INDICES: usize = 5;

/// A tensor of a shard.
struct Column {
    name: &'static str,
    dtype: safetensors::Dtype,
    /// Elements of a token, where the tensor has a second dimension.
    width: Option<usize>,
    /// Bytes of a token.
    bytes: usize,
}

impl Column {
    fn shape(&self, tokens: usize) -> Vec<usize> {
        [tokens].into_iter().chain(self.width).collect()
    }
}

fn shard_path(folder: &Path, shard: usize) -> PathBuf {
    folder.join(format!("teacher-{shard:05}.safetensors"))
}

/// The number of the shard with this name, and whether it is a shard that is not whole.
fn shard_number(name: &str) -> Option<(usize, bool)> {
    let number = name.strip_prefix("teacher-")?;
    let (number, partial) = match number.strip_suffix(PARTIAL) {
        Some(number) => (number, true),
        None => (number, false),
    };
    let number = number.strip_suffix(".safetensors")?;
    let shard = number.parse().ok()?;
    // "+1" and "1" are numbers too.
    (format!("{shard:05}") == number).then_some((shard, partial))
}

/// The name of a shard ends with this until it is whole.
const PARTIAL: &str = ".partial";

/// The shards of a folder in order, and files that a killed writer has left.
struct Listing {
    shards: Vec<PathBuf>,
    partial: Vec<PathBuf>,
}

impl Listing {
    /// # Errors
    /// If the folder cannot be read, or a shard is missing.
    fn read(folder: &Path) -> Result<Self> {
        let cannot = |source| Error::Io { doing: "read the folder", path: folder.into(), source };
        let (mut numbers, mut partial) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(folder).map_err(cannot)? {
            let name = entry.map_err(cannot)?.file_name();
            match name.to_str().and_then(shard_number) {
                Some((_, true)) => partial.push(folder.join(&name)),
                Some((shard, false)) => numbers.push(shard),
                None => {}
            }
        }
        numbers.sort_unstable();
        for (expected, &shard) in numbers.iter().enumerate() {
            if shard != expected {
                let (missing, next) = (shard_path(folder, expected), shard_path(folder, shard));
                return Err(Error::MissingShard { missing, next });
            }
        }
        let shards = numbers.into_iter().map(|shard| shard_path(folder, shard)).collect();
        Ok(Self { shards, partial })
    }
}
