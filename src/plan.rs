//! How a call is cut into blocks: a pure function of the shapes and the device.

use std::fmt;

use crate::params::*;
use crate::{Dtype, Target};

/// The facts of a device that a plan follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceProperties {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the L2 cache.
    pub l2_bytes: usize,
    /// Bytes of shared memory of a multiprocessor, of which each block takes 1 KiB beside its own.
    pub shared_bytes: usize,
    /// How many blocks of `row_pipelined` a multiprocessor has registers for. 0 before compute capability 9.0, where
    /// there are neither bulk copies nor clusters.
    pub pipelined_blocks: u32,
    /// How many blocks of `row_pipelined_wide` likewise.
    pub pipelined_wide_blocks: u32,
}

impl DeviceProperties {
    /// An NVIDIA H200, for plans where there is no device.
    pub const H200: Self = Self {
        multiprocessors: 132,
        l2_bytes: 60 << 20,
        shared_bytes: 228 << 10,
        pipelined_blocks: ATKD_PIPELINED_BLOCKS,
        pipelined_wide_blocks: ATKD_PIPELINED_WIDE_BLOCKS,
    };

    /// Blocks that can form a cluster without the driver's special leave.
    pub fn portable_cluster(&self) -> u32 {
        if self.pipelined_blocks > 0 { 8 } else { 1 }
    }
}

/// The facts of a call that a plan follows from. All sizes are at most `i32::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Rows.
    pub tokens: usize,
    /// Logits in a row.
    pub vocab: usize,
    /// The type of the teacher's logits.
    pub teacher: Dtype,
    /// The type of the student's logits.
    pub student: Dtype,
    /// The type of the gradient; the student's where none is wanted.
    pub gradient: Dtype,
    /// Cross entropy needs a sum of its own: it has a weight, and the temperature is not 1, or each token's own.
    pub sum_at_1: bool,
    /// The rows of student, teacher and gradient start equally many elements after multiples of 16 bytes; of two types,
    /// modulo the elements that both have in as many bytes.
    pub aligned_alike: bool,
    /// Parts within which hard tokens are selected.
    pub scopes: usize,
    /// The token at which the vocabulary is split.
    pub target: Target,
    /// The origin of the set of hard tokens.
    pub hard: HardTokens,
    /// A gradient is wanted that depends on which tokens are hard.
    pub gradient_depends_on_hard: bool,
    /// The gradient is divided by the sizes of groups that only the selection tells, so that no row can be done before.
    pub needs_group_sizes: bool,
    /// The gradient overwrites the student's logits, so that no row can be done again.
    pub in_place: bool,
}

/// The origin of a call's set of hard tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HardTokens {
    /// The call selects them by the margins that it computes.
    Selected,
    /// The call selects them by margins that the caller has.
    ByMargins,
    /// The caller gives the set.
    Given,
}

/// The order of a call's stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// The rows are done by the last call's threshold, and the mispredicted ones once more.
    PredictThenRepair,
    /// The hard tokens are known before the rows: selected by the caller's margins, or by those that a pass over the
    /// teacher's logits leaves.
    SelectFirst,
    /// The selection changes no gradient: it comes after the rows, which leave the margins.
    SelectLast,
    /// Nothing is selected: the caller gives the hard tokens.
    Given,
}

/// A stage of a call: one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// `teacher_margin`, if the plan has a margin pass.
    Margins,
    /// `count_valid`
    Count,
    /// `select_hard`
    Select,
    /// The kernel for rows, for all tokens.
    Rows,
    /// The kernel for rows, for the mispredicted tokens again.
    Repair,
    /// `token_terms`
    Finish,
}

impl Schedule {
    /// The stages in their order.
    pub fn stages(self) -> &'static [Stage] {
        use Stage::{Count, Finish, Margins, Repair, Rows, Select};
        match self {
            Self::PredictThenRepair => &[Count, Rows, Select, Repair, Finish],
            Self::SelectFirst => &[Margins, Select, Rows, Finish],
            Self::SelectLast => &[Margins, Count, Rows, Select, Finish],
            Self::Given => &[Margins, Count, Rows, Finish],
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::PredictThenRepair => "predict, then repair",
            Self::SelectFirst => "select first",
            Self::SelectLast => "select last",
            Self::Given => "hard tokens given",
        })
    }
}

/// How one kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    /// Blocks.
    pub grid: u32,
    /// Threads in a block, whole warps.
    pub block: u32,
    /// Blocks in a cluster.
    pub cluster: u32,
    /// Blocks in a team, which share a row as a cluster does, but through global memory. If more than 1, all
    /// blocks of the launch run at once.
    pub team: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

impl LaunchShape {
    /// Blocks that share a row: of a cluster or of a team.
    pub fn blocks_per_row(&self) -> u32 {
        self.cluster * self.team
    }
}

impl fmt::Display for LaunchShape {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let plural = if self.grid == 1 { "" } else { "s" };
        write!(f, "{} block{plural} of {} threads", self.grid, self.block)?;
        if self.cluster > 1 {
            write!(f, ", clusters of {}", self.cluster)?;
        }
        if self.team > 1 {
            write!(f, ", teams of {}", self.team)?;
        }
        if self.shared > 0 {
            write!(f, ", {:.1} KB of shared memory", f64::from(self.shared) / 1e3)?;
        }
        Ok(())
    }
}

/// The kernels that compute a row's loss and gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowKernel {
    /// `row_resident`: a block's registers hold the row, which is read once.
    Resident,
    /// `row_pipelined`: the shared memory of a team of blocks holds the row, which is read once.
    Pipelined,
    /// `row_pipelined_wide`: the same by half as many blocks, twice as large.
    PipelinedWide,
    /// `row_stream`: the row is read twice, the second time from the L2 cache.
    Stream,
}

impl fmt::Display for RowKernel {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl RowKernel {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Resident, Self::Pipelined, Self::PipelinedWide, Self::Stream];

    /// The kernel's name, but for the types.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resident => "row_resident",
            Self::Pipelined => "row_pipelined",
            Self::PipelinedWide => "row_pipelined_wide",
            Self::Stream => "row_stream",
        }
    }

    /// The place where it holds a row, in a few words.
    pub fn summary(self) -> &'static str {
        match self {
            Self::Resident => "A block's registers hold a row",
            Self::Pipelined => "The shared memory of a team of blocks holds a row",
            Self::PipelinedWide => "The same by blocks twice as large",
            Self::Stream => "A row is read twice",
        }
    }

    /// Returns whether its blocks exchange states through memory that a launch must find cleared.
    pub(crate) fn needs_cleared_states(self) -> bool {
        match self {
            Self::Pipelined | Self::PipelinedWide => true,
            Self::Resident | Self::Stream => false,
        }
    }
}

/// A kernel for rows that is to be used wherever it can do the call, for tests and measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preference {
    /// The kernel.
    pub row_kernel: RowKernel,
    /// Blocks of a team, up to 32, of `row_pipelined` and `row_pipelined_wide` or, where there are no clusters, of
    /// `row_stream`, which takes powers of two; 0 for the plan's choice.
    pub team: u32,
}

/// The launch of every kernel that a call may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The order of the stages.
    pub schedule: Schedule,
    /// The schedule's margin stage is needed: a pass over the teacher's logits before the rows.
    pub margin_pass: bool,
    /// `teacher_margin`: the teacher's rows are read once.
    pub margin: LaunchShape,
    /// `count_valid`: the labels are read.
    pub count: LaunchShape,
    /// `select_hard`: the keys are read from the L2 cache.
    pub select: LaunchShape,
    /// The kernel that reads both models' rows and writes the gradient.
    pub row_kernel: RowKernel,
    /// For all tokens.
    pub rows: LaunchShape,
    /// For those that are to be done again.
    pub rows_again: LaunchShape,
    /// Chunks of a row that a block of `row_pipelined` has room for.
    pub slice_chunks: u32,
    /// Bytes of the rows that are in flight at once: what a second read must find in the L2 cache.
    pub rows_in_flight_bytes: usize,
    /// `token_terms`: each token's terms, from what its row came to, and the loss.
    pub terms: LaunchShape,
}

const WARP: usize = ATKD_WARP as usize;
const CHUNK: usize = ATKD_CHUNK as usize;
/// Chunks of half precision in a line of the L2 cache; in two lines, of single precision.
const CHUNKS_OF_A_LINE: usize = (ATKD_LINE / (2 * ATKD_CHUNK)) as usize;
/// From here on `row_pipelined` is no slower than other kernels, as measured (docs/performance.md); and where only its wide
/// blocks can do the call.
const MIN_PIPELINED: usize = 2048;
const MIN_PIPELINED_WIDE: usize = 4096;
/// A lane for each block gathers its state.
const MAX_TEAM: usize = WARP;
const MARGIN_THREADS: usize = ATKD_MARGIN_THREADS as usize;
const MARGIN_BLOCKS: usize = ATKD_MARGIN_BLOCKS as usize;
const STREAM_THREADS: usize = ATKD_STREAM_THREADS as usize;
const STREAM_BLOCKS: usize = ATKD_STREAM_BLOCKS as usize;
const RESIDENT_THREADS: usize = ATKD_RESIDENT_THREADS as usize;
const RESIDENT_BLOCKS: usize = ATKD_RESIDENT_BLOCKS as usize;
const SCALE_THREADS: usize = ATKD_SCALE_THREADS as usize;
const SCALE_BLOCKS: usize = ATKD_SCALE_BLOCKS as usize;
const ENTROPY_THREADS: usize = ATKD_ENTROPY_THREADS as usize;
const ENTROPY_BLOCKS: usize = ATKD_ENTROPY_BLOCKS as usize;
const SPARSE_MARGIN_THREADS: usize = ATKD_SPARSE_MARGIN_THREADS as usize;
const SPARSE_MARGIN_BLOCKS: usize = ATKD_SPARSE_MARGIN_BLOCKS as usize;
const SPARSE_THREADS: usize = ATKD_SPARSE_THREADS as usize;
const SPARSE_BLOCKS: usize = ATKD_SPARSE_BLOCKS as usize;
const MERGE_THREADS: usize = ATKD_MERGE_THREADS as usize;
const MERGE_BLOCKS: usize = ATKD_MERGE_BLOCKS as usize;
const COUNT_THREADS: usize = ATKD_COUNT_THREADS as usize;
const TERMS_THREADS: usize = ATKD_TERMS_THREADS as usize;
const SELECT_THREADS: usize = ATKD_SELECT_THREADS as usize;
/// Bytes of each model that a thread of `row_resident` holds in registers.
const HELD_BYTES: usize = ATKD_HELD_BYTES as usize;
/// How many times as many rows in flight outweigh having a block fewer per multiprocessor.
const MIN_GAIN: f64 = 1.05;
/// Bytes by which a device hands out shared memory.
const SHARED_UNIT: usize = 128;
/// Bytes of shared memory that the driver reserves per block.
const RESERVED_BYTES: usize = 1024;

/// A way to hold rows in shared memory.
#[derive(Clone, Copy)]
struct Fit {
    /// Blocks of a team.
    team: usize,
    /// Teams that run at once.
    teams: usize,
    /// Bytes of a block's slices.
    bytes: usize,
}

/// The blocks of a kernel whose teams hold rows in shared memory.
#[derive(Clone, Copy)]
struct BlocksOnChip {
    threads: usize,
    /// Blocks that a multiprocessor has registers for.
    max: usize,
}

impl BlocksOnChip {
    fn pipelined(device: &DeviceProperties) -> Self {
        Self { threads: ATKD_PIPELINED_THREADS as usize, max: device.pipelined_blocks as usize }
    }

    fn pipelined_wide(device: &DeviceProperties) -> Self {
        let max = device.pipelined_wide_blocks as usize;
        Self { threads: ATKD_PIPELINED_WIDE_THREADS as usize, max }
    }
}

/// Bytes that a block of `row_pipelined` takes of a multiprocessor's shared memory beside its slices: its static shared
/// memory, and what the driver reserves per block.
fn pipelined_shared_bytes(sum_at_1: bool) -> usize {
    let own = if sum_at_1 { ATKD_PIPELINED_AT_1_STATIC_BYTES } else { ATKD_PIPELINED_STATIC_BYTES };
    own as usize + RESERVED_BYTES
}

/// Chunks of a row, which has up to one more if it starts off a chunk's boundary.
fn chunks(vocab: usize) -> usize {
    (vocab + CHUNK - 1).div_ceil(CHUNK)
}

/// Chunks of a row that each block of a team has room for: whole lines, of which the row's first may start before it.
fn slice(chunks: usize, team: usize) -> usize {
    (chunks + CHUNKS_OF_A_LINE - 1).div_ceil(team).next_multiple_of(CHUNKS_OF_A_LINE)
}

/// Threads for `work` items, `each` of them per thread, up to `max`.
fn threads(work: usize, each: usize, max: usize) -> u32 {
    work.div_ceil(each).next_multiple_of(WARP).clamp(WARP, max) as u32
}

/// A grid of whole clusters, as large as a device launches at most.
fn shape(grid: usize, block: u32, cluster: u32) -> LaunchShape {
    let max = i32::MAX as u32 / cluster * cluster;
    LaunchShape {
        grid: u32::try_from(grid).unwrap_or(max).min(max),
        block,
        cluster,
        team: 1,
        shared: 0,
    }
}

/// The launch of `scale_gradient`, and in how many parts a row is done by as many blocks: more than one where there are
/// fewer rows than blocks that run at once.
pub(crate) fn scale_gradient(
    device: &DeviceProperties,
    tokens: usize,
    vocab: usize,
) -> (LaunchShape, u32) {
    let chunks = chunks(vocab);
    let block = threads(chunks, 1, SCALE_THREADS);
    let resident = device.multiprocessors as usize * SCALE_BLOCKS * SCALE_THREADS / block as usize;
    let parts = (resident / tokens.max(1)).clamp(1, chunks.div_ceil(SCALE_THREADS));
    (shape(tokens.min(resident / parts) * parts, block, 1), parts as u32)
}

/// The launch of `token_entropies`: a block takes a row in turn.
pub(crate) fn token_entropies(
    device: &DeviceProperties,
    tokens: usize,
    vocab: usize,
) -> LaunchShape {
    let block = threads(chunks(vocab), 1, ENTROPY_THREADS);
    let resident =
        device.multiprocessors as usize * ENTROPY_BLOCKS * ENTROPY_THREADS / block as usize;
    shape(tokens.min(resident), block, 1)
}

/// The launch of `prepare_rows`: one block clears, even without tokens.
pub(crate) fn prepare_rows(tokens: usize) -> LaunchShape {
    shape(tokens.div_ceil(COUNT_THREADS).max(1), COUNT_THREADS as u32, 1)
}

/// The launch of `select_hard`: a cluster per scope.
pub(crate) fn select_hard(device: &DeviceProperties, tokens: usize, scopes: usize) -> LaunchShape {
    let largest_scope = tokens.div_ceil(scopes.max(1));
    let blocks = (largest_scope.div_ceil(SELECT_THREADS).next_power_of_two() as u32)
        .clamp(1, device.portable_cluster());
    shape(scopes * blocks as usize, threads(largest_scope, 1, SELECT_THREADS), blocks)
}

/// The launch of a kernel for a shard's rows: a block for each, or a cluster where there are fewer rows than blocks that run
/// at once. The blocks are small where the shard is, so that others read while one merges states.
pub(crate) fn shard_rows(device: &DeviceProperties, tokens: usize, columns: usize) -> LaunchShape {
    let chunks = chunks(columns);
    let resident = device.multiprocessors as usize * STREAM_BLOCKS;
    let mut blocks = 1;
    while 2 * blocks <= device.portable_cluster() as usize
        && tokens.saturating_mul(2 * blocks) <= resident
        && chunks >= 2 * blocks * STREAM_THREADS
    {
        blocks *= 2;
    }
    let block = threads(chunks, 16 * blocks, STREAM_THREADS);
    shape(tokens.saturating_mul(blocks), block, blocks as u32)
}

/// The launch of `sparse_margin`: a warp takes a token in turn.
pub(crate) fn sparse_margin(device: &DeviceProperties, tokens: usize) -> LaunchShape {
    let resident = device.multiprocessors as usize * SPARSE_MARGIN_BLOCKS;
    let block = SPARSE_MARGIN_THREADS;
    shape(tokens.div_ceil(block / WARP).min(resident), block as u32, 1)
}

/// The launch of `row_sparse`, and the chunks of a row that a block has room for: as few blocks to a row as hold it, with as
/// many as there can be on a multiprocessor, which read while others wait. A row that no cluster holds is read in tiles.
pub(crate) fn row_sparse(
    device: &DeviceProperties,
    tokens: usize,
    vocab: usize,
    student: Dtype,
    top_k: usize,
) -> (LaunchShape, u32) {
    let (chunks, chunk_bytes) = (chunks(vocab), CHUNK * student.size());
    let room = |resident: usize| {
        let of_block = device.shared_bytes / resident / SHARED_UNIT * SHARED_UNIT;
        of_block.saturating_sub(ATKD_SPARSE_STATIC_BYTES as usize + RESERVED_BYTES) / chunk_bytes
    };
    let most = device.portable_cluster() as usize;
    let fits = (1..=SPARSE_BLOCKS).rev().find_map(|resident| {
        let blocks = chunks.div_ceil(room(resident));
        (blocks <= most).then_some(blocks)
    });
    let blocks = fits.unwrap_or(most);
    let of_block = chunks.div_ceil(blocks);
    let tile = of_block.min(if fits.is_some() { of_block } else { room(SPARSE_BLOCKS) });
    // A thread does a chunk of the classes, of which the last is the rest.
    let least = (top_k / CHUNK + 1).next_multiple_of(WARP) as u32;
    let block = threads(tile, 4, SPARSE_THREADS).max(least);
    let shape = shape(tokens.saturating_mul(blocks), block, blocks as u32);
    (LaunchShape { shared: (tile * chunk_bytes) as u32, ..shape }, tile as u32)
}

/// The launch of `merge_states`: a warp takes a token in turn.
pub(crate) fn merge_states(device: &DeviceProperties, tokens: usize) -> LaunchShape {
    let resident = device.multiprocessors as usize * MERGE_BLOCKS;
    shape(tokens.div_ceil(MERGE_THREADS / WARP).min(resident), MERGE_THREADS as u32, 1)
}

impl Plan {
    /// The plan of a call on a device: by the preferred kernel if that can do the call, else by the first that can of
    /// those that read a row once, else by `row_stream`.
    pub fn new(
        device: &DeviceProperties,
        problem: &Problem,
        preferred: Option<Preference>,
    ) -> Self {
        let mut default_order =
            [Self::default_pipelined(device, problem), RowKernel::Resident, RowKernel::Stream];
        let is_wide = problem.sum_at_1 || problem.teacher != problem.student;
        if problem.vocab < if is_wide { MIN_PIPELINED_WIDE } else { MIN_PIPELINED } {
            default_order.rotate_left(1);
        }
        let default_order = default_order.map(|row_kernel| Preference { row_kernel, team: 0 });
        preferred
            .into_iter()
            .chain(default_order)
            .find_map(|choice| Self::with(device, problem, choice))
            .expect("row_stream can do any call")
    }

    fn with(device: &DeviceProperties, problem: &Problem, choice: Preference) -> Option<Self> {
        let Preference { row_kernel, team } = choice;
        let Problem { tokens, vocab, scopes, .. } = *problem;
        let chunks = chunks(vocab);
        let (schedule, margin_pass) = problem.schedule();
        let (rows, blocks) = match row_kernel {
            RowKernel::Resident => (Self::resident(problem, chunks)?, RESIDENT_BLOCKS),
            RowKernel::Pipelined => {
                let blocks = BlocksOnChip::pipelined(device);
                (Self::pipelined(device, problem, blocks, team)?, blocks.max)
            }
            RowKernel::PipelinedWide => {
                let blocks = BlocksOnChip::pipelined_wide(device);
                (Self::pipelined(device, problem, blocks, team)?, blocks.max)
            }
            RowKernel::Stream => (Self::stream(device, problem, chunks, team)?, STREAM_BLOCKS),
        };
        let per_row = rows.blocks_per_row() as usize;
        // Few threads to a short row: beside its chunks, a row costs each the same whatever its length.
        let margin = threads(vocab.div_ceil(CHUNK), 8, MARGIN_THREADS);
        let resident_margins =
            device.multiprocessors as usize * MARGIN_BLOCKS * MARGIN_THREADS / margin as usize;
        let resident = (device.multiprocessors as usize * blocks / per_row).max(1);
        let again = tokens.min(resident) * per_row;
        Some(Self {
            schedule,
            margin_pass,
            // Every block has as many rows as any other: a few that ended last would leave the memory idle.
            margin: shape(tokens.div_ceil(tokens.div_ceil(resident_margins).max(1)), margin, 1),
            count: shape(tokens.div_ceil(COUNT_THREADS), COUNT_THREADS as u32, 1),
            select: select_hard(device, tokens, scopes),
            row_kernel,
            rows,
            rows_again: LaunchShape { grid: rows.grid.min(again as u32), ..rows },
            slice_chunks: slice(chunks, per_row) as u32,
            rows_in_flight_bytes: in_flight_bytes(device, problem, per_row),
            // One ends the call, even without tokens.
            terms: shape(
                tokens.div_ceil(TERMS_THREADS).clamp(1, ATKD_TERMS_GRID as usize),
                TERMS_THREADS as u32,
                1,
            ),
        })
    }

    /// Why rows are done as they are, in words.
    pub fn reason(&self, device: &DeviceProperties) -> String {
        let LaunchShape { grid, team, .. } = self.rows;
        match self.row_kernel {
            RowKernel::Resident => {
                "A row of both models fits the registers of a block, so each logit is read once."
                    .into()
            }
            RowKernel::Pipelined | RowKernel::PipelinedWide => format!(
                "The shared memory of a team of {team} holds a row of both models, {} blocks to a multiprocessor, so \
                 each logit is read once. {} teams run at once, and take turns at the rows.",
                grid.div_ceil(device.multiprocessors),
                grid / team
            ),
            RowKernel::Stream => format!(
                "No team here holds a row of both models, so it is read twice. {}, the rows in flight at once are \
                 {:.1} MB, which the second read {} in the L2 cache (half of it is taken as safe).",
                match (self.rows.blocks_per_row(), team) {
                    (1, _) => "With a block a row".into(),
                    (blocks, 1) => format!("In clusters of {blocks}"),
                    (_, team) => format!("In teams of {team} blocks, which all run at once"),
                },
                self.rows_in_flight_bytes as f64 / 1e6,
                if self.rows_in_flight_bytes <= device.l2_bytes / 2 {
                    "finds"
                } else {
                    "does not all find"
                },
            ),
        }
    }

    /// The plan with grids for so many of the call's tokens: a row is done by the same blocks, to the same bits.
    pub(crate) fn of_range(self, tokens: usize) -> Self {
        let most = |shape: LaunchShape| {
            let grid = tokens.saturating_mul(shape.blocks_per_row() as usize);
            LaunchShape { grid: shape.grid.min(u32::try_from(grid).unwrap_or(u32::MAX)), ..shape }
        };
        Self { margin: most(self.margin), rows: most(self.rows), ..self }
    }

    /// A block a row.
    fn resident(problem: &Problem, chunks: usize) -> Option<LaunchShape> {
        let held = HELD_BYTES / (CHUNK * problem.student.size());
        (problem.of_one_type() && chunks <= RESIDENT_THREADS * held)
            .then(|| shape(problem.tokens, threads(chunks, held, RESIDENT_THREADS), 1))
    }

    /// Wide blocks make teams half as large, which meet sooner. Where a block holds a row, more of them are better.
    fn default_pipelined(device: &DeviceProperties, problem: &Problem) -> RowKernel {
        let blocks = BlocksOnChip::pipelined(device);
        match Self::pipelined(device, problem, blocks, 0) {
            Some(shape) if shape.team == 1 => RowKernel::Pipelined,
            _ => RowKernel::PipelinedWide,
        }
    }

    /// Teams as small as hold a row, as many as run at once. The more blocks a multiprocessor has, the more rows it works
    /// on while it waits for others: fewer, which have more room each, only if the rows that are in flight at once are more
    /// by [`MIN_GAIN`], or if there is no other way.
    fn pipelined(
        device: &DeviceProperties,
        problem: &Problem,
        blocks_on_chip: BlocksOnChip,
        team: u32,
    ) -> Option<LaunchShape> {
        // The wide kernels do cross entropy's own sum, or float32 beside half precision.
        let wide = blocks_on_chip.threads == ATKD_PIPELINED_WIDE_THREADS as usize;
        let has_f32 = [problem.teacher, problem.student].contains(&Dtype::F32);
        let has_kernel = match (problem.teacher == problem.student, problem.sum_at_1) {
            (true, false) => true,
            (true, true) => wide,
            (false, sum_at_1) => wide && has_f32 && !sum_at_1,
        };
        if !has_kernel || !problem.aligned_alike {
            return None;
        }
        let chunks = chunks(problem.vocab);
        let teams = if team > 0 { team as usize..=team as usize } else { 1..=MAX_TEAM };
        let fit = |blocks: usize| {
            let resident = device.multiprocessors as usize * blocks;
            let resident = resident.min(ATKD_PIPELINED_GRID as usize);
            let room = device.shared_bytes / blocks / SHARED_UNIT * SHARED_UNIT;
            let room = room.saturating_sub(pipelined_shared_bytes(problem.sum_at_1));
            teams.clone().take_while(|&team| team <= MAX_TEAM.min(resident)).find_map(|team| {
                let of_pair = problem.teacher.size() + problem.student.size();
                let bytes = slice(chunks, team) * CHUNK * of_pair;
                (bytes <= room).then_some(Fit { team, teams: resident / team, bytes })
            })
        };
        let mut fits = (1..=blocks_on_chip.max).rev().filter_map(fit);
        let most_blocks = fits.next()?;
        let enough = |fewer: &Fit| fewer.teams as f64 > MIN_GAIN * most_blocks.teams as f64;
        let Fit { team, teams, bytes } = fits.next().filter(enough).unwrap_or(most_blocks);
        Some(LaunchShape {
            shared: bytes as u32,
            team: team as u32,
            ..shape(problem.tokens.min(teams) * team, blocks_on_chip.threads as u32, 1)
        })
    }

    /// Clusters, or teams where there are none, only as large as it takes for the rows in flight to fill half of
    /// the L2 cache, and only where every thread still has a chunk.
    fn stream(
        device: &DeviceProperties,
        problem: &Problem,
        chunks: usize,
        team: u32,
    ) -> Option<LaunchShape> {
        let tokens = problem.tokens;
        let resident =
            (device.multiprocessors as usize * STREAM_BLOCKS).min(ATKD_TEAM_BLOCKS as usize);
        let clusters = device.portable_cluster() > 1;
        let most =
            if clusters { device.portable_cluster() as usize } else { MAX_TEAM.min(resident) };
        let mut blocks = team.max(1) as usize;
        if blocks > most || !blocks.is_power_of_two() || (team > 0 && clusters) {
            return None;
        }
        while team == 0
            && 2 * blocks <= most
            && in_flight_bytes(device, problem, blocks) > device.l2_bytes / 2
            && chunks >= 2 * blocks * STREAM_THREADS
            && tokens.saturating_mul(2 * blocks) <= i32::MAX as usize
        {
            blocks *= 2;
        }
        let block = threads(chunks, 4 * blocks, STREAM_THREADS);
        if clusters || blocks == 1 {
            return Some(shape(tokens * blocks, block, blocks as u32));
        }
        let grid = tokens.min(resident / blocks) * blocks;
        Some(LaunchShape { team: blocks as u32, ..shape(grid, block, 1) })
    }
}

impl Problem {
    /// The order of the stages, and whether it starts with a pass over the teacher's logits.
    fn schedule(&self) -> (Schedule, bool) {
        let of_teacher = self.target == Target::Teacher;
        // Margins that nobody has, and that the gradients wait for.
        let wanted = self.gradient_depends_on_hard && self.hard == HardTokens::Selected;
        let schedule = match self.hard {
            HardTokens::Given => Schedule::Given,
            HardTokens::ByMargins => Schedule::SelectFirst,
            // The prediction is one threshold, and needs the target's logits before any row's.
            HardTokens::Selected
                if wanted
                    && !of_teacher
                    && self.scopes == 1
                    && !self.in_place
                    && !self.needs_group_sizes =>
            {
                return (Schedule::PredictThenRepair, false);
            }
            HardTokens::Selected if wanted => Schedule::SelectFirst,
            HardTokens::Selected => Schedule::SelectLast,
        };
        (schedule, of_teacher || wanted)
    }

    /// Returns whether `row_resident` can do the call's types.
    fn of_one_type(&self) -> bool {
        self.teacher == self.student && self.student == self.gradient && !self.sum_at_1
    }
}

fn in_flight_bytes(device: &DeviceProperties, problem: &Problem, blocks_per_row: usize) -> usize {
    let blocks = device.multiprocessors as usize * STREAM_BLOCKS;
    let rows = (blocks / blocks_per_row).clamp(1, problem.tokens.max(1));
    rows * problem.vocab * (problem.teacher.size() + problem.student.size())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::kernel::{KERNELS, of_rows};
    use crate::objective::Family;

    const H200: DeviceProperties = DeviceProperties::H200;
    const A100: DeviceProperties = DeviceProperties {
        multiprocessors: 108,
        l2_bytes: 40 << 20,
        shared_bytes: 164 << 10,
        pipelined_blocks: 0,
        pipelined_wide_blocks: 0,
    };

    fn problem(tokens: usize, vocab: usize, teacher: Dtype, student: Dtype) -> Problem {
        Problem {
            tokens,
            vocab,
            teacher,
            student,
            gradient: student,
            sum_at_1: false,
            aligned_alike: true,
            scopes: 1,
            target: Target::Label,
            hard: HardTokens::Selected,
            gradient_depends_on_hard: true,
            needs_group_sizes: false,
            in_place: false,
        }
    }

    #[test]
    fn schedules() {
        let plain = problem(64, 1000, Dtype::F32, Dtype::F32);
        let of = |problem: Problem| {
            let plan = Plan::new(&H200, &problem, None);
            (plan.schedule, plan.margin_pass)
        };
        assert_eq!(of(plain), (Schedule::PredictThenRepair, false));
        for without_prediction in [
            Problem { in_place: true, ..plain },
            Problem { needs_group_sizes: true, ..plain },
            Problem { scopes: 2, ..plain },
            Problem { target: Target::Teacher, ..plain },
        ] {
            assert_eq!(of(without_prediction), (Schedule::SelectFirst, true));
        }
        let last = Problem { gradient_depends_on_hard: false, ..plain };
        assert_eq!(of(last), (Schedule::SelectLast, false));
        assert_eq!(of(Problem { target: Target::Teacher, ..last }), (Schedule::SelectLast, true));
        for (hard, schedule) in
            [(HardTokens::ByMargins, Schedule::SelectFirst), (HardTokens::Given, Schedule::Given)]
        {
            for depends in [plain, last] {
                let problem = Problem { hard, ..depends };
                assert_eq!(of(problem), (schedule, false));
                let of_teacher = Problem { target: Target::Teacher, ..problem };
                assert_eq!(of(of_teacher), (schedule, true));
            }
        }
    }

    /// The kernel table has the launch bounds that kernels are compiled with, in this order.
    #[test]
    fn plans_stay_within_launch_bounds() {
        let threads = |name: &str| {
            let kernel = KERNELS.iter().find(|kernel| kernel.name.starts_with(name)).unwrap();
            kernel.threads
        };
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for vocab in [1, 100, 4096, 8185, 16_377, 50_257, 151_936, 1 << 20] {
                for tokens in [1, 300, 8192, 1 << 22] {
                    let problem = problem(tokens, vocab, dtype, dtype);
                    let plan = Plan::new(&H200, &problem, None);
                    let rows = RowKernel::ALL.into_iter().filter_map(|row_kernel| {
                        let plan = Plan::with(&H200, &problem, Preference { row_kernel, team: 0 })?;
                        Some((of_rows(row_kernel, Family::ForwardKl, [dtype; 3], false), plan.rows))
                    });
                    let others = [
                        ("teacher_margin", plan.margin),
                        ("count_valid", plan.count),
                        ("select_hard", plan.select),
                        ("token_terms", plan.terms),
                        ("prepare_rows", prepare_rows(tokens)),
                        ("row_states", shard_rows(&H200, tokens, vocab)),
                        ("row_terms", shard_rows(&H200, tokens, vocab)),
                        ("row_gradient", shard_rows(&H200, tokens, vocab)),
                        ("merge_states", merge_states(&H200, tokens)),
                        ("sparse_margin", sparse_margin(&H200, tokens)),
                        ("row_sparse", row_sparse(&H200, tokens, vocab, Dtype::F32, 1024).0),
                    ];
                    for (name, shape) in rows.chain(others) {
                        assert!((32..=threads(name)).contains(&shape.block), "{name}: {shape}");
                    }
                }
            }
        }
    }

    /// scripts/kernel-instructions counts for these. `ATKD_BLESS=1` writes the file anew.
    #[test]
    fn counted_plans() {
        let mut text = String::from(
            "# kernel, dtype, V: blocks a row, threads a block; of 8192 rows on an H200; * where the plan chooses it\n",
        );
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for vocab in [4096, 8185, 8192, 16_377, 32_000, 50_257, 128_256, 151_936] {
                let problem = problem(8192, vocab, dtype, dtype);
                let chosen = Plan::new(&H200, &problem, None);
                let mut line = |kernel: &str, launch: LaunchShape, mark: &str| {
                    let (blocks, threads) = (launch.blocks_per_row(), launch.block);
                    text += &format!("{kernel} {dtype} {vocab}: {blocks} {threads}{mark}\n");
                };
                line("teacher_margin", chosen.margin, " *");
                line("row_sparse", row_sparse(&H200, 8192, vocab, dtype, 64).0, " *");
                for row_kernel in RowKernel::ALL {
                    let choice = Preference { row_kernel, team: 0 };
                    if let Some(plan) = Plan::with(&H200, &problem, choice) {
                        let mark = if chosen.row_kernel == row_kernel { " *" } else { "" };
                        line(row_kernel.name(), plan.rows, mark);
                    }
                }
            }
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/plans.txt");
        if std::env::var_os("ATKD_BLESS").is_some() {
            std::fs::write(path, &text).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), text, "{path}; see ATKD_BLESS");
    }

    #[test]
    fn streamed_rows_in_flight_fit_the_cache() {
        let rows = |device, tokens, vocab| {
            let problem = problem(tokens, vocab, Dtype::F16, Dtype::Bf16);
            let plan = Plan::new(device, &problem, None);
            assert_eq!(plan.row_kernel, RowKernel::Stream);
            let LaunchShape { grid, cluster, .. } = plan.rows;
            assert!(plan.rows.team > 1 || grid == tokens as u32 * cluster);
            (plan.rows.blocks_per_row(), plan.rows_in_flight_bytes)
        };
        for vocab in [32_000, 50_257, 128_256, 151_936] {
            let (_, bytes) = rows(&H200, 8192, vocab);
            assert!(bytes <= H200.l2_bytes / 2, "{vocab}: {bytes}");
        }
        assert_eq!(rows(&H200, 8192, 128_256).0, 8);
        // Larger clusters there are not; the whole cache holds the rows still.
        assert!(rows(&H200, 8192, 256_000).1 < H200.l2_bytes);
        assert_eq!(rows(&H200, 8192, 4096).0, 1);
        for (vocab, team) in [(16_384, 1), (32_000, 2), (50_257, 4), (128_256, 8), (256_000, 16)] {
            let (blocks, bytes) = rows(&A100, 8192, vocab);
            assert_eq!(blocks, team, "{vocab}");
            assert!(bytes <= A100.l2_bytes / 2, "{vocab}: {bytes}");
        }
        // So few rows are in flight together anyway.
        assert_eq!(rows(&H200, 32, 128_256).0, 1);
    }

    #[test]
    fn rows_of_sparse_teachers() {
        for device in [&H200, &A100] {
            for dtype in [Dtype::F32, Dtype::Bf16] {
                for vocab in (1..900_000).step_by(997) {
                    for top_k in [1, 1024] {
                        let (shape, tile) = row_sparse(device, 7, vocab, dtype, top_k);
                        let LaunchShape { grid, block, cluster, shared, .. } = shape;
                        assert_eq!(grid, 7 * cluster);
                        assert!(cluster <= device.portable_cluster());
                        assert_eq!(shared as usize, tile as usize * CHUNK * dtype.size());
                        let own = ATKD_SPARSE_STATIC_BYTES as usize + RESERVED_BYTES;
                        assert!(shared as usize + own <= device.shared_bytes, "{vocab}");
                        // A thread does a chunk of the classes.
                        assert!(block as usize > top_k / CHUNK && block <= ATKD_SPARSE_THREADS);
                        let holds = (tile * cluster) as usize >= chunks(vocab);
                        assert!(holds || cluster == device.portable_cluster(), "{vocab}");
                    }
                }
            }
        }
        let blocks = |vocab, dtype| row_sparse(&H200, 1, vocab, dtype, 64).0.cluster;
        assert_eq!([32_000, 128_256, 151_936].map(|vocab| blocks(vocab, Dtype::Bf16)), [1, 4, 5]);
        assert_eq!([32_000, 128_256, 151_936].map(|vocab| blocks(vocab, Dtype::F32)), [2, 8, 6]);
    }

    #[test]
    fn rows_on_chip_have_room() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let held = HELD_BYTES / dtype.size();
            for vocab in (1..300_000).step_by(97).chain([4096, 34_000, 68_000, 128_256, 262_144]) {
                let plan = Plan::new(&H200, &problem(8192, vocab, dtype, dtype), None);
                let LaunchShape { grid, block, team, shared, .. } = plan.rows;
                // Up to 7 elements before the row in its first chunk, and up to 7 chunks before that in its line.
                let (room, wanted) = match plan.row_kernel {
                    RowKernel::Resident => (block as usize * held, vocab + 7),
                    RowKernel::Pipelined | RowKernel::PipelinedWide => {
                        let blocks = match plan.row_kernel {
                            RowKernel::Pipelined => BlocksOnChip::pipelined(&H200),
                            _ => BlocksOnChip::pipelined_wide(&H200),
                        };
                        let a_multiprocessor = grid.div_ceil(H200.multiprocessors) as usize;
                        let a_block = shared as usize + pipelined_shared_bytes(false);
                        let taken = a_multiprocessor * a_block.next_multiple_of(SHARED_UNIT);
                        assert!(taken <= H200.shared_bytes, "{vocab}: {plan:?}");
                        assert_eq!(block as usize, blocks.threads);
                        assert_eq!(shared % 256, 0);
                        ((shared * team) as usize / (2 * dtype.size()), vocab + 7 + 7 * CHUNK)
                    }
                    RowKernel::Stream => unreachable!(),
                };
                assert!(room >= wanted, "{vocab} {dtype}: {plan:?}");
            }
        }
        let rows = |vocab, dtype| {
            let plan = Plan::new(&H200, &problem(8192, vocab, dtype, dtype), None);
            (plan.row_kernel, plan.rows.grid, plan.rows.team)
        };
        assert_eq!(rows(2000, Dtype::Bf16), (RowKernel::Resident, 8192, 1));
        for (vocab, kernel, grid, team) in [
            (2048, RowKernel::Pipelined, 792, 1),
            (4096, RowKernel::Pipelined, 792, 1),
            (8192, RowKernel::Pipelined, 792, 1),
            (16_377, RowKernel::PipelinedWide, 396, 1),
            (32_000, RowKernel::PipelinedWide, 396, 2),
            (50_257, RowKernel::PipelinedWide, 396, 3),
            (128_256, RowKernel::PipelinedWide, 392, 7),
            (151_936, RowKernel::PipelinedWide, 392, 8),
            (262_144, RowKernel::PipelinedWide, 392, 14),
        ] {
            assert_eq!(rows(vocab, Dtype::F16), (kernel, grid, team), "{vocab}");
        }
        // Fewer blocks with more room each, where the most that a multiprocessor has would be more than a team's.
        assert_eq!(rows(500_000, Dtype::F32), (RowKernel::PipelinedWide, 126, 18));
        assert_eq!(rows(1_000_000, Dtype::Bf16).0, RowKernel::PipelinedWide);
        assert_eq!(rows(2_000_000, Dtype::Bf16).0, RowKernel::Stream);
        let a100 = |vocab| Plan::new(&A100, &problem(8192, vocab, Dtype::F32, Dtype::F32), None);
        assert_eq!(a100(8000).row_kernel, RowKernel::Resident);
        assert_eq!(a100(9000).row_kernel, RowKernel::Stream);
        let plain = problem(8192, 32_000, Dtype::Bf16, Dtype::Bf16);
        for other in [
            Problem { student: Dtype::F16, gradient: Dtype::F16, ..plain },
            Problem { teacher: Dtype::F32, sum_at_1: true, ..plain },
            Problem { aligned_alike: false, ..plain },
        ] {
            assert_eq!(Plan::new(&H200, &other, None).row_kernel, RowKernel::Stream);
        }
        // A float32 gradient beside half precision changes nothing, but where a block's registers would hold the row.
        for vocab in [2048, 32_000, 128_256] {
            let plain = problem(8192, vocab, Dtype::F16, Dtype::F16);
            let wide = Problem { gradient: Dtype::F32, ..plain };
            assert_eq!(Plan::new(&H200, &wide, None), Plan::new(&H200, &plain, None));
        }
        for (vocab, kernel) in [
            (4095, RowKernel::Stream),
            (4096, RowKernel::PipelinedWide),
            (128_256, RowKernel::PipelinedWide),
        ] {
            let plain = problem(8192, vocab, Dtype::F16, Dtype::F16);
            for other in [
                Problem { sum_at_1: true, ..plain },
                problem(8192, vocab, Dtype::F32, Dtype::Bf16),
                problem(8192, vocab, Dtype::F16, Dtype::F32),
            ] {
                assert_eq!(Plan::new(&H200, &other, None).row_kernel, kernel, "{vocab}");
            }
        }
        let short = problem(8192, 500, Dtype::F16, Dtype::F16);
        assert_eq!(Plan::new(&H200, &short, None).row_kernel, RowKernel::Resident);
        let wide = Problem { gradient: Dtype::F32, ..short };
        assert_eq!(Plan::new(&H200, &wide, None).row_kernel, RowKernel::Stream);
    }

    #[test]
    fn teams_of_a_wanted_size() {
        let rows = |team| {
            let problem = problem(8192, 32_000, Dtype::Bf16, Dtype::Bf16);
            let choice = Preference { row_kernel: RowKernel::Pipelined, team };
            Plan::with(&H200, &problem, choice).map(|plan| (plan.rows.grid, plan.rows.team))
        };
        let expected = [Some((132, 1)), Some((396, 2)), Some((660, 3)), Some((768, 32)), None];
        assert_eq!([1, 2, 3, 32, 33].map(rows), expected);
    }

    #[test]
    fn small_work_takes_small_blocks() {
        let plan = Plan::new(&H200, &problem(1, 1, Dtype::F32, Dtype::F32), None);
        let one_warp = LaunchShape { grid: 1, block: 32, cluster: 1, team: 1, shared: 0 };
        assert_eq!([plan.margin, plan.rows, plan.select], [one_warp; 3]);
        assert_eq!([plan.count, plan.terms], [LaunchShape { block: 256, ..one_warp }; 2]);
        let many = problem(131_072, 32_000, Dtype::Bf16, Dtype::Bf16);
        let shape = LaunchShape { grid: 8, block: 1024, cluster: 8, ..one_warp };
        assert_eq!(Plan::new(&H200, &many, None).select, shape);
        let sequences = Problem { scopes: 64, ..problem(8192, 32_000, Dtype::Bf16, Dtype::Bf16) };
        let shape = LaunchShape { grid: 64, block: 128, ..one_warp };
        assert_eq!(Plan::new(&H200, &sequences, None).select, shape);
    }

    #[test]
    fn margins_come_to_an_end_together() {
        let grid = |tokens| {
            let problem = problem(tokens, 32_000, Dtype::Bf16, Dtype::Bf16);
            Plan::new(&H200, &problem, None).margin.grid
        };
        // 660 blocks run at once, with 13, 4, 2, 1 rows each at most.
        assert_eq!([0, 3, 660, 661, 2048, 8192].map(grid), [0, 3, 660, 331, 512, 631]);
    }

    #[test]
    fn shapes_in_words() {
        let shape = LaunchShape { grid: 264, block: 256, cluster: 2, team: 1, shared: 64_100 };
        let words = "264 blocks of 256 threads, clusters of 2, 64.1 KB of shared memory";
        assert_eq!(shape.to_string(), words);
        let shape = LaunchShape { cluster: 1, team: 4, shared: 0, ..shape };
        assert_eq!(shape.to_string(), "264 blocks of 256 threads, teams of 4");
    }

    #[test]
    fn all_teams_run_at_once() {
        for multiprocessors in [1, 2, 3, 58, 82, 108, 300] {
            let device = DeviceProperties { multiprocessors, l2_bytes: 1, ..A100 };
            for tokens in [0, 1, 3, 100, i32::MAX as usize] {
                for preferred in [0, 1, 2, 16, 32] {
                    let problem = problem(tokens, 256_000, Dtype::F32, Dtype::F16);
                    let team = preferred;
                    let choice = Preference { row_kernel: RowKernel::Stream, team };
                    let Some(plan) = Plan::with(&device, &problem, choice) else {
                        assert!(preferred > 2 * multiprocessors);
                        continue;
                    };
                    for shape in [plan.rows, plan.rows_again] {
                        assert!(preferred == 0 || shape.team == preferred);
                        assert!(shape.grid.is_multiple_of(shape.team));
                        let most = (2 * multiprocessors).min(ATKD_TEAM_BLOCKS);
                        assert!(shape.team == 1 || shape.grid <= most, "{shape:?}");
                    }
                }
            }
        }
        for team in [3, 64] {
            let choice = Preference { row_kernel: RowKernel::Stream, team };
            let problem = problem(9, 9, Dtype::F32, Dtype::F16);
            assert_eq!(Plan::with(&A100, &problem, choice), None);
        }
    }

    #[test]
    fn grids_stay_within_what_a_device_launches() {
        let most = i32::MAX as usize;
        for vocab in [1, 100_000, most] {
            let problem = Problem { scopes: most, ..problem(most, vocab, Dtype::F32, Dtype::F32) };
            let plan = Plan::new(&H200, &problem, None);
            let rows = [plan.rows, plan.rows_again];
            let others = [plan.margin, plan.count, plan.select, plan.terms];
            for shape in rows.into_iter().chain(others) {
                assert!(shape.grid <= i32::MAX as u32, "{shape:?}");
                assert!(shape.grid.is_multiple_of(shape.cluster), "{shape:?}");
            }
            assert!(
                plan.row_kernel == RowKernel::PipelinedWide || plan.rows.grid == i32::MAX as u32
            );
        }
    }
}
