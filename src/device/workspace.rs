//! The memory that the kernels of a call share, and what they leave in it.

use std::ffi::c_void;

use crate::call::{RawCall, RawLabels};
use crate::params::*;
use crate::{Error, Objective, Output, Result, Target, TokenTerms};

use super::kernel::strides;

/// The columns of a workspace, one element per token each. The row kernels leave in three of them what a token's
/// terms follow from, and `token_terms` writes the terms over that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// float64. The row kernels: the student's margin at temperature 1, if cross entropy has a weight. Then
    /// `token_terms`: the token's loss before the reduction.
    Loss,
    /// float32. The row kernels: the teacher's margin. Then `token_terms`: the uncertainty.
    Uncertainty,
    /// float32. The row kernels: the student's margin over 2^64. Then `token_terms`: TKD.
    Tkd,
    /// float32. The row kernels: DKD over 2^64. Then `token_terms`: DKD.
    Dkd,
    /// uint32, written once in a call, by the first to know them: `teacher_margin`, the row kernels, or `select_hard`
    /// from the caller's margins. The order of the keys is that of the margins; 0 for an ignored token, 1 for NaN. In the
    /// memory of a repair, whose rows need no keys: the tokens' weights, float32, if they have any.
    Keys,
    /// uint32. `select_hard`, in a call that predicts: the mispredicted tokens in any order, as many as the summary
    /// counts. In the memory of a repair: the tokens to repair; then `prepare_rows`: their temperatures, float32, if they
    /// have any.
    Mispredicted,
    /// int32. `teacher_margin`: the target, if that is the teacher's arg max.
    Targets,
    /// uint8: ignored, easy or hard. The row kernels in a call that predicts, else `count_valid`; then `select_hard`.
    Groups,
}

impl Column {
    /// In the order in which they lie, widest first: for the simulator their names, and the bytes of an element.
    const ALL: [(Self, &str, usize); 8] = [
        (Self::Loss, "token losses", 8),
        (Self::Uncertainty, "uncertainties", 4),
        (Self::Tkd, "tkd", 4),
        (Self::Dkd, "dkd", 4),
        (Self::Keys, "keys", 4),
        (Self::Mispredicted, "mispredicted", 4),
        (Self::Targets, "targets", 4),
        (Self::Groups, "groups", 1),
    ];
}

/// Bytes of the area through which the blocks of a team exchange their states, two per block; `token_terms` leaves its
/// blocks' sums there.
pub(crate) const STATES_BYTES: usize = {
    let teams = 2 * (ATKD_TEAM_BLOCKS * ATKD_TEAM_STATE) as usize;
    let pipelined = 2 * (ATKD_PIPELINED_GRID * ATKD_EXCHANGE_BYTES) as usize;
    if teams > pipelined { teams } else { pipelined }
};
const _: () = assert!(ATKD_TERMS_GRID as usize * size_of::<f64>() <= STATES_BYTES);

/// The layout of a workspace: a summary, the columns, the teams' states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// For how many tokens there is room.
    pub capacity: usize,
}

impl Layout {
    /// Bytes in all: 33 a token and 100 KB.
    pub fn bytes(self) -> usize {
        self.states() + STATES_BYTES
    }

    /// Bytes before the teams' states.
    fn states(self) -> usize {
        self.after(&Column::ALL)
    }

    /// Bytes before a column.
    fn column(self, column: Column) -> usize {
        self.after(&Column::ALL[..column as usize])
    }

    /// Bytes of the summary and of the columns given.
    fn after(self, columns: &[(Column, &str, usize)]) -> usize {
        let padded = self.capacity.next_multiple_of(16);
        let bytes: usize = columns.iter().map(|(_, _, bytes)| bytes * padded).sum();
        size_of::<atkd_summary>().next_multiple_of(16) + bytes
    }

    /// The parts of a workspace at `address`, by name.
    #[cfg(feature = "simt")]
    pub fn columns(
        self,
        address: usize,
    ) -> impl Iterator<Item = (&'static str, std::ops::Range<usize>)> {
        let summary = ("summary", address..address + size_of::<atkd_summary>());
        let columns = Column::ALL.iter().map(move |&(column, name, bytes)| {
            let start = address + self.column(column);
            (name, start..start + bytes * self.capacity)
        });
        let states = address + self.states();
        let states = ("teams' states", states..states + STATES_BYTES);
        [summary, states].into_iter().chain(columns)
    }

    /// The offsets of the columns that callers read on the device.
    #[cfg(feature = "cuda")]
    pub fn offsets(self) -> ColumnOffsets {
        ColumnOffsets {
            loss: std::mem::offset_of!(atkd_summary, loss_f32),
            token_loss: self.column(Column::Loss),
            uncertainty: self.column(Column::Uncertainty),
            tkd: self.column(Column::Tkd),
            dkd: self.column(Column::Dkd),
            groups: self.column(Column::Groups),
        }
    }

    /// Reads the results that kernels left in a copy of the workspace's memory.
    ///
    /// # Errors
    /// If a kernel met a label or an offset out of range, or a sparse teacher that is no distribution.
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
                let group = u32::from(memory[self.column(Column::Groups) + token]);
                TokenTerms {
                    margin: margin_of_key(u32::from_ne_bytes(column(
                        memory,
                        self.column(Column::Keys),
                        token,
                    ))),
                    uncertainty: float(Column::Uncertainty, token),
                    tkd: float(Column::Tkd, token),
                    dkd: float(Column::Dkd, token),
                    loss: f64::from_ne_bytes(column(memory, self.column(Column::Loss), token)),
                    valid: group != ATKD_IGNORED,
                    hard: group == ATKD_HARD,
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
    pub groups: usize,
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
    if summary.teacher_fault != 0 {
        return Err(Error::DeviceTeacher { token: !summary.teacher_fault, vocab });
    }
    Ok(())
}

/// The inverse of `key_of` in kernels/math/keys.cuh.
fn margin_of_key(key: u32) -> f64 {
    match key {
        0 => f64::NEG_INFINITY,
        1 => f64::NAN,
        _ if key & 0x8000_0000 != 0 => f32::from_bits(key & 0x7fff_ffff).into(),
        _ => f32::from_bits(!key).into(),
    }
}

/// A workspace by its address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// The address of the summary, a multiple of 16. The summary is all 0 before the first call.
    summary: u64,
    /// The address of the teams' states.
    states: u64,
    /// The address of a word that keeps the last call's threshold, which the next call predicts by. Any value is right.
    kept_threshold: u64,
    /// The workspace that the columns are of: this one, but for a repair.
    columns: u64,
    /// Its layout.
    layout: Layout,
    /// The token that the columns start at.
    first: usize,
}

impl Memory {
    /// A workspace that keeps the threshold itself.
    pub fn new(layout: Layout, workspace: u64) -> Self {
        let kept_threshold =
            workspace + std::mem::offset_of!(atkd_summary, predicted_threshold) as u64;
        Self::keeping(layout, workspace, kept_threshold)
    }

    /// A workspace that keeps the threshold elsewhere.
    pub fn keeping(layout: Layout, workspace: u64, kept_threshold: u64) -> Self {
        let states = workspace + layout.states() as u64;
        Self { summary: workspace, states, kept_threshold, columns: workspace, layout, first: 0 }
    }

    /// The same with the columns from a token on.
    pub fn starting_at(self, first: usize) -> Self {
        Self { first, ..self }
    }

    /// The same with the columns of a workspace at `scratch` that is for so many tokens, as [`Kernels::workspace_bytes`]
    /// says.
    ///
    /// [`Kernels::workspace_bytes`]: crate::cuda::Kernels::workspace_bytes
    pub fn with_columns_of(self, scratch: u64, capacity: usize) -> Self {
        Self { columns: scratch, layout: Layout { capacity }, first: 0, ..self }
    }

    /// The address of a column.
    pub fn column(&self, column: Column) -> u64 {
        let (.., bytes) = Column::ALL[column as usize];
        self.columns + (self.layout.column(column) + bytes * self.first) as u64
    }

    /// The address of the summary.
    pub fn summary(&self) -> *mut atkd_summary {
        self.summary as *mut atkd_summary
    }

    /// The address of the teams' states.
    pub fn states(&self) -> *mut c_void {
        self.states as *mut c_void
    }

    /// The address of the word that keeps the threshold.
    pub fn kept_threshold(&self) -> *mut u32 {
        self.kept_threshold as *mut u32
    }

    /// Checks that there is room for so many tokens.
    pub fn check(&self, tokens: usize) -> Result<()> {
        let (what, needed, capacity) = ("tokens", tokens, self.layout.capacity);
        if needed > capacity { Err(Error::Workspace { what, needed, capacity }) } else { Ok(()) }
    }

    /// The parameters that kernels share, without teacher and labels.
    pub fn batch(&self, tokens: usize) -> atkd_batch {
        atkd_batch {
            teacher: std::ptr::null(),
            labels: std::ptr::null(),
            targets: self.column(Column::Targets) as *mut i32,
            keys: self.column(Column::Keys) as *mut u32,
            groups: self.column(Column::Groups) as *mut u8,
            token_weights: std::ptr::null(),
            temperatures: std::ptr::null(),
            summary: self.summary(),
            teacher_strides: atkd_strides { stride: 0, skip: 0, inverse: 0, shift: 0 },
            ignore_index: 0,
            tokens: tokens as u32,
            vocab: 1,
            label_bytes: 0,
            target: ATKD_TARGET_LABEL,
            inverse_temperature: 1.0,
            first_token: self.first as u32,
        }
    }

    /// The parameters that kernels share, with teacher and labels.
    pub fn batch_of(&self, objective: &Objective, call: &RawCall) -> atkd_batch {
        let (labels, label_bytes) = match call.labels {
            None => (0, 0),
            Some(RawLabels::I64(address)) => (address, 8),
            Some(RawLabels::I32(address)) => (address, 4),
        };
        atkd_batch {
            teacher: call.teacher.address as *const c_void,
            labels: labels as *const c_void,
            token_weights: call.token_weights.unwrap_or(0) as *const f32,
            temperatures: call.temperatures.unwrap_or(0) as *const f32,
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
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `column` counts on it.
    #[test]
    fn columns_are_listed_in_their_order() {
        for (i, (column, ..)) in Column::ALL.into_iter().enumerate() {
            assert_eq!(column as usize, i);
        }
    }

    #[test]
    fn a_workspace_takes_33_bytes_a_token_and_100_kb() {
        for capacity in [0, 1, 15, 16, 17, 8192, 1 << 22] {
            let bytes = Layout { capacity }.bytes();
            assert!(bytes <= 33 * capacity + 100_352, "{bytes} bytes for {capacity} tokens");
        }
    }

    #[test]
    fn keys_and_margins() {
        assert_eq!(margin_of_key(0), f64::NEG_INFINITY);
        assert!(margin_of_key(1).is_nan());
        for margin in [0.0_f32, 1.5, -1.5, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE] {
            // The arithmetic of key_of in kernels/math/keys.cuh.
            let bits = margin.to_bits();
            let key = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
            assert_eq!(margin_of_key(key), f64::from(margin));
        }
    }
}
