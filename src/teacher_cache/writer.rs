use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::json;

use super::row::{Codec, NewRow};
use super::{COLUMNS, Error, FORMAT, Listing, PARTIAL, Result, Settings, TeacherCache, shard_path};
use crate::cpu::widen;
use crate::{Dtype, Logits, TeacherRow};

/// The bytes of a shard on disk, unless the writer is told otherwise.
const SHARD_BYTES: usize = 256_000_000;

/// The rows that a teacher has of n tokens.
#[derive(Clone, Copy, Debug)]
pub struct NewRows<'a> {
    /// `[n, K]`, in any order, each once: tokens of the vocabulary, or -1 for an entry that is not there.
    pub indices: &'a [i32],
    /// `[n, K]`, in nats, at the cache's temperature. An entry of less than -65504 is not kept, since its probability
    /// is 0.
    pub log_probs: &'a [f32],
    /// `[n]`: the target's, be it among the K or not. Those of ignored tokens are not read.
    pub target_log_prob: &'a [f32],
    /// `[n]`: the probability of all tokens that are neither among the K nor the target. `None` for what the others
    /// leave of 1, which is as exact as float32 log-probabilities are, 1e-7. Who has the logits knows small tails
    /// better. It is 0 where the K and the target are the whole vocabulary, whatever rounding has left of 1.
    pub tail_mass: Option<&'a [f32]>,
    /// `[n]`: the target, below 0 for a token that the loss ignores. Of an ignored token's row nothing is required: one
    /// that is no distribution is stored without entries.
    pub labels: &'a [i64],
    /// The dtype that all of these were rounded to before they became float32, the least exact of them. What that may have
    /// moved the sum of a row's probabilities from 1, up to 1e-4, 1% of float16 and 3% of bfloat16, is divided out.
    pub rounding: Dtype,
}

/// Writes a cache, or goes on with one.
///
/// Whole shards stay, whatever happens; the tokens since the last one are lost with a writer that is dropped before
/// [`flush`](Self::flush) or [`finish`](Self::finish). Memory is of one [`push`](Self::push).
#[derive(Debug)]
pub struct Writer {
    folder: PathBuf,
    settings: Settings,
    /// Common to all shards.
    cache: String,
    shard_tokens: usize,
    /// How many whole shards there are, and tokens in them.
    shards: usize,
    first_token: usize,
    complete: bool,
    partial: Option<Partial>,
    /// The folder, locked against other writers, where the system can.
    lock: Option<File>,
}

/// A shard that is being written: its columns lie apart as those of a full one.
#[derive(Debug)]
struct Partial {
    file: File,
    path: PathBuf,
    /// Bytes before the columns.
    header: usize,
    /// Tokens of a full one.
    capacity: usize,
    tokens: usize,
    largest_error: f32,
}

impl Writer {
    /// Begins a cache in the folder, which is made if it is not there, or goes on with the one that is there: the
    /// caller skips [`tokens`](Self::tokens). What a killed writer has left of a shard is deleted.
    ///
    /// # Errors
    /// If a setting is outside its domain or other than that of the cache; if the cache is damaged, or has another
    /// writer; if the system refuses.
    pub fn open(path: impl AsRef<Path>, settings: &Settings) -> Result<Self> {
        settings.check()?;
        let folder = path.as_ref();
        fs::create_dir_all(folder).map_err(io_error("make the folder", folder))?;
        // Not every system opens folders, nor locks them: then two writers are the caller's affair.
        let lock = File::open(folder).ok();
        if let Some(Err(TryLockError::WouldBlock)) = lock.as_ref().map(File::try_lock) {
            return Err(Error::Busy { path: folder.into() });
        }
        let listing = Listing::read(folder)?;
        let mut writer = Self {
            folder: folder.into(),
            settings: settings.clone(),
            cache: format!("{:016x}", fastrand::u64(..)),
            shard_tokens: SHARD_BYTES / settings.bytes_per_token(),
            shards: listing.shards.len(),
            first_token: 0,
            complete: false,
            partial: None,
            lock,
        };
        if writer.shards > 0 {
            let there = TeacherCache::open(folder)?;
            if let Some((name, existing, given)) = there.settings().difference(settings) {
                return Err(Error::OtherSetting { path: folder.into(), name, existing, given });
            }
            writer.cache = there.cache().into();
            writer.first_token = there.tokens();
            writer.complete = there.is_complete();
        }
        for leftover in listing.partial {
            fs::remove_file(&leftover).map_err(io_error("delete", &leftover))?;
        }
        Ok(writer)
    }

    /// The same with so many tokens a shard in the place of 256 MB, from the next one on.
    ///
    /// # Errors
    /// If there is none, or more than a file can hold.
    pub fn with_shard_tokens(mut self, tokens: usize) -> Result<Self> {
        let most = i64::MAX as usize / 2 / self.settings.bytes_per_token();
        if !(1..=most).contains(&tokens) {
            let allowed = "at least 1, and no more than fit into a file";
            return Err(Error::Setting {
                name: "shard_tokens",
                value: tokens.to_string(),
                allowed,
            });
        }
        self.shard_tokens = tokens;
        Ok(self)
    }

    /// The tokens that are there, those of earlier runs included: the number of the next.
    pub fn tokens(&self) -> usize {
        self.first_token + self.partial.as_ref().map_or(0, |partial| partial.tokens)
    }

    /// A run has finished the cache, which takes no more.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Appends rows.
    ///
    /// # Errors
    /// If a row is none that a teacher can have: an index outside the vocabulary or there twice, a log-probability that
    /// is NaN or above 0, more probability than 1, less in a row of the whole vocabulary, a target whose own entry says otherwise, a label outside the
    /// vocabulary. The error names the token, and none of the rows is written. If the system refuses,
    /// [`tokens`](Self::tokens) tells which are there.
    pub fn push(&mut self, rows: &NewRows) -> Result<()> {
        let (k, tokens) = (self.settings.top_k, rows.labels.len());
        let entries = tokens.saturating_mul(k);
        for (what, actual, expected, rule) in [
            ("indices", rows.indices.len(), entries, "K for each label"),
            ("log_probs", rows.log_probs.len(), entries, "K for each label"),
            ("target_log_prob", rows.target_log_prob.len(), tokens, "one for each label"),
            (
                "tail_mass",
                rows.tail_mass.map_or(tokens, <[f32]>::len),
                tokens,
                "one for each label",
            ),
        ] {
            if actual != expected {
                return Err(Error::Length { what, expected, actual, rule });
            }
        }
        if self.complete && tokens > 0 {
            return Err(Error::Complete { path: self.folder.clone(), tokens: self.tokens() });
        }
        let mut codec = Codec::new(&self.settings);
        let widths = self.settings.columns().map(|column| column.bytes);
        let mut columns = widths.map(|bytes| Vec::with_capacity(bytes * tokens));
        let mut errors = Vec::with_capacity(tokens);
        for (i, &label) in rows.labels.iter().enumerate() {
            let row = NewRow {
                indices: &rows.indices[i * k..][..k],
                log_probs: &rows.log_probs[i * k..][..k],
                target_log_prob: rows.target_log_prob[i],
                tail_mass: rows.tail_mass.map(|masses| masses[i]),
                label,
                rounding: rows.rounding,
            };
            match codec.encode(&row, &mut columns) {
                Ok(error) => errors.push(error),
                Err(problem) => return Err(Error::Row { token: self.tokens() + i, problem }),
            }
        }
        let mut done = 0;
        while done < tokens {
            let partial = self.partial()?;
            let count = (partial.capacity - partial.tokens).min(tokens - done);
            let mut start = partial.header;
            for (column, bytes) in columns.iter().zip(widths) {
                let rows = &column[done * bytes..][..count * bytes];
                write_at(&mut partial.file, start + partial.tokens * bytes, rows)
                    .map_err(io_error("write", &partial.path))?;
                start += partial.capacity * bytes;
            }
            partial.tokens += count;
            let error = errors[done..][..count].iter().copied().fold(0.0, f32::max);
            partial.largest_error = partial.largest_error.max(error);
            done += count;
            if partial.tokens == partial.capacity {
                self.close(false)?;
            }
        }
        Ok(())
    }

    /// Appends what the teacher's logits `[n, V]` say of n tokens: of each the K likeliest, as [`TeacherRow::top_k`] has them.
    /// Rows are shared out to rayon's threads.
    ///
    /// # Errors
    /// If the logits are not of the cache's vocabulary, or of other tokens than the labels; if a logit is NaN or +inf, or
    /// a row has none that is finite, but for ignored tokens; if a label is outside the vocabulary. As for
    /// [`push`](Self::push), the error names the token, and none of the rows is written.
    pub fn push_logits(&mut self, logits: Logits, labels: &[i64]) -> Result<()> {
        self.push_rows(logits, labels, None)
    }

    /// The same with K draws of each token, for [`Tail::Sampled`](crate::Tail::Sampled), as [`TeacherRow::sampled`] makes
    /// them: from a random number of the seed and the token's number, so that a run that goes on makes the same.
    ///
    /// # Errors
    /// Those of [`push_logits`](Self::push_logits).
    pub fn push_draws(&mut self, logits: Logits, labels: &[i64], seed: u64) -> Result<()> {
        self.push_rows(logits, labels, Some(seed))
    }

    fn push_rows(&mut self, logits: Logits, labels: &[i64], draws: Option<u64>) -> Result<()> {
        let Settings { vocab_size, top_k, temperature, .. } = self.settings;
        for (what, actual, expected, rule) in [
            ("a row of logits", logits.vocab(), vocab_size, "the cache's vocabulary"),
            ("labels", labels.len(), logits.tokens(), "one for each row of logits"),
        ] {
            if actual != expected {
                return Err(Error::Length { what, expected, actual, rule });
            }
        }
        let first = self.tokens();
        let of_token = |logits: &[f32], token: usize, label: i64| {
            let target = usize::try_from(label).ok();
            let row = match (target, draws) {
                (Some(target), Some(seed)) => {
                    let of_token = fastrand::Rng::with_seed(seed).u64(..) ^ token as u64;
                    let random = fastrand::Rng::with_seed(of_token).f64();
                    TeacherRow::sampled(logits, target, temperature, top_k, random)
                }
                _ => TeacherRow::top_k(logits, target, temperature, top_k),
            };
            let mut row = match row {
                // Nothing is kept of an ignored token without a distribution.
                Err(_) if target.is_none() => {
                    let (indices, log_probs) = (vec![0; top_k], vec![f32::NAN; top_k]);
                    TeacherRow { indices, log_probs, target_log_prob: 0.0, tail_mass: 0.0 }
                }
                row => row.map_err(|error| Error::Row { token, problem: error.to_string() })?,
            };
            row.indices.resize(top_k, -1);
            row.log_probs.resize(top_k, 0.0);
            Ok(row)
        };
        let rows: Vec<TeacherRow> = labels
            .par_iter()
            .enumerate()
            .map_init(
                || vec![0.0; vocab_size],
                |scratch, (i, &label)| of_token(widen(logits.row(i), scratch), first + i, label),
            )
            .collect::<Result<_>>()?;
        let of_rows = |value: fn(&TeacherRow) -> f32| rows.iter().map(value).collect::<Vec<_>>();
        self.push(&NewRows {
            indices: &rows.iter().flat_map(|row| &row.indices).copied().collect::<Vec<_>>(),
            log_probs: &rows.iter().flat_map(|row| &row.log_probs).copied().collect::<Vec<_>>(),
            target_log_prob: &of_rows(|row| row.target_log_prob),
            tail_mass: Some(&of_rows(|row| row.tail_mass)),
            labels,
            rounding: Dtype::F32,
        })
    }

    /// Makes a shard of the tokens since the last one, so that they stay, whatever happens. A run that stops early does
    /// so; one that does it often makes many small files.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn flush(&mut self) -> Result<()> {
        if self.partial.is_some() { self.close(false) } else { Ok(()) }
    }

    /// Says that there are no more tokens: from then on the cache is complete.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn finish(mut self) -> Result<()> {
        if !self.complete {
            self.partial()?;
            self.close(true)?;
        }
        Ok(())
    }

    /// The shard that is being written.
    fn partial(&mut self) -> Result<&mut Partial> {
        let partial = match self.partial.take() {
            Some(partial) => partial,
            None => {
                let capacity = self.shard_tokens;
                let mut path = shard_path(&self.folder, self.shards).into_os_string();
                path.push(PARTIAL);
                let path = PathBuf::from(path);
                let mut options = OpenOptions::new();
                let file = options.read(true).write(true).create(true).truncate(true).open(&path);
                let file = file.map_err(io_error("make", &path))?;
                // Room for longer numbers than these, and for the padding to whole words.
                let header = (self.header(capacity, 0.0, false).len() + 64).next_multiple_of(8);
                Partial { file, path, header, capacity, tokens: 0, largest_error: 0.0 }
            }
        };
        Ok(self.partial.insert(partial))
    }

    /// Gives the shard its name.
    fn close(&mut self, last: bool) -> Result<()> {
        let Some(mut partial) = self.partial.take() else { return Ok(()) };
        let path = shard_path(&self.folder, self.shards);
        let mut header = self.header(partial.tokens, partial.largest_error, last);
        header.resize(partial.header, b' ');
        let length = (partial.header - 8) as u64;
        header[..8].copy_from_slice(&length.to_le_bytes());
        let widths = self.settings.columns().map(|column| column.bytes);
        finish_shard(&mut partial, &header, widths).map_err(io_error("write", &partial.path))?;
        fs::rename(&partial.path, &path).map_err(io_error("make", &path))?;
        // The name too is on the disk, where the system syncs folders.
        if let Some(folder) = &self.lock {
            let _ = folder.sync_all();
        }
        self.shards += 1;
        self.first_token += partial.tokens;
        self.complete = last;
        Ok(())
    }

    /// A safetensors header, with eight bytes before it for its length.
    fn header(&self, tokens: usize, largest_error: f32, last: bool) -> Vec<u8> {
        let [format, version] = FORMAT;
        let mut metadata = serde_json::Map::new();
        let facts = [
            ("format", format.into()),
            ("format_version", version.into()),
            ("cache", self.cache.clone()),
            ("shard", self.shards.to_string()),
            ("first_token", self.first_token.to_string()),
            ("tokens", tokens.to_string()),
            ("largest_error", format!("{largest_error:e}")),
            ("last", last.to_string()),
        ];
        for (key, value) in facts.into_iter().chain(self.settings.facts()) {
            metadata.insert(key.into(), value.into());
        }
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), metadata.into());
        let mut start = 0;
        for column in self.settings.columns().iter().filter(|column| column.bytes > 0) {
            let end = start + tokens * column.bytes;
            let tensor = json!({
                "dtype": format!("{:?}", column.dtype),
                "shape": column.shape(tokens),
                "data_offsets": [start, end],
            });
            header.insert(column.name.into(), tensor);
            start = end;
        }
        [&[0; 8], serde_json::Value::from(header).to_string().as_bytes()].concat()
    }
}

/// Brings the columns together, which lie apart as those of a full shard, and puts the header before them.
fn finish_shard(partial: &mut Partial, header: &[u8], widths: [usize; COLUMNS]) -> io::Result<()> {
    let (mut from, mut to) = (header.len(), header.len());
    let mut piece = vec![0; 1 << 20];
    for bytes in widths {
        let column = partial.tokens * bytes;
        // Never over what is still to be read, since columns move down, in order.
        let mut done = if from == to { column } else { 0 };
        while done < column {
            let count = piece.len().min(column - done);
            partial.file.seek(SeekFrom::Start((from + done) as u64))?;
            partial.file.read_exact(&mut piece[..count])?;
            write_at(&mut partial.file, to + done, &piece[..count])?;
            done += count;
        }
        from += partial.capacity * bytes;
        to += column;
    }
    partial.file.set_len(to as u64)?;
    write_at(&mut partial.file, 0, header)?;
    partial.file.sync_all()
}

fn write_at(file: &mut File, at: usize, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    file.seek(SeekFrom::Start(at as u64))?;
    file.write_all(bytes)
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { doing, path, source }
}
