//! The native half of the Python package: settings, and the loss on the addresses that torch gives.

mod device;
mod pages;
mod report;
mod shards;
mod teacher_cache;
mod threads;

use atkd::call::{
    self, RawCall, RawEntropies, RawLabels, RawLogits, RawOutput, RawSelection, RawSparseCall,
    RawSparseTeacher, RawTeacher, RawTokens,
};
use atkd::cpu::raw;
use atkd::{Coefficient, Divergence, Dtype, Reduction, SelectionRule, Strides, Tail, Target};
use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

fn exception(error: atkd::Error) -> PyErr {
    match error {
        atkd::Error::Driver { .. } => PyRuntimeError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

fn unknown<T>(name: &str, value: &str, allowed: &str) -> PyResult<T> {
    Err(PyValueError::new_err(format!("{name} is {value:?}, but must be {allowed}")))
}

fn rule_of(selection_rule: &str) -> PyResult<SelectionRule> {
    match selection_rule {
        "top-k" => Ok(SelectionRule::TopK),
        "median" => Ok(SelectionRule::Median),
        other => unknown("selection_rule", other, r#""top-k" or "median""#),
    }
}

/// A checked objective.
#[pyclass(frozen, module = "atkd._atkd")]
struct Objective(atkd::Objective);

#[pymethods]
impl Objective {
    #[new]
    #[pyo3(signature = (
        *, lam, hard_ratio, temperature, objective, target, reduction, ignore_index, ce_weight, kd_weight,
        temperature_squared, divergence, beta, selection_rule
    ))]
    #[expect(clippy::too_many_arguments, reason = "they are Python's keywords")]
    fn new(
        lam: f64,
        hard_ratio: f64,
        temperature: f64,
        objective: &str,
        target: &str,
        reduction: &str,
        ignore_index: i64,
        ce_weight: f64,
        kd_weight: f64,
        temperature_squared: bool,
        divergence: &str,
        beta: f64,
        selection_rule: &str,
    ) -> PyResult<Self> {
        let objective = match objective {
            "atkd" => atkd::Objective::atkd(lam).map_err(exception)?,
            "plain" => atkd::Objective::plain(),
            "kl" if divergence != "forward-kl" => {
                const ALLOWED: &str =
                    r#""forward-kl" for the objective "kl": "plain" takes all divergences"#;
                return unknown("divergence", divergence, ALLOWED);
            }
            "kl" => atkd::Objective::kl(),
            "tkd" => atkd::Objective::tkd(),
            "dkd" => atkd::Objective::dkd(),
            other => {
                return unknown("objective", other, r#""atkd", "plain", "kl", "tkd" or "dkd""#);
            }
        };
        // Checked whatever the divergence.
        objective.with_divergence(Divergence::Jsd { beta }).map_err(exception)?;
        let divergence = match divergence {
            "forward-kl" => Divergence::ForwardKl,
            "reverse-kl" => Divergence::ReverseKl,
            "jsd" => Divergence::Jsd { beta },
            "tvd" => Divergence::TotalVariation,
            "skew-kl" => Divergence::SkewKl { alpha: beta },
            "skew-reverse-kl" => Divergence::SkewReverseKl { alpha: beta },
            other => {
                const ALLOWED: &str =
                    r#""forward-kl", "reverse-kl", "jsd", "tvd", "skew-kl" or "skew-reverse-kl""#;
                return unknown("divergence", other, ALLOWED);
            }
        };
        let target = match target {
            "label" => Target::Label,
            "teacher" => Target::Teacher,
            other => return unknown("target", other, r#""label" or "teacher""#),
        };
        let reduction = match reduction {
            "mean" => Reduction::Mean,
            "sum" => Reduction::Sum,
            "group-mean" => Reduction::GroupMean,
            other => {
                return unknown("reduction", other, r#""mean", "sum", "group-mean" or "none""#);
            }
        };
        let rule = rule_of(selection_rule)?;
        objective
            .with_selection_rule(rule)
            .with_target(target)
            .with_ignore_index(ignore_index)
            .with_temperature_squared(temperature_squared)
            .with_divergence(divergence)
            .and_then(|objective| objective.with_hard_ratio(hard_ratio))
            .and_then(|objective| objective.with_temperature(temperature))
            .and_then(|objective| objective.with_reduction(reduction))
            .and_then(|objective| objective.with_ce_weight(ce_weight))
            .and_then(|objective| objective.with_kd_weight(kd_weight))
            .map(Self)
            .map_err(exception)
    }

    /// Rust's own default, which the one of `default_settings` must equal.
    #[staticmethod]
    fn default() -> Self {
        Self(atkd::Objective::default())
    }

    /// The divergence needs a second sweep over the logits.
    #[getter]
    fn two_sweeps(&self) -> bool {
        self.0.has_two_sweeps()
    }

    /// Some token's loss depends on which tokens are hard.
    #[getter]
    fn depends_on_selection(&self) -> bool {
        self.0.depends_on_selection()
    }

    fn __repr__(&self) -> String {
        format!("{:#?}", self.0)
    }
}

/// Every divergence has a name, by which [`Objective::new`] finds it.
fn name_of(divergence: Divergence) -> &'static str {
    match divergence {
        Divergence::ForwardKl => "forward-kl",
        Divergence::ReverseKl => "reverse-kl",
        Divergence::Jsd { .. } => "jsd",
        Divergence::TotalVariation => "tvd",
        Divergence::SkewKl { .. } => "skew-kl",
        Divergence::SkewReverseKl { .. } => "skew-reverse-kl",
    }
}

/// The keywords of [`Objective`] with Rust's defaults, in the order that the package uses everywhere.
#[pyfunction]
fn default_settings(py: Python) -> PyResult<Bound<PyDict>> {
    let objective = atkd::Objective::default();
    let Coefficient::Constant(lam) = objective.easy().dkd else {
        unreachable!("the default is ATKD, whose easy tokens learn lambda DKD")
    };
    let target = match objective.target() {
        Target::Label => "label",
        Target::Teacher => "teacher",
    };
    let reduction = match objective.reduction() {
        Reduction::Mean => "mean",
        Reduction::Sum => "sum",
        Reduction::GroupMean | Reduction::Denominator(_) => {
            unreachable!("the default is a mean over all tokens")
        }
    };
    let rule = match objective.selection_rule() {
        SelectionRule::TopK => "top-k",
        SelectionRule::Median => "median",
    };
    let settings = PyDict::new(py);
    settings.set_item("lam", lam)?;
    settings.set_item("hard_ratio", objective.hard_ratio())?;
    settings.set_item("temperature", objective.temperature())?;
    settings.set_item("objective", "atkd")?;
    settings.set_item("target", target)?;
    settings.set_item("reduction", reduction)?;
    settings.set_item("ignore_index", objective.ignore_index())?;
    settings.set_item("ce_weight", objective.ce_weight())?;
    settings.set_item("kd_weight", objective.kd_weight())?;
    settings.set_item("temperature_squared", objective.temperature_squared())?;
    settings.set_item("divergence", name_of(objective.divergence()))?;
    // Of divergences other than the default one.
    settings.set_item("beta", 0.5)?;
    settings.set_item("selection_rule", rule)?;
    Ok(settings)
}

/// The dtype of logits.
#[pyclass(frozen, eq, from_py_object, module = "atkd._atkd", name = "Dtype")]
#[derive(Clone, Copy, PartialEq)]
enum LogitsDtype {
    F32,
    F16,
    #[pyo3(name = "BF16")]
    Bf16,
}

impl From<LogitsDtype> for Dtype {
    fn from(dtype: LogitsDtype) -> Self {
        match dtype {
            LogitsDtype::F32 => Dtype::F32,
            LogitsDtype::F16 => Dtype::F16,
            LogitsDtype::Bf16 => Dtype::Bf16,
        }
    }
}

/// The dtype of labels.
#[pyclass(frozen, eq, from_py_object, module = "atkd._atkd")]
#[derive(Clone, Copy, PartialEq)]
enum LabelDtype {
    I64,
    I32,
}

/// Logits `[tokens, vocab]` by address, as `Matrix` of `_native.py`. Strides are in elements. `inner` is the number of
/// rows that are `row_stride` apart; such groups are `outer_stride` apart. It is 0 where all rows are evenly spaced.
#[derive(FromPyObject)]
struct Matrix {
    address: u64,
    dtype: LogitsDtype,
    row_stride: usize,
    inner: usize,
    outer_stride: usize,
}

impl From<Matrix> for RawLogits {
    fn from(matrix: Matrix) -> Self {
        let strides = match matrix.inner {
            0 => matrix.row_stride.into(),
            inner => Strides::nested(inner, matrix.outer_stride, matrix.row_stride),
        };
        Self { address: matrix.address, dtype: matrix.dtype.into(), strides }
    }
}

/// Labels `[tokens]` by address, as `Labels` of `_native.py`.
#[derive(FromPyObject)]
struct Labels {
    address: u64,
    dtype: LabelDtype,
}

impl From<Labels> for RawLabels {
    fn from(labels: Labels) -> Self {
        match labels.dtype {
            LabelDtype::I64 => Self::I64(labels.address),
            LabelDtype::I32 => Self::I32(labels.address),
        }
    }
}

/// A sparse teacher by address, as `Sparse` of `_native.py`.
#[derive(FromPyObject)]
struct Sparse {
    top_k: usize,
    indices: Labels,
    log_probs: u64,
    dtype: LogitsDtype,
    target_log_prob: Option<u64>,
    target_dtype: LogitsDtype,
    tail: String,
}

impl Sparse {
    fn raw(self) -> PyResult<RawSparseTeacher> {
        let tail = match self.tail.as_str() {
            "zero" => Tail::Zero,
            "uniform" => Tail::Uniform,
            "bucket" => Tail::Bucket,
            "sampled" => Tail::Sampled,
            other => return unknown("tail", other, r#""zero", "uniform", "bucket" or "sampled""#),
        };
        Ok(RawSparseTeacher {
            top_k: self.top_k,
            indices: self.indices.into(),
            log_probs: self.log_probs,
            dtype: self.dtype.into(),
            target_log_probs: self.target_log_prob,
            target_rounding: self.target_dtype.into(),
            tail,
        })
    }
}

/// The teacher of a call.
#[derive(FromPyObject)]
enum Teacher {
    Dense(Matrix),
    Sparse(Sparse),
}

/// That no kernel does this with sparse teachers, which the package's Python code has told before.
fn no_sparse_kernel() -> PyErr {
    PyNotImplementedError::new_err("there is no kernel of this for sparse teachers")
}

/// A call by address, as `Call` of `_native.py`, which says what each is.
#[derive(FromPyObject)]
struct Call {
    tokens: usize,
    vocab: usize,
    student: Matrix,
    teacher: Teacher,
    labels: Option<Labels>,
    hard: Option<u64>,
    token_weights: Option<u64>,
    temperatures: Option<u64>,
    sequences: Option<(u64, usize)>,
    scale: Option<u64>,
    gradient: Option<Matrix>,
    gradient_padding: usize,
    loss: u64,
    terms: Option<u64>,
    groups: Option<u64>,
}

/// A call with either teacher.
enum AnyCall {
    Dense(RawCall),
    Sparse(RawSparseCall),
}

impl Call {
    fn raw(self) -> PyResult<(AnyCall, RawOutput)> {
        let output = output_at(self.tokens, self.loss, self.terms, self.groups);
        let (student, gradient) = (self.student.into(), self.gradient.map(Into::into));
        let tokens = RawTokens {
            tokens: self.tokens,
            vocab: self.vocab,
            labels: self.labels.map(Into::into),
            sequences: self.sequences,
            margins: None,
            hard: self.hard,
            token_weights: self.token_weights,
            temperatures: self.temperatures,
            upstream: self.scale,
        };
        let gradient_padding = self.gradient_padding;
        let call = match self.teacher {
            Teacher::Dense(teacher) => AnyCall::Dense(RawCall {
                tokens: tokens.tokens,
                vocab: tokens.vocab,
                teacher: teacher.into(),
                student,
                gradient,
                gradient_padding,
                labels: tokens.labels,
                sequences: tokens.sequences,
                margins: tokens.margins,
                hard: tokens.hard,
                token_weights: tokens.token_weights,
                temperatures: tokens.temperatures,
                upstream: tokens.upstream,
            }),
            Teacher::Sparse(teacher) => AnyCall::Sparse(RawSparseCall {
                tokens,
                teacher: teacher.raw()?,
                student,
                gradient,
                gradient_padding,
            }),
        };
        Ok((call, output))
    }
}

/// The results of a call by address: of `terms` uncertainty, TKD, DKD, margin and loss, float32 `[5, tokens]`.
fn output_at(tokens: usize, loss: u64, terms: Option<u64>, groups: Option<u64>) -> RawOutput {
    let column =
        |index: usize| terms.map(|terms| terms + (index * tokens * size_of::<f32>()) as u64);
    RawOutput {
        loss: Some(loss),
        uncertainty: column(0),
        tkd: column(1),
        dkd: column(2),
        margin: column(3),
        token_loss: column(4),
        groups,
    }
}

/// The hardware that a call runs on.
#[derive(FromPyObject)]
enum Place {
    /// The CPU, by this many threads.
    Host(usize),
    /// A stream of a CUDA device, where the call is enqueued and not waited for, and the address of
    /// `workspace_bytes` to work in.
    Device(device::Queue, u64),
}

/// The loss. On the host its `groups` are bools that say which tokens are hard, on a device the bytes of
/// [`RawOutput::groups`].
#[pyfunction]
fn run(py: Python, place: Place, objective: &Objective, call: Call) -> PyResult<()> {
    let (tokens, vocab) = (call.tokens, call.vocab);
    let (call, output) = call.raw()?;
    let threads = match place {
        Place::Host(threads) => threads,
        // SAFETY: the package's own Python code, the only caller, passes the addresses of tensors of these shapes
        // that it holds, and nobody else writes to them meanwhile. A device's memory is of torch's allocator, which
        // hands it out again only in the order of the stream.
        Place::Device(queue, workspace) => {
            return py
                .detach(|| unsafe { device::run(queue, workspace, &objective.0, &call, &output) })
                .map_err(exception);
        }
    };
    let (student, gradient) = match &call {
        AnyCall::Dense(call) => (call.student, call.gradient),
        AnyCall::Sparse(call) => (call.student, call.gradient),
    };
    if let Some(gradient) = gradient.filter(|&gradient| gradient != student) {
        pages::advise_huge(gradient.address, tokens * vocab * gradient.dtype.size());
    }
    let pool = threads::pool(py, threads)?;
    py.detach(|| {
        let pool = Some(&*pool);
        // SAFETY: as above.
        unsafe {
            match &call {
                AnyCall::Dense(call) => raw::run(pool, &objective.0, call, &output),
                AnyCall::Sparse(call) => raw::run_sparse(pool, &objective.0, call, &output),
            }
        }
        .map_err(exception)?;
        // SAFETY: as above; every byte was just written.
        unsafe { tell_hard(&output, tokens) };
        Ok(())
    })
}

/// Makes bools of the groups that a call on the host has written.
///
/// # Safety
/// The groups of so many tokens are there, if any.
unsafe fn tell_hard(output: &RawOutput, tokens: usize) {
    if let Some(groups) = output.groups.filter(|_| tokens > 0) {
        // SAFETY: the caller's.
        let groups = unsafe { std::slice::from_raw_parts_mut(groups as *mut u8, tokens) };
        groups.iter_mut().for_each(|group| *group = u8::from(*group == call::HARD));
    }
}

/// The teacher's margins, float32 `[tokens]`, to the address `to`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "they are what margins follow from")]
fn teacher_margins(
    py: Python,
    place: Place,
    objective: &Objective,
    tokens: usize,
    vocab: usize,
    teacher: Teacher,
    labels: Option<Labels>,
    temperatures: Option<u64>,
    to: u64,
) -> PyResult<()> {
    let (objective, labels) = (&objective.0, labels.map(Into::into));
    let teacher = match teacher {
        Teacher::Dense(teacher) => teacher.into(),
        Teacher::Sparse(teacher) => {
            let teacher = teacher.raw()?;
            let Place::Host(threads) = place else { return Err(no_sparse_kernel()) };
            let pool = threads::pool(py, threads)?;
            let tokens = RawTokens {
                tokens,
                vocab,
                labels,
                sequences: None,
                margins: None,
                hard: None,
                token_weights: None,
                temperatures: None,
                upstream: None,
            };
            // SAFETY: as for the loss.
            return py
                .detach(|| unsafe {
                    raw::sparse_margins(Some(&pool), objective, &tokens, &teacher, to)
                })
                .map_err(exception);
        }
    };
    let teacher = RawTeacher { tokens, vocab, teacher, labels, temperatures };
    match place {
        Place::Host(threads) => {
            let pool = threads::pool(py, threads)?;
            // SAFETY: as for the loss.
            py.detach(|| unsafe { raw::teacher_margins(Some(&pool), objective, &teacher, to) })
        }
        // SAFETY: as for the loss.
        Place::Device(queue, workspace) => py.detach(|| unsafe {
            device::teacher_margins(queue, workspace, objective, &teacher, to)
        }),
    }
    .map_err(exception)
}

/// The entropies of one model's distributions, float32 `[tokens]`, to the address `to`.
#[pyfunction]
fn token_entropies(
    py: Python,
    place: Place,
    shape: (usize, usize),
    logits: Matrix,
    temperature: f64,
    to: u64,
) -> PyResult<()> {
    let (tokens, vocab) = shape;
    let of = RawEntropies { tokens, vocab, logits: logits.into(), temperature, to };
    match place {
        Place::Host(threads) => {
            let pool = threads::pool(py, threads)?;
            // SAFETY: as for the loss.
            py.detach(|| unsafe { raw::token_entropies(Some(&pool), &of) })
        }
        // SAFETY: as for the loss.
        Place::Device(queue, _) => py.detach(|| unsafe { device::token_entropies(queue, &of) }),
    }
    .map_err(exception)
}

/// A selection; all arguments but the place and the ratio are as in [`RawSelection`].
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "they are what a selection is")]
fn select_hard(
    py: Python,
    place: Place,
    tokens: usize,
    margins: u64,
    valid: Option<u64>,
    sequences: Option<(u64, usize)>,
    hard_ratio: f64,
    hard: u64,
    selection_rule: &str,
) -> PyResult<()> {
    let rule = rule_of(selection_rule)?;
    let selection = RawSelection { tokens, margins, valid, sequences, rule, hard };
    match place {
        // SAFETY: as for the loss.
        Place::Host(_) => py.detach(|| unsafe { raw::select_hard(&selection, hard_ratio) }),
        // SAFETY: as for the loss.
        Place::Device(queue, workspace) => {
            py.detach(|| unsafe { device::select_hard(queue, workspace, &selection, hard_ratio) })
        }
    }
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
    // SAFETY: as for the loss.
    py.detach(|| unsafe { device::scale(queue, gradient.into(), shape, factor) }).map_err(exception)
}

#[pymodule]
mod _atkd {
    #[pymodule_export]
    use super::device::workspace_bytes;
    #[pymodule_export]
    use super::report::report;
    #[pymodule_export]
    use super::shards::{
        shard_gradient, shard_loss, shard_margins, shard_rests, shard_states, shard_teacher_logits,
        shard_terms,
    };
    #[pymodule_export]
    use super::teacher_cache::{NativeWriter, Reader};
    #[pymodule_export]
    use super::{
        LabelDtype, LogitsDtype, Objective, default_settings, run, scale_on_device, select_hard,
        teacher_margins, token_entropies,
    };
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<PyModule>) -> PyResult<()> {
        module.add("HARD", super::call::HARD)?;
        module.add("ROW_REST_BYTES", size_of::<atkd::shards::RowRest>())?;
        module.add("ROW_STATE_BYTES", size_of::<atkd::shards::RowState>())?;
        module.add("SWEEP_TERMS_BYTES", size_of::<atkd::shards::SweepTerms>())?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
