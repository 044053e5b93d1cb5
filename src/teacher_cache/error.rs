use std::io;
use std::path::PathBuf;

/// Everything that can be wrong with a cache. Every message names the file or the token, and carries the numbers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum Error {
    /// The system refused.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    /// A setting outside its domain.
    #[error("{name} is {value}, but must be {allowed}")]
    Setting { name: &'static str, value: String, allowed: &'static str },
    /// A run goes on with a cache that was begun with another setting.
    #[error(
        "{name} is {given}, but the cache {} was begun with {existing}: give that, or another folder",
        path.display()
    )]
    OtherSetting { path: PathBuf, name: &'static str, existing: String, given: String },
    /// A folder without a shard.
    #[error(
        "{} holds no teacher cache: {reason}; a cache is a folder with teacher-00000.safetensors and so on",
        path.display()
    )]
    NoCache { path: PathBuf, reason: &'static str },
    /// A shard between others, or before them, that is not there.
    #[error(
        "{} is missing, but the cache goes on with {}: bring back that file, or delete those after it and write them again",
        missing.display(), next.display()
    )]
    MissingShard { missing: PathBuf, next: PathBuf },
    /// A file with the name of a shard that is none, or is none of this cache.
    #[error("{} {problem}", path.display())]
    Shard { path: PathBuf, problem: String },
    /// Two programs write one cache.
    #[error("another program writes the cache {}: wait for it, or give another folder", path.display())]
    Busy { path: PathBuf },
    /// Rows for a cache that was finished.
    #[error(
        "the cache {} is complete with {tokens} tokens, and takes no more: give another folder",
        path.display()
    )]
    Complete { path: PathBuf, tokens: usize },
    /// Slices that do not go together.
    #[error("{what} has {actual} elements, but must have {expected}: {rule}")]
    Length { what: &'static str, expected: usize, actual: usize, rule: &'static str },
    /// A row to be written that no teacher can have.
    #[error("token {token}: {problem}")]
    Row { token: usize, problem: String },
    /// A stored row that no writer has left so.
    #[error(
        "{}: token {token} is damaged: {problem}; bring back that file, or write the cache again",
        path.display()
    )]
    Damaged { path: PathBuf, token: usize, problem: String },
    /// A range of tokens that the cache does not have.
    #[error("tokens {start}..{end} were asked for, but the cache has {tokens}")]
    Range { start: usize, end: usize, tokens: usize },
}

/// A result with this module's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
