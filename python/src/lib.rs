//! The native half of the Python package: settings, and the loss on the addresses that torch gives.

mod threads;

use std::ffi::c_void;

use atkd::{Dtype, Reduction, Target, raw};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

fn value_error(error: atkd::Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}

fn unknown<T>(name: &str, value: &str, allowed: &str) -> PyResult<T> {
    Err(PyValueError::new_err(format!("{name} is {value:?}, but must be {allowed}")))
}

/// What is computed, checked.
#[pyclass(frozen, module = "atkd._atkd")]
struct Objective(atkd::Objective);

#[pymethods]
impl Objective {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "they are Python's keywords")]
    fn new(
        objective: &str,
        lam: f64,
        hard_ratio: f64,
        temperature: f64,
        temperature_squared: bool,
        target: &str,
        reduction: &str,
        ignore_index: i64,
        ce_weight: f64,
        kd_weight: f64,
    ) -> PyResult<Self> {
        let objective = match objective {
            "atkd" => atkd::Objective::atkd(lam).map_err(value_error)?,
            "kl" => atkd::Objective::kl(),
            "tkd" => atkd::Objective::tkd(),
            "dkd" => atkd::Objective::dkd(),
            other => return unknown("objective", other, r#""atkd", "kl", "tkd" or "dkd""#),
        };
        let target = match target {
            "label" => Target::Label,
            "teacher" => Target::Teacher,
            other => return unknown("target", other, r#""label" or "teacher""#),
        };
        let reduction = match reduction {
            "mean" => Reduction::Mean,
            "sum" => Reduction::Sum,
            other => return unknown("reduction", other, r#""mean" or "sum""#),
        };
        objective
            .with_target(target)
            .with_ignore_index(ignore_index)
            .with_temperature_squared(temperature_squared)
            .with_hard_ratio(hard_ratio)
            .and_then(|objective| objective.with_temperature(temperature))
            .and_then(|objective| objective.with_reduction(reduction))
            .and_then(|objective| objective.with_ce_weight(ce_weight))
            .and_then(|objective| objective.with_kd_weight(kd_weight))
            .map(Self)
            .map_err(value_error)
    }
}

/// Address, dtype, row stride.
type Matrix = (usize, String, usize);

fn matrix((address, dtype, row_stride): Matrix) -> PyResult<raw::Matrix> {
    let dtype = match dtype.as_str() {
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::Bf16,
        other => {
            let message = format!("logits are {other}, but must be float32, float16 or bfloat16");
            return Err(PyTypeError::new_err(message));
        }
    };
    Ok(raw::Matrix { data: address as *mut c_void, dtype, row_stride })
}

/// The loss on host memory, by `threads` threads.
///
/// `shape` is (tokens, vocab). `stats` is the address of float32 `[3, tokens]`: uncertainty, TKD, DKD. An
/// address of 0 is none.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "they are what a call is")]
fn host(
    py: Python,
    threads: usize,
    objective: &Objective,
    shape: (usize, usize),
    student: Matrix,
    teacher: Matrix,
    labels: Option<(usize, String)>,
    sequence_length: Option<usize>,
    scale: usize,
    gradient: Option<Matrix>,
    loss: usize,
    stats: usize,
    hard: usize,
) -> PyResult<()> {
    let (tokens, vocab) = shape;
    let labels = match labels.as_ref().map(|(address, dtype)| (*address, dtype.as_str())) {
        None => None,
        Some((address, "int64")) => Some(raw::Labels::I64(address as *const i64)),
        Some((address, "int32")) => Some(raw::Labels::I32(address as *const i32)),
        Some((_, other)) => {
            let message = format!("labels are {other}, but must be int64 or int32");
            return Err(PyTypeError::new_err(message));
        }
    };
    let offsets: Option<Vec<usize>> =
        sequence_length.map(|length| (0..=tokens).step_by(length.max(1)).collect());
    let column = |index: usize| match stats {
        0 => std::ptr::null_mut(),
        start => (start + index * tokens * size_of::<f32>()) as *mut f32,
    };
    let call = raw::Call {
        tokens,
        vocab,
        teacher: matrix(teacher)?,
        student: matrix(student)?,
        labels,
        sequences: offsets.as_deref(),
        upstream: scale as *const f32,
        gradient: gradient.map(matrix).transpose()?,
        output: raw::Output {
            loss: loss as *mut f32,
            uncertainty: column(0),
            tkd: column(1),
            dkd: column(2),
            hard: hard as *mut u8,
        },
    };
    py.detach(|| {
        threads::pool(threads)?.install(|| {
            // SAFETY: the package's own Python code, the only caller, passes the addresses of tensors of
            // these shapes that it holds, and nobody else writes to them meanwhile.
            unsafe { raw::run(&objective.0, &call) }.map_err(value_error)
        })
    })
}

#[pymodule]
mod _atkd {
    #[pymodule_export]
    use super::{Objective, host};
}
