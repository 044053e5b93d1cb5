//! The native half of the Python package: settings, and the loss on the addresses that torch gives.

mod device;
mod threads;

use atkd::raw::{self, RawCall, RawLabels, RawLogits, RawOutput};
use atkd::{Dtype, Reduction, Target};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

fn exception(error: atkd::Error) -> PyErr {
    match error {
        atkd::Error::Driver { .. } => PyRuntimeError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
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
            "atkd" => atkd::Objective::atkd(lam).map_err(exception)?,
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
            .map_err(exception)
    }
}

/// Address, dtype, row stride.
type Matrix = (u64, String, usize);

fn logits((address, dtype, row_stride): Matrix) -> PyResult<RawLogits> {
    let dtype = match dtype.as_str() {
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::Bf16,
        other => {
            let message = format!("logits are {other}, but must be float32, float16 or bfloat16");
            return Err(PyTypeError::new_err(message));
        }
    };
    Ok(RawLogits { address, dtype, row_stride })
}

/// Where the tensors are.
#[derive(FromPyObject)]
enum Place {
    /// In host memory, for so many threads.
    Host(usize),
    /// On a device: its ordinal, the stream, and memory to work in.
    Device(usize, usize, u64),
}

/// The loss of a batch of shape (tokens, vocab).
///
/// `sequences` is the address of int64 offsets, and how many sequences they make. `outputs` are the
/// addresses of the loss, float32; the terms, float32 `[3, tokens]`; the modes, uint8 `[tokens]`; the
/// faults, int64 `[2]`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "they are what a call is")]
fn run(
    py: Python,
    place: Place,
    objective: &Objective,
    shape: (usize, usize),
    student: Matrix,
    teacher: Matrix,
    labels: Option<(u64, String)>,
    sequences: Option<(u64, usize)>,
    scale: Option<u64>,
    gradient: Option<Matrix>,
    outputs: (u64, u64, u64, u64),
) -> PyResult<()> {
    let (tokens, vocab) = shape;
    let labels = match labels.as_ref().map(|(address, dtype)| (*address, dtype.as_str())) {
        None => None,
        Some((address, "int64")) => Some(RawLabels::I64(address)),
        Some((address, "int32")) => Some(RawLabels::I32(address)),
        Some((_, other)) => {
            let message = format!("labels are {other}, but must be int64 or int32");
            return Err(PyTypeError::new_err(message));
        }
    };
    let call = RawCall {
        tokens,
        vocab,
        teacher: logits(teacher)?,
        student: logits(student)?,
        gradient: gradient.map(logits).transpose()?,
        labels,
        sequences,
        margins: None,
        upstream: scale,
    };
    let (loss, terms, modes, faults) = outputs;
    let column = |index: usize| Some(terms + (index * tokens * size_of::<f32>()) as u64);
    let output = RawOutput {
        loss: Some(loss),
        uncertainty: column(0),
        tkd: column(1),
        dkd: column(2),
        modes: Some(modes),
        faults: Some(faults),
    };
    let objective = &objective.0;
    // SAFETY: the package's own Python code, the only caller, passes the addresses of tensors of these
    // shapes that it holds, and nobody else writes to them until they are used. On a device all of them are
    // from torch's allocator, which hands memory out again only in the order of the stream.
    py.detach(|| unsafe {
        match place {
            Place::Host(threads) => threads::pool(threads)?
                .install(|| raw::run(objective, &call, &output))
                .map_err(exception),
            Place::Device(ordinal, stream, workspace) => {
                device::run(ordinal, stream, workspace, objective, &call, &output)
                    .map_err(exception)
            }
        }
    })
}

#[pymodule]
mod _atkd {
    #[pymodule_export]
    use super::device::workspace_bytes;
    #[pymodule_export]
    use super::{Objective, run};
}
