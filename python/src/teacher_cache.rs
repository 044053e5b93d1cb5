//! Sparse teachers on disk.

use std::path::PathBuf;

use atkd::teacher_cache::{Encoding, Error, NewRows, RowsMut, Settings, TeacherCache, Writer};
use pyo3::exceptions::{
    PyFileNotFoundError, PyIndexError, PyOSError, PyRuntimeError, PyValueError,
};
use pyo3::prelude::*;

use super::LogitsDtype;

fn exception(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            PyFileNotFoundError::new_err(message)
        }
        Error::NoCache { .. } => PyFileNotFoundError::new_err(message),
        Error::Io { .. } => PyOSError::new_err(message),
        Error::Range { .. } => PyIndexError::new_err(message),
        Error::Busy { .. } => PyRuntimeError::new_err(message),
        _ => PyValueError::new_err(message),
    }
}

/// The settings as Python has them: V, K, temperature, encoding, fingerprint.
type Facts = (usize, usize, f64, &'static str, String);

/// A cache that can be read.
#[pyclass(frozen, module = "atkd._atkd", name = "TeacherCache")]
pub struct Reader(TeacherCache);

#[pymethods]
impl Reader {
    #[new]
    fn new(path: PathBuf) -> PyResult<Self> {
        TeacherCache::open(path).map(Self).map_err(exception)
    }

    #[getter]
    fn tokens(&self) -> usize {
        self.0.tokens()
    }

    #[getter]
    fn complete(&self) -> bool {
        self.0.is_complete()
    }

    #[getter]
    fn bytes_per_token(&self) -> usize {
        self.0.bytes_per_token()
    }

    #[getter]
    fn largest_error(&self) -> f32 {
        self.0.largest_error()
    }

    #[getter]
    fn facts(&self) -> Facts {
        let settings = self.0.settings();
        let Settings { vocab_size, top_k, temperature, encoding, fingerprint } = settings.clone();
        (vocab_size, top_k, temperature, encoding.name(), fingerprint)
    }

    fn mean_tail_mass(&self, py: Python) -> f64 {
        py.detach(|| self.0.mean_tail_mass())
    }

    /// Tokens from `start` to `end`, to addresses: int32 `[n, K]`, float32 `[n, K]`, float32 `[n]` twice, int32 `[n]`.
    fn read(&self, py: Python, start: usize, end: usize, to: [u64; 5]) -> PyResult<()> {
        let tokens = end.saturating_sub(start);
        let entries = tokens * self.0.settings().top_k;
        let [indices, log_probs, target_log_prob, tail_mass, labels] = to;
        // SAFETY: the package's own Python code, the only caller, passes the addresses of tensors of these shapes that
        // it has just made, and that nobody else knows.
        let to = unsafe {
            RowsMut {
                indices: slice_mut(indices, entries),
                log_probs: slice_mut(log_probs, entries),
                target_log_prob: slice_mut(target_log_prob, tokens),
                tail_mass: slice_mut(tail_mass, tokens),
                labels: slice_mut(labels, tokens),
            }
        };
        py.detach(|| self.0.read_into(start..end, to)).map_err(exception)
    }
}

/// A cache that is being written. It is `None` once it is finished, or was given up.
#[pyclass(module = "atkd._atkd", name = "TeacherCacheWriter")]
pub struct NativeWriter(Option<Writer>);

#[pymethods]
impl NativeWriter {
    #[new]
    fn new(
        path: PathBuf,
        vocab_size: usize,
        top_k: usize,
        temperature: f64,
        encoding: &str,
        fingerprint: String,
        shard_tokens: Option<usize>,
    ) -> PyResult<Self> {
        let Some(&encoding) = Encoding::ALL.iter().find(|known| known.name() == encoding) else {
            return super::unknown("encoding", encoding, r#""f16" or "u8""#);
        };
        let settings = Settings { vocab_size, top_k, temperature, encoding, fingerprint };
        let mut writer = Writer::open(path, &settings).map_err(exception)?;
        if let Some(tokens) = shard_tokens {
            writer = writer.with_shard_tokens(tokens).map_err(exception)?;
        }
        Ok(Self(Some(writer)))
    }

    fn tokens(&mut self) -> PyResult<usize> {
        Ok(self.writer()?.tokens())
    }

    fn complete(&mut self) -> PyResult<bool> {
        Ok(self.writer()?.is_complete())
    }

    /// Rows, what their values were rounded to before, and by address int32 `[n, K]`, float32 `[n, K]`, float32 `[n]`, float32
    /// `[n]` or `None`, int64 `[n]`.
    #[expect(clippy::too_many_arguments, reason = "they are what rows are")]
    fn push(
        &mut self,
        py: Python,
        tokens: usize,
        top_k: usize,
        rounding: LogitsDtype,
        indices: u64,
        log_probs: u64,
        target_log_prob: u64,
        tail_mass: Option<u64>,
        labels: u64,
    ) -> PyResult<()> {
        let writer = self.writer()?;
        // SAFETY: the package's own Python code, the only caller, passes the addresses of tensors of these shapes that
        // it holds.
        let rows = unsafe {
            NewRows {
                indices: slice(indices, tokens * top_k),
                log_probs: slice(log_probs, tokens * top_k),
                target_log_prob: slice(target_log_prob, tokens),
                tail_mass: tail_mass.map(|masses| slice(masses, tokens)),
                labels: slice(labels, tokens),
                rounding: rounding.into(),
            }
        };
        py.detach(|| writer.push(&rows)).map_err(exception)
    }

    fn flush(&mut self, py: Python) -> PyResult<()> {
        let writer = self.writer()?;
        py.detach(|| writer.flush()).map_err(exception)
    }

    /// Says that there are no more tokens.
    fn finish(&mut self, py: Python) -> PyResult<()> {
        self.writer()?;
        match self.0.take() {
            Some(writer) => py.detach(|| writer.finish()).map_err(exception),
            None => Ok(()),
        }
    }

    /// Lets other writers go on with the cache.
    fn close(&mut self) {
        self.0 = None;
    }
}

impl NativeWriter {
    fn writer(&mut self) -> PyResult<&mut Writer> {
        self.0.as_mut().ok_or_else(|| PyValueError::new_err("the writer is closed"))
    }
}

/// # Safety
/// So many elements are there, unless there are none, and nobody writes them meanwhile.
unsafe fn slice<'a, T>(address: u64, elements: usize) -> &'a [T] {
    match elements {
        0 => &[],
        // SAFETY: the caller's.
        _ => unsafe { std::slice::from_raw_parts(address as *const T, elements) },
    }
}

/// # Safety
/// So many elements are there, unless there are none, and nobody else reads or writes them meanwhile.
unsafe fn slice_mut<'a, T>(address: u64, elements: usize) -> &'a mut [T] {
    match elements {
        0 => &mut [],
        // SAFETY: the caller's.
        _ => unsafe { std::slice::from_raw_parts_mut(address as *mut T, elements) },
    }
}
