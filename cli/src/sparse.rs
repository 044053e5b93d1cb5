//! The teacher of a file that has the log-probabilities of some tokens in the place of its logits.

use std::borrow::Cow;
use std::path::Path;

use anyhow::{Context, Result, bail};
use atkd::{SparseTeacher, Tail};
use clap::ValueEnum;
use safetensors::SafeTensors;

use crate::backend::{Backend, Choice};
use crate::tensors::{self, Matrix};

/// A file with one of these tensors has a sparse teacher.
const INDICES: &str = "teacher_indices";
const LOG_PROBS: &str = "teacher_log_probs";
const TARGET_LOG_PROB: &str = "teacher_target_log_prob";

#[derive(Clone, Copy, ValueEnum)]
pub enum TailName {
    /// None: the known probabilities are renormalised
    Zero,
    /// All the same
    Uniform,
    /// Whatever they are: together they are one class, against the student's mass on the same tokens
    Bucket,
    /// None: the tokens are draws from all but the label, with weights; for forward KL
    Sampled,
}

impl TailName {
    fn tail(self) -> Tail {
        match self {
            Self::Zero => Tail::Zero,
            Self::Uniform => Tail::Uniform,
            Self::Bucket => Tail::Bucket,
            Self::Sampled => Tail::Sampled,
        }
    }
}

/// The tensor that says that a file's teacher is sparse.
pub fn first_tensor(file: &SafeTensors) -> Option<&'static str> {
    [INDICES, LOG_PROBS, TARGET_LOG_PROB].into_iter().find(|name| file.tensor(name).is_ok())
}

/// The backend for sparse teachers of this tail, of the one that was chosen for logits.
pub fn backend(choice: Choice, backend: Backend, tail: Option<TailName>) -> Result<Backend> {
    match backend {
        Backend::Cuda(_) | Backend::Simt if matches!(tail, Some(TailName::Uniform)) => match choice
        {
            Choice::Auto => Ok(Backend::Cpu),
            _ => bail!(
                "the {backend} backend has no kernel for --tail uniform: use --backend cpu or reference, or --tail \
                 bucket, zero or sampled"
            ),
        },
        backend => Ok(backend),
    }
}

/// The tensors of a sparse teacher.
pub struct Sparse<'a> {
    indices: Cow<'a, [i64]>,
    log_probs: Matrix<'a>,
    target_log_probs: Option<Cow<'a, [f32]>>,
    tail: Tail,
}

impl<'a> Sparse<'a> {
    pub fn read(path: &Path, file: &SafeTensors<'a>, tail: Option<TailName>) -> Result<Self> {
        let ([rows, top_k], indices) = tensors::indices(path, file, INDICES)?;
        let log_probs = Matrix::read(path, file, LOG_PROBS)?;
        if [log_probs.rows, log_probs.columns] != [rows, top_k] {
            bail!(
                "`{INDICES}` is [{rows}, {top_k}], but `{LOG_PROBS}` is [{}, {}]: there must be one \
                 log-probability for each index",
                log_probs.rows,
                log_probs.columns
            );
        }
        let target_log_probs = tensors::of_tokens(file, TARGET_LOG_PROB)?;
        let tail = tail.map_or(Tail::default(), TailName::tail);
        Ok(Self { indices, log_probs, target_log_probs, tail })
    }

    /// The teacher of a student with such logits.
    pub fn teacher(&self, student: &Matrix, vocab: usize) -> Result<SparseTeacher<'_>> {
        let (rows, top_k) = (self.log_probs.rows, self.top_k());
        if rows != student.rows {
            bail!(
                "`student` is [{}, {}], but `{INDICES}` is [{rows}, {top_k}]: both must have a row for each \
                 token",
                student.rows,
                student.columns
            );
        }
        let log_probs = self.log_probs.elements();
        let teacher = SparseTeacher::new(&self.indices[..], log_probs, rows, top_k, vocab)
            .with_context(|| format!("`{INDICES}`"))?
            .with_tail(self.tail);
        match &self.target_log_probs {
            Some(of_targets) => teacher
                .with_target_log_probs(of_targets)
                .with_context(|| format!("`{TARGET_LOG_PROB}`")),
            None => Ok(teacher),
        }
    }

    pub fn top_k(&self) -> usize {
        self.log_probs.columns
    }

    /// The name of the tail, as the option has it.
    pub fn tail(&self) -> &'static str {
        match self.tail {
            Tail::Zero => "zero",
            Tail::Uniform => "uniform",
            Tail::Bucket => "bucket",
            Tail::Sampled => "sampled",
        }
    }
}
