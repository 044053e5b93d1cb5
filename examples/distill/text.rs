//! The text, as tokens of a subword vocabulary trained on it.

use std::path::{Path, PathBuf};
use std::{env, fs};

use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder, TokenizerImpl};

use crate::Result;

pub const VOCAB: usize = 4096;

/// Dependencies of every build of this example whose sources are the default text.
const CRATES: [&str; 12] = [
    "aho-corasick",
    "candle-core",
    "candle-nn",
    "clap_builder",
    "criterion",
    "indicatif",
    "memchr",
    "plotters",
    "proptest",
    "rayon",
    "serde_json",
    "tokenizers",
];

/// Every tenth file is held out; of a text of fewer files, the last tenth of each.
const HELD_OUT: usize = 10;

/// More of the user's own text is not read.
const MAX_BYTES: usize = 32 << 20;

const BETWEEN_FILES: &str = "<|file|>";

pub struct Text {
    pub train: Vec<u32>,
    pub held_out: Vec<u32>,
    pub vocab: usize,
    pub files: usize,
    pub bytes: usize,
}

impl Text {
    /// The user's file or folder, or the sources of this crate's dependencies.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        let files = match path {
            Some(path) => files_below(path, "")?,
            None => dependencies()?,
        };
        let mut contents = Vec::new();
        let mut bytes = 0;
        for file in &files {
            let content = fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
            // Bytes that are no text have no place in a vocabulary.
            if let Ok(content) = String::from_utf8(content)
                && !content.is_empty()
            {
                bytes += content.len();
                contents.push(content);
            }
            if bytes >= MAX_BYTES {
                break;
            }
        }
        if contents.is_empty() {
            let place = path.map_or("cargo's registry".into(), |path| path.display().to_string());
            return Err(format!("{place} holds no text (UTF-8, not empty)").into());
        }
        let (train, held_out) = split(&contents);
        let tokenizer = train_tokenizer(&train)?;
        Ok(Self {
            train: encode(&tokenizer, train)?,
            held_out: encode(&tokenizer, held_out)?,
            vocab: tokenizer.get_vocab_size(true),
            files: contents.len(),
            bytes,
        })
    }
}

fn split(contents: &[String]) -> (Vec<&str>, Vec<&str>) {
    if contents.len() < HELD_OUT {
        let parts = contents.iter().map(|content| {
            let end = content.len() / HELD_OUT * (HELD_OUT - 1);
            let end = (0..=end).rev().find(|&i| content.is_char_boundary(i)).unwrap_or(0);
            content.split_at(end)
        });
        return parts.unzip();
    }
    let texts = |held_out: bool| {
        let files = contents.iter().enumerate();
        let files = files.filter(|(i, _)| (i % HELD_OUT == HELD_OUT - 1) == held_out);
        files.map(|(_, content)| content.as_str()).collect()
    };
    (texts(false), texts(true))
}

type Tokenizer = TokenizerImpl<BPE, NFC, ByteLevel, ByteLevel, ByteLevel>;

fn train_tokenizer(texts: &[&str]) -> Result<Tokenizer> {
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(VOCAB)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(BETWEEN_FILES, true)])
        .build();
    let mut tokenizer: Tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(ByteLevel::new(false, false, true)))
        .with_post_processor(None)
        .with_decoder(None)
        .build()?;
    tokenizer.train(&mut trainer, texts.iter())?;
    Ok(tokenizer)
}

/// The tokens of all texts, each text followed by the token between files.
fn encode(tokenizer: &Tokenizer, texts: Vec<&str>) -> Result<Vec<u32>> {
    let between = tokenizer.token_to_id(BETWEEN_FILES).ok_or("the vocabulary has no separator")?;
    let encodings = tokenizer.encode_batch_fast(texts, false)?;
    Ok(encodings.iter().flat_map(|e| e.get_ids().iter().copied().chain([between])).collect())
}

/// Files whose name ends in `suffix`, by path, without hidden ones.
fn files_below(path: &Path, suffix: &str) -> Result<Vec<PathBuf>> {
    let error = |e| format!("{}: {e}", path.display());
    if !fs::metadata(path).map_err(error)?.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut entries: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(path).map_err(error)? {
        let entry = entry.map_err(error)?;
        if !entry.file_name().to_string_lossy().starts_with('.')
            && !entry.file_type().map_err(error)?.is_symlink()
        {
            entries.push(entry.path());
        }
    }
    entries.sort();
    let mut files = Vec::new();
    for entry in entries {
        if entry.is_dir() {
            files.extend(files_below(&entry, suffix)?);
        } else if entry.to_string_lossy().ends_with(suffix) {
            files.push(entry);
        }
    }
    Ok(files)
}

/// The sources of [`CRATES`] in cargo's registry, of the versions in this crate's lock file.
fn dependencies() -> Result<Vec<PathBuf>> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(env::home_dir()?.join(".cargo")));
    let sources = home.ok_or("there is no home directory")?.join("registry").join("src");
    let registries: Vec<PathBuf> = match fs::read_dir(&sources) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    };
    let mut files = Vec::new();
    for name in CRATES {
        let header = format!("name = \"{name}\"\nversion = \"");
        let version = include_str!("../../Cargo.lock")
            .split_once(&header)
            .and_then(|(_, rest)| rest.split('"').next())
            .ok_or_else(|| format!("Cargo.lock does not name {name}"))?;
        let folder = format!("{name}-{version}");
        let folder = registries
            .iter()
            .map(|registry| registry.join(&folder).join("src"))
            .find(|folder| folder.is_dir())
            .ok_or_else(|| {
                format!(
                    "the text is the sources of this crate's dependencies, but {} has no {folder}; \
                     run `cargo fetch`, or give a text of your own with --text",
                    sources.display()
                )
            })?;
        files.extend(files_below(&folder, ".rs")?);
    }
    Ok(files)
}
