//! Logits and labels from a safetensors file.

use std::borrow::Cow;
use std::path::Path;

use anyhow::{Context, Result, bail};
use atkd::{Dtype, Elements, ElementsMut, Logits, LogitsMut};
use bytemuck::allocation::pod_collect_to_vec;
use bytemuck::{Pod, try_cast_slice};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

/// A dtype on the command line.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum DtypeName {
    F32,
    F16,
    Bf16,
}

impl DtypeName {
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::Bf16,
        }
    }
}

/// Opens the file for as long as the program runs.
pub fn open(path: &Path) -> Result<Mmap> {
    let cannot = || format!("cannot open {}", path.display());
    // Asked first: a pipe that nobody writes to would not open.
    let metadata = std::fs::metadata(path).with_context(cannot)?;
    if !metadata.is_file() {
        bail!(
            "cannot read {}: it is {}, but must be a regular file, which is mapped into memory",
            path.display(),
            if metadata.is_dir() { "a directory" } else { "a pipe or device" }
        );
    }
    let file = std::fs::File::open(path).with_context(cannot)?;
    // SAFETY: as for any mapped file, whoever truncates it meanwhile ends this program.
    unsafe { Mmap::map(&file) }.with_context(|| format!("cannot read {}", path.display()))
}

pub fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(bytes)
        .with_context(|| format!("{} is not a safetensors file", path.display()))
}

fn tensor<'a>(path: &Path, file: &SafeTensors<'a>, name: &str) -> Result<TensorView<'a>> {
    match file.tensor(name) {
        Ok(tensor) => Ok(tensor),
        Err(_) => {
            let mut names = file.names();
            names.sort_unstable();
            bail!(
                "{} has no tensor `{name}`; it holds {}. The loss needs `student` and `teacher` \
                 [N, V] (F32, F16 or BF16), or `student_hidden`, `student_weight`, `teacher_hidden` and \
                 `teacher_weight`; and `labels` [N] (I64). `teacher_indices` and `teacher_log_probs` [N, K] \
                 may stand for `teacher`",
                path.display(),
                if names.is_empty() { "none".into() } else { names.join(", ") }
            )
        }
    }
}

/// The elements where they lie in the file, or a copy if they are not aligned there.
fn elements<T: Pod>(bytes: &[u8]) -> Cow<'_, [T]> {
    try_cast_slice(bytes).map_or_else(|_| Cow::Owned(pod_collect_to_vec(bytes)), Cow::Borrowed)
}

/// Elements of one of the three dtypes, mapped or owned.
pub enum Tensor<'a> {
    F32(Cow<'a, [f32]>),
    F16(Cow<'a, [f16]>),
    Bf16(Cow<'a, [bf16]>),
}

impl<'a> Tensor<'a> {
    fn new(name: &str, view: &TensorView<'a>) -> Result<Self> {
        Ok(match view.dtype() {
            safetensors::Dtype::F32 => Tensor::F32(elements(view.data())),
            safetensors::Dtype::F16 => Tensor::F16(elements(view.data())),
            safetensors::Dtype::BF16 => Tensor::Bf16(elements(view.data())),
            other => bail!("`{name}` is {other:?}, but must be F32, F16 or BF16"),
        })
    }

    /// A tensor `[V]`, `None` if the file has none of this name.
    pub fn read_vector(file: &SafeTensors<'a>, name: &str) -> Result<Option<Self>> {
        let Ok(view) = file.tensor(name) else { return Ok(None) };
        if view.shape().len() != 1 {
            bail!("`{name}` has shape {:?}, but must be [V]", view.shape());
        }
        Self::new(name, &view).map(Some)
    }

    pub fn elements(&self) -> Elements<'_> {
        match self {
            Tensor::F32(v) => Elements::F32(v),
            Tensor::F16(v) => Elements::F16(v),
            Tensor::Bf16(v) => Elements::Bf16(v),
        }
    }
}

/// A matrix: logits `[tokens, vocab]`, hidden states `[tokens, hidden size]`, a weight `[vocab, hidden size]`.
pub struct Matrix<'a> {
    data: Tensor<'a>,
    pub rows: usize,
    pub columns: usize,
}

impl<'a> Matrix<'a> {
    pub fn read(path: &Path, file: &SafeTensors<'a>, name: &str) -> Result<Self> {
        let view = tensor(path, file, name)?;
        let &[rows, columns] = view.shape() else {
            let shape = match name.rsplit_once('_') {
                None => "[N, V]: one row of V logits for each of N tokens",
                Some((_, "weight")) => {
                    "[V, H]: one row of H numbers for each of V entries of the vocabulary"
                }
                Some((_, "probs")) => "[N, K]: one row of K log-probabilities for each of N tokens",
                Some(_) => "[N, H]: one row of H numbers for each of N tokens",
            };
            bail!("`{name}` has shape {:?}, but must be {shape}", view.shape());
        };
        Ok(Self { data: Tensor::new(name, &view)?, rows, columns })
    }

    /// Zeros, or an error if the system does not give the memory.
    pub fn zeros(dtype: Dtype, rows: usize, columns: usize) -> Result<Self> {
        fn filled<T: Copy>(zero: T, rows: usize, columns: usize) -> Result<Vec<T>> {
            let mut data = Vec::new();
            let count = rows.checked_mul(columns);
            if count.is_none_or(|count| data.try_reserve_exact(count).is_err()) {
                bail!(
                    "{rows} rows of {columns} numbers do not fit into memory; use fewer tokens or a \
                     smaller vocabulary"
                );
            }
            data.resize(rows * columns, zero);
            Ok(data)
        }
        let data = match dtype {
            Dtype::F32 => Tensor::F32(filled(0.0, rows, columns)?.into()),
            Dtype::F16 => Tensor::F16(filled(f16::ZERO, rows, columns)?.into()),
            Dtype::Bf16 => Tensor::Bf16(filled(bf16::ZERO, rows, columns)?.into()),
        };
        Ok(Self { data, rows, columns })
    }

    pub fn elements(&self) -> Elements<'_> {
        self.data.elements()
    }

    pub fn elements_mut(&mut self) -> ElementsMut<'_> {
        match &mut self.data {
            Tensor::F32(v) => ElementsMut::F32(v.to_mut()),
            Tensor::F16(v) => ElementsMut::F16(v.to_mut()),
            Tensor::Bf16(v) => ElementsMut::Bf16(v.to_mut()),
        }
    }

    /// The elements, if they are float32.
    pub fn as_f32_mut(&mut self) -> Option<&mut [f32]> {
        match &mut self.data {
            Tensor::F32(v) => Some(v.to_mut()),
            _ => None,
        }
    }

    pub fn logits(&self) -> atkd::Result<Logits<'_>> {
        Logits::new(self.elements(), self.rows, self.columns)
    }

    pub fn logits_mut(&mut self) -> atkd::Result<LogitsMut<'_>> {
        let (rows, columns) = (self.rows, self.columns);
        LogitsMut::new(self.elements_mut(), rows, columns)
    }

    pub fn dtype(&self) -> Dtype {
        self.elements().dtype()
    }

    pub fn safetensors_dtype(&self) -> safetensors::Dtype {
        match self.dtype() {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::Bf16 => safetensors::Dtype::BF16,
        }
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Tensor::F32(v) => bytemuck::cast_slice(v),
            Tensor::F16(v) => bytemuck::cast_slice(v),
            Tensor::Bf16(v) => bytemuck::cast_slice(v),
        }
    }

    /// Sets every element to `f` of its index, rounded.
    pub fn fill(&mut self, mut f: impl FnMut(usize) -> f32) {
        match &mut self.data {
            Tensor::F32(v) => v.to_mut().iter_mut().enumerate().for_each(|(i, z)| *z = f(i)),
            Tensor::F16(v) => {
                v.to_mut().iter_mut().enumerate().for_each(|(i, z)| *z = f16::from_f32(f(i)))
            }
            Tensor::Bf16(v) => {
                v.to_mut().iter_mut().enumerate().for_each(|(i, z)| *z = bf16::from_f32(f(i)))
            }
        }
    }
}

/// A number per token, `None` if the file has no tensor of this name.
pub fn of_tokens<'a>(file: &SafeTensors<'a>, name: &str) -> Result<Option<Cow<'a, [f32]>>> {
    let Ok(view) = file.tensor(name) else { return Ok(None) };
    match (view.shape(), view.dtype()) {
        ([_], safetensors::Dtype::F32) => Ok(Some(elements(view.data()))),
        (shape, dtype) => {
            bail!("`{name}` is {dtype:?} {shape:?}, but must be F32 [N]: one number per token")
        }
    }
}

/// The labels, `None` if the file has none.
pub fn labels(path: &Path, file: &SafeTensors, required: bool) -> Result<Option<Vec<i64>>> {
    if !required && file.tensor("labels").is_err() {
        return Ok(None);
    }
    let view = tensor(path, file, "labels")?;
    if view.shape().len() != 1 {
        bail!("`labels` has shape {:?}, but must be [N]: one label a token", view.shape());
    }
    integers("labels", &view).map(|labels| Some(labels.into_owned()))
}

/// A tensor `[N, K]` of tokens of the vocabulary, and its shape.
pub fn indices<'a>(
    path: &Path,
    file: &SafeTensors<'a>,
    name: &str,
) -> Result<([usize; 2], Cow<'a, [i64]>)> {
    let view = tensor(path, file, name)?;
    let &[rows, columns] = view.shape() else {
        bail!(
            "`{name}` has shape {:?}, but must be [N, K]: one row of K tokens of the vocabulary for each of \
             N tokens",
            view.shape()
        );
    };
    Ok(([rows, columns], integers(name, &view)?))
}

fn integers<'a>(name: &str, view: &TensorView<'a>) -> Result<Cow<'a, [i64]>> {
    Ok(match view.dtype() {
        safetensors::Dtype::I64 => elements(view.data()),
        safetensors::Dtype::I32 => {
            elements::<i32>(view.data()).iter().map(|&value| value.into()).collect()
        }
        other => bail!("`{name}` is {other:?}, but must be I64 (or I32)"),
    })
}
