use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use memmap2::Mmap;
use safetensors::SafeTensors;

use super::row::Codec;
use super::{COLUMNS, Encoding, Error, FORMAT, Listing, Result, Settings, TAIL_MASS};

/// The rows that a cache has of n tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// `[n, K]`: the most probable first, but for the target, which may be where the encoding's error has put it; -1
    /// for entries that are not there, which come last.
    pub indices: Vec<i32>,
    /// `[n, K]`: log-probabilities in nats, at the cache's temperature; negative infinity where the index is -1. The
    /// target's is `target_log_prob`.
    pub log_probs: Vec<f32>,
    /// `[n]`: the target's log-probability; negative infinity where the label is below 0.
    pub target_log_prob: Vec<f32>,
    /// `[n]`: the probability of all tokens that are neither among the K nor the target. Entries, target (if not among
    /// them) and tail add up to 1 but for 3e-6.
    pub tail_mass: Vec<f32>,
    /// `[n]`: the target, below 0 for a token to be ignored.
    pub labels: Vec<i32>,
}

/// The memory for what a cache says of n tokens. All is as in [`Rows`].
#[derive(Debug)]
#[expect(missing_docs, reason = "the fields are those of Rows")]
pub struct RowsMut<'a> {
    pub indices: &'a mut [i32],
    pub log_probs: &'a mut [f32],
    pub target_log_prob: &'a mut [f32],
    pub tail_mass: &'a mut [f32],
    pub labels: &'a mut [i32],
}

/// A cache, mapped into memory. It may be unfinished, and be written on meanwhile: it has the shards that were there
/// when it was opened.
///
/// Its files are mapped: whoever truncates a shard meanwhile ends the program that reads it.
#[derive(Debug)]
pub struct TeacherCache {
    settings: Settings,
    cache: String,
    shards: Vec<Shard>,
    complete: bool,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
    first_token: usize,
    tokens: usize,
    largest_error: f32,
    /// The offset of each column in the file.
    starts: [usize; COLUMNS],
}

impl TeacherCache {
    /// Opens the cache in the folder, and checks all headers. Rows are checked when they are read.
    ///
    /// # Errors
    /// If there is no cache; a shard is missing, truncated, of another cache, format or version, or has tensors of
    /// another dtype or shape; if the system refuses.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let folder = path.as_ref();
        let no_cache = |reason| Error::NoCache { path: folder.into(), reason };
        match std::fs::metadata(folder) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(no_cache("it is no folder")),
            Err(source) => {
                return Err(Error::Io { doing: "open the cache", path: folder.into(), source });
            }
        }
        let listing = Listing::read(folder)?;
        let mut files = listing.shards.iter();
        let Some(first) = files.next() else {
            return Err(no_cache(match listing.partial.is_empty() {
                true => "it has no shards",
                false => "its first shard is still being written, or was left half written",
            }));
        };
        let (shard, header) = open_shard(first, 0, None)?;
        let mut shards = vec![shard];
        let mut complete = header.last;
        for path in files {
            let before = &shards[shards.len() - 1];
            if complete {
                let problem = format!("comes after {}, which is the last", before.path.display());
                return Err(Error::Shard { path: path.clone(), problem });
            }
            let end = before.first_token + before.tokens;
            let (shard, next) = open_shard(path, end, Some((first, &header)))?;
            complete = next.last;
            shards.push(shard);
        }
        Ok(Self { settings: header.settings, cache: header.cache, shards, complete })
    }

    /// The facts that all rows have in common.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The number that the shards have in common.
    pub(super) fn cache(&self) -> &str {
        &self.cache
    }

    /// Tokens that can be read.
    pub fn tokens(&self) -> usize {
        self.shards.last().map_or(0, |shard| shard.first_token + shard.tokens)
    }

    /// False if the writer has not finished, or the last shards are lost.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Files.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// The bytes that a token takes on disk.
    pub fn bytes_per_token(&self) -> usize {
        self.settings.bytes_per_token()
    }

    /// The most, in nats, by which an entry's log-probability differs from what was pushed.
    pub fn largest_error(&self) -> f32 {
        self.shards.iter().map(|shard| shard.largest_error).fold(0.0, f32::max)
    }

    /// The mean of all tokens' `tail_mass`, 0 of no tokens. It reads 4 bytes a token.
    pub fn mean_tail_mass(&self) -> f64 {
        let mut sum = 0.0;
        for shard in &self.shards {
            let masses = &shard.map[shard.starts[TAIL_MASS]..][..4 * shard.tokens];
            let floats =
                masses.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            sum += floats.map(f64::from).sum::<f64>();
        }
        sum / self.tokens().max(1) as f64
    }

    /// Tokens of a range, which may be of several shards.
    ///
    /// # Errors
    /// If the cache does not have the range, or a row in it is damaged.
    pub fn read(&self, range: Range<usize>) -> Result<Rows> {
        self.check(&range)?;
        let (tokens, k) = (range.len(), self.settings.top_k);
        let mut rows = Rows {
            indices: vec![0; tokens * k],
            log_probs: vec![0.0; tokens * k],
            target_log_prob: vec![0.0; tokens],
            tail_mass: vec![0.0; tokens],
            labels: vec![0; tokens],
        };
        let to = RowsMut {
            indices: &mut rows.indices,
            log_probs: &mut rows.log_probs,
            target_log_prob: &mut rows.target_log_prob,
            tail_mass: &mut rows.tail_mass,
            labels: &mut rows.labels,
        };
        self.read_into(range, to)?;
        Ok(rows)
    }

    /// The same into the caller's memory.
    ///
    /// # Errors
    /// As [`read`](Self::read), which has what is before the damaged row overwritten; or if a slice is of another
    /// length than the range needs.
    pub fn read_into(&self, range: Range<usize>, to: RowsMut) -> Result<()> {
        self.check(&range)?;
        let (tokens, k) = (range.len(), self.settings.top_k);
        for (what, actual, expected, rule) in [
            ("indices", to.indices.len(), tokens * k, "K for each token"),
            ("log_probs", to.log_probs.len(), tokens * k, "K for each token"),
            ("target_log_prob", to.target_log_prob.len(), tokens, "one for each token"),
            ("tail_mass", to.tail_mass.len(), tokens, "one for each token"),
            ("labels", to.labels.len(), tokens, "one for each token"),
        ] {
            if actual != expected {
                return Err(Error::Length { what, expected, actual, rule });
            }
        }
        let codec = Codec::new(&self.settings);
        let widths = self.settings.columns().map(|column| column.bytes);
        let mut shard =
            self.shards.partition_point(|shard| shard.first_token + shard.tokens <= range.start);
        for (i, token) in range.enumerate() {
            // A shard may have no tokens.
            while token - self.shards[shard].first_token >= self.shards[shard].tokens {
                shard += 1;
            }
            let Shard { path, map, first_token, starts, .. } = &self.shards[shard];
            let row = token - first_token;
            let bytes = std::array::from_fn(|c| &map[starts[c] + row * widths[c]..][..widths[c]]);
            let (indices, log_probs) =
                (&mut to.indices[i * k..][..k], &mut to.log_probs[i * k..][..k]);
            let (target_log_prob, tail_mass, label) = codec
                .decode(bytes, indices, log_probs)
                .map_err(|problem| Error::Damaged { path: path.clone(), token, problem })?;
            to.target_log_prob[i] = target_log_prob;
            to.tail_mass[i] = tail_mass;
            to.labels[i] = label;
        }
        Ok(())
    }

    fn check(&self, range: &Range<usize>) -> Result<()> {
        let (Range { start, end }, tokens) = (range.clone(), self.tokens());
        if start > end || end > tokens {
            return Err(Error::Range { start, end, tokens });
        }
        Ok(())
    }
}

/// The facts that a shard has beside its tokens.
struct Header {
    settings: Settings,
    cache: String,
    last: bool,
}

/// `first_token` is the number that the shard's must be. All but the first shard must agree with the first.
fn open_shard(
    path: &Path,
    first_token: usize,
    first: Option<(&Path, &Header)>,
) -> Result<(Shard, Header)> {
    let cannot = |source| Error::Io { doing: "open", path: path.into(), source };
    let bad = |problem| Error::Shard { path: path.into(), problem };
    // Asked first: a pipe that nobody writes to would not open.
    if !std::fs::metadata(path).map_err(cannot)?.is_file() {
        return Err(bad("is no regular file".into()));
    }
    let file = File::open(path).map_err(cannot)?;
    // SAFETY: as for any mapped file, whoever truncates it meanwhile ends this program.
    let map = unsafe { Mmap::map(&file) }.map_err(cannot)?;
    let (length, metadata) = SafeTensors::read_metadata(&map).map_err(|error| {
        bad(format!("is no whole safetensors file ({} bytes): {error}", map.len()))
    })?;
    let Some(facts) = metadata.metadata().as_ref().filter(|facts| facts.contains_key("format"))
    else {
        return Err(bad("is a safetensors file, but not of a teacher cache".into()));
    };
    let fact = |name: &str| match facts.get(name) {
        Some(value) => Ok(value.as_str()),
        None => Err(bad(format!("lacks `{name}` in its metadata"))),
    };
    let [format, version] = FORMAT;
    if fact("format")? != format {
        return Err(bad(format!("has the format {:?}, but must have {format:?}", fact("format")?)));
    }
    if fact("format_version")? != version {
        return Err(bad(format!(
            "has version {} of its format, but this program reads {version}",
            fact("format_version")?
        )));
    }
    fn parsed<T: FromStr>(text: &str, name: &str) -> Result<T, String> {
        text.parse().map_err(|_| format!("has {text:?} for `{name}` in its metadata"))
    }
    let number = |name| parsed::<usize>(fact(name)?, name).map_err(bad);
    let encoding = fact("encoding")?;
    let Some(&encoding) = Encoding::ALL.iter().find(|known| known.name() == encoding) else {
        return Err(bad(format!(
            "has the encoding {encoding:?}, which this program does not know"
        )));
    };
    let settings = Settings {
        vocab_size: number("vocab_size")?,
        top_k: number("top_k")?,
        temperature: parsed(fact("temperature")?, "temperature").map_err(bad)?,
        encoding,
        fingerprint: fact("fingerprint")?.into(),
    };
    settings.check().map_err(|error| bad(format!("has a setting that none can have: {error}")))?;
    let header = Header {
        settings,
        cache: fact("cache")?.into(),
        last: parsed(fact("last")?, "last").map_err(bad)?,
    };
    if let Some((first_path, first)) = first {
        let of_first = first.settings.difference(&header.settings);
        let other = (header.cache != first.cache)
            .then(|| ("the number of the cache", first.cache.clone(), header.cache.clone()));
        if let Some((name, there, here)) = of_first.or(other) {
            return Err(bad(format!(
                "is of another cache than {}: {name} is {here}, but {there} there",
                first_path.display()
            )));
        }
    }
    let name = super::shard_path(Path::new(""), number("shard")?);
    if path.file_name() != name.file_name() {
        return Err(bad(format!("was {} when it was written", name.display())));
    }
    let tokens = number("tokens")?;
    if number("first_token")? != first_token || first_token.checked_add(tokens).is_none() {
        return Err(bad(format!(
            "begins with token {} and has {tokens}, but must begin with {first_token}",
            number("first_token")?
        )));
    }
    let mut starts = [0; COLUMNS];
    for (start, column) in starts.iter_mut().zip(header.settings.columns()) {
        if column.bytes == 0 {
            continue;
        }
        let (expected, shape) = (column.dtype, column.shape(tokens));
        match metadata.info(column.name) {
            None => return Err(bad(format!("has no tensor `{}`", column.name))),
            Some(tensor) if tensor.dtype == expected && tensor.shape == shape => {
                // Behind the header's length and the header.
                *start = 8 + length + tensor.data_offsets.0;
            }
            Some(tensor) => {
                return Err(bad(format!(
                    "has `{}` as {:?} {:?}, but must have {expected:?} {shape:?}",
                    column.name, tensor.dtype, tensor.shape
                )));
            }
        }
    }
    let largest_error = parsed(fact("largest_error")?, "largest_error").map_err(bad)?;
    let shard = Shard { path: path.into(), map, first_token, tokens, largest_error, starts };
    Ok((shard, header))
}
