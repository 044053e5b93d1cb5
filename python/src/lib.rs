//! The native half of the Python package: settings, and the loss on the addresses that torch gives.

mod device;
mod pages;
mod threads;

use atkd::call::{self, RawCall, RawLabels, RawLogits, RawOutput, RawSelection, RawTeacher};
use atkd::cpu::raw;
use atkd::{Dtype, Reduction, Strides, Target};
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

/// Address, dtype, row stride; the rows of one outer index, and its stride, or 0 rows where all are evenly spaced.
type Matrix = (u64, String, usize, usize, usize);

fn logits((address, dtype, row_stride, inner, outer_stride): Matrix) -> PyResult<RawLogits> {
    let dtype = match dtype.as_str() {
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::Bf16,
        other => {
            let message = format!("logits are {other}, but must be float32, float16 or bfloat16");
            return Err(PyTypeError::new_err(message));
        }
    };
    let strides = match inner {
        0 => row_stride.into(),
        _ => Strides::nested(inner, outer_stride, row_stride),
    };
    Ok(RawLogits { address, dtype, strides })
}

fn labels(labels: Option<(u64, String)>) -> PyResult<Option<RawLabels>> {
    match labels.as_ref().map(|(address, dtype)| (*address, dtype.as_str())) {
        None => Ok(None),
        Some((address, "int64")) => Ok(Some(RawLabels::I64(address))),
        Some((address, "int32")) => Ok(Some(RawLabels::I32(address))),
        Some((_, other)) => {
            let message = format!("labels are {other}, but must be int64 or int32");
            Err(PyTypeError::new_err(message))
        }
    }
}

fn of_teacher(
    (tokens, vocab): (usize, usize),
    teacher: Matrix,
    labels: Option<(u64, String)>,
) -> PyResult<RawTeacher> {
    Ok(RawTeacher { tokens, vocab, teacher: logits(teacher)?, labels: self::labels(labels)? })
}

/// The call, and the addresses of its results: the loss, float32; and as `stats` the terms, float32
/// `[4, tokens]`, and a byte a token, `modes` of [`RawOutput`]. `hard` is the address of a byte per token,
/// `sequences` that of int64 offsets, and how many sequences they make.
#[expect(clippy::too_many_arguments, reason = "they are what a call is")]
fn call(
    (tokens, vocab): (usize, usize),
    student: Matrix,
    teacher: Matrix,
    labels: Option<(u64, String)>,
    hard: Option<u64>,
    sequences: Option<(u64, usize)>,
    scale: Option<u64>,
    gradient: Option<Matrix>,
    loss: u64,
    stats: Option<(u64, u64)>,
) -> PyResult<(RawCall, RawOutput)> {
    let call = RawCall {
        tokens,
        vocab,
        teacher: logits(teacher)?,
        student: logits(student)?,
        gradient: gradient.map(logits).transpose()?,
        labels: self::labels(labels)?,
        sequences,
        margins: None,
        hard,
        upstream: scale,
    };
    let column =
        |index: usize| stats.map(|(terms, _)| terms + (index * tokens * size_of::<f32>()) as u64);
    let output = RawOutput {
        loss: Some(loss),
        uncertainty: column(0),
        tkd: column(1),
        dkd: column(2),
        margin: column(3),
        modes: stats.map(|(_, modes)| modes),
    };
    Ok((call, output))
}

/// The loss on host memory, by so many threads. The bytes that it leaves are bools: which tokens are hard.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "they are what a call is")]
fn run_on_host(
    py: Python,
    threads: usize,
    objective: &Objective,
    shape: (usize, usize),
    student: Matrix,
    teacher: Matrix,
    labels: Option<(u64, String)>,
    hard: Option<u64>,
    sequences: Option<(u64, usize)>,
    scale: Option<u64>,
    gradient: Option<Matrix>,
    loss: u64,
    stats: Option<(u64, u64)>,
) -> PyResult<()> {
    let (call, output) =
        call(shape, student, teacher, labels, hard, sequences, scale, gradient, loss, stats)?;
    if let Some(gradient) = call.gradient.filter(|&gradient| gradient != call.student) {
        pages::advise_huge(gradient.address, call.tokens * call.vocab * gradient.dtype.size());
    }
    let pool = threads::pool(py, threads)?;
    py.detach(|| {
        // SAFETY: the package's own Python code, the only caller, passes the addresses of tensors of these
        // shapes that it holds, and nobody else writes to them meanwhile.
        unsafe { raw::run(Some(&pool), &objective.0, &call, &output) }.map_err(exception)?;
        if let Some(modes) = output.modes.filter(|_| call.tokens > 0) {
            // SAFETY: as above; every byte was just written.
            let modes = unsafe { std::slice::from_raw_parts_mut(modes as *mut u8, call.tokens) };
            modes.iter_mut().for_each(|mode| *mode = u8::from(*mode == call::HARD));
        }
        Ok(())
    })
}

/// The loss on a device: enqueued, not waited for. `workspace` is the address of
/// `workspace_bytes` to work in.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "they are what a call is")]
fn run_on_device(
    py: Python,
    queue: device::Queue,
    workspace: u64,
    objective: &Objective,
    shape: (usize, usize),
    student: Matrix,
    teacher: Matrix,
    labels: Option<(u64, String)>,
    hard: Option<u64>,
    sequences: Option<(u64, usize)>,
    scale: Option<u64>,
    gradient: Option<Matrix>,
    loss: u64,
    stats: Option<(u64, u64)>,
) -> PyResult<()> {
    let (call, output) =
        call(shape, student, teacher, labels, hard, sequences, scale, gradient, loss, stats)?;
    // SAFETY: as for the host; and the memory is of torch's allocator, which hands it out again only in the
    // order of the stream.
    py.detach(|| unsafe { device::run(queue, workspace, &objective.0, &call, &output) })
        .map_err(exception)
}

/// The teacher's margins on host memory, to the address `to`, by so many threads.
#[pyfunction]
fn teacher_margins_on_host(
    py: Python,
    threads: usize,
    objective: &Objective,
    shape: (usize, usize),
    teacher: Matrix,
    labels: Option<(u64, String)>,
    to: u64,
) -> PyResult<()> {
    let teacher = of_teacher(shape, teacher, labels)?;
    let pool = threads::pool(py, threads)?;
    // SAFETY: as for the loss.
    py.detach(|| unsafe { raw::teacher_margins(Some(&pool), &objective.0, &teacher, to) })
        .map_err(exception)
}

/// The same on a device: enqueued, not waited for. `workspace` is as for the loss.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "they are what a call is")]
fn teacher_margins_on_device(
    py: Python,
    queue: device::Queue,
    workspace: u64,
    objective: &Objective,
    shape: (usize, usize),
    teacher: Matrix,
    labels: Option<(u64, String)>,
    to: u64,
) -> PyResult<()> {
    let teacher = of_teacher(shape, teacher, labels)?;
    // SAFETY: as for the loss.
    py.detach(|| unsafe { device::teacher_margins(queue, workspace, &objective.0, &teacher, to) })
        .map_err(exception)
}

/// A selection on host memory; all arguments but the ratio are as in [`RawSelection`].
#[pyfunction]
fn select_hard_on_host(
    py: Python,
    tokens: usize,
    margins: u64,
    valid: Option<u64>,
    sequences: Option<(u64, usize)>,
    hard_ratio: f64,
    hard: u64,
) -> PyResult<()> {
    let selection = RawSelection { tokens, margins, valid, sequences, hard };
    // SAFETY: as for the loss.
    py.detach(|| unsafe { raw::select_hard(&selection, hard_ratio) }).map_err(exception)
}

/// The same on a device: enqueued, not waited for. `workspace` is as for the loss.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "they are what a selection is")]
fn select_hard_on_device(
    py: Python,
    queue: device::Queue,
    workspace: u64,
    tokens: usize,
    margins: u64,
    valid: Option<u64>,
    sequences: Option<(u64, usize)>,
    hard_ratio: f64,
    hard: u64,
) -> PyResult<()> {
    let selection = RawSelection { tokens, margins, valid, sequences, hard };
    // SAFETY: as for the loss.
    py.detach(|| unsafe { device::select_hard(queue, workspace, &selection, hard_ratio) })
        .map_err(exception)
}

/// Multiplies a gradient on a device by the float32 scalar at `factor`: enqueued, and nothing to do for 1.
#[pyfunction]
fn scale_on_device(
    py: Python,
    queue: device::Queue,
    shape: (usize, usize),
    gradient: Matrix,
    factor: u64,
) -> PyResult<()> {
    let gradient = logits(gradient)?;
    // SAFETY: as for the loss.
    py.detach(|| unsafe { device::scale(queue, gradient, shape, factor) }).map_err(exception)
}

#[pymodule]
mod _atkd {
    #[pymodule_export]
    use super::device::workspace_bytes;
    #[pymodule_export]
    use super::{
        Objective, run_on_device, run_on_host, scale_on_device, select_hard_on_device,
        select_hard_on_host, teacher_margins_on_device, teacher_margins_on_host,
    };
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
