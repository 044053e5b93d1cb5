//! A call as the kernels that it launches, in order: the same on a GPU and in the simulator.

use std::ffi::c_void;

use crate::objective::unit_interval;
use crate::params::*;
use crate::plan::{self, DeviceProperties, LaunchShape, Plan, Problem, RowKernel};
use crate::raw::check_alignment;
pub use crate::raw::{RawCall, RawLabels, RawLogits, RawOutput, RawSelection, RawTeacher};
use crate::{Coefficient, Dtype, Error, Objective, Output, Reduction, Result, Target, TokenTerms};

impl RawCall {
    /// What a plan for this call needs to know.
    pub(crate) fn problem(&self, objective: &Objective) -> Problem {
        Problem {
            tokens: self.tokens,
            vocab: self.vocab,
            teacher: self.teacher.dtype,
            student: self.student.dtype,
            gradient: self.gradient.map_or(self.student.dtype, |gradient| gradient.dtype),
            sum_at_1: objective.ce_weight() != 0.0 && objective.temperature() != 1.0,
            aligned_alike: [Some(self.student), self.gradient].into_iter().flatten().all(|other| {
                let offsets = |logits: RawLogits| {
                    let (strides, size) = (logits.strides.of(self.tokens), logits.dtype.size());
                    let bytes = |elements: i64| elements.rem_euclid(16) * size as i64 % 16;
                    let (skip, inner) = strides.skip();
                    // Whole 16 bytes do not matter, wherever they are skipped.
                    let inner = if bytes(skip) == 0 { 0 } else { inner };
                    (logits.address % 16, bytes(strides.row() as i64), bytes(skip), inner)
                };
                offsets(other) == offsets(self.teacher)
            }),
            scopes: self.sequences.map_or(1, |(_, count)| count),
        }
    }

    /// Whether the kernels can take it.
    pub(crate) fn validate(&self, objective: &Objective) -> Result<()> {
        check_sizes(self.tokens, self.vocab)?;
        self.check(objective)
    }
}

fn check_sizes(tokens: usize, vocab: usize) -> Result<()> {
    for (what, value) in [("the number of tokens", tokens), ("the vocabulary size", vocab)] {
        if value > i32::MAX as usize {
            return Err(Error::TooLarge { what, value, most: i32::MAX as usize });
        }
    }
    Ok(())
}

macro_rules! kernels {
    ($($variant:ident($params:ty): $($name:ident)+;)+) => {
        /// A kernel's parameter block.
        #[derive(Clone, Copy, Debug)]
        #[cfg_attr(not(feature = "battery"), allow(dead_code, reason = "the battery alone launches the unfused kernels"))]
        pub enum Parameters {
            $($variant($params),)+
        }

        /// The names of all kernels.
        #[cfg(feature = "cuda")]
        pub const KERNELS: &[&str] = &[$($(stringify!($name)),+),+];

        /// The names of all kernels and the bytes of their parameter blocks.
        #[cfg(feature = "simt")]
        pub const PARAMETER_BYTES: &[(&str, usize)] =
            &[$($((stringify!($name), size_of::<$params>())),+),+];

        impl Parameters {
            /// Where the block lies, as a launch wants it.
            pub fn as_ptr(&self) -> *const c_void {
                match self {
                    $(Self::$variant(parameters) => std::ptr::from_ref(parameters).cast(),)+
                }
            }
        }

        /// Runs a kernel on the CPU by its name.
        ///
        /// # Safety
        /// `parameters` is the kernel's parameter block.
        #[cfg(feature = "simt")]
        pub(crate) unsafe fn simulate(
            kernel: &str,
            shape: LaunchShape,
            seed: u64,
            parameters: *const c_void,
            buffers: &mut [crate::simt::machine::Buffer],
        ) -> Result<(), String> {
            unsafe extern "C" {
                $($(fn $name(parameters: &$params);)+)+
            }
            match kernel {
                $($(
                    // SAFETY: the caller vouches for the block.
                    stringify!($name) => unsafe {
                        let parameters = &*parameters.cast::<$params>();
                        crate::simt::machine::run(stringify!($name), shape, seed, $name, parameters, buffers)
                    },
                )+)+
                _ => Err(format!("there is no kernel {kernel}")),
            }
        }
    };
}

kernels! {
    TeacherMargin(atkd_teacher_margin): teacher_margin_f32 teacher_margin_f16 teacher_margin_bf16;
    CountValid(atkd_count_valid): count_valid;
    SelectHard(atkd_select_hard): select_hard;
    Rows(atkd_rows):
        row_resident_f32 row_resident_f16 row_resident_bf16
        row_pipelined_f32 row_pipelined_f16 row_pipelined_bf16
        row_pipelined_wide_f32 row_pipelined_wide_f16 row_pipelined_wide_bf16
        row_stream_f32_f32_f32 row_stream_f32_f16_f16 row_stream_f32_f16_f32
        row_stream_f32_bf16_bf16 row_stream_f32_bf16_f32
        row_stream_f16_f32_f32 row_stream_f16_f16_f16 row_stream_f16_f16_f32
        row_stream_f16_bf16_bf16 row_stream_f16_bf16_f32
        row_stream_bf16_f32_f32 row_stream_bf16_f16_f16 row_stream_bf16_f16_f32
        row_stream_bf16_bf16_bf16 row_stream_bf16_bf16_f32;
    TokenTerms(atkd_token_terms): token_terms;
    ScaleGradient(atkd_scale_gradient): scale_gradient_f32 scale_gradient_f16 scale_gradient_bf16;
    Unfused(atkd_unfused):
        unfused_copy_f32 unfused_widen_f16 unfused_widen_bf16 unfused_narrow_f16 unfused_narrow_bf16
        unfused_fill unfused_exp_minus_row unfused_over_row unfused_times_row unfused_times unfused_minus
        unfused_over unfused_log unfused_over_row_slope unfused_times_minus_row unfused_max unfused_sum;
    UnfusedTokens(atkd_unfused_tokens):
        unfused_targets unfused_losses unfused_target_gradient;
}

/// One kernel of a call.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Its name.
    pub kernel: &'static str,
    /// Blocks and threads.
    pub shape: LaunchShape,
    /// Its argument.
    pub parameters: Parameters,
}

/// The name of the kernel for logits of one type.
macro_rules! of_dtype {
    ($kernel:literal, $dtype:expr) => {
        match $dtype {
            Dtype::F32 => concat!($kernel, "_f32"),
            Dtype::F16 => concat!($kernel, "_f16"),
            Dtype::Bf16 => concat!($kernel, "_bf16"),
        }
    };
}

fn row_stream(teacher: Dtype, student: Dtype, gradient: Dtype) -> &'static str {
    macro_rules! of_teacher {
        ($teacher:literal) => {
            match (student, gradient) {
                (Dtype::F32, _) => concat!("row_stream_", $teacher, "_f32_f32"),
                (Dtype::F16, Dtype::F32) => concat!("row_stream_", $teacher, "_f16_f32"),
                (Dtype::F16, _) => concat!("row_stream_", $teacher, "_f16_f16"),
                (Dtype::Bf16, Dtype::F32) => concat!("row_stream_", $teacher, "_bf16_f32"),
                (Dtype::Bf16, _) => concat!("row_stream_", $teacher, "_bf16_bf16"),
            }
        };
    }
    match teacher {
        Dtype::F32 => of_teacher!("f32"),
        Dtype::F16 => of_teacher!("f16"),
        Dtype::Bf16 => of_teacher!("bf16"),
    }
}

/// The columns of a workspace, in the order in which they lie: names and bytes of an element, widest
/// first. One element a token each.
const COLUMNS: [(&str, usize); 8] = [
    ("token losses", 8),
    ("uncertainties", 4),
    ("tkd", 4),
    ("dkd", 4),
    ("keys", 4),
    ("thresholds", 4),
    ("targets", 4),
    ("modes", 1),
];
const LOSS: usize = 0;
const UNCERTAINTY: usize = 1;
const TKD: usize = 2;
const DKD: usize = 3;
const KEYS: usize = 4;
const THRESHOLDS: usize = 5;
const TARGETS: usize = 6;
const MODES: usize = 7;

/// What the blocks of a team tell each other, of every block two states; later the sums of `token_terms`.
pub(crate) const STATES_BYTES: usize = {
    let teams = 2 * (ATKD_TEAM_BLOCKS * ATKD_TEAM_STATE) as usize;
    let pipelined = 2 * (ATKD_PIPELINED_BLOCKS * ATKD_TOLD_STATE) as usize;
    if teams > pipelined { teams } else { pipelined }
};
const _: () = assert!(ATKD_TERMS_BLOCKS as usize * size_of::<f64>() <= STATES_BYTES);

/// The layout of the memory that the kernels of a call share: a summary, the columns, the teams' states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// For how many tokens, and sequences, there is room.
    pub capacity: usize,
}

impl Layout {
    /// Bytes in all: 33 a token and 67 KB.
    pub fn bytes(self) -> usize {
        self.states() + STATES_BYTES
    }

    /// Bytes before the teams' states.
    fn states(self) -> usize {
        self.column(COLUMNS.len())
    }

    /// Bytes before a column.
    fn column(self, column: usize) -> usize {
        let padded = self.capacity.next_multiple_of(16);
        let bytes: usize = COLUMNS[..column].iter().map(|(_, bytes)| bytes * padded).sum();
        size_of::<atkd_summary>().next_multiple_of(16) + bytes
    }

    /// The parts of a workspace at `address`, by name.
    #[cfg(feature = "simt")]
    pub fn columns(
        self,
        address: usize,
    ) -> impl Iterator<Item = (&'static str, std::ops::Range<usize>)> {
        let summary = ("summary", address..address + size_of::<atkd_summary>());
        let columns = COLUMNS.iter().enumerate().map(move |(i, (name, bytes))| {
            let start = address + self.column(i);
            (*name, start..start + bytes * self.capacity)
        });
        let states = address + self.states();
        let states = ("teams' states", states..states + STATES_BYTES);
        [summary, states].into_iter().chain(columns)
    }

    /// Where columns lie for callers that read them on the device.
    #[cfg(feature = "cuda")]
    pub fn offsets(self) -> ColumnOffsets {
        ColumnOffsets {
            loss: std::mem::offset_of!(atkd_summary, loss_f32),
            token_loss: self.column(LOSS),
            uncertainty: self.column(UNCERTAINTY),
            tkd: self.column(TKD),
            dkd: self.column(DKD),
            modes: self.column(MODES),
        }
    }

    /// What the kernels left in the workspace's memory.
    ///
    /// # Errors
    /// If a kernel met a label or an offset out of range.
    pub fn read(
        self,
        memory: &[u8],
        tokens: usize,
        vocab: usize,
        objective: &Objective,
    ) -> Result<Output> {
        let summary = read_summary(memory);
        check_faults(&summary, vocab, objective)?;
        fn column<const N: usize>(memory: &[u8], offset: usize, token: usize) -> [u8; N] {
            *memory[offset + N * token..].first_chunk().expect("the memory holds every column")
        }
        let float =
            |at, token| f64::from(f32::from_ne_bytes(column(memory, self.column(at), token)));
        let tokens = (0..tokens)
            .map(|token| {
                let mode = u32::from(memory[self.column(MODES) + token]);
                TokenTerms {
                    margin: margin_of_key(u32::from_ne_bytes(column(
                        memory,
                        self.column(KEYS),
                        token,
                    ))),
                    uncertainty: float(UNCERTAINTY, token),
                    tkd: float(TKD, token),
                    dkd: float(DKD, token),
                    loss: f64::from_ne_bytes(column(memory, self.column(LOSS), token)),
                    valid: mode != ATKD_IGNORED,
                    hard: mode == ATKD_HARD,
                }
            })
            .collect();
        Ok(Output { loss: summary.loss, tokens })
    }
}

/// Bytes before what a caller may read on the device.
#[cfg(feature = "cuda")]
pub(crate) struct ColumnOffsets {
    pub loss: usize,
    pub token_loss: usize,
    pub uncertainty: usize,
    pub tkd: usize,
    pub dkd: usize,
    pub modes: usize,
}

/// The summary at the start of a workspace's memory.
pub(crate) fn read_summary(memory: &[u8]) -> atkd_summary {
    assert!(memory.len() >= size_of::<atkd_summary>());
    // SAFETY: there are that many bytes, and any bytes make a summary of numbers.
    unsafe { memory.as_ptr().cast::<atkd_summary>().read_unaligned() }
}

pub(crate) fn check_faults(
    summary: &atkd_summary,
    vocab: usize,
    objective: &Objective,
) -> Result<()> {
    if summary.label_fault != 0 {
        let ignore_index = objective.ignore_index();
        return Err(Error::DeviceLabel { token: !summary.label_fault, vocab, ignore_index });
    }
    if summary.offset_fault != 0 {
        return Err(Error::DeviceSequences { sequence: !summary.offset_fault });
    }
    Ok(())
}

/// The inverse of `key_of` in kernels/row_math.cuh.
fn margin_of_key(key: u32) -> f64 {
    match key {
        0 => f64::NEG_INFINITY,
        1 => f64::NAN,
        _ if key & 0x8000_0000 != 0 => f32::from_bits(key & 0x7fff_ffff).into(),
        _ => f32::from_bits(!key).into(),
    }
}

/// The memory that a call works in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// How it is laid out.
    pub layout: Layout,
    /// Where it starts, at a multiple of 16. Its summary is all 0 before the first call.
    pub workspace: u64,
    /// A word for the last call's threshold, by which the next one guesses. Any value is right.
    pub guess: u64,
}

impl Place {
    /// With the guess where it is used.
    pub fn new(layout: Layout, workspace: u64) -> Self {
        let guess = workspace + std::mem::offset_of!(atkd_summary, guess) as u64;
        Self { layout, workspace, guess }
    }

    fn column(&self, column: usize) -> u64 {
        self.workspace + self.layout.column(column) as u64
    }

    /// What the blocks of a team tell each other.
    fn states(&self) -> *mut c_void {
        (self.workspace + self.layout.states() as u64) as *mut c_void
    }

    /// Whether there is room for so many.
    fn check(&self, tokens: usize, sequences: usize) -> Result<()> {
        let capacity = self.layout.capacity;
        for (what, needed) in [("tokens", tokens), ("sequences", sequences)] {
            if needed > capacity {
                return Err(Error::Workspace { what, needed, capacity });
            }
        }
        Ok(())
    }

    /// What the kernels share, without teacher and labels.
    fn batch(&self, tokens: usize) -> atkd_batch {
        atkd_batch {
            teacher: std::ptr::null(),
            labels: std::ptr::null(),
            targets: self.column(TARGETS) as *mut i32,
            keys: self.column(KEYS) as *mut u32,
            modes: self.column(MODES) as *mut u8,
            summary: self.workspace as *mut atkd_summary,
            teacher_strides: atkd_strides { stride: 0, skip: 0, inverse: 0, shift: 0 },
            ignore_index: 0,
            tokens: tokens as u32,
            vocab: 1,
            label_bytes: 0,
            target: ATKD_TARGET_LABEL,
            inverse_temperature: 1.0,
            reserved: 0,
        }
    }

    /// The same with them.
    fn batch_of(&self, objective: &Objective, call: &RawCall) -> atkd_batch {
        let (labels, label_bytes) = match call.labels {
            None => (0, 0),
            Some(RawLabels::I64(address)) => (address, 8),
            Some(RawLabels::I32(address)) => (address, 4),
        };
        atkd_batch {
            teacher: call.teacher.address as *const c_void,
            labels: labels as *const c_void,
            teacher_strides: strides(call.teacher, call.tokens),
            ignore_index: objective.ignore_index(),
            vocab: call.vocab as u32,
            label_bytes,
            target: match objective.target() {
                Target::Label => ATKD_TARGET_LABEL,
                Target::Teacher => ATKD_TARGET_TEACHER,
            },
            inverse_temperature: (1.0 / objective.temperature()) as f32,
            ..self.batch(call.tokens)
        }
    }

    /// The pass over the teacher's logits, which leaves margins at `to` if that is not 0.
    fn margins(&self, call: &RawCall, batch: atkd_batch, plan: &Plan, to: u64) -> Launch {
        Launch {
            kernel: of_dtype!("teacher_margin", call.teacher.dtype),
            shape: plan.margin,
            parameters: Parameters::TeacherMargin(atkd_teacher_margin {
                batch,
                margins: to as *mut f32,
                blocks: plan.margin.grid,
                reserved: 0,
            }),
        }
    }
}

/// The kernel that leaves the teacher's margins at `to`, if there is anything to do.
///
/// # Errors
/// If the shape, the stride and the addresses do not go together, or exceed the workspace.
pub(crate) fn margins(
    objective: &Objective,
    teacher: &RawTeacher,
    to: u64,
    device: &DeviceProperties,
    place: Place,
) -> Result<Option<Launch>> {
    check_sizes(teacher.tokens, teacher.vocab)?;
    teacher.check(objective, to)?;
    place.check(teacher.tokens, 1)?;
    let call = teacher.call();
    let plan = Plan::new(device, &call.problem(objective), None);
    let launch = place.margins(&call, place.batch_of(objective, &call), &plan, to);
    Ok((launch.shape.grid > 0).then_some(launch))
}

/// The kernel of a selection apart from any call, if there is anything to do. Leaves the workspace's counters alone.
///
/// # Errors
/// If the ratio is not in [0, 1], or the addresses do not go together, or they exceed the workspace.
pub(crate) fn selection(
    selection: &RawSelection,
    hard_ratio: f64,
    device: &DeviceProperties,
    place: Place,
) -> Result<Option<Launch>> {
    let RawSelection { tokens, margins, valid, sequences, hard } = *selection;
    unit_interval("the hard ratio", hard_ratio)?;
    check_sizes(tokens, 1)?;
    selection.check()?;
    let scopes = sequences.map_or(1, |(_, count)| count);
    place.check(tokens, scopes)?;
    let problem = Problem {
        tokens,
        vocab: 1,
        teacher: Dtype::F32,
        student: Dtype::F32,
        gradient: Dtype::F32,
        sum_at_1: false,
        aligned_alike: true,
        scopes,
    };
    let shape = Plan::new(device, &problem, None).select;
    let launch = Launch {
        kernel: "select_hard",
        shape,
        parameters: Parameters::SelectHard(atkd_select_hard {
            batch: place.batch(tokens),
            margins: margins as *const f32,
            valid: valid.unwrap_or(0) as *const u8,
            offsets: sequences.map_or(0, |(address, _)| address) as *const i64,
            thresholds: place.column(THRESHOLDS) as *mut u32,
            wrong: std::ptr::null_mut(),
            states: place.states(),
            guess: std::ptr::null_mut(),
            hard_to: hard as *mut u8,
            hard_ratio,
            scopes: scopes as u32,
            count: 0,
        }),
    };
    Ok((tokens > 0 && shape.grid > 0).then_some(launch))
}

/// Where rows lie, for the kernels.
fn strides(logits: RawLogits, tokens: usize) -> atkd_strides {
    let strides = logits.strides.of(tokens);
    let (skip, inner) = strides.skip();
    // row / inner, rounded down, is row * inverse / 2^(32 + shift) for every row below 2^31: the inverse is too large
    // by at most 1, and 2^31 by no more than `inner` is no more than 2^(32 + shift).
    let shift = (inner as u32).next_power_of_two().ilog2().saturating_sub(1);
    let inverse = (1_u64 << (32 + shift)) / inner as u64 + 1;
    atkd_strides {
        stride: strides.row() as i64,
        skip,
        inverse: if skip == 0 { 0 } else { inverse as u32 },
        shift,
    }
}

/// The kernels of a call, in order. Its results are in the workspace, and where `output` wants them.
///
/// # Errors
/// If the call's shapes, strides and addresses do not go together, or exceed the workspace.
pub(crate) fn launches(
    objective: &Objective,
    call: &RawCall,
    output: &RawOutput,
    plan: &Plan,
    place: Place,
) -> Result<impl Iterator<Item = Launch> + use<>> {
    call.validate(objective)?;
    output.check()?;
    let problem = call.problem(objective);
    let scopes = problem.scopes;
    place.check(call.tokens, scopes)?;
    let column = |column| place.column(column);
    let batch = place.batch_of(objective, call);
    // With a mask nothing is selected.
    let selects = call.hard.is_none();
    let margins = call.margins.filter(|_| selects);
    // Without a gradient no row's outcome depends on which tokens are hard: the loss is weighted after the selection.
    let depends = selects && objective.depends_on_selection() && call.gradient.is_some();
    let needs_margins = objective.target() == Target::Teacher || (depends && margins.is_none());
    // Instead of a pass over the teacher's logits before the rows, a guess, and some rows once more. A row
    // whose gradient has replaced the student's logits cannot be done again.
    let guess = depends
        && margins.is_none()
        && objective.target() == Target::Label
        && scopes == 1
        && call.gradient.is_some()
        && !call.is_in_place();
    // What is selected by the caller's margins needs no row, which then leaves its own margin's key.
    let before_rows = (depends && !guess) || margins.is_some();
    // The column that only a target of the teacher's needs.
    let wrong = if guess { column(TARGETS) as *mut u32 } else { std::ptr::null_mut() };

    let states = place.states();
    let margin = place.margins(call, batch, plan, 0);
    let count = Launch {
        kernel: "count_valid",
        shape: plan.count,
        parameters: Parameters::CountValid(atkd_count_valid {
            batch,
            hard: call.hard.unwrap_or(0) as *const u8,
            states,
            guess: place.guess as *const u32,
            valid_mode: if objective.hard_ratio() == 1.0 { ATKD_HARD } else { ATKD_EASY },
            reserved: 0,
        }),
    };
    let select = Launch {
        kernel: "select_hard",
        shape: plan.select,
        parameters: Parameters::SelectHard(atkd_select_hard {
            batch,
            margins: margins.unwrap_or(0) as *const f32,
            valid: std::ptr::null(),
            offsets: call.sequences.map_or(0, |(address, _)| address) as *const i64,
            thresholds: column(THRESHOLDS) as *mut u32,
            wrong,
            states,
            guess: place.guess as *mut u32,
            hard_to: std::ptr::null_mut(),
            hard_ratio: objective.hard_ratio(),
            scopes: scopes as u32,
            count: before_rows.into(),
        }),
    };
    let number = |coefficient| {
        let (value, times_uncertainty) = match coefficient {
            Coefficient::Constant(value) => (value, 0),
            Coefficient::Uncertainty => (1.0, 1),
        };
        atkd_coefficient { value: value * objective.distillation_scale(), times_uncertainty }
    };
    let (easy, hard) = (objective.easy(), objective.hard());
    let mean = u32::from(objective.reduction() == Reduction::Mean);
    // With one token the mean's own division, which the kernels do, is by 1.
    let scale = objective.reduction_scale(1);
    let gradient = call.gradient;
    let weights = atkd_objective {
        tkd: [number(easy.tkd), number(hard.tkd)],
        dkd: [number(easy.dkd), number(hard.dkd)],
        ce_weight: objective.ce_weight(),
        inverse_temperature: 1.0 / objective.temperature(),
    };
    let first = atkd_rows {
        batch,
        objective: weights,
        student: call.student.address as *const c_void,
        gradient: gradient.map_or(0, |gradient| gradient.address) as *mut c_void,
        upstream: call.upstream.unwrap_or(0) as *const f32,
        teacher_margin: column(UNCERTAINTY) as *mut f32,
        student_margin: column(TKD) as *mut f32,
        dkd: column(DKD) as *mut f32,
        student_margin_at_1: column(LOSS) as *mut f64,
        states,
        wrong: std::ptr::null(),
        student_strides: strides(call.student, call.tokens),
        gradient_strides: strides(gradient.unwrap_or(call.student), call.tokens),
        scale: scale * objective.upstream_gradient(),
        mean,
        write_keys: (guess || !needs_margins || margins.is_some()).into(),
        guess: guess.into(),
        clusters: 0,
        team: 1,
        slice: plan.slice_chunks,
    };
    let rows = |shape: LaunchShape, rows: atkd_rows| Launch {
        kernel: match plan.row_kernel {
            RowKernel::Resident => of_dtype!("row_resident", problem.student),
            RowKernel::Pipelined => of_dtype!("row_pipelined", problem.student),
            RowKernel::PipelinedWide => of_dtype!("row_pipelined_wide", problem.student),
            RowKernel::Stream => row_stream(problem.teacher, problem.student, problem.gradient),
        },
        shape,
        parameters: Parameters::Rows(atkd_rows {
            clusters: shape.grid / shape.blocks_a_row(),
            team: shape.team,
            ..rows
        }),
    };
    let again = atkd_rows { wrong, guess: 0, write_keys: 0, ..first };
    let terms = Launch {
        kernel: "token_terms",
        shape: plan.terms,
        parameters: Parameters::TokenTerms(atkd_token_terms {
            batch,
            objective: weights,
            uncertainty: column(UNCERTAINTY) as *mut f32,
            tkd: column(TKD) as *mut f32,
            dkd: column(DKD) as *mut f32,
            loss: column(LOSS) as *mut f64,
            sums: states.cast(),
            reduced_loss_to: output.loss.unwrap_or(0) as *mut f32,
            uncertainty_to: output.uncertainty.unwrap_or(0) as *mut f32,
            tkd_to: output.tkd.unwrap_or(0) as *mut f32,
            dkd_to: output.dkd.unwrap_or(0) as *mut f32,
            margin_to: output.margin.unwrap_or(0) as *mut f32,
            modes_to: output.modes.unwrap_or(0) as *mut u8,
            scale,
            mean,
            blocks: plan.terms.grid,
        }),
    };
    let first = rows(plan.rows, first);
    let again = rows(plan.rows_again, again);
    let rows = if guess {
        [Some(count), Some(first), Some(select), Some(again)]
    } else if !selects {
        [needs_margins.then_some(margin), Some(count), Some(first), None]
    } else if before_rows {
        [needs_margins.then_some(margin), Some(select), Some(first), None]
    } else {
        // Which tokens are hard is told after the rows, whose margins then come with the loss.
        [needs_margins.then_some(margin), Some(count), Some(first), Some(select)]
    };
    let order = rows.into_iter().flatten().chain([terms]);
    // A grid without blocks cannot be launched, and has nothing to do.
    Ok(order.filter(|launch| launch.shape.grid > 0))
}

/// What multiplies a gradient `[tokens, vocab]`, in place, by the float32 scalar at `factor`.
///
/// # Errors
/// If the shape, the strides and the addresses do not go together.
pub(crate) fn scale_gradient(
    device: &DeviceProperties,
    gradient: RawLogits,
    tokens: usize,
    vocab: usize,
    factor: u64,
) -> Result<Option<Launch>> {
    check_sizes(tokens, vocab)?;
    gradient.end("the gradient", tokens, vocab)?;
    if factor == 0 {
        return Err(Error::Null { what: "the factor", elements: 1 });
    }
    check_alignment("the factor", factor, size_of::<f32>() as u64)?;
    let (shape, parts) = plan::scale_gradient(device, tokens, vocab);
    let launch = Launch {
        kernel: of_dtype!("scale_gradient", gradient.dtype),
        shape,
        parameters: Parameters::ScaleGradient(atkd_scale_gradient {
            gradient: gradient.address as *mut c_void,
            factor: factor as *const f32,
            strides: strides(gradient, tokens),
            tokens: tokens as u32,
            vocab: vocab as u32,
            blocks: shape.grid,
            parts,
        }),
    };
    Ok((shape.grid > 0).then_some(launch))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Strides;

    #[test]
    fn a_workspace_takes_33_bytes_a_token_and_67_kb() {
        for capacity in [0, 1, 15, 16, 17, 8192, 1 << 22] {
            let bytes = Layout { capacity }.bytes();
            assert!(bytes <= 33 * capacity + 67_584, "{bytes} bytes for {capacity} tokens");
        }
    }

    #[test]
    fn rows_start_where_the_kernels_find_them() {
        let mut random = fastrand::Rng::with_seed(0);
        for inner in
            (2..70).chain((2..31).flat_map(|bits| [(1 << bits) - 1, 1 << bits, (1 << bits) + 1]))
        {
            let logits = RawLogits {
                address: 0,
                dtype: Dtype::F16,
                strides: Strides::nested(inner, 7 * inner + 5, 7),
            };
            let at = strides(logits, i32::MAX as usize);
            let last = i32::MAX as usize;
            let near = |row: usize| [row.saturating_sub(1), row, row + 1];
            let rows =
                (0..8).flat_map(|times| near(times * inner)).chain(near(last / inner * inner));
            let rows = rows.chain((0..100).map(|_| random.usize(..last))).chain([last]);
            for row in rows.filter(|&row| row <= last) {
                // As row_at in kernels/memory.cuh.
                let outer = (row as u64 * u64::from(at.inverse)) >> 32 >> at.shift;
                let start = row as i64 * at.stride + outer as i64 * at.skip;
                assert_eq!(start, logits.strides.start(row) as i64, "{row} of {inner}");
            }
        }
    }

    #[test]
    fn keys_and_margins() {
        assert_eq!(margin_of_key(0), f64::NEG_INFINITY);
        assert!(margin_of_key(1).is_nan());
        for margin in [0.0_f32, 1.5, -1.5, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE] {
            // As key_of in kernels/row_math.cuh.
            let bits = margin.to_bits();
            let key = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
            assert_eq!(margin_of_key(key), f64::from(margin));
        }
    }
}
